"""What DPT does differently from one data set to another."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What differs between data sets. Flags that are not here have the published defaults.

    labels: labelled images in all; 0: all that have a label. last: generate.sh makes the images 0..last of each class.
    shape: in the name of the zip. config: file of TorchSSL/config for stage 1; that of stage 3 ends in _aug<last>.
    checkpoint: the classifier that labels the images; the published recipe takes the best one on the test set, the
    others the last one, so that the test set selects nothing. noise_classifier, volmin: flags of train_classifier.py,
    for TDSM with a given transition matrix and with one to learn. judge: whether generated images are shown to a
    classifier trained with all true labels (TDSM). one_thread: networks this small gain little from a second thread and
    wait long for it on a busy machine; and sums in one thread are the same on any number of cores.
    """

    labels: int = 40
    last: int = 1000
    shape: str = "-32x32"
    config: str | None = None
    checkpoint: str = "latest_model.pth"
    classifier: str = ""
    diffusion: str = "--batch-gpu=32"
    generate: str = ""
    noise_classifier: str = "--batch=1024"
    volmin: str = "--batch=1024"
    judge: bool = False
    one_thread: bool = False


# The digits are 8x8 and gray: a network of 0.2 million parameters, trained for 80 thousand images. The published
# learning-rate ramp (10 million images) would outlast the run, and so would ten minutes between two checkpoints: what
# was killed would begin again.
DIGITS_DIFFUSION = ("--batch=128 --cbase=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0.1 --augment=0 "
                    "--duration=0.08 --lr=4e-3 --lr-rampup=3 --lr-decay=0.3 --tick=5 --checkpoint-seconds=20")
DIGITS_NOISE_CLASSIFIER = ("--batch=128 --augment=0 --duration=0.03 --lr=2e-3 --lr-rampup=3 --lr-decay=0.5 "
                           "--averaged=1 --tick=5")
# The matrix moves slowly, so that learning it takes longer than learning the classes.
DIGITS_VOLMIN = ("--batch=128 --augment=0 --duration=0.12 --lr=5e-3 --lr-rampup=3 --vm-schedule=80,100,120 "
                 "--averaged=1 --tick=20")
RECIPES = {
    "digits": Recipe(10, 100, "-8x8", "freematch_digits_10_1", diffusion=DIGITS_DIFFUSION,
                     noise_classifier=DIGITS_NOISE_CLASSIFIER, volmin=DIGITS_VOLMIN, judge=True, one_thread=True),
    "cifar10": Recipe(config="freematch_cifar10_40_1", checkpoint="model_best.pth"),
    "cifar100": Recipe(400, classifier="--num_classes=100 --widen_factor=8 --weight_decay=0.001"),
    "svhn": Recipe(),
    "stl10": Recipe(shape="-96x96", classifier="--net=WideResNetVar"),
    "mnist": Recipe(),
}
OWN_IMAGES = Recipe(labels=0, shape="")
