"""The YAML files of config/: read safely, every key checked, turned into a network and a diffusion model."""
from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import UserError, nearest, read_yaml

if TYPE_CHECKING:
    from DDAE.ddae.diffusion import DDPM, EDM
    from DDAE.ddae.model import UNet

# Published names of data sets; others are names of shared/data/datasets.py or paths.
MODEL_TYPES = ("DDPM", "EDM")
SOURCE_FOLDER = Path(__file__).parents[1] / "config"


@dataclass(frozen=True)
class LinearConfig:
    """Linear probe: epochs, images per process and step, learning rate per process, and where the features are taken:
    a time of the diffusion model and a decoder block. flip, pad: the training images are mirrored half of the time, and
    cropped from a frame of so many black pixels."""

    n_epoch: int
    batch_size: int
    lrate: float
    timestep: int
    blockname: str
    flip: bool = True
    pad: int = 4


@dataclass(frozen=True)
class Config:
    """One experiment, as a file of config/ describes it.

    batch_size: images per process and step; lrate: learning rate per process (the rate of a run is lrate times the
    number of processes), reached after warm_epoch epochs. ema: largest decay of the average. load_epoch: checkpoint to
    go on from, -1 for none. n_sample: images in the preview. optim, optim_args: AdamW and its arguments; None: Adam.
    """

    dataset: str
    classes: int
    model_type: str
    net_type: str
    diffusion: Mapping[str, Any]
    network: Mapping[str, Any]
    n_epoch: int
    batch_size: int
    lrate: float
    warm_epoch: int
    flip: bool
    ema: float
    save_dir: str = "./output"
    load_epoch: int = -1
    n_sample: int = 30
    save_model: bool = True
    optim: str | None = None
    optim_args: Mapping[str, Any] = field(default_factory=dict)
    linear: LinearConfig | None = None
    source: str = ""  # file it was read from; not a key

    def probe(self) -> LinearConfig:
        """Return the settings of the linear probe; UserError if the file has none."""
        if self.linear is None:
            raise UserError(f"{self.source}: needs a section `linear` with {', '.join(_names(LinearConfig))}")
        return self.linear

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values as plain containers."""
        plain = dataclasses.asdict(self)
        del plain["source"]
        return plain


def read_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file; `overrides` KEY=VALUE overrule it, a key of a section being written section.key.

    Raises UserError for a file that is missing or malformed, or a key that is unknown or wrong.
    """
    if path is None:
        raise UserError("--config: needs a YAML file, for instance config/DDPM_ddpm.yaml")
    path = Path(path)
    if not path.exists():
        known = sorted(file.name for file in SOURCE_FOLDER.glob("*.yaml"))
        raise UserError(f"--config: {path}: no such file{nearest(path.name, known)}; those that come with it, in "
                        f"config/: {', '.join(known)}")
    content = read_yaml(path, "--config")
    if isinstance(content, dict):
        for override in overrides:
            _overrule(content, override)
    return make_config(content, str(path))


