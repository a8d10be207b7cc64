"""Sampling: the same images in any batch and on any number of processes, what is there stays, FID without files."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from DDAE import extract_cifar10_pngs
from DDAE.ddae.checkpoints import load_model
from DDAE.ddae.config import read_config
from DDAE.ddae.sampling import ImageSampler
from shared.cli import UserError
from tests.ddae.tiny import DDPM, call, sample_in, train_in, write_config
from tests.shared.programs import run

EDM_FOLDER = "EMAgenerated_ep2_edm_steps5_eta0.5"
FLAGS = ("--images=30", "--steps=5", "--eta=0.5")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    train_in(folder)
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A folder with the trained checkpoints and no samples."""
    write_config(tmp_path)
    shutil.copytree(trained / "out" / "ckpts", tmp_path / "out" / "ckpts")
    return tmp_path


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_images_depend_neither_on_batches_nor_on_processes(place: Path) -> None:
    made = {}
    for name, ranks, flags in (("whole", 1, ["--batch=30"]), ("parts", 1, ["--batch=7"]), ("two", 2, ["--batch=4"])):
        if ranks == 1:
            sample_in(place, *FLAGS, *flags)
        else:
            run("DDAE/sample.py", "--config=tiny.yaml", "--device=cpu", *FLAGS, *flags, cwd=place, ranks=ranks)
        made[name] = images(place / "out" / EDM_FOLDER)
        shutil.rmtree(place / "out" / EDM_FOLDER)
    assert set(made["whole"]) == {"grid_0.png", *(f"{number}.png" for number in range(30))}
    assert made["parts"] == made["whole"] and made["two"] == made["whole"]
    assert len(set(made["whole"].values())) == 31


def test_what_is_there_stays_and_what_is_missing_is_made_the_same(place: Path) -> None:
    sample_in(place, *FLAGS, "--batch=16", "--npz")
    folder = place / "out" / EDM_FOLDER
    before = images(folder)
    for number in (3, 17, 18):
        (folder / "pngs" / f"{number}.png").unlink()
    kept = (folder / "pngs" / "0.png").stat().st_mtime_ns
    sample_in(place, *FLAGS, "--batch=16")
    assert images(folder) == before and (folder / "pngs" / "0.png").stat().st_mtime_ns == kept
    with np.load(folder.with_name(EDM_FOLDER + ".npz")) as archive:
        assert archive["images"].shape == (30, 1, 8, 8)
        written = np.asarray(Image.open(folder / "pngs" / "5.png"))  # RGB, as published
        assert archive["images"].shape[1] == 1 and np.array_equal(archive["images"][5].repeat(3, 0),
                                                                  written.transpose(2, 0, 1))


def test_images_of_other_settings_are_not_mixed(place: Path) -> None:
    sample_in(place, *FLAGS)
    before = images(place / "out" / EDM_FOLDER)
    with pytest.raises(UserError, match="holds images of other settings .seed 1337 there, 1 here"):
        sample_in(place, *FLAGS, "--seed=1")
    assert images(place / "out" / EDM_FOLDER) == before
    sample_in(place, *FLAGS, "--seed=1", "--overwrite")
    assert not set(images(place / "out" / EDM_FOLDER).values()) & set(before.values())
    (place / "out" / f"{EDM_FOLDER}.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        sample_in(place, *FLAGS)


def test_a_missing_epoch_names_those_there_are(place: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint .*model_1.pth; there are the epochs 0, 2"):
        sample_in(place, *FLAGS, "--epoch=1")
    shutil.rmtree(place / "out")
    with pytest.raises(UserError, match="none of another epoch; train it first"):
        sample_in(place, *FLAGS)


def test_more_steps_than_there_are_times(tmp_path: Path) -> None:
    write_config(tmp_path, **DDPM, n_epoch=1)
    train_in(tmp_path)
    with pytest.raises(UserError, match="--steps: expected 1 to 50"):
        sample_in(tmp_path, "--images=4", "--steps=51")
    assert not list((tmp_path / "out").glob("EMAgenerated*"))
    for flags, name in (((), "ddim_steps50_eta0.0"), (("--steps=10", "--eta=1"), "ddim_steps10_eta1.0"),
                        (("--mode=DDPM",), "ddpm")):
        sample_in(tmp_path, "--images=4", *flags)
        assert len(images(tmp_path / "out" / f"EMAgenerated_ep0_{name}")) == 5


def test_an_image_that_is_not_finite_is_reported(trained: Path) -> None:
    net, diffusion = load_model(read_config(trained / "tiny.yaml", [f"save_dir={trained / 'out'}"]))
    net.final.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="image 7 is not finite"):
        ImageSampler(net, diffusion, steps=2).images([7, 8])


def test_exact_end_leaves_no_noise(tmp_path: Path) -> None:
    write_config(tmp_path, **DDPM)
    config = read_config(tmp_path / "tiny.yaml")
    from DDAE.ddae.config import make_diffusion

    def zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    # A network that sees no noise leaves the clipped image: at the published end, scaled down and with noise beside it.
    latents = 3 * torch.ones(1, 1, 8, 8)
    exact, published = (make_diffusion(config, exact_end=exact).sample(zero, latents, None) for exact in (True, False))
    assert float(exact.max()) == 1.0 and float(published.max()) != 1.0


@pytest.mark.parametrize(("flags", "message"), [
    (["--strict", "--compile"], "--strict means fp32"), (["--strict", "--precision=bf16"], "--strict means fp32"),
    (["--images=0"], "'--images': 0"), (["--batch=0"], "'--batch': 0"), (["--eta=nan"], "'--eta': nan")])
def test_flags_out_of_range_or_in_contradiction(place: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_in(place, *flags)
    assert not list((place / "out").glob("EMAgenerated*"))


def test_fid_of_the_images_that_would_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from DDAE import fid
    from EDM.metrics.detectors import Detector
    from EDM.metrics.features import extract, from_extraction, write_reference
    from EDM.metrics.metrics import frechet_distance
    from EDM.metrics.sources import FileImages
    from shared.distributed import World

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.avg_pool2d(pixels.float(), 4)[:, :1].flatten(1), None

    detector = Detector(kind="stand-in", name="means", file="none", sha256="0", channels=3, num_features=4,
                        num_logits=0, resize="none", device=torch.device("cpu"), network=network)
    monkeypatch.setattr(fid, "load_detector", lambda *_: detector)
    sample_in(place, *FLAGS)
    pngs = str(place / "out" / EDM_FOLDER / "pngs")
    other = extract(FileImages(str(place / "digits.npz")), detector, 10, World())
    write_reference(place / "ref.npz", from_extraction(other, "digits"), detector)
    call(fid, "--config=tiny.yaml", "--device=cpu", *FLAGS, "--batch=8", f"--ref={place / 'ref.npz'}",
         "--json=fid.json", folder=place)
    written = extract(FileImages(pngs), detector, 10, World())
    expected = frechet_distance(*written.moments.mean_and_covariance(), *other.moments.mean_and_covariance())
    assert json.loads((place / "fid.json").read_text())["fid"] == pytest.approx(expected, rel=1e-6)


def test_cifar10_pngs_need_the_whole_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cifar10: .* not found"):
        call(extract_cifar10_pngs, f"--data_dir={tmp_path}")
