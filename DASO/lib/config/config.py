"""The configuration: defaults, overruled by a YAML file, overruled by `KEY VALUE` pairs; every value checked."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from DASO.lib.config.defaults import DATASETS, DEFAULTS, KEYS
from shared.cli import Flag, Option, Text, UserError, nearest, read_value
from shared.cli import parse as parse_flags
from shared.cli import read_yaml as load_yaml

FLAGS = (
    Option("--config-file", Text, "", "a file of configs/", metavar="FILE"),
    Option("--eval-only", Flag, False, "measure the checkpoint of RESUME and stop"),
    Option("--overwrite", Flag, False, "move another run in the folder aside and start anew (without it: an error)"),
    Option("pairs", Text, help="keys of lib/config/defaults.py and their values, as SOLVER.MAX_ITER 1000", many=True,
           metavar="KEY VALUE"),
)


class Config(SimpleNamespace):
    """All keys as attributes: `cfg.MODEL.WIDTH`. `cfg.flat` is the same as a dict of dotted keys."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """values: dotted keys that differ from the defaults; UserError for an unknown key or a wrong value."""
        self.flat = DEFAULTS | {key: checked(key, value) for key, value in (values or {}).items()}
        super().__init__(**vars(_namespace(_nested(self.flat))))

    def replaced(self, values: Mapping[str, Any]) -> Config:
        """Return the configuration with other values for some dotted keys."""
        return Config({**self.flat, **values})

    @property
    def long_tail(self) -> SimpleNamespace | None:
        """NUM_LABELED_HEAD, IMB_FACTOR_L, NUM_UNLABELED_HEAD and IMB_FACTOR_UL of the data set; None if it has none."""
        return getattr(self.DATASET, "OWN" if self.is_own else self.DATASET.NAME.upper(), None)

    @property
    def is_own(self) -> bool:
        """Whether DATASET.NAME is the path of own images."""
        return self.DATASET.NAME not in DATASETS


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"MODEL.WIDTH": 2} as {"MODEL": {"WIDTH": 2}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def _namespace(tree: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: _namespace(value) if isinstance(value, dict) else value
                              for name, value in tree.items()})


def dump(cfg: Config) -> str:
    """Return the whole configuration as YAML, which `--config-file` reads again."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.flat.items()}
    return yaml.safe_dump(_nested(plain), sort_keys=True)


# ------------------------------------------------------------------------------------------------------------ reading

def parse(argv: Sequence[str] | None = None, doc: str = "Train or evaluate a learner."
          ) -> tuple[Config, SimpleNamespace]:
    """Return (configuration, flags) of a command line (None: this process's); UserError."""
    given = parse_flags(doc, FLAGS, argv)
    file = read_yaml(given.config_file) if given.config_file else {}
    cfg = Config({**file, **from_pairs(given.pairs)})
    check(cfg)
    return cfg, given


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the dotted keys of a YAML file, checked; UserError."""
    content = load_yaml(path, "--config-file") or {}
    if not isinstance(content, dict):
        raise UserError(f"--config-file: {path} must hold sections and keys, as `MODEL:`")
    return {key: checked(key, value, str(path)) for key, value in _leaves(content)}


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; published files may name sections that hold nothing."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def from_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the values of alternating keys and values of a command line, checked; UserError."""
    values = {}
    for position in range(0, len(pairs), 2):
        key, value = pairs[position], "".join(pairs[position + 1:position + 2])
        if key not in KEYS:
            raise UserError(_unknown(key, value))
        if position + 1 == len(pairs):
            raise UserError(f"{key}: a value is missing; give KEY VALUE pairs")
        values[key] = checked(key, value)
    return values


def checked(key: str, value: Any, source: str = "") -> Any:
    """Return `value` (as in YAML, or text) as the key declares it; UserError for an unknown key or a wrong value."""
    if key not in KEYS:
        raise UserError(f"{source}{': ' if source else ''}unknown key {key}{nearest(key, KEYS)}")
    return read_value(KEYS[key], value, source)


def _unknown(key: str, follower: str) -> str:
    """Return the message for an unknown key; a key broken in two by a space is put together again."""
    whole = f"{key}_{follower}"
    if whole in KEYS:
        return f"unknown key {key} {follower!r}: it was broken in two; write {whole} VALUE"
    parents = [name for name in KEYS if name.startswith(f"{key}.")]
    if parents:
        return f"{key} is a section, not a key; it holds {', '.join(parents[:4])}"
    return f"unknown key {key}{nearest(key, KEYS)}"


def check(cfg: Config) -> None:
    """Raise UserError for values that do not go together."""
    if not cfg.is_own and f"build_{cfg.DATASET.NAME}_dataset" != cfg.DATASET.BUILDER:
        raise UserError(f"DATASET.BUILDER {cfg.DATASET.BUILDER} does not build DATASET.NAME {cfg.DATASET.NAME}; "
                        f"set DATASET.BUILDER build_{cfg.DATASET.NAME}_dataset")
    if cfg.PERIODS.EVAL != cfg.PERIODS.LOG:
        raise UserError(f"PERIODS.EVAL {cfg.PERIODS.EVAL} and PERIODS.LOG {cfg.PERIODS.LOG} must be equal")
    if cfg.SOLVER.OPTIM_NAME == "SGD" and cfg.SOLVER.SGD.NESTEROV and not cfg.SOLVER.SGD.MOMENTUM > 0:
        raise UserError("SOLVER.SGD.NESTEROV True needs SOLVER.SGD.MOMENTUM above 0")


def experiment_name(cfg: Config, seed: int) -> str:
    """Return the published name of the run's folder, e.g. DASO_cifar10_l_1500_100_ul_3000_100_seed_1."""
    name, tail = cfg.ALGORITHM.NAME, cfg.long_tail
    if "CReST" in name and cfg.MODEL.DIST_ALIGN.APPLY:
        name += "_Plus"
    elif cfg.ALGORITHM.DARP.APPLY:
        name += "_DARP"
    parts = [name, Path(cfg.DATASET.NAME).resolve().stem if cfg.is_own else cfg.DATASET.NAME]
    if cfg.DATASET.LABELED_COUNTS:
        parts += ["l", sum(cfg.DATASET.LABELED_COUNTS)]
    elif tail is not None:
        parts += ["l", tail.NUM_LABELED_HEAD, tail.IMB_FACTOR_L]
    if cfg.DATASET.NAME == "stl10":
        parts += ["ul", "unknown"]
    elif tail is None:
        parts += ["ul", cfg.DATASET.SEMIAVES.UNLABELED]
    elif cfg.DATASET.UNLABELED_COUNTS:
        parts += ["ul", sum(cfg.DATASET.UNLABELED_COUNTS)]
    elif cfg.ALGORITHM.NAME != "Supervised":
        parts += ["ul", tail.NUM_UNLABELED_HEAD, tail.IMB_FACTOR_UL]
        if cfg.DATASET.REVERSE_UL_DISTRIBUTION:
            parts += ["ul", "rev"]
    if cfg.MODEL.LOSS.LABELED_LOSS != "CrossEntropyLoss":
        parts.append(cfg.MODEL.LOSS.LABELED_LOSS)
    parts += ["seed", seed]
    if cfg.MEMO:
        parts.append(cfg.MEMO)
    return "_".join(map(str, parts))
