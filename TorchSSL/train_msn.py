"""Pre-train an encoder on images without labels: Masked Siamese Networks (Assran et al., ECCV 2022, arXiv 2204.07141).

    python train_msn.py --dataset photos/ --outdir saved_models/msn
    torchrun --standalone --nproc_per_node=4 train_msn.py --dataset photos/ --outdir saved_models/msn

An alternative to the published weights, which are CC BY-NC. A vision transformer learns to assign a masked view of an
image and small crops of it to the prototypes that a moving average of itself assigns to the whole view. The average,
OUTDIR/encoder.pth.tar, is the file for `--encoder` of other scripts. The same command again continues an interrupted
run.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from shared import distributed
from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, less_memory, parse, run_main
from shared.data.images import ImageSet, UnequalSizes
from shared.data.photographs import MEAN, STD, PhotographSet, image_size, list_photographs, list_unlabeled
from shared.data.pool import make_pool
from shared.distributed import World
from shared.parallel import Prefetched
from shared.training.checkpoint import write_checkpoint
from shared.training.ema import EMA
from shared.training.log import Log
from shared.training.precision import autocast, default_precision, set_arithmetic, to_device
from shared.training.randomness import numpy_rng
from shared.training.run import Run
from TorchSSL.core.data import load_pools
from TorchSSL.encoders.msn import (
    initial_prototypes,
    learning_rate,
    loss_terms,
    projection_head,
    target_momentum,
    targets,
    weight_decay,
)
from TorchSSL.encoders.views import ViewDraws, draw_views, make_views
from TorchSSL.encoders.vit import SIZES, VisionTransformer

FLAGS = {
    "data": (
        Option("--dataset", Text, "digits", "a data set by name, or the path of your own images"),
        Option("--data_dir", Text, "./data", "folder of the published data sets"),
        Option("--download", Flag, False, "fetch a published data set missing in --data_dir"),
        Option("--outdir", required=True, metavar="DIR", help="run folder"),
    ),
    "encoder": (
        Option("--model", Choice(*SIZES), "deit_small", "published size; the next flags replace parts of it"),
        Option("--img_size", Int(8), 224, "side of the views", unit="pixels"),
        Option("--patch_size", Int(1), None, "side of a patch", unit="pixels", default_help="the model's"),
        Option("--embed_dim", Int(1), None, "width", default_help="the model's"),
        Option("--depth", Int(1), None, "blocks", default_help="the model's"),
        Option("--num_heads", Int(1), None, "heads of attention", default_help="the model's"),
        Option("--hidden", Int(1), 2048, "width of the projection head"),
        Option("--output_dim", Int(1), 256, "output size of the projection head"),
        Option("--prototypes", Int(2), 1024, "prototypes; about ten a class suffice for small sets"),
    ),
    "views": (
        Option("--mask", Float(0, 1, open="high"), 0.15, "fraction of patches dropped from the large anchor view"),
        Option("--focal_views", Int(0), 10, "small anchor views of an image"),
        Option("--focal_size", Int(4), 96, "side of the small anchor views", unit="pixels"),
        Option("--area", Float(0, 1, open="low"), 0.3, "least fraction of an image in a large view; small ones: less"),
        Option("--flip", Bool, True, "mirror half of the views"),
    ),
    "training": (
        Option("--epochs", Int(1), 800, "passes over the images"),
        Option("--batch_size", Int(2), 1024, "batch of all processes together", unit="images"),
        Option("--warmup", Int(0), 15, "linear rise of the learning rate", unit="epochs"),
        Option("--start_lr", Float(0), 0.0002, "learning rate at the start"),
        Option("--lr", Float(0), 0.001, "maximum learning rate"),
        Option("--final_lr", Float(0), 1e-6, "learning rate at the end of the cosine"),
        Option("--weight_decay", Float(0), 0.04, "weight decay at the start"),
        Option("--final_weight_decay", Float(0), 0.4, "weight decay at the end"),
        Option("--clip", Float(0, open=True), 3.0, "maximum norm of the encoder's gradient"),
        Option("--momentum", Float(0, 1), 0.996, "momentum of the moving average at the start"),
        Option("--me_max", Float(0), 1.0, "weight of the term that spreads images over the prototypes"),
        Option("--sinkhorn", Bool, True, "balance the targets over the prototypes"),
    ),
    "running": (
        Option("--seed", Int(0), 0, "seed of initial weights and all draws"),
        Option("--precision", Choice("auto", "fp32", "bf16"), "auto", "auto: bf16 on GPUs that have it"),
        Option("--device", Text, None, "cpu, cuda, cuda:N", default_help="a GPU if available"),
        Option("--decoder", Choice("auto", "dali", "torchvision"), "auto", "decoder of photographs"),
        Option("--workers", Int(1), 4, "decoding threads, in fours"),
        Option("--save_seconds", Float(0, open=True), 600.0, "time between two checkpoints", unit="s"),
        Option("--log_every", Int(1), 50, "steps between two lines of the log"),
        Option("--overwrite", Flag, False, "move another run in the folder aside and start anew"),
    ),
}
FREE = ("outdir", "data_dir", "download", "device", "decoder", "workers", "save_seconds", "log_every", "overwrite",
        "dataset", "given")
PHOTOGRAPH = 128  # own images with this side at least, or of unequal sizes, are decoded one batch at a time


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    architecture = check(options)
    world = distributed.start(options.device)
    content = distributed.on_main(lambda: open_images(options).fingerprint, world)  # decodes them, too
    images = open_images(options)
    if options.batch_size > len(images):
        raise UserError(f"--batch_size: {options.dataset} has only {len(images)} images")
    world.slice(options.batch_size)
    train(options, architecture, images, content, world)
    distributed.stop()


def check(options: SimpleNamespace) -> dict[str, int]:
    """Return the encoder's architecture; UserError for contradicting sizes."""
    size = SIZES[options.model]
    given = {name: getattr(options, name) or getattr(size, name) for name in size._fields}
    for flag in ("img_size", "focal_size"):
        if getattr(options, flag) % given["patch_size"]:
            raise UserError(f"--{flag}: {getattr(options, flag)} is no multiple of the patches' side, "
                            f"{given['patch_size']}")
    if given["embed_dim"] % given["num_heads"]:
        raise UserError(f"--embed_dim: {given['embed_dim']} cannot be shared by {given['num_heads']} heads")
    return {"img_size": options.img_size, **given}


