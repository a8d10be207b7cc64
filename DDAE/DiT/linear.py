"""Linear probe of a DiT trained on ImageNet 256x256, on CIFAR-10 or Tiny-ImageNet latents.

    python linear.py --dataset cifar --use_amp
    torchrun --standalone --nproc_per_node=4 linear.py --dataset tiny --use_amp
    python linear.py --name layer-12,layer-13,layer-14 --time 81,121,161     # nine probes in one run

The latents come from vae_preprocessing.py, the weights from pretrained_models/DiT-XL-2-256x256.pt. A feature is the
mean over tokens of one block's output for a noised latent without class; the blocks behind it do not run.
The same command again continues.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from DDAE.ddae.options import choose_precision
from DDAE.DiT.options import code_folder, dit_parser
from shared.cli import UserError, run_main
from shared.lazy import lazy
from shared.training.precision import autocast

if TYPE_CHECKING:
    from DDAE.DiT.latents import Latents
    from DDAE.DiT.network import DiT
    from shared.distributed import World

np, torch = lazy("numpy"), lazy("torch")

BLOCK = "layer-13"
LEVEL = {"tiny": 81}        # 121 for all others
STEPS = 1000


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = dit_parser(__doc__)
    parser.add_argument("--batch_size", type=int, default=128, help="per process [128]")
    parser.add_argument("--lr", type=float, default=1e-3, help="for one process; multiplied by their number [1e-3]")
    parser.add_argument("--epoch", type=int, default=30, help="epochs of training [30]")
    parser.add_argument("--time", default=None, help="noise level 0..999, or several: 81,121  [121; tiny: 81]")
    parser.add_argument("--name", default=BLOCK, help=f"block from layer-0 on, or several: layer-9,layer-13  [{BLOCK}]")
    parser.add_argument("--num_copies", type=int, default=None, help="use only so many augmented copies [all]")
    parser.add_argument("--ckpt", default="pretrained_models/DiT-XL-2-256x256.pt", metavar="FILE",
                        help="weights: a state dict, or a dict with the entry ema")
    parser.add_argument("--model", default="DiT-XL/2", help="DiT-{XL,L,B,S}/{2,4,8} [DiT-XL/2]")
    parser.add_argument("--outdir", default="linear_probe", metavar="DIR", help="results, one folder a data set "
                        "[linear_probe]")
    options = parser.parse_args(argv)
    if options.batch_size < 1 or options.epoch < 1 or options.lr <= 0:
        raise UserError("--batch_size and --epoch must be at least 1, --lr above 0")
    options.names = options.name.split(",")
    options.times = parse_times(options.time, options.dataset)
    return options


def parse_times(text: str | None, dataset: str) -> list[int]:
    """Return the noise levels; a negative one is the published way to ask for the default."""
    if text is None:
        return [LEVEL.get(dataset, 121)]
    try:
        times = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--time {text}: expected whole numbers from 0 to {STEPS - 1}, separated by commas") from None
    if any(time >= STEPS for time in times):
        raise UserError(f"--time {text}: expected 0 to {STEPS - 1}")
    return [LEVEL.get(dataset, 121) if time < 0 else time for time in times]


def main() -> None:
    options = parse()
    from DDAE.ddae.heads import LinearHeads
    from DDAE.ddae.probe import test_heads, train_heads
    from DDAE.DiT.latents import read_latents
    from shared import distributed
    from shared.training.log import Log
    from shared.training.run import Run

    world = distributed.start(options.device)
    options.precision = choose_precision(options, world.device)
    folder = code_folder(options)
    train, test = read_latents(folder, "train"), read_latents(folder, "test")
    if options.num_copies is not None:
        train = type(train)(train.copies[:max(1, options.num_copies)], train.labels)
    net = load_dit(options.ckpt, options.model, train.copies[0].shape[-1], world.device)
    net.check_names(options.names)

    keys = {f"{time}/{name}": net.width for time in options.times for name in options.names}
    heads = LinearHeads(keys, int(train.labels.max()) + 1, options.seed).to(world.device)
    optimizer = torch.optim.Adam(heads.parameters())
    size = options.batch_size * world.size
    config = {"dataset": options.dataset, "probes": list(keys), "batch": size, "lr": options.lr * world.size,
              "epochs": options.epoch, "model": options.model, "ckpt": Path(options.ckpt).name, "seed": options.seed,
              "copies": len(train.copies), "precision": options.precision}
    outdir = Path(options.outdir) / folder.name
    log = Log(outdir, world, image_batch=size, desc="linear probe")
    run = Run(outdir, config, dict(heads=heads, optimizer=optimizer), world, log=log, restart=True)
    if not run.finished:
        run.log.print(f"{options.model}: {', '.join(keys)} on {len(train)} latents of {len(train.copies)} copies; "
                  f"{world.size} process(es) on {world.device.type}")
    examples = Examples(net, train, size, options, world)
    train_heads(run, heads, optimizer, examples, options.epoch, -(-len(train) // size), options.lr * world.size)
    accuracies = test_heads(heads, test_examples(net, test, options, world), world)
    report(run, heads, accuracies, world)
    distributed.stop()


def load_dit(path: str, name: str, input_size: int, device: torch.device) -> DiT:
    """Return the network with the weights of `path`, without gradients; UserError where they are missing or others'."""
    from DDAE.DiT.network import make_dit
    from shared.training.checkpoint import read_checkpoint

    if not Path(path).is_file():
        raise UserError(f"--ckpt {path}: no such file; put the published DiT-XL-2-256x256.pt there, or name yours")
    state = read_checkpoint(path)
    state = state["ema"] if isinstance(state.get("ema"), dict) else state
    with torch.device("meta"):  # 2.7 GB of initial weights would only be replaced
        net = make_dit(name, input_size)
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"--ckpt {path}: not the weights of {name} for latents of {input_size} x {input_size}: "
                        f"{wrong[0]} is missing, superfluous or of another shape ({len(wrong)} such tensors)")
    net.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return net.to(device).eval().requires_grad_(False)


