"""The configuration: defaults, overruled by a YAML file, overruled by `KEY VALUE` pairs; every value checked."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from DASO.lib.config.defaults import DEFAULTS, KEYS
from shared.cli import Flag, Option, Text, UserError, nearest, read_value
from shared.cli import parse as parse_flags
from shared.cli import read_yaml as load_yaml

# Upper-case sections that published files may name though they hold nothing.
EMPTY_SECTIONS = ("ALGORITHM.PSEUDO_LABEL", "ALGORITHM.FIXMATCH")
DATASET_SECTION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "digits": "DIGITS"}


class Config(SimpleNamespace):
    """All keys as attributes: `cfg.MODEL.WIDTH`. `cfg.flat` is the same as a dict of dotted keys."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """values: dotted keys that differ from the defaults; UserError for an unknown key or a wrong value."""
        flat = dict(DEFAULTS)
        for key, value in (values or {}).items():
            flat[key] = checked(key, value)
        super().__init__(**_tree(flat))
        self.flat = flat

    def replaced(self, values: Mapping[str, Any]) -> Config:
        """Return the configuration with other values for some dotted keys."""
        return Config({**self.flat, **values})

    @property
    def long_tail(self) -> SimpleNamespace | None:
        """NUM_LABELED_HEAD, IMB_FACTOR_L, NUM_UNLABELED_HEAD and IMB_FACTOR_UL of the data set; None if it has none."""
        section = DATASET_SECTION.get(self.DATASET.NAME)
        return getattr(self.DATASET, section) if section else None


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        here: Any = tree
        for section in sections:
            here = here.setdefault(section, SimpleNamespace()) if here is tree else _child(here, section)
        if here is tree:
            tree[name] = value
        else:
            setattr(here, name, value)
    return tree


def _child(node: SimpleNamespace, section: str) -> SimpleNamespace:
    if not hasattr(node, section):
        setattr(node, section, SimpleNamespace())
    return getattr(node, section)


def checked(key: str, value: Any, source: str = "") -> Any:
    """Return `value` (as in YAML, or text) as the key declares it; UserError for an unknown key or a wrong value."""
    if key not in KEYS:
        raise UserError(f"{source}unknown key {key}{nearest(key, KEYS)}")
    return read_value(KEYS[key], value, source.removesuffix(": "))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the dotted keys of a YAML file, checked; UserError."""
    content = load_yaml(path, "--config-file")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config-file: {path} must hold sections and keys, as `MODEL:`")
    return {key: checked(key, value, f"{path}: ") for key, value in _leaves(content, "")
            if not (key in EMPTY_SECTIONS and not value)}


def _leaves(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in KEYS and (value or key not in EMPTY_SECTIONS):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def from_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the values of alternating keys and values of a command line, checked; UserError."""
    values, position = {}, 0
    while position < len(pairs):
        key = pairs[position]
        if key not in KEYS:
            raise UserError(_unknown(key, pairs[position + 1] if position + 1 < len(pairs) else ""))
        if position + 1 == len(pairs):
            raise UserError(f"{key}: a value is missing; give KEY VALUE pairs")
        values[key] = checked(key, pairs[position + 1])
        position += 2
    return values


def _unknown(key: str, follower: str) -> str:
    """Return the message for an unknown key; a key broken in two by a space is put together again."""
    joined = f"{key}_{follower}"
    if joined in KEYS:
        return f"unknown key {key} {follower!r}: it was broken in two; write {joined} VALUE"
    parents = [name for name in KEYS if name.startswith(f"{key}.")]
    if parents:
        return f"{key} is a section, not a key; it holds {', '.join(parents[:4])}"
    if key.startswith("-"):
        return f"unknown argument {key}{nearest(key, ('--config-file', '--eval-only'))}; see --help"
    return f"unknown key {key}{nearest(key, KEYS)}"


FLAGS = (
    Option("--config-file", Text, "", "a file of configs/", metavar="FILE"),
    Option("--eval-only", Flag, False, "measure the checkpoint of RESUME and stop"),
    Option("pairs", Text, help="keys of lib/config/defaults.py and their values, as SOLVER.MAX_ITER 1000", many=True,
           metavar="KEY VALUE"),
)


def parse(argv: Sequence[str] | None = None, doc: str = "Train or evaluate a learner.") -> tuple[Config, bool]:
    """Return (configuration, whether --eval-only) of a command line (None: this process's); UserError."""
    given = parse_flags(doc, FLAGS, argv)
    file = read_yaml(given.config_file) if given.config_file else {}
    cfg = Config({**file, **from_pairs(given.pairs)})
    check(cfg)
    return cfg, given.eval_only


def check(cfg: Config) -> None:
    """Raise UserError for values that do not go together."""
    if f"build_{cfg.DATASET.NAME}_dataset" != cfg.DATASET.BUILDER:
        raise UserError(f"DATASET.BUILDER {cfg.DATASET.BUILDER} does not build DATASET.NAME {cfg.DATASET.NAME}; "
                        f"set DATASET.BUILDER build_{cfg.DATASET.NAME}_dataset")
    if cfg.PERIODS.EVAL != cfg.PERIODS.LOG:
        raise UserError(f"PERIODS.EVAL {cfg.PERIODS.EVAL} and PERIODS.LOG {cfg.PERIODS.LOG} must be equal")
    if cfg.SOLVER.OPTIM_NAME == "SGD" and cfg.SOLVER.SGD.NESTEROV and not cfg.SOLVER.SGD.MOMENTUM > 0:
        raise UserError("SOLVER.SGD.NESTEROV True needs SOLVER.SGD.MOMENTUM above 0")


def experiment_name(cfg: Config, seed: int) -> str:
    """Return the published name of the run's folder, e.g. DASO_cifar10_l_1500_100_ul_3000_100_seed_1."""
    name = cfg.ALGORITHM.NAME
    if "CReST" in name and cfg.MODEL.DIST_ALIGN.APPLY:
        name += "_Plus"
    elif cfg.ALGORITHM.DARP.APPLY:
        name += "_DARP"
    parts = [name, cfg.DATASET.NAME]
    tail = cfg.long_tail
    if tail is not None:
        parts += ["l", str(tail.NUM_LABELED_HEAD), str(tail.IMB_FACTOR_L)]
    if cfg.DATASET.NAME == "stl10":
        parts += ["ul", "unknown"]
    elif tail is None:
        parts += ["ul", cfg.DATASET.SEMIAVES.UNLABELED]
    elif cfg.ALGORITHM.NAME != "Supervised":
        parts += ["ul", str(tail.NUM_UNLABELED_HEAD), str(tail.IMB_FACTOR_UL)]
        if cfg.DATASET.REVERSE_UL_DISTRIBUTION:
            parts += ["ul", "rev"]
    if cfg.MODEL.LOSS.LABELED_LOSS != "CrossEntropyLoss":
        parts.append(cfg.MODEL.LOSS.LABELED_LOSS)
    parts += ["seed", str(seed)]
    if cfg.MEMO:
        parts.append(cfg.MEMO)
    return "_".join(parts)


def dump(cfg: Config) -> str:
    """Return the whole configuration as YAML, which `--config-file` reads again."""
    import yaml

    tree: dict[str, Any] = {}
    for key, value in cfg.flat.items():
        *sections, name = key.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree, sort_keys=True)
