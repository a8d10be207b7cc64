# As published for CIFAR-10: recipes/defaults.sh.
