"""Snapshots: written and read back, published ones, and files that must not be believed."""
from __future__ import annotations

import collections
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from EDM.convert import main as convert
from EDM.training import published
from EDM.training.networks import EDMPrecond
from EDM.training.published import Record, describe
from EDM.training.snapshots import (
    Snapshot,
    digest,
    load_network,
    load_training_state,
    load_weights,
    read_snapshot,
    save_snapshot,
)
from shared.cli import UserError
from tests.edm.published_form import write_published

NETWORK = dict(img_resolution=8, img_channels=3, label_dim=4, model_type="SongUNet", model_channels=16,
               channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], augment_dim=9, dropout=0.1, use_fp16=False)


@pytest.fixture(scope="module")
def net() -> EDMPrecond:
    torch.manual_seed(0)
    made = EDMPrecond(**NETWORK).eval().requires_grad_(False)
    for parameter in made.parameters():  # layers that start at nearly zero would hide mistakes
        parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def output(net: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return net(x, torch.tensor([0.1, 1.0, 10.0]), torch.eye(4)[:3])


def test_round_trip(net: EDMPrecond, tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot-000010.pkl"
    save_snapshot(path, net, dict(path="x.zip", resolution=8))
    content = torch.load(path, weights_only=True)
    assert content["class_name"] == "EDMPrecond" and content["dataset_kwargs"] == dict(path="x.zip", resolution=8)
    state = torch.get_rng_state()
    loaded = load_network(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(loaded), output(net))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert list(tmp_path.iterdir()) == [path]


def test_same_network_gives_same_bytes(net: EDMPrecond, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "a.pkl", net)
    save_snapshot(tmp_path / "b.pkl", copy.deepcopy(net).to(memory_format=torch.channels_last))
    assert digest(tmp_path / "a.pkl") == digest(tmp_path / "b.pkl")


def test_published_form_gives_the_same_output(net: EDMPrecond, tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot-000000.pkl"
    write_published(path, net, NETWORK, dataset_kwargs=dict(path="y.zip"))
    assert b"embedded source" in path.read_bytes()
    snapshot = read_snapshot(path)
    assert (snapshot.init_kwargs, snapshot.dataset_kwargs) == (NETWORK, dict(path="y.zip"))
    assert torch.allclose(output(load_network(path)), output(net), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["copy.safetensors", "copy.pkl"])
def test_convert(net: EDMPrecond, tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    write_published(tmp_path / "old.pkl", net, NETWORK)
    convert([str(tmp_path / "old.pkl"), str(tmp_path / name)])
    assert "4 classes" in capsys.readouterr().out
    assert torch.equal(output(load_network(tmp_path / name)), output(net))
    with pytest.raises(UserError, match="exists already"):
        convert([str(tmp_path / "old.pkl"), str(tmp_path / name)])
    with pytest.raises(UserError, match="safetensors"):
        convert([str(tmp_path / "old.pkl"), str(tmp_path / "x.onnx")])


# ---------------------------------------------------------------- files that must not be believed

class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def storage_bytes(inner: bytes) -> bytes:
    """A pickle whose tensor data is itself a pickle."""
    return pickle.dumps(dict(ema=Calls(torch.storage._load_from_bytes, inner)))


def hostile_files(folder: Path, marker: Path) -> dict[str, Path]:
    command = f"echo run > {marker}"
    archive, trojan = io.BytesIO(), io.BytesIO()
    torch.save(dict(ema=Calls(os.system, command)), archive)
    torch.save(Calls(os.system, command), trojan, _use_new_zipfile_serialization=False)
    contents = {
        "system": pickle.dumps(dict(ema=Calls(os.system, command))),
        "eval": pickle.dumps(Calls(eval, f"__import__('os').system({command!r})")),
        "popen": pickle.dumps(dict(ema=1, dataset_kwargs=[Calls(subprocess.Popen, ["sh", "-c", command])])),
        "zip": archive.getvalue(),
        "inside-tensor": storage_bytes(trojan.getvalue()),
        "dtype": pickle.dumps(dict(ema=np.array([Calls(os.system, command)], dtype=object))),
        "text": b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.pkl"
        paths[name].write_bytes(content)
    return paths


WATCHER = """
import json, sys
from shared.cli import UserError
from EDM.training.snapshots import load_network, load_training_state
seen = []
watching = False
def hook(event, arguments):
    if watching and event.split(".")[0] in ("exec", "compile", "subprocess", "ctypes", "socket", "shutil") \\
            or watching and event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.putenv"):
        seen.append(event)
sys.addaudithook(hook)
for path in sys.argv[2:]:  # what torch imports at its first use is none of the files' doing
    load_network(path)
answers = {}
for name, path in json.loads(sys.argv[1]).items():
    for read in (load_network, load_training_state):
        watching = True
        try:
            read(path)
            answers[name] = "accepted"
        except UserError as error:
            if read is load_network:
                answers[name] = str(error)
        watching = False
print(json.dumps([answers, seen]))
"""


def test_hostile_files_run_nothing(net: EDMPrecond, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = hostile_files(tmp_path, marker)
    write_published(tmp_path / "source.pkl", net, NETWORK, source=f"import os; os.system('echo run > {marker}')")
    save_snapshot(tmp_path / "good.pkl", net)
    done = subprocess.run([sys.executable, "-c", WATCHER, json.dumps({k: str(v) for k, v in files.items()}),
                           str(tmp_path / "good.pkl"), str(tmp_path / "source.pkl")],
                          capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    answers, seen = json.loads(done.stdout)
    assert seen == [] and not marker.exists()
    for name, asked in dict(system="system", eval="eval", popen="Popen", zip="system", text="system").items():
        assert asked in answers[name] and "nothing of it was run" in answers[name], answers[name]
    assert all("accepted" != answer and "\n" not in answer for answer in answers.values()), answers


def test_endless_nesting_is_refused(net: EDMPrecond, tmp_path: Path) -> None:
    endless: dict[str, Any] = {**NETWORK}
    endless["channel_mult"] = endless
    write_published(tmp_path / "x.pkl", net, endless)
    with pytest.raises(UserError, match="not plain keywords"):
        read_snapshot(tmp_path / "x.pkl")
    looped = Record()
    looped.class_name, looped.state = "EDMPrecond", dict(_init_kwargs={}, _modules=dict(again=looped))
    with pytest.raises(UserError, match="nested"):
        describe(looped, "x")


def test_tensor_beyond_its_data_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(torch.zeros(4).untyped_storage(), stream, _use_new_zipfile_serialization=False)
    rebuild = torch._utils._rebuild_tensor_v2
    for size, stride, offset in [((5,), (1,), 0), ((2, 2), (4, 1), 0), ((2,), (1,), 3), ((1 << 40,), (0,), 0)]:
        storage = Calls(torch.storage._load_from_bytes, stream.getvalue())
        tensor = Calls(rebuild, storage, offset, size, stride, False, collections.OrderedDict())
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(dict(ema=tensor)))
        with pytest.raises(UserError, match="cut short or not a file of this kind"):
            read_snapshot(tmp_path / "x.pkl")


@pytest.mark.parametrize("form", ["ours.pkl", "published.pkl", "ours.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, 0.98])
def test_truncated_file_is_one_line(net: EDMPrecond, tmp_path: Path, form: str, kept: float) -> None:
    path = tmp_path / form
    if form.startswith("published"):
        write_published(path, net, NETWORK)
    else:
        save_snapshot(path, net)
    content = path.read_bytes()
    path.write_bytes(content[:kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(UserError) as error:
        load_network(path)
    assert "\n" not in str(error.value) and path.name in str(error.value)


def test_flipped_byte_is_noticed(net: EDMPrecond, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    save_snapshot(path, net)
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + len(entry.filename) + 500] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_snapshot(path)


def test_wrong_files_are_named(net: EDMPrecond, tmp_path: Path) -> None:
    good = dict(class_name="EDMPrecond", init_kwargs=NETWORK, state_dict=dict(net.state_dict()))
    with pytest.raises(UserError, match="EDMPrecnd.*did you mean \"EDMPrecond\""):
        Snapshot(**{**good, "class_name": "EDMPrecnd"}).build()
    with pytest.raises(UserError, match="constructor arguments"):
        Snapshot(**{**good, "init_kwargs": {**NETWORK, "model_chanels": 16}}).build()
    with pytest.raises(UserError, match="constructor arguments"):
        Snapshot(**{**good, "init_kwargs": {**NETWORK, "model_type": "os.system"}}).build()
    with pytest.raises(UserError, match="snapshot of another network.*shape"):
        Snapshot(**{**good, "init_kwargs": {**NETWORK, "model_channels": 32}}).build()
    with pytest.raises(UserError, match="snapshot of another network"):
        Snapshot(**{**good, "init_kwargs": {**NETWORK, "num_blocks": 2}}).build()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pkl")
    with pytest.raises(UserError, match="not a network snapshot"):
        read_snapshot(tmp_path / "other.pkl")
    torch.save(dict(net=dict(net.state_dict()), optimizer_state={}), tmp_path / "training-state-000001.pt")
    with pytest.raises(UserError, match="training state"):
        read_snapshot(tmp_path / "training-state-000001.pt")
    (tmp_path / "dict.pkl").write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(UserError, match="ema"):
        read_snapshot(tmp_path / "dict.pkl")
    with pytest.raises(UserError, match="no such file"):
        read_snapshot(tmp_path / "absent.pkl")


def test_load_weights_changes_nothing_when_refused(net: EDMPrecond) -> None:
    other = EDMPrecond(**NETWORK)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    tensors = dict(net.state_dict())
    tensors[next(reversed(tensors))] = torch.zeros(2, 2)
    with pytest.raises(UserError, match="shape"):
        load_weights(other, tensors, "x", strict=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_our_training_state(net: EDMPrecond, tmp_path: Path) -> None:
    trained = EDMPrecond(**NETWORK)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    output(trained).square().mean().backward()
    optimizer.step()
    path = tmp_path / "training-state-000001.pt"
    torch.save(dict(net=trained.state_dict(), optimizer_state=optimizer.state_dict(), nimg=512), path)
    state = load_training_state(path)
    assert state["nimg"] == 512
    assert all(torch.equal(state["net"][name], tensor) for name, tensor in trained.state_dict().items())
    again = torch.optim.Adam(trained.parameters(), lr=1)
    again.load_state_dict(state["optimizer_state"])
    assert again.param_groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------- URLs

def test_cached_url_needs_no_network(net: EDMPrecond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    url = "https://example.org/models/edm net.pkl?x=1"
    (tmp_path / "downloads").mkdir()
    save_snapshot(tmp_path / "downloads" / (published.cache_prefix(url) + "edm_net.pkl"), net)
    assert torch.equal(output(load_network(url)), output(net))


def test_download(net: EDMPrecond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    served = tmp_path / "served"
    served.mkdir()
    save_snapshot(served / "net.pkl", net)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "ATTEMPTS", 2)
    cut_short = [True]

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(served))

        def do_GET(self) -> None:
            if not self.path.startswith("/away"):
                super().do_GET()
                return
            self.send_response(302)
            self.send_header("Location", f"file://{served}/net.pkl")
            self.end_headers()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            outputfile.write(source.read(1000) if cut_short.pop() else source.read())
            cut_short.append(False)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/net.pkl"
        assert torch.equal(output(load_network(url)), output(net))  # the second attempt is complete
        with pytest.raises(UserError, match="404"):
            load_network(url + "x")
        with pytest.raises(UserError, match=r"InvalidSchema \(1 attempts\)"):  # the server may not name a file here
            load_network(url.replace("net.pkl", "away.pkl"))
        server.shutdown()
    assert [path.name for path in (tmp_path / "cache/downloads").iterdir()] == [published.cache_prefix(url) + "net.pkl"]
    assert torch.equal(output(load_network(url)), output(net))
