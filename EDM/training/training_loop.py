"""Training of a diffusion model, or of another network of noisy images: one step, the schedules, the loop ("Elucidating
the Design Space of Diffusion-Based Generative Models", Karras et al., arXiv 2206.00364, appendix F).
"""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from EDM.training.augment import AugmentPipe
from EDM.training.batches import Batch, Batches
from EDM.training.config import FREE_KEYS, RESULT_FILE, batch_rounds
from EDM.training.dataset import TrainingSet
from EDM.training.loss import LOSSES, EDMLoss, VELoss, VPLoss
from EDM.training.networks import PRECONDITIONERS, use_channels_last
from EDM.training.order import InfiniteOrder
from EDM.training.states import load_start, save_state, write_snapshots
from EDM.training.stats import Moments, TickClock, TickSchedule, stats_line, status_line
from EDM.training.table import module_table
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.checkpoint import keep_layout
from shared.training.dropout import set_dropout_keys
from shared.training.ema import EMA, half_life_beta, power_law_beta
from shared.training.files import atomic
from shared.training.hardware import computed_on
from shared.training.log import Log
from shared.training.precision import default_precision
from shared.training.randomness import torch_rng
from shared.training.run import Run

Loss = EDMLoss | VPLoss | VELoss
Parameters = Sequence[torch.nn.Parameter]


@dataclass
class Task:
    """What is trained, and where its training differs from that of a denoiser.

    net: on its device, with its initial weights. loss_fn: see EDM/training/loss.py; its optional
    `statistics` (name -> scalar of
    the last call) are logged. values_per_image: elements of the loss that belong to one image.
    learning_rate, averaging: number of images seen -> rate of the next step, and beta of the average. average_buffers:
    see EMA. frozen: number of images seen -> parameters that the next step leaves as they are.
    report: called at every tick on the main process with the averaged network, the images seen and the run; returns
    further numbers for stats.jsonl. loss_kwargs: what the snapshots record of the loss. outcome: further entries of
    result.json.
    """

    net: torch.nn.Module
    loss_fn: Any
    augment: AugmentPipe | None
    values_per_image: int
    learning_rate: Callable[[int], float]
    averaging: Callable[[int], float]
    average_buffers: str = "keep"
    frozen: Callable[[int], Parameters] = lambda nimg: ()
    report: Callable[[torch.nn.Module, int, Run], dict[str, float]] = lambda net, nimg, run: {}
    outcome: Callable[[Run], dict[str, Any]] = lambda run: {}
    loss_kwargs: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------- one step

def learning_rate(nimg: int, base: float, rampup_kimg: float, total_kimg: int, decay: float = 0.0) -> float:
    """Return the learning rate of the step that follows `nimg` images.

    It rises linearly over the first `rampup_kimg` thousand images (the first step has rate 0) and falls linearly to 0
    over the last share `decay` of the `total_kimg` thousand images of the run.
    """
    total = total_kimg * 1000
    rate = base * min(nimg / max(rampup_kimg * 1000, 1e-8), 1)
    return rate * min(max(total - nimg, 0) / (decay * total), 1) if decay else rate


