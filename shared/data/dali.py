"""NVIDIA DALI: photographs decoded, cropped, resized and normalised, on the GPU if available.

The caller chooses photographs and crops step by step, so a run continues without any saved state of the loader.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from shared.cli import UserError
from shared.data.images import open_image
from shared.data.photographs import MEAN, STD, Photograph, Photographs, Request, View, for_dali, image_size
from shared.parallel import one_ahead

Inputs = tuple[list[np.ndarray], ...]


def dali_batches(photographs: Photographs, view: View, request: Callable[[int], Request], steps: range,
                 device: torch.device, workers: int, ahead: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Do as shared.data.pool.batches; a pipeline that fails at a photograph is made anew without it."""
    done = 0
    while done < len(steps):
        underway: deque[list[Photograph]] = deque()
        source = _inputs(photographs, view, request, steps[done:], underway)
        count = len(request(steps[done]).positions)
        pipeline = _view_pipeline(source, view, Pipeline(count, max(1, workers), _number(device),
                                                         prefetch_queue_depth=ahead), device)
        try:
            while done < len(steps):
                images, labels = (part.as_tensor() for part in pipeline.run())
                truth = _to_torch(labels, torch.int64, torch.device("cpu")).view(-1)
                yield _to_torch(images, torch.float32, device), truth.to(device, non_blocking=True)
                underway.popleft()
                done += 1
        except RuntimeError as error:
            _find_bad(photographs, [one for batch in underway for one in batch], error)


def _inputs(photographs: Photographs, view: View, request: Callable[[int], Request], steps: range,
            underway: deque[list[Photograph]]) -> Iterator[Inputs]:
    """Yield the pipeline's input for each step, read a step ahead; `underway` collects the photographs."""
    def read() -> Iterator[tuple[list[Photograph], Inputs]]:
        for step in steps:
            wanted = request(step)
            # Truncated files are found first, since DALI's threads do not survive them.
            encoded, batch = map(list, zip(*(photographs.get(int(position), for_dali)
                                             for position in wanted.positions), strict=True))
            payloads = [np.frombuffer(one, np.uint8) for one in encoded]
            if wanted.crops is None:
                yield batch, (payloads, [np.array([-1 if one.stands_in else one.label]) for one in batch])
                continue
            windows = [wanted.crops.window(number, *image_size(one)) for number, one in enumerate(encoded)]
            yield batch, (payloads, [np.array([one.label]) for one in batch],
                          [np.array(window[:2], np.int32) for window in windows],
                          [np.array(window[2:], np.int32) for window in windows],
                          [np.array(flip, np.int32) for flip in wanted.crops.flip])

    for batch, values in one_ahead(read()):
        underway.append(batch)
        yield values


def _view_pipeline(source: Iterator[Inputs], view: View, pipeline: Pipeline, device: torch.device) -> Pipeline:
    """Let the pipeline make (images float32 [n, 3, size, size], labels int64 [n, 1]) of what `source` yields."""
    decoding, computing = ("mixed", "gpu") if device.type == "cuda" else ("cpu", "cpu")
    how = dict(device=decoding, output_type=types.RGB, adjust_orientation=False)
    with pipeline:
        if view.side is None:
            encoded, labels, start, shape, mirror = fn.external_source(source, num_outputs=5)
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW", **how)
            sides = dict(resize_x=view.size, resize_y=view.size)
        else:
            encoded, labels = fn.external_source(source, num_outputs=2)
            images, mirror = fn.decoders.image(encoded, **how), 0
            sides = dict(resize_shorter=view.side)
        images = fn.resize(images, interp_type=types.INTERP_TRIANGULAR, device=computing, **sides)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", crop=(view.size, view.size), mirror=mirror,
            mean=[255 * value for value in MEAN], std=[255 * value for value in STD], device=computing)
        pipeline.set_outputs(images, labels)
    pipeline.build()
    return pipeline


def _number(device: torch.device) -> int | None:
    return (device.index or 0) if device.type == "cuda" else None


def _to_torch(values: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a copy of a buffer of DALI, which it will write to again."""
    copy = torch.empty(tuple(values.shape()), dtype=dtype, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return feed_ndarray(values, copy, cuda_stream=stream)


def _find_bad(photographs: Photographs, underway: list[Photograph], error: RuntimeError) -> None:
    """Mark undecodable photographs as bad; UserError naming one, or with DALI's reason if none is found."""
    found = False
    for one in underway:
        if one.position not in photographs.bad and (reason := _why_bad(one.payload,
                                                                       photographs.files.name(one.position))):
            photographs.mark_bad(one.position, reason)
            found = True
    if not found:
        raise _stopped(error) from error


def _stopped(error: RuntimeError) -> UserError:
    return UserError(f"DALI stopped: {' '.join(str(error).split())[:300]}")


def _why_bad(payload: bytes, name: str) -> str:
    """Return why an image cannot be decoded, or '' if it can."""
    try:
        open_image(payload, name)
        payload = for_dali(payload, name)
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
    """Decodes lists of image files, on the GPU if available. device: of the returned images."""

    def __init__(self, device: torch.device, threads: int = 4) -> None:
        self.device, self.threads = device, threads
        self.pipelines: dict[int, Pipeline] = {}  # by batch size

    def __call__(self, payloads: list[bytes], names: list[str]) -> list[torch.Tensor]:
        """Return uint8 [3, H, W] each; UserError naming the first that cannot be decoded."""
        payloads = [for_dali(payload, name) for payload, name in zip(payloads, names, strict=True)]
        if len(payloads) not in self.pipelines:
            self.pipelines[len(payloads)] = self._pipeline(len(payloads))
        pipeline = self.pipelines[len(payloads)]
        pipeline.feed_input("encoded", [np.frombuffer(payload, np.uint8) for payload in payloads])
        try:
            images, = pipeline.run()
        except RuntimeError as error:
            reason = next((found for pair in zip(payloads, names, strict=True) if (found := _why_bad(*pair))), None)
            raise (UserError(reason) if reason else _stopped(error)) from None
        return [_to_torch(images[number], torch.uint8, self.device).permute(2, 0, 1)
                for number in range(len(payloads))]

    def _pipeline(self, batch: int) -> Pipeline:
        pipeline = Pipeline(batch, self.threads, _number(self.device), prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded")
            pipeline.set_outputs(fn.decoders.image(encoded, device="mixed" if self.device.type == "cuda" else "cpu",
                                                   output_type=types.RGB, adjust_orientation=False))
        pipeline.build()
        return pipeline
