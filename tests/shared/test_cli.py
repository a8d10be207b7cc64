"""Command lines: what wins over what, and what a mistake looks like."""
import math
import subprocess
import sys

import pytest

from shared.cli import (
    Bool,
    Choice,
    Flag,
    Float,
    Int,
    IntList,
    IntTuple,
    Option,
    Text,
    UserError,
    nearest,
    parse,
    read_value,
    run_main,
)
from tests.shared.programs import environment

FLAGS = {
    "training": (
        Option("--lr", Float(0, open=True), 0.03, "learning rate"),
        Option("--num_labels -nl", Int(1), 40, "labelled images", unit="images"),
        Option("--p-mean", Float(), -1.2, "mean"),
        Option("--seed", Int(0), None, "random seed"),
        Option("--res", IntList(1, 64, most=10), None, "resolutions"),
        Option("--steps", IntTuple(0), (400,), "of the decay"),
    ),
    "how": (
        Option("--amp", Bool, False, "half precision"),
        Option("--resume", Flag, False, "continue"),
        Option("-n --dry-run", Flag, False, "do nothing"),
        Option("-j --workers", Int(1), 4, "of 100 %"),
        Option("--optim", Choice("SGD", "AdamW", further=["Lion"]), "SGD", "optimizer"),
        Option("--s_max", Float(0, non_finite=True), math.inf, "largest"),
        Option("--exts", Text, (".png",), "endings", many=True),
        Option("--gpu", Int(0), None, "number", hidden=True),
    ),
}


@pytest.mark.parametrize("line, expected", [
    ("", {"lr": 0.03, "num_labels": 40, "seed": None, "steps": (400,), "resume": False, "s_max": math.inf,
          "exts": [".png"], "given": set()}),
    ("--lr=1 --num_labels 3", {"lr": 1.0, "num_labels": 3, "given": {"lr", "num_labels"}}),
    ("-nl 3 -j8", {"num_labels": 3, "workers": 8}),
    ("--p-mean -1e-3", {"p_mean": -1e-3}),
    ("--res 1,2,5-8", {"res": [1, 2, 5, 6, 7, 8]}),
    ("--steps (1000,)", {"steps": (1000,)}),
    ("--steps []", {"steps": ()}),
    ("--amp=1 --resume -n", {"amp": True, "resume": True, "dry_run": True}),
    ("--amp no --resume False", {"amp": False, "resume": False}),
    ("--s_max inf", {"s_max": math.inf}),
    ("--optim Lion", {"optim": "Lion"}),
    ("--exts .a .b --exts=.c", {"exts": [".a", ".b", ".c"]}),
])
def test_a_command_line(line, expected):
    options = vars(parse("Doc.", FLAGS, line.split()))
    assert {key: options[key] for key in expected} == expected


def test_a_switch_leaves_positional_arguments_alone():
    flags = (Option("src", required=True), Option("dest"), Option("--list", Flag, False))
    for line in ("--list a b", "a --list b", "a b --list"):
        options = parse("Doc.", flags, line.split())
        assert (options.src, options.dest, options.list) == ("a", "b", True)
    assert parse("Doc.", flags, ["a"]).dest is None
    flags = (Option("runs", many=True, required=True), Option("--out"))
    assert parse("Doc.", flags, ["a", "--out=x", "b"]).runs == ["a", "b"]


VALUES = {"nan": "nan", "inf": "inf", "below": "-1", "zero": "0", "beyond": "99999999999999999999", "empty": "",
          "word": "fast"}
ACCEPTED = {
    "--lr": {"beyond"}, "--num_labels": set(), "--p-mean": {"below", "zero", "beyond"}, "--seed": {"zero"},
    "--res": set(), "--steps": {"zero", "empty"}, "--amp": {"zero"}, "--resume": {"zero"}, "--dry-run": {"zero"},
    "--workers": set(), "--optim": set(), "--s_max": {"inf", "zero", "beyond"}, "--exts": {*VALUES}, "--gpu": {"zero"}}


