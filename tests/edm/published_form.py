"""Writes files in the form of the published code: pickled modules that carry their source."""
from __future__ import annotations

import copyreg
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

SOURCE = "raise RuntimeError('the embedded source was run')\n"


def write_published(path: Path, net: torch.nn.Module, init_kwargs: dict[str, Any], source: str = SOURCE,
                    dataset_kwargs: dict[str, Any] | None = None) -> None:
    """Pickle `net` as the published training loop does. Only names and tensors of `net` are used."""
    with _published_modules() as reconstruct:
        content = dict(ema=_Pickled(net, init_kwargs, source, reconstruct), loss_fn=None, augment_pipe=None,
                       dataset_kwargs=dataset_kwargs or {})
        path.write_bytes(pickle.dumps(content, protocol=4))


def write_published_state(path: Path, net: torch.nn.Module, init_kwargs: dict[str, Any],
                          optimizer_state: dict[str, Any]) -> None:
    """Write the training-state-*.pt of the published loop: the whole network in train mode, and Adam's state."""
    with _published_modules() as reconstruct:
        torch.save(dict(net=_Pickled(net, init_kwargs, SOURCE, reconstruct), optimizer_state=optimizer_state), path)


@contextmanager
def _published_modules() -> Iterator[Any]:
    """Make the function that published pickles name importable, for as long as one is written."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta: dict) -> None:
        raise AssertionError("reading runs this")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules.update({"torch_utils": package, "torch_utils.persistence": module})
    try:
        yield _reconstruct_persistent_obj
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


class _Pickled:
    """Pickles as the published wrapper of a module does."""

    def __init__(self, module: torch.nn.Module, init_kwargs: dict[str, Any], source: str, reconstruct: Any) -> None:
        self.module, self.init_kwargs, self.source, self.reconstruct = module, init_kwargs, source, reconstruct

    def __reduce__(self) -> tuple:
        module = self.module
        children = {name: None if child is None else
                    (_PickledContainer if isinstance(child, torch.nn.ModuleDict) else _Pickled)(
                        child, {}, self.source, self.reconstruct) for name, child in module._modules.items()}
        state = dict(training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers),
                     _non_persistent_buffers_set=set(), _modules=children, skip=None)
        if type(self) is _PickledContainer:
            return copyreg.__newobj__, (torch.nn.ModuleDict,), state
        state.update(skip_scale=np.float64(0.5) ** 0.5, _init_args=(), _init_kwargs=self.init_kwargs)
        return self.reconstruct, (dict(type="class", version=6, module_src=self.source,
                                       class_name=type(module).__name__, state=state),)


class _PickledContainer(_Pickled):
    """Pickles as a ModuleDict: an ordinary module of torch, without a wrapper."""

    __class__ = property(lambda self: torch.nn.ModuleDict)  # type: ignore[assignment]
