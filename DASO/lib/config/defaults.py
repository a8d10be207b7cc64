"""Every configuration key with its default; the default's type is the key's type (a float also takes integers)."""
from __future__ import annotations

from typing import Any

# The published keys, of which some were never read; those are marked and kept so that published files load.
PUBLISHED: dict[str, Any] = {
    "MISC.LOG_CLASSWISE": True,              # per-class accuracies at evaluation
    "MODEL.NAME": "WRN",                     # or ResNet34
    "MODEL.WIDTH": 2,                        # of the WRN-28
    "MODEL.NUM_CLASSES": 10,
    "MODEL.EMA_DECAY": 0.999,
    "MODEL.EMA_WEIGHT_DECAY": 0.0,
    "MODEL.WITH_ROTATION_HEAD": False,
    "MODEL.DIST_ALIGN.APPLY": False,
    "MODEL.DIST_ALIGN.TEMPERATURE": 1.0,
    "MODEL.QUEUE.MAX_SIZE": 256,             # features a class
    "MODEL.QUEUE.FEAT_DIM": 128,             # derived from the network; a warning if it differs
    "MODEL.LOSS.LABELED_LOSS": "CrossEntropyLoss",
    "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE": False,
    "MODEL.LOSS.UNLABELED_LOSS": "MSELoss",  # or CrossEntropyLoss
    "MODEL.LOSS.UNLABELED_LOSS_WEIGHT": 1.0,
    "MODEL.LOSS.WITH_SUPPRESSED_CONSISTENCY": False,  # never read
    "MODEL.LOSS.WARMUP_ITERS": 200000,       # plain cross-entropy before the cost-sensitive loss
    "MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE": "",  # or LDAM
    "MODEL.LOSS.COST_SENSITIVE.BETA": 0.999,
    "MODEL.LOSS.CROSSENTROPY.USE_SIGMOID": False,   # one-vs-all
    "ALGORITHM.NAME": "Supervised",
    "ALGORITHM.CONFIDENCE_THRESHOLD": 0.95,
    "ALGORITHM.CONS_RAMPUP_SCHEDULE": "exp",  # or linear
    "ALGORITHM.CONS_RAMPUP_ITERS_RATIO": 0.4,
    "ALGORITHM.MEANTEACHER.APPLY_DASO": False,
    "ALGORITHM.MIXMATCH.NUM_AUG": 2,
    "ALGORITHM.MIXMATCH.TEMPERATURE": 0.5,
    "ALGORITHM.MIXMATCH.MIXUP_ALPHA": 0.75,
    "ALGORITHM.MIXMATCH.APPLY_DASO": False,
    "ALGORITHM.REMIXMATCH.NUM_AUG": 2,
    "ALGORITHM.REMIXMATCH.TEMPERATURE": 0.5,
    "ALGORITHM.REMIXMATCH.MIXUP_ALPHA": 0.75,
    "ALGORITHM.REMIXMATCH.WEIGHT_KL": 1.0,
    "ALGORITHM.REMIXMATCH.WEIGHT_ROT": 1.0,
    "ALGORITHM.REMIXMATCH.WITH_DISTRIBUTION_MATCHING": True,  # never read
    "ALGORITHM.REMIXMATCH.LABELED_STRONG_AUG": False,
    "ALGORITHM.DASO.PRETRAIN_STEPS": 5000,
    "ALGORITHM.DASO.PROTO_TEMP": 0.05,
    "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": 100,
    "ALGORITHM.DASO.WITH_DIST_AWARE": True,
    "ALGORITHM.DASO.DIST_TEMP": 1.0,
    "ALGORITHM.DASO.INTERP_ALPHA": 0.5,
    "ALGORITHM.DASO.QUEUE_SIZE": 256,        # never read: MODEL.QUEUE.MAX_SIZE
    "ALGORITHM.DASO.PSA_LOSS_WEIGHT": 1.0,
    "ALGORITHM.CREST.GEN_PERIOD_STEPS": 50000,
    "ALGORITHM.CREST.ALPHA": 3.0,
    "ALGORITHM.CREST.TMIN": 0.5,
    "ALGORITHM.CREST.PROGRESSIVE_ALIGN": False,
    "ALGORITHM.ABC.APPLY": False,            # read by DASO only
    "ALGORITHM.ABC.DASO_PSEUDO_LABEL": True,
    "ALGORITHM.USADTM.PRETRAIN_STEPS": 500,
    "ALGORITHM.USADTM.WARMUP_CLUSTER_LOSS": 5000,  # without effect
    "ALGORITHM.USADTM.DTM_THRES": 0.85,
    "ALGORITHM.USADTM.UC_LOSS_WEIGHT": 0.1,
    "ALGORITHM.CRT.TARGET_DIR": "",          # folder with model_final.pth.tar
    "ALGORITHM.LOGIT_ADJUST.APPLY": False,
    "ALGORITHM.LOGIT_ADJUST.TAU": 1.0,
    "ALGORITHM.DARP.APPLY": False,
    "ALGORITHM.DARP.WARMUP_RATIO": 0.4,
    "ALGORITHM.DARP.PER_ITERS": 10,
    "ALGORITHM.DARP.EST": "darp_estim",      # folder of estimates
    "ALGORITHM.DARP.ALPHA": 2.0,
    "ALGORITHM.DARP.NUM_DARP_ITERS": 10,
    "ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES": 10,
    "ALGORITHM.DARP_ESTIM.THRESH_COND": 100,
    "DATASET.BUILDER": "build_cifar10_dataset",
    "DATASET.NAME": "cifar10",
    "DATASET.ROOT": "./data",
    "DATASET.SAMPLER_NAME": "RandomSampler",  # or ClassAwareSampler, of labelled images
    "DATASET.SAMPLER_BETA": 0.999,
    "DATASET.RESOLUTION": 32,
    "DATASET.NUM_VALID": 5000,
    "DATASET.NUM_WORKERS": 8,                # never needed here: data lie on the device
    "DATASET.REVERSE_UL_DISTRIBUTION": False,
    "DATASET.CIFAR10.NUM_LABELED_HEAD": 1500,
    "DATASET.CIFAR10.IMB_FACTOR_L": 100,
    "DATASET.CIFAR10.NUM_UNLABELED_HEAD": 3000,
    "DATASET.CIFAR10.IMB_FACTOR_UL": 100,
    "DATASET.CIFAR100.NUM_LABELED_HEAD": 150,
    "DATASET.CIFAR100.IMB_FACTOR_L": 10,
    "DATASET.CIFAR100.NUM_UNLABELED_HEAD": 300,
    "DATASET.CIFAR100.IMB_FACTOR_UL": 10,
    "DATASET.STL10.NUM_LABELED_HEAD": 450,
    "DATASET.STL10.IMB_FACTOR_L": 10,
    "DATASET.STL10.NUM_UNLABELED_HEAD": -1,  # -1: unknown
    "DATASET.STL10.IMB_FACTOR_UL": -1,
    "DATASET.TRANSFORM.STRONG_AUG": False,
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.UNLABELED_BATCH_RATIO": 1,
    "SOLVER.MAX_ITER": 250000,
    "SOLVER.BASE_LR": 0.03,
    "SOLVER.OPTIM_NAME": "SGD",              # or Adam
    "SOLVER.APPLY_SCHEDULER": False,
    "SOLVER.SGD.MOMENTUM": 0.9,
    "SOLVER.SGD.WEIGHT_DECAY": 0.0005,
    "SOLVER.SGD.NESTEROV": True,
    "SOLVER.ADAM.BETA1": 0.9,
    "SOLVER.ADAM.BETA2": 0.999,
    "SOLVER.ADAM.EPS": 1e-08,
    "SOLVER.ADAM.WEIGHT_DECAY": 0.0,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLRFixMatch",  # or WarmupMultiStepLR
    "SOLVER.COS_LR_RATIO": 7,
    "SOLVER.STEPS": (400000,),
    "SOLVER.GAMMA": 0.2,
    "SOLVER.RAMPDOWN_ITERS": 0,              # never read
    "SOLVER.WARMUP_FACTOR": 0.0,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.WARMUP_METHOD": "linear",        # or constant
    "PERIODS.EVAL": 500,
    "PERIODS.CHECKPOINT": 5000,
    "PERIODS.LOG": 500,
    "OUTPUT_DIR": "outputs",
    "RESUME": "",                            # a checkpoint to start from
    "EVAL_ON_TEST_SET": True,
    "GPU_ID": 0,                             # -1: the CPU; 0 where there is no GPU: also
    "MEMO": "",
    "SEED": -1,                              # below 0: drawn
    "CUDNN_DETERMINISTIC": True,
    "CUDNN_BENCHMARK": False,
}

