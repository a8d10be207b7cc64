"""DiT: latents of a VAE, the probe on them, continuation, any number of processes, mistakes."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from DDAE.ddae.data import load_images
from DDAE.DiT import linear, vae_preprocessing
from DDAE.DiT.gaussian import SpacedDiffusion, kept_steps
from DDAE.DiT.network import DiT
from DDAE.DiT.small import write_small
from shared.cli import UserError
from shared.training.checkpoint import read_checkpoint
from tests.ddae.tiny import call, killed, result
from tests.shared.programs import assert_same, one_line_error, run

VAE = ("--device=cpu", "--dataset=images", "--vae=vae", "--resolution=32", "--num_copies=2", "--batch_size=5")
PROBE = ("--device=cpu", "--dataset=images", "--ckpt=DiT-S-2.pt", "--model=DiT-S/2", "--epoch=2", "--batch_size=8",
         "--name=layer-0,layer-2", "--time=81,121")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 22 + 7 images of two classes, a VAE, the weights of a DiT, and the latents made from them."""
    root = tmp_path_factory.mktemp("dit")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (12, 10)), ("test", (4, 3))):
        for label, count in enumerate(counts):
            place = root / "images" / split / str(label)
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 156, (16, 16, 3), dtype=np.uint8) + np.uint8(100 * label)
                Image.fromarray(pixels).save(place / f"{number}.png")
    write_small(root, load_images(str(root / "images"), "train", "."), 32, 0)
    call(vae_preprocessing, *VAE, folder=root)
    return root


def codes(folder: Path, name: str, where: str = "latent_codes") -> np.ndarray:
    return np.load(folder / where / "images" / name)


def test_latents_have_the_published_names_and_form(folder: Path) -> None:
    files = {path.name for path in (folder / "latent_codes" / "images").iterdir()}
    kinds = [f"{split}_debug_{kind}_{copy}.png" for split, copy in (("train", 0), ("train", 1), ("test", 0))
             for kind in ("original", "reconstruct")]
    assert files == {"train_code_0.npy", "train_code_1.npy", "test_code_0.npy", "train_label.npy", "test_label.npy",
                     ".record.json", *kinds}
    train = codes(folder, "train_code_0.npy")
    assert train.dtype == np.float32 and train.shape == (22, 4, 4, 4) and np.isfinite(train).all()
    assert not np.array_equal(train, codes(folder, "train_code_1.npy"))
    labels = codes(folder, "train_label.npy")
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 12 + [1] * 10


def test_latents_are_posterior_samples_of_the_enlarged_image(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    image = Image.open(folder / "images" / "test" / "1" / "0.png").resize((32, 32), Image.Resampling.BILINEAR)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    code = torch.from_numpy(codes(folder, "test_code_0.npy")[4])
    noise = (code / 0.18215 - posterior.mean[0]) / posterior.std[0]
    assert abs(float(noise.mean())) < 4 / 64 ** 0.5 and 0.5 < float(noise.std()) < 1.6


def test_latents_by_two_processes_and_after_a_kill(folder: Path, tmp_path: Path) -> None:
    run("DDAE/DiT/vae_preprocessing.py", *VAE, f"--codes={tmp_path}", cwd=folder, ranks=2)
    for name in ("train_code_0.npy", "train_code_1.npy", "test_code_0.npy"):
        assert np.allclose(np.load(tmp_path / "images" / name), codes(folder, name), atol=1e-5)
    # Half a file, as a killed run leaves it: what is there stays, the rest is made.
    path = tmp_path / "images" / "train_code_1.npy"
    partial = np.load(path)
    partial[3:9], partial[20, 2:], partial[0] = np.nan, np.nan, 7
    np.save(path.with_name("train_code_1.part.npy"), partial)
    path.unlink()
    call(vae_preprocessing, *VAE, f"--codes={tmp_path}", folder=folder)
    again = np.load(path)
    assert (again[0] == 7).all() and np.allclose(again[1:], codes(folder, "train_code_1.npy")[1:], atol=1e-5)
    assert not list(path.parent.glob("*.part.npy"))


def test_latents_of_other_images_vae_or_size_are_not_mixed(folder: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    for name in ("images", "vae", "latent_codes"):
        shutil.copytree(folder / name, tmp_path / name)
    call(vae_preprocessing, *VAE, folder=tmp_path)
    assert "complete: latent_codes/images" in capsys.readouterr().out
    shutil.copytree(tmp_path / "images", tmp_path / "own" / "images")
    train = tmp_path / "own" / "images" / "train"
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):  # the same pixels, classes exchanged
        (train / old).rename(train / new)
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["quant_conv.bias"] += 1
    (tmp_path / "vae2").mkdir()
    save_file(tensors, tmp_path / "vae2" / weights.name)
    shutil.copy(tmp_path / "vae" / "config.json", tmp_path / "vae2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latent_codes").rglob("*")}
    for flag, message in (("--dataset=own/images", "the content of --dataset .train. has changed"),
                          ("--vae=vae2", "the content of --vae has changed"),
                          ("--resolution=64", "resolution was 32, is 64")):
        with pytest.raises(UserError, match=message):
            call(vae_preprocessing, *VAE, flag, folder=tmp_path)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latent_codes").rglob("*")} == before
    call(vae_preprocessing, *VAE, "--dataset=own/images", "--num_copies=1", "--overwrite", folder=tmp_path)
    assert codes(tmp_path, "train_label.npy").tolist() == [0] * 10 + [1] * 12
    assert not (tmp_path / "latent_codes" / "images" / "train_code_1.npy").exists()


