"""The commands of stage 2 on tiny photographs: latents, training, images, FID; interruptions, ranks and bad input."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from EDM.imagenet import eval_ldm, extract_imagenet_features_semi, sample_ldm_all, train_ldm, train_ldm_discrete
from EDM.latent.extraction import published_rows
from EDM.latent.latents import draw_labels, read_latents
from EDM.metrics.detectors import load_detector
from EDM.metrics.features import extract, from_extraction, write_reference
from EDM.metrics.sources import FileImages
from shared.cli import UserError
from shared.distributed import World
from tests.edm.latent_runs import (
    CLASSES,
    HUGE,
    LARGE,
    LATENTS,
    TINY,
    WORKDIR,
    write_latents,
    write_photographs,
    write_vae,
)
from tests.edm.scored_images import write_classifier
from tests.shared.programs import ROOT, assert_same, one_line_error, run

LAST = WORKDIR / "ckpts" / "6.ckpt" / "nnet_ema.pth"
IMAGES = WORKDIR / "samples_for_classifier" / "aug_3_samples" / "train"
SCRIPTS = {"extract_imagenet_features_semi": extract_imagenet_features_semi, "train_ldm": train_ldm,
           "train_ldm_discrete": train_ldm_discrete, "sample_ldm_all": sample_ldm_all, "eval_ldm": eval_ldm}


def command(name: str, *flags: str, config: str = LARGE, **how):
    return run(f"EDM/imagenet/{name}.py", config, *TINY, *flags, **how)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of stage 2 have run, scores included."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_photographs(folder)
    write_classifier(folder / "detector.pth")
    detector = load_detector(str(folder / "detector.pth"), torch.device("cpu"))
    write_reference(str(folder / "stats.npz"), from_extraction(extract(
        Squares(folder / "data" / "train"), detector, 4, World()), "data"), detector)
    command("extract_imagenet_features_semi", cwd=folder)
    scores = "--fid_stats=stats.npz", "--detector=detector.pth"
    command("train_ldm", *scores, cwd=folder)
    command("sample_ldm_all", "--output_path=log/sample_log", cwd=folder)
    command("eval_ldm", *scores, "--output_path=log/eval_log", cwd=folder)
    return folder


class Squares(FileImages):
    """Photographs, cut to one size."""

    def _decode(self, content, chosen):
        return np.random.default_rng(0).integers(0, 256, (len(chosen), 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def place(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the commands have written, as the working folder."""
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_commands_leave_the_published_files(done):
    latents = read_latents(done / LATENTS, (12, 16, 16))
    assert len(latents) == 24 and latents.classes == CLASSES
    files = {str(path.relative_to(done / WORKDIR)) for path in (done / WORKDIR).rglob("*") if path.is_file()}
    assert {f"ckpts/{step}.ckpt/{name}.pth" for step in (3, 6)
            for name in ("step", "optimizer", "lr_scheduler", "nnet", "nnet_ema")} <= files
    assert {"samples/6.png", "eval.log", "stats.jsonl", "log.txt"} <= files
    scores = (done / WORKDIR / "eval.log").read_text().splitlines()
    assert [line.split("=")[1] + line.split("=")[0] for line in scores][:2] == ["3 fid8step", "6 fid8step"]
    lines = [json.loads(line) for line in (done / WORKDIR / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6] and lines[0]["lr"] == 0.0002
    made = sorted(str(path.relative_to(done / IMAGES)) for path in (done / IMAGES).rglob("*.png"))
    assert made == sorted(f"{name}/{number}.png" for name in CLASSES for number in range(3))
    assert "guidance 0.4" in (done / "log/sample_log").read_text()
    assert "scale=0.4 fid8=" in (done / "log/eval_log").read_text()


def test_rows_hold_photographs_and_their_mirror_images(done):
    moments, labels = read_latents(done / LATENTS, (12, 16, 16)).rows.take(np.arange(24))
    pixels = torch.nn.functional.pixel_shuffle(torch.from_numpy(moments[:, :12]), 2)
    assert torch.equal(pixels[12:], pixels[:12].flip(3)) and pixels.abs().max() <= 1
    np.testing.assert_array_equal(labels[:12], [(label + number) % 3 for label in range(3) for number in range(4)])
    np.testing.assert_array_equal(labels[12:], labels[:12])


def test_rows_without_mirror_images():
    images, mirrored = published_rows(5, 2, mirror=False)
    assert images.tolist() == [0, 1, 2, 3, 4] and not mirrored.any()


def test_again_is_complete_and_missing_images_are_made_again(place):
    before = {path: path.read_bytes() for path in IMAGES.rglob("*.png")}
    gone = list(before)[:2]
    for path in gone:
        path.unlink()
    assert "Saved" in command("sample_ldm_all", cwd=place).stdout
    assert {path: path.read_bytes() for path in IMAGES.rglob("*.png")} == before
    for name in ("extract_imagenet_features_semi", "sample_ldm_all", "train_ldm"):
        flags = ("--fid_stats=stats.npz", "--detector=detector.pth") if name == "train_ldm" else ()
        assert "complete: " in command(name, *flags, cwd=place).stdout


def test_interrupted_and_resumed_bitwise(done, tmp_path):
    shutil.copytree(done / "pretrained", tmp_path / "pretrained")
    flags = (LARGE, *TINY, "--workdir=run", "--checkpoint_minutes=1e-9")
    run("tests/edm/interrupted.py", "SIGKILL", "4", ROOT / "EDM/imagenet/train_ldm.py", *flags, cwd=tmp_path,
        fresh=True, status=-9)
    assert not (tmp_path / "run/ckpts/6.ckpt").exists()
    assert "continuing at step" in run("EDM/imagenet/train_ldm.py", *flags, cwd=tmp_path).stdout
    for name in ("nnet", "nnet_ema", "optimizer"):
        assert_same(torch.load(tmp_path / f"run/ckpts/6.ckpt/{name}.pth"), torch.load(done / LAST.with_name(
            f"{name}.pth")))


def test_published_checkpoints_are_continued(done, tmp_path):
    shutil.copytree(done / "pretrained", tmp_path / "pretrained")
    shutil.copytree(done / WORKDIR / "ckpts/3.ckpt", tmp_path / "run/ckpts/3.ckpt")
    (tmp_path / "run/ckpts/5.ckpt").mkdir()  # cut short
    assert "continuing at step 3" in command("train_ldm", "--workdir=run", cwd=tmp_path).stdout
    assert_same(torch.load(tmp_path / "run/ckpts/6.ckpt/nnet.pth"), torch.load(done / LAST.with_name("nnet.pth")))


def test_two_ranks_are_one(done, tmp_path):
    shutil.copytree(done / "data", tmp_path / "data")
    shutil.copytree(done / "pretrained/cluster", tmp_path / "pretrained/cluster")
    command("extract_imagenet_features_semi", cwd=tmp_path, ranks=2)
    ours, theirs = (np.load(folder / LATENTS / "moments.npy") for folder in (tmp_path, done))
    np.testing.assert_array_equal(ours, theirs)
    command("train_ldm", cwd=tmp_path, ranks=2)
    command("sample_ldm_all", f"--nnet_path={done / LAST}", cwd=tmp_path, ranks=2)
    made = {path.relative_to(done): path.read_bytes() for path in (done / IMAGES).rglob("*.png")}
    assert made == {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / IMAGES).rglob("*.png")}
    ours, theirs = (torch.load(folder / LAST.with_name("nnet.pth")) for folder in (tmp_path, done))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_the_discrete_schedule_over_a_vae(done, tmp_path):
    shutil.copytree(done / "data", tmp_path / "data")
    shutil.copytree(done / "pretrained/cluster", tmp_path / "pretrained/cluster")
    write_vae(tmp_path / "vae.pth")
    vae = ("--config.autoencoder.pretrained_path=vae.pth", "--config.z_shape=4,16,16", "--config.nnet.in_chans=4",
           "--config.train.n_steps=3", "--config.nnet.mlp_time_embed=True")
    command("extract_imagenet_features_semi", *vae, "--dtype=float16", cwd=tmp_path)
    assert np.load(tmp_path / LATENTS / "moments.npy").dtype == np.float16
    command("train_ldm_discrete", *vae, "--precision=bf16", config=HUGE, cwd=tmp_path)
    command("sample_ldm_discrete_all", *vae, "--config.sample.path=own", "--strict", config=HUGE, cwd=tmp_path)
    assert len(list((tmp_path / "own").glob("*/*.png"))) == 9


