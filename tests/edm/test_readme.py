"""EDM/README.md: its commands exist, its job script saves ahead of the limit and goes on."""
from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from shared.report import tables
from tests.edm.training_runs import TINY, write_set
from tests.shared.programs import ROOT, environment, help_flags, wait_until

TEXT = (ROOT / "EDM/README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
SCRIPTS = ("train", "generate", "fid", "example", "convert")


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, arguments) of every command in the README."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        match = re.search(rf"(?:EDM\.|\s)({'|'.join(SCRIPTS)})(?:\.py)? (.*)", line.partition("#")[0])
        if match and "$@" not in line:
            found.append((match[1], shlex.split(match[2])))
    return found


def test_the_readme_has_commands_of_every_script() -> None:
    assert {script for script, _ in commands()} == set(SCRIPTS)


def test_flags_in_the_text_exist() -> None:
    known = help_flags(lambda argv: tables.main("EDM.tables", {}, argv=argv))
    known |= {"--max-restarts", "--signals-to-handle"}  # torchrun's
    for script in SCRIPTS:
        main = importlib.import_module(f"EDM.{script}").main
        for command in (["calc"], ["ref"]) if script == "fid" else ([],):
            known |= help_flags(lambda argv, main=main, command=command: main([*command, *argv]))
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    unknown = {flag for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", prose) if flag not in known}
    assert not unknown - {"--help"}


def test_job_script_saves_ahead_of_the_limit_and_goes_on(tmp_path: Path) -> None:
    """SLURM's commands are stand-ins; what is started and signalled through them is real."""
    script = next(block for block in BLOCKS if block.startswith("#!/bin/bash"))
    assert len(script.splitlines()) <= 20
    # A free port for the test; 29500 is free on a node that SLURM hands out.
    (tmp_path / "train.sh").write_text(script.replace(":29500", ":0"))
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", 'exec "$@"'), ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"'),
                          ("scontrol", f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    write_set(tmp_path / "tiny.zip")
    arguments = [f"--outdir={tmp_path}/runs", f"--data={tmp_path}/tiny.zip", *TINY, "--duration=1"]
    for processes, step in (("2", 0), ("1", 1)):  # queued again with fewer GPUs
        job = subprocess.Popen(
            ["bash", tmp_path / "train.sh", *arguments], cwd=ROOT / "EDM", stdout=(tmp_path / "out").open("w"),
            stderr=subprocess.STDOUT, env=environment(
                PATH=f"{tmp_path}/bin:{os.environ['PATH']}", SLURM_JOB_NODELIST="here", SLURM_NNODES="1",
                SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE=processes, FEWLABEL_CACHE=str(tmp_path / "cache")))
        wait_until(lambda: re.search(r"^tick [1-9]", (tmp_path / "out").read_text(), re.MULTILINE), job)
        job.send_signal(signal.SIGUSR1)
        job.wait(60)
        out = (tmp_path / "out").read_text()
        assert "stopped by SIGUSR1" in out
        assert ("continuing at step" in out) == bool(step)
        assert (tmp_path / "requeued").read_text() == "requeue 7\n" * (step + 1)
    assert len(list((tmp_path / "runs").iterdir())) == 1