@pytest.fixture(scope="module")
def probed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed")
    call(linear, *PROBE, f"--outdir={out}", folder=folder)
    return out / "images"


def test_probe(folder: Path, probed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert list(result(probed)["probes"]) == ["81/layer-0", "81/layer-2", "121/layer-0", "121/layer-2"]
    assert result(probed)["config"]["copies"] == 2
    # One of them alone is the same, and its line is the published one.
    call(linear, *PROBE[:-2], "--name=layer-2", "--time=121", f"--outdir={tmp_path}", folder=folder)
    alone, among = (read_checkpoint(path / "heads.pth")["121/layer-2"] for path in (tmp_path / "images", probed))
    torch.testing.assert_close(alone, among, atol=1e-5, rtol=1e-5)
    accuracy = result(tmp_path / "images")["accuracy"]["last"]
    assert accuracy == result(probed)["probes"]["121/layer-2"] and f"\nTest acc: {100 * accuracy:.2f}\n" in \
        capsys.readouterr().out


def test_probe_killed_and_continued_is_bitwise_the_same(folder: Path, probed: Path, tmp_path: Path) -> None:
    killed(folder, "DDAE.DiT.linear", *PROBE, f"--outdir={tmp_path}", at=3)
    call(linear, *PROBE, f"--outdir={tmp_path}", folder=folder)
    assert_same(read_checkpoint(tmp_path / "images" / "heads.pth"), read_checkpoint(probed / "heads.pth"))


def test_probe_with_two_processes(folder: Path, probed: Path, tmp_path: Path) -> None:
    run("DDAE/DiT/linear.py", *PROBE, "--batch_size=4", "--lr=5e-4", f"--outdir={tmp_path}", cwd=folder, ranks=2)
    ones, twos = (read_checkpoint(path / "heads.pth") for path in (probed, tmp_path / "images"))
    for key in ones:
        torch.testing.assert_close(twos[key], ones[key], atol=1e-5, rtol=1e-3)


def test_blocks_behind_the_last_one_do_not_run() -> None:
    net = DiT(input_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=5).eval()
    ran = []
    for number, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    net.features(torch.zeros(1, 4, 4, 4), torch.tensor([3]), torch.tensor([5]), ["layer-1"])
    assert ran == [0, 1]


def test_default_levels_and_blocks() -> None:
    assert linear.parse([]).times == [121] and linear.parse(["--dataset=tiny"]).times == [81]
    assert linear.parse(["--time=-1"]).times == [121] and linear.parse(["--time=0"]).times == [0]
    assert linear.parse([]).names == ["layer-13"] and linear.parse(["--name=layer-0"]).names == ["layer-0"]


@pytest.mark.parametrize(("flags", "message"), [
    (("--name=layer-99",), "no block 'layer-99'.*it has layer-0, layer-1"),
    (("--ckpt=nothing.pt",), "--ckpt nothing.pt: no such file; put the published DiT-XL-2-256x256.pt there"),
    (("--model=DiT-S/4",), "not the weights of DiT-S/4"),
    (("--model=DiT-M/2",), "no network 'DiT-M/2'"),
    (("--dataset=tiny",), "no train_code_0.npy and train_label.npy there; make them with vae_preprocessing.py"),
    (("--time=1000",), "Invalid value for '--time': 1000 is not in the range x<=999"),
])
def test_mistakes(folder: Path, flags: tuple[str, ...], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        call(linear, *PROBE, *flags, folder=folder)
    assert sorted(folder.rglob("*")) == before


def test_a_vae_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    failed = run("DDAE/DiT/vae_preprocessing.py", *VAE, f"--vae={tmp_path}", f"--codes={tmp_path / 'codes'}",
                 cwd=folder, status=2)
    assert "cannot be loaded" in one_line_error(failed) and not os.path.exists(tmp_path / "codes")


def test_respacing() -> None:
    assert kept_steps("") == list(range(1000)) and kept_steps("ddim50")[:3] == [0, 20, 40]
    assert kept_steps("1") == [0] and len(SpacedDiffusion("1")) == 1
    assert kept_steps("2,1") == [0, 499, 500]
    for wrong in ("0", "1001", "ddim999", "x", "600,1"):
        with pytest.raises(UserError, match=f"respacing '?{wrong}"):
            kept_steps(wrong)
