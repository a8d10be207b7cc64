"""A small training program for the tests of Run: logistic regression with draws that depend on the step alone."""
import json
import os
import sys
import time

import torch

from shared import distributed
from shared.cli import Flag, Float, Int, Option, parse, run_main
from shared.training.ema import EMA
from shared.training.log import Log
from shared.training.randomness import torch_rng
from shared.training.run import Run

FLAGS = (
    Option("outdir", required=True),
    Option("--steps", Int(1), 40),
    Option("--lr", Float(0), 0.1),
    Option("--save-every", Int(1), 7),
    Option("--pause", Float(0), 0.0, unit="s"),
    Option("--overwrite", Flag, None),
    Option("--input", help="a file that the run depends on"),
)


def main() -> None:
    args = parse(__doc__, FLAGS)
    world = distributed.start("cpu")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    ema = EMA(net)
    model = distributed.data_parallel(net, world)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    run = Run(args.outdir, {"lr": args.lr}, dict(net=net, ema=ema, optimizer=optimizer), world,
              overwrite=args.overwrite, save_every=args.save_every,
              log=Log(args.outdir, world, every=5, tensorboard=False),
              inputs={"--input": args.input})
    part = world.slice(12)
    for step in run.steps(args.steps):
        rng = torch_rng(0, step, "batch")
        x, y = torch.randn(12, 5, generator=rng)[part], torch.randint(3, (12,), generator=rng)[part]
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(net, 0.9)
        run.log.add(loss=loss)
        run.state["best"] = max(run.state.get("best", 0.0), float(x.abs().max()))
        if world.main:
            with open(os.path.join(args.outdir, "order.jsonl"), "a") as file:
                file.write(json.dumps([step, int(y[0])]) + "\n")
        time.sleep(args.pause)
    if world.main:
        torch.save({"net": net.state_dict(), "ema": ema.state_dict(), "best": run.state["best"],
                    "adam": optimizer.state_dict()}, os.path.join(args.outdir, "final.pt"))
    distributed.stop()


if __name__ == "__main__":
    sys.exit(run_main(main))
