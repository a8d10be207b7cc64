"""Pre-training of a DDAE: schedules, loop and files (arXiv 2303.09769; EMA warm-up as ema-pytorch has it)."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from DDAE.ddae import checkpoints
from DDAE.ddae.checkpoints import load_weights, write_model
from DDAE.ddae.config import Config, make_diffusion
from DDAE.ddae.data import Batch, TrainBatches
from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet, use_channels_last
from DDAE.ddae.sampling import write_sheet
from shared import distributed
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.checkpoint import keep_layout, load_newest
from shared.training.ema import EMA
from shared.training.files import make_dir, write_json
from shared.training.log import Log
from shared.training.precision import autocast, compiles, computed_on
from shared.training.randomness import set_dropout_keys, torch_rng
from shared.training.run import Run

PREVIEW_EPOCHS = 100   # between two previews and checkpoints
PREVIEW_COLUMNS = 10
MAX_NORM = 1.0         # of the gradient
EMA_POWER = 2 / 3
# Settings that may change between two starts of a run.
FREE_KEYS = ("n_epoch", "n_sample", "save_model", "save_dir", "linear", "classes")


@dataclass(frozen=True)
class Draws:
    """Random numbers of a step for n images: levels [n], noise [n, C, H, W], parameters [n, ...] of the augmentation
    and its margins of the global batch, or None."""

    level: Tensor
    noise: Tensor
    augment: Tensor | None = None
    margins: Tensor | None = None


def draw(diffusion: DDPM | EDM, batch: Batch, seed: int, step: int) -> Draws:
    """Draw for the whole global batch and return this process's part: results do not depend on their number."""
    device = batch.images.device
    level = diffusion.draw(batch.count, torch_rng(seed, step, "level", device))[batch.part]
    parameters = margins = None
    if diffusion.augment is not None:
        parameters = diffusion.augment.draw(batch.count, torch_rng(seed, step, "augmentation", device))
        parameters, margins = parameters[batch.part], diffusion.augment.margins(parameters, *batch.images.shape[2:])
    return Draws(level, batch.noise(seed, step, "noise"), parameters, margins)


def learning_rate(config: Config, epoch: int, gpus: int) -> float:
    """Return the rate of an epoch (from 0): it rises over warm_epoch epochs to lrate·gpus, and stays."""
    return config.lrate * gpus * min((epoch + 1) / config.warm_epoch, 1)


def average_decay(update: int, ema: float) -> float:
    """Return the decay of the average at its k-th update (k from 1): min(1 - k^(-2/3), ema); the first one copies."""
    return min(1 - update ** -EMA_POWER, ema)


def make_optimizer(config: Config, net: torch.nn.Module, strict: bool) -> torch.optim.Optimizer:
    """Return Adam, or the config's AdamW; fused unless `strict`."""
    fast = {"foreach": False} if strict else {"fused": True}
    if config.optim is None:
        return torch.optim.Adam(net.parameters(), lr=config.lrate, **fast)
    return torch.optim.AdamW(net.parameters(), **{"lr": config.lrate, **config.optim_args}, **fast)


