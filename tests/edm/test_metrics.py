"""Metrics of features: against torch-fidelity on the same features, against brute force, and what they must say."""
import inspect
import math

import numpy as np
import pytest
import torch
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from EDM.metrics import metrics
from shared.cli import UserError

# Images of either set, features: more images than features, one less, far fewer.
SIZES = [(300, 400, 64), (255, 300, 256), (40, 50, 300)]


def two_sets(count1: int, count2: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two overlapping sets of float32 features that are never negative, as pooled features are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / math.sqrt(width)
    first = torch.randn(count1, width, generator=generator) @ mix
    second = torch.randn(count2, width, generator=generator) @ mix
    return first.relu(), (1.1 * second + 0.1).relu()


def moments_of(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moments = metrics.Moments(features.shape[1])
    for batch in features.split(64):
        moments.add(batch)
    return moments.mean_and_covariance()


def reference_fid(first: torch.Tensor, second: torch.Tensor) -> float:
    statistics = [fid_features_to_statistics(features) for features in (first.double(), second.double())]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


class TestFrechetDistance:
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_agrees_with_torch_fidelity(self, sizes):
        first, second = two_sets(*sizes)
        expected = pytest.approx(reference_fid(first, second), rel=1e-6)
        assert metrics.frechet_distance(*moments_of(first), *moments_of(second)) == expected
        assert metrics.frechet_distance_of_features(first, second) == expected

    @pytest.mark.slow
    def test_agrees_with_torch_fidelity_at_full_width_and_singular(self):
        first, second = two_sets(2047, 2100, 2048)
        ours = metrics.frechet_distance(*moments_of(first), *moments_of(second))
        assert ours == pytest.approx(reference_fid(first, second), rel=1e-6)

    def test_closed_form_of_diagonal_gaussians(self):
        scale1, scale2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 2.0, 5.0]).double()
        shift = torch.tensor([1.0, 0.0, -2.0]).double()
        expected = (shift**2).sum() + ((scale1 - scale2) ** 2).sum()
        distance = metrics.frechet_distance(shift, scale1.square().diag(), 0 * shift, scale2.square().diag())
        assert distance == pytest.approx(expected.item(), abs=1e-12)

    @pytest.mark.parametrize("counts", [(30, 40), (30, 400), (400, 30)], ids=str)
    def test_few_images_are_exact_too(self, counts):
        """Against the singular values of the products of centred features, which need no covariance."""
        first, second = two_sets(*counts, 100)
        centred = [(features - features.mean(0)) / math.sqrt(len(features) - 1)
                   for features in (first.double(), second.double())]
        exact = (first.double().mean(0) - second.double().mean(0)).square().sum() \
            + sum(features.square().sum() for features in centred) \
            - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
        for distance in (metrics.frechet_distance(*moments_of(first), *moments_of(second)),
                         metrics.frechet_distance_of_features(first, second)):
            assert distance == pytest.approx(exact.item(), rel=1e-6)

    def test_a_collapsed_set_is_a_point(self):
        first, second = torch.ones(30, 4), two_sets(2, 50, 4)[1]
        mu, sigma = moments_of(second)
        expected = (1 - mu).square().sum() + sigma.trace()
        assert metrics.frechet_distance(*moments_of(first), mu, sigma) == pytest.approx(expected.item())

    def test_equal_sets_have_none(self):
        moments = moments_of(two_sets(40, 40, 60)[0])
        assert 0 <= metrics.frechet_distance(*moments, *moments) < 1e-5

    def test_features_that_are_no_numbers(self):
        first, second = two_sets(20, 20, 4)
        second[3, 2] = math.nan
        with pytest.raises(UserError, match="not finite"):
            metrics.frechet_distance_of_features(first, second)
        with pytest.raises(UserError, match="not finite"):
            metrics.frechet_distance(*moments_of(first), *moments_of(second))

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_images(self, count):
        first, second = two_sets(20, 20, 4)
        with pytest.raises(UserError, match=f"Found {count} images, but need at least 2"):
            metrics.frechet_distance_of_features(first[:count], second)
        with pytest.raises(UserError, match=f"Found {count} images, but need at least 2"):
            moments_of(first[:count])


class TestMoments:
    @pytest.mark.parametrize("batch", [1, 64, 100, 333])
    def test_the_size_of_batches_changes_nothing(self, batch):
        features, _ = two_sets(333, 2, 40)
        moments = metrics.Moments(40)
        for part in features.split(batch):
            moments.add(part)
        moments.add(features[:0])
        mu, sigma = moments.mean_and_covariance()
        exact = features.double().numpy()
        assert moments.count == 333
        np.testing.assert_allclose(mu.numpy(), exact.mean(0), rtol=0, atol=1e-8)
        np.testing.assert_allclose(sigma.numpy(), np.cov(exact, rowvar=False), rtol=0, atol=1e-8)


