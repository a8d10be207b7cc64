"""The TDSM losses: the closed form against its definition, the flat pass against one pass a class, the options."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from EDM.tdsm.loss import ClassifierLoss, TDSMLoss, clean_class_weights, log_matrix, noisy_log_posterior
from EDM.tdsm.transition import clean_posterior, transition_matrix
from EDM.training.loss import LOSSES, EDMLoss
from EDM.training.networks import PRECONDITIONERS
from shared.training.randomness import set_dropout_keys

K, N = 5, 6
TINY = dict(img_resolution=8, img_channels=1, label_dim=K, model_type="SongUNet", model_channels=8, channel_mult=[1, 1],
            num_blocks=1, attn_resolutions=[], augment_dim=9)


def random_transition(seed: int, classes: int = K) -> np.ndarray:
    matrix = np.random.default_rng(seed).dirichlet(np.ones(classes), classes) + 2 * np.eye(classes)
    return matrix / matrix.sum(1, keepdims=True)


class Says(torch.nn.Module):
    """A classifier that says the same whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.logits


def network(precond: str = "EDMPrecond", dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    net = PRECONDITIONERS[precond](**TINY, dropout=dropout)
    with torch.no_grad():
        for parameter in net.parameters():  # layers that start at zero would hide what reaches them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.train()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(K, (N,), generator=generator)
    return dict(images=torch.rand(N, 1, 8, 8, generator=generator) * 2 - 1, labels=torch.eye(K)[labels],
                augment_labels=torch.randn(N, 9, generator=generator),
                level=torch.rand(N, 1, 1, 1, generator=generator), noise=torch.randn(N, 1, 8, 8, generator=generator))


def logits() -> torch.Tensor:
    return 2 * torch.randn(N, K, generator=torch.Generator().manual_seed(2))


# -------------------------------------------------------------------------------------------------------- weights

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 12), scale=st.floats(0.1, 8))
def test_weights_are_those_of_the_definition(seed: int, classes: int, scale: float) -> None:
    """w = S[ỹ, y] (S⁻¹ (h/p))_y / (h_ỹ/p_ỹ), with all matrices and an inverse, in float64."""
    matrix, rng = random_transition(seed, classes), np.random.default_rng(seed)
    given_logits, observed = scale * rng.standard_normal((4, classes)), rng.integers(0, classes, 4)
    clean = np.exp(given_logits - given_logits.max(1, keepdims=True))
    clean /= clean.sum(1, keepdims=True)
    posterior = clean_posterior(matrix)
    ratio = clean @ matrix / (matrix.sum(0) / classes)
    expected = posterior[observed] * (ratio @ np.linalg.inv(posterior).T) / ratio[np.arange(4), observed][:, None]
    ours = clean_class_weights(torch.from_numpy(given_logits).float(), torch.from_numpy(observed),
                               log_matrix(matrix, "cpu"))
    assert np.abs(ours.double().numpy() - expected).max() < 1e-5
    assert np.abs(noisy_log_posterior(torch.from_numpy(given_logits).float(), log_matrix(matrix, "cpu")).exp().numpy()
                  - clean @ matrix).max() < 1e-5


@pytest.mark.parametrize(("noise_type", "rate"), [("sym", 0.9), ("asym", 0.5)])
def test_singular_matrices_have_weights(noise_type: str, rate: float) -> None:
    matrix = transition_matrix(noise_type, rate, 10, "cifar10")
    assert abs(np.linalg.det(matrix)) < 1e-12
    weights = clean_class_weights(torch.randn(10, 10), torch.arange(10), log_matrix(matrix, "cpu"))
    assert torch.isfinite(weights).all()
    assert torch.allclose(weights.sum(1), torch.ones(10))