class Examples:
    """The features of a step: each latent from a copy drawn at random, with fresh noise."""

    def __init__(self, net: DiT, latents: Latents, size: int, options: argparse.Namespace, world: World) -> None:
        self.net, self.latents, self.size, self.options, self.world = net, latents, size, options, world

    def __call__(self, step: int) -> tuple[dict[str, Any], torch.Tensor, float]:
        from DDAE.ddae.batches import share_out
        from shared.training.randomness import numpy_rng, torch_rng

        seed, count, device = self.options.seed, len(self.latents), self.world.device
        epoch, place = divmod(step, -(-count // self.size))
        items = numpy_rng(seed, epoch, "order").permutation(count)[place * self.size:(place + 1) * self.size]
        copies = numpy_rng(seed, step, "copies").integers(len(self.latents.copies), size=len(items))
        part = share_out(len(items), self.world)
        codes = torch.from_numpy(self.latents.take(copies[part], items[part])).to(device)

        def noise(time: int) -> torch.Tensor:
            rng = torch_rng(seed, step, f"noise {time}", device)
            return torch.randn(len(items), *codes.shape[1:], generator=rng, device=device)[part]

        labels = torch.from_numpy(self.latents.labels[items[part]]).to(device)
        return probe_features(self.net, codes, noise, self.options), labels, len(codes) / len(items)


def test_examples(net: DiT, latents: Latents, options: argparse.Namespace, world: World
                  ) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Yield (features, labels) of this rank's items; their noise depends on the item alone."""
    from DDAE.ddae.batches import item_noise, share_out
    from shared.training.progress import progress

    part = share_out(len(latents), world)
    for start in progress(range(part.start, part.stop, options.batch_size), "test", unit="batches", shown=world.main):
        items = np.arange(start, min(start + options.batch_size, part.stop))
        codes = torch.from_numpy(latents.take(np.zeros_like(items), items)).to(world.device)
        noise = item_noise(options.seed, items, codes.shape[1:], "test noise").to(world.device)
        labels = torch.from_numpy(latents.labels[items]).to(world.device)
        yield probe_features(net, codes, lambda time, noise=noise: noise, options), labels


def probe_features(net: DiT, codes: torch.Tensor, noise: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Return "time/block" -> float32 [n, width], one pass per noise level; noise: level -> [n, C, S, S]."""
    from DDAE.DiT.probe import latent_features

    with torch.no_grad(), autocast(codes.device, options.precision):
        return {f"{time}/{name}": value for time in options.times
                for name, value in latent_features(net, codes, time, options.names, noise(time)).items()}


def report(run: Any, heads: Any, accuracies: dict[str, float], world: World) -> None:
    """Print the accuracies; write result.json and the heads."""
    from DDAE.ddae.probe import write_result

    for key, accuracy in accuracies.items():
        run.log.print(f"{'' if len(accuracies) == 1 else f'[key {key}]: '}Test acc: {100 * accuracy:.2f}")
    if world.main:
        write_result(run, heads, accuracies, next(iter(accuracies)))


if __name__ == "__main__":
    run_main(main)