class TestClasswise:
    def test_is_the_distance_of_each_class(self):
        first, second = two_sets(90, 60, 8)
        labels1, labels2 = torch.arange(90) % 3, torch.arange(60) % 3
        each = metrics.classwise_frechet_distance(first, labels1, second, labels2)
        expected = [reference_fid(first[labels1 == label], second[labels2 == label]) for label in range(3)]
        assert each.tolist() == pytest.approx(expected, rel=1e-6)

    def test_a_class_without_images(self):
        first, second = two_sets(90, 60, 8)
        with pytest.raises(UserError, match="class 2 has 0 in the images"):
            metrics.classwise_frechet_distance(first, torch.arange(90) % 2, second, torch.arange(60) % 3)
        with pytest.raises(UserError, match="class 2 has 0 in the reference"):
            metrics.classwise_frechet_distance(first, torch.arange(90) % 3, second, torch.arange(60) % 2)


class TestKernelDistance:
    def test_half_precision_features_lose_nothing_in_the_sums(self):
        first, second = (features.half() for features in two_sets(40, 50, 300))
        theirs = kid_features_to_metric(first.double(), second.double(), verbose=False, kid_subsets=20,
                                        kid_subset_size=30)
        expected = (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"])
        assert metrics.kernel_distance(first, second, 20, 30) == expected

    def test_defaults_are_those_of_torch_fidelity(self):
        ours = inspect.signature(metrics.kernel_distance).parameters
        names = {"subsets": "kid_subsets", "subset_size": "kid_subset_size", "seed": "rng_seed"}
        assert {name: ours[name].default for name in names} == {name: DEFAULTS[names[name]] for name in names}

    @pytest.mark.parametrize("size", [1, 41])
    def test_subsets_that_do_not_fit(self, size):
        with pytest.raises(UserError, match="--kid-subset-size: expected 2 to 40"):
            metrics.kernel_distance(*two_sets(40, 50, 4), subset_size=size)


def brute_force(generated: np.ndarray, real: np.ndarray, k: int, k_density: int) -> metrics.Manifold:
    """The definitions, image by image."""
    def reach(points: np.ndarray, k: int) -> np.ndarray:
        return np.array([np.sort(np.linalg.norm(points - point, axis=1))[k] for point in points])

    between = np.linalg.norm(generated[:, None] - real[None], axis=2)
    inside, near = between <= reach(real, k), between <= reach(real, k_density)
    recalled = between <= reach(generated, k)[:, None]
    return metrics.Manifold(inside.any(1).mean(), recalled.any(0).mean(), near.sum() / (k_density * len(generated)),
                            near.any(0).mean())


class TestManifold:
    @pytest.mark.parametrize("sizes", [(300, 400, 8), (127, 100, 3), (40, 50, 300)], ids=str)
    @pytest.mark.parametrize("k", [1, 3, 7])
    def test_agrees_with_torch_fidelity(self, sizes, k):
        generated, real = two_sets(*sizes)
        theirs = prc_features_to_metric(generated, real, verbose=False, prc_neighborhood=k)
        ours = metrics.manifold_metrics(generated, real, k)
        assert [ours.precision, ours.recall] == pytest.approx([theirs["precision"], theirs["recall"]], rel=1e-4)

    @pytest.mark.parametrize("at_once", [1, 500, 1 << 24])
    def test_blocks_change_nothing(self, monkeypatch, at_once):
        generated, real = two_sets(70, 90, 5)
        monkeypatch.setattr(metrics, "BLOCK_DISTANCES", at_once)
        ours = metrics.manifold_metrics(generated, real, 3, 5)
        expected = brute_force(generated.double().numpy(), real.double().numpy(), 3, 5)
        assert vars(ours) == pytest.approx(vars(expected))

    def test_a_collapsed_generator_is_precise_and_recalls_nothing(self):
        real, _ = two_sets(500, 2, 16)
        ours = metrics.manifold_metrics(real[3:4].repeat(300, 1), real)
        assert ours.precision == 1 and ours.recall < 0.01 and ours.coverage < 0.05

    def test_a_generator_far_off_is_neither(self):
        real, other = two_sets(200, 300, 16)
        assert vars(metrics.manifold_metrics(other + 100, real)) == dict(precision=0, recall=0, density=0, coverage=0)

    def test_a_generator_that_covers_only_half_is_precise_and_recalls_half(self):
        real, _ = two_sets(400, 2, 16)
        real[200:] += 100
        ours = metrics.manifold_metrics(real[:200] + 1e-3, real)
        assert ours.precision > 0.95 and 0.45 < ours.recall < 0.55 and 0.45 < ours.coverage < 0.55

    @pytest.mark.parametrize(("k", "flag"), [((20, 5), "--pr-k"), ((3, 20), "--dc-k"), ((0, 5), "--pr-k")])
    def test_neighbours_that_are_not_there(self, k, flag):
        with pytest.raises(UserError, match=f"{flag}: expected 1 to 19"):
            metrics.manifold_metrics(*two_sets(20, 50, 4), *k)


class TestInceptionScore:
    def test_sure_and_diverse_is_the_number_of_classes(self):
        assert metrics.inception_score(200 * torch.eye(10).repeat(20, 1), 1)[0] == pytest.approx(10)

    def test_more_splits_than_images(self):
        with pytest.raises(UserError, match="--isc-splits: expected 1 to 5"):
            metrics.inception_score(torch.zeros(5, 3))