def test_the_classifiers_loss_and_its_gradient_stay_finite_where_the_label_is_all_but_impossible() -> None:
    given_logits = torch.tensor([[0.0, 200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    images = torch.zeros(1, 1, 2, 2)
    loss = ClassifierLoss(EDMLoss(), np.eye(K))(lambda *_, **__: given_logits, images, torch.eye(K)[:1], None,
                                                torch.zeros(1, 1, 1, 1), images)
    loss.sum().backward()
    assert loss.item() == pytest.approx(200)
    assert torch.allclose(given_logits.grad, torch.tensor([[-1.0, 1.0, 0, 0, 0]]))


# ------------------------------------------------------------------------------------------------ the denoiser's loss

def one_pass_a_class(net: torch.nn.Module, levels, matrix: np.ndarray, batch: dict, tau: float) -> torch.Tensor:
    """The loss as the paper's code goes about it."""
    sigma = levels.sigma(batch["level"])
    noisy, observed = batch["images"] + sigma * batch["noise"], batch["labels"].argmax(1)
    weights = clean_class_weights(logits(), observed, log_matrix(matrix, "cpu"))
    own = net(noisy, sigma, batch["labels"], augment_labels=batch["augment_labels"])
    mixture = weights[torch.arange(N), observed].view(-1, 1, 1, 1) * own
    for label in range(K):
        chosen = ((weights[:, label] > tau) & (observed != label)).nonzero().flatten()
        if len(chosen):
            with torch.no_grad():
                other = net(noisy[chosen], sigma[chosen], torch.eye(K)[[label] * len(chosen)],
                            augment_labels=batch["augment_labels"][chosen])
            mixture = mixture.index_add(0, chosen, weights[chosen, label].view(-1, 1, 1, 1) * other)
    return levels.weight(sigma) * (mixture - batch["images"]) ** 2


@pytest.mark.parametrize("kind", ["EDM", "VP", "VE"])
@pytest.mark.parametrize("pair_batch", [None, 4])
def test_one_flat_pass_is_one_pass_a_class(kind: str, pair_batch: int | None, batch: dict) -> None:
    levels, matrix, net = LOSSES[f"{kind}Loss"](), random_transition(3), network(f"{kind}Precond")
    loss_fn = TDSMLoss(levels, matrix, Says(logits()), tau=0.05, pair_batch=pair_batch)
    gradients = []
    for loss in (one_pass_a_class(net, levels, matrix, batch, 0.05), loss_fn(net, **batch)):
        net.zero_grad()
        loss.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]))
    expected = one_pass_a_class(net, levels, matrix, batch, 0.05).detach()
    assert torch.allclose(loss_fn(net, **batch), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("sharpness", [0.0, 4.0, 50.0])
def test_the_cost_is_that_of_the_candidates(classes: int, sharpness: float, batch: dict) -> None:
    """In images through the network, whatever the number of classes; in forwards, ceilings of them."""
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, sigma, labels, augment_labels):
            seen.append(len(x))
            return x

    said = sharpness * torch.randn(N, classes, generator=torch.Generator().manual_seed(2))
    loss_fn = TDSMLoss(EDMLoss(), transition_matrix("sym", 0.4, classes), Says(said), tau=0.01, pair_batch=16)
    loss_fn(Net(), **{**batch, "labels": torch.eye(classes)[batch["labels"].argmax(1)]})
    pairs = round(float(loss_fn.statistics["candidates"]) * N)
    assert sum(seen) == N + pairs
    assert max(seen) <= 16
    assert len(seen) == 1 + -(-pairs // 16)


def test_labels_without_noise_give_the_plain_loss(batch: dict) -> None:
    net = network()
    expected = EDMLoss()(net, **batch)
    assert torch.equal(TDSMLoss(EDMLoss(), np.eye(K), None)(net, **batch), expected)
    with_classifier = TDSMLoss(EDMLoss(), np.eye(K), Says(logits()))
    assert torch.allclose(with_classifier(net, **batch), expected)
    assert float(with_classifier.statistics["candidates"]) == 0
    assert float(with_classifier.statistics["dsm"]) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_weights_of_tau_itself_are_dropped(batch: dict) -> None:
    """T and classifier without preference: all weights are 1/K, in floating point exactly tau."""
    for tau, kept in ((1 / K, 0), (0.99 / K, K - 1)):
        loss_fn = TDSMLoss(EDMLoss(), np.full((K, K), 1 / K), Says(torch.zeros(N, K)), tau=tau)
        loss_fn(network(), **batch)
        assert float(loss_fn.statistics["candidates"]) == kept
        assert float(loss_fn.statistics["kept_mass"]) == pytest.approx((kept + 1) / K)


def test_a_relative_tau_and_weights_that_add_up_to_one(batch: dict) -> None:
    def mass_and_loss(**options) -> tuple[float, torch.Tensor]:
        loss_fn = TDSMLoss(EDMLoss(), random_transition(3), Says(logits()), **options)
        loss = loss_fn(network(), **batch)
        return float(loss_fn.statistics["kept_mass"]), loss

    assert torch.equal(mass_and_loss(tau=0.5, relative_tau=True)[1], mass_and_loss(tau=0.5 / K)[1])
    mass, dropped = mass_and_loss(tau=0.2)
    _, renormalised = mass_and_loss(tau=0.2, renormalise=True)
    assert mass < 0.99
    assert not torch.allclose(dropped, renormalised)
    # Images of which nothing is dropped are not touched.
    _, all_kept = mass_and_loss(tau=0.0)
    assert torch.allclose(all_kept, mass_and_loss(tau=0.0, renormalise=True)[1], rtol=1e-4)


def test_the_full_gradient_is_that_of_the_mixture(batch: dict) -> None:
    net, matrix = network(), random_transition(3)
    stopped = TDSMLoss(EDMLoss(), matrix, Says(logits()), tau=0.0)
    full = TDSMLoss(EDMLoss(), matrix, Says(logits()), tau=0.0, full_gradient=True)
    assert torch.allclose(full(net, **batch), stopped(net, **batch), rtol=1e-4, atol=1e-5)
    full(net, **batch).sum().backward()
    ours = net.model.map_label.weight.grad.clone()
    # A derivative by differences, in the direction of the gradient, in float64.
    net.double()
    weight, direction, values = net.model.map_label.weight, ours.double() / ours.norm(), []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            weight += step * direction
            values.append(one_pass_a_class(net, EDMLoss(), matrix, batch, 0.0).sum().item())
            weight -= step * direction
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(float(ours.norm()), rel=2e-2)
    assert stopped(network(), **batch).requires_grad


def test_images_without_class_learn_by_the_plain_loss(batch: dict) -> None:
    loss_fn = TDSMLoss(EDMLoss(), random_transition(3), Says(logits()), tau=0.0, label_dropout=0.5)
    level = loss_fn.draw(N, torch.Generator().manual_seed(5))
    assert level.shape == (N, 2, 1, 1)
    net, without = network(), level[:, 1].flatten() < 0.5
    assert 0 < int(without.sum()) < N
    mine = {**batch, "level": level}
    loss = loss_fn(net, **mine)
    plain = EDMLoss()(net, **{**batch, "level": level[:, :1], "labels": torch.zeros(N, K)})
    loss_fn.label_dropout = 0.0
    mixed = loss_fn(net, **{**batch, "level": level[:, :1]})
    assert torch.allclose(loss[without], plain[without], rtol=1e-4, atol=1e-5)
    assert torch.allclose(loss[~without], mixed[~without], rtol=1e-4, atol=1e-5)


def test_dropout_of_other_classes_depends_on_neither_parts_nor_ranks(batch: dict) -> None:
    """Each (image, class) pair has a mask of its own, which follows from the image's place in the global batch."""
    def loss(pair_batch: int | None, places: slice) -> torch.Tensor:
        net = network(dropout=0.5)
        set_dropout_keys(net, 7, 0, np.arange(N)[places])
        loss_fn = TDSMLoss(EDMLoss(), random_transition(3), Says(logits()[places]), tau=0.0,
                           pair_batch=pair_batch)
        return loss_fn(net, **{name: value[places] for name, value in batch.items()})

    whole = loss(None, slice(None))
    assert torch.allclose(loss(3, slice(None)), whole, rtol=1e-4, atol=1e-5)
    assert torch.allclose(loss(None, slice(0, N, 2)), whole[::2], rtol=1e-4, atol=1e-5)
    net = network(dropout=0.5)
    set_dropout_keys(net, 8, 0, np.arange(N))
    other = TDSMLoss(EDMLoss(), random_transition(3), Says(logits()), tau=0.0)(net, **batch)
    assert not torch.allclose(other, whole, rtol=1e-2)
