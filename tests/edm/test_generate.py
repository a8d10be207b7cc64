"""generate.py and generate.sh: files, repetition, ranks, classes, guidance, archives, mistakes."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from EDM.generate import main
from EDM.sampling.files import class_folder
from EDM.sampling.seeds import SeedSampler
from EDM.training.networks import EDMPrecond, iDDPMPrecond
from EDM.training.snapshots import load_network, save_snapshot
from shared.cli import UserError
from shared.data.images import read_images

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NETWORK = dict(img_resolution=8, img_channels=3, label_dim=3, model_type="SongUNet", model_channels=16,
               channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4])


def lively(net: torch.nn.Module) -> torch.nn.Module:
    """Layers that start at nearly zero would make all images of a class alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    made = {
        "cond": EDMPrecond(**NETWORK), "uncond": EDMPrecond(**{**NETWORK, "label_dim": 0}),
        "gray": EDMPrecond(**{**NETWORK, "img_channels": 1}), "small": EDMPrecond(**{**NETWORK, "model_channels": 8}),
        "latent": EDMPrecond(**{**NETWORK, "img_channels": 4}),
        "iddpm": iDDPMPrecond(**{**NETWORK, "M": 100}),
    }
    for name, net in made.items():
        save_snapshot(folder / f"{name}.pkl", lively(net))
    made["cond"].model.map_layer0.weight.data.fill_(float("nan"))
    save_snapshot(folder / "nan.pkl", made["cond"])
    return {path.stem: path for path in folder.iterdir()}


def generate(network: Path, outdir: Path, *flags: str) -> dict[str, bytes]:
    """Run generate.py in this process; return the PNGs that are there afterwards."""
    main([f"--network={network}", f"--outdir={outdir}", "--device=cpu", "--steps=4", *flags])
    return pngs(outdir)


def pngs(outdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(outdir)): path.read_bytes() for path in outdir.rglob("*.png")}


def run(*arguments: str | Path, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launch, str(ROOT / "EDM/generate.py"), *map(str, arguments)], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)


# ---------------------------------------------------------------- an image is a function of network, seed and class

def test_batch_size_changes_nothing(networks: dict[str, Path], tmp_path: Path) -> None:
    whole = generate(networks["cond"], tmp_path / "a", "--seeds=0-20")
    parts = generate(networks["cond"], tmp_path / "b", "--seeds=0-20", "--batch=5")
    assert len(whole) == 21 and whole == parts
    few = generate(networks["cond"], tmp_path / "c", "--seeds=20,3")
    assert few == {name: whole[name] for name in ("000003.png", "000020.png")}


