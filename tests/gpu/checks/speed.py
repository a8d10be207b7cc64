"""How fast: steps of FreeMatch and EDM, and sampling, each as the originals do it and as the project does."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import edm_step, freematch_step, sampling_step
from tests.gpu.checks.worker import Place
from TorchSSL.core.networks import WideResNet

SECONDS = 2.0  # of measuring each way
EDM_IMAGES = 512
Step = Callable[[], Any]


def freematch_speed(place: Place) -> dict[str, Any]:
    """FreeMatch with WRN-28-2 on 64 + 448 + 448 images: goal, 195 steps a second."""
    torch.manual_seed(0)
    net = WideResNet(freematch_step.CLASSES)
    images = freematch_step.LABELED + 2 * freematch_step.UNLABELED

    def make(precision: str | None, **how: Any) -> Step:
        own = copy.deepcopy(net).cuda()
        if precision is None:
            return freematch_step.slow_step(own)
        return freematch_step.fast_step(own, precision, "cuda", **how)

    work = flops(make("fp32"))
    ways = {"original fp32": lambda: make(None), "eager fp32": lambda: make("fp32"), "eager bf16": lambda: make("bf16"),
            "eager bf16 NCHW": lambda: make("bf16", layout=torch.contiguous_format)}
    compiled = {"compiled bf16": lambda: make("bf16", compiled=True),
                "compiled fp32": lambda: make("fp32", compiled=True)}
    return race(place, ways, compiled, images, work)


def edm_speed(place: Place) -> dict[str, Any]:
    """EDM with ddpmpp (56M) on 512 CIFAR-sized images: goal, 3,000 images a second."""
    count = 8 if place.null else EDM_IMAGES
    net = edm_step.make_network("ddpmpp", 32 if place.null else None)

    def make(precision: str | None, compile: bool = False) -> Step:
        way, numbers = edm_step.Way(copy.deepcopy(net), count, precision, "cuda"), iter(range(10**9))
        if compile:
            way.net.model.compile()
        return lambda: way.step(next(numbers))

    work = flops(make("fp32"))
    ways = {"original fp32": lambda: make(None), "eager fp32": lambda: make("fp32"), "eager bf16": lambda: make("bf16")}
    return race(place, ways, {"compiled bf16": lambda: make("bf16", True)}, count, work)


def sampling(place: Place) -> dict[str, Any]:
    """Sampling with ddpmpp, 256 images a batch: goal, 4 times the original's way."""
    count = 8 if place.null else 256
    net = sampling_step.make_network(32 if place.null else 128, "cuda")
    ways = {"original fp32": lambda: sampling_step.plain_way(net, count),
            "eager fp32": lambda: sampling_step.our_way(net, count, "fp32", False),
            "eager bf16": lambda: sampling_step.our_way(net, count, "bf16", False)}
    return race(place, ways, {"compiled bf16": lambda: sampling_step.our_way(net, count, "bf16", True)}, count, None,
                graphs=False)


def race(place: Place, ways: dict[str, Callable[[], Step]], compiled: dict[str, Callable[[], Step]], images: int,
         work: float | None, graphs: bool = True) -> dict[str, Any]:
    """Report every way's speed as it is measured; a compiled one that fails is a line and not the end.

    work: floating-point operations of a step. On the null GPU each way takes a step, and nothing is compiled.
    """
    peaks = {} if place.null else {name: product_rate(dtype) for name, dtype in (("fp32", torch.float32),
                                                                                ("bf16", torch.bfloat16))}
    rates: dict[str, float] = {}
    for name, make in ways.items():
        rates[name] = measure(place, name, make, images, work, peaks)
    if not place.null:
        graphed = {f"{name}, CUDA graphs": make for name, make in list(compiled.items())[:1]} if graphs else {}
        for name, make in {**compiled, **graphed}.items():
            torch.compiler.reset()
            inductor.triton.cudagraphs = name in graphed
            try:
                rates[name] = measure(place, name, make, images, work, peaks)
            except Exception as error:  # noqa: BLE001 - the other ways stand
                place.report(way=name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        inductor.triton.cudagraphs = False
    first = next(iter(rates))
    return {} if place.null else {"times the original": {name: round(rate / rates[first], 2)
                                                         for name, rate in rates.items()}}


def measure(place: Place, name: str, make: Callable[[], Step], images: int, work: float | None,
            peaks: dict[str, float]) -> float:
    """Report steps and images a second, the peak of the memory, and the share of what a matrix product reaches here;
    return the steps a second."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(1 if place.null else 12):  # compiles, chooses kernels, records graphs
        step()
    if place.null:
        return 1.0
    torch.cuda.synchronize()
    done, begun = 0, time.perf_counter()
    while done < 5 or time.perf_counter() - begun < SECONDS:
        step()
        done += 1
        if done % 5 == 0:
            torch.cuda.synchronize()  # so that the clock of the host is that of the GPU
    torch.cuda.synchronize()
    rate = done / (time.perf_counter() - begun)
    found = {"steps/s": round(rate, 2), "images/s": round(rate * images),
             "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    if work is not None:
        peak = peaks["bf16" if "bf16" in name else "fp32"]
        found |= {"TFLOP/s": round(work * rate / 1e12, 1), "share of a matrix product": round(work * rate / peak, 3)}
    place.report(way=name, **found)
    return rate


def flops(step: Step) -> float:
    """Return the floating-point operations of products and convolutions in a step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def product_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Return the operations a second that the product of two large matrices reaches."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - begun)
