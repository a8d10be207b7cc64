"""The environment is made once, used at once afterwards, and repaired when its installation was interrupted."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import environment
from tests.shared.programs import ROOT

PROJECT = """
[project]
dependencies = ["{dependency}"]
[project.optional-dependencies]
test = ["no-such-distribution>=1.0"]
"""


@pytest.fixture
def project(tmp_path):
    """A project whose requirements cost nothing to install; the active Python lacks one of its dependencies."""
    folder = tmp_path / "a project"
    (folder / "shared").mkdir(parents=True)
    for name in ("environment.py", "env.sh"):
        shutil.copy(ROOT / "shared" / name, folder / "shared")
    (folder / "pyproject.toml").write_text(PROJECT.format(dependency="no-such-distribution>=1.0"))
    (folder / "requirements.txt").write_text("# nothing\n")
    return folder


def source(project: Path, *arguments: str) -> subprocess.Popen:
    """Source env.sh as run_all.sh and tests/run.sh do, from another folder, and say which Python that gives."""
    script = f'source "{project}/shared/env.sh" {" ".join(arguments)} || exit $?; command -v python'
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    return subprocess.Popen(["bash", "-c", script], cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PATH": path, "PYTHONPATH": ""})


def finished(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out.strip(), err


def test_venv_is_made_once_reused_at_once_and_repaired(project):
    both = [source(project), source(project)]  # at the same time
    results = [finished(process) for process in both]
    venv = project / ".venv"
    assert [out for out, _ in results] == [str(venv / "bin" / "python")] * 2
    assert sorted("Installing" in err for _, err in results) == [False, True]

    started = time.monotonic()
    out, err = finished(source(project))
    assert (out, err) == (str(venv / "bin" / "python"), "")
    assert time.monotonic() - started < 2

    command = [venv / "bin" / "python", "-c", "import shared.environment as e; print(e.__file__)"]
    outside = subprocess.run(command, cwd="/", capture_output=True, text=True, env={"PATH": os.environ["PATH"]},
                             check=True)
    assert outside.stdout.strip() == str(project / "shared" / "environment.py")

    (venv / "complete.txt").unlink()  # as after an installation that was interrupted
    (venv / "bin" / "python").unlink()
    out, err = finished(source(project))
    assert out == str(venv / "bin" / "python") and "Installing" in err and (venv / "bin" / "python").exists()


def test_a_failing_installation_ends_in_one_clear_line_and_leaves_nothing_that_looks_complete(project):
    (project / "requirements.txt").write_text("./no-such-folder\n")
    out, err = finished(source(project), status=1)
    assert out == "" and err.strip().splitlines()[-1].startswith("error: pip could not install requirements.txt")
    assert not environment.is_complete(project / ".venv")


def test_the_active_python_is_used_when_it_satisfies_the_minimum(project):
    (project / "pyproject.toml").write_text(PROJECT.format(dependency="pytest>=1.0"))
    out, err = finished(source(project))
    assert (out, err) == (str(Path(sys.executable).with_name("python")), "") and not (project / ".venv").exists()
    assert environment.unsatisfied({"pytest": "999.0"})[0].startswith("pytest>=999.0 (found ")
    assert environment.unsatisfied({"no-such-distribution": "1"}) == ["no-such-distribution>=1 (not installed)"]


@pytest.mark.parametrize("version, numbers", [("2.11.0+cu130", (2, 11, 0)), ("1.0rc1", (1, 0)), ("0.4", (0, 4))])
def test_versions_are_compared_by_their_numbers(version, numbers):
    assert environment.release(version) == numbers


def test_the_exact_set_satisfies_the_minimum_versions():
    exact = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            exact[name] = version
    minimum = environment.minimum_versions(["test", "fid"])
    assert set(minimum) <= set(exact)
    assert all(environment.release(exact[name]) >= environment.release(version) for name, version in minimum.items())
