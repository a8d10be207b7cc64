"""The training loop: data order, schedules, ticks, weights after a few steps with given draws, the files of a run."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from EDM.train import main
from EDM.training.dataset import Batches, InfiniteOrder, TrainingSet
from EDM.training.loss import LOSSES
from EDM.training.networks import PRECONDITIONERS, EDMPrecond
from EDM.training.stats import TickSchedule, format_time
from EDM.training.training_loop import Draws, forward_backward, learning_rate, update
from shared.distributed import World
from shared.training.ema import EMA, half_life_beta
from tests.edm.published_form import write_published, write_published_state
from tests.edm.training_runs import stats, write_set
from tests.golden.cases import arrays, each, facts, fill, number, numbers, serves
from tests.golden.edm_cases import PAPER, cases, json_facts, whole_facts

MISC, LOOPS = cases(kind="json facts"), cases(kind="training loop")
BOOKKEEPING = cases(kind="training loop bookkeeping")
SERVES = serves(MISC, LOOPS, BOOKKEEPING)
WALKS = [pytest.param(walk, id=name) for name, walk in whole_facts("tick_walk").items()]
# What the JSON facts are about; those of other areas are tested there.
KNOWN = ("batch_split", "download_cache_prefix", "fid", "format_time", "generate_sh", "infinite_sampler",
         "parse_int_list", "schedule", "tick_walk")


def test_every_json_fact_is_known():
    assert [name for name in whole_facts("") if not name.startswith(KNOWN)] == []


@pytest.mark.parametrize("expected", json_facts("infinite_sampler"))
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_data_order(expected, step):
    """Read in pieces of `step`, and again by an order resumed halfway, the positions of a rank hold its images."""
    first = next(value for key, value in expected.items() if key.startswith("first"))
    count = len(first) * expected["replicas"]
    order = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    pieces = [order.take(start, min(step, count - start)) for start in range(0, count, step)]
    mine = np.concatenate(pieces)[expected["rank"]::expected["replicas"]]
    assert mine.tolist() == first
    half = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    half.take(0, count // 2)
    resumed = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    resumed.load_state_dict(half.state_dict())
    assert resumed.take(count // 2, count - count // 2).tolist() == np.concatenate(pieces)[count // 2:].tolist()


@pytest.mark.parametrize("row", json_facts("schedule"))
def test_learning_rate_and_ema(row):
    lr = learning_rate(row["nimg_before_step"], row["base_lr"], row["lr_rampup_kimg"], total_kimg=200000)
    beta = half_life_beta(row["batch"], row["ema_halflife_kimg"] * 1000, row["nimg_before_step"],
                          row["ema_rampup_ratio"])
    assert lr == pytest.approx(row["lr"], rel=1e-12)
    assert beta == pytest.approx(row["ema_beta"], rel=1e-12)


def schedule_of(config):
    return TickSchedule(config["batch"], config["total_kimg"], config["tick"], config["snap"], config["dump"],
                        start_kimg(config) * 1000)


def start_kimg(config):
    """Return the thousand images that a run has seen before its first step."""
    return config.get("start_kimg", config.get("resume_kimg", 0))


def rows_of(schedule, steps):
    return [{"tick": schedule.tick(step), "nimg": schedule.nimg(step + 1), "snapshot": schedule.snapshot(step),
             "dump": schedule.state_dump(step)} for step in steps if schedule.tick(step) is not None]


@pytest.mark.parametrize("walk", WALKS)
def test_tick_walk(walk):
    schedule = schedule_of(walk["config"])
    rows = rows_of(schedule, range(schedule.steps))
    if "rows" in walk:
        assert rows == walk["rows"]
        return
    assert len(rows) == walk["ticks"]
    assert rows[:len(walk["first"])] == walk["first"] and rows[-1] == walk["last"]
    for key, names in (("snapshot", walk["snapshots"]), ("dump", walk["dumps"])):
        assert [row[key] for row in rows if row[key]][:len(names)] == names


@pytest.mark.parametrize(("seconds", "text"), json_facts("format_time"))
def test_elapsed_time(seconds, text):
    assert format_time(float(seconds)) == text


@each(LOOPS)
def test_weights_after_some_steps(case):
    """The network, loss and data order of the loop, with the given noise: the same batches, losses and weights."""
    config, data, said = case["config"], arrays(PAPER, case["file"]), case["tolerance"]
    of_losses, of_weights = number(said, "loss_mean #"), number(said, "weights max abs err #")
    size, rounds = config["batch_size"], case["rounds_per_step"]
    network = dict(case["network"])
    kind = network.pop("preconditioner")
    net = fill(PRECONDITIONERS[kind](**network)).train()
    loss_fn, ema = LOSSES[case.get("loss", kind.replace("Precond", "Loss"))](), EMA(net, buffers="keep")
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True)
    images = np.ascontiguousarray(data["source_pixels"].transpose(0, 3, 1, 2))
    dataset = TrainingSet(images, data["source_labels"], np.arange(len(images)), np.zeros(len(images), bool),
                          network["label_dim"], "source")
    batches = Batches(dataset, InfiniteOrder(len(images), case["seed"]), size, World())
    for step in range(config["steps"]):
        nimg = step * size
        given = {name: torch.from_numpy(data[name][step * rounds:(step + 1) * rounds]).flatten(0, 1)
                 for name in ("images", "labels", "sigma_draw", "noise")}
        batch, draws = batches(nimg), Draws(given["sigma_draw"], given["noise"])
        assert torch.equal(batch.images, given["images"]) and torch.equal(batch.labels, given["labels"])
        with torch.no_grad():
            losses = loss_fn(net, batch.images, batch.labels, None, draws.level, draws.noise)
        means = losses.view(rounds, -1).mean(dim=1).numpy()
        expected = data["loss_mean"][step * rounds:(step + 1) * rounds]
        assert means == pytest.approx(expected, rel=of_losses)
        lr = learning_rate(nimg, config["lr"], config["lr_rampup_kimg"], total_kimg=1)
        beta = half_life_beta(size, config["ema_halflife_kimg"] * 1000, nimg, config["ema_rampup_ratio"])
        sums, _ = forward_backward(net, loss_fn, None, batch, draws, rounds, config["loss_scaling"])
        update(net, optimizer, lr)
        ema.update(net, beta)
        assert float(sums[0]) / losses.numel() == pytest.approx(expected.mean(), rel=of_losses)
    assert lr == case["final_lr"]
    for kind, module in (("net/", net), ("ema/", ema.module)):
        expected = {name.removeprefix(kind): value for name, value in data.items() if name.startswith(kind)}
        for name, value in expected.items():
            if not name.endswith("qkv.bias"):  # its key part has no gradient, and Adam blows up the rounding noise
                assert np.abs(module.state_dict()[name].numpy() - value).max() <= of_weights, kind + name


TINY = ("--cbase=8", "--cres=1", "--num-blocks=1", "--attn-resolutions=4")


def former_run(folder, kimg, size, channels):
    """Write the training state and the snapshot of a run that has seen `kimg` thousand images; return the state."""
    network = dict(img_resolution=size, img_channels=channels, model_type="SongUNet", model_channels=8,
                   channel_mult=[1], num_blocks=1, attn_resolutions=[4], augment_dim=9, dropout=0.13)
    folder.mkdir()
    state = folder / f"training-state-{kimg:06d}.pt"
    net = EDMPrecond(**network)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, channels, size, size), torch.ones(1)).sum().backward()
    optimizer.step()
    write_published(folder / f"network-snapshot-{kimg:06d}.pkl", net, network)
    write_published_state(state, net, network, optimizer.state_dict())
    return state


def image_shape(case):
    """Return side and channels of the images, which the description has as "images 8x8x3"."""
    found = re.search(r"images (\d+x\d+x\d+)", case["description"])
    side, _, channels = numbers(found[1]) if found else (8, 8, 3)
    return side, channels


@each(BOOKKEEPING)
def test_files_and_lines_of_a_run(case, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))
    expected, (size, channels) = facts(PAPER, case["file"]), image_shape(case)
    config = expected["config"]
    data = write_set(tmp_path / "set.zip", count=30, size=size, channels=channels)
    kimg = start_kimg(config)
    resume = [f"--resume={former_run(tmp_path / 'former', kimg, size, channels)}"] if kimg else []
    main([f"--outdir={tmp_path}/run", "--nosubdir", f"--data={data}", "--seed=0", "--device=cpu", *TINY,
               f"--batch={config['batch_size']}",
               f"--tick={config['kimg_per_tick']}", f"--snap={config['snapshot_ticks']}",
               f"--dump={config['state_dump_ticks']}", f"--duration={config['total_kimg'] / 1000}", *resume])
    lines = stats(tmp_path / "run")
    assert all(list(line) == expected["stats_keys"] for line in lines)
    assert all(list(line[key]) == expected["entry_keys"] for line in lines for key in line if key != "timestamp")
    assert [line["Loss/loss"]["num"] for line in lines] == expected["loss_num"]
    assert [line["Progress/tick"]["mean"] for line in lines] == expected["ticks"]
    assert [line["Progress/kimg"]["mean"] for line in lines] == expected["kimg"]
    published = re.compile(r"network-snapshot-\d+\.pkl|training-state-\d+\.pt|stats\.jsonl")
    assert sorted(f.name for f in (tmp_path / "run").iterdir() if published.fullmatch(f.name)) == expected["files"]
    log = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if line.startswith("tick ")]
    assert len(log) == len(expected["status_line_prefixes"])
    assert all(line.startswith(start) for line, start in zip(log, expected["status_line_prefixes"], strict=True))
