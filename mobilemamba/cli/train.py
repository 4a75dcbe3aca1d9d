"""``mobilemamba train``: an option for each field of TrainConfig, and options that do not change the result."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import typing
from pathlib import Path
from typing import Any

from ..data.loading import MAX_WORKERS
from ..training import EXIT_CODE, RECIPES, Interrupted, TrainConfig, recipe, stored_config, stored_how, train
from ..training.config import MEASURES
from ..training.recipes import DEFAULT_RECIPES
from .options import Parser, add_device_option, checked_device, one_line, per_channel, positive, whole

LOST = re.compile("connection|peer|gloo|nccl|timed out", re.IGNORECASE)

HELP = "Train a classifier, detector or segmenter, or fine-tune one. A run that was stopped continues with --resume."


def several(text: str) -> tuple[int, ...]:
    """The type of an option: whole numbers with commas between them."""
    return tuple(whole(part) for part in text.split(","))


def positive_minutes(text: str) -> float:
    """The type of a positive number of minutes."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got '{text}'")
    return minutes


METAVARS = {int: "N", int | None: "N", float: "X", float | None: "X"}
TYPES = {
    int | None: positive,
    float | None: float,
    str | None: str,
    tuple[int, ...] | None: several,
    tuple[float, ...] | None: per_channel,
}
OF_LISTS = {tuple[int, ...] | None: "N,...", tuple[float, ...] | None: "X,..."}


def add_options(parser: Parser) -> None:
    types = typing.get_type_hints(TrainConfig)
    parser.add_argument("--recipe", choices=RECIPES, help="options by name; options that are given change it")
    parser.add_argument("--show", action="store_true", help="print the options that this comes to, and stop")
    for field in dataclasses.fields(TrainConfig):
        default = "" if field.default in (None, "") else f" (default: {shown(field.default)})"
        hint = types[field.name]
        kind: dict[str, Any] = {"type": TYPES.get(hint, hint)}
        if hint in (bool, bool | None):
            kind = {"action": argparse.BooleanOptionalAction}
        elif choices := field.metadata["choices"]:
            kind["choices"] = choices
        else:
            kind["metavar"] = METAVARS.get(hint, OF_LISTS.get(hint, "NAME"))
        # an option that is not given is the run's with --resume, and otherwise the recipe's or the default
        name, text = f"--{field.name.replace('_', '-')}", field.metadata["help"] + default
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run; made if missing")
    resume = "continue the run in DIR with its options; --data, --epochs, --teacher and --on-bad-image may be others"
    parser.add_argument("--resume", action="store_true", help=resume)
    save = "minutes between two stored states: what a run that is killed can lose (default: 10)"
    parser.add_argument("--save-every", type=positive_minutes, metavar="MINUTES", help=save)
    workers = (
        f"processes that decode images (default: one for each CPU, at most {MAX_WORKERS}; none for data in memory)"
    )
    parser.add_argument("--workers", type=whole, metavar="N", help=workers)
    add_device_option(parser)
    parser.set_defaults(device=None)  # with --resume, what is not given is as before
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")


def shown(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value in (None, "") else str(value)


def run(args: argparse.Namespace) -> int:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig) if field.name in args}
    if args.resume and args.recipe:
        raise ValueError("expected either --resume, which takes the run's options, or --recipe, got both")
    if args.out is None and (args.resume or not args.show):
        raise ValueError("expected --out DIR, the folder of the run")
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers: expected at least 0, got {args.workers}")
    chosen = {**recipe(args.recipe or DEFAULT_RECIPES[given.get("task", "classify")]), **given}
    config = stored_config(args.out, **given) if args.resume else TrainConfig(**chosen)
    if args.show:
        for name, value in dataclasses.asdict(config).items():
            origin = "given" if name in given else "of the recipe" if not args.resume and name in chosen else ""
            print(f"{name.replace('_', '-'):18} {shown(value):24} {origin}".rstrip())
        return 0
    if args.recipe == "published-1000" and not config.teacher:
        raise ValueError("the recipe published-1000 distils: expected --teacher")
    if args.recipe == "fine-tune" and "model" not in given:
        raise ValueError("the recipe fine-tune: expected --model, the network whose weights it starts from")
    how: dict[str, Any] = {"device": "cpu", "threads": None, "workers": None, "save_every": 10.0}
    how |= stored_how(args.out) if args.resume else {}
    how |= {name: value for name in how if (value := getattr(args, name)) is not None}
    checked_device(how["device"])
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            result = train(config, args.out, resume=args.resume, **how)
        except Interrupted as stop:
            if os.environ.get("RANK", "0") == "0":
                print(f"mobilemamba train: stopped by {stop}; continue with --resume", file=sys.stderr)
            return EXIT_CODE
        except RuntimeError as error:  # of gloo or NCCL
            if os.environ.get("WORLD_SIZE", "1") == "1" or not LOST.search(str(error)):
                raise
            raise ValueError(f"another process of the run has ended ({one_line(error):.120})") from error
        print(f"test {MEASURES[config.task]} {result:.2%} of {args.out / 'model.pt'}")
    return 0