def averaging(options: Mapping[str, Any], nimg: int) -> float:
    """Return beta of the step that follows `nimg` images: ema <- beta ema + (1 - beta) net."""
    if "ema_sigma_rel" in options:
        return power_law_beta(options["batch_size"], nimg, options["ema_sigma_rel"])
    return half_life_beta(options["batch_size"], options["ema_halflife_kimg"] * 1000, nimg,
                          options.get("ema_rampup_ratio", 0.05))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one process in one step, for its n images.

    level: [n, 1, 1, 1], from which the loss makes noise levels. noise: [n, C, R, R], standard normal.
    augment: parameters of the augmentation, or None. dropout: (seed, nimg), from which the masks follow; None for
    masks from torch's own generator.
    """

    level: torch.Tensor
    noise: torch.Tensor
    augment: Any = None
    dropout: tuple[int, int] | None = None


def draw(loss_fn: Loss, augment: AugmentPipe | None, seed: int, nimg: int, batch: int, shape: Sequence[int],
         places: np.ndarray, device: torch.device) -> Draws:
    """Draw for the global batch of `batch` images [C, R, R] = `shape` that starts at image number `nimg`, and return
    what belongs to the images at `places` [n] in it. So the numbers do not depend on how many processes share it."""
    mine = torch.from_numpy(places).to(device)
    level = loss_fn.draw(batch, torch_rng(seed, nimg, "noise level", device))
    noise = torch.randn([batch, *shape], generator=torch_rng(seed, nimg, "noise", device), device=device)
    parameters = augment.draw(batch, torch_rng(seed, nimg, "augmentation", device)) if augment is not None else None
    return Draws(level[mine], noise[mine], None if parameters is None else parameters[mine], (seed, nimg))


def training_step(model: torch.nn.Module, loss_fn: Loss, augment: AugmentPipe | None, optimizer: torch.optim.Optimizer,
                  ema: EMA, batch: Batch, draws: Draws, *, lr: float, beta: float, rounds: int = 1,
                  loss_scaling: float = 1.0, precision: str = "fp32", frozen: Parameters = (),
                  statistics: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Do one training step; return [3] sums over this process: loss, loss², parameters with a non-finite gradient.

    model: the preconditioned network, alone or in DistributedDataParallel. batch, draws: the images and random numbers
    of this process. lr: learning rate. beta: ema <- beta ema + (1 - beta) net. rounds: number of parts in which the
    images go through the network; their gradients add up. The gradient is that of `loss_scaling` x the mean over the
    global batch of the loss summed over pixels; it is not divided by `loss_scaling`, as Adam does not see scales.
    precision: "bf16" computes the network under autocast. frozen: parameters that are not moved. statistics: takes up
    the means over this process of what the loss reports.
    """
    net = distributed.unwrap(model)
    count = len(batch.images)
    part = count // rounds
    sums = torch.zeros(2, device=batch.images.device)
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, count, part):
        here = slice(start, start + part)
        if draws.dropout is not None:
            set_dropout_keys(net, *draws.dropout, batch.places[here])
        images, augment_labels = batch.images[here], None
        if augment is not None:
            images, augment_labels = augment.apply(images, draws.augment[here])
        # Gradients travel between processes in the last round only.
        waits = start + part < count and model is not net
        with model.no_sync() if waits else contextlib.nullcontext():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_fn(model, images, batch.labels[here], augment_labels, draws.level[here], draws.noise[here])
            loss.sum().mul(loss_scaling / count).backward()
        with torch.no_grad():
            sums += torch.stack([loss.sum(), loss.square().sum()])
        if statistics is not None:
            for name, value in getattr(loss_fn, "statistics", {}).items():
                statistics[name] = statistics.get(name, 0) + value / rounds
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter in frozen:
        parameter.grad = None  # which optimizers pass over
    replaced = replace_non_finite([p.grad for p in net.parameters() if p.grad is not None])
    optimizer.step()
    ema.update(net, beta)
    return torch.cat([sums, replaced[None]])


