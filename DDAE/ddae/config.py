"""The YAML files of config/, every key checked, and the flags that DDAE's scripts have in common."""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet, check_names
from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, nearest, read_value, read_yaml
from shared.training.precision import computes_bf16, has_bf16

CONFIGS = Path(__file__).parents[1] / "config"
DIFFUSIONS = {"DDPM": DDPM, "EDM": EDM}
SECTIONS = ("diffusion", "network", "linear", "optim_args")

# ---------------------------------------------------------------- keys of a configuration

KEYS = (
    Option("dataset", Text, required=True, help="cifar, cifar100, tiny, digits, or images by path"),
    Option("classes", Int(1), required=True, help="classes of the data set"),
    Option("model_type", Choice(*DIFFUSIONS), required=True),
    Option("net_type", Choice("UNet"), required=True),
    Option("n_epoch", Int(1), required=True, help="epochs of training"),
    Option("batch_size", Int(1), required=True, unit="images per process"),
    Option("lrate", Float(0, open=True), required=True, help="learning rate, times the number of processes"),
    Option("warm_epoch", Int(1), required=True, help="epochs over which the learning rate rises"),
    Option("flip", Bool, required=True, help="mirror half of the training images"),
    Option("ema", Float(0, 1, open="high"), required=True, help="largest decay of the average"),
    Option("save_dir", Text, "./output"),
    Option("load_epoch", Int(-1), -1, "checkpoint to go on from; -1: none"),
    Option("n_sample", Int(1), 30, "images in the preview"),
    Option("save_model", Bool, True, "write the checkpoints of epochs"),
    Option("optim", Choice("AdamW"), None, "in place of Adam"),
    Option("optim_args.lr", Float(0, open=True), 1e-3, "replaced by the rate of the epoch"),
    Option("optim_args.betas", Float(0, 1, open="high"), (0.9, 0.999), many=True),
    Option("optim_args.eps", Float(0), 1e-8),
    Option("optim_args.weight_decay", Float(0), 0.01),
    Option("optim_args.amsgrad", Bool, False),
    Option("network.image_shape", Int(1), (3, 32, 32), "channels, height, width", many=True),
    Option("network.n_channels", Int(32), 128, "a multiple of 32"),
    Option("network.ch_mults", Int(1), (1, 2, 2, 2), "width per resolution, times n_channels", many=True),
    Option("network.is_attn", Bool, (False, True, False, False), "attention per resolution", many=True),
    Option("network.attn_channels_per_head", Int(1), None, "default: one head"),
    Option("network.dropout", Float(0, 1, open="high"), 0.1, "probability"),
    Option("network.n_blocks", Int(1), 2, "residual blocks per resolution"),
    Option("network.use_res_for_updown", Bool, False, "resample by residual blocks (DDPM++)"),
    Option("network.augment_dim", Int(0), 0, "length of the augmentation labels"),
    Option("network.self_condition", Text, None, "block whose feature conditions the rest of the decoder (DDAE++)"),
    Option("linear.n_epoch", Int(1), 15, "epochs of the linear probe"),
    Option("linear.batch_size", Int(1), 128, unit="images per process"),
    Option("linear.lrate", Float(0, open=True), 1e-3, "learning rate, times the number of processes"),
    Option("linear.timestep", Int(0), None, "noise level of the features"),
    Option("linear.blockname", Text, None, "decoder block of the features"),
    Option("linear.flip", Bool, True, "mirror half of the training images"),
    Option("linear.pad", Int(0), 4, "black margin of an image before it is cropped", unit="pixels"),
)
DIFFUSION_KEYS = {
    "DDPM": (
        Option("diffusion.betas", Float(0, 1, open=True), required=True, help="first and last variance", many=True),
        Option("diffusion.n_T", Int(2), required=True, help="number of times"),
    ),
    "EDM": (
        Option("diffusion.sigma_data", Float(0, open=True), 0.5, "standard deviation of the images"),
        Option("diffusion.p_mean", Float(), -1.2, "mean of ln sigma in training"),
        Option("diffusion.p_std", Float(0), 1.2, "standard deviation of ln sigma in training"),
        Option("diffusion.sigma_min", Float(0, open=True), 0.002, "lowest noise level of sampling"),
        Option("diffusion.sigma_max", Float(0, open=True), 80.0, "highest noise level of sampling"),
        Option("diffusion.rho", Float(0, open=True), 7.0, "exponent of the schedule"),
        Option("diffusion.S_min", Float(0), 0.01, "lowest noise level at which a stochastic sampler adds noise"),
        Option("diffusion.S_max", Float(0, non_finite=True), 1.0, "highest such level"),
        Option("diffusion.S_noise", Float(0), 1.007, "scale of that noise"),
        Option("diffusion.augment_prob", Float(0, 1), 0.0, "probability of each augmentation"),
    ),
}


class Config(SimpleNamespace):
    """One experiment, as a file of config/ describes it: the keys above as attributes.

    network, diffusion, optim_args: dicts of the keys that are given. linear: all keys of the section. source: the file
    it was read from.
    """

    def probe(self) -> SimpleNamespace:
        """Return the settings of the linear probe; UserError if the file has none."""
        if self.linear.timestep is None or self.linear.blockname is None:
            raise UserError(f"{self.source}: needs a section `linear` with timestep and blockname")
        return self.linear

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values as plain containers."""
        plain = {key: value for key, value in vars(self).items() if key != "source"}
        return {**plain, "linear": dict(vars(self.linear))}


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file; `overrides` KEY=VALUE overrule it, a key of a section being written section.key.

    Raises UserError for a file that is missing or malformed, or a key that is unknown or wrong.
    """
    path = Path(path)
    if not path.exists():
        known = sorted(file.name for file in CONFIGS.glob("*.yaml"))
        raise UserError(f"--config: {path}: no such file{nearest(path.name, known)}; those that come with it, in "
                        f"config/: {', '.join(known)}")
    return make_config(read_yaml(path, "--config"), str(path), overrides)


