"""Files of unknown origin: whatever they hold, their readers run nothing of it, write nothing, and stay small."""
from __future__ import annotations

import builtins
import gzip
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.shared.programs import doubled, run

CIFAR, SVHN, MNIST = "cifar-10-batches-py", "train_32x32.mat", "MNIST/raw"


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def watched(folder: Path, calls: dict[str, list], times: int) -> dict[str, Any]:
    """Make the calls in a process of their own, in an empty working folder; see watched.py."""
    (folder / "calls.json").write_text(json.dumps(calls, default=str))
    (folder / "empty").mkdir()
    done = run("tests/shared/watched.py", folder / "calls.json", str(times), cwd=folder / "empty",
               fresh=True, FEWLABEL_CACHE=str(folder / "cache"))
    assert not list((folder / "empty").iterdir())
    return json.loads(done.stdout.splitlines()[-1])


def torch_file(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def test_readers_run_nothing_and_write_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    harm = {
        "system": Calls(os.system, f"touch {marker}"), "exec": Calls(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "write": Calls(builtins.open, str(marker), "w"), "connect": Calls(socket.create_connection, ("127.0.0.1", 9)),
        "eval in a tensor": Calls(torch._utils._rebuild_tensor_v2, Calls(builtins.eval, f"open({str(marker)!r},'w')"),
                                  0, (1,), (1,), False, {}),
    }
    files: dict[str, bytes] = {}
    calls: dict[str, list] = {}

    def add(name: str, content: bytes, module: str, function: str, *arguments: Any) -> None:
        files[name] = content
        calls[name] = [module, function, *arguments]

    for kind, thing in harm.items():
        for form, content in (("zip", torch_file({"net": thing, "model": thing})),
                              ("pickle", pickle.dumps({"net": thing})),
                              ("old", torch_file({"net": thing}, _use_new_zipfile_serialization=False))):
            name = f"{kind}-{form}.pt"
            add(name, content, "shared.training.checkpoint", "read_checkpoint", tmp_path / name)
            calls[f"{name} of EDM"] = ["EDM.training.snapshots", "read_snapshot", tmp_path / name]
            calls[f"{name} as a state"] = ["EDM.training.snapshots", "load_training_state", tmp_path / name]
        name = f"{kind}/{CIFAR}/data_batch_1"
        add(name, pickle.dumps({"data": thing, "labels": [0]}), "shared.data.datasets", "load_dataset", "cifar10",
            "train", tmp_path / kind)
        objects = np.array([thing], dtype=object)
        for module, function in (("shared.data.safe", "load_array"), ("EDM.tdsm.transition", "load_transition")):
            add(f"{kind}-{function}.npy", npy(objects), module, function, tmp_path / f"{kind}-{function}.npy")
        add(f"{kind}.npz", npz(images=objects), "shared.data.images", "read_images", tmp_path / f"{kind}.npz")
        add(f"{kind}-labels.npz", npz(images=np.zeros((1, 1, 2, 2), np.uint8), labels=objects), "shared.data.images",
            "read_images", tmp_path / f"{kind}-labels.npz")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.png", b"")
    for name, inside in (("nested.zip", {"a.png": inner.getvalue()}), ("pickled.zip", {"a.png": files["exec-zip.pt"]}),
                         ("labels.zip", {"dataset.json": b"[" * 100_000, "a.png": b""})):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for path, content in inside.items():
                archive.writestr(path, content)
        add(name, stream.getvalue(), "shared.data.images", "read_images", tmp_path / name)
    for name, text in (("python.yaml", "a: !!python/object/apply:os.system ['touch {marker}']"),
                       ("deep.yaml", "[" * 600), ("date.yaml", "lr: 2001-99-99"),
                       ("laughs.yaml", "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
                           f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi",
                                                                                                 strict=True)))):
        files[name] = text.replace("{marker}", str(marker)).encode()
        for module, function, arguments in (("shared.cli", "read_yaml", [tmp_path / name, "--c"]),
                                            ("TorchSSL.freematch", "parse", [["--c", str(tmp_path / name)]]),
                                            ("DASO.lib.config.config", "read_yaml", [tmp_path / name]),
                                            ("DDAE.ddae.config", "read_config", [tmp_path / name])):
            calls[f"{name} of {module}"] = [module, function, *arguments]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    found = watched(tmp_path, calls, times=2)
    assert not marker.exists()
    assert {name: events for name, events in found["events"].items() if events} == {}
    for name, answer in found["answers"].items():
        assert str(tmp_path) in answer and "\n" not in answer and len(answer) < 700, f"{name}: {answer}"
        assert answer.startswith((str(tmp_path), "--")), f"{name}: {answer}"


