"""What users get wrong ends in one line that names it; nothing is written."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from DASO import plot_pseudo_labels
from DASO.lib.config.config import Config, dump, parse, read_yaml
from DASO.lib.config.defaults import DEFAULTS
from DASO.lib.data.sets import load_data, long_tail_counts, select
from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.writers import write_folder
from tests.daso.layouts import write_cifar, write_semi_aves
from tests.daso.small import call, command
from tests.shared.programs import ROOT, one_line_error, run

CONFIG = str(ROOT / "DASO" / "configs" / "cifar10" / "fixmatch_daso.yaml")


@pytest.mark.parametrize(("pairs", "named"), [
    # As it is mistyped in the published README.
    (["DATASET.CIFAR10.NUM_LABELED_HEAD", "500", "DATASET.CIFAR10.NUM_UNLABELED", "HEAD", "4000"],
     "write DATASET.CIFAR10.NUM_UNLABELED_HEAD VALUE"),
    (["ALGORITHM.DASO.DIST_TMP", "1.5"], 'did you mean "ALGORITHM.DASO.DIST_TEMP"'),
    (["SOLVER.MAX_ITER", "0.5"], "SOLVER.MAX_ITER: '0.5' is not a valid integer"),
    (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER: 0 is not in the range x>=1"),
    (["DATASET.CIFAR10.IMB_FACTOR_L", "-10"], "is not in the range x>=1"),
    (["DATASET.STL10.IMB_FACTOR_UL", "0"], "is not in the range x>=1 or -1"),
    (["MODEL.EMA_DECAY", "2"], "MODEL.EMA_DECAY: 2.0 is not in the range 0<=x<=1"),
    (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR: nan is not a finite number"),
    (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER: a value is missing"),
    (["SOLVER", "5"], "SOLVER is a section"),
    (["DATASET.REVERSE_UL_DISTRIBUTION", "maybe"], "is not a valid boolean"),
    (["SOLVER.STEPS", "(1, 'a')"], "SOLVER.STEPS: "),
    (["MODEL.LOSS.UNLABELED_LOSS", "CrossEntropy"], 'did you mean "CrossEntropyLoss"'),
    (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], "SOLVER.LR_SCHEDULER_NAME: 'WarmupCosineLR' is not one of"),
    (["PERIODS.EVAL", "100"], "PERIODS.LOG"),
    (["DATASET.NAME", "cifar100"], "DATASET.BUILDER"),
    (["--eval-onyl", "True"], "--eval-only"),
])
def test_mistakes_of_the_command_line(pairs: list[str], named: str) -> None:
    with pytest.raises(UserError) as error:
        parse(["--config-file", CONFIG, *pairs])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_values_are_read_as_meant() -> None:
    cfg, flags = parse(["--config-file", CONFIG, "ALGORITHM.DASO.DIST_TEMP", "1", "SOLVER.STEPS", "[10, 20]",
                            "MEMO", "12", "SOLVER.WARMUP_FACTOR", "0.1", "SOLVER.ADAM.EPS", "1e-6"])
    assert cfg.ALGORITHM.DASO.DIST_TEMP == 1.0 and isinstance(cfg.ALGORITHM.DASO.DIST_TEMP, float)
    assert cfg.SOLVER.STEPS == (10, 20) and cfg.MEMO == "12" and cfg.SOLVER.ADAM.EPS == 1e-6 and not flags.eval_only
    assert parse(["--config-file", CONFIG, "--eval-only", "SEED", "1"])[1].eval_only
    assert parse(["--config-file", CONFIG, "SEED", "-1", "--eval-only"])[1].eval_only


def test_every_default_may_be_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(Config()))
    assert Config(read_yaml(tmp_path / "config.yaml")).flat == DEFAULTS


@pytest.mark.parametrize(("content", "named"), [
    ("MODEL:\n  WIDHT: 2\n", 'did you mean "MODEL.WIDTH"'),
    ("MODEL:\n  WIDTH: wide\n", "MODEL.WIDTH: 'wide' is not a valid integer"),
    ("MODEL: [", "not plain YAML"),
    ("- 1\n", "must hold sections"),
    ("MODEL: !!python/object/apply:os.getcwd []\n", "not plain YAML"),
])
def test_mistakes_of_a_file(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match="bad.yaml") as error:
        parse(["--config-file", str(tmp_path / "bad.yaml")])
    assert named in str(error.value)


def test_published_sections_without_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("ALGORITHM:\n  NAME: FixMatch\n  FIXMATCH: {}\n  PSEUDO_LABEL: {}\n")
    assert read_yaml(tmp_path / "old.yaml") == {"ALGORITHM.NAME": "FixMatch"}


def test_status_and_one_line(tmp_path: Path) -> None:
    failed = run("DASO/main.py", "--config-file", CONFIG, "ALGORITHM.NAME", "FixMach", "OUTPUT_DIR", tmp_path / "out",
                 status=2)
    assert 'did you mean "FixMatch"' in one_line_error(failed)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        load_data(parse(["--config-file", CONFIG, "DATASET.ROOT", str(tmp_path / "none"), "DATASET.DOWNLOAD", "False",
                         "SEED", "0"])[0])


def test_too_few_images_of_a_class(tmp_path: Path) -> None:
    root = write_cifar(tmp_path, "cifar10", 60)
    pairs = ["--config-file", CONFIG, "DATASET.ROOT", str(root), "DATASET.NUM_VALID", "100", "SEED", "0"]
    with pytest.raises(UserError, match="50 images left for the labelled set, but 1500 are asked for"):
        load_data(parse(pairs)[0])
    with pytest.raises(UserError, match="NUM_VALID 5 leaves"):
        load_data(parse([*pairs, "DATASET.NUM_VALID", "5"])[0])
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES 7"):
        load_data(parse([*pairs, "MODEL.NUM_CLASSES", "7", "DATASET.CIFAR10.NUM_LABELED_HEAD", "10",
                         "DATASET.CIFAR10.NUM_UNLABELED_HEAD", "20"])[0])


def test_a_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    call("fixmatch", tmp_path, {"SOLVER.MAX_ITER": 1})
    with pytest.raises(UserError, match="SOLVER.BASE_LR was 0.01, is 0.02"):
        call("fixmatch", tmp_path, {"SOLVER.MAX_ITER": 1, "SOLVER.BASE_LR": 0.02})


def test_a_run_with_other_images_is_not_continued(tmp_path: Path) -> None:
    """What counts is the content of the generated images, not where they lie."""
    keys = {"SOLVER.MAX_ITER": 1, "DATASET.AUG_PATH": tmp_path / "one"}
    rng = np.random.default_rng(0)
    for name in "one", "two":
        images = rng.integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
        write_folder(ImageSet(images, np.arange(10), tuple(map(str, range(10))), name), tmp_path / name)
    call("fixmatch", tmp_path / "out", keys)
    (tmp_path / "one").rename(tmp_path / "moved")
    call("fixmatch", tmp_path / "out", {**keys, "DATASET.AUG_PATH": tmp_path / "moved"})
    with pytest.raises(UserError, match="another content of DATASET.AUG_PATH"):
        call("fixmatch", tmp_path / "out", {**keys, "DATASET.AUG_PATH": tmp_path / "two"})


def test_checkpoint_of_another_network(tmp_path: Path) -> None:
    folder = call("fixmatch", tmp_path / "a", {"SOLVER.MAX_ITER": 1})
    with pytest.raises(UserError, match="there, .* here; set MODEL"):
        call("fixmatch", tmp_path / "b", {"MODEL.WIDTH": 2, "RESUME": str(folder / "model_final.pth.tar")})
    (tmp_path / "cut.pth.tar").write_bytes((folder / "model_final.pth.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match="cut.pth.tar: cut short"):
        call("fixmatch", tmp_path / "b", {"RESUME": str(tmp_path / "cut.pth.tar")})
    torch.save({"model": {"conv1.weight": 3}}, tmp_path / "odd.pth.tar")
    with pytest.raises(UserError, match="its entry model does not hold the weights"):
        call("fixmatch", tmp_path / "b", {"RESUME": str(tmp_path / "odd.pth.tar")})
    assert not (tmp_path / "b").exists()


def test_batch_that_ranks_cannot_share(tmp_path: Path) -> None:
    failed = run("DASO/main.py", *command("fixmatch", tmp_path, {"SOLVER.IMS_PER_BATCH": 7}), ranks=2, status=1)
    assert "SOLVER.IMS_PER_BATCH 7 cannot be shared evenly by 2 processes" in failed.stderr


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    failed = run("DASO/main.py", *command("fixmatch", tmp_path, {"GPU_ID": 77}), status=2)
    assert "device cuda:77 was asked for" in one_line_error(failed) and not list(tmp_path.iterdir())


def test_plot_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="summary.json: cannot be read"):
        plot_pseudo_labels.main([str(tmp_path)])


@pytest.mark.parametrize(("line", "named"), [
    ("../outside.jpg 0", "a path inside the folder"), ("a.jpg b", "line 1"), ("missing.jpg 0", "names missing.jpg")])
def test_lists_of_semi_aves(line: str, named: str, tmp_path: Path) -> None:
    root = write_semi_aves(tmp_path)
    (root / "l_train.txt").write_text(line + "\n")
    cfg = Config({"DATASET.NAME": "semi_aves", "DATASET.BUILDER": "build_semi_aves_dataset", "DATASET.ROOT": str(root),
                  "DATASET.RESOLUTION": 28, "MODEL.NUM_CLASSES": 3})
    with pytest.raises(UserError, match=named):
        load_data(cfg)


def test_long_tail_of_reversed_unlabelled_images() -> None:
    labels = np.repeat(np.arange(4), 100)
    labelled, _, unlabelled = select(labels, 4, 0, head=20, factor=4, num_valid=0, unlabelled_head=40,
                                     unlabelled_factor=8, reverse=True)
    assert np.bincount(labels[unlabelled]).tolist() == long_tail_counts(40, 8, 4, reverse=True).tolist()
    assert not set(labelled) & set(unlabelled)
