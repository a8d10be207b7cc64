"""The published commands and configurations, on files in the form of the published data sets."""
from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from DASO import main as program
from DASO.lib.config.config import experiment_name, parse, read_yaml
from DASO.lib.data.batches import Batches
from DASO.lib.data.sets import load_data, long_tail_counts
from shared.distributed import World
from tests.daso.layouts import write_cifar, write_semi_aves, write_stl10
from tests.shared.programs import ROOT

CONFIGS = ROOT / "DASO" / "configs"
# The README's three examples; the first one is repaired.
EXAMPLES = {
    "DASO_cifar10_l_500_100_ul_4000_100_seed_1":
        "configs/cifar10/fixmatch_daso.yaml DATASET.CIFAR10.NUM_LABELED_HEAD 500 "
        "DATASET.CIFAR10.NUM_UNLABELED_HEAD 4000 SEED 1 GPU_ID 0",
    "DASO_cifar100_l_150_20_ul_300_20_seed_1":
        "configs/cifar100/fixmatch_daso.yaml DATASET.CIFAR100.IMB_FACTOR_L 20 DATASET.CIFAR100.IMB_FACTOR_UL 20 SEED 1",
    "DASO_stl10_l_150_20_ul_unknown_seed_1":
        "configs/stl10/fixmatch_daso.yaml DATASET.STL10.NUM_LABELED_HEAD 150 DATASET.STL10.IMB_FACTOR_L 20 SEED 1",
}
# One iteration on a few images, with everything else as published.
ONE_STEP = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "4", "PERIODS.CHECKPOINT", "1000", "TENSORBOARD", "False",
            "ALGORITHM.CREST.GEN_PERIOD_STEPS", "1", "GPU_ID", "-1", "SEED", "0"]
FEW_VALID = {"cifar10": "10", "cifar100": "100", "stl10": "10"}


