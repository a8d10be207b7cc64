"""Command lines: what wins over what, and what a mistake looks like."""
import subprocess
import sys

import pytest

from shared.cli import Parser, UserError, nearest, parse_bool, run_main
from tests.shared.programs import environment


def parser() -> Parser:
    p = Parser(prog="freematch.py")
    p.add_argument("--c", type=str, default="")
    p.add_argument("--lr", type=float, default=0.03)
    p.add_argument("--num_labels", "-nl", type=int, default=40)
    p.add_argument("--amp", type=parse_bool, default=False)
    p.add_argument("--resume", action="store_true")
    p.add_argument("--optim", choices=("SGD", "AdamW"), default="SGD")
    p.add_argument("--gpu", type=int, default=None)
    return p


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_beats_file_beats_default(tmp_path):
    file = config(tmp_path, "lr: 1e-3\nnum_labels: 250\namp: yes\nresume: False\ngpu: None\n")
    args = parser().parse_with_yaml(["--c", file, "--num_labels", "40"])
    assert (args.lr, args.num_labels, args.amp, args.resume, args.gpu) == (1e-3, 40, True, False, None)
    assert args.optim == "SGD"
    assert args.given == {"c", "lr", "num_labels", "amp", "resume", "gpu"}


@pytest.mark.parametrize("text, message", [
    ("num_lables: 40", 'unknown key "num_lables" (did you mean "num_labels"?)'),
    ("lr: fast", "lr: expected float, got 'fast'"),
    ("amp: maybe", "amp: expected yes or no, got 'maybe'"),
    ("optim: Adam", "optim: expected one of SGD, AdamW, got 'Adam'"),
    ("- 1", "one `key: value` per line"),
    ("a: !!python/object/apply:os.system ['true']", "is not plain YAML"),
    ("a: [1", "is not plain YAML"),
])
def test_mistakes_in_the_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parser().parse_with_yaml(["--c", config(tmp_path, text)])
    assert message in str(error.value)


@pytest.mark.parametrize("argv, message", [
    (["--num_lables", "3"], 'unknown argument --num_lables (did you mean "--num_labels"?)'),
    (["--lr", "x"], "argument --lr: invalid float value: 'x'"),
    (["--c", "absent.yaml"], "cannot read absent.yaml: No such file"),
])
def test_mistakes_on_the_command_line_are_named(argv, message):
    with pytest.raises(UserError) as error:
        parser().parse_with_yaml(argv)
    assert message in str(error.value)


@pytest.mark.parametrize("error, status, line", [
    (UserError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "error: interrupted\n")])
def test_programs_end_in_one_line(capsys, error, status, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == status and capsys.readouterr().err == line


def test_a_full_disk_ends_in_one_line_whatever_libraries_still_want_to_write():
    code = """
import atexit, sys
from shared.cli import run_main
def main():
    print("all of this is shown")
    atexit.register(print, "and nothing of that", file=sys.stderr)
    raise OSError(28, "No space left on device", "out/x")
run_main(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "all of this is shown\n")
    assert ended.stderr == "error: No space left on device: out/x\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_click_mistakes_end_in_one_line(capsys, monkeypatch):
    import click

    @click.command()
    @click.option("--batch", type=click.IntRange(min=1), default=64)
    def main(batch):
        pass

    monkeypatch.setattr("sys.argv", ["generate.py", "--batch", "0"])
    with pytest.raises(SystemExit) as left:
        run_main(main)
    text = capsys.readouterr().err
    assert left.value.code == 2 and text.startswith("error: ") and "--batch" in text and text.count("\n") == 1


def test_nearest_stays_silent_when_nothing_is_close():
    assert nearest("zebra", ["lr", "momentum"]) == ""


@pytest.mark.parametrize("word, value", [("yes", True), ("T", True), ("1", True), ("on", True), ("No", False),
                                         ("f", False)])
def test_bool_words(word, value):
    assert parse_bool(word) is value
