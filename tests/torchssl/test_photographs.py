"""ImageNet in TorchSSL: views of photographs as torchvision makes them, whole runs, resumed, with either decoder."""
from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as TF

from shared.augment.views import draw_strong, strong
from shared.cli import UserError
from shared.data import pool as pool_module
from shared.data.photographs import EVAL_SIDE, TRAIN_SIDE, list_imagenet
from shared.data.pool import PhotographPool
from shared.distributed import World
from shared.parallel import Prefetched
from tests.shared.programs import assert_same
from tests.torchssl import tiny
from TorchSSL import freematch
from TorchSSL.core.data import NORMALISATION, Batches, load_training_data, read_extra_images

CPU = torch.device("cpu")
CLASSES = ("n01440764", "n01443537")
PHOTOS = ("--dataset=imagenet", "--num_classes=2", "--num_labels=4", "--batch_size=2", "--uratio=1",
          "--net=squeezenet1_1", "--net_from_name=True", "--num_train_iter=3", "--num_eval_iter=2", "--num_save_iter=1",
          "--weak_pad=4", "--weak_pad_mode=reflect", "--weak_subpixel=False", "--weak_flip=True")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """imagenet/train and imagenet/val with small photographs of unequal sizes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for number, wnid in enumerate(CLASSES):
            (root / "imagenet" / part / wnid).mkdir(parents=True)
            for image in range(count):
                height, width = rng.integers(40, 120, 2)
                cut = load_sample_images().images[number][50:50 + height, 60:60 + width]
                Image.fromarray(cut).save(root / "imagenet" / part / wnid / f"{wnid}_{image}.JPEG")
    return root


@pytest.fixture(params=["torchvision", "dali"])
def pool(request: pytest.FixtureRequest, folder: Path) -> PhotographPool:
    return PhotographPool(list_imagenet(str(folder), "train"), *NORMALISATION["imagenet"], CPU, 1, request.param)


def photograph(pool: PhotographPool, position: int) -> Image.Image:
    return Image.open(pool.photographs.files[position]).convert("RGB")


def test_listed_with_labels(folder: Path) -> None:
    train, val = list_imagenet(str(folder), "train"), list_imagenet(str(folder), "test")
    assert len(train) == 8 and len(val) == 4 and train.classes == CLASSES
    assert [Path(file).parent.name for file in train.files] == [CLASSES[label] for label in train.labels]
    assert train.subset(slice(0, 2)).names_by_class() == {CLASSES[0]: ["n01440764_0.JPEG", "n01440764_1.JPEG"],
                                                          CLASSES[1]: []}


def test_squares_are_those_of_torchvision(pool: PhotographPool) -> None:
    """To 256x256 for training, to 224x224 for the evaluation; within one grey level."""
    positions = np.array([5, 0, 5])
    for made, side in ((pool.take(positions), TRAIN_SIDE), (pool.normalised(positions), EVAL_SIDE)):
        for image, position in zip(made, positions, strict=True):
            expected = TF.to_tensor(TF.resize(photograph(pool, position), [side, side]))
            if side == EVAL_SIDE:
                mean, std = (torch.tensor(part).view(3, 1, 1) for part in NORMALISATION["imagenet"])
                image = image * std + mean
            else:
                image = image / 255
            assert (image - expected).abs().max() <= 1.001 / 255


def test_strong_views_change_the_photograph_before_it_is_resized(pool: PhotographPool) -> None:
    positions = np.array([1, 6, 3])
    rng_seed = 5
    draws = draw_strong(3, np.random.default_rng(rng_seed), (TRAIN_SIDE, TRAIN_SIDE))
    made = pool.strong(positions, draws)
    for number, position in enumerate(positions):
        image = photograph(pool, position)
        # The same draws for an image of this size: only the centre of the cutout depends on the size.
        own = draw_strong(3, np.random.default_rng(rng_seed), (image.height, image.width))
        changed = strong(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None], own[number:number + 1])
        expected = TF.resize(Image.fromarray(changed[0].permute(1, 2, 0).numpy()), [TRAIN_SIDE, TRAIN_SIDE])
        assert (made[number].permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def test_batches_ahead_are_the_same() -> None:
    asked = []
    ahead = Prefetched(lambda step: asked.append(step) or step * step, 5)
    assert [ahead(step) for step in (2, 3, 4, 5)] == [4, 9, 16, 25] and asked == [2, 3, 4, 5]
    assert ahead(1) == 1  # out of turn


def test_ranks_share_a_batch(folder: Path) -> None:
    """Two ranks see the two halves of what one sees, and no view is that of another."""
    options = freematch.parse([*PHOTOS, f"--data_dir={folder}", "--save_name=x", "--decoder=torchvision"])
    data = load_training_data(options, folder / "none")
    whole, *parts = (Batches(data, options, world, ("weak", "strong", "strong"), 4, ("strong",))(7)
                     for world in (World(), World(0, 2), World(1, 2)))
    assert whole.labeled.shape == (4, 3, EVAL_SIDE, EVAL_SIDE) and len(whole.views) == 3
    for name in ("labeled", "labels", "index", "truth"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    for name in ("views", "labeled_views"):
        for number, view in enumerate(getattr(whole, name)):
            assert torch.equal(view, torch.cat([getattr(part, name)[number] for part in parts]))
    assert not torch.equal(whole.views[1], whole.views[2]) and not torch.equal(whole.labeled, whole.labeled_views[0])


def test_extra_photographs(folder: Path, tmp_path: Path) -> None:
    """Of any size, in folders named by the classes or by their numbers."""
    train = list_imagenet(str(folder), "train")
    for names in (CLASSES, ("0", "1")):
        place = tmp_path / names[0]
        for number, name in enumerate(names):
            (place / name).mkdir(parents=True)
            Image.new("RGB", (50 + number, 60)).save(place / name / "made.png")
        extra = read_extra_images(str(place), train, 2)
        assert extra.labels.tolist() == [0, 1] and [Path(file).parent.name for file in extra.files] == list(names)
        both = train.concatenate(extra)
        assert len(both) == 10 and both.labels[8:].tolist() == [0, 1]
    (tmp_path / "other" / "n00000000").mkdir(parents=True)
    Image.new("RGB", (50, 60)).save(tmp_path / "other" / "n00000000" / "made.png")
    with pytest.raises(UserError, match="n00000000.* is neither a class number nor one of the classes"):
        read_extra_images(str(tmp_path / "other"), train, 2)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    tiny.run(place, *PHOTOS, f"--data_dir={folder}")
    return place


def test_a_run_on_photographs(whole: Path) -> None:
    run = whole / "saved_models" / "tiny"
    result = json.loads((run / "result.json").read_text())
    assert result["unlabeled_images"] == 8 and result["test_images"] == 4 and result["num_labels"] == 4
    named = json.loads((run / "labeled_files.json").read_text())
    assert {wnid: len(files) for wnid, files in named.items()} == dict.fromkeys(CLASSES, 2)
    assert all(name.startswith(wnid) for wnid, files in named.items() for name in files)


def killed_at_the_second_step() -> None:
    import os

    from TorchSSL.core import trainer

    step, count = trainer.Trainer.train_step, iter(range(10))

    def counted(self, batch):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch)

    trainer.Trainer.train_step = counted


def test_killed_and_resumed(whole: Path, folder: Path, tmp_path: Path) -> None:
    tiny.run(tmp_path, *PHOTOS, f"--data_dir={folder}", status=-signal.SIGKILL, sabotage=killed_at_the_second_step)
    tiny.run(tmp_path, *PHOTOS, f"--data_dir={folder}")
    assert_same(tiny.checkpoint(tmp_path), tiny.checkpoint(whole))


class TestBadInput:
    def test_missing_folders(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="imagenet/train/<class>/ not found"):
            list_imagenet(str(tmp_path), "train")
        (tmp_path / "imagenet" / "train" / "n1").mkdir(parents=True)
        with pytest.raises(UserError, match="no images in it"):
            list_imagenet(str(tmp_path), "train")

    def test_classes_that_differ(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "imagenet" / "val").mkdir(parents=True)
        (tmp_path / "imagenet" / "train").symlink_to(folder / "imagenet" / "train")
        (tmp_path / "imagenet" / "val" / CLASSES[0]).symlink_to(folder / "imagenet" / "val" / CLASSES[0])
        with pytest.raises(UserError, match=f"{CLASSES[1]} is in only one of train and val"):
            list_imagenet(str(tmp_path), "test")

    @pytest.mark.parametrize("decoder", ["torchvision", "dali"])
    def test_photograph_that_does_not_decode(self, folder: Path, tmp_path: Path, decoder: str) -> None:
        place = tmp_path / "imagenet" / "train" / CLASSES[0]
        place.mkdir(parents=True)
        content = (folder / "imagenet" / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").read_bytes()
        (place / "bad.JPEG").write_bytes(content[:-50])
        pool = PhotographPool(list_imagenet(str(tmp_path), "train"), *NORMALISATION["imagenet"], CPU, 1, decoder)
        with pytest.raises(UserError, match="bad.JPEG: cut short or not an image"):
            pool.take(np.array([0]))

    def test_published_numbers_on_fewer_photographs(self, folder: Path, tmp_path: Path) -> None:
        tiny.run(tmp_path, *PHOTOS, f"--data_dir={folder}", "--num_classes=1000", status=2)
        assert "--num_classes 1000: imagenet has 2 classes" in (tmp_path / "stderr.txt").read_text()
        assert not (tmp_path / "saved_models").exists()


@pytest.mark.parametrize("pixels", [pool_module.CANVAS_PIXELS, 20_000])
def test_strong_views_together_are_those_of_each_alone(tmp_path, monkeypatch, pixels):
    """What a GPU does, on canvases of several photographs, gives the bytes of one photograph after the other."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(rng.integers(40, 120, (12, 2))):
        file = tmp_path / "imagenet" / "train" / CLASSES[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    monkeypatch.setattr(pool_module, "CANVAS_PIXELS", pixels)
    pool = PhotographPool(list_imagenet(str(tmp_path), "train"), *NORMALISATION["imagenet"], CPU, 1, "torchvision")
    positions, draws = np.arange(12), draw_strong(12, rng, (256, 256))
    assert torch.equal(pool._on_canvas(positions, draws, with_cutout=True), pool.strong(positions, draws))
    assert torch.equal(pool._on_canvas(positions, draws, with_cutout=False), pool.medium(positions, draws))