def _overrule(content: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set: expected KEY=VALUE, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise UserError(f"--set {override}: {section} is not a section of the config")
    try:
        content[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {text!r} is not a plain YAML value") from None


def make_config(content: Any, source: str) -> Config:
    """Return the checked config of a dictionary; UserError names `source` and the key."""
    if not isinstance(content, dict):
        raise UserError(f"{source}: must hold one `key: value` per line")
    values = _checked(Config, {k: v for k, v in content.items() if k != "linear"}, source, "",
                      extra=("linear",))
    if content.get("linear") is not None:
        if not isinstance(content["linear"], dict):
            raise UserError(f"{source}: linear: expected keys {', '.join(_names(LinearConfig))}")
        values["linear"] = LinearConfig(**_checked(LinearConfig, content["linear"], source, "linear."))
    config = Config(**values, source=source)
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"{source}: model_type: expected {' or '.join(MODEL_TYPES)}, got {config.model_type!r}"
                        f"{nearest(config.model_type, MODEL_TYPES)}")
    if config.net_type != "UNet":
        raise UserError(f"{source}: net_type: expected UNet, got {config.net_type!r}")
    if config.optim not in (None, "AdamW"):
        raise UserError(f"{source}: optim: expected AdamW, or leave it out for Adam; got {config.optim!r}")
    for name, least in (("n_epoch", 1), ("batch_size", 1), ("warm_epoch", 1), ("n_sample", 1), ("classes", 1)):
        if getattr(config, name) < least:
            raise UserError(f"{source}: {name}: expected at least {least}, got {getattr(config, name)}")
    if config.lrate <= 0 or not 0 <= config.ema < 1:
        raise UserError(f"{source}: expected lrate above 0 and ema from 0 to below 1, got {config.lrate} and "
                        f"{config.ema}")
    return config


def make_network(config: Config) -> UNet:
    """Return the network of a config with fresh weights (torch's generator); UserError for wrong arguments."""
    from DDAE.ddae.model import UNet

    _check_arguments(UNet, config.network, config.source, "network.")
    try:
        net = UNet(**config.network)
    except UserError as error:
        raise UserError(f"{config.source}: network: {error}") from None
    except TypeError as error:
        raise UserError(f"{config.source}: network: {error}") from None
    if config.linear is not None and config.linear.blockname not in net.widths:
        raise UserError(f"{config.source}: linear.blockname: this network has no block {config.linear.blockname!r}; it "
                        f"has {', '.join(net.block_names)}")
    return net


def make_diffusion(config: Config, **options: Any) -> DDPM | EDM:
    """Return the diffusion model of a config; `options` as for DDPM or EDM (clip, exact_end)."""
    from DDAE.ddae.diffusion import DIFFUSIONS

    kind = DIFFUSIONS[config.model_type]
    _check_arguments(kind, config.diffusion, config.source, "diffusion.", hidden=("clip", "exact_end"))
    try:
        return kind(**config.diffusion, **options)
    except UserError as error:
        raise UserError(f"{config.source}: {error}") from None
    except TypeError as error:
        raise UserError(f"{config.source}: diffusion: {error}") from None


def _names(kind: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]


def _checked(kind: type, content: Mapping[str, Any], source: str, prefix: str, extra: Iterable[str] = ()
             ) -> dict[str, Any]:
    """Return the values of a section in the types that the fields of `kind` say."""
    fields = {entry.name: entry for entry in dataclasses.fields(kind) if entry.name not in ("source", "linear")}
    for key in content:
        if key not in fields:
            raise UserError(f'{source}: unknown key "{prefix}{key}"{nearest(str(key), [*fields, *extra])}')
    needed = [name for name, entry in fields.items()
              if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if content.get(name) is None]:
        raise UserError(f"{source}: lacks the key {prefix}{missing[0]}")
    return {key: _typed(fields[key].type, value, f"{source}: {prefix}{key}") for key, value in content.items()
            if value is not None}


def _typed(kind: str, value: Any, what: str) -> Any:
    if kind.startswith("Mapping"):
        if not isinstance(value, dict):
            raise UserError(f"{what}: expected indented keys, got {value!r}")
        return dict(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise UserError(f"{what}: expected true or false, got {value!r}")
        return value
    if kind.startswith("str"):
        return str(value)
    convert = int if kind == "int" else float
    try:  # through text: YAML reads 1e-4 as a string
        if isinstance(value, bool):
            raise ValueError
        return convert(str(value))
    except ValueError:
        raise UserError(f"{what}: expected {'an integer' if convert is int else 'a number'}, got {value!r}") from None


def _check_arguments(kind: type, given: Mapping[str, Any], source: str, prefix: str, hidden: Iterable[str] = ()
                     ) -> None:
    known = {name: p for name, p in inspect.signature(kind).parameters.items() if name not in hidden}
    for key in given:
        if key not in known:
            raise UserError(f'{source}: unknown key "{prefix}{key}"{nearest(str(key), known)}; known are '
                            f"{', '.join(known)}")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in given]:
        raise UserError(f"{source}: lacks the key {prefix}{missing[0]}")
