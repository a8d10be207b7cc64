"""Batches of photographs by NVIDIA DALI: on the GPU where there is one, on the CPU where not.

DALI decodes, crops, resizes and normalises; which photographs and which crops is said from outside, step by step, so
nothing of it has to be saved to continue a run.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from shared.cli import UserError
from shared.data.image_files import open_image
from shared.data.parallel import one_ahead
from shared.data.photograph_batches import AHEAD, Batch, Request
from shared.data.photographs import MEAN, STD, CentreCrop, Photograph, Photographs, RandomCrop, image_size, looks_whole

Inputs = tuple[list[np.ndarray], ...]


def dali_batches(photographs: Photographs, view: RandomCrop | CentreCrop, request: Callable[[int], Request],
                 steps: range, device: torch.device, workers: int = 4) -> Iterator[Batch]:
    """Do as shared.data.photograph_batches.batches; a pipeline that fails at a photograph is made anew without it."""
    done = 0
    while done < len(steps):
        underway: deque[list[Photograph]] = deque()
        source = inputs(photographs, view, request, steps[done:], underway)
        pipeline = make_pipeline(source, view, len(request(steps[done]).positions), device, workers)
        try:
            while done < len(steps):
                outputs = pipeline.run()
                yield to_torch(outputs, device)
                underway.popleft()
                done += 1
        except RuntimeError as error:
            find_bad(photographs, [one for batch in underway for one in batch], error)


def inputs(photographs: Photographs, view: RandomCrop | CentreCrop, request: Callable[[int], Request], steps: range,
           underway: deque[list[Photograph]]) -> Iterator[Inputs]:
    """Yield what the pipeline takes for each step, read a step ahead; `underway` collects the photographs."""
    def read() -> Iterator[tuple[list[Photograph], Inputs]]:
        for step in steps:
            wanted = request(step)
            # What is cut short is found before DALI meets it, whose threads do not survive that.
            batch = [photographs.checked(int(position)) for position in wanted.positions]
            payloads = [np.frombuffer(one.payload, np.uint8) for one in batch]
            if isinstance(view, CentreCrop):
                labels = [np.array([-1 if one.stands_in else one.label]) for one in batch]
                yield batch, (payloads, labels)
                continue
            windows = [wanted.crops.window(number, *image_size(one.payload)) for number, one in enumerate(batch)]
            yield batch, (payloads, [np.array([one.label]) for one in batch],
                          [np.array(window[:2], np.int32) for window in windows],
                          [np.array(window[2:], np.int32) for window in windows],
                          [np.array(flip, np.int32) for flip in wanted.crops.flip])

    for batch, values in one_ahead(read()):
        underway.append(batch)
        yield values


def make_pipeline(source: Iterator[Inputs], view: RandomCrop | CentreCrop, batch: int, device: torch.device,
                  threads: int) -> Pipeline:
    """Return a pipeline of (images float32 [n, 3, size, size], labels int64 [n, 1]), fed by `source`."""
    gpu = device.type == "cuda"
    number = (device.index or 0) if gpu else None
    decoding, computing = ("mixed", "gpu") if gpu else ("cpu", "cpu")
    pipeline = Pipeline(batch, max(1, threads), number, prefetch_queue_depth=AHEAD)
    with pipeline:
        mirror: object = 0
        if isinstance(view, RandomCrop):
            encoded, labels, start, shape, mirror = fn.external_source(source, num_outputs=5)
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", device=decoding,
                                             output_type=types.RGB, adjust_orientation=False)
            images = fn.resize(images, resize_x=view.size, resize_y=view.size, interp_type=types.INTERP_TRIANGULAR,
                               device=computing)
        else:
            encoded, labels = fn.external_source(source, num_outputs=2)
            images = fn.decoders.image(encoded, device=decoding, output_type=types.RGB, adjust_orientation=False)
            images = fn.resize(images, resize_shorter=view.side, interp_type=types.INTERP_TRIANGULAR, device=computing)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", crop=(view.size, view.size), mirror=mirror,
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD], device=computing)
        pipeline.set_outputs(images, labels)
    pipeline.build()
    return pipeline


def to_torch(outputs: tuple, device: torch.device) -> Batch:
    """Return copies of DALI's buffers, which it will write to again."""
    images, labels = (part.as_tensor() for part in outputs)
    pixels = torch.empty(tuple(images.shape()), dtype=torch.float32, device=device)
    truth = torch.empty(tuple(labels.shape()), dtype=torch.int64)
    feed_ndarray(images, pixels, cuda_stream=torch.cuda.current_stream(device) if device.type == "cuda" else None)
    feed_ndarray(labels, truth)
    return pixels, truth.view(-1).to(device, non_blocking=True)


def find_bad(photographs: Photographs, underway: list[Photograph], error: RuntimeError) -> None:
    """Mark what DALI cannot decode as bad; UserError naming it, or where nothing is found naming DALI's reason."""
    found = False
    for one in underway:
        name = photographs.files.name(one.position)
        if one.position not in photographs.bad and (reason := why_bad(one.payload, name)):
            photographs.mark_bad(one.position, reason)
            found = True
    if not found:
        raise UserError(f"DALI stopped: {' '.join(str(error).split())[:300]}") from error


def why_bad(payload: bytes, name: str) -> str:
    """Return why an image cannot be decoded, or '' where it can."""
    try:
        open_image(payload, name)
    except UserError as error:
        return str(error)
    alone = Pipeline(1, 1, None)
    with alone:
        encoded = fn.external_source([[np.frombuffer(payload, np.uint8)]], num_outputs=None)
        alone.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB))
    try:
        alone.run()
    except RuntimeError:
        return f"{name}: DALI cannot decode it"
    return ""


class Decoder:
    """Decodes lists of image files, on the GPU where there is one. device: where the images are wanted."""

    def __init__(self, device: torch.device, threads: int = 4) -> None:
        self.device, self.threads = device, threads
        self.pipelines: dict[int, Pipeline] = {}

    def __call__(self, payloads: list[bytes], names: list[str]) -> list[torch.Tensor]:
        """Return uint8 [3, H, W] each; UserError naming the first that cannot be decoded."""
        for payload, name in zip(payloads, names, strict=True):
            if not looks_whole(payload):
                open_image(payload, name)
        if len(payloads) not in self.pipelines:
            self.pipelines[len(payloads)] = self._pipeline(len(payloads))
        pipeline = self.pipelines[len(payloads)]
        pipeline.feed_input("encoded", [np.frombuffer(payload, np.uint8) for payload in payloads])
        try:
            images, = pipeline.run()
        except RuntimeError as error:
            reason = next((found for pair in zip(payloads, names, strict=True) if (found := why_bad(*pair))), None)
            raise UserError(reason or f"DALI stopped: {' '.join(str(error).split())[:300]}") from None
        return [self._tensor(images[number]).permute(2, 0, 1) for number in range(len(payloads))]

    def _pipeline(self, batch: int) -> Pipeline:
        gpu = self.device.type == "cuda"
        pipeline = Pipeline(batch, self.threads, (self.device.index or 0) if gpu else None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded")
            pipeline.set_outputs(fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB,
                                                   adjust_orientation=False))
        pipeline.build()
        return pipeline

    def _tensor(self, image: object) -> torch.Tensor:
        """Return a copy of what DALI will write over."""
        pixels = torch.empty(tuple(image.shape()), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        return feed_ndarray(image, pixels, cuda_stream=stream)
