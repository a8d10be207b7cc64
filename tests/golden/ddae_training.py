"""The average's decay and the whole training: losses, rates, norms, weights, files, exact continuation."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from DDAE.ddae.checkpoints import AVERAGED, ONLINE, load_model
from DDAE.ddae.config import make_config, make_network
from DDAE.ddae.data import Batch
from DDAE.ddae.training import Draws, average_decay, train
from shared.distributed import World
from shared.training.ema import EMA
from tests.golden.cases import each, fill, serves
from tests.golden.ddae_compare import assert_close, cases_of, stated, tensors

DECAYS, AVERAGES, TRAIN = cases_of("decay"), cases_of("average"), cases_of("training")
SERVES = serves(DECAYS, AVERAGES, TRAIN)


@each(DECAYS)
def test_decay(case: dict[str, Any]) -> None:
    stored = tensors(case)
    for beta in case["constructor"]["betas"]:
        ours = [average_decay(int(k), beta) for k in stored["k"]]
        assert_close(ours, stored[f"decay_beta{beta}_f64"], case["tolerance"])


@each(AVERAGES)
def test_average(case: dict[str, Any]) -> None:
    stored, beta = tensors(case), case["constructor"]["beta"]
    net = torch.nn.Linear(*stored["online"].shape[:0:-1], bias=False)
    ema = EMA(net, buffers="keep")
    for update, (online, averaged) in enumerate(zip(stored["online"], stored["averaged"], strict=True), start=1):
        net.weight.data.copy_(online)
        ema.update(net, average_decay(update, beta))
        assert_close(ema.module.weight, averaged, case["tolerance"])


class FixedBatches:
    """The same batches in order in every epoch."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.per_epoch = images, len(images)

    def __call__(self, step: int) -> Batch:
        images = self.images[step % self.per_epoch]
        count = len(images)
        return Batch(images, torch.zeros(count, dtype=torch.int64), np.arange(count), slice(0, count), count)


def run_training(case: dict[str, Any], folder: Path, load_epoch: int = -1) -> list[dict[str, float]]:
    """Train from fill() weights on the stored numbers in `folder`; return the lines of stats.jsonl."""
    stored, made = tensors(case), dict(case["constructor"])
    gpus = made.pop("world_size_multiplier", 1)
    config = make_config({**made, "save_dir": str(folder), "load_epoch": load_epoch}, case["id"])
    levels = stored["t_or_rnd"].flatten(1)

    def draw(diffusion: Any, batch: Batch, seed: int, step: int) -> Draws:
        return Draws(levels[step], stored["noise"][step])

    train(config, fill(make_network(config)), FixedBatches(stored["X"]), World(), draw=draw, gpus=gpus, log_every=1)
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Return a function that gives the folder of a case's whole training, which is done once."""
    folders: dict[str, Path] = {}

    def of(case: dict[str, Any]) -> Path:
        if case["id"] not in folders:
            folders[case["id"]] = tmp_path_factory.mktemp(case["id"]) / "out"
            run_training(case, folders[case["id"]])
        return folders[case["id"]]
    return of


