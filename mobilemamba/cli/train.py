"""``mobilemamba train``: an option for each field of TrainConfig, and options that do not change the result."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch

from ..training import TrainConfig, train
from .options import Parser, add_device_option, checked_device, positive

HELP = "Train a model from random weights. A killed run continues with --resume."

METAVARS = {int: "N", int | None: "N", float: "X"}


def add_options(parser: Parser) -> None:
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"] + ("" if field.default is None else " (default: %(default)s)")
        kind: dict[str, Any] = {"type": types[field.name], "metavar": METAVARS.get(types[field.name], "NAME")}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.default is None:
            kind["type"] = positive
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **kind)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; made if missing")
    parser.add_argument("--resume", action="store_true", help="continue from the latest epoch in DIR")
    add_device_option(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    accuracy = train(config, args.out, checked_device(args.device), args.resume)
    print(f"test accuracy {accuracy:.2%} of {args.out / 'model.pt'}")
