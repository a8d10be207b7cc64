"""The training of EDM ("Elucidating the Design Space of Diffusion-Based Generative Models", Karras et al., arXiv
2206.00364, appendix F), and of other networks of noisy images that share its loop.
"""
from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from EDM.training.augment import AugmentPipe
from EDM.training.config import FREE_IN_RUN, RESULT_FILE, batch_rounds
from EDM.training.dataset import Batch, Batches, InfiniteOrder, TrainingSet
from EDM.training.loss import make_loss
from EDM.training.networks import PRECONDITIONERS, use_channels_last
from EDM.training.snapshots import load_training_state, load_weights, read_snapshot, save_snapshot
from EDM.training.stats import Moments, TickClock, TickSchedule, module_table, stats_line, status_line
from shared import distributed
from shared.cli import UserError, is_out_of_memory, less_memory
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.checkpoint import keep_layout
from shared.training.ema import EMA, half_life_beta, power_law_beta
from shared.training.files import atomic, write_json
from shared.training.log import Log
from shared.training.precision import autocast, compiles, computed_on, default_precision, to_device
from shared.training.randomness import set_dropout_keys, torch_rng
from shared.training.run import Run

LATEST = "network-snapshot-latest.pkl"


class Denoising:
    """The method that the loop trains: here a denoiser; other methods derive from it.

    options: the published option dictionary. net: the network on its device, with its initial weights. loss_fn: see
    EDM/training/loss.py; its optional `statistics` (name -> scalar of the last call) are logged. values_per_image:
    elements of the loss that belong to one image. ema_buffers: see EMA. loss_kwargs: what snapshots record of the loss.
    """

    networks: Mapping[str, Callable[..., torch.nn.Module]] = PRECONDITIONERS
    ema_buffers = "keep"
    same_shapes = True  # of every forward: the network is compiled once

    def __init__(self, options: Mapping[str, Any], dataset: TrainingSet, world: World) -> None:
        self.options, self.loss_kwargs = options, {}
        # As published, torch's seed is the first draw of NumPy's generator; the same one on every rank.
        torch.manual_seed(np.random.RandomState(options["seed"] % (1 << 31)).randint(1 << 31))
        kwargs = dict(options["network_kwargs"])
        make_net = self.networks[kwargs.pop("class_name").removeprefix("training.networks.")]
        self.net = make_net(img_resolution=dataset.resolution, img_channels=dataset.num_channels,
                            label_dim=dataset.label_dim, **kwargs).to(world.device)
        self.augment = None
        if "augment_kwargs" in options:
            self.augment = AugmentPipe(**{k: v for k, v in options["augment_kwargs"].items() if k != "class_name"})
        self.loss_fn: Any = make_loss(options["loss_kwargs"])
        self.values_per_image = dataset.num_channels * dataset.resolution**2

    def learning_rate(self, nimg: int) -> float:
        """Return the learning rate of the step that follows `nimg` images."""
        return learning_rate(nimg, self.options["optimizer_kwargs"]["lr"], self.options.get("lr_rampup_kimg", 10000),
                             self.options["total_kimg"], self.options.get("lr_decay", 0.0))

    def ema_beta(self, nimg: int) -> float:
        """Return beta of the step that follows `nimg` images: ema <- beta ema + (1 - beta) net."""
        if "ema_sigma_rel" in self.options:
            return power_law_beta(self.options["batch_size"], nimg, self.options["ema_sigma_rel"])
        return half_life_beta(self.options["batch_size"], self.options["ema_halflife_kimg"] * 1000, nimg,
                              self.options.get("ema_rampup_ratio", 0.05))

    def frozen(self, nimg: int) -> Sequence[torch.nn.Parameter]:
        """Return the parameters that the step after `nimg` images leaves as they are."""
        return ()

    def report(self, net: torch.nn.Module, nimg: int, run: Run) -> dict[str, float]:
        """Return further numbers for stats.jsonl at a tick, of the averaged network `net`; main process only."""
        return {}

    def outcome(self, run: Run) -> dict[str, Any]:
        """Return further entries of result.json."""
        return {}


