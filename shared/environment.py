"""Find or make the Python that the scripts run with. Standard library only: this runs before anything is installed.

    python shared/environment.py [--extra test]

prints the path of the `python` to use: that of the Python it is started with when this has every package in the minimum
version of pyproject.toml, otherwise `.venv/bin/python`, made from the exact set of requirements.txt. The stamp
file in `.venv` is written last, so an interrupted installation has none and is made again; a lock lets only one
process install at a time. `shared/env.sh` is how shell scripts call it.
"""

import argparse
import fcntl
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """The environment cannot be made; the message is one line."""


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version).group().split("."))


def minimum_versions(extras: Iterable[str] = ()) -> dict[str, str]:
    """Distribution name -> minimum version, from the "name>=version" entries of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = list(project["dependencies"])
    for extra in extras:
        entries += project["optional-dependencies"][extra]
    return dict(entry.split(">=") for entry in entries)


def unsatisfied(minimum: dict[str, str]) -> list[str]:
    """The requirements that the running Python does not meet, as "name>=version (found)"."""
    missing = []
    for name, version in minimum.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}>={version} (not installed)")
            continue
        if release(found) < release(version):
            missing.append(f"{name}>={version} (found {found})")
    return missing


def active_python(extras: Iterable[str]) -> Path | None:
    """The running Python when it has all packages, else None; scripts call it `python`, so it must have that name."""
    python = Path(sys.executable).with_name("python")
    if not python.exists() or unsatisfied(minimum_versions(extras)):
        return None
    return python


def stamp_text() -> str:
    """What a complete .venv was made from. The path belongs to it: a moved .venv does not work."""
    return f"{ROOT}\n{(ROOT / 'requirements.txt').read_text()}"


def is_complete(venv: Path) -> bool:
    stamp = venv / "complete.txt"
    return stamp.is_file() and stamp.read_text() == stamp_text() and (venv / "bin" / "python").exists()


def run(command: list[str], failure: str) -> None:
    # Standard output carries only the answer of this script, so what the command prints goes to standard error.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise SetupError(failure)


def make_venv(venv: Path) -> None:
    """Install requirements.txt into a new `venv`; what was there of an older set or an interrupted try is removed."""
    print(f"Installing the packages of requirements.txt into {venv} (once; about 6 GB with CUDA)", file=sys.stderr)
    if venv.exists():
        shutil.rmtree(venv)
    run([sys.executable, "-m", "venv", str(venv)],
        f"{sys.executable} -m venv failed (its message is above): install your system's package python3-venv")
    python = str(venv / "bin" / "python")
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    run([python, "-m", "pip", "install", "--disable-pip-version-check", *quiet, "-r", str(ROOT / "requirements.txt")],
        "pip could not install requirements.txt (its message is above): check the network and the free disk space "
        "(about 6 GB), then run the same command again")
    # One line in a .pth file makes the packages importable from any folder, as an editable install would.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (venv / "lib" / version / "site-packages" / "fewlabel.pth").write_text(f"{ROOT}\n")
    (venv / "complete.txt").write_text(stamp_text())


def find_python(extras: Iterable[str] = (), venv: Path = ROOT / ".venv") -> Path:
    """The Python to use; makes `venv` when the active Python lacks something and `venv` is not complete.

    Raises:
        SetupError: the installation failed.
    """
    python = active_python(extras)
    if python is not None:
        return python
    if not is_complete(venv):
        lock = venv.with_name(venv.name + ".lock")
        try:
            handle = lock.open("w")
        except OSError as error:
            raise SetupError(f"{lock} cannot be written ({error.strerror}): make the folder writable") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not is_complete(venv):  # another process may have made it while this one waited
                make_venv(venv)
    return venv / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the path of the Python to use; install .venv when needed.")
    parser.add_argument("--extra", action="append", default=[], help="also require this list of pyproject.toml")
    try:
        print(find_python(parser.parse_args().extra))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
