"""A small training program for the tests of Run: logistic regression with draws that depend on the step alone."""
import json
import os
import sys
import time

import torch

from shared import distributed
from shared.cli import Parser, run_main
from shared.training.ema import EMA
from shared.training.randomness import torch_rng
from shared.training.log import Log
from shared.training.run import Run


def main() -> None:
    parser = Parser()
    parser.add_argument("outdir")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--save-every", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    world = distributed.start("cpu")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    ema = EMA(net)
    model = distributed.data_parallel(net, world)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    run = Run(args.outdir, {"lr": args.lr}, dict(net=net, ema=ema, optimizer=optimizer), world, restart=args.restart,
              save_every=args.save_every, log=Log(args.outdir, world, every=5, tensorboard=False))
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