@pytest.fixture(scope="module")
def small_roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets with few images a class, and counts that fit them."""
    root = tmp_path_factory.mktemp("small")
    return {"cifar10": write_cifar(root / "c10", "cifar10", 40), "cifar100": write_cifar(root / "c100", "cifar100", 12),
            "stl10": write_stl10(root / "stl", 40, 30), "semi_aves": write_semi_aves(root / "aves")}


def train(arguments: list[str], folder: Path) -> Path:
    before = sys.argv
    sys.argv = ["main.py", "--config-file", *arguments, "OUTPUT_DIR", str(folder)]
    try:
        program.main()
    finally:
        sys.argv = before
    return next(folder.iterdir())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_readme(name: str) -> None:
    config, *pairs = shlex.split(EXAMPLES[name])
    cfg, _ = parse(["--config-file", str(ROOT / "DASO" / config), *pairs])
    assert experiment_name(cfg, cfg.SEED) == name


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_take_a_step(name: str, small_roots: dict[str, Path], tmp_path: Path) -> None:
    config, *pairs = shlex.split(EXAMPLES[name])
    dataset = name.split("_")[1]
    section = f"DATASET.{dataset.upper()}"
    fewer = ["MODEL.WIDTH", "1", "DATASET.ROOT", str(small_roots[dataset]), "DATASET.NUM_VALID", FEW_VALID[dataset],
             f"{section}.NUM_LABELED_HEAD", "5"]
    if dataset != "stl10":
        fewer += [f"{section}.NUM_UNLABELED_HEAD", "6"]
    folder = train([str(ROOT / "DASO" / config), *pairs, *fewer, *ONE_STEP], tmp_path)
    assert (folder / "model_final.pth.tar").exists()


def test_semi_aves(small_roots: dict[str, Path]) -> None:
    pairs = ["DATASET.ROOT", str(small_roots["semi_aves"]), "MODEL.NUM_CLASSES", "3", "DATASET.RESOLUTION", "28",
             "SEED", "0", "SOLVER.IMS_PER_BATCH", "2"]
    cfg, _ = parse(["--config-file", str(CONFIGS / "semi_aves" / "fixmatch_daso.yaml"), *pairs])
    data = load_data(cfg)
    # Images of other species take part without a class.
    assert (data.unlabelled.labels == -1).sum() == 8 and len(data.unlabelled) == 20
    assert data.labelled.size == (32, 32) and len(data.labelled) == len(data.valid) == len(data.test) == 12
    batch = Batches(data, World(), 0, 2, 2, ("weak", "strong", "eval"), "weak")(0)
    assert batch.labelled.shape == (2, 3, 28, 28) and {view.shape for view in batch.views} == {(4, 3, 28, 28)}


def test_stl10_is_augmented_large_and_resized(small_roots: dict[str, Path]) -> None:
    cfg, _ = parse(["--config-file", str(CONFIGS / "stl10" / "fixmatch.yaml"), "DATASET.ROOT",
                    str(small_roots["stl10"]), "DATASET.NUM_VALID", "10", "DATASET.STL10.NUM_LABELED_HEAD", "20",
                    "SEED", "0"])
    data = load_data(cfg)
    assert data.unlabelled.size == (96, 96) and (data.unlabelled.labels == -1).all()
    assert data.counts.tolist() == long_tail_counts(20, 10, 10).tolist()
    batch = Batches(data, World(), 0, 4, 2, ("weak", "strong", "strong_resized"), "weak")(0)
    assert {view.shape for view in batch.views} == {(8, 3, 32, 32)}


def test_batches_depend_on_the_iteration_alone(small_roots: dict[str, Path]) -> None:
    cfg, _ = parse(["--config-file", str(CONFIGS / "cifar10" / "fixmatch.yaml"), "DATASET.ROOT",
                    str(small_roots["cifar10"]), "DATASET.NUM_VALID", "10", "SEED", "0",
                    "DATASET.CIFAR10.NUM_LABELED_HEAD", "9", "DATASET.CIFAR10.NUM_UNLABELED_HEAD", "12"])
    data = load_data(cfg)

    def batches(world: World) -> Batches:
        return Batches(data, world, 0, 6, 2, ("weak", "strong"), "weak")

    one = batches(World())(7)
    parts = [batches(World(rank, 3))(7) for rank in range(3)]
    assert np.array_equal(np.concatenate([part.index for part in parts]), one.index)
    assert np.array_equal(np.concatenate([part.views[1] for part in parts]), one.views[1])
    assert np.array_equal(np.concatenate([part.labelled for part in parts]), one.labelled)
    seen = np.concatenate([batches(World()).sampler(it) for it in range(len(data.labelled))])
    assert (np.bincount(seen) == 6).all()  # six passes: every image once in each


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml")
                                          if path.parent.name in FEW_VALID))
def test_every_configuration_takes_a_step_at_full_size(config: str, tmp_path: Path,
                                                       full_roots: dict[str, Path]) -> None:
    """The published counts, on files with as many images as the published ones (STL-10: 300 unlabelled)."""
    dataset = config.split("/")[0]
    extra = []
    if read_yaml(CONFIGS / config)["ALGORITHM.NAME"] == "cRT":
        run = train([str(CONFIGS / dataset / "supervised.yaml"), "DATASET.ROOT", str(full_roots[dataset]),
                     "DATASET.NUM_VALID", FEW_VALID[dataset], *ONE_STEP], tmp_path / "encoder")
        extra = ["ALGORITHM.CRT.TARGET_DIR", str(run)]
    folder = train([str(CONFIGS / config), "DATASET.ROOT", str(full_roots[dataset]), "DATASET.NUM_VALID",
                    FEW_VALID[dataset], *ONE_STEP, *extra], tmp_path / "out")
    assert (folder / "model_final.pth.tar").exists()


@pytest.fixture(scope="module")
def full_roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("full")
    return {"cifar10": write_cifar(root / "c10", "cifar10", 5000),
            "cifar100": write_cifar(root / "c100", "cifar100", 500), "stl10": write_stl10(root / "stl")}
