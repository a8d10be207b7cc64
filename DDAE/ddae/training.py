"""Pre-training of a DDAE: one step, the schedules, the loop (arXiv 2303.09769; EMA warm-up as ema-pytorch has it)."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from DDAE.ddae.batches import Batch
from DDAE.ddae.checkpoints import (
    average_updates,
    averaged_weights,
    find_checkpoint,
    load_optimizer,
    load_weights,
    online_weights,
    read_model,
    write_model,
)
from DDAE.ddae.config import Config, make_diffusion
from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet, use_channels_last
from DDAE.ddae.pictures import write_sheet
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.checkpoint import keep_layout
from shared.training.dropout import set_dropout_keys
from shared.training.ema import EMA
from shared.training.files import atomic, make_dir
from shared.training.hardware import computed_on
from shared.training.precision import autocast
from shared.training.randomness import torch_rng
from shared.training.log import Log
from shared.training.run import Run

PREVIEW_EPOCHS = 100   # between two previews and checkpoints
PREVIEW_COLUMNS = 10
MAX_NORM = 1.0         # of the gradient
EMA_POWER = 2 / 3
# What may change between two starts of a run.
FREE_KEYS = ("n_epoch", "n_sample", "save_model", "save_dir", "linear", "classes", "steps", "checkpoint_seconds",
             "compile", "device")


@dataclass(frozen=True)
class Settings:
    """What a command line says beyond the config.

    gpus: processes that batch_size and lrate are multiplied by. precision: fp32, bf16 or fp16. strict: the published
    arithmetic. compile: of the network. constant_ema: no warm-up of the average. steps: end after so many, None: the
    config's epochs. checkpoint_seconds: between two checkpoints to continue from. log_every: steps.
    """

    gpus: int = 1
    precision: str = "fp32"
    strict: bool = False
    compile: bool = False
    seed: int = 1337
    constant_ema: bool = False
    steps: int | None = None
    checkpoint_seconds: float = 600.0
    log_every: int = 50


class Batches(Protocol):
    """Serves the global batch of a step, this process's part of it."""

    per_epoch: int

    def __call__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Draws:
    """Random numbers of a step for this process's n images. level: [n], of the diffusion model. noise: [n, C, H, W].
    augment: parameters of the augmentation or None."""

    level: torch.Tensor
    noise: torch.Tensor
    augment: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------------------- one step

def learning_rate(config: Config, epoch: int, gpus: int) -> float:
    """Return the rate of an epoch (from 0): it rises over warm_epoch epochs to lrate·gpus, and stays."""
    return config.lrate * gpus * min((epoch + 1) / config.warm_epoch, 1)


def average_decay(update: int, ema: float) -> float:
    """Return the decay of the average at its k-th update (k from 1): min(1 - k^(-2/3), ema); the first one copies."""
    return min(1 - update ** -EMA_POWER, ema)


def draw(diffusion: DDPM | EDM, batch: Batch, seed: int, step: int) -> Draws:
    """Draw for the whole global batch and return this process's part, so that the number of processes is no matter."""
    device = batch.images.device
    level = diffusion.draw(batch.count, torch_rng(seed, step, "level", device))[batch.part]
    parameters = None
    if diffusion.augment is not None:
        parameters = diffusion.augment.draw(batch.count, torch_rng(seed, step, "augmentation", device))[batch.part]
    return Draws(level, batch.noise(seed, step, "noise"), parameters)


