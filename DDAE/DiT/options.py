"""Flags that the scripts for DiT have in common."""
from __future__ import annotations

import argparse
from pathlib import Path

from DDAE.ddae.options import PRECISIONS
from shared.cli import Parser


def dit_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with --dataset, --use_amp and what concerns machine and files."""
    parser = Parser(description=description.strip().split("\n\n")[0])
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="cifar", help="cifar, tiny, or images by name or path [cifar]")
    parser.add_argument("--use_amp", action="store_true", help="half precision: bf16 where there is, else fp16")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the networks; overrules --use_amp [fp32]")
    parser.add_argument("--codes", default="latent_codes", metavar="DIR", help="folder of the latents [latent_codes]")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:N or mps [a GPU if there is one]")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def code_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the data set's latents."""
    return Path(options.codes) / Path(options.dataset).name
