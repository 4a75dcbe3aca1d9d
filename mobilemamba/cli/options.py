"""Options that several commands share, and functions that turn their values into models and devices."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import weights, zoo
from ..data import Preprocessing
from ..data.preprocessing import INTERPOLATIONS
from ..models import MobileMamba

__all__ = ["Parser", "add_device_option", "add_model_options", "checked_device", "one_line", "open_model", "positive"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage. Its paths may start with ``~``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, path)
        self.register("type", int, whole)
        self.register("type", float, number)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """Refuses the rest: a command's own parser is called with this method, and knows its name."""
        namespace, rest = super().parse_known_args(*args, **kwargs)
        if rest:
            self.error(f"unknown arguments: {' '.join(rest)}; {self.prog} --help lists those that it takes")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def path(text: str) -> Path:
    """The type of a path: a ``~`` at its start means the home folder."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got an address: download it first ({text})")
    return Path(os.path.expanduser(text))


def whole(text: str) -> int:
    """The type of an integer."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from error


def number(text: str) -> float:
    """The type of a floating-point number."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from error


def positive(text: str) -> int:
    """The type of an integer of at least 1."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def per_channel(text: str) -> tuple[float, ...]:
    """The type of an option: numbers with commas between them."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.5,0.5,0.5, got '{text}'") from None


def one_line(error: BaseException) -> str:
    """The message of an error, without the number that the system's errors begin with."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def add_device_option(parser: Parser, what: str = "") -> None:
    parser.add_argument("--device", default="cpu", help=f"cpu or cuda{what} (default: cpu)")


def checked_device(name: str) -> str:
    """``name``, if this torch has that device.

    Raises:
        ValueError: this torch does not have it.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    having = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if name not in having:
        raise ValueError(f"device '{name}' is not available; expected {' or '.join(having)}")
    return name


def add_model_options(parser: Parser) -> None:
    parser.add_argument("--model", metavar="NAME", help="preset (default: nano); with --checkpoint, the preset of PATH")
    parser.add_argument("--distilled", action="store_true", help="use the weights that were trained with a teacher")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="use the weights in this file")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one per line")
    group = parser.add_argument_group("preprocessing", "default: as the checkpoint states, otherwise the preset's")
    group.add_argument("--mean", type=per_channel, metavar="X,...", help="a value for each channel of images in [0, 1]")
    group.add_argument("--std", type=per_channel, metavar="X,...", help="standard deviation for each channel")
    group.add_argument("--resize", type=positive, metavar="N", help="short side in pixels after resizing")
    group.add_argument("--crop", type=positive, metavar="N", help="side of the centre square in pixels")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="of resizing")


def open_model(args: argparse.Namespace) -> tuple[MobileMamba, Sequence[str] | None, Preprocessing]:
    """The model, its labels and its preprocessing, from the options of :func:`add_model_options`.

    Raises:
        OSError: a file is missing, or the download failed.
        ValueError: the options exclude each other, or a file does not fit.
    """
    if args.checkpoint is None:
        model, stored = zoo.open_model(weights.entry(args.model or "nano", args.distilled))
    elif args.distilled:
        raise ValueError("expected either --distilled or --checkpoint, got both")
    else:
        model, stored = zoo.open_model(args.checkpoint, args.model)
    labels = read_labels(args.labels) if args.labels else stored.labels
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(
            f"{args.labels or stored.path}: expected {model.num_classes} labels, one per line, got {len(labels)}"
        )
    return model, labels, stated_preprocessing(args, stored, model.in_chans)


def stated_preprocessing(args: argparse.Namespace, stored: weights.Checkpoint, channels: int) -> Preprocessing:
    """The preprocessing of ``stored``, or its preset's, with the fields that the options state instead."""
    assert stored.preset is not None
    known = stored.preprocessing or weights.entry(stored.preset).preprocessing
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    stated = {name: value for name in names if (value := getattr(args, name)) is not None}
    preprocessing = dataclasses.replace(known, **stated)
    if preprocessing.channels != channels:
        raise ValueError(
            f"{stored.path}: the weights take images of {channels} channels, but mean and std are known for "
            f"{preprocessing.channels}; state --mean and --std with {channels} values each"
        )
    return preprocessing


def read_labels(path: Path) -> list[str]:
    """The lines of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected names in UTF-8, one per line, got other bytes ({error})") from error