def training_step(model: torch.nn.Module, diffusion: DDPM | EDM, optimizer: torch.optim.Optimizer, ema: EMA,
                  batch: Batch, draws: Draws, *, seed: int, step: int, lr: float, decay: float, at_once: int,
                  processes: int = 1, precision: str = "fp32", scaler: torch.amp.GradScaler | None = None,
                  fast: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Do one step; return the loss, of which the mean over processes is that of the global batch, and the gradient's
    norm before it is clipped.

    model: the network, alone or in DistributedDataParallel. at_once: most images in one pass; gradients of several
    passes add up. decay: of the average. processes: among which the batch is shared.
    """
    net, device = distributed.unwrap(model), batch.images.device
    count = len(batch.images)
    total = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, count, at_once):
        here = slice(start, min(start + at_once, count))
        places = range(batch.part.start + here.start, batch.part.start + here.stop)
        set_dropout_keys(net, seed, step, places)
        images, labels = 2 * batch.images[here] - 1, None
        if diffusion.augment is not None and draws.augment is not None:
            images, labels = diffusion.augment.apply(images, draws.augment[here])
        # Gradients travel between processes in the last pass only.
        waits = here.stop < count and model is not net
        with model.no_sync() if waits else contextlib.nullcontext():
            with autocast(device, precision):
                loss = diffusion.loss(model, images, draws.level[here], draws.noise[here], labels)
            # Gradients are averaged over processes, whose parts of the batch may differ in size.
            part = loss * (len(places) * processes / batch.count)
            (part if scaler is None else scaler.scale(part)).backward()
        total += part.detach()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM, foreach=fast)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    ema.update(net, decay)
    return total, norm


# --------------------------------------------------------------------------------------------------------- the loop

def make_optimizer(config: Config, net: torch.nn.Module, strict: bool) -> torch.optim.Optimizer:
    """Return Adam, or the config's AdamW; fused unless `strict`. Raises UserError for unknown optim_args."""
    fast = {"foreach": False} if strict else {"fused": True}
    if config.optim is None:
        return torch.optim.Adam(net.parameters(), lr=config.lrate, **fast)
    try:
        optimizer = torch.optim.AdamW(net.parameters(), **{"lr": config.lrate, **config.optim_args}, **fast)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config.source}: optim_args: {error}") from None
    return optimizer


def train(config: Config, net: UNet, batches: Batches, world: World, settings: Settings,
          draw: Callable[[DDPM | EDM, Batch, int, int], Draws] = draw) -> None:
    """Train `net` (with its initial weights) as the config says, and leave the published files in config.save_dir.

    Continues from the folder's checkpoint.pt if there is one, else from the config's load_epoch.
    """
    folder, device, fast = Path(config.save_dir), world.device, not settings.strict
    diffusion = make_diffusion(config)
    net.to(device).train()
    if fast:
        use_channels_last(net)
        if device.type == "cpu":
            keep_freed_memory()
    ema = EMA(net, buffers="keep")
    optimizer = make_optimizer(config, net, settings.strict)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    keep: dict[str, Any] = dict(net=net, ema=ema, optimizer=optimizer)
    scaler = torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None
    if scaler is not None:
        keep["scaler"] = scaler
    recorded = {**config.to_dict(), "gpus": settings.gpus, "precision": settings.precision, "strict": settings.strict,
                "seed": settings.seed, "constant_ema": settings.constant_ema}
    log = Log(folder, world, every=settings.log_every, image_batch=config.batch_size * settings.gpus)
    run = Run(folder, recorded, keep, world, log=log, ignore=FREE_KEYS, restart=config.load_epoch >= 0,
              save_seconds=settings.checkpoint_seconds)
    if run.resumed_from is None:
        run.state["first_update"] = 0
        if config.load_epoch >= 0:
            run.step = (config.load_epoch + 1) * batches.per_epoch
            run.state["first_update"] = load_epoch(config, net, ema, optimizer, run) - run.step
    model = distributed.data_parallel(net, world)
    if settings.compile:
        net.compile()

    total = config.n_epoch * batches.per_epoch
    last = total if settings.steps is None else min(total, settings.steps)
    for step in run.steps(last):
        epoch, place = divmod(step, batches.per_epoch)
        lr = learning_rate(config, epoch, settings.gpus)
        if place == 0:
            run.log.print(f"epoch {epoch}, lr {lr:f}")
        update = step + 1 + run.state["first_update"]
        decay = config.ema if settings.constant_ema and update > 1 else average_decay(update, config.ema)
        batch = batches(step)
        loss, norm = training_step(model, diffusion, optimizer, ema, batch, draw(diffusion, batch, settings.seed, step),
                                   seed=settings.seed, step=step, lr=lr, decay=decay, at_once=config.batch_size,
                                   processes=world.size, precision=settings.precision, scaler=scaler, fast=fast)
        run.log.add(loss=loss, gradient_norm=norm, lr=lr)
        last_of_epoch = place == batches.per_epoch - 1
        if last_of_epoch and (epoch % PREVIEW_EPOCHS == 0 or epoch == config.n_epoch - 1):
            if world.main:
                end_epoch(config, diffusion, net, ema, optimizer, batch, update, epoch, settings, run)
            distributed.barrier(world)
        elif step + 1 == last < total and world.main:
            save_epoch(config, net, ema, optimizer, update, epoch, run)
    if world.main:
        write_result(run, config, batches, settings)