def test_image_prediction_without_skips(tmp_path):
    write_latents(tmp_path / "latents")
    command("train_ldm", "--dataset_path=latents", "--workdir=run", "--config.pred=x0_pred", "--strict",
            "--config.nnet.skip=False", "--config.train.n_steps=3", cwd=tmp_path)


BAD = [
    ("train_ldm", ("--config.z_shape=4,16,16",), "its moments are \\[24, 16, 16\\]"),
    ("train_ldm", ("--config.nnet.num_classes=11",), "give --config.nnet.num_classes=4"),
    ("train_ldm", ("--config.nnet.in_chans=4",), "give --config.nnet.in_chans=12 --config.nnet.img_size=16"),
    ("train_ldm", ("--config.nnet.num_heads=3",), "heads must divide the width"),
    ("train_ldm", ("--config.nnet.depths=3",), 'no such key \\(did you mean "depth"\\?\\)'),
    ("train_ldm", ("--config.train.batch_size=100", "--workdir=x"), "a batch of 100 is larger than the 24 latents"),
    ("train_ldm", ("--config.train.batch_size=x",), "'--config.train.batch_size': 'x' is not a valid integer"),
    ("train_ldm", ("--dataset_path=absent",), "absent: no latents there; make it with extract_imagenet"),
    ("train_ldm", ("--config.optimizer.name=sgd",), "the only optimizer is adamw"),
    ("train_ldm", ("--config.optimizer.lr=0.1",), "optimizer.lr was 0.0002, is 0.1"),
    ("train_ldm", ("--config.pred=v",), "expected noise_pred or x0_pred"),
    ("train_ldm", ("--fid_stats=absent.npz",), "--fid_stats: there is no file absent.npz"),
    ("train_ldm", ("--config.autoencoder.pretrained_path=vae.pth",), "there is no file vae.pth; put the VAE's weights"),
    ("train_ldm", ("--config.z_shape=a",), "'--config.z_shape'"),
    ("extract_imagenet_features_semi", ("--config.image_path=absent",), "absent"),
    ("extract_imagenet_features_semi", ("--dtype=float16",), "dtype was float32, is float16.*--overwrite"),
    ("extract_imagenet_features_semi", ("--config.model_name=x",), "imagenet_features_preds.npy: no such file"),
    ("sample_ldm_all", ("--config.train.n_steps=9",), "9.ckpt/nnet_ema.pth: no such file; train to step"),
    ("sample_ldm_all", ("--config.sample.scale=2",), "guidance was 0.4, is 2.0"),
    ("sample_ldm_all", ("--config.sample.path=data/train",), "of unknown origin; give --overwrite"),
    ("sample_ldm_all", ("--config.nnet.depth=4",), "nnet_ema.pth: snapshot of another network"),
    ("sample_ldm_all", ("--config.sample.sample_steps=0", "--config.sample.path=x"), "at least 1 network call"),
    ("eval_ldm", (), "there is no assets/fid_stats/.*fid.py ref"),
]


@pytest.mark.parametrize("name, flags, message", BAD, ids=[f"{name} {' '.join(flags)}" for name, flags, _ in BAD])
def test_bad_input_is_one_line(name, flags, message, place, monkeypatch):
    before = sorted(place.rglob("*"))
    monkeypatch.setattr("sys.argv", [f"{name}.py", LARGE, *TINY, *flags])
    with pytest.raises(UserError, match=message) as found:
        SCRIPTS[name].main()
    assert "\n" not in str(found.value)
    assert [path for path in before if not path.exists()] == []


def test_weights_that_are_not_finite(place, monkeypatch):
    state = torch.load(LAST)
    torch.save({**state, "norm.bias": torch.full_like(state["norm.bias"], torch.inf)}, LAST)
    monkeypatch.setattr("sys.argv", ["sample_ldm_all.py", LARGE, *TINY])
    with pytest.raises(UserError, match="nnet_ema.pth: norm.bias holds numbers that are not finite"):
        sample_ldm_all.main()


def test_latents_of_another_vae_and_images_without_label(place, monkeypatch):
    about = json.loads((LATENTS / "latents.json").read_text())
    (LATENTS / "latents.json").write_text(json.dumps({**about, "coder": "0" * 32}))
    monkeypatch.setattr("sys.argv", ["train_ldm.py", LARGE, *TINY])
    with pytest.raises(UserError, match="latents of another VAE than space-to-depth"):
        train_ldm.main()
    shutil.copy("data/train/n01440764/n01440764_0.png", "data/train/n01440764/new.png")
    with pytest.raises(UserError, match="n01440764/new.png has no pseudo-label; run train_classifier.py"):
        extract_imagenet_features_semi.main([LARGE, *TINY])