@less_memory("--batch-gpu")
def training_loop(options: Mapping[str, Any], dataset: TrainingSet, world: World,
                  make_method: Callable[[Mapping[str, Any], TrainingSet, World], Denoising] = Denoising, *,
                  inputs: Mapping[str, Any] | None = None, precision: str | None = None, strict: bool = False,
                  compiled: bool | None = None, checkpoint_seconds: float = 600.0) -> None:
    """Train as the published option dictionary says, and leave the published files in options["run_dir"].

    Continues from the folder's checkpoint, if any. inputs: see Run. precision: fp32, bf16, fp16 or None (see
    `choose_precision`). strict: the published arithmetic, without fused or compiled operations. compiled: see
    `compiles`. checkpoint_seconds: time between two checkpoints.
    """
    # Setup.
    device, folder = world.device, Path(options["run_dir"])
    batch_size, total_kimg, seed = options["batch_size"], options["total_kimg"], options["seed"]
    part, rounds = batch_rounds(batch_size, options["batch_gpu"], world.size)
    precision = choose_precision(precision, device, strict)
    torch.backends.cudnn.benchmark = options["cudnn_benchmark"]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    # Network, average and optimizer.
    method = make_method(options, dataset, world)
    net, loss_fn, augment = method.net, method.loss_fn, method.augment
    table = network_table(net, part)
    if not strict:
        use_channels_last(net)
        if device.type == "cpu":
            keep_freed_memory()
    ema = EMA(net, buffers=method.ema_buffers)
    optimizer = make_optimizer(options, net, strict)

    # Continue, or start from --transfer or --resume.
    order, losses = InfiniteOrder(len(dataset), seed), Moments(device)
    log = Log(folder, world, every=None)  # lines come at ticks
    run = Run(folder, options, dict(net=net, ema=ema, optimizer=optimizer, order=order, losses=losses), world, log=log,
              inputs=inputs, ignore=FREE_IN_RUN, save_seconds=checkpoint_seconds)
    if run.resumed_from is None:
        run.state["start_nimg"] = load_start(options, net, ema, optimizer, order, log.print)
        log.print(table)
    schedule = TickSchedule(batch_size, total_kimg, options["kimg_per_tick"], options["snapshot_ticks"],
                            options["state_dump_ticks"], run.state["start_nimg"])
    model = distributed.data_parallel(net, world)
    if compiles(compiled, device, strict or not method.same_shapes):
        net.model.compile()
        if augment is not None:
            augment.compile()
    batches = Batches(dataset, order, batch_size, world)
    trained_on = {**options["dataset_kwargs"], **dataset.describe_labels()}
    log.print(f"Training for {total_kimg} kimg from {schedule.nimg(run.step) / 1000:.1f}: {precision} on "
              f"{world.size} x {device.type}, {rounds} round(s) of {part} images")

    # Train.
    clock = TickClock(device, run.seconds, schedule.nimg(run.step))
    values_per_step = batch_size * method.values_per_image
    for step in run.steps(schedule.steps):
        nimg, seen = schedule.nimg(step), schedule.nimg(step + 1)

        # Draw.
        batch = batches(nimg)
        draws = draw(loss_fn, augment, seed, nimg, batch_size, batch)

        # Forward and backward.
        sums, statistics = forward_backward(model, loss_fn, augment, batch, draws, rounds, options["loss_scaling"],
                                            precision)

        # Update.
        replaced = update(net, optimizer, method.learning_rate(nimg), method.frozen(nimg))

        # EMA.
        ema.update(net, method.ema_beta(nimg))

        # Log.
        sums = distributed.all_sum(torch.cat([sums, replaced[None]]), world)
        losses.add(values_per_step, sums[:2])
        log.add(loss=sums[0] / values_per_step, non_finite_gradients=sums[2], **statistics)
        tick = schedule.tick(step)
        if tick is None:
            continue

        # Tick: status.
        means = log.means()  # stops here if a loss was not finite
        values = clock.measure(tick, seen)
        log.print(status_line(values))
        if means["non_finite_gradients"] > 0:
            log.print(f"warning: non-finite gradients were replaced in {means['non_finite_gradients']:.3g} tensors "
                      "a step since the last tick; if that goes on, try a lower --lr or --ls")
        further = {f"Loss/{name}": value for name, value in means.items() if name in statistics}
        if world.main:
            further |= method.report(ema.module, seen, run)

        # Tick: snapshots and states.
        if name := schedule.snapshot(step):
            distributed.check_equal(ema.state_dict(), world, f"in the averaged network; nothing was written to {name}")
            if world.main:
                save_snapshot(folder / name, ema.module, trained_on, method.loss_kwargs)
                with open(folder / name, "rb") as source, atomic(folder / LATEST) as target:
                    shutil.copyfileobj(source, target)
        if (name := schedule.state_dump(step)) and world.main:
            save_state(folder / name, net, ema, optimizer, order, seen)
        line = stats_line(losses.entry(), {**further, **values})
        log.record({"Loss/loss": line["Loss/loss"]["mean"], **further, **values}, line)
        clock.resume()

    if world.main:
        result = dict(nimg=schedule.nimg(schedule.steps), seed=seed, snapshot=schedule.snapshot(schedule.steps - 1),
                      seconds=round(run.seconds, 1), precision=precision, processes=world.size, **method.outcome(run),
                      **computed_on(device))
        write_json(folder / RESULT_FILE, result, indent=2)
    log.print(f"Done: {folder / LATEST}")


