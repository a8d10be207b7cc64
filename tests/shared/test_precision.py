"""What is computed in if nothing is asked for, by which kernels, and on what: a result names it."""
import platform
from pathlib import Path

import pytest
import torch

from shared.training.precision import (
    autocast,
    computed_on,
    default_precision,
    has_bf16,
    processor,
    set_arithmetic,
)

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu_that_emulates_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.fixture
def gpu_with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.fixture
def arithmetic_restored():
    before = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32,
              torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
    yield
    (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32,
     torch.backends.cuda.matmul.allow_tf32, deterministic) = before
    torch.use_deterministic_algorithms(deterministic)


def test_bf16_is_the_default_on_gpus_that_have_it(gpu_with_bf16):
    assert default_precision(GPU) == "bf16"
    assert default_precision(GPU, strict=True) == "fp32"


def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(gpu_that_emulates_bf16):
    assert not has_bf16(GPU)
    assert default_precision(GPU) == "fp32"


def test_a_cpu_computes_in_fp32_unless_asked():
    assert default_precision(CPU) == "fp32"
    assert has_bf16(CPU)


@pytest.mark.parametrize("precision, expected", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                                 ("fp16", torch.float16)])
def test_autocast_computes_in_what_it_says(precision, expected):
    with autocast(CPU, precision):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected


def test_strict_is_deterministic_full_fp32_whatever_else_is_said(arithmetic_restored):
    set_arithmetic(strict=True, tf32=True, benchmark=True)
    assert torch.backends.cudnn.deterministic and torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_fast_kernels_keep_what_was_asked_of_fp32(arithmetic_restored):
    set_arithmetic(strict=False, tf32=False)
    assert torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32
    set_arithmetic(strict=False)
    assert torch.backends.cudnn.allow_tf32


def test_the_processor_has_its_name():
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    assert processor() == (named[0] if named else platform.processor() or platform.machine())


def test_a_result_says_device_threads_and_versions():
    found = computed_on(torch.device("cpu"))
    assert found == {"device": "cpu", "hardware": processor(), "threads": torch.get_num_threads(),
                     "torch": torch.__version__, "python": platform.python_version()}
