"""Flags that the scripts for DiT have in common."""
from __future__ import annotations

import argparse

from shared.cli import Parser


def dit_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with --dataset, --use_amp and what concerns machine and files."""
    parser = Parser(description=description.strip().split("\n\n")[0])
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", choices=("cifar", "tiny"), default="cifar", help="CIFAR-10 or Tiny-ImageNet")
    parser.add_argument("--use_amp", action="store_true", help="half precision: fp16 on a GPU, bf16 on a CPU")
    parser.add_argument("--codes", default="latent_codes", metavar="DIR", help="folder of the latents [latent_codes]")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:N or mps [a GPU if there is one]")
    parser.add_argument("--seed", type=int, default=0)
    return parser