def packed_png(width: int, height: int) -> bytes:
    """A valid PNG of black pixels in few bytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compressobj(1)
    rows = b"".join([*(pixels.compress(bytes(1 + 3 * width)) for _ in range(height)), pixels.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)) \
        + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def mat(name: bytes, content: bytes) -> bytes:
    element = struct.pack("<IIIIII", 6, 8, 9, 0, 5, 16) + struct.pack("<4i", 32, 32, 3, 1 << 16) \
        + struct.pack("<HH4s", 1, len(name), name.ljust(4, b"\0")) + content
    packed = zlib.compress(struct.pack("<II", 14, len(element)) + element, 1)
    return b" " * 124 + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


def test_bombs_are_refused_and_stay_small(tmp_path: Path) -> None:
    """Each is a few kilobytes to a megabyte that would unfold to hundreds of megabytes at least."""
    zeros = bytes(1 << 28)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz", compresslevel=1) as archive:
        entry = tarfile.TarInfo(f"{CIFAR}/data_batch_1")
        entry.size = len(zeros) + 512
        archive.addfile(entry, io.BytesIO(zeros + bytes(512)))
    checkpoint = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_file({"net": torch.zeros(3)}))) as good, \
            zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bad:
        for name in good.namelist():
            bad.writestr(name, zeros if name.endswith("data/0") else good.read(name))
    gray = io.BytesIO()
    Image.new("L", (9000, 9000)).save(gray, "png")
    files = {
        "archive/cifar-10-python.tar.gz": (tar.getvalue(), "shared.data.datasets", "load_dataset", "cifar10", "train",
                                           tmp_path / "archive"),
        f"mnist/{MNIST}/train-images-idx3-ubyte.gz": (
            gzip.compress(struct.pack(">4I", 2051, 1 << 20, 28, 28) + zeros, 1), "shared.data.datasets", "load_dataset",
            "mnist", "train", tmp_path / "mnist"),
        f"svhn/{SVHN}": (mat(b"X", struct.pack("<II", 2, len(zeros)) + zeros[:201326592]), "shared.data.datasets",
                         "load_dataset", "svhn", "train", tmp_path / "svhn"),
        "packed.pt": (checkpoint.getvalue(), "shared.training.checkpoint", "read_checkpoint", tmp_path / "packed.pt"),
        "packed-snapshot.pt": (checkpoint.getvalue(), "EDM.training.snapshots", "read_snapshot",
                               tmp_path / "packed.pt"),
        "doubled.pt": (torch_file({"net": doubled(40)}), "shared.training.checkpoint", "read_checkpoint",
                       tmp_path / "doubled.pt"),
        f"cifar/{CIFAR}/data_batch_1": (pickle.dumps({"data": doubled(40)}), "shared.data.datasets", "load_dataset",
                                        "cifar10", "train", tmp_path / "cifar"),
        "large.npy": (header.getvalue() + bytes(80), "shared.data.safe", "load_array", tmp_path / "large.npy"),
        "large.npz": (npz(images=np.zeros((1, 1, 2, 2), np.uint8)), "shared.data.images", "read_images",
                      tmp_path / "large.npz"),
        "colour/a.png": (packed_png(9000, 9000), "shared.data.images", "read_images", tmp_path / "colour"),
        "gray/a.png": (gray.getvalue(), "shared.data.images", "read_images", tmp_path / "gray"),
    }
    for name, (content, *_) in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        assert len(content) < 2 << 20, name
    (tmp_path / f"mnist/{MNIST}/train-labels-idx1-ubyte").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "large.npz", "a") as archive:
        archive.writestr("labels.npy", header.getvalue())
    found = watched(tmp_path, {name: call for name, (_, *call) in files.items()}, times=1)
    for name, answer in found["answers"].items():
        assert answer.startswith(str(tmp_path)) and "\n" not in answer, f"{name}: {answer}"
    assert found["grown"] < 450
