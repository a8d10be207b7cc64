"""Checkpoints: complete or absent, checked before use, read without running anything."""
from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.cli import UserError, is_bounded
from shared.training.files import atomic

# The parts of a pickled number of NumPy, under the names of NumPy 1 and 2.
NUMPY_NUMBERS = [*((np.float64(0).__reduce__()[0], f"{module}.multiarray.scalar") for module in ("numpy.core",
                                                                                              "numpy._core")),
                 np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1"))]
# Errors of torch.load for a damaged file, besides pickle.UnpicklingError.
READ_ERRORS = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
               OverflowError, MemoryError, struct.error, OSError, zipfile.BadZipFile)


def previous_path(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def write_checkpoint(path: Path, content: Mapping[str, Any], keep_former: bool = True) -> None:
    """Write tensors and plain values to `path`; the former file stays as `<path>.previous`, unless it is damaged.

    keep_former: False for a damaged one, which must not replace a good previous file. Raises OSError on a full disk.
    """
    with atomic(path, previous=previous_path(path) if keep_former else None) as file:
        torch.save(dict(content), file)


def is_readable(path: Path) -> bool:
    """Return whether `path` is a whole checkpoint."""
    try:
        read_checkpoint(path)
    except UserError:
        return False
    return True


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return the dict of tensors (on the CPU) and plain values in a torch.save file.

    The CRC of every record is checked first, so a changed byte is found. Raises UserError for a file that is absent,
    damaged, or holds anything else; nothing of it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path}: refused, its records unfold to more than the file holds")
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path}: damaged checkpoint (record {damaged} fails its checksum)")
        # NumPy's numbers, which older trainers kept beside their tensors, are plain values too.
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        named = reason[reason.find("GLOBAL"):].split(" was not")[0] if "GLOBAL" in reason else "cut short or damaged"
        raise UserError(f"{path}: refused, not a file of tensors and plain values ({named}); nothing of it was run"
                        ) from None
    except READ_ERRORS as error:
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        raise UserError(f"{path}: cut short or damaged, not a readable checkpoint") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    if not is_bounded(content):
        raise UserError(f"{path}: refused, it unfolds to more than a checkpoint holds")
    return content


def weights_in(content: Mapping[str, Any], name: str, source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the state dict that a checkpoint holds under `name`; UserError if there is something else, or a number
    that is not finite."""
    state = content.get(name)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                                 for key, value in state.items()):
        raise UserError(f"{source}: its entry {name} does not hold the weights of a network")
    check_finite(state, source)
    return dict(state)


def check_finite(state: Mapping[str, Any], source: str | os.PathLike) -> None:
    """Raise UserError for weights that are not finite."""
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds numbers that are not finite; take an earlier or another file")


def load_newest(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return (file, content) of `path`, or of `<path>.previous` with a warning if `path` is damaged or missing.

    None if neither exists; UserError if neither is readable.
    """
    problems = []
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        try:
            content = read_checkpoint(candidate)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {candidate}", stacklevel=2)
        return candidate, content
    if problems:
        raise UserError(f"{problems[0]}; remove it to start from the beginning")
    return None


def keep_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameters; fused optimizers take it for granted."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


class Stateful:
    """An object whose checkpoint is its attributes named in `state`.

    They are tensors, which are loaded onto the device of the present ones, plain values, or objects with state_dict and
    load_state_dict.
    """

    state: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.state}
        return {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state:
            part, value = getattr(self, name), state[name]
            if isinstance(value, Mapping):
                part.load_state_dict(value)
            else:
                setattr(self, name, value.to(part.device) if isinstance(value, torch.Tensor) else value)