def network_table(net: torch.nn.Module, part: int) -> str:
    """Return the table of modules for `part` images; UserError for a network that does not fit its images."""
    try:
        return module_table(net, part)
    except (RuntimeError, ZeroDivisionError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"no network of --arch with these --cbase and --cres for images of {net.img_resolution} x "
                        f"{net.img_resolution}: {' '.join(str(error).split())[:200]}") from None


# ---------------------------------------------------------------------------------------------- the parts of a step

@dataclass(frozen=True)
class Draws:
    """The random numbers of one process in one step, for its n images.

    level: [n, 1, 1, 1], from which the loss makes noise levels. noise: [n, C, R, R], standard normal.
    augment: parameters of the augmentation, or None; margins: of the global batch (None: of each round).
    dropout: (seed, nimg), from which the masks follow; None for masks from torch's own generator.
    """

    level: torch.Tensor
    noise: torch.Tensor
    augment: torch.Tensor | None = None
    margins: torch.Tensor | None = None
    dropout: tuple[int, int] | None = None


def draw(loss_fn: Any, augment: AugmentPipe | None, seed: int, nimg: int, batch_size: int, batch: Batch) -> Draws:
    """Draw for the global batch that starts at image number `nimg`, and return the part of the images of `batch`: the
    numbers do not depend on the number of processes."""
    device = batch.images.device
    mine = to_device(batch.places, device)
    level = loss_fn.draw(batch_size, torch_rng(seed, nimg, "noise level", device))
    noise = torch.randn([batch_size, *batch.images.shape[1:]], generator=torch_rng(seed, nimg, "noise", device),
                        device=device)
    parameters = margins = None
    if augment is not None:
        parameters = augment.draw(batch_size, torch_rng(seed, nimg, "augmentation", device))
        parameters, margins = parameters[mine], augment.margins(parameters, *batch.images.shape[2:])
    return Draws(level[mine], noise[mine], parameters, margins, (seed, nimg))