@pytest.mark.parametrize("option", [option for group in FLAGS.values() for option in group], ids=lambda o: o.name)
def test_every_type_refuses_what_lies_outside(option):
    for kind, text in VALUES.items():
        if kind in ACCEPTED[option.name]:
            parse("Doc.", FLAGS, [f"{option.name}={text}"])
            read_value(option, text, "")
            continue
        with pytest.raises(UserError, match=f"^Invalid value for '{option.name}': [^\n]*$"):
            parse("Doc.", FLAGS, [f"{option.name}={text}"])
        with pytest.raises(UserError, match=f"^config.yaml: {option.key}: "):
            read_value(option, text, "config.yaml")


@pytest.mark.parametrize("option, text, message", [
    (Option("--batch", Int(1)), "0", "Invalid value for '--batch': 0 is not in the range x>=1."),
    (Option("--batch", Int(1, 5)), "6", "Invalid value for '--batch': 6 is not in the range 1<=x<=5."),
    (Option("--batch", Int()), "1.5", "Invalid value for '--batch': '1.5' is not a valid integer."),
    (Option("--batch", Int(0)), "99999999999999999999",
     "Invalid value for '--batch': 99999999999999999999 does not fit into 64 bits."),
    (Option("--lr", Float(0, open=True)), "0", "Invalid value for '--lr': 0.0 is not in the range x>0."),
    (Option("--lr", Float(0, 1, open="high")), "1", "Invalid value for '--lr': 1.0 is not in the range 0<=x<1."),
    (Option("--lr", Float()), "nan", "Invalid value for '--lr': nan is not a finite number."),
    (Option("--lr", Float()), "fast", "Invalid value for '--lr': 'fast' is not a valid float."),
    (Option("--arch", Choice("ddpmpp", "adm", further=["own"])), "unet",
     "Invalid value for '--arch': 'unet' is not one of 'ddpmpp', 'adm'."),
    (Option("--arch", Choice("ddpmpp", "adm")), "ddpmp",
     "Invalid value for '--arch': 'ddpmp' is not one of 'ddpmpp', 'adm' (did you mean \"ddpmpp\"?)."),
    (Option("--arch", Choice(*(f"net{i}" for i in range(21)))), "net9x",
     "Invalid value for '--arch': unknown name 'net9x' (did you mean \"net9\"?); expected one like net0, net10, "
     "net20."),
    (Option("--res", IntList(most=10)), "1,5-14", "Invalid value for '--res': '1,5-14' holds more than 10 numbers."),
    (Option("--res", IntList()), "0-999999999999",
     "Invalid value for '--res': '0-999999999999' holds more than 10,000,000 numbers."),
    (Option("--res", IntList()), "5-1",
     "Invalid value for '--res': '5-1' is empty; a range goes from the smaller to the larger number."),
    (Option("--res", IntList()), "1,x", "Invalid value for '--res': '1,x' is not a list like 1,2,5-10."),
    (Option("--path"), "a\0b", "Invalid value for '--path': 'a\\x00b' holds a null character."),
    (Option("--path", required=True), "", "Missing option '--path'; see --help"),
])
def test_messages(option, text, message):
    with pytest.raises(UserError) as error:
        parse("Doc.", (option,), [f"{option.name}={text}"])
    assert str(error.value) == message


@pytest.mark.parametrize("line, message", [
    ("--num_lables 3", 'unknown argument --num_lables (did you mean "--num_labels"?); see --help'),
    ("--lr", "argument --lr: expected one argument; see --help"),
    ("stray", "unknown argument stray; see --help"),
])
def test_a_line_that_is_not_understood(line, message):
    with pytest.raises(UserError) as error:
        parse("Doc.", FLAGS, line.split())
    assert str(error.value) == message


def test_what_is_required():
    with pytest.raises(UserError, match="Missing option '--data'; see --help"):
        parse("Doc.", (Option("--data", required=True),), [])
    with pytest.raises(UserError, match="required: SRC; see --help"):
        parse("Doc.", (Option("src", required=True),), [])


