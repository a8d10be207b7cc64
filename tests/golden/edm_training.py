"""The training loop: data order, schedules, ticks, weights after a few steps with given draws, the files of a run."""
import re

import numpy as np
import pytest
import torch

from EDM.train import main
from EDM.training.dataset import Batches, InfiniteOrder, TrainingSet
from EDM.training.loss import EDMLoss
from EDM.training.networks import PRECONDITIONERS, EDMPrecond
from EDM.training.stats import TickSchedule, format_time
from EDM.training.training_loop import Draws, forward_backward, learning_rate, update
from shared.distributed import World
from shared.training.ema import EMA, half_life_beta
from tests.edm.published_form import write_published, write_published_state
from tests.edm.training_runs import stats, write_set
from tests.golden.cases import arrays, facts, fill, index

MISC = [case for case in index("edm")["cases"] if case["case"] == "misc"]
LOOPS = [case for case in index("edm")["cases"] if case["kind"] == "training loop"]
BOOKKEEPING = [case for case in index("edm")["cases"] if case["kind"] == "training loop bookkeeping"]
CASES = {case["case"] for case in [*MISC, *LOOPS, *BOOKKEEPING]}


def misc(key):
    return [pytest.param(entry, id=f"{key}-{number}") for case in MISC
            for number, entry in enumerate(_entries(facts("edm", case["file"])[key]))]


def _entries(value):
    return list(value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize("expected", misc("infinite_sampler"))
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_data_order(expected, step):
    """Read in pieces of `step`, and again by an order resumed halfway, the positions of a rank hold its images."""
    count = len(expected["first_50"]) * expected["replicas"]
    order = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    pieces = [order.take(start, min(step, count - start)) for start in range(0, count, step)]
    mine = np.concatenate(pieces)[expected["rank"]::expected["replicas"]]
    assert mine.tolist() == expected["first_50"]
    half = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    half.take(0, count // 2)
    resumed = InfiniteOrder(expected["size"], expected["seed"], expected["window"])
    resumed.load_state_dict(half.state_dict())
    assert resumed.take(count // 2, count - count // 2).tolist() == np.concatenate(pieces)[count // 2:].tolist()


@pytest.mark.parametrize("row", misc("schedule"))
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


@pytest.mark.parametrize("case", MISC, ids=lambda case: case["case"])
def test_tick_walks(case):
    walks = {name: walk for name, walk in facts("edm", case["file"]).items() if name.startswith("tick_walk")}
    assert walks
    for walk in walks.values():
        schedule = schedule_of(walk["config"])
        rows = rows_of(schedule, range(schedule.steps))
        if "rows" in walk:
            assert rows == walk["rows"]
            continue
        assert len(rows) == walk["ticks"]
        assert rows[:len(walk["first"])] == walk["first"] and rows[-1] == walk["last"]
        for key, names in (("snapshot", walk["snapshots"]), ("dump", walk["dumps"])):
            assert [row[key] for row in rows if row[key]][:len(names)] == names


@pytest.mark.parametrize("seconds_and_text", misc("format_time"))
def test_elapsed_time(seconds_and_text):
    seconds, text = seconds_and_text
    assert format_time(float(seconds)) == text


@pytest.mark.parametrize("case", LOOPS, ids=lambda case: case["case"])
def test_weights_after_some_steps(case):
    """The network, loss and data order of the loop, with the given noise: the same batches, losses and weights."""
    config, data = case["config"], arrays("edm", case["file"])
    size, rounds = config["batch_size"], case["rounds_per_step"]
    network = dict(case["network"])
    net = fill(PRECONDITIONERS[network.pop("preconditioner")](**network)).train()
    loss_fn, ema = EDMLoss(), EMA(net, buffers="keep")
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
        assert means == pytest.approx(expected, rel=1e-5)
        lr = learning_rate(nimg, config["lr"], config["lr_rampup_kimg"], total_kimg=1)
        beta = half_life_beta(size, config["ema_halflife_kimg"] * 1000, nimg, config["ema_rampup_ratio"])
        sums, _ = forward_backward(net, loss_fn, None, batch, draws, rounds, config["loss_scaling"])
        update(net, optimizer, lr)
        ema.update(net, beta)
        assert float(sums[0]) / losses.numel() == pytest.approx(expected.mean(), rel=1e-5)
    assert lr == case["final_lr"]
    for kind, module in (("net/", net), ("ema/", ema.module)):
        expected = {name.removeprefix(kind): value for name, value in data.items() if name.startswith(kind)}
        assert expected
        for name, value in expected.items():
            if not name.endswith("qkv.bias"):  # its key part has no gradient, and Adam blows up the rounding noise
                assert np.abs(module.state_dict()[name].numpy() - value).max() <= 2e-5, kind + name


TINY = ("--cbase=8", "--cres=1", "--num-blocks=1", "--attn-resolutions=4")
TINY_NETWORK = dict(img_resolution=8, img_channels=3, model_type="SongUNet", model_channels=8, channel_mult=[1],
                    num_blocks=1, attn_resolutions=[4], augment_dim=9, dropout=0.13)


def former_run(folder, kimg):
    """Write the training state and the snapshot of a run that has seen `kimg` thousand images; return the state."""
    folder.mkdir()
    state = folder / f"training-state-{kimg:06d}.pt"
    net = EDMPrecond(**TINY_NETWORK)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 8, 8), torch.ones(1)).sum().backward()
    optimizer.step()
    write_published(folder / f"network-snapshot-{kimg:06d}.pkl", net, TINY_NETWORK)
    write_published_state(state, net, TINY_NETWORK, optimizer.state_dict())
    return state


@pytest.mark.parametrize("case", BOOKKEEPING, ids=lambda case: case["case"])
def test_files_and_lines_of_a_run(case, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))
    expected = facts("edm", case["file"])
    config = expected["config"]
    data = write_set(tmp_path / "set.zip", count=30, size=8, channels=3)
    resume = [f"--resume={former_run(tmp_path / 'former', start_kimg(config))}"] if start_kimg(config) else []
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