def forward_backward(model: torch.nn.Module, loss_fn: Any, augment: AugmentPipe | None, batch: Batch, draws: Draws,
                     rounds: int = 1, loss_scaling: float = 1.0, precision: str = "fp32"
                     ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Leave the gradients of a step in the network; return the sums [2] over this process's images of loss and loss²,
    and the means of what the loss reports.

    model: the preconditioned network, alone or in DistributedDataParallel. rounds: number of parts in which the images
    go through it; their gradients add up. The gradient is that of `loss_scaling` x the mean over the global batch of
    the loss summed over pixels; it is not divided by `loss_scaling`, as Adam does not see scales. precision: "bf16"
    computes the network under autocast.
    """
    net, count = distributed.unwrap(model), len(batch.images)
    part = count // rounds
    sums = torch.zeros(2, device=batch.images.device)
    statistics: dict[str, torch.Tensor] = {}
    net.zero_grad(set_to_none=True)
    for start in range(0, count, part):
        here = slice(start, start + part)
        if draws.dropout is not None:
            set_dropout_keys(net, *draws.dropout, batch.places[here])
        images, augment_labels = batch.images[here], None
        if augment is not None:
            images, augment_labels = augment.apply(images, draws.augment[here], draws.margins)
        # Gradients travel between processes in the last round only.
        waits = start + part < count and model is not net
        with model.no_sync() if waits else contextlib.nullcontext():
            # A network in fp16 casts by itself.
            with autocast(images.device, "bf16" if precision == "bf16" else "fp32", net):
                loss = loss_fn(model, images, batch.labels[here], augment_labels, draws.level[here], draws.noise[here])
            loss.sum().mul(loss_scaling / count).backward()
        with torch.no_grad():
            sums += torch.stack([loss.sum(), loss.square().sum()])
        for name, value in getattr(loss_fn, "statistics", {}).items():
            statistics[name] = statistics.get(name, 0) + value / rounds
    return sums, statistics


def update(net: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float,
           frozen: Sequence[torch.nn.Parameter] = ()) -> torch.Tensor:
    """Take the optimizer's step; return the number of parameters with a non-finite gradient, a float32 scalar."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter in frozen:
        parameter.grad = None  # which optimizers pass over
    replaced = replace_non_finite([p.grad for p in net.parameters() if p.grad is not None])
    optimizer.step()
    return replaced


@torch.no_grad()
def replace_non_finite(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Replace in place NaN by 0 and ±infinity by ±1e5; return how many of the tensors held any, a float32 scalar."""
    # A norm is finite only if all of the tensor is; that of tensors beyond 1e19 overflows, and replacing leaves them.
    bad = ~torch.stack(torch._foreach_norm(gradients)).isfinite()
    if bad.is_cuda:  # which is not asked, as that would wait for it; all gradients at once take the fewest launches
        lines = [memory_order(gradient) for gradient in gradients]
        whole = torch.cat(lines).nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)
        torch._foreach_copy_(lines, whole.split([len(line) for line in lines]))
    elif bad.any():
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0, posinf=1e5, neginf=-1e5)
    return bad.sum(dtype=torch.float32)


def memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements of a tensor [..] without gaps, or channels_last, as a view of one dimension."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(-1)


def learning_rate(nimg: int, base: float, rampup_kimg: float, total_kimg: int, decay: float = 0.0) -> float:
    """Return the learning rate of the step that follows `nimg` images.

    It rises linearly over the first `rampup_kimg` thousand images (the first step has rate 0) and falls linearly to 0
    over the last fraction `decay` of the `total_kimg` thousand images of the run.
    """
    total = total_kimg * 1000
    rate = base * min(nimg / max(rampup_kimg * 1000, 1e-8), 1)
    return rate * min(max(total - nimg, 0) / (decay * total), 1) if decay else rate


def choose_precision(asked: str | None, device: torch.device, strict: bool) -> str:
    """Return fp32, bf16 or fp16: as asked, else bf16 on a GPU that has it and fp32 elsewhere."""
    if asked == "fp16" and device.type != "cuda":
        return "fp32"  # as published: fp16 is for GPUs
    return asked or default_precision(device, strict)


def make_optimizer(options: Mapping[str, Any], net: torch.nn.Module, strict: bool) -> torch.optim.Optimizer:
    """Return Adam or SGD with the settings of the option dictionary."""
    settings = dict(options["optimizer_kwargs"])
    kind = {"torch.optim.Adam": torch.optim.Adam, "torch.optim.SGD": torch.optim.SGD}[settings.pop("class_name")]
    optimizer = kind(net.parameters(), **settings, **({"foreach": False} if strict else {"fused": True}))
    optimizer.register_load_state_dict_post_hook(keep_layout)
    return optimizer


# ---------------------------------------------------------------------------------- --transfer, --resume, their files

def load_start(options: Mapping[str, Any], net: torch.nn.Module, ema: EMA, optimizer: torch.optim.Optimizer,
               order: InfiniteOrder, say: Callable[[str], Any] = print) -> int:
    """Load the file of --transfer or --resume, if any, and return the number of images seen so far.

    --transfer: weights of the snapshot into the network and its average, by name; counting starts from 0.
    --resume: a training state. One of ours holds the exact count, the average and the data order; one of the published
    code holds neither, so the average comes from the snapshot beside it and the count from the file's name.
    Raises UserError for a file that is missing, damaged or of another network.
    """
    snapshot, state_file = options.get("resume_pkl"), options.get("resume_state_dump")
    if state_file is None:
        if snapshot is not None:
            _copy_weights(snapshot, net, ema, say)
        return 0
    state = load_training_state(state_file)
    if "ema" in state:
        load_weights(ema.module, state["ema"], str(state_file))
    else:
        _copy_weights(snapshot, net, ema, say)
    load_weights(net, state["net"], str(state_file))
    try:
        optimizer.load_state_dict(state["optimizer_state"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{state_file}: its optimizer state does not fit this network ({error})") from None
    if "order" in state:
        order.load_state_dict(state["order"])
    seen = int(state.get("nimg", options["resume_kimg"] * 1000))
    if seen >= options["total_kimg"] * 1000:
        say(f"warning: --resume: {state_file} has seen {seen / 1000:.1f} thousand images, --duration ends at "
            f"{options['total_kimg']}: one more step is trained; give a longer --duration")
    return seen


def _copy_weights(source: str, net: torch.nn.Module, ema: EMA, say: Callable[[str], Any]) -> None:
    tensors, own = read_snapshot(source).state_dict, net.state_dict()
    if not set(tensors) & set(own):
        raise UserError(f"{source}: snapshot of another network, no tensor of it has a name of this one")
    # Other classes: the layer of the labels starts anew.
    fresh = {name for name in set(tensors) & set(own) if "map_label" in name and tensors[name].shape != own[name].shape}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    taken = len(set(tensors) & set(own))
    anew = "; the layer of the labels starts anew, for other classes" if fresh else ""
    say(f"{taken} of the {len(own)} tensors of the network are those of {source}{anew}")
    for module in (net, ema.module):
        load_weights(module, tensors, source, strict=False)


def save_state(path: Path, net: torch.nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, order: InfiniteOrder,
               nimg: int) -> None:
    """Write the state from which `load_start` continues exactly at image number `nimg`."""
    with atomic(path) as file:
        torch.save({"net": dict(net.state_dict()), "optimizer_state": optimizer.state_dict(),
                    "ema": dict(ema.state_dict()), "order": order.state_dict(), "nimg": nimg}, file)
