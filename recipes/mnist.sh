# As published for CIFAR-10: recipes/defaults.sh.

config_labels=""            # there are no files for it
