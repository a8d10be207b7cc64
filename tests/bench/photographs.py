"""How many training images a second come out of a record file: NVIDIA DALI told what to crop, DALI alone, Pillow.

    python tests/bench/photographs.py [--images N] [--batch B] [--workers W] [--rec FILE.rec] [--device cpu]

Without --rec, N photographs of 500x375 are made and packed first. "DALI alone" is the published pipeline with its own
reader, shuffle and random crop, which cannot be continued exactly; the other two are those of training here.
"""
from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from sklearn.datasets import load_sample_images

from MetaSemi.imagenet.records import RecordFile, encode_record
from MetaSemi.imagenet.views import Epochs, RandomCrop
from shared.data.photographs import MEAN, STD, Photographs, Request
from shared.data.pool import batches
from shared.training.randomness import numpy_rng


def make(path: Path, images: int) -> None:
    rng, data, index = np.random.default_rng(0), bytearray(), ""
    for number in range(images):
        whole = load_sample_images().images[number % 2]
        top, left = int(rng.integers(whole.shape[0] - 374)), int(rng.integers(whole.shape[1] - 499))
        stream = io.BytesIO()
        Image.fromarray(whole[top:top + 375, left:left + 500]).save(stream, "JPEG", quality=92)
        index += f"{number}\t{len(data)}\n"
        data += b"".join(encode_record(number, [0.0], stream.getvalue(), True))
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(index)


def published(path: Path, batch: int, threads: int, device: torch.device, steps: int) -> Iterator[None]:
    gpu = device.type == "cuda"
    computing = "gpu" if gpu else "cpu"
    pipeline = Pipeline(batch, threads, 0 if gpu else None, seed=12, prefetch_queue_depth=2)
    with pipeline:
        encoded, labels = fn.readers.mxnet(path=[str(path)], index_path=[str(path.with_suffix(".idx"))],
                                           random_shuffle=True)
        images = fn.decoders.image_random_crop(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB,
                                               random_aspect_ratio=[0.8, 1.25], random_area=[0.1, 1.0],
                                               num_attempts=100)
        images = fn.resize(images, resize_x=224, resize_y=224, interp_type=types.INTERP_TRIANGULAR, device=computing)
        images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", crop=(224, 224),
                                          mean=[255 * value for value in MEAN], std=[255 * value for value in STD],
                                          mirror=fn.random.coin_flip(), device=computing)
        pipeline.set_outputs(images, labels)
    pipeline.build()
    for _ in range(steps):
        yield pipeline.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rec", default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, view = torch.device(options.device), RandomCrop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.rec or f"{folder}/x.rec")
        if options.rec is None:
            make(path, options.images)
        pool = Photographs(RecordFile(path), 10 ** 6)
        order = Epochs(len(pool), options.batch, lambda step, what: numpy_rng(0, step, what), "order")

        def ours(decoder: str) -> Iterator:
            def request(step: int) -> Request:
                return Request(order(step), view.draw(options.batch, numpy_rng(0, step, "crops")))

            return batches(pool, view, request, range(options.steps), device, options.workers, decoder)

        ways = {"DALI, told what to crop": lambda: ours("dali"), "Pillow in threads": lambda: ours("torchvision"),
                "DALI alone": lambda: published(path, options.batch, options.workers, device, options.steps)}
        for name, way in ways.items():
            stream = way()
            for _ in range(3):
                next(stream)
            started = time.perf_counter()
            count = sum(1 for _ in stream)
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = count * options.batch / (time.perf_counter() - started)
            print(f"{name:25s} {rate:8.0f} images/s on {device.type}, {options.workers} threads", flush=True)


if __name__ == "__main__":
    main()
