"""Steps: printed, skipped when complete, repeated when something changed, timed, and stopped as asked."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from shared.cli import UserError
from tests.shared.programs import environment
from TorchSSL.steps import Runner, Step, read_history, seconds_by_step


@pytest.fixture
def root(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path


def count(*inputs: str, command: str = "echo x >> runs; touch made") -> Step:
    return Step("count", "Counting", "place", ["bash", "-c", command], output="made", inputs=inputs)


def runs(root) -> int:
    return len((root / "place" / "runs").read_text().split())


def test_a_step_is_run_once_and_again_when_its_command_or_inputs_change(root, capfd):
    (root / "place" / "source").touch()
    for _ in range(2):
        with Runner(root, root / "out") as runner:
            runner.run(count("source"))
    assert runs(root) == 1 and "# complete: made" in capfd.readouterr().out
    later = time.time() + 10
    (root / "place" / "source").touch()
    os.utime(root / "place" / "source", (later, later))
    with Runner(root, root / "out") as runner:
        runner.run(count("source"))
        assert runs(root) == 2
        runner.run(count(command="echo x >> runs; touch made;"))
        assert runs(root) == 3
        (root / "place" / "made").unlink()
        runner.run(count(command="echo x >> runs; touch made;"))
    assert runs(root) == 4


def test_a_dry_run_prints_what_can_be_pasted_and_writes_nothing(root, capfd):
    with Runner(root, root / "out", dry_run=True) as runner:
        runner.run(Step("one", "First", "place", ["touch", "a file"], append_to="log"))
        runner.run(Step("two", "Second", "other", ["touch", "b"]))
    printed = capfd.readouterr().out
    assert printed == "\n# First\ncd place\ntouch 'a file' >> log\n\n# Second\ncd ../other\ntouch b\n"
    assert not (root / "out").exists() and not list((root / "place").iterdir())
    subprocess.run(["bash", "-c", printed], cwd=root, check=True)
    assert all((root / name).exists() for name in ("place/a file", "place/log", "other/b"))


def test_a_failing_step_ends_the_run_with_its_status_and_is_tried_again(root, capfd):
    failing = count(command="echo x >> runs; touch made; exit 3")
    for expected in (1, 2):
        with Runner(root, root / "out") as runner, pytest.raises(SystemExit) as stopped:
            runner.run(failing)
        assert stopped.value.code == 3 and runs(root) == expected
    assert 'stopped in "count" (exit status 3); the same command continues' in capfd.readouterr().err


def test_a_missing_program_is_one_clear_line(root):
    with Runner(root, root / "out") as runner, pytest.raises(UserError, match="no-such-program cannot be started"):
        runner.run(Step("x", "X", "place", ["no-such-program"]))


def test_an_output_that_suffices_needs_no_history(root, capfd):
    (root / "place" / "made").touch()
    step = Step("x", "X", "place", ["false"], output="made", output_suffices=True)
    with Runner(root, root / "out") as runner:
        runner.run(step)
    assert "# complete: made" in capfd.readouterr().out


def test_output_is_appended(root):
    with Runner(root, root / "out") as runner:
        for _ in range(2):
            runner.run(Step("say", "Say", "place", ["echo", "hello"], append_to="new/log"))
    assert (root / "place" / "new" / "log").read_text() == "hello\nhello\n"


SLEEPER = """
import signal, sys, time
def leave(*_):
    open("saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
import os
open("started.part", "w").write(str(os.getpid()))
os.rename("started.part", "started")
time.sleep(60)
"""
PROGRAM = """
import sys
from pathlib import Path
from shared.cli import run_main
from TorchSSL.steps import Runner, Step
root = Path(sys.argv[1])
def main():
    with Runner(root, root / "out") as runner:
        runner.run(Step("sleep", "Sleep", "place", [sys.executable, "-c", sys.argv[2]]))
run_main(main)
"""


def start_sleeper(root) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(root), SLEEPER], env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (root / "place" / "started").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    return process


def test_sigterm_reaches_the_running_command_which_saves(root):
    process = start_sleeper(root)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and (root / "place" / "saved").exists()
    assert err.strip() == 'stopped in "sleep" (exit status 143); the same command continues from here'
    assert [entry["status"] for entry in read_history(root / "out" / "commands.jsonl")] == [143]


def test_nobody_starts_beside_a_command_whose_runner_was_killed(root):
    process = start_sleeper(root)
    child = int((root / "place" / "started").read_text())
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="is in use by a run that is still going on"):
        Runner(root, root / "out")
    os.kill(child, signal.SIGTERM)
    until = time.monotonic() + 60
    while True:
        try:
            with Runner(root, root / "out"):
                break
        except UserError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_seconds_add_up_over_interruptions_and_start_anew_with_another_command(tmp_path):
    path = tmp_path / "commands.jsonl"
    entries = [("a", "old", 9, 0), ("a", "new", 1, 143), ("a", "new", 2, 0), ("a", "new", 4, 0), ("b", "x", 8, 0)]
    lines = [json.dumps(dict(name=n, command=c, seconds=s, status=status)) for n, c, s, status in entries]
    path.write_text("\n".join(lines) + '\n{"name": "cut sho')
    assert seconds_by_step(path) == {"a": 3.0, "b": 8.0}