def open_images(options: SimpleNamespace) -> ImageSet | PhotographSet:
    """Return the training images; labels are ignored."""
    folder = Path(options.dataset)
    if not (folder / "train").is_dir():
        return load_pools(options.dataset, options.data_dir, options.download)[1]
    photographs, unlabeled = list_photographs(folder / "train"), folder / "unlabeled"
    if unlabeled.is_dir():
        photographs = photographs.concatenate(list_unlabeled(unlabeled))
    if min(image_size(Path(photographs.files[0]).read_bytes())) >= PHOTOGRAPH:
        return photographs
    try:
        return load_pools(options.dataset, options.data_dir, options.download)[1]
    except UnequalSizes:
        return photographs


class Student(nn.Module):
    """The trained encoder, with its projection head and the prototypes."""

    def __init__(self, architecture: dict[str, int], options: SimpleNamespace) -> None:
        super().__init__()
        head = projection_head(architecture["embed_dim"], options.hidden, options.output_dim)
        self.encoder = VisionTransformer(**architecture, head=head)
        self.prototypes = initial_prototypes(options.prototypes, options.output_dim)

    def forward(self, large: Tensor, small: Tensor | None, kept: Tensor) -> Tensor:
        """Return the anchors' projections [V * B, D], view by view: large ones with the `kept` patches, then small."""
        tokens = [self.encoder.class_token(large, kept)]
        if small is not None:
            tokens.append(self.encoder.class_token(small))
        return self.encoder.fc(torch.cat(tokens))