def train(config: Config, net: UNet, batches: TrainBatches, world: World, *,
          draw: Callable[[DDPM | EDM, Batch, int, int], Draws] = draw,
          gpus: int = 1,                      # processes that batch_size and lrate are multiplied by
          precision: str = "fp32",            # fp32, bf16 or fp16
          strict: bool = False,               # the published arithmetic
          compile: bool | None = False,       # the network; None: on a GPU, unless strict
          seed: int = 1337,
          constant_ema: bool = False,         # no warm-up of the average
          steps: int | None = None,           # number of steps; None: the config's epochs
          checkpoint_seconds: float = 600.0,  # between two checkpoints to continue from
          log_every: int = 50,                # steps between two lines of the log
          inputs: Mapping[str, str] | None = None,  # fingerprint of the data set
          overwrite: bool = False,            # move another run in the folder aside
          ) -> None:
    """Train `net` (with its initial weights) as the config says, and leave the published files in config.save_dir.

    Continues from the folder's checkpoint.pt, if any, else from the config's load_epoch.
    """
    # Network, average, optimizer.
    folder, device = Path(config.save_dir), world.device
    diffusion = make_diffusion(config)
    net.to(device).train()
    if not strict:
        use_channels_last(net)
        if device.type == "cpu":
            keep_freed_memory()
    ema = EMA(net, buffers="keep")
    optimizer = make_optimizer(config, net, strict)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    keep: dict[str, Any] = dict(net=net, ema=ema, optimizer=optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    if scaler.is_enabled():
        keep["scaler"] = scaler

    # Where to go on.
    settings = dict(gpus=gpus, precision=precision, strict=strict, seed=seed, constant_ema=constant_ema)
    log = Log(folder, world, every=log_every, image_batch=config.batch_size * gpus)
    run = Run(folder, {**config.to_dict(), **settings}, keep, world, log=log, inputs=inputs, ignore=FREE_KEYS,
              resume="never" if begins_elsewhere(config) else "auto", overwrite=overwrite and config.load_epoch < 0,
              save_seconds=checkpoint_seconds)
    if run.resumed_from is None:
        run.state["first_update"] = 0
        if config.load_epoch >= 0:
            run.step = (config.load_epoch + 1) * batches.per_epoch
            run.state["first_update"] = load_epoch(config, net, ema, optimizer, log) - run.step
    model = distributed.data_parallel(net, world)
    if compiles(compile, device, strict):
        net.compile(dynamic=False)  # the last part of an epoch may have another size
        if diffusion.augment is not None:
            diffusion.augment.compile()

    def save_epoch() -> None:
        if config.save_model:
            path = make_dir(folder / "ckpts") / f"model_{epoch}.pth"
            write_model(path, net, ema.module, update, optimizer, config, epoch)
            log.print(f"saved model at {path}")

    total = config.n_epoch * batches.per_epoch
    last = total if steps is None else min(total, steps)
    for step in run.steps(last):
        epoch, place = divmod(step, batches.per_epoch)
        lr = learning_rate(config, epoch, gpus)
        if place == 0:
            log.print(f"epoch {epoch}, lr {lr:f}")

        # Gradients of at most batch_size images at a time add up.
        batch = batches(step)
        draws = draw(diffusion, batch, seed, step)
        count, loss = len(batch.images), torch.zeros((), device=device)
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, count, config.batch_size):
            here = slice(start, min(start + config.batch_size, count))
            set_dropout_keys(net, seed, step, range(batch.part.start + here.start, batch.part.start + here.stop))
            images, labels = 2 * batch.images[here] - 1, None
            if diffusion.augment is not None and draws.augment is not None:
                images, labels = diffusion.augment.apply(images, draws.augment[here], draws.margins)
            # Gradients travel between processes in the last pass only.
            waits = here.stop < count and model is not net
            with model.no_sync() if waits else contextlib.nullcontext():
                with autocast(device, precision, net):
                    mean = diffusion.loss(model, images, draws.level[here], draws.noise[here], labels)
                # They are averaged over processes, whose parts of the batch may differ in size.
                part = mean * ((here.stop - here.start) * world.size / batch.count)
                scaler.scale(part).backward()
            loss += part.detach()

        # Update of the network and its average.
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM, foreach=not strict)
        scaler.step(optimizer)
        scaler.update()
        update = step + 1 + run.state["first_update"]
        ema.update(net, config.ema if constant_ema and update > 1 else average_decay(update, config.ema))
        log.add(loss=loss, gradient_norm=norm, lr=lr)

        # Checkpoint and preview.
        last_of_epoch = place == batches.per_epoch - 1
        if last_of_epoch and (epoch % PREVIEW_EPOCHS == 0 or epoch == config.n_epoch - 1):
            if world.main:
                save_epoch()
                made = preview(config, diffusion, ema.module, epoch, seed, device)
                path = folder / "visual" / f"image_ep{epoch}_ema.png"
                write_sheet(path, torch.cat([made, batch.images[:config.n_sample]]), PREVIEW_COLUMNS)
                log.print(f"saved image at {path}")
            distributed.barrier(world)
        elif step + 1 == last < total and world.main:
            save_epoch()

    if world.main:
        content = dict(config=config.source, seed=seed, iterations=run.step, epochs=run.step / batches.per_epoch,
                       gpus=gpus, precision=precision, seconds=round(run.seconds, 1), processes=world.size,
                       **computed_on(device))
        write_json(folder / "result.json", content, indent=2)
        log.print(f"Done: {folder}")


def begins_elsewhere(config: Config) -> bool:
    """Return whether the folder holds a run that did not begin at the config's load_epoch, from which this one does."""
    found = load_newest(Path(config.save_dir) / "checkpoint.pt") if config.load_epoch >= 0 else None
    return found is not None and found[1].get("config", {}).get("load_epoch") != config.load_epoch


def load_epoch(config: Config, net: UNet, ema: EMA, optimizer: torch.optim.Optimizer, log: Log) -> int:
    """Load the checkpoint of config.load_epoch, ours or published; return how often its average was updated."""
    path, _ = checkpoints.find_checkpoint(config, config.load_epoch)
    content = checkpoints.read_model(path, config)
    load_weights(net, content, "MODEL", path)
    load_weights(ema.module, content, "EMA", path)
    checkpoints.load_optimizer(optimizer, content, path)
    log.print(f"loading model at {path}")
    return checkpoints.average_updates(content)


def preview(config: Config, diffusion: DDPM | EDM, net: UNet, epoch: int, seed: int, device: torch.device) -> Tensor:
    """Return n_sample images of the averaged network by the deterministic sampler, float32 in about [0, 1]."""
    latents = torch.randn([config.n_sample, *net.image_shape], generator=torch_rng(seed, epoch, "preview"))
    return diffusion.sample(net, latents.to(device), noise=None).float()