def test_a_class_without_pseudo_label_is_a_warning(place):
    file = Path("pretrained/cluster").glob("*/imagenet_features_preds.npy").__next__()
    np.save(file, np.zeros(12, np.int64))
    with pytest.warns(UserWarning, match="no image has the pseudo-label n01443537, n02007558 \\(2 such classes\\)"):
        extract_imagenet_features_semi.main([LARGE, *TINY, "--overwrite"])




def test_classes_are_drawn_by_the_transition(place):
    frequencies = np.array([[0.5, 0.5, 0], [0, 1, 0], [0.2, 0, 0.8]])
    labels = np.repeat(np.arange(3), 20_000)
    drawn = draw_labels(labels, np.random.default_rng(0).random(len(labels)), frequencies)
    found = np.stack([np.bincount(drawn[labels == label], minlength=3) / 20_000 for label in range(3)])
    np.testing.assert_allclose(found, frequencies, atol=0.01)
    np.testing.assert_array_equal(draw_labels(np.arange(3), np.array([0, 0.5, 1 - 1e-16]), np.eye(3)), np.arange(3))

    np.save("transition.npy", np.full((3, 3), 1 / 3))
    command("train_ldm", "--workdir=noisy", "--transition=transition.npy", cwd=place)
    ours, theirs = (torch.load(folder / "ckpts/6.ckpt/nnet.pth")["label_emb.weight"] for folder in (Path("noisy"),
                                                                                                    WORKDIR))
    assert not torch.equal(ours, theirs)
    np.save("transition.npy", np.eye(4))
    with pytest.raises(UserError, match="transition.npy"):
        train_ldm.main(argv=[LARGE, *TINY, "--workdir=noisy", "--transition=transition.npy"])


@pytest.mark.slow
def test_inner_tokens_are_drawn_to_an_encoder(place):
    flags = (LARGE, *TINY, "--repa=timm:test_vit", "--config.lr_scheduler.warmup_steps=0")
    run("EDM/imagenet/train_ldm.py", *flags, "--workdir=whole", "--config.train.log_interval=1", cwd=place)
    lines = [json.loads(line) for line in Path("whole/stats.jsonl").read_text().splitlines()]
    assert all(-1 <= line["alignment"] <= 1 for line in lines)
    assert lines[-1]["alignment"] < lines[0]["alignment"] - 0.01
    run("EDM/imagenet/train_ldm.py", *flags, "--workdir=halves", "--config.train.n_steps=3", cwd=place)
    run("EDM/imagenet/train_ldm.py", *flags, "--workdir=halves", cwd=place, ranks=2)
    ours, theirs = (torch.load(Path(folder, "ckpts/6.ckpt/nnet.pth")) for folder in ("whole", "halves"))
    assert ours.keys() == torch.load(LAST).keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    for more, message in ((("--repa=timm:test_efficientnet",), "has no patch tokens"),
                          (("--repa_block=3",), "--repa_block 3: the network's blocks are 0 to 2"),
                          (("--repa_weight=1", "--workdir=whole"), "repa_weight was 0.5, is 1.0"),
                          ((), "with another content of --repa"), (("--repa=x.pth",), "x.pth")):
        with pytest.raises(UserError, match=message):
            train_ldm.main(argv=[*flags, *(more or ("--repa=timm:test_vit2", "--workdir=whole"))])


def test_a_run_that_diverges_saves_nothing(place):
    failed = command("train_ldm", "--workdir=bad", "--config.optimizer.lr=1e30", "--config.lr_scheduler.warmup_steps=0",
                     "--config.train.save_interval=1", "--config.train.log_interval=100", cwd=place, status=1)
    line = one_line_error(failed)
    assert "is not finite at step" in line and "nothing was saved" in line
    for file in Path("bad/ckpts").glob("*/nnet.pth"):
        assert all(value.isfinite().all() for value in torch.load(file).values())
