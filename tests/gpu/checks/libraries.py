"""What is installed, and that NCCL and DALI do what their stand-ins do."""
from __future__ import annotations

import io
import re
import subprocess
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from shared.training.batchnorm import GlobalBatchNorm, gather_rows, sum_ranks
from shared.training.precision import commit
from tests.gpu.checks.worker import LeftOut, Place, is_there
from tests.gpu.programs import ROOT

IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "torch-fidelity": "torch_fidelity",
               "nvidia-dali-cuda130": "nvidia.dali", "pytest-xdist": "xdist", "tensorboardx": "tensorboardX"}


def versions(place: Place) -> dict[str, Any]:
    """The hardware, the versions, and which packages of the project are missing."""
    properties = torch.cuda.get_device_properties(0)
    found = {"commit": commit(), "gpu": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1),
             "driver": driver(), "torch": torch.__version__, "cuda": torch.version.cuda,
             "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    if not place.null:
        found |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [name[0].lower() for line in lines if (name := re.match(r"[A-Za-z0-9_.-]+", line))]
    return {**found, "missing": [name for name in names if not is_there(IMPORTED_AS.get(name, name.replace("-", "_")))]}


def driver() -> str:
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                              capture_output=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def nccl(place: Place) -> dict[str, Any]:
    """One rank on NCCL: collectives of the project, and its batch norm against PyTorch's."""
    if place.null:
        raise LeftOut("NCCL is not on the null GPU; two pretended ranks are in tests/gpu/test_waits.py")
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    try:
        row = torch.arange(8.0, device="cuda")
        place.check(torch.equal(gather_rows(row, 1)[0], row) and torch.equal(sum_ranks(row), row), "collectives")
        worst = {}
        for dtype in (torch.float32, torch.bfloat16):
            plain = torch.nn.BatchNorm2d(16).cuda()
            ours = GlobalBatchNorm.take_over(torch.nn.BatchNorm2d(16).cuda())
            inputs = [torch.randn(32, 16, 8, 8, device="cuda").to(dtype)] * 2
            inputs = [value.clone().requires_grad_() for value in inputs]
            outputs = [net(value) for net, value in zip((plain, ours), inputs, strict=True)]
            for output in outputs:
                output.float().square().mul(torch.arange(8.0, device="cuda")).sum().backward()
            apart = [(outputs[0] - outputs[1]), (inputs[0].grad - inputs[1].grad),
                     plain.running_mean - ours.running_mean, plain.running_var - ours.running_var]
            worst[str(dtype)] = max(float(value.abs().max()) for value in apart)
        place.check(worst["torch.float32"] < 1e-3, f"batch norms differ: {worst}")
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4).cuda(), device_ids=[0])
        net(torch.randn(2, 4, device="cuda")).sum().backward()
    finally:
        dist.destroy_process_group()
    return {"largest difference": worst}


def dali(place: Place) -> dict[str, Any]:
    """JPEGs decoded by DALI on the GPU against torchvision's decoder: grey levels apart, and images a second."""
    if place.null:
        raise LeftOut("DALI does not run on the null GPU")
    from torchvision.io import ImageReadMode, decode_jpeg

    from shared.data.dali import Decoder

    payloads = [photograph(seed) for seed in range(64)]
    names = [f"{number}.jpg" for number in range(64)]
    theirs = [decode_jpeg(torch.frombuffer(bytearray(one), dtype=torch.uint8), ImageReadMode.RGB) for one in payloads]
    decoder = Decoder(torch.device("cuda"))
    ours = decoder(payloads, names)
    apart = [float((a.cpu().float() - b.float()).abs().mean()) for a, b in zip(ours, theirs, strict=True)]
    place.check(max(apart) < 2, f"{max(apart):.2f} grey levels apart in the mean of an image")
    begun = time.perf_counter()
    for _ in range(10):
        decoder(payloads, names)
    torch.cuda.synchronize()
    return {"grey levels apart": round(max(apart), 3), "images/s": round(640 / (time.perf_counter() - begun))}


def photograph(seed: int) -> bytes:
    """Return a JPEG of 300 x 400 pixels of smooth colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()
