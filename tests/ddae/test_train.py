"""Pre-training: exact continuation, any number of processes, the files it leaves, mistakes of the user."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from DDAE.ddae.checkpoints import load_model
from DDAE.ddae.config import make_network, read_config
from DDAE.ddae.model import UNet
from shared.cli import UserError
from tests.ddae.tiny import DDPM, STEPS, TINY, checkpoint, killed, model, train_in, write_config
from tests.shared.programs import assert_same, one_line_error, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder)
    train_in(folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "out" / "stats.jsonl").read_text().splitlines()]


def prediction(state: dict[str, torch.Tensor], **changes: int) -> torch.Tensor:
    """Return what a network of these weights says. The weights themselves say less: some have no gradient but rounding,
    of which Adam makes steps of full size (the bias of keys, a bias ahead of a normalisation of its channel)."""
    net = UNet(**{**TINY["network"], **changes}).eval()
    net.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return net(torch.randn(4, 1, 8, 8, generator=generator), torch.linspace(-1, 1, 4))


def test_leaves_the_published_files(whole: Path) -> None:
    out = whole / "out"
    assert {path.name for path in (out / "ckpts").iterdir()} == {"model_0.pth", "model_2.pth"}
    assert {path.name for path in (out / "visual").iterdir()} == {"image_ep0_ema.png", "image_ep2_ema.png"}
    result = json.loads((out / "result.json").read_text())
    assert (result["iterations"], result["epochs"], result["precision"]) == (STEPS, 3.0, "fp32")
    assert "epoch 1, lr 0.001" in (out / "log.txt").read_text()
    net, _ = load_model(read_config(whole / "tiny.yaml", [f"save_dir={out}"]), -1)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("when", [{"at": 4}, {"in_preview": True}])
def test_killed_and_continued_is_bitwise_the_same(whole: Path, tmp_path: Path, when: dict) -> None:
    write_config(tmp_path)
    killed(tmp_path, "DDAE.train", "--config=tiny.yaml", "--device=cpu", "--checkpoint_seconds=1e-6", **when)
    train_in(tmp_path, "--checkpoint_seconds=1e-6")
    assert_same(checkpoint(tmp_path), checkpoint(whole))
    assert_same(model(tmp_path, 2), model(whole, 2))
    shown = [(f / "out" / "visual" / "image_ep0_ema.png").read_bytes() for f in (tmp_path, whole)]
    assert shown[0] == shown[1]


def test_a_run_ended_early_goes_on(whole: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    train_in(tmp_path, "--steps=4")
    assert checkpoint(tmp_path)["step"] == 4
    train_in(tmp_path, "--set=n_epoch=2")
    train_in(tmp_path)
    assert_same(checkpoint(tmp_path)["net"], checkpoint(whole)["net"])


def test_two_processes_do_what_one_does(whole: Path, tmp_path: Path) -> None:
    wide = {**TINY["network"], "n_channels": 64}  # from this width on, weights lie in channels_last order
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, batch_size=20, network=wide, n_epoch=2)
        flags = ["--config=tiny.yaml", "--gpus=2", "--log_every=1"]
        if ranks == 1:
            train_in(tmp_path / name, "--gpus=2", "--log_every=1")
        else:
            run("DDAE/train.py", *flags, "--device=cpu", cwd=tmp_path / name, ranks=2)
    # Two passes of half the batch are also one of the whole, with the rate of two processes.
    (tmp_path / "whole").mkdir()
    write_config(tmp_path / "whole", lrate=2.0e-3, network=wide, n_epoch=2)
    train_in(tmp_path / "whole", "--log_every=1")
    for other in ("two", "whole"):
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
        for entry in ("net", "ema"):
            ones, others = (prediction(checkpoint(tmp_path / name)[entry], n_channels=64) for name in ("one", other))
            assert (ones - others).abs().max() < 1e-3 * ones.std()


def test_continues_from_the_epoch_that_the_config_names(whole: Path, tmp_path: Path) -> None:
    write_config(tmp_path, load_epoch=0)
    (tmp_path / "out" / "ckpts").mkdir(parents=True)
    shutil.copy(whole / "out" / "ckpts" / "model_0.pth", tmp_path / "out" / "ckpts")
    train_in(tmp_path)
    assert_same(model(tmp_path, 2)["EMA"], model(whole, 2)["EMA"])
    write_config(tmp_path, load_epoch=1)
    with pytest.raises(UserError, match="no checkpoint .*model_1.pth; there are the epochs 0, 2"):
        train_in(tmp_path)


def test_ddpm_adamw_and_half_precision(tmp_path: Path) -> None:
    write_config(tmp_path, **DDPM, n_epoch=1, optim="AdamW", optim_args={"weight_decay": 0.05, "betas": [0.9, 0.99]})
    train_in(tmp_path, "--use_amp")
    state = checkpoint(tmp_path)
    group = state["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.05, (0.9, 0.99))
    assert all(tensor.dtype == torch.float32 for tensor in state["net"].values())
    assert json.loads((tmp_path / "out" / "result.json").read_text())["precision"] == "bf16"


def test_the_published_arithmetic_is_the_same_training(whole: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    train_in(tmp_path, "--strict")
    ours, theirs = (prediction(checkpoint(folder)["ema"]) for folder in (whole, tmp_path))
    assert (ours - theirs).abs().max() < 1e-3 * ours.std()


def test_constant_average(tmp_path: Path) -> None:
    write_config(tmp_path)
    train_in(tmp_path, "--constant_ema", "--steps=2")
    fast = checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "out")
    train_in(tmp_path, "--steps=2")
    slow = checkpoint(tmp_path)
    # What a run of a few steps has learned can be sampled and probed.
    assert model(tmp_path, 0)["EMA"]["step"] == 2
    # After two updates the published average has moved with 1 - 2^(-2/3) = 0.37, the constant one with 0.9.
    name = "final.weight"
    assert torch.equal(fast["net"][name], slow["net"][name])
    first = slow["net"][name] + (slow["ema"][name] - slow["net"][name]) / (1 - 2 ** (-2 / 3))
    torch.testing.assert_close(fast["ema"][name], 0.9 * first + 0.1 * slow["net"][name], atol=1e-6, rtol=1e-4)


def test_self_conditioning_starts_as_the_published_network_and_learns(tmp_path: Path) -> None:
    plain = {key: value for key, value in TINY["network"].items() if key != "augment_dim"}
    torch.manual_seed(0)
    net = UNet(**plain, self_condition="out_2").eval()
    published = UNet(**plain).eval()
    published.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("condition.")})
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9])
    assert torch.equal(net(x, t), published(x, t))
    net.condition.lin2.weight.data.normal_()
    out, blocks = net(x, t, ret_activation=True)
    _, before = published(x, t, ret_activation=True)
    assert torch.equal(blocks["out_2"], before["out_2"]) and not torch.equal(blocks["out_3"], before["out_3"])
    write_config(tmp_path, network={**TINY["network"], "self_condition": "out_2"}, n_epoch=1)
    train_in(tmp_path)
    assert float(checkpoint(tmp_path)["net"]["condition.lin2.weight"].abs().max()) > 0


@pytest.mark.parametrize("changes, message", [
    ({"n_epochs": 5}, 'unknown key "n_epochs" .did you mean "n_epoch"'),
    ({"diffusion": {"sigma_dat": 0.5}}, 'unknown key "diffusion.sigma_dat" .did you mean "diffusion.sigma_data"'),
    ({"network": {**TINY["network"], "n_block": 1}}, 'unknown key "network.n_block" .did you mean "network.n_blocks"'),
    ({"network": {**TINY["network"], "n_channels": 40}}, "n_channels: expected a multiple of 32, got 40"),
    ({"network": {**TINY["network"], "self_condition": "out_9"}}, "no block 'out_9'.* it has out_1, out_2,"),
    ({"network": {**TINY["network"], "image_shape": [3, 32, 32]}}, "of 1 x 8 x 8, .* image_shape is 3 x 32 x 32"),
    ({"linear": {**TINY["linear"], "blockname": "out_7"}}, "linear.blockname: .*no block 'out_7'.*; it has out_1,"),
    ({"linear": {**TINY["linear"], "epochs": 1}}, 'unknown key "linear.epochs"'),
    ({"model_type": "edm"}, "model_type: 'edm' is not one of 'DDPM', 'EDM'"),
    ({"optim": "SGD"}, "optim: 'SGD' is not one of 'AdamW'"),
    ({"optim": "AdamW", "optim_args": {"momentum": 1}}, 'unknown key "optim_args.momentum"'),
    ({"batch_size": "many"}, "batch_size: 'many' is not a valid integer"),
    ({"lrate": -1.0}, "lrate: -1.0 is not in the range x>0"),
    ({"lrate": ".nan"}, "lrate: '.nan' is not a valid float"),
    ({"diffusion": {"sigma_max": float("inf")}}, "diffusion.sigma_max: inf is not a finite number"),
    ({"diffusion": {"augment_prob": 2}}, "diffusion.augment_prob: 2.0 is not in the range 0<=x<=1"),
    ({"network": {**TINY["network"], "dropout": 2}}, "network.dropout: 2.0 is not in the range 0<=x<1"),
    ({"dataset": "cifra"}, "dataset 'cifra': expected"),
    ({"classes": 5}, "10 classes, but the configuration has classes: 5"),
])
def test_a_wrong_config_is_named_and_nothing_is_trained(tmp_path: Path, changes: dict, message: str) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        train_in(tmp_path)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_another_config_does_not_continue_a_run(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "out", tmp_path / "out")
    write_config(tmp_path, lrate=5.0e-4)
    with pytest.raises(UserError, match="holds a run with other settings .lrate was 0.001, is 0.0005"):
        train_in(tmp_path)
    wider = {**TINY["network"], "n_blocks": 2}
    write_config(tmp_path, network=wider)
    with pytest.raises(UserError, match="made with another config than .*network.n_blocks is 1 there and 2 here"):
        load_model(read_config(tmp_path / "tiny.yaml", [f"save_dir={tmp_path / 'out'}"]), 0)
    content = model(whole, 0)
    del content["config"]  # a published file does not say what it was made with
    torch.save(content, tmp_path / "out" / "ckpts" / "model_0.pth")
    with pytest.raises(UserError, match="checkpoint of another network, it lacks .* give the config"):
        load_model(read_config(tmp_path / "tiny.yaml", [f"save_dir={tmp_path / 'out'}"]), 0)
    (tmp_path / "out" / "ckpts" / "model_0.pth").write_bytes(b"PK\3\4 not a checkpoint")
    with pytest.raises(UserError, match="cut short or damaged"):
        load_model(read_config(tmp_path / "tiny.yaml", [f"save_dir={tmp_path / 'out'}"]), 0)


def test_mistakes_on_the_command_line_end_in_one_line(tmp_path: Path) -> None:
    for flags, message in ((["--confg=x"], "unknown argument --confg=x (did you mean"),
                           (["--config=EDM_ddpm.yml"], "no such file (did you mean"),
                           ([], "Missing option '--config'")):
        result = run("DDAE/train.py", *flags, cwd=tmp_path, status=2)
        assert message in one_line_error(result)
    write_config(tmp_path)
    for flags in (["--gpus=0"], ["--strict", "--use_amp"], ["--precision=fp16"], ["--set=n_epoch"],
                  ["--set=network.dropout=nan"]):
        with pytest.raises(UserError):
            train_in(tmp_path, *flags)


@pytest.mark.parametrize("spelling", ["--local_rank=0", "--local-rank=0"])
def test_both_spellings_of_the_launchers_flag(tmp_path: Path, spelling: str) -> None:
    write_config(tmp_path)
    train_in(tmp_path, spelling, "--steps=1")
    assert checkpoint(tmp_path)["step"] == 1


def test_published_configs() -> None:
    parameters = {"DDPM_ddpm": 35_746_307, "EDM_ddpm": 35_746_307, "DDPM_ddpmpp": 56_524_291, "EDM_ddpmpp": 56_524_291,
                  "EDM_ddpmpp_aug": 56_525_443, "DDPM_tiny_adm": 281_400_003, "EDM_tiny": 62_513_667}
    folder = Path(__file__).parents[2] / "DDAE" / "config"
    for path in folder.glob("*.yaml"):
        config = read_config(path)
        with torch.device("meta"):
            net = make_network(config)
        if path.stem in parameters:
            assert sum(p.numel() for p in net.parameters()) == parameters[path.stem]
        assert config.save_dir == f"./output_{path.stem}" and config.probe().blockname in net.block_names
    assert set(parameters) <= {path.stem for path in folder.glob("*.yaml")}
    assert yaml.safe_load((folder / "EDM_ddpmpp_aug.yaml").read_text())["n_epoch"] == 4000
