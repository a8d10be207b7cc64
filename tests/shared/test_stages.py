"""shared/stages.sh: options that a header declares; commands printed, timed, recorded, stopped as asked."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.shared.programs import ROOT, environment, wait_until

SCRIPT = f"""\
#!/usr/bin/env bash
# A program.
#
#   --name WORD     a word
#   --count N       how many [3]
#   --more-args ".." further flags
#   --loud          no value
#   -n, --dry-run   run nothing

set -eo pipefail
root=$(cd "$(dirname "$0")" && pwd) name="" count="" loud="" more_args=""
source "{ROOT}/shared/stages.sh"
fewlabel_python=python
read_options "$0" "$@"
whole_number count 2
split more-args "$more_args"
"""
SHOW = 'printf "%s|" "$name" "$count" "$loud" "$dry_run" "${words[@]}"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("place", "other"):
        (tmp_path / name).mkdir()
    return tmp_path


def start(folder: Path, body: str, *arguments: str) -> subprocess.Popen:
    (folder / "script.sh").write_text(SCRIPT + body)
    return subprocess.Popen(["bash", str(folder / "script.sh"), *arguments], text=True, cwd="/", env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(folder: Path, body: str, *arguments: str, status: int = 0) -> str:
    """Run a script and return what it prints; what it complains about where it fails."""
    process = start(folder, body, *arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    return err if status else out


def test_options(project: Path) -> None:
    found = run(project, SHOW, "--name", "a b", "--count=007", "--loud", "--more-args", "--x='y z' -q \"\"", "-n")
    assert found == "a b|7|1|1|--x=y z|-q||"
    assert run(project, SHOW, "--name=--odd=x") == "--odd=x||||"
    assert "--loud          no value" in run(project, SHOW, "--help") and "set -e" not in run(project, SHOW, "-h")


@pytest.mark.parametrize("arguments, message", [
    (["--nam=x"], 'unknown option --nam=x (did you mean "--name"?); see --help'),
    (["stray"], "unknown option stray; see --help"),
    (["--name"], "--name: expected a value"), (["--name", "--loud"], "--name: expected a value"),
    (["--loud=1"], "--loud takes no value"), (["--count=1"], "--count: expected a whole number of at least 2, got '1'"),
    (["--count=two"], "got 'two'"), (["--count=99999999999999999999"], "expected a whole number"),
    (["--more-args", "--x='y"], "--more-args: cannot be split into flags: --x='y")])
def test_mistakes(project: Path, arguments: list[str], message: str) -> None:
    said = run(project, SHOW, *arguments, status=2)
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_dry_run_prints_what_can_be_pasted_and_writes_nothing(project: Path) -> None:
    body = """
    step one place First
    run touch "a file" "it's \\$HOME" '>>' log
    step two other Second
    run touch b ''
    """
    printed = run(project, body, "--dry-run")
    assert printed == ("\n# First\ncd place\ntouch 'a file' 'it'\"'\"'s $HOME' >> log\n\n"
                       "# Second\ncd ../other\ntouch b ''\n")
    assert not list((project / "place").iterdir())
    subprocess.run(["bash", "-c", printed.replace(" ''", "")], cwd=project, check=True)
    assert all((project / name).exists() for name in ("place/a file", "place/it's $HOME", "place/log", "other/b"))


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "commands.jsonl").read_text().splitlines()]


def test_commands_are_recorded_with_their_time_and_their_output_is_appended(project: Path) -> None:
    body = 'hold "$root/out"; history=$root/out/commands.jsonl; step say place Say; run echo \'a "b\\c"\' ">>" log\n'
    for _ in range(2):
        assert "\n# 0." in run(project, body)
    assert (project / "place" / "log").read_text() == 'a "b\\c"\n' * 2
    entry = history(project)[0]
    assert (entry["name"], entry["status"]) == ("say", 0) and 0 <= entry["seconds"] < 60
    assert entry["command"] == "echo 'a \"b\\c\"' >> log"


def test_a_failing_command_ends_the_script_with_its_status(project: Path) -> None:
    body = 'hold "$root/out"; history=$root/out/commands.jsonl; step x place X; run {}; run touch never\n'
    said = run(project, body.format("bash -c 'exit 3'"), status=3)
    assert said == (f'stopped in "x" (exit status 3); the same command continues from here; '
                    f'log: {project}/out/logs/x.log\n')
    assert "no-such-program" in run(project, body.format("no-such-program"), status=127)
    assert [entry["status"] for entry in history(project)] == [3, 127] and not (project / "place" / "never").exists()


def test_a_folder_that_cannot_be_written_is_refused(project: Path) -> None:
    (project / "out").touch()
    assert run(project, 'hold "$root/out"', status=2).startswith("error: cannot create the folder")


SLEEPER = """
import os, signal, sys, time
def leave(number, _):
    open("saved", "w").close()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    assert signal.getsignal(number) != signal.SIG_IGN
    signal.signal(number, leave)
open("started.part", "w").write(str(os.getpid()))
os.rename("started.part", "started")
while True:
    time.sleep(1)
"""
SLEEP = ('hold "$root/out"; history=$root/out/commands.jsonl\n'
         'step sleep place Sleep; run python sleeper.py; touch never\n')


def start_sleeper(folder: Path) -> tuple[subprocess.Popen, int]:
    (folder / "place" / "sleeper.py").write_text(SLEEPER)
    process = start(folder, SLEEP)
    wait_until((folder / "place" / "started").exists, process)
    return process, int((folder / "place" / "started").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_running_command_which_saves(project: Path, number: int) -> None:
    process, child = start_sleeper(project)
    process.send_signal(number)
    if number == signal.SIGINT:  # the terminal sends it to both
        os.kill(child, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and (project / "place" / "saved").exists()
    assert err.startswith(f'stopped in "sleep" (exit status {128 + number}); the same command continues from here')
    assert [entry["status"] for entry in history(project)] == [128 + number]


def test_nobody_starts_beside_a_command_whose_script_was_killed(project: Path) -> None:
    process, child = start_sleeper(project)
    process.kill()
    process.wait()
    body = 'hold "$root/out"\n'
    assert "is in use by a run that is still going on" in run(project, body, status=2)
    os.kill(child, signal.SIGTERM)
    wait_until(lambda: start(project, body).wait() == 0)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine (.ci/run installs it)")
def test_the_scripts_have_none_of_the_usual_mistakes() -> None:
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("shared/*.sh"), *ROOT.glob("EDM/*.sh"), *ROOT.glob("tests/*.sh")]
    done = subprocess.run(["shellcheck", "--external-sources", "--shell=bash", *scripts], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout
