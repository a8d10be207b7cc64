"""The files that the published EDM and TDSM code writes and fetches, read without running anything they carry.

`network-snapshot-*.pkl` and `training-state-*.pt` pickle whole modules together with their source code, which the
published loader executes. Here every module becomes an inert record of its attributes; from the records come the
class name, the constructor arguments and the tensors, and the embedded source is never looked at. Any name beyond the
few that such files consist of is refused.
"""
from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from shared.cli import UserError, is_bounded
from shared.data.safe import NUMPY_NAMES, read_members, restricted_load, zip_members
from shared.training.checkpoint import READ_ERRORS
from shared.training.files import atomic, make_dir
from shared.training.progress import Progress

ATTEMPTS, TIMEOUT_SECONDS = 10, 30  # of a download
DEEPEST = 32  # levels of things in things; published networks have five
MODULES = 20_000  # in a network; published ones have some hundreds
STORAGE_TYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
                 "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
                 "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
# Classifiers hold ordinary modules of torch and a residual network that is pickled by its module's name.
TORCH_LAYERS = {"conv": ("Conv2d",), "batchnorm": ("BatchNorm2d", "SyncBatchNorm"), "linear": ("Linear", "Identity"),
                "activation": ("ReLU", "SiLU"), "dropout": ("Dropout",), "flatten": ("Flatten",),
                "pooling": ("MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"),
                "container": ("ModuleDict", "ModuleList", "Sequential")}
RESNET_CLASSES = ("BasicBlock", "Bottleneck", "ResNet_cond", "ResNet_cond_64")


# ---------------------------------------------------------------- files named by URL

def local_file(path: str | os.PathLike) -> Path:
    """Return `path` itself, or the copy of a URL in the cache folder of the published code, fetched if it is not there.

    Raises UserError when the file does not exist or cannot be fetched.
    """
    url = str(path)
    if not re.match(r"https?://", url):
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        return Path(path)
    folder = Path(os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib") / "downloads"
    prefix = cache_prefix(url)
    for cached in sorted(folder.glob(f"{prefix}*")):
        return cached
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.split("?")[0].rstrip("/").rsplit("/", 1)[-1])[-100:]
    target = make_dir(folder) / (prefix + name)
    import requests  # only downloads need it

    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(requests.get(url, stream=True, timeout=TIMEOUT_SECONDS), target)
            return target
        except requests.RequestException as error:
            status = 0 if error.response is None else error.response.status_code
            # A ValueError: an address, here or after a redirect, that cannot be fetched from.
            hopeless = 400 <= status < 500 and status not in (408, 429) or isinstance(error, ValueError)
            if hopeless or attempt == ATTEMPTS:
                what = f"the server answers {status}" if status else type(error).__name__
                raise UserError(f"cannot fetch {url}: {what} ({attempt} attempts); save the file yourself and give its "
                                "path") from None
            time.sleep(min(2.0**attempt / 8, 10))


def cache_prefix(url: str) -> str:
    """Return how the name of the cached copy of `url` begins."""
    return hashlib.md5(url.encode(), usedforsecurity=False).hexdigest() + "_"


def _fetch(response: Any, target: Path) -> None:
    with response:
        response.raise_for_status()
        size = int(response.headers.get("content-length") or 0)
        counter = Progress(f"fetching {target.name[33:]}", size or None, unit="B")
        with atomic(target) as file:
            for chunk in response.iter_content(1 << 20):  # raises if fewer bytes arrive than announced
                file.write(chunk)
                counter.advance(len(chunk))
        counter.close()


# ---------------------------------------------------------------- snapshots and training states

class PublishedNetwork(NamedTuple):
    """A pickled network as data: class name, constructor keywords, tensors by state_dict name."""

    class_name: str
    init_kwargs: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read_pickle(file: IO[bytes], source: str) -> dict[str, Any]:
    """Read a network-snapshot pickle: its dict, with a Record in place of every module. Raises UserError."""
    content = restricted_load(file, NAMES, source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a dict as in a network snapshot, found {type(content).__name__}")
    return content


def read_zip(path: Path) -> dict[str, Any]:
    """Read the ZIP that torch.save writes, such as a training state: its dict, with a Record in place of every module.

    Sizes and checksums are verified. Raises UserError.
    """
    source = str(path)
    members = {member.name: member for member in zip_members(path)}
    main = next((name for name in members if name.endswith("/data.pkl")), None)
    if main is None:
        raise UserError(f"{source}: expected a file written by torch.save, found a ZIP without data.pkl")
    folder = main.removesuffix("data.pkl")
    storages: dict[str, torch.Tensor] = {}

    def storage(identity: tuple) -> torch.Tensor:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or f"{folder}data/{key}" not in members:
            raise pickle.UnpicklingError("malformed reference to a tensor")
        if key not in storages:
            data = next(read_members(path, [members[f"{folder}data/{key}"]]))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"tensor data {key} has {len(data)} bytes, expected {count} numbers")
            storages[key] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return storages[key]

    if f"{folder}byteorder" in members and next(read_members(path, [members[f"{folder}byteorder"]])) != b"little":
        raise UserError(f"{source}: written on a big-endian machine; convert it there first")
    content = restricted_load(io.BytesIO(next(read_members(path, [members[main]]))), NAMES, source,
                              persistent_load=storage)
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected a dict, found {type(content).__name__}")
    return content


