"""The few-label classifier: multinomial logistic regression on frozen features, fitted to its optimum in float64.

    minimise over W [K, D]:  sum_i CE(W x_i, y_i) + lambd / 2 ||W||^2

without intercept, on rows x that are centred and scaled to unit length (You et al., NeurIPS 2023, section 4). The
optimum is that of scikit-learn's LogisticRegression(C=1/lambd, fit_intercept=False).
"""
from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from shared.cli import UserError
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress

LAMBDA = 0.0025
TOLERANCE = 1e-4   # of the weights, relative to their length
ROWS = 1 << 14     # at a time, to bound the memory of scores
ITERATIONS = 10    # of L-BFGS between two looks at the error
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Classifier:
    """weights: float64 [K, D]. classes: names in label order. encoder: fingerprint of what makes its features, or "".
    normalize: whether rows are scaled to unit length."""

    weights: Tensor
    classes: tuple[str, ...]
    encoder: str = ""
    normalize: bool = True

    def scores(self, values: np.ndarray, device: torch.device = CPU) -> Iterator[Tensor]:
        """Yield scores of raw features [N, D], some rows at a time: float64 [n, K]; their softmax is p(class)."""
        weights = self.weights.to(device)
        for start in range(0, len(values), ROWS):
            yield prepared(torch.from_numpy(values[start:start + ROWS]).to(device), self.normalize) @ weights.T

    def predict(self, values: np.ndarray, device: torch.device = CPU) -> tuple[np.ndarray, np.ndarray]:
        """Return the most probable class of each row, int64 [N], and its probability, float32 [N]."""
        found = [label_and_probability(scores) for scores in self.scores(values, device)]
        labels, probabilities = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        return labels, probabilities.astype(np.float32)

    def accuracy(self, values: np.ndarray, labels: np.ndarray, device: torch.device = CPU) -> dict[str, float]:
        """Return the shares of rows whose class has the highest score (top1), and is among the highest five (top5)."""
        right = np.zeros(2)
        for number, scores in enumerate(self.scores(values, device)):
            truth = torch.from_numpy(labels[number * ROWS:number * ROWS + len(scores)]).to(device)
            best = scores.topk(min(5, scores.shape[1]), dim=1).indices == truth[:, None]
            right += [int((scores.argmax(1) == truth).sum()), int(best.any(1).sum())]
        return dict(zip(("top1", "top5"), (right / max(1, len(labels))).tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Write the classifier in the safetensors format, under any file name."""
        make_dir(path.parent)
        facts = {"classes": json.dumps(self.classes), "encoder": self.encoder, "normalize": str(self.normalize)}
        with atomic(path) as file:
            file.write(save({"weights": self.weights.cpu().contiguous()}, facts))


def read_classifier(path: Path, encoder: str = "") -> Classifier:
    """Return the classifier in a file. encoder: fingerprint of the encoder in use; UserError for a classifier of
    another encoder and for other files."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            found = Classifier(file.get_tensor("weights"), tuple(json.loads(facts["classes"])), facts["encoder"],
                               facts["normalize"] == "True")
    except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: no classifier of this program can be read from it ({error}); fit it anew with "
                        "--func=train_classifier_stage1 or train_classifier_stage3") from None
    if encoder and found.encoder and encoder != found.encoder:
        raise UserError(f"{path}: was fitted to features of another encoder; fit it anew")
    return found


def prepared(values: Tensor, normalize: bool = True) -> Tensor:
    """Return rows of raw features [n, D] as the classifier sees them, float64: less their own mean, of unit length."""
    rows = values.double()
    rows = rows - rows.mean(1, keepdim=True)
    # A row without variation stays zero.
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) if normalize else rows


def label_and_probability(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class with the highest score, the first of equal ones, and its softmax probability."""
    return scores.argmax(1), scores.softmax(1).amax(1)


def fit(rows: Tensor, labels: Tensor, num_classes: int, lambd: float = LAMBDA, shown: bool = False) -> Tensor:
    """Return the optimal weights, float64 [K, D]. rows: as `prepared` returns them. labels: int64 [n]. shown: show
    progress."""
    weights = rows.new_zeros(num_classes, rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, history_size=10, tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        loss, weights.grad = objective(weights.detach(), rows, labels, lambd)
        return loss

    bar = Progress("fitting the classifier", None, "rounds", shown=shown)
    for _ in range(1000):
        optimizer.step(closure)
        closure()
        # The objective is lambd-strongly convex, so this bounds the distance to the optimum.
        error = float(weights.grad.norm() / lambd / weights.detach().norm().clamp_min(1e-12))
        bar.figures = f"relative error at most {error:.1e}"
        bar.advance()
        if error < TOLERANCE:
            break
    else:
        warnings.warn(f"the classifier's weights are known to a relative error of {error:.1e} only", stacklevel=2)
    bar.close()
    return weights.detach()


def objective(weights: Tensor, rows: Tensor, labels: Tensor, lambd: float = LAMBDA) -> tuple[Tensor, Tensor]:
    """Return the objective in the sum form above (n times the published one), and its gradient [K, D]."""
    loss, gradient = lambd / 2 * weights.square().sum(), lambd * weights
    for start in range(0, len(rows), ROWS):
        part, truth = rows[start:start + ROWS], labels[start:start + ROWS, None]
        scores = part @ weights.T
        total = scores.logsumexp(1, keepdim=True)
        loss = loss + (total - scores.gather(1, truth)).sum()
        difference = (scores - total).exp_()
        difference.scatter_add_(1, truth, -torch.ones_like(total))
        gradient = gradient + difference.T @ part
    return loss, gradient