@each(TRAIN)
def test_training(case: dict[str, Any], trainings: Callable[[dict[str, Any]], Path]) -> None:
    out = trainings(case)
    stored, notes, tolerance = tensors(case), case["notes"], case["tolerance"]
    weights = stated(tolerance, "weights")
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert_close([line["loss"] for line in lines], stored["losses"], stated(tolerance, "losses"))
    assert_close([line["lr"] for line in lines], stored["lrs_f64"], "relative 1e-6")
    assert_close([line["gradient_norm"] for line in lines], stored["grad_norms_before_clip"],
                 stated(tolerance, "gradient"))
    for file in notes["files_written"]:
        assert (out / file).is_file()
    with Image.open(out / notes["files_written"][-1]) as sheet:
        assert [*np.asarray(sheet).shape] == notes["last_preview_png_shape"]

    last = max(int(Path(file).stem.split("_")[1]) for file in notes["files_written"] if file.endswith(".pth"))
    content = torch.load(out / "ckpts" / f"model_{last}.pth", weights_only=True)
    assert list(content)[:3] == notes["checkpoint"]["top_level_keys"]
    online, averaged = content["MODEL"], content["EMA"]
    assert list(online) == notes["norm_order"]
    assert list(online)[:4] == notes["checkpoint"]["MODEL_keys_example"]
    assert list(averaged)[:2] == notes["checkpoint"]["EMA_keys_first"][:2]
    assert int(averaged["step"]) == int(stored["ema_step"])
    average = [averaged[name.replace(ONLINE, AVERAGED)] for name in notes["norm_order"]]
    assert_close([float(tensor.norm()) for tensor in online.values()], stored["model_norms"], weights)
    assert_close([float(tensor.sum()) for tensor in online.values()], stored["model_sums"], stated(tolerance, "sums"))
    assert_close([float(tensor.norm()) for tensor in average], stored["ema_norms"], weights)
    for key, prefix, tensors_of in (("model", ONLINE, online), ("ema", AVERAGED, averaged)):
        for name, tensor in tensors_of.items():
            flat = f"{key}_{name.removeprefix(prefix).replace('.', '_')}"
            if flat in stored and name.startswith(prefix):
                assert_close(tensor, stored[flat], weights, name)
    group = content["opt"]["param_groups"][0]
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        expected = notes["checkpoint"]["opt_group"][name]
        assert (list(group[name]) if name == "betas" else group[name]) == pytest.approx(expected)
    for name, (shape, dtype) in notes["checkpoint"]["opt_state0"].items():
        moment = content["opt"]["state"][0][name]
        assert ([*moment.shape], str(moment.dtype)) == (shape, dtype)


@each(TRAIN)
def test_continuing_from_an_epoch_is_exact(case: dict[str, Any], trainings: Callable[[dict[str, Any]], Path],
                                           tmp_path: Path) -> None:
    stored, whole_run = tensors(case), trainings(case)
    seen = len(stored["losses"]) - len(stored["resumed_losses"])  # steps before the epoch from which it goes on
    first = whole_run / "ckpts" / f"model_{seen // len(stored['X']) - 1}.pth"
    (tmp_path / "part" / "ckpts").mkdir(parents=True)
    shutil.copy(first, tmp_path / "part" / "ckpts")
    lines = run_training(case, tmp_path / "part", load_epoch=int(first.stem.split("_")[1]))
    assert_close([line["loss"] for line in lines], stored["resumed_losses"],
                 stated(case["tolerance"], "losses"))
    last = max((whole_run / "ckpts").glob("*.pth"), key=lambda path: int(path.stem.split("_")[1])).name
    whole, part = (torch.load(out / "ckpts" / last, weights_only=True) for out in (whole_run, tmp_path / "part"))
    for entry in ("MODEL", "EMA"):
        assert all(torch.equal(whole[entry][name], part[entry][name]) for name in whole[entry])


def published_form(content: dict[str, Any], one_element: bool) -> dict[str, Any]:
    """Return a checkpoint as the published code writes it; `one_element`: counters as an older library stored them."""
    shape = [1] if one_element else []
    ema = {"initted": content["EMA"]["initted"].reshape(shape), "step": content["EMA"]["step"].reshape(shape)}
    ema.update({name.replace(ONLINE, "online_model.nn_model."): value for name, value in content["MODEL"].items()})
    ema.update({name: value for name, value in content["EMA"].items() if name.startswith(AVERAGED)})
    return {"MODEL": content["MODEL"], "EMA": ema, "opt": content["opt"]}


@pytest.mark.parametrize("one_element", [False, True])
@each(TRAIN)
def test_published_checkpoints_load(case: dict[str, Any], one_element: bool, tmp_path: Path,
                                    trainings: Callable[[dict[str, Any]], Path]) -> None:
    last = max((trainings(case) / "ckpts").glob("*.pth"), key=lambda path: int(path.stem.split("_")[1]))
    content = torch.load(last, weights_only=True)
    path = tmp_path / "out" / "ckpts" / last.name
    path.parent.mkdir(parents=True)
    expected = SimpleNamespace(prefixes=case["notes"]["checkpoint"]["EMA_key_prefixes"])
    published = published_form(content, one_element)
    assert sorted({name.split(".")[0] for name in published["EMA"]}) == expected.prefixes
    torch.save(published, path)
    made = {key: value for key, value in case["constructor"].items() if key != "world_size_multiplier"}
    net, _ = load_model(make_config({**made, "save_dir": str(tmp_path / "out")}, case["id"]))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, content["EMA"][AVERAGED + name])
