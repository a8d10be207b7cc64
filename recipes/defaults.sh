# What may differ from one data set to another; recipes/NAME.sh holds what does.

recipe_labels=40                # labelled images in all; 0: all that have a label
recipe_last=1000                # images 0 to 1000 of every class are generated
shape=-32x32                    # in the name of the zip
config=""                       # TorchSSL/config/<this>.yaml is stage 1's, <this>_aug<recipe_last>.yaml stage 3's
config_labels=40                # of the learners' files config/<learner>/<learner>_<data set>_<this>_0.yaml
learner_flags=()                # of stages 1 and 3, where there is no such file
checkpoint=latest_model.pth     # labels the images; the last one, so that the test set selects nothing
diffusion=(--batch-gpu=32)      # flags of train.py and train_noise.py
noise_classifier=(--batch=1024) # of train_classifier.py, with a given transition matrix
volmin=(--batch=1024)           # and with one to learn
judge=""                        # for TDSM: show the images to a classifier that was trained with all true labels
one_thread=""
labelled="" unlabelled="" imbalance_default=""  # long-tailed: images of the first class, and its imbalance
