"""A step of a sampler makes the host wait for no GPU: more steps take no more waits, in all of a run."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ddae import tiny as ddae
from tests.edm.scored_images import write_network
from tests.gpu.measure import HERE, unavailable
from tests.gpu.programs import ROOT

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(unavailable() is not None, reason=f"the null GPU is left out: {unavailable()}")]
SAMPLERS = {
    "EDM/generate.py": ["--network=net.pkl", "--seeds=0-3", "--outdir={}"],
    "EDM/generate.py --sampler=dpmpp-2m": ["--network=net.pkl", "--seeds=0-3", "--outdir=m{}", "--sampler=dpmpp-2m"],
    "DDAE/sample.py": ["--config=tiny.yaml", "--epoch=1", "--images=4"],
}
STEPS = (4, 8, 16)  # the first run fills caches


def test_no_step_waits(tmp_path: Path) -> None:
    write_network(tmp_path / "net.pkl")
    ddae.make_folder(tmp_path, epochs=(1,))
    calls = [{"name": f"{name} {steps}", "folder": str(tmp_path), "script": str(ROOT / name.split()[0]),
              "args": [flag.format(steps) for flag in flags] + [f"--steps={steps}"]}
             for name, flags in SAMPLERS.items() for steps in STEPS]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    subprocess.run([sys.executable, HERE / "nullgpu.py", "--programs", "--root", ROOT, "--json",
                    tmp_path / "result.json", tmp_path / "calls.json"], check=True, capture_output=True, timeout=1200,
                   env={**os.environ, "PYTHONPATH": str(ROOT), "FEWLABEL_CACHE": str(tmp_path / "cache")})
    found = list(json.loads((tmp_path / "result.json").read_text()).values())
    assert [one["status"] for one in found] == [0] * len(calls), [one["error"] for one in found]
    in_all = [0] + [one["whole_run"]["waits"] for one in found]
    waits = [after - before for before, after in zip(in_all, in_all[1:], strict=False)]
    for number, name in enumerate(SAMPLERS):
        few, many = waits[3 * number + 1:3 * number + 3]
        assert few == many, f"{name}: {many - few} more waits in {STEPS[2] - STEPS[1]} more steps"