# Keys that the published code lacks.
ADDED: dict[str, Any] = {
    "MODEL.PRETRAINED": "",                  # weights of the ResNet34 encoder: a torchvision state_dict file
    "MODEL.LOSS.FOCAL_GAMMA": 0.0,           # above 0: focal loss (Lin et al. 2017), with the class weights if asked
    "ALGORITHM.USADTM.WITH_EMA_PROTOTYPE": False,
    "ALGORITHM.ACR.TAU": 2.0,                # largest adjustment of the plain head's pseudo-labels
    "ALGORITHM.ACR.TAU_BALANCED_LABELS": 2.0,  # adjustment of the pseudo-labels of the balanced head
    "ALGORITHM.ACR.TAU_BALANCED": 2.0,       # of its loss on labelled images
    "ALGORITHM.ACR.MOMENTUM": 0.99,          # of the estimated unlabelled class shares
    "ALGORITHM.ACR.EPOCH": 500,              # iterations between two adaptations
    "ALGORITHM.ACR.ESTIMATE_AFTER": 2500,    # iterations before the shares are estimated
    "ALGORITHM.SIMPRO.MOMENTUM": 0.999,      # of the estimated unlabelled class shares
    "ALGORITHM.SIMPRO.LABELED_WEIGHT": 0.0,  # of the labelled loss; 0: unlabelled batch ratio * labelled / unlabelled
    "ALGORITHM.ABC.SCHEDULE": "published",   # 500 epochs of 500 iterations; or max_iter: over the whole run
    "DATASET.DOWNLOAD": True,
    "DATASET.AUG_PATH": "",                  # generated images that join the labelled ones: a folder a class
    "DATASET.DIGITS.NUM_LABELED_HEAD": 40,
    "DATASET.DIGITS.IMB_FACTOR_L": 10,
    "DATASET.DIGITS.NUM_UNLABELED_HEAD": 70,
    "DATASET.DIGITS.IMB_FACTOR_UL": 10,
    "DATASET.SEMIAVES.UNLABELED": "in_out",  # in, out or in_out: which unlabelled images, of known or other species
    "PRECISION": "auto",                     # fp32, bf16; auto: bf16 on a GPU that has it
    "STRICT": False,                         # fp32, plain kernels, no channels_last
    "COMPILE": False,                        # torch.compile of the encoder
    "EVAL_BATCH": 512,
    "TENSORBOARD": True,
    "SAVE_SECONDS": 600.0,                   # also save after so many seconds; 0: by PERIODS.CHECKPOINT alone
}