@less_memory("--batch_size")
def train(options: SimpleNamespace, architecture: dict[str, int], images: ImageSet | PhotographSet, content: str,
          world: World) -> None:
    """Train and write OUTDIR/encoder.pth.tar. content: the images' fingerprint."""
    # Network, its moving copy, optimizer.
    precision = default_precision(world.device) if options.precision == "auto" else options.precision
    set_arithmetic(strict=False)
    torch.manual_seed(options.seed)
    student = distributed.sync_batchnorm(Student(architecture, options), world).to(world.device).train()
    target = EMA(student.encoder, buffers="keep")
    target.module.train()  # its batch norm looks at the batch, too
    matrices = [p for p in student.encoder.parameters() if p.ndim > 1]
    vectors = [p for p in student.encoder.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": [*vectors, student.prototypes],
                                                          "weight_decay": 0.0}])
    # Where to go on.
    per_epoch = len(images) // options.batch_size
    total = options.epochs * per_epoch
    settings = {key: value for key, value in vars(options).items() if key not in FREE}
    log = Log(options.outdir, world, every=options.log_every, image_batch=options.batch_size)
    run = Run(options.outdir, {**settings, **architecture, "precision": precision},
              dict(student=student, target=target, optimizer=optimizer), world, log=log,
              inputs={"--dataset": content}, overwrite=options.overwrite,
              save_seconds=options.save_seconds)
    model = distributed.data_parallel(student, world)
    batches = Batches(options, images, per_epoch, architecture, world)
    make_batch = Prefetched(batches, total - 1) if isinstance(images, PhotographSet) else batches

    for step in run.steps(total):
        whole, large, small, kept = make_batch(step)
        with autocast(world.device, precision):
            with torch.no_grad():
                z = target.module(whole)
            anchors = model(large, small, kept)
        wanted = targets(z.float(), student.prototypes, balance=options.sinkhorn, world=world)
        cross_entropy, me_max, entropy = loss_terms(anchors.float(), wanted, student.prototypes, world=world)
        loss = cross_entropy + options.me_max * me_max
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        rate = learning_rate(step + 1, total, options.warmup * per_epoch, options.start_lr, options.lr,
                             options.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.param_groups[0]["weight_decay"] = weight_decay(step + 1, total, options.weight_decay,
                                                                 options.final_weight_decay)
        norm = nn.utils.clip_grad_norm_(student.encoder.parameters(), options.clip)
        optimizer.step()
        target.update(student.encoder, target_momentum(step, total, options.momentum))
        log.add(loss=loss, cross_entropy=cross_entropy, me_max=me_max, entropy=entropy, gradient_norm=norm, lr=rate)

    if world.main:
        path = Path(options.outdir) / "encoder.pth.tar"
        write_checkpoint(path, dict(target_encoder=target.module.state_dict(), prototypes=student.prototypes.detach(),
                                    epoch=options.epochs, architecture={**architecture, "mlp_ratio": 4},
                                    batch_size=options.batch_size, lr=options.lr), keep_former=False)
        log.print(f"encoder: {path}")


class Batches:
    """The views of a step, for this rank: (whole, large anchor, small anchors or None, kept patches)."""

    def __init__(self, options: SimpleNamespace, images: ImageSet | PhotographSet, per_epoch: int,
                 architecture: dict[str, int], world: World) -> None:
        self.options, self.per_epoch = options, per_epoch
        self.pool = make_pool(images, MEAN, STD, world.device, options.workers, options.decoder)
        self.part = world.slice(options.batch_size)
        self.order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # of an epoch
        self.patches = (options.img_size // architecture["patch_size"]) ** 2

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        options = self.options
        epoch, place = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, numpy_rng(options.seed, epoch, "order").permutation(len(self.pool))
        images = self.pool.take(self.order[1][place * options.batch_size:][self.part])
        whole, large = (make_views(images, self.draw(step, name, (options.area, 1.0)), options.img_size)
                        for name in ("target", "large"))
        small = [make_views(images, self.draw(step, f"small {number}", (options.area / 6, options.area)),
                            options.focal_size) for number in range(options.focal_views)]
        kept = numpy_rng(options.seed, step, "mask").permutation(self.patches)
        kept = kept[:max(1, math.floor(self.patches * (1 - options.mask)))]
        return whole, large, torch.cat(small) if small else None, to_device(kept, images.device)

    def draw(self, step: int, name: str, area: tuple[float, float]) -> ViewDraws:
        """Draw for the global batch; return this rank's part."""
        rng: np.random.Generator = numpy_rng(self.options.seed, step, f"{name} view")
        return draw_views(self.options.batch_size, rng, area, self.options.flip)[self.part]


if __name__ == "__main__":
    run_main(main)
