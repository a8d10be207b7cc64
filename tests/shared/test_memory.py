"""Running out of memory is one line that names a flag of the script."""
from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from EDM.training import training_loop
from shared.cli import UserError, less_memory, run_main
from shared.training.run import Run
from tests.shared.programs import ROOT, declared_options

FULL = {
    "the allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
                                            "capacity of 79.10 GiB of which 1.00 GiB is free."),
    "the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "the CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
                            "you tried to allocate 4000000000 bytes. Error code 12 (Cannot allocate memory)"),
    "Python": MemoryError("Unable to allocate 7.45 GiB for an array")}
SCRIPTS = [path for room in ("EDM", "EDM/imagenet", "DDAE", "DDAE/DiT", "TorchSSL", "MetaSemi") for path in sorted(
    (ROOT / room).glob("*.py")) if '@less_memory("--' in path.read_text()]


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_one_line_names_what_to_lower(error: Exception) -> None:
    with pytest.raises(UserError, match=r"^out of memory: .*memory is used up.*; lower --batch-gpu$") as found:
        with less_memory("--batch-gpu"):
            raise error
    assert "\n" not in str(found.value)


def test_the_innermost_remedy_counts() -> None:
    with pytest.raises(UserError, match="lower --eval-batch$"), less_memory("--batch"), less_memory("--eval-batch"):
        raise FULL["the allocator"]


def test_sizes_are_told() -> None:
    with pytest.raises(UserError, match=r"2\.00 GiB more were needed, it has 79\.10 GiB"), less_memory("--batch"):
        raise FULL["the allocator"]


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_network_is_not_to_blame(error: Exception, monkeypatch) -> None:
    """Memory that is used up while a network is tried or a checkpoint is loaded is no wrong --arch, no wrong file."""
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(training_loop, "module_table", full)
    with pytest.raises(type(error)) as found:
        training_loop.network_table(SimpleNamespace(img_resolution=32), 16)
    assert found.value is error
    with pytest.raises(type(error)) as found:
        Run.restore(SimpleNamespace(keep={"optimizer": SimpleNamespace(load_state_dict=full)}), {"optimizer": {}},
                    Path("checkpoint.pt"))
    assert found.value is error


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shapes"), less_memory("--batch"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_program_without_such_a_flag_ends_in_one_line_too(error: Exception, capsys) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_flags_are_the_script_s(script: Path) -> None:
    named = set(re.findall(r"--[\w-]+", " ".join(re.findall(r'@less_memory\("([^"]*)"\)', script.read_text()))))
    command = "calc" if script.name == "fid.py" and script.parent.name == "EDM" else ""
    options = declared_options(str(script.relative_to(ROOT)), command)
    known = {name for option in options for name in option.names.split()}
    assert named <= known | {"--set"}


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "TorchSSL").glob("*.py")
                                          if "core.trainer" in path.read_text()))
def test_the_flags_are_the_learners(script: str) -> None:
    known = {name for option in declared_options(f"TorchSSL/{script}") for name in option.names.split()}
    assert {"--batch_size", "--uratio", "--eval_batch_size"} <= known
