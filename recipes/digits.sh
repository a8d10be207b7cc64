# scikit-learn's handwritten digits: 8x8, gray, one label a class, minutes on a CPU.

recipe_labels=10 recipe_last=100
shape=-8x8
config=freematch_digits_10_1
# 0.2 million parameters, trained for 80 thousand images. The published ramp of the learning rate (10 million images)
# would outlast the run, and so would ten minutes between two checkpoints.
diffusion=(--batch=128 --cbase=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0.1 --augment=0
           --duration=0.08 --lr=4e-3 --lr-rampup=3 --lr-decay=0.3 --tick=5 --checkpoint-seconds=20)
noise_classifier=(--batch=128 --augment=0 --duration=0.03 --lr=2e-3 --lr-rampup=3 --lr-decay=0.5 --averaged=1 --tick=5)
# Learning the matrix takes longer than learning the classes.
volmin=(--batch=128 --augment=0 --duration=0.12 --lr=5e-3 --lr-rampup=3 --vm-schedule=80,100,120 --averaged=1 --tick=20)
judge=1
# Networks this small gain little from a second thread, and sums in one are the same on any number of cores.
one_thread=1
labelled=40 unlabelled=70 imbalance_default=20
