"""Configurations of the ImageNet commands: `--config=PATH`, a Python file whose get_config() returns a nested dict of
plain values, and `--config.KEY[.KEY]=VALUE`, which replaces one of them by a value of the same type.
"""
from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared import cli
from shared.cli import Option, Options, Text, UserError, nearest
from shared.option_types import Bool, Float, Int

CONFIG = Option("--config", Text, None, "Python file with get_config(), such as configs/NAME.py; --config.KEY=VALUE "
                "replaces a value of it, --config.SECTION.KEY=VALUE one of a section", required=True, metavar="FILE")
# Keys that a configuration may lack, with the value that this means.
OPTIONAL = {"nnet.conv": True, "nnet.skip": True, "dataset.mirror": True, "encoder": ""}


class Config(dict):
    """A nested dict whose keys are attributes too: config.train.batch_size."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


def parse(doc: str, flags: Options, argv: Sequence[str] | None = None) -> tuple[SimpleNamespace, Config]:
    """Read a command line (None: this process's); return the values of `flags` and --config, and the configuration.

    The configuration has two further keys, as published: `config_name` and `hparams`. Raises UserError for a mistake.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    overrides = [word for word in words if word.startswith("--config.")]
    groups = dict(flags) if isinstance(flags, Mapping) else {"": tuple(flags)}
    options = cli.parse(doc, {"configuration": (CONFIG,), **groups}, [w for w in words if w not in overrides])
    config = read_config(options.config)
    for word in overrides:
        override(config, word)
    config["config_name"], config["hparams"] = Path(options.config).stem, hparams(overrides)
    return options, config


def read_config(path: str | Path) -> Config:
    """Run a configuration file and return the result of its get_config(); UserError."""
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path}")
    spec = importlib.util.spec_from_file_location("configuration", path)
    if spec is None:
        raise UserError(f"--config: {path} is no Python file; its name has to end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.get_config()
    except Exception as error:  # noqa: BLE001 (a program of the user's may raise anything)
        raise UserError(f"--config: {path}: {type(error).__name__}: {error}") from None
    found = found.to_dict() if hasattr(found, "to_dict") else found  # ml_collections, in which they were published
    if not isinstance(found, Mapping):
        raise UserError(f"--config: get_config() of {path} returns {type(found).__name__}, expected a dict")
    return _nested(found)


def override(config: Config, word: str) -> None:
    """Apply one `--config.KEY[.KEY]=VALUE`; UserError for an unknown key, or a value of another type."""
    name, equals, text = word.partition("=")
    if not equals:
        raise UserError(f"{name}: expected {name}=VALUE")
    *sections, last = name.removeprefix("--config.").split(".")
    target = config
    for section in sections:
        target = target.get(section)
        if not isinstance(target, Config):
            raise UserError(f"{name}: the configuration has no section {section!r}"
                            f"{nearest(section, (key for key in config if isinstance(config[key], Config)))}")
    default = target.get(last, OPTIONAL.get(name.removeprefix("--config.")))
    if default is None and last not in target:
        raise UserError(f"{name}: the configuration has no such key{nearest(last, target)}")
    if isinstance(default, Config):
        raise UserError(f"{name}: is a section with the keys {', '.join(default)}; give {name}.KEY=VALUE")
    try:
        target[last] = _typed(default, text)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"Invalid value for '{name}': {error}") from None


def hparams(overrides: Sequence[str]) -> str:
    """Return the name of a set of overrides, as published: "lr=0.1-output_path=NAME", or "default"."""
    parts = []
    for word in overrides:
        name, _, text = word.removeprefix("--config.").partition("=")
        key = name.rpartition(".")[2]
        if name != "dataset.path":
            parts.append(f"{key}={Path(text).stem if key.endswith('path') else text}")
    return "-".join(parts) or "default"


def _typed(default: Any, text: str) -> Any:
    """Return a value of the type of `default`."""
    if isinstance(default, (tuple, list)):
        found = ast.literal_eval(text if text[:1] in "([" else f"({text},)")
        kind = type(default[0]) if default else object
        if len(found) != len(default) or not all(isinstance(value, (kind, int)) for value in found):
            raise ValueError(f"{text!r} is not of the form {tuple(default)}.")
        return type(default)(kind(value) for value in found)
    kinds = {bool: Bool(), int: Int(), float: Float()}
    return kinds.get(type(default), Text()).convert(text)


def _nested(values: Mapping[str, Any]) -> Config:
    return Config({key: _nested(value) if isinstance(value, Mapping) else value for key, value in values.items()})