def test_two_ranks_write_the_same_files(networks: dict[str, Path], tmp_path: Path) -> None:
    flags = "--S_churn=10", "--classes=0,2"
    alone = generate(networks["cond"], tmp_path / "one", "--seeds=0-8", *flags)
    done = run(f"--network={networks['cond']}", f"--outdir={tmp_path / 'two'}", "--device=cpu", "--steps=4",
               "--seeds=0-8", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    assert pngs(tmp_path / "two") == alone
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_all_classes_are_one_run_per_class(networks: dict[str, Path], tmp_path: Path) -> None:
    together = generate(networks["cond"], tmp_path / "all", "--seeds=0-2", "--classes=all")
    assert sorted({name.split("/")[0] for name in together}) == ["0", "1", "2"] and len(together) == 9
    for index in range(3):
        alone = generate(networks["cond"], tmp_path / f"single{index}", "--seeds=0-2", f"--class={index}")
        assert alone == {name[2:]: content for name, content in together.items() if name[0] == str(index)}
    assert generate(networks["cond"], tmp_path / "all", "--seeds=0-2", "--class=1", "--outdir",
                    str(tmp_path / "all" / "1"))  # and either way of asking finds the other's images
    two = generate(networks["cond"], tmp_path / "two", "--seeds=0-2", "--classes=0,2")
    assert two == {name: content for name, content in together.items() if name[0] != "1"}


def test_random_class_is_the_seed_s_own(networks: dict[str, Path], tmp_path: Path) -> None:
    drawn = SeedSampler(load_network(networks["cond"])).classes(range(12))
    assert set(drawn) == {0, 1, 2}
    free = generate(networks["cond"], tmp_path / "free", "--seeds=0-11")
    fixed = generate(networks["cond"], tmp_path / "fixed", "--seeds=0-11", "--class=1")
    for seed, own in enumerate(drawn):
        name = f"{seed:06d}.png"
        assert (free[name] == fixed[name]) == (own == 1)


def test_class_folders_sort_by_class() -> None:
    for label_dim in (3, 10, 11, 1000):
        names = [class_folder(index, label_dim) for index in range(label_dim)]
        assert names == sorted(names) and [int(name) for name in names] == list(range(label_dim))
    assert class_folder(7, 10) == "7"


@pytest.mark.parametrize(("network", "mode"), [("gray", "L"), ("cond", "RGB"), ("uncond", "RGB")])
def test_png_form(networks: dict[str, Path], tmp_path: Path, network: str, mode: str) -> None:
    generate(networks[network], tmp_path, "--seeds=1000,7", "--subdirs")
    images = [Image.open(tmp_path / name) for name in ("001000/001000.png", "000000/000007.png")]
    assert all(image.mode == mode and image.size == (8, 8) for image in images)
    assert np.asarray(images[0]).std() > 5


@pytest.mark.parametrize("flags", [
    ("--sampler=dpmpp-2m",), ("--sampler=deis-2",), ("--sampler=deis-3",), ("--solver=euler", "--disc=vp"),
    ("--disc=iddpm", "--schedule=vp", "--scaling=vp"), ("--steps=1",), ("--guidance=2",), ("--precision=bf16",),
    ("--sigma_max=20", "--sigma_min=0.01", "--rho=3"), ("--S_churn=30", "--S_noise=1.01"), ("--strict",),
])
def test_every_choice_reaches_the_images(networks: dict[str, Path], tmp_path: Path, flags: tuple[str, ...]) -> None:
    plain = generate(networks["cond"], tmp_path / "plain", "--seeds=0-3")
    other = generate(networks["cond"], tmp_path / "other", "--seeds=0-3", *flags)
    if flags == ("--strict",):  # another memory layout, another last bit
        for name, content in other.items():
            assert np.abs(decode(content) - decode(plain[name])).max() <= 1
    else:
        assert len(other) == 4 and plain != other


@pytest.mark.slow
def test_compiled_network_makes_the_same_images(networks: dict[str, Path], tmp_path: Path) -> None:
    plain = generate(networks["cond"], tmp_path / "plain", "--seeds=0-3")
    for name, content in generate(networks["cond"], tmp_path / "compiled", "--seeds=0-3", "--compile").items():
        assert np.abs(decode(content) - decode(plain[name])).max() <= 1


def decode(content: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_noise_levels_are_rounded_for_iddpm(networks: dict[str, Path]) -> None:
    net = load_network(networks["iddpm"])
    levels: list[float] = []
    net.register_forward_pre_hook(lambda module, inputs: levels.append(float(inputs[1])))
    SeedSampler(net, num_steps=6).images([0, 1])
    distance = (torch.tensor(levels)[:, None] - net.u).abs().min(1).values
    assert len(levels) == 11 and distance.max() == 0


def test_guide_networks(networks: dict[str, Path], tmp_path: Path) -> None:
    def guided(guide: str, scale: int) -> dict[str, bytes]:
        return generate(networks["cond"], tmp_path / f"{guide}{scale}", "--seeds=0-3", f"--guidance={scale}",
                        f"--guide-network={networks[guide]}")

    plain = generate(networks["cond"], tmp_path / "plain", "--seeds=0-3")
    assert guided("small", 1) == plain
    assert guided("small", 3) != plain != guided("uncond", 3)
    assert guided("cond", 2).keys() == plain.keys()
    for name, content in guided("cond", 3).items():  # its own guide: w D - (w - 1) D
        assert np.abs(decode(content) - decode(plain[name])).max() <= 1


def test_images_of_a_snapshot_in_memory_are_those_of_the_files(networks: dict[str, Path], tmp_path: Path) -> None:
    files = generate(networks["cond"], tmp_path, "--seeds=0-19")
    images = SeedSampler(load_network(networks["cond"]), num_steps=4).images(range(20))
    assert images.dtype == torch.uint8
    for seed in range(20):
        assert np.array_equal(decode(files[f"{seed:06d}.png"]), images[seed].permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- the same command again

def test_killed_and_repeated_gives_the_same_bytes(networks: dict[str, Path], tmp_path: Path) -> None:
    flags = [f"--network={networks['cond']}", "--device=cpu", "--steps=30", "--seeds=0-63", "--batch=16"]
    outdir = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, str(ROOT / "EDM/generate.py"), f"--outdir={outdir}", *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and len(list(outdir.glob("*.png"))) < 16:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    kept = {path.name: path.stat().st_mtime_ns for path in outdir.glob("*.png")}
    assert 0 < len(kept) < 64
    (outdir / ".000001.png.999999.tmp").write_bytes(b"left by the kill")
    next(iter(outdir.glob("*.png"))).unlink()

    main([f"--outdir={outdir}", *flags])
    main([f"--outdir={tmp_path / 'whole'}", *flags])
    assert pngs(outdir) == pngs(tmp_path / "whole") and len(pngs(outdir)) == 64
    assert {path.name for path in outdir.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    unchanged = sum(mtime == (outdir / name).stat().st_mtime_ns for name, mtime in kept.items())
    assert unchanged == len(kept) - 1


def test_images_of_other_settings_are_not_mixed(networks: dict[str, Path], tmp_path: Path) -> None:
    before = generate(networks["cond"], tmp_path, "--seeds=0-3")
    with pytest.raises(UserError, match="num_steps 4 there, 5 here"):
        generate(networks["cond"], tmp_path, "--seeds=0-3", "--steps=5")
    with pytest.raises(UserError, match="network"):
        generate(networks["small"], tmp_path, "--seeds=4-5")
    with pytest.raises(UserError, match="class"):
        generate(networks["cond"], tmp_path, "--seeds=0-3", "--class=1")
    with pytest.raises(UserError, match="000002.png.*--overwrite does not replace"):
        generate(networks["cond"], tmp_path, "--seeds=0-1", "--steps=5", "--overwrite")
    assert pngs(tmp_path) == before
    more = generate(networks["cond"], tmp_path, "--seeds=0-5")
    assert len(more) == 6 and before.items() <= more.items()
    replaced = generate(networks["cond"], tmp_path, "--seeds=0-5", "--steps=5", "--overwrite")
    assert all(replaced[name] != more[name] for name in more)
    assert json.loads((tmp_path / "generate.json").read_text())["num_steps"] == 5


def test_images_of_unknown_origin_stay(networks: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "000001.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="unknown origin"):
        generate(networks["cond"], tmp_path, "--seeds=0-3")
    assert [path.name for path in tmp_path.iterdir()] == ["000001.png"]
    assert len(generate(networks["cond"], tmp_path, "--seeds=4-5")) == 3
    assert (tmp_path / "000001.png").read_bytes() == b"mine"


# ---------------------------------------------------------------- archives and contact sheets

@pytest.mark.parametrize("suffix", ["zip", "npz"])
def test_archive_holds_the_same_images_and_their_classes(networks: dict[str, Path], tmp_path: Path, suffix: str,
                                                        capsys: pytest.CaptureFixture) -> None:
    folder = generate(networks["cond"], tmp_path / "folder", "--seeds=0-6")
    archive = tmp_path / f"samples.{suffix}"
    generate(networks["cond"], archive, "--seeds=0-6")
    content = read_images(archive)
    drawn = SeedSampler(load_network(networks["cond"])).classes(range(7))
    assert content.labels.tolist() == drawn
    for seed in range(7):
        assert np.array_equal(content.images[seed].transpose(1, 2, 0), decode(folder[f"{seed:06d}.png"]))
    assert not Path(f"{archive}.parts").exists()

    before = archive.read_bytes()
    generate(networks["cond"], archive, "--seeds=0-6")
    assert f"complete: {archive}" in capsys.readouterr().out and archive.read_bytes() == before
    with pytest.raises(UserError, match="seeds"):
        generate(networks["cond"], archive, "--seeds=0-7")
    generate(networks["cond"], archive, "--seeds=0-7", "--overwrite")
    assert len(read_images(archive)) == 8


def test_contact_sheet(networks: dict[str, Path], tmp_path: Path) -> None:
    generate(networks["cond"], tmp_path / "a", "--seeds=0-4", "--classes=all", f"--grid={tmp_path / 'classes.png'}")
    generate(networks["uncond"], tmp_path / "b", "--seeds=0-10", f"--grid={tmp_path / 'square.png'}")
    for name in ("classes.png", "square.png"):
        assert min(Image.open(tmp_path / name).size) > 50


# ---------------------------------------------------------------- mistakes end in one line

MISTAKES = {
    "unknown class": ("cond", ["--class=3"], "classes 0 to 2"),
    "class of an unconditional network": ("uncond", ["--class=0"], "not class-conditional"),
    "classes of an unconditional network": ("uncond", ["--classes=all"], "not class-conditional"),
    "class list": ("cond", ["--classes=0,x"], "neither all nor a list"),
    "class outside the list": ("cond", ["--classes=0,5"], "--classes=5"),
    "two ways to say class": ("cond", ["--class=0", "--classes=all"], "--class and --classes"),
    "empty seeds": ("cond", ["--seeds=3-1"], "'--seeds': '3-1' is empty"),
    "seed grammar": ("cond", ["--seeds=1,,2"], "'--seeds': '1,,2' is not a list"),
    "ablation of another sampler": ("cond", ["--sampler=deis-2", "--disc=vp"], "--disc belongs"),
    "churn of another sampler": ("cond", ["--sampler=deis-2", "--S_churn=3"], "--S_churn needs"),
    "guide without scale": ("cond", ["--guide-network=x.pkl"], "needs --guidance"),
    "guidance without classes": ("uncond", ["--guidance=2"], "class-conditional"),
    "guide of another size": ("cond", ["--guidance=2", "--guide-network=gray"], "does not fit"),
    "strict and fast": ("cond", ["--strict", "--precision=bf16"], "--strict"),
    "no levels left": ("cond", ["--sigma_min=5", "--sigma_max=1"], "no noise levels left"),
    "unknown solver": ("cond", ["--solver=rk4"], "rk4"),
    "steps": ("cond", ["--steps=0"], "--steps"),
    "four channels": ("latent", [], "4 channels"),
    "not finite": ("nan", [], "not finite"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(networks: dict[str, Path], tmp_path: Path, name: str) -> None:
    network, flags, expected = MISTAKES[name]
    flags = [flag.replace("=gray", f"={networks['gray']}") for flag in flags]
    with pytest.raises(UserError) as error:
        generate(networks[network], tmp_path / "out", "--seeds=0", *flags)
    message = str(error.value)
    assert expected in message and "\n" not in message
    assert not list((tmp_path / "out").rglob("*.png"))
    assert name == "not finite" or not (tmp_path / "out").exists()


def test_repeated_seeds_are_made_once(networks: dict[str, Path], tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(generate(networks["cond"], tmp_path, "--seeds=0,0,1-1")) == 2
    assert any("more than once" in str(warning.message) for warning in caught)


def test_exit_status_and_folder_that_cannot_be_written(networks: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run(f"--network={networks['cond']}", f"--outdir={tmp_path / 'file'}", "--seeds=0", "--device=cpu")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run("--network=absent.pkl", f"--outdir={tmp_path / 'x'}")
    assert done.returncode == 2 and done.stderr == "error: absent.pkl: no such file\n"


@pytest.mark.parametrize("arguments", [["3", "out", "net.pkl"], ["x", "out", "net.pkl", "1"],
                                       ["3", "out", "net.pkl", "0"]])
def test_generate_sh_usage(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(ROOT / "EDM/generate.sh"), *arguments], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: usage") and done.stderr.count("\n") == 1
