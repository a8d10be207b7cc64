"""SLURM's programs for tests, on this machine: `fake_slurm.py sbatch|srun|sacct|scontrol ...`.

State lies in $FAKE_SLURM: <id>.sh the script, <id>.batch and <id>.step process groups, <id>.state.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

STATE = Path(os.environ["FAKE_SLURM"])
WATCH = 'bash "$1.sh" && echo COMPLETED >"$1.state" || echo FAILED >"$1.state"'


def start(job: str) -> None:
    """Run the script of a job in the background."""
    (STATE / f"{job}.state").write_text("RUNNING")
    batch = subprocess.Popen(["bash", "-c", WATCH, "watch", str(STATE / job)], start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env={**os.environ, "SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    (STATE / f"{job}.batch").write_text(str(batch.pid))


def tell(job: str, kind: str, number: int) -> None:
    """Send a signal to all processes of a job's script ("batch") or of its step."""
    with suppress(ProcessLookupError):
        os.killpg(int((STATE / f"{job}.{kind}").read_text()), number)


def step(words: list[str]) -> int:
    """Do what srun does: run the command, its output in files."""
    files, job = {}, os.environ["SLURM_JOB_ID"]
    while words[0].startswith("--"):
        flag = words.pop(0)
        if flag in ("--output", "--error"):
            files[flag] = words.pop(0).replace("%j", job).replace("%t", "0")
    with open(files["--output"], "a") as output, open(files["--error"], "a") as error:
        process = subprocess.Popen(words, stdout=output, stderr=error, start_new_session=True)
        (STATE / f"{job}.step").write_text(str(process.pid))
        return process.wait()


def main() -> int:
    program, *words = sys.argv[1:]
    if program == "sbatch":
        job = str(1 + len(list(STATE.glob("*.sh"))))
        (STATE / f"{job}.sh").write_bytes(Path(words[0]).read_bytes())
        start(job)
        print(f"Submitted batch job {job}")
    elif program == "srun":
        return step(words)
    elif program == "sacct":
        print("JobID|State|NodeList")
        for path in STATE.glob("*.state"):
            print(f"{path.stem}|{path.read_text().strip()}|here")
    elif program == "scontrol":  # requeue <job>: in a session of its own, or it would end itself
        subprocess.Popen([sys.executable, __file__, "restart", words[1]], start_new_session=True)
    elif program == "restart":
        for kind in ("batch", "step"):
            tell(words[0], kind, signal.SIGTERM)
        start(words[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