@torch.no_grad()
def replace_non_finite(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Replace in place NaN by 0 and ±infinity by ±1e5; return how many of the tensors held any, a float32 scalar."""
    # A norm is finite only if all of the tensor is; that of tensors beyond 1e19 overflows, and replacing leaves them.
    bad = ~torch.stack(torch._foreach_norm(gradients)).isfinite()
    if bad.device.type != "cpu" or bad.any():  # asking a GPU would have to wait for it
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0, posinf=1e5, neginf=-1e5)
    return bad.sum(dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------ what is trained

def choose_precision(asked: str | None, device: torch.device, strict: bool) -> str:
    """Return fp32, bf16 or fp16: what was asked for, else bf16 on a GPU that has it and fp32 elsewhere."""
    if asked == "fp16" and device.type != "cuda":
        return "fp32"  # as published: fp16 is for GPUs
    if asked is not None:
        return asked
    return default_precision(device, strict)


def denoising(options: Mapping[str, Any], dataset: TrainingSet, world: World) -> Task:
    """Return the training of a denoiser."""
    net, augment = build(options, dataset, world.device, PRECONDITIONERS)
    loss_kwargs = dict(options["loss_kwargs"])
    loss_fn = LOSSES[loss_kwargs.pop("class_name").removeprefix("training.loss.")](**loss_kwargs)
    return Task(net, loss_fn, augment, int(np.prod(image_shape(dataset))), ramp(options),
                lambda nimg: averaging(options, nimg))


def build(options: Mapping[str, Any], dataset: TrainingSet, device: torch.device,
          networks: Mapping[str, Callable[..., torch.nn.Module]]) -> tuple[torch.nn.Module, AugmentPipe | None]:
    """Return the network on `device` with its initial weights, and the augmentation."""
    # The option dictionary names classes by their published modules.
    net_kwargs = dict(options["network_kwargs"])
    make_net = networks[net_kwargs.pop("class_name").removeprefix("training.networks.")]
    # As published, torch's seed is the first draw of NumPy's generator; the same one on every rank.
    torch.manual_seed(np.random.RandomState(options["seed"] % (1 << 31)).randint(1 << 31))
    net = make_net(img_resolution=dataset.resolution, img_channels=dataset.num_channels, label_dim=dataset.label_dim,
                   **net_kwargs)
    augment = None
    if "augment_kwargs" in options:
        augment = AugmentPipe(**{k: v for k, v in options["augment_kwargs"].items() if k != "class_name"})
    return net.to(device), augment


def make_optimizer(options: Mapping[str, Any], net: torch.nn.Module, strict: bool) -> torch.optim.Optimizer:
    """Return Adam or SGD with the settings of the option dictionary."""
    settings = dict(options["optimizer_kwargs"])
    kind = {"torch.optim.Adam": torch.optim.Adam, "torch.optim.SGD": torch.optim.SGD}[settings.pop("class_name")]
    return kind(net.parameters(), **settings, **({"foreach": False} if strict else {"fused": True}))


def ramp(options: Mapping[str, Any]) -> Callable[[int], float]:
    """Return number of images seen -> `learning_rate` of the run."""
    return lambda nimg: learning_rate(nimg, options["optimizer_kwargs"]["lr"], options.get("lr_rampup_kimg", 10000),
                                      options["total_kimg"], options.get("lr_decay", 0.0))


def image_shape(dataset: TrainingSet) -> list[int]:
    return [dataset.num_channels, dataset.resolution, dataset.resolution]


# --------------------------------------------------------------------------------------------------------- the loop

def train(options: Mapping[str, Any], dataset: TrainingSet, world: World,
          make_task: Callable[[Mapping[str, Any], TrainingSet, World], Task] = denoising, *,
          precision: str | None = None, strict: bool = False, compiled: bool = False,
          checkpoint_seconds: float = 600.0) -> None:
    """Train as the published option dictionary says, and leave the published files in options["run_dir"].

    Continues from the folder's checkpoint, if there is one. precision: fp32, bf16, fp16 or None (see
    `choose_precision`). strict: the published arithmetic, without fused or compiled operations. checkpoint_seconds:
    time between two checkpoints.
    """
    device, folder = world.device, Path(options["run_dir"])
    precision = choose_precision(precision, device, strict)
    total_kimg, batch_size, seed = options["total_kimg"], options["batch_size"], options["seed"]
    at_once, rounds = batch_rounds(batch_size, options["batch_gpu"], world.size)
    torch.backends.cudnn.benchmark = options["cudnn_benchmark"]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    task = make_task(options, dataset, world)
    net, loss_fn, augment = task.net, task.loss_fn, task.augment
    try:
        table = module_table(net, at_once)
    except (RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"no network of --arch with these --cbase and --cres for images of {dataset.resolution} x "
                        f"{dataset.resolution}: {error}") from None
    if not strict:
        use_channels_last(net)
        if device.type == "cpu":
            keep_freed_memory()
    ema = EMA(net, buffers=task.average_buffers)
    optimizer = make_optimizer(options, net, strict)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    order = InfiniteOrder(len(dataset), seed)
    losses = Moments(device)
    run = Run(folder, options, dict(net=net, ema=ema, optimizer=optimizer, order=order, losses=losses), world,
              log=Log(folder, world, every=None), ignore=FREE_KEYS, save_seconds=checkpoint_seconds)  # lines come at ticks
    if run.resumed_from is None:
        run.state["start_nimg"] = load_start(options, net, ema, optimizer, order)
    schedule = TickSchedule(batch_size, total_kimg, options["kimg_per_tick"], options["snapshot_ticks"],
                            options["state_dump_ticks"], run.state["start_nimg"])
    model = distributed.data_parallel(net, world)
    if compiled:
        net.model.compile()
    batches = Batches(dataset, order, batch_size, world)
    if run.resumed_from is None:
        run.log.print(table)
    run.log.print(f"Training for {total_kimg} kimg from {schedule.nimg(run.step) / 1000:.1f}: {precision} on "
              f"{world.size} x {device.type}, {rounds} round(s) of {at_once} images")

    clock = TickClock(device, run.seconds, schedule.nimg(run.step))
    shape, values_per_step = image_shape(dataset), batch_size * task.values_per_image
    for step in run.steps(schedule.steps):
        nimg = schedule.nimg(step)
        batch = batches(nimg)
        draws = draw(loss_fn, augment, seed, nimg, batch_size, shape, batch.places, device)
        statistics: dict[str, torch.Tensor] = {}
        sums = training_step(model, loss_fn, augment, optimizer, ema, batch, draws, lr=task.learning_rate(nimg),
                             beta=task.averaging(nimg), rounds=rounds, loss_scaling=options["loss_scaling"],
                             precision=precision, frozen=task.frozen(nimg), statistics=statistics)
        sums = distributed.sum_(sums, world)
        losses.add(values_per_step, sums[:2])
        run.log.add(loss=sums[0] / values_per_step, non_finite_gradients=sums[2], **statistics)

        tick = schedule.tick(step)
        if tick is not None:
            means = run.log.means()  # stops here if a loss was not finite
            values = clock.measure(tick, schedule.nimg(step + 1))
            run.log.print(status_line(values))
            if means["non_finite_gradients"] > 0:
                run.log.print(f"warning: non-finite gradients were replaced in {means['non_finite_gradients']:.3g} tensors "
                          "a step since the last tick; if that goes on, try a lower --lr or --ls")
            further = {f"Loss/{name}": value for name, value in means.items() if name in statistics}
            if world.main:
                further |= task.report(ema.module, schedule.nimg(step + 1), run)
            if name := schedule.snapshot(step):
                write_snapshots(folder, name, ema.module, options["dataset_kwargs"], world, task.loss_kwargs)
            if (name := schedule.state_dump(step)) and world.main:
                save_state(folder / name, net, ema, optimizer, order, schedule.nimg(step + 1))
            line = stats_line(losses.entry(), {**further, **values})
            run.log.record({"Loss/loss": line["Loss/loss"]["mean"], **further, **values}, line)
            clock.resume()

    if world.main:
        last = schedule.snapshot(schedule.steps - 1)
        with atomic(folder / RESULT_FILE, "w") as file:
            file.write(json.dumps(dict(nimg=schedule.nimg(schedule.steps), seed=seed, snapshot=last,
                                       seconds=round(run.seconds, 1), precision=precision, processes=world.size,
                                       **task.outcome(run), **computed_on(device)), indent=2))
    run.log.print(f"Done: {folder / 'network-snapshot-latest.pkl'}")
