"""What the small-data scripts leave behind: files, TensorBoard scalars, keys of checkpoints."""
from __future__ import annotations

import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

from MetaSemi import train_baseline, train_meta
from tests.golden.metasemi_cases import cases_of, each_key, section

FACTS = {name: listed for name, listed in section("output_facts").items() if "imagenet" not in name}
SERVES = {("output_facts", name) for name in FACTS}
TINY = ("--dataset=digits -a=small --num-label=10 --batch-size=4 --total-steps=3 --test-freq=2 --warmup=2 "
        "--print-freq=1").split()
SCRIPTS = {"train_meta": train_meta, "train_baseline": train_baseline}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """One run of each script, with mix-up and without."""
    folders, before = {}, sys.argv
    for name, script in SCRIPTS.items():
        for mix_up in (False, True):
            folders[name, mix_up] = tmp_path_factory.mktemp(name)
            sys.argv = [f"{name}.py", *TINY, f"--save-path={folders[name, mix_up]}", *["--mix-up"] * mix_up]
            script.main()
    sys.argv = before
    return folders


def tags(folder: Path) -> set[str]:
    """Return the names of all scalars in the event files directly in `folder`."""
    found = set()
    for file in folder.glob("events.out.tfevents.*"):
        data = file.read_bytes()
        place = 0
        while place < len(data):  # a record: length, checksum, content, checksum
            length = int.from_bytes(data[place:place + 8], "little")
            event = Event.FromString(data[place + 12:place + 12 + length])
            found |= {value.tag for value in event.summary.value}
            place += 16 + length
    return found


def known_script(name: str, ending: str) -> str:
    script = name.removesuffix(ending)
    assert script in SCRIPTS, f"{name}: no script of that name"
    return script


@each_key(name for name in FACTS if name.endswith("_files"))
def test_files(name: str, runs: dict[tuple[str, bool], Path]) -> None:
    for mix_up in (False, True):
        written = [path.name for path in runs[known_script(name, "_files"), mix_up].iterdir()]
        for wanted in FACTS[name]:
            pattern = re.sub(r"<\w+>", "[^/]+", wanted.replace(".", r"\."))
            assert any(re.fullmatch(pattern, file) for file in written), wanted


@each_key(name for name in FACTS if name.endswith("_scalar_tags"))
def test_scalar_tags(name: str, runs: dict[tuple[str, bool], Path]) -> None:
    for mix_up in (False, True):
        wanted = {tag.partition(" ")[0] for tag in FACTS[name] if mix_up or "mix-up only" not in tag}
        assert tags(runs[known_script(name, "_scalar_tags"), mix_up]) == wanted


@each_key(name for name in FACTS if name.startswith("checkpoint_keys"))
def test_checkpoint_keys(name: str, runs: dict[tuple[str, bool], Path]) -> None:
    wanted = {entry.partition(" ")[0] for entry in FACTS[name]}
    types = {"int": int, "float": float, "OrderedDict": OrderedDict, "dict": dict}
    listed = [case["checkpoint_keys"] for case in cases_of("training", "checkpoint_keys")][:1]
    assert all(set(kinds) == wanted for kinds in listed)
    for folder in runs.values():
        for file in ("checkpoint.pth", "model_best.pth"):
            content = torch.load(folder / file, weights_only=True)
            assert wanted <= set(content), file
            for key, kind in (pair for kinds in listed for pair in kinds.items()):
                assert isinstance(content[key], types[kind]), key


def test_every_fact_has_its_kind() -> None:
    assert [name for name in FACTS if not name.endswith(("_files", "_scalar_tags"))
            and not name.startswith("checkpoint_keys")] == []