DEFAULTS: dict[str, Any] = {**PUBLISHED, **ADDED}

# Keys with few values.
CHOICES: dict[str, tuple[Any, ...]] = {
    "MODEL.NAME": ("WRN", "ResNet34"),
    "MODEL.LOSS.LABELED_LOSS": ("CrossEntropyLoss",),
    "MODEL.LOSS.UNLABELED_LOSS": ("MSELoss", "CrossEntropyLoss"),
    "MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE": ("", "LDAM"),
    "ALGORITHM.CONS_RAMPUP_SCHEDULE": ("exp", "linear"),
    "ALGORITHM.MIXMATCH.NUM_AUG": (2,),
    "ALGORITHM.REMIXMATCH.NUM_AUG": (2,),
    "ALGORITHM.ABC.SCHEDULE": ("published", "max_iter"),
    "DATASET.BUILDER": ("build_cifar10_dataset", "build_cifar100_dataset", "build_stl10_dataset",
                        "build_digits_dataset", "build_semi_aves_dataset"),
    "DATASET.NAME": ("cifar10", "cifar100", "stl10", "digits", "semi_aves"),
    "DATASET.SAMPLER_NAME": ("RandomSampler", "ClassAwareSampler"),
    "DATASET.SEMIAVES.UNLABELED": ("in", "out", "in_out"),
    "SOLVER.OPTIM_NAME": ("SGD", "Adam"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupCosineLRFixMatch", "WarmupMultiStepLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "PRECISION": ("auto", "fp32", "bf16"),
}
# Keys whose values are below what makes sense under this bound.
AT_LEAST: dict[str, float] = {
    "MODEL.WIDTH": 1, "MODEL.NUM_CLASSES": 2, "MODEL.QUEUE.MAX_SIZE": 1, "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.UNLABELED_BATCH_RATIO": 1, "SOLVER.MAX_ITER": 1, "SOLVER.BASE_LR": 0.0, "PERIODS.EVAL": 1,
    "PERIODS.CHECKPOINT": 1, "PERIODS.LOG": 1, "DATASET.RESOLUTION": 1, "DATASET.NUM_VALID": 0, "EVAL_BATCH": 1,
    "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": 1, "ALGORITHM.DARP.PER_ITERS": 1, "ALGORITHM.CREST.GEN_PERIOD_STEPS": 1,
    "ALGORITHM.ACR.EPOCH": 1, "ALGORITHM.SIMPRO.LABELED_WEIGHT": 0.0,
    "DATASET.SAMPLER_BETA": 0.0, "SAVE_SECONDS": 0.0, "MODEL.LOSS.FOCAL_GAMMA": 0.0,
}
