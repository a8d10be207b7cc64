"""The training of a latent diffusion model (Bao et al. 2023, arXiv 2209.12152) on pseudo-labels (You et al. 2023, arXiv
2302.10586): noise prediction, label dropout, AdamW with warm-up, an exponential average of the weights.
"""
from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from EDM.latent.alignment import Aligned, Targets, aligned_losses
from EDM.latent.generation import Sampler
from EDM.latent.latents import LatentBatches
from EDM.latent.schedules import Schedule, losses
from EDM.latent.uvit import UViT, load_uvit
from EDM.latent.vae import sample
from shared import distributed
from shared.cli import Diverged, UserError, is_out_of_memory, less_memory
from shared.distributed import World
from shared.report.plots import image_grid
from shared.training.checkpoint import keep_layout, read_checkpoint
from shared.training.ema import EMA
from shared.training.files import atomic, make_dir, write_text
from shared.training.log import Log
from shared.training.precision import autocast, set_arithmetic
from shared.training.randomness import torch_rng
from shared.training.run import Run

Score = Callable[[Sampler, int], float]  # (sampler, number of images) -> FID
FIRST_SAMPLES = 10_000  # of the FID at every saved step
CHECKPOINT = ("step", "optimizer", "lr_scheduler", "nnet", "nnet_ema")
# Settings that may change when a run is continued.
FREE = ("train.n_steps", "train.log_interval", "train.eval_interval", "train.save_interval")


