"""Every configuration key: type, bounds, default and meaning. Keys of files and `KEY VALUE` pairs are read by these."""
from __future__ import annotations

from typing import Any

from shared.cli import Bool, Choice, Float, Int, IntTuple, Option, Text
from shared.networks import is_timm
from shared.option_types import NameOrPath

FRACTION = Float(0, 1)
COUNT = Int(1)
WHOLE = Int(0)
NONNEGATIVE = Float(0)
ABOVE_ZERO = Float(0, open=True)
DATASETS = ("cifar10", "cifar100", "stl10", "digits", "semi_aves")
LEARNERS = ("Supervised", "PseudoLabel", "MeanTeacher", "MixMatch", "ReMixMatch", "FixMatch", "USADTM", "DARP_ESTIM",
            "FixMatchCReST", "ReMixMatchCReST", "FixMatchABC", "cRT", "DASO", "ReMixMatchDASO", "ACR", "SimPro")


class IntOrUnknown(Int):
    """A whole number of at least 1, or -1 for an unknown one."""

    def __init__(self) -> None:
        super().__init__(1)
        self.range += " or -1"

    def convert(self, text: str) -> int:
        return -1 if text.strip() == "-1" else super().convert(text)


class Factor(Float):
    """A number of at least 1; whole ones stay whole, as the names of runs show them."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, text: str) -> float:
        value = super().convert(text)
        return int(value) if value.is_integer() else value


class EncoderName(Choice):
    """One of the words, or a network of timm."""

    def convert(self, text: str) -> str:
        return text if is_timm(text) else super().convert(text)


def long_tail(name: str, labeled: int, labeled_factor: int, unlabeled: int, unlabeled_factor: int,
              count: Int = COUNT) -> tuple[Option, ...]:
    """Return the four keys of a long-tailed data set; `count` is the type of the unlabelled ones."""
    factor = Factor() if count is COUNT else count
    return (
        Option(f"DATASET.{name}.NUM_LABELED_HEAD", COUNT, labeled, "labelled images of the most frequent class"),
        Option(f"DATASET.{name}.IMB_FACTOR_L", Factor(), labeled_factor, "most frequent over rarest class, labelled"),
        Option(f"DATASET.{name}.NUM_UNLABELED_HEAD", count, unlabeled, "unlabelled images of the most frequent class"),
        Option(f"DATASET.{name}.IMB_FACTOR_UL", factor, unlabeled_factor, "most frequent over rarest class, "
               "unlabelled"))


# The published keys. Some were never read; they are kept for published files.
PUBLISHED = (
    Option("MISC.LOG_CLASSWISE", Bool, True, "log accuracies by class at evaluations"),
    Option("MODEL.NAME", EncoderName("WRN", "ResNet34"), "WRN", "encoder; or timm:NAME, any network of timm"),
    Option("MODEL.WIDTH", COUNT, 2, "widening factor of the WRN-28"),
    Option("MODEL.NUM_CLASSES", Int(2), 10, "number of classes"),
    Option("MODEL.EMA_DECAY", FRACTION, 0.999, "decay of the averaged weights"),
    Option("MODEL.EMA_WEIGHT_DECAY", FRACTION, 0.0, "weight decay at each update of the average"),
    Option("MODEL.WITH_ROTATION_HEAD", Bool, False, "predict quarter turns as well (ReMixMatch)"),
    Option("MODEL.DIST_ALIGN.APPLY", Bool, False, "align pseudo-labels with the labelled class distribution"),
    Option("MODEL.DIST_ALIGN.TEMPERATURE", NONNEGATIVE, 1.0, "exponent of the target distribution"),
    Option("MODEL.QUEUE.MAX_SIZE", COUNT, 256, "features kept per class"),
    Option("MODEL.QUEUE.FEAT_DIM", COUNT, 128, "derived from the network; a warning if it differs"),
    Option("MODEL.LOSS.LABELED_LOSS", Choice("CrossEntropyLoss"), "CrossEntropyLoss", "labelled loss"),
    Option("MODEL.LOSS.WITH_LABELED_COST_SENSITIVE", Bool, False, "weight the labelled loss by class"),
    Option("MODEL.LOSS.UNLABELED_LOSS", Choice("MSELoss", "CrossEntropyLoss"), "MSELoss", "consistency loss"),
    Option("MODEL.LOSS.UNLABELED_LOSS_WEIGHT", NONNEGATIVE, 1.0, "weight of the consistency loss"),
    Option("MODEL.LOSS.WITH_SUPPRESSED_CONSISTENCY", Bool, False, "never read"),
    Option("MODEL.LOSS.WARMUP_ITERS", WHOLE, 200000, "cross-entropy before the cost-sensitive loss", unit="steps"),
    Option("MODEL.LOSS.COST_SENSITIVE.LOSS_OVERRIDE", Choice("", "LDAM"), "", "LDAM in place of cross-entropy"),
    Option("MODEL.LOSS.COST_SENSITIVE.BETA", FRACTION, 0.999, "effective number of images: 0, counts"),
    Option("MODEL.LOSS.CROSSENTROPY.USE_SIGMOID", Bool, False, "one-vs-all cross-entropy"),
    Option("ALGORITHM.NAME", Choice(*LEARNERS), "Supervised", "learner"),
    Option("ALGORITHM.CONFIDENCE_THRESHOLD", FRACTION, 0.95, "least confidence of a pseudo-label"),
    Option("ALGORITHM.CONS_RAMPUP_SCHEDULE", Choice("exp", "linear"), "exp", "rise of the consistency weight"),
    Option("ALGORITHM.CONS_RAMPUP_ITERS_RATIO", FRACTION, 0.4, "fraction of the training over which it rises"),
    Option("ALGORITHM.MEANTEACHER.APPLY_DASO", Bool, False, "blend semantic pseudo-labels into Mean Teacher"),
    Option("ALGORITHM.MIXMATCH.NUM_AUG", Int(2, 2), 2, "weak views per unlabelled image"),
    Option("ALGORITHM.MIXMATCH.TEMPERATURE", ABOVE_ZERO, 0.5, "sharpening of pseudo-labels"),
    Option("ALGORITHM.MIXMATCH.MIXUP_ALPHA", ABOVE_ZERO, 0.75, "of Beta(alpha, alpha)"),
    Option("ALGORITHM.MIXMATCH.APPLY_DASO", Bool, False, "blend semantic pseudo-labels into MixMatch"),
    Option("ALGORITHM.REMIXMATCH.NUM_AUG", Int(2, 2), 2, "strong views per unlabelled image"),
    Option("ALGORITHM.REMIXMATCH.TEMPERATURE", ABOVE_ZERO, 0.5, "sharpening of pseudo-labels"),
    Option("ALGORITHM.REMIXMATCH.MIXUP_ALPHA", ABOVE_ZERO, 0.75, "of Beta(alpha, alpha)"),
    Option("ALGORITHM.REMIXMATCH.WEIGHT_KL", NONNEGATIVE, 1.0, "weight of the unmixed strong view"),
    Option("ALGORITHM.REMIXMATCH.WEIGHT_ROT", NONNEGATIVE, 1.0, "weight of the rotation loss"),
    Option("ALGORITHM.REMIXMATCH.WITH_DISTRIBUTION_MATCHING", Bool, True, "never read"),
    Option("ALGORITHM.REMIXMATCH.LABELED_STRONG_AUG", Bool, False, "strong views of labelled images"),
    Option("ALGORITHM.DASO.PRETRAIN_STEPS", WHOLE, 5000, "steps before pseudo-labels are blended"),
    Option("ALGORITHM.DASO.PROTO_TEMP", ABOVE_ZERO, 0.05, "temperature of the similarities to prototypes"),
    Option("ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD", COUNT, 100, "between updates of the pseudo-label distribution",
           unit="steps"),
    Option("ALGORITHM.DASO.WITH_DIST_AWARE", Bool, True, "blend by class; False: by INTERP_ALPHA"),
    Option("ALGORITHM.DASO.DIST_TEMP", ABOVE_ZERO, 1.0, "1 / exponent of the pseudo-label distribution"),
    Option("ALGORITHM.DASO.INTERP_ALPHA", FRACTION, 0.5, "fraction of the semantic pseudo-label"),
    Option("ALGORITHM.DASO.QUEUE_SIZE", COUNT, 256, "never read: see MODEL.QUEUE.MAX_SIZE"),
    Option("ALGORITHM.DASO.PSA_LOSS_WEIGHT", NONNEGATIVE, 1.0, "weight of the semantic alignment loss"),
    Option("ALGORITHM.CREST.GEN_PERIOD_STEPS", COUNT, 50000, "steps of a generation"),
    Option("ALGORITHM.CREST.ALPHA", ABOVE_ZERO, 3.0, "1 / exponent of the sampling rate by class"),
    Option("ALGORITHM.CREST.TMIN", FRACTION, 0.5, "alignment exponent of the last generation"),
    Option("ALGORITHM.CREST.PROGRESSIVE_ALIGN", Bool, False, "lower the alignment exponent by generation"),
    Option("ALGORITHM.ABC.APPLY", Bool, False, "read by DASO only"),
    Option("ALGORITHM.ABC.DASO_PSEUDO_LABEL", Bool, True, "DASO's pseudo-labels for the balanced head"),
    Option("ALGORITHM.USADTM.PRETRAIN_STEPS", WHOLE, 500, "steps before pseudo-labels are used"),
    Option("ALGORITHM.USADTM.WARMUP_CLUSTER_LOSS", WHOLE, 5000, "without effect, as published"),
    Option("ALGORITHM.USADTM.DTM_THRES", FRACTION, 0.85, "least cosine with a prototype"),
    Option("ALGORITHM.USADTM.UC_LOSS_WEIGHT", NONNEGATIVE, 0.1, "weight of the clustering loss"),
    Option("ALGORITHM.CRT.TARGET_DIR", Text, "", "folder with the model_final.pth.tar whose encoder is kept"),
    Option("ALGORITHM.LOGIT_ADJUST.APPLY", Bool, False, "add TAU log(prior) to the logits of labelled images"),
    Option("ALGORITHM.LOGIT_ADJUST.TAU", Float(), 1.0, "strength of the adjustment"),
    Option("ALGORITHM.DARP.APPLY", Bool, False, "refine pseudo-labels by DARP"),
    Option("ALGORITHM.DARP.WARMUP_RATIO", FRACTION, 0.4, "fraction of the training before DARP begins"),
    Option("ALGORITHM.DARP.PER_ITERS", COUNT, 10, "steps between refinements"),
    Option("ALGORITHM.DARP.EST", Text, "darp_estim", "folder of the estimated class distributions"),
    Option("ALGORITHM.DARP.ALPHA", NONNEGATIVE, 2.0, "multiples of a class's expected images that keep it"),
    Option("ALGORITHM.DARP.NUM_DARP_ITERS", COUNT, 10, "iterations of a refinement"),
    Option("ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES", COUNT, 10, "images per class held out for the estimate"),
    Option("ALGORITHM.DARP_ESTIM.THRESH_COND", ABOVE_ZERO, 100, "largest condition number of the confusion matrix"),
    Option("DATASET.BUILDER", Choice("build_cifar10_dataset", "build_cifar100_dataset", "build_stl10_dataset",
                                     "build_digits_dataset", "build_semi_aves_dataset"), "build_cifar10_dataset",
           "builder that belongs to a published DATASET.NAME"),
    Option("DATASET.NAME", NameOrPath(*DATASETS), "cifar10", "data set, or the path of own images with train/ and "
           "test/"),
    Option("DATASET.ROOT", Text, "./data", "folder of the data sets"),
    Option("DATASET.SAMPLER_NAME", Choice("RandomSampler", "ClassAwareSampler"), "RandomSampler",
           "how labelled images are drawn"),
    Option("DATASET.SAMPLER_BETA", FRACTION, 0.999, "of ClassAwareSampler: 0, as they are; 1, balanced"),
    Option("DATASET.RESOLUTION", COUNT, 32, "width of the images", unit="pixels"),
    Option("DATASET.NUM_VALID", WHOLE, 5000, "validation images in all"),
    Option("DATASET.NUM_WORKERS", WHOLE, 8, "accepted; the data lie on the device"),
    Option("DATASET.REVERSE_UL_DISTRIBUTION", Bool, False, "the rarest labelled class is the commonest unlabelled one"),
    *long_tail("CIFAR10", 1500, 100, 3000, 100),
    *long_tail("CIFAR100", 150, 10, 300, 10),
    *long_tail("STL10", 450, 10, -1, -1, IntOrUnknown()),
    Option("DATASET.TRANSFORM.STRONG_AUG", Bool, False, "strong views of unlabelled images"),
    Option("SOLVER.IMS_PER_BATCH", COUNT, 64, "labelled images in a batch"),
    Option("SOLVER.UNLABELED_BATCH_RATIO", COUNT, 1, "unlabelled images per labelled one in a batch"),
    Option("SOLVER.MAX_ITER", COUNT, 250000, "length of the training", unit="steps"),
    Option("SOLVER.BASE_LR", NONNEGATIVE, 0.03, "learning rate"),
    Option("SOLVER.OPTIM_NAME", Choice("SGD", "Adam"), "SGD", "optimizer"),
    Option("SOLVER.APPLY_SCHEDULER", Bool, False, "change the learning rate by SOLVER.LR_SCHEDULER_NAME"),
    Option("SOLVER.SGD.MOMENTUM", FRACTION, 0.9, "of SGD"),
    Option("SOLVER.SGD.WEIGHT_DECAY", NONNEGATIVE, 0.0005, "of SGD"),
    Option("SOLVER.SGD.NESTEROV", Bool, True, "Nesterov momentum"),
    Option("SOLVER.ADAM.BETA1", Float(0, 1, open="high"), 0.9, "of Adam"),
    Option("SOLVER.ADAM.BETA2", Float(0, 1, open="high"), 0.999, "of Adam"),
    Option("SOLVER.ADAM.EPS", NONNEGATIVE, 1e-08, "of Adam"),
    Option("SOLVER.ADAM.WEIGHT_DECAY", NONNEGATIVE, 0.0, "of Adam"),
    Option("SOLVER.LR_SCHEDULER_NAME", Choice("WarmupCosineLRFixMatch", "WarmupMultiStepLR"), "WarmupCosineLRFixMatch",
           "schedule of the learning rate"),
    Option("SOLVER.COS_LR_RATIO", NONNEGATIVE, 7, "end of the cosine, in sixteenths of pi"),
    Option("SOLVER.STEPS", IntTuple(0), (400000,), "milestones of WarmupMultiStepLR", unit="steps"),
    Option("SOLVER.GAMMA", NONNEGATIVE, 0.2, "factor at each milestone"),
    Option("SOLVER.RAMPDOWN_ITERS", WHOLE, 0, "never read"),
    Option("SOLVER.WARMUP_FACTOR", FRACTION, 0.0, "factor at the first step"),
    Option("SOLVER.WARMUP_ITERS", WHOLE, 0, "length of the warm-up", unit="steps"),
    Option("SOLVER.WARMUP_METHOD", Choice("linear", "constant"), "linear", "form of the warm-up"),
    Option("PERIODS.EVAL", COUNT, 500, "between evaluations; equals PERIODS.LOG", unit="steps"),
    Option("PERIODS.CHECKPOINT", COUNT, 5000, "between checkpoints", unit="steps"),
    Option("PERIODS.LOG", COUNT, 500, "between lines of the log", unit="steps"),
    Option("OUTPUT_DIR", Text, "outputs", "folder of the runs"),
    Option("RESUME", Text, "", "checkpoint to start from"),
    Option("EVAL_ON_TEST_SET", Bool, True, "evaluate on the test set as well"),
    Option("GPU_ID", Int(-1), 0, "-1: the CPU; so is 0 without a GPU"),
    Option("MEMO", Text, "", "end of the run folder's name"),
    Option("SEED", Int(-1, 2 ** 32 - 1), -1, "of all draws; -1: drawn itself"),
    Option("CUDNN_DETERMINISTIC", Bool, True, "deterministic algorithms of cuDNN"),
    Option("CUDNN_BENCHMARK", Bool, False, "let cuDNN benchmark its algorithms"),
)

# Keys that the published code lacks.
ADDED = (
    Option("MODEL.PRETRAINED", Text, "", "weights of the encoder: of ResNet34 a torchvision state_dict file; of timm's "
           "networks a file, or timm:NAME, which timm fetches"),
    Option("MODEL.LOSS.FOCAL_GAMMA", NONNEGATIVE, 0.0, "above 0: focal loss (Lin et al. 2017)"),
    Option("ALGORITHM.USADTM.WITH_EMA_PROTOTYPE", Bool, False, "prototypes of the averaged network"),
    Option("ALGORITHM.ACR.TAU", NONNEGATIVE, 2.0, "largest adjustment of the plain head's pseudo-labels"),
    Option("ALGORITHM.ACR.TAU_BALANCED_LABELS", Float(), 2.0, "adjustment of the balanced head's pseudo-labels"),
    Option("ALGORITHM.ACR.TAU_BALANCED", Float(), 2.0, "adjustment of the balanced head's labelled loss"),
    Option("ALGORITHM.ACR.MOMENTUM", FRACTION, 0.99, "of the estimated unlabelled class distribution"),
    Option("ALGORITHM.ACR.EPOCH", COUNT, 500, "between two adaptations", unit="steps"),
    Option("ALGORITHM.ACR.ESTIMATE_AFTER", WHOLE, 2500, "before the distribution is estimated", unit="steps"),
    Option("ALGORITHM.SIMPRO.MOMENTUM", FRACTION, 0.999, "of the estimated unlabelled class distribution"),
    Option("ALGORITHM.SIMPRO.LABELED_WEIGHT", NONNEGATIVE, 0.0,
           "of the labelled loss; 0: unlabelled batch ratio x labelled / unlabelled images"),
    Option("ALGORITHM.ABC.SCHEDULE", Choice("published", "max_iter"), "published",
           "500 epochs of 500 steps; max_iter: over the whole run"),
    Option("DATASET.DOWNLOAD", Bool, True, "fetch a data set that is not in DATASET.ROOT"),
    Option("DATASET.AUG_PATH", Text, "", "folder of generated images per class, which join the labelled ones"),
    *long_tail("DIGITS", 40, 10, 70, 10),
    *long_tail("OWN", 40, 10, 70, 10),
    Option("DATASET.LABELED_COUNTS", IntTuple(0), (), "labelled images of each class, in place of head and factor"),
    Option("DATASET.UNLABELED_COUNTS", IntTuple(0), (), "unlabelled images of each class, in place of head and factor"),
    Option("DATASET.SEMIAVES.UNLABELED", Choice("in", "out", "in_out"), "in_out",
           "unlabelled images: of known species, of others, or both"),
    Option("PRECISION", Choice("auto", "fp32", "bf16"), "auto", "auto: bf16 on a GPU that has it"),
    Option("STRICT", Bool, False, "the paper's arithmetic: fp32, plain kernels"),
    Option("COMPILE", Bool, None, "torch.compile the encoder", default_help="on a GPU, unless STRICT"),
    Option("EVAL_BATCH", COUNT, 512, "batch size of evaluations", unit="images"),
    Option("TENSORBOARD", Bool, True, "write TensorBoard scalars"),
    Option("SAVE_SECONDS", NONNEGATIVE, 600.0, "between checkpoints; 0: by PERIODS.CHECKPOINT alone", unit="seconds"),
)

KEYS: dict[str, Option] = {option.key: option for option in (*PUBLISHED, *ADDED)}
DEFAULTS: dict[str, Any] = {key: option.default for key, option in KEYS.items()}