def make_config(content: Any, source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the checked config of a dictionary; UserError names the key, and `source` or --set."""
    if not isinstance(content, dict):
        raise UserError(f"{source}: must hold one `key: value` per line")
    raw: dict[str, Any] = {}
    for key, value in content.items():
        if key in SECTIONS and isinstance(value, dict):
            raw |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key not in SECTIONS or value is not None:
            raw[str(key)] = value
    origin = dict.fromkeys(raw, source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set: expected KEY=VALUE, got {override!r}")
        try:
            raw[key], origin[key] = yaml.safe_load(text), "--set"
        except yaml.YAMLError:
            raise UserError(f"--set {override}: {text!r} is not a plain YAML value") from None
    return _read(raw, origin, source)


def _read(raw: Mapping[str, Any], origin: Mapping[str, str], source: str) -> Config:
    """Read every key as it is declared; `origin` says where each was given."""
    known = {option.key: option for option in (*KEYS, *DIFFUSION_KEYS.get(raw.get("model_type"), ()))}
    if "model_type" in raw:  # first: the keys of the section diffusion depend on it
        read_value(known["model_type"], raw["model_type"], origin["model_type"])
    for key in raw:
        if key not in known:
            inside = [name for name in known if key.partition(".")[0] == name.partition(".")[0]]
            listed = f"; known are {', '.join(inside)}" if len(inside) > 1 else ""
            raise UserError(f'{origin[key]}: unknown key "{key}"{nearest(key, known)}{listed}')
    values = {key: read_value(known[key], value, origin[key]) for key, value in raw.items()}
    for key, option in known.items():
        if option.required and values.get(key) is None:
            raise UserError(f"{source}: lacks the key {key}")
    complete = {key: values.get(key, option.default) for key, option in known.items()}
    top = {key: value for key, value in complete.items() if "." not in key}
    sections = {section: _section(values, section) for section in SECTIONS}
    return Config(**{**top, **sections, "linear": SimpleNamespace(**_section(complete, "linear"))}, source=source)


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{section}.")}


def make_network(config: Config) -> UNet:
    """Return the network of a config with fresh weights (torch's generator); UserError for wrong arguments."""
    try:
        net = UNet(**config.network)
    except UserError as error:
        raise UserError(f"{config.source}: network: {error}") from None
    if config.linear.blockname is not None:
        check_names([config.linear.blockname], net.widths, f"{config.source}: linear.blockname: ")
    return net


def make_diffusion(config: Config, **options: Any) -> DDPM | EDM:
    """Return the diffusion model of a config; `options` as for DDPM or EDM (clip, exact_end)."""
    try:
        return DIFFUSIONS[config.model_type](**config.diffusion, **options)
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from None


# ---------------------------------------------------------------- flags

MACHINE = (
    # Launchers pass one or the other spelling, or only environment variables, which are what counts.
    Option("--local_rank --local-rank", Int(), -1, hidden=True),
    Option("--use_amp", Flag, False, "mixed precision: bf16 if the device has it, else fp16"),
    Option("--precision", Choice("fp32", "bf16", "fp16"), None, "arithmetic of the network; overrules --use_amp",
           default_help="fp32"),
    Option("--device", Text, None, "cpu, cuda or cuda:N", metavar="NAME", default_help="a GPU if available"),
)
DATA = (
    Option("--data_dir", Text, "./data", "folder of the data sets", metavar="DIR"),
    Option("--seed", Int(), 1337, "seed of all random numbers"),
)
COMMON = (
    Option("--config", Text, required=True, help="configuration, for instance config/DDPM_ddpm.yaml", metavar="YAML"),
    Option("--set", Text, many=True, metavar="KEY=VALUE", help="a key of the config in place of the file's, for "
           "instance --set n_epoch=10 --set linear.timestep=21"),
    *MACHINE, *DATA,
)
GPUS = Option("--gpus", Int(1), None, "processes that batch_size and lrate are meant for", default_help="all processes")
FAST = (
    Option("--compile", Flag, None, "compile the network: slow to start, then faster",
           default_help="train.py: on a GPU, unless --strict"),
    Option("--strict", Flag, False, "the published arithmetic: fp32 and no fast path"),
)


def choose_precision(options: SimpleNamespace, device: torch.device) -> str:
    """Return fp32, bf16 or fp16: that of --precision, else of --use_amp on this device. UserError if the device lacks
    it or --strict contradicts it."""
    strict = getattr(options, "strict", False)
    if strict and (options.use_amp or options.compile or options.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --use_amp, --precision and --compile")
    if options.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU half precision is bf16")
    if options.precision is not None:
        return options.precision
    if not options.use_amp:
        return "fp32"
    if device.type == "cpu" and not computes_bf16(device):
        warnings.warn("--use_amp: this processor has no bf16 and would be many times slower with it; fp32 is taken "
                      "(--precision bf16 insists)", stacklevel=2)
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"