@less_memory("--config.train.batch_size")
def train(config: Any, net: UViT, schedule: Schedule, batches: LatentBatches, sampler_of: Callable[[UViT], Sampler],
          workdir: Path, world: World, *, precision: str = "fp32", strict: bool = False, compiled: bool = False,
          aligned: Aligned | None = None, targets: Targets | None = None, score: Score | None = None,
          overwrite: bool = False, checkpoint_seconds: float = 600.0) -> None:
    """Train `net` as a configuration says, and leave the published files in `workdir`.

    config: see EDM/imagenet/experiment/config.py. sampler_of: what makes images with the averaged network. strict:
    attention in fp32 and no fused operation. compiled: compile the blocks. aligned: `net` with a projector, and
    targets: what its tokens are drawn to (REPA); None: without. score: FID of a sampler; None: without. overwrite: move
    another run in `workdir` aside. checkpoint_seconds: between two checkpoints, from which the same call continues.
    """
    # Setup.
    device, seed, batch_size, total = world.device, config.seed, config.train.batch_size, config.train.n_steps
    set_arithmetic(strict, tf32=False)
    net.set_full_precision_attention(strict)
    net.to(device)
    ema = EMA(net)
    trained = net if aligned is None else aligned.to(device)
    optimizer = make_optimizer(trained, config.optimizer, strict)
    rates = warm_up(optimizer, config.lr_scheduler)
    mine, shape = world.slice(batch_size), (batch_size, *config.z_shape)

    # Continue, start, or take over a run of the published code.
    log = Log(workdir, world, every=None, image_batch=batch_size)
    settings = {**settings_of(config, schedule), "precision": precision, "strict": strict}
    keep = dict(net=net, ema=ema, optimizer=optimizer, lr_scheduler=rates)
    inputs = {"the latents": batches.latents.folder, "--transition": batches.posterior}
    if aligned is not None:
        settings |= {"--repa_weight": targets.weight, "--repa_block": aligned.block}
        keep["projector"] = aligned.projector
        inputs["--repa"] = targets.encoder.fingerprint
    run = Run(workdir, settings, keep, world, log=log, inputs=inputs, ignore=FREE, overwrite=overwrite,
              save_seconds=checkpoint_seconds)
    if run.resumed_from is None and (found := newest_published(workdir / "ckpts")):
        run.step = load_published(found, net, ema, optimizer, rates)
        log.print(f"continuing at step {run.step}: {found}")
    model = distributed.data_parallel(trained, world)
    if compiled:
        for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
            block.compile()
    log.print(f"Training {sum(p.numel() for p in net.parameters()):,} parameters on {len(batches.latents):,} latents: "
              f"{precision} on {world.size} x {device.type}, {batch_size} a step, the {schedule.name} schedule")

    # Train.
    for step in run.steps(total):
        # Draw.
        moments, labels, images = batches(step)
        labels = labels if net.num_classes > 0 else None
        posterior, noise = (torch.randn(shape, generator=torch_rng(seed, step, purpose, device), device=device)[mine]
                            for purpose in ("posterior", "noise"))
        times = schedule.draw(seed, step, batch_size, device)[mine]
        x0 = sample(moments, posterior, batches.latents.scale)

        # Update.
        if aligned is None:
            loss = total_loss = loss_of(model, schedule, x0, labels, times, noise, precision)
        else:
            loss, alignment = aligned_losses(model, schedule, x0, labels, times, noise, targets.of(images), precision)
            total_loss = loss + targets.weight * alignment
            log.add(alignment=alignment)
        update(total_loss, net, ema, optimizer, rates, config.ema_rate)

        # Log.
        done = step + 1
        log.add(loss=loss)
        if done % config.train.log_interval == 0 or done == total:
            means = log.means()  # stops here if a loss was not finite
            rate = rates.get_last_lr()[0]  # as published, that of the next step
            log.print(log_line(done, rate, means["loss"]))
            values = {**means, "lr": rate, "seconds": round(run.seconds, 1)}
            log.record(values, {"step": done, **values})
        if done % config.train.eval_interval == 0 and world.main:
            image_grid(sampler_of(ema.module).previews(seed), make_dir(workdir / "samples") / f"{done}.png", scale=1)

        # Save and score.
        if done % config.train.save_interval == 0 or done == total:
            log.check()  # stops here if a loss was not finite
            check_weights(net, done)
            if world.main:
                save_published(workdir / "ckpts" / f"{done}.ckpt", done, net, ema, optimizer, rates)
            if score is not None:
                count = min(FIRST_SAMPLES, config.sample.n_samples)
                note_score(run, done, count, score(sampler_of(ema.module), count))

    # The best of the scored steps.
    fids = run.state.get("fids", {})
    if score is not None and fids and "final" not in run.state:
        best = min(fids, key=lambda name: fids[name][1])
        file = workdir / "ckpts" / f"{best}.ckpt" / "nnet_ema.pth"
        log.print(f"the lowest FID is that of step {best}")
        sampler = sampler_of(load_uvit(copy.deepcopy(ema.module), file))
        note_score(run, int(best), config.sample.n_samples, score(sampler, config.sample.n_samples), final=True)


def loss_of(model: torch.nn.Module, schedule: Schedule, x0: Tensor, labels: Tensor | None, times: Tensor, noise: Tensor,
            precision: str = "fp32") -> Tensor:
    """Return the mean loss of latents x0 [n, C, s, s] at their times, float32. model: the network, alone or in
    DistributedDataParallel."""
    with autocast(x0.device, precision):
        return losses(schedule, lambda x, time: model(x, time, labels), x0, times, noise).mean()


def update(loss: Tensor, net: UViT, ema: EMA, optimizer: torch.optim.Optimizer,
           rates: torch.optim.lr_scheduler.LRScheduler, ema_rate: float) -> None:
    """Take a step against the gradient of the loss, then one of the learning rate and of the average."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    rates.step()
    ema.update(net, ema_rate)


def check_weights(net: UViT, step: int) -> None:
    """Raise Diverged if a weight is not finite."""
    for name, parameter in net.named_parameters():
        if not parameter.isfinite().all():
            raise Diverged(f"{name} is not finite after step {step}; nothing was saved, the last checkpoint is kept. "
                           "Try a lower --config.optimizer.lr or --precision=fp32")


def settings_of(config: Any, schedule: Schedule) -> dict[str, Any]:
    """Return the settings that affect a run's numbers, by the names of `--config.KEY`."""
    sections = ("train", "optimizer", "lr_scheduler", "nnet", "dataset")
    values = {f"{section}.{key}": value for section in sections for key, value in config[section].items()
              if f"{section}.{key}" != "dataset.path"}
    values |= {key: config[key] for key in ("seed", "pred", "ema_rate", "z_shape", "resolution")}
    return {**values, "schedule": schedule.name}


