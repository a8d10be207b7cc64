"""Learning from one's own predictions: the masked loss, and what decides which predictions are good enough."""
from __future__ import annotations

from typing import TYPE_CHECKING

from shared.lazy import lazy

if TYPE_CHECKING:
    from TorchSSL.core.setting import Setting

torch = lazy("torch")


def consistency(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the masked cross-entropy of logits [n, C] as a mean over all n, kept or not.

    target: classes int64 [n] or probabilities [n, C]; mask: a weight for every image [n], 0 to leave it out.
    """
    return (mask * torch.nn.functional.cross_entropy(logits, target, reduction="none")).mean()


def sharpen(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return probabilities [n, C] to the power 1 / temperature, normalised again."""
    return normalised(probabilities ** (1 / temperature))


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Return non-negative weights [n, C] as probabilities; rows of nothing but zeros stay zero."""
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-30)


def pseudo_label_metrics(mask: torch.Tensor, label: torch.Tensor, truth: torch.Tensor,
                         thresholds: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return what every algorithm with pseudo-labels logs.

    `train/mask_ratio` is, as published, the share rejected; `train/utilisation` the share kept, and
    `train/pseudo_label_acc` the accuracy of those kept, where the truth is known. mask: weights [n]; label, truth:
    int64 [n], truth -1 where unknown; thresholds: of every class [C].
    """
    known = mask * (truth >= 0)
    found = {"train/mask_ratio": 1 - mask.mean(), "train/utilisation": mask.mean(),
             "train/pseudo_label_acc": (known * (label == truth)).sum() / known.sum().clamp(min=1e-12)}
    if thresholds is not None:
        found |= {"train/threshold_min": thresholds.min(), "train/threshold_mean": thresholds.mean(),
                  "train/threshold_max": thresholds.max()}
    return found


class ClassStatus:
    """Curriculum pseudo-labelling: thresholds that are low for classes of which little has been learned so far.

    Zhang et al., "FlexMatch", NeurIPS 2021 (arXiv 2110.08263), equations 5 to 9. `label` [images], int64: the last
    class that each unlabelled image was given with confidence, -1 for none yet. `beta` [C]: how often each class occurs
    there, relative to the most frequent one; while `warm_up`, images without a class count as one class more.
    """

    def __init__(self, setting: Setting, warm_up: bool = True) -> None:
        self.setting, self.warm_up = setting, warm_up
        self.label = torch.full((setting.num_unlabeled,), -1, dtype=torch.int64, device=setting.device)
        self.beta = torch.zeros(setting.num_classes, device=setting.device)

    def refresh(self) -> None:
        """Count the classes anew. As long as all images are alike, nothing is known about the classes."""
        counts = torch.zeros(self.setting.num_classes + 1, device=self.label.device)
        counts.scatter_add_(0, self.label + 1, torch.ones((), device=self.label.device).expand(self.label.shape))
        largest = counts.max() if self.warm_up else counts[1:].max()
        self.beta = torch.where(counts.max() < len(self.label), counts[1:] / largest.clamp(min=1), self.beta)

    def thresholds(self, cutoff: float) -> torch.Tensor:
        """Return the threshold of every class [C], by the convex mapping beta / (2 - beta)."""
        return cutoff * self.beta / (2 - self.beta)

    def remember(self, index: torch.Tensor, label: torch.Tensor, confident: torch.Tensor) -> None:
        """Note the classes of the confident ones among this rank's images; index, label int64 [n], confident bool [n].

        An image drawn twice keeps the later class, on any device.
        """
        index, label, confident = (self.setting.gather(part) for part in (index, label, confident.long()))
        later = ((index[:, None] == index) & (confident == 1)).triu(1).any(1)
        kept = (confident == 1) & ~later
        extended = torch.cat([self.label, self.label.new_zeros(1)])  # the last place takes what is not to be noted
        extended.scatter_(0, torch.where(kept, index, len(self.label)), label)
        self.label = extended[:-1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"label": self.label, "beta": self.beta}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.label, self.beta = state["label"].to(self.setting.device), state["beta"].to(self.setting.device)


class DistributionAlignment:
    """Predictions scaled so that on average they have the class shares of the labelled images.

    Berthelot et al., "ReMixMatch", ICLR 2020 (arXiv 1911.09785), section 3.1. `p_model` [C]: moving average of the
    predictions, nothing but zeros before the first ones.
    """

    def __init__(self, setting: Setting, momentum: float = 0.999) -> None:
        self.setting, self.momentum = setting, momentum
        self.p_target = torch.tensor(setting.class_shares, device=setting.device)
        self.p_model = torch.zeros(setting.num_classes, device=setting.device)

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Move the average towards this batch of probabilities [n, C] and return them aligned."""
        mean = self.setting.mean(probabilities.mean(0))
        moved = self.momentum * self.p_model + (1 - self.momentum) * mean
        self.p_model = torch.where(self.p_model.sum() > 0, moved, mean)
        return normalised(probabilities * self.p_target / self.p_model.clamp(min=1e-12))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"p_model": self.p_model}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.p_model = state["p_model"].to(self.setting.device)
