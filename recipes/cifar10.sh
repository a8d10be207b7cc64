# The published experiment.

config=freematch_cifar10_40_1
checkpoint=model_best.pth   # the best one on the test set
labelled=1500 unlabelled=3000 imbalance_default=100
