"""Training needs no package at module level that a machine with PyTorch commonly lacks."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.checks.parts import PARTS
from tests.gpu.programs import PROGRAMS, ROOT

COMMON = {"torch", "torchvision", "numpy", "scipy", "sklearn", "PIL", "tqdm", "yaml", "matplotlib", "timm",
          "safetensors", "cycler"}  # the last two come with timm and matplotlib
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir()}
OPTIONAL = {ROOT / "shared" / "data" / "dali.py"}  # taken where DALI is installed
PARTS_OF_CHECK = {f"tests/gpu/checks/{part.module}.py" for part in PARTS.values() if "pytest" not in part.needs}


SCRIPTS = {*(program.script for program in PROGRAMS.values()), *PARTS_OF_CHECK, "tests/gpu/check.py",
           "tests/gpu/checks/worker.py"}


def test_only_common_packages() -> None:
    waiting, seen, others = [ROOT / script for script in SCRIPTS], set(OPTIONAL), {}
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for name, late in imports(path):
            package = name.partition(".")[0]
            if package in ROOMS:
                waiting.append((ROOT / name.replace(".", "/")).with_suffix(".py"))
            elif not late and package not in COMMON | sys.stdlib_module_names:
                others[str(path.relative_to(ROOT))] = package
    assert len(seen) > 100
    assert others == {}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules that a file imports, and whether only when a function is called."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        late = node not in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, late
            yield from ((f"{node.module}.{alias.name}", late) for alias in node.names)