def test_help_shows_unit_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        parse("Train.\n\n    python train.py --lr 1\n", FLAGS, ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "Train.\n\n    python train.py --lr 1\n" in text
    lines = {line.split()[0].rstrip(","): " ".join(line.split())
             for line in text.splitlines() if line.startswith("  -")}
    assert lines["--num_labels"] == "--num_labels, -nl INT labelled images [images; x>=1; default: 40]"
    assert lines["--lr"] == "--lr FLOAT learning rate [x>0; default: 0.03]"
    assert lines["-j"] == "-j, --workers INT of 100 % [x>=1; default: 4]"
    assert lines["--resume"] == "--resume continue"
    assert lines["--optim"] == "--optim SGD|AdamW optimizer [default: SGD]"
    assert "--gpu" not in lines


def test_flags_overrule_the_file_and_the_file_the_defaults(tmp_path):
    file = config(tmp_path, "lr: 1e-3\nnum_labels: 250\namp: yes\nresume: False\ngpu: None\nsteps: [1, 2]\n"
                            "exts: [.a, .b]\np_mean: 2\n")
    options = parse("Doc.", FLAGS, ["--c", file, "--num_labels", "40"], config="--c")
    assert (options.lr, options.num_labels, options.amp, options.resume) == (1e-3, 40, True, False)
    assert (options.gpu, options.steps, options.exts, options.p_mean) == (None, (1, 2), [".a", ".b"], 2.0)
    assert (options.optim, options.c) == ("SGD", file)
    assert options.given == {"c", "lr", "num_labels", "amp", "resume", "gpu", "steps", "exts", "p_mean"}
    assert parse("Doc.", FLAGS, [], config="--c").c is None


@pytest.mark.parametrize("text, message", [
    ("num_lables: 40", 'unknown key "num_lables" (did you mean "num_labels"?)'),
    ("lr: fast", "lr: 'fast' is not a valid float."),
    ("lr: .nan", "lr: nan is not a finite number."),
    ("lr:", "lr: a value is missing."),
    ("lr: [1, 2]", "lr: [1, 2] is not one value."),
    ("num_labels: 2.5", "num_labels: '2.5' is not a valid integer."),
    ("num_labels: True", "num_labels: 'True' is not a valid integer."),
    ("amp: maybe", "amp: 'maybe' is not a valid boolean, such as yes or no."),
    ("optim: Adam", "optim: 'Adam' is not one of 'SGD', 'AdamW' (did you mean \"AdamW\"?)."),
    ("c: other.yaml", 'unknown key "c"'),
    ("- 1", "one `key: value` per line"),
    ("a: !!python/object/apply:os.system ['true']", "is not plain YAML"),
    ("a: [1", "is not plain YAML"),
    (f"lr: 1 # {'x' * 1_000_000}", "is refused, a configuration has at most 1,000,000 characters"),
])
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        parse("Doc.", FLAGS, ["--c", config(tmp_path, text)], config="--c")
    assert message in str(error.value) and "config.yaml" in str(error.value)


@pytest.mark.parametrize("option, value, expected", [
    (Option("SOLVER.STEPS", IntTuple(0), ()), "(1000, 2000)", (1000, 2000)),
    (Option("SOLVER.LR", Float(0), 0.1), "1e-8", 1e-8),
    (Option("SOLVER.LR", Float(0), 0.1), 1, 1.0),
    (Option("STRICT", Bool, False), True, True),
    (Option("MEMO", Text, ""), "", ""),
    (Option("MODEL.NAME", Choice("WRN"), "WRN"), "WRN", "WRN"),
])
def test_a_value_of_a_key(option, value, expected):
    found = read_value(option, value, "")
    assert found == expected and type(found) is type(expected)


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


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


def test_nearest_stays_silent_when_nothing_is_close():
    assert nearest("zebra", ["lr", "momentum"]) == ""


@pytest.mark.parametrize("word, value", [("yes", True), ("T", True), ("1", True), ("on", True), ("No", False),
                                         ("f", False)])
def test_bool_words(word, value):
    assert Bool().convert(word) is value