def describe(module: Any, source: str) -> PublishedNetwork:
    """Take class name, constructor keywords and tensors out of a network's Record. Raises UserError."""
    if not isinstance(module, Record) or not isinstance(module.class_name, str):
        raise UserError(f"{source}: holds no network of the published form")
    init_args, init_kwargs = module.state.get("_init_args", ()), module.state.get("_init_kwargs")
    if init_args or not isinstance(init_kwargs, dict) or not is_plain(init_kwargs):
        raise UserError(f"{source}: the constructor arguments of {module.class_name} are not plain keywords")
    return PublishedNetwork(module.class_name, dict(init_kwargs), _collect(module, source))


def is_plain(value: Any) -> bool:
    """Whether a value consists of None, numbers, text, lists, tuples and dicts only, and not of too many."""
    return is_bounded(value, deepest=DEEPEST) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


# ---------------------------------------------------------------- what the names in such a pickle stand for

class Record:
    """A module that stays data: its class name (None for plain containers) and its attributes."""

    class_name: str | None = None

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = _expect(state, dict)


def _persistent_object(meta: dict[str, Any]) -> Record:
    record = Record()
    record.class_name = _expect(meta["class_name"], str)
    record.state = _expect(meta["state"], dict)
    return record


def _parameter(data: torch.Tensor, requires_grad: bool, hooks: Any) -> torch.Tensor:
    return _expect(data, torch.Tensor)


def _storage_from_bytes(data: bytes) -> torch.Tensor:
    try:
        storage = torch.load(io.BytesIO(_expect(data, bytes)), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=storage.dtype).set_(storage)
    except (*READ_ERRORS, pickle.UnpicklingError):
        raise pickle.UnpicklingError("tensor data that torch's weights-only reader refuses") from None


def _tensor(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool,
            hooks: Any, metadata: Any = None) -> torch.Tensor:
    if math.prod(size) > _expect(storage, torch.Tensor).numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} in {storage.numel()} numbers")
    try:
        return storage.as_strided(size, stride, offset)  # checks that every element lies inside
    except RuntimeError as error:
        raise pickle.UnpicklingError(f"malformed tensor ({str(error).splitlines()[0]})") from None


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f"found {type(value).__name__} where {kind.__name__} belongs")
    return value


NAMES: dict[tuple[str, str], Callable] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    **{(f"torch.nn.modules.{module}", name): Record for module, names in TORCH_LAYERS.items() for name in names},
    **{("training.resnet_cond", name): Record for name in RESNET_CLASSES},
    ("torchvision.models.resnet", "ResNet"): Record,
    ("torchvision.models.resnet", "Bottleneck"): Record,
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
    **{("torch", name): dtype for name, dtype in STORAGE_TYPES.items()},
    # Skip scales and initial gains are NumPy numbers.
    **{name: read for name, read in NUMPY_NAMES.items() if name[1] in ("dtype", "scalar", "encode")},
}


def _collect(module: Record, source: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a module and all modules in it, by their names in its state_dict."""
    tensors: dict[str, torch.Tensor] = {}
    waiting, count = [(module, "", 0)], 0
    while waiting:
        module, prefix, depth = waiting.pop()
        count += 1
        if depth > DEEPEST or count > MODULES:
            raise UserError(f"{source}: refused, its modules are nested more than {DEEPEST} deep, or endlessly many")
        hidden = module.state.get("_non_persistent_buffers_set", ())
        for name, tensor in [*_entries(module, "_parameters", source), *_entries(module, "_buffers", source)]:
            if tensor is None or isinstance(hidden, (set, tuple, list)) and name in hidden:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise UserError(f"{source}: {prefix}{name} is no tensor")
            tensors[prefix + name] = tensor
        children = [(child, f"{prefix}{name}.", depth + 1) for name, child in _entries(module, "_modules", source)
                    if child is not None]
        if not all(isinstance(child, Record) for child, _, _ in children):
            raise UserError(f"{source}: {prefix}_modules holds something that is no module")
        waiting += reversed(children)
    return tensors


def _entries(module: Record, name: str, source: str) -> list[tuple[str, Any]]:
    found = module.state.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{source}: the {name} of a module are malformed")
    return list(found.items())
