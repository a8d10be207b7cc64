"""Flags that DDAE's scripts have in common, and what they say about the arithmetic."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shared.cli import Parser, UserError

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "bf16", "fp16")
SEED = 1337


def ddae_parser(description: str, config: bool = True) -> Parser:
    """Return a parser with the flags of every script; `config`: also --config and --use_amp."""
    parser = Parser(description=description.strip().split("\n\n")[0])
    # Launchers pass one or the other spelling, or only environment variables, which are what counts.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    if config:
        parser.add_argument("--config", metavar="YAML", help="configuration, for instance config/DDPM_ddpm.yaml")
        parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config in "
                            "place of the file's, for instance --set n_epoch=10 --set linear.timestep=21")
        parser.add_argument("--use_amp", action="store_true",
                            help="mixed precision: bf16 where the device has it, else fp16")
    parser.add_argument("--precision", choices=PRECISIONS, help="arithmetic of the network; overrules --use_amp [fp32]")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps [a GPU if there is one]")
    parser.add_argument("--data_dir", default="./data", metavar="DIR", help="folder of the data sets [./data]")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of every random number [{SEED}]")
    return parser


def choose_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Return fp32, bf16 or fp16: what --precision says, else what --use_amp means on this device."""
    from shared.training.precision import has_bf16

    if args.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU half precision is bf16")
    if args.precision is not None:
        return args.precision
    if not getattr(args, "use_amp", False):
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"