def make_optimizer(net: torch.nn.Module, settings: Mapping[str, Any], strict: bool = False) -> torch.optim.Optimizer:
    """Return AdamW on all parameters, positions, biases and norms included, as published."""
    if settings["name"] != "adamw":
        raise UserError(f"--config.optimizer.name={settings['name']}: the only optimizer is adamw")
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"],
                                  betas=tuple(settings["betas"]), **({"foreach": False} if strict else {"fused": True}))
    optimizer.register_load_state_dict_post_hook(keep_layout)
    return optimizer


def warm_up(optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of learning rates, which rise linearly from 0 at the first step to a constant."""
    if settings["name"] != "customized":
        raise UserError(f"--config.lr_scheduler.name={settings['name']}: the only schedule is customized, a warm-up")
    steps = max(settings["warmup_steps"], 1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / steps, 1))


def log_line(step: int, lr: float, loss: float) -> str:
    """Return the published line of the log."""
    return str({name: f"{value:.6g}" for name, value in (("step", step), ("lr", lr), ("loss", loss))})


def note_score(run: Run, step: int, count: int, value: float, final: bool = False) -> None:
    """Keep an FID in the run's state, and write all of them to eval.log and the log."""
    run.state.setdefault("fids", {})
    if final:
        run.state["final"] = [step, count, value]
        run.save()
    else:
        run.state["fids"][str(step)] = [count, value]
        run.state.pop("final", None)  # of a run that was shorter
    run.log.print(f"step={step} fid{count}={value:.6g}")
    if run.world.main:
        write_text(run.outdir / "eval.log", score_lines(run.state))


def score_lines(state: Mapping[str, Any]) -> str:
    """Return the lines of eval.log: those of saved steps, then that of the best."""
    scores = [(step, *found) for step, found in state["fids"].items()]
    if "final" in state:
        scores.append(state["final"])
    return "".join(f"step={step} fid{count}={value}\n" for step, count, value in scores)


# ---------------------------------------------------------------- published checkpoints

def save_published(folder: Path, step: int, net: UViT, ema: EMA, optimizer: torch.optim.Optimizer,
                   rates: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Write the published files of a step; the folder appears when all of them are there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_dir(temporary)
    content = dict(step=step, optimizer=optimizer.state_dict(), lr_scheduler=rates.state_dict(), nnet=net.state_dict(),
                   nnet_ema=ema.state_dict())
    for name in CHECKPOINT:
        with atomic(temporary / f"{name}.pth") as file:
            torch.save(content[name], file)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def newest_published(folder: Path) -> Path | None:
    """Return the folder of the latest step whose files are all there, or None."""
    found = [path for path in folder.glob("*.ckpt") if path.stem.isdigit()
             and all((path / f"{name}.pth").is_file() for name in CHECKPOINT)]
    return max(found, key=lambda path: int(path.stem), default=None)


def load_published(folder: Path, net: UViT, ema: EMA, optimizer: torch.optim.Optimizer,
                   rates: torch.optim.lr_scheduler.LRScheduler) -> int:
    """Load the published files of a step and return the step; UserError for those of another network."""
    load_uvit(net, folder / "nnet.pth")
    load_uvit(ema.module, folder / "nnet_ema.pth")
    try:
        optimizer.load_state_dict(read_checkpoint(folder / "optimizer.pth"))
        rates.load_state_dict(read_checkpoint(folder / "lr_scheduler.pth"))
    except (ValueError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: its optimizer's state does not fit this network ({error})") from None
    return int(folder.stem)
