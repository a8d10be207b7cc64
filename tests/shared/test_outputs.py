"""Output files that cannot be written are found before the work is done for them, and say which flag named them."""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from DASO import plot_pseudo_labels
from DDAE import fid as ddae_fid
from EDM import fid, generate
from shared.cli import UserError
from shared.report import __main__ as page
from shared.training.files import atomic, check_writable
from TorchSSL import audit_labels, predict
from TorchSSL import eval as evaluation

# Script, its flags but for the output, the flag of the output.
CASES: dict[str, tuple[ModuleType, list[str], str]] = {
    "TorchSSL/eval.py": (evaluation, ["--load_path=none.pth"], "--json"),
    "EDM/generate.py": (generate, ["--network=none.pkl", "--outdir=made"], "--grid"),
    "EDM/fid.py": (fid, ["calc", "--images=none", "--ref=none.npz"], "--json"),
    "DDAE/fid.py": (ddae_fid, ["--config=none.yaml", "--ref=none.npz"], "--json"),
    "DASO/plot_pseudo_labels.py": (plot_pseudo_labels, ["none"], "--out"),
    "shared.report": (page, ["none"], "--out"),
}
PLACES: dict[str, Callable[[Path], str]] = {
    "a folder": lambda folder: str(folder / "folder"),
    "below a file": lambda folder: str(folder / "file" / "result.json"),
    "no file system for files": lambda _: "/proc/result.json",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_found_first(name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    module, flags, flag = CASES[name]
    target = PLACES[place](tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", *flags, f"{flag}={target}"])
    with pytest.raises(UserError, match=f"^{flag}: .*{target}.*; ?(choose|give)|^{flag}: {target} is a folder"):
        module.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("module, flags, flag", [
    (predict, ["--load_path=none.pth", "--images=none"], "--sort-into"),
    (audit_labels, ["--dataset=digits", "--save_path=audit"], "--apply")])
def test_a_further_output_is_tried_first(module: ModuleType, flags: list[str], flag: str, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for target in ("/proc/none/x.csv", "file/x.csv"):
        with pytest.raises(UserError, match=f"^{flag}: cannot write {target}: "):
            module.main([*flags, f"{flag}={target}"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_below_folders_that_are_not_there_is_fine(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "x.json", "--json")
    assert not list(tmp_path.iterdir())


def test_a_library_that_hides_a_full_disk_is_understood(tmp_path: Path) -> None:
    """As PyTorch's writer does: its error is a RuntimeError, raised while it handles the true one."""
    with pytest.raises(OSError, match="No space left") as found, atomic(tmp_path / "x") as file:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            file.write(b"x")
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as PyTorch has it
    assert found.value.filename == str(tmp_path / "x")
    assert not list(tmp_path.iterdir())
