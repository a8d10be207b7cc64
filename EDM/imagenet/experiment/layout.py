"""The files of the ImageNet commands: published names, relative to the working folder."""
from __future__ import annotations

from pathlib import Path

from EDM.imagenet.experiment.config import Config


class Layout:
    """The files and folders of a configuration, each a Path."""

    def __init__(self, config: Config) -> None:
        self.tag = config.subset_path.replace("/", "-").split(".txt")[0]
        self.cluster_name = f"{config.model_name}-{self.tag}"
        root, resolution, encoder = Path(config.pretrained), str(config.resolution), config.fname

        # Stage 1: encoder, features, classifier, pseudo-labels.
        self.subset = Path(config.subset_path)
        self.train_images = Path(config.image_path, "train")
        self.encoder = root / encoder
        self.train_features = root / "accelerate" / f"train-features-fnames-{self.tag}-accelerate-{encoder}"
        self.val_features = root / "accelerate" / f"val-features-fnames-{encoder}"
        self.classifier = root / f"classifier-{self.tag}-accelerate-{encoder}.pkl"
        self.all_features = root / "features" / config.model_name / "features-label-fnames.pth.tar"
        self.cluster = root / "cluster" / self.cluster_name
        self.pseudo_probabilities = self.cluster / "imagenet_features_probs.pth"
        self.pseudo_labels = self.cluster / "imagenet_features_preds.npy"
        self.pseudo_labels_tensor = self.cluster / "imagenet_features_preds.pth"
        self.true_labels = self.cluster / "imagenet_features_labels.pth"
        self.image_names = self.cluster / "imagenet_features_fnames.pth"
        self.image_paths = self.cluster / "imagenet_features_paths.pth"  # beside the published files

        # Stage 2: latents, diffusion model, generated images.
        self.latents = root / "datasets" / self.cluster_name / f"imagenet{resolution}_features"
        self.workdir = Path(config.dpm_path) / self.cluster_name / resolution
        self.checkpoints = self.workdir / "ckpts"
        self.generated = self.workdir / "samples_for_classifier" / f"aug_{config.augmentation_K}_samples" / "train"
        self.fid_statistics = Path("assets/fid_stats", f"fid_stats_imagenet{resolution}_guided_diffusion.npz")

        # Stage 3: the classifier of labelled and generated images.
        self.generated_features = (root / "features" / self.cluster_name / resolution
                                   / f"aug-{config.augmentation_K}-features-label.pth.tar")
        self.classifier_stage3 = root / f"classifier-{self.tag}-accelerate-{encoder}-aug-{config.augmentation_K}.pkl"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the published checkpoint files of a step."""
        return self.checkpoints / f"{step}.ckpt"
