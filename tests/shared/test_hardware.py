"""Result files name what they were computed on."""
import platform
from pathlib import Path

import torch

from shared.training import hardware


def test_the_processor_has_its_name():
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    assert hardware.processor() == (named[0] if named else platform.processor() or platform.machine())


def test_a_result_says_device_threads_and_versions():
    found = hardware.computed_on(torch.device("cpu"))
    assert found == {"device": "cpu", "hardware": hardware.processor(), "threads": torch.get_num_threads(),
                     "torch": torch.__version__, "python": platform.python_version()}
