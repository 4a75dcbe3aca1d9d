"""``mobilemamba train``: an option for each field of TrainConfig, and options that do not change the result."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

import torch

from ..training import TrainConfig, stored_config, train
from .options import Parser, add_device_option, checked_device, positive

HELP = "Train a model from random weights. A run that was killed continues with --resume."

METAVARS = {int: "N", int | None: "N", float: "X", float | None: "X"}
TYPES = {int | None: positive, float | None: float}


def add_options(parser: Parser) -> None:
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {shown(field.default)})")
        kind: dict[str, Any] = {"type": TYPES.get(types[field.name], types[field.name])}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif choices := field.metadata["choices"]:
            kind["choices"] = choices
        else:
            kind["metavar"] = METAVARS.get(types[field.name], "NAME")
        # an option that is not given is the run's with --resume, and otherwise the default
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run; made if missing")
    resume = "continue the run in DIR with its options; only --data, --epochs and --on-bad-image may be others"
    parser.add_argument("--resume", action="store_true", help=resume)
    add_device_option(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")


def shown(default: Any) -> str:
    """A default as the command line writes it."""
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else str(default)


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig) if field.name in args}
    config = stored_config(args.out, **given) if args.resume else TrainConfig(**given)
    accuracy = train(config, args.out, checked_device(args.device), args.resume)
    print(f"test accuracy {accuracy:.2%} of {args.out / 'model.pt'}")
