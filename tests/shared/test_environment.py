"""shared/env.sh: the environment is made once, used afterwards, and repaired when its installation was interrupted."""
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    (folder / "shared" / "__init__.py").touch()
    shutil.copy(ROOT / "shared" / "env.sh", folder / "shared")
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


def test_venv_is_made_once_reused_and_repaired(project):
    both = [source(project), source(project)]  # at the same time
    results = [finished(process) for process in both]
    venv = project / ".venv"
    assert [out for out, _ in results] == [str(venv / "bin" / "python")] * 2
    assert sorted("Installing" in err for _, err in results) == [False, True]
    assert finished(source(project)) == (str(venv / "bin" / "python"), "")

    command = [venv / "bin" / "python", "-c", "import shared; print(shared.__file__)"]
    outside = subprocess.run(command, cwd="/", capture_output=True, text=True, env={"PATH": os.environ["PATH"]},
                             check=True)
    assert outside.stdout.strip() == str(project / "shared" / "__init__.py")

    (venv / "complete.txt").unlink()  # as after an installation that was interrupted
    (venv / "bin" / "python").unlink()
    out, err = finished(source(project))
    assert out == str(venv / "bin" / "python") and "Installing" in err and (venv / "bin" / "python").exists()


def test_a_failing_installation_ends_in_one_clear_line_and_leaves_nothing_that_looks_complete(project):
    (project / "requirements.txt").write_text("./no-such-folder\n")
    out, err = finished(source(project), status=1)
    assert out == "" and err.strip().splitlines()[-1].startswith("error: requirements.txt could not be installed")
    assert not (project / ".venv" / "complete.txt").exists()


def test_the_active_python_is_used_when_it_satisfies_the_minimum(project):
    (project / "pyproject.toml").write_text(PROJECT.format(dependency="pytest>=1.0"))
    assert finished(source(project)) == (str(Path(sys.executable).with_name("python")), "")
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("dependency, extra", [("pytest>=999.0", ()), ("pytest>=1.0", ("--extra", "test"))])
def test_a_version_too_old_and_a_missing_extra_do_not_satisfy_it(project, dependency, extra):
    (project / "pyproject.toml").write_text(PROJECT.format(dependency=dependency))
    venv = project / ".venv"  # as after an installation
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "complete.txt").write_text(f"{project}\n{(project / 'requirements.txt').read_text()}")
    assert finished(source(project, *extra)) == (str(venv / "bin" / "python"), "")


def test_looking_for_a_python_installs_nothing(project):
    assert finished(source(project, "--no-install"))[1] == ""
    assert not (project / ".venv").exists()


def test_the_exact_set_satisfies_the_minimum_versions():
    exact = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.partition(";")[0].strip().split("==")
            exact[name] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minimum = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for need in map(Requirement, minimum):
        assert need.specifier.contains(exact[need.name]), need