def write_result(run: Run, config: Config, batches: Batches, settings: Settings) -> None:
    """Write result.json: what the run was, and what it took."""
    content = dict(config=config.source, seed=settings.seed, iterations=run.step, epochs=run.step / batches.per_epoch,
                   gpus=settings.gpus, precision=settings.precision, seconds=round(run.seconds, 1),
                   processes=run.world.size, **computed_on(run.world.device))
    with atomic(run.outdir / "result.json", "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    run.log.print(f"Done: {run.outdir}")


def load_epoch(config: Config, net: UNet, ema: EMA, optimizer: torch.optim.Optimizer, run: Run) -> int:
    """Load the checkpoint of config.load_epoch, ours or published; return how often its average was updated."""
    path, _ = find_checkpoint(config, config.load_epoch)
    content = read_model(path, config)
    load_weights(net, online_weights(content, path), path)
    load_weights(ema.module, averaged_weights(content, path), path)
    load_optimizer(optimizer, content, path)
    run.log.print(f"loading model at {path}")
    return average_updates(content)


def end_epoch(config: Config, diffusion: DDPM | EDM, net: UNet, ema: EMA, optimizer: torch.optim.Optimizer,
              batch: Batch, update: int, epoch: int, settings: Settings, run: Run) -> None:
    """Write the checkpoint of an epoch, then a sheet of samples and of training images."""
    save_epoch(config, net, ema, optimizer, update, epoch, run)
    images = torch.cat([preview(config, diffusion, ema.module, epoch, settings.seed, batch.images.device),
                        batch.images[:config.n_sample]])
    path = Path(config.save_dir) / "visual" / f"image_ep{epoch}_ema.png"
    write_sheet(path, images, PREVIEW_COLUMNS)
    run.log.print(f"saved image at {path}")


def save_epoch(config: Config, net: UNet, ema: EMA, optimizer: torch.optim.Optimizer, update: int, epoch: int,
               run: Run) -> None:
    """Write the checkpoint of an epoch, where the config wants any."""
    if config.save_model:
        path = make_dir(Path(config.save_dir) / "ckpts") / f"model_{epoch}.pth"
        write_model(path, net, ema.module, update, optimizer, config, epoch)
        run.log.print(f"saved model at {path}")


def preview(config: Config, diffusion: DDPM | EDM, net: UNet, epoch: int, seed: int, device: torch.device
            ) -> torch.Tensor:
    """Return n_sample images of the averaged network by the deterministic sampler, float32 in about [0, 1]."""
    latents = torch.randn([config.n_sample, *net.image_shape], generator=torch_rng(seed, epoch, "preview"))
    return diffusion.sample(net, latents.to(device), _no_noise).float()


def _no_noise(step: int) -> torch.Tensor:
    raise RuntimeError("the deterministic sampler asked for noise")


def describe(net: UNet, run_print: Callable[[str], None]) -> None:
    """Print the published lines about a network."""
    from DDAE.ddae.model import attention_heads

    for heads, channels in attention_heads(net):
        run_print(f"{heads} heads, {channels} channels per head")
    run_print(f"nn model # params: {sum(p.numel() for p in net.parameters()) / 1e6:.1f}")
