"""The command line: ``mobilemamba train | classify | export | convert | info``.

What a user can get wrong is one line on stderr and exit code 2; anything else that fails shows its traceback.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__

__all__ = ["main"]

METAVARS = {int: "N", int | None: "N", float: "X"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 where the user's input is refused, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        print(f"mobilemamba {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ": --resume goes on from the latest epoch" if args.command == "train" else ""
        print(f"\nmobilemamba {args.command}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """Refuses in one line, as everything else does, without the usage above it."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> Parser:
    parser = Parser(prog="mobilemamba", description="MobileMamba: train, classify, export, convert, info.")
    parser.add_argument("--version", action="version", version=f"mobilemamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    add_classify_options(command("classify", classify, "Name what is in images."))
    add_train_options(command("train", train, "Train a model; a killed run goes on with --resume."))
    add_export_options(command("export", export, "Write a model for programs without Python; checked after writing."))
    sub = command("convert", convert, "Convert a published checkpoint to safetensors, every key accounted for.")
    sub.add_argument("source", type=Path, metavar="IN", help="published checkpoint, or one of this package")
    sub.add_argument("target", type=Path, metavar="OUT", help="file to write")
    sub.add_argument("--model", metavar="NAME", help="preset of IN, where the file does not say it")
    sub = command("info", info, "Print versions, backends and paths: what a bug report needs.")
    sub.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def add_classify_options(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes to print (default: 5)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")


def add_export_options(parser: Parser) -> None:
    from .export import DTYPES, FORMATS

    parser.add_argument("target", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--format", required=True, choices=FORMATS, help="%(choices)s")
    add_model_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="%(choices)s (default: float32)")
    parser.add_argument("--trainable", action="store_true", help="keep BatchNorm; by default it is folded away")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the file will run (default: cpu)")


def add_model_options(parser: Parser) -> None:
    parser.add_argument("--model", metavar="NAME", help="preset (default: nano), or that of PATH")
    parser.add_argument("--distilled", action="store_true", help="the weights that were trained with a teacher")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="weights of your own")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="names of the classes, one in a line")


def add_train_options(parser: Parser) -> None:
    """An option for each field of ``TrainConfig``, and those that do not change the result."""
    from .train import TrainConfig

    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"] + ("" if field.default is None else " (default: %(default)s)")
        kind: dict[str, Any] = {"type": types[field.name], "metavar": METAVARS.get(types[field.name], "NAME")}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.default is None:
            kind["type"] = positive
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=text, **kind)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the latest epoch in DIR")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: all)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def train(args: argparse.Namespace) -> None:
    import torch

    from .train import TrainConfig
    from .train import train as run

    if args.threads:
        torch.set_num_threads(args.threads)
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    accuracy = run(config, args.out, checked_device(args.device), args.resume)
    print(f"test accuracy {accuracy:.2%} of {args.out / 'model.pt'}")


def classify(args: argparse.Namespace) -> None:
    import torch

    device = checked_device(args.device)
    model, labels, preprocessing = open_model(args)
    if model.num_classes == 0:
        raise ValueError(f"{args.checkpoint}: expected a model with classes, got one without a head (num_classes=0)")
    prepare = preprocessing.transforms()
    model = model.fuse().to(device)
    rows: list[torch.Tensor] = []
    for start in range(0, len(args.images), args.batch_size):
        batch = torch.stack([prepare(path) for path in args.images[start : start + args.batch_size]])
        with torch.inference_mode():
            rows += model(batch.to(device)).float().cpu()
    results = []
    for path, row in zip(args.images, rows, strict=True):
        if not row.isfinite().all():
            raise ValueError(f"{path}: expected finite outputs of the model, got {row.tolist()!s:.60}")
        top = row.softmax(0).topk(min(args.topk, model.num_classes))
        predictions = [
            {"class": index, "label": labels[index] if labels else None, "probability": probability}
            for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        results.append({"image": str(path), "predictions": predictions})
    print(json.dumps(results, indent=2) if args.json else "\n\n".join(map(table, results)))


def export(args: argparse.Namespace) -> None:
    from .export import export as write

    device = checked_device(args.device)
    model, labels, preprocessing = open_model(args)
    difference = write(
        model.to(device),
        args.target,
        args.format,
        labels=labels,
        preprocessing=preprocessing,
        dtype=args.dtype,
        fuse=not args.trainable,
    )
    size = args.target.stat().st_size / 1e6
    print(f"{args.target}: {args.format}, {args.dtype}, {size:.1f} MB, logits within {difference:.1e} of the model's")


def read_labels(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected names in UTF-8, one in a line, got other bytes ({error})") from error


def table(result: dict[str, Any]) -> str:
    """The image's path, and below it a line for each class."""
    rows = [(p["label"] or f"class {p['class']}", p["probability"]) for p in result["predictions"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join([result["image"], *(f"  {name:<{width}}  {probability:6.1%}" for name, probability in rows)])


def open_model(args: argparse.Namespace) -> tuple[Any, Sequence[str] | None, Any]:
    """The model with its weights, its labels and its preprocessing, as the options say."""
    from . import weights, zoo

    if args.checkpoint is None:
        name = args.model or "nano"
        model = zoo.create_model(name, pretrained="distilled" if args.distilled else True)
        stored = weights.entry(name, args.distilled)
    else:
        if args.distilled:
            raise ValueError("--distilled goes with --model, expected either it or --checkpoint")
        model, stored = zoo.open_model(args.checkpoint, args.model)
    labels = read_labels(args.labels) if args.labels else stored.labels
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(
            f"{args.labels or args.checkpoint}: expected {model.num_classes} labels, one in a line, got {len(labels)}"
        )
    return model, labels, stored.preprocessing


def checked_device(name: str) -> str:
    """``name``, where this torch has such a device."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    having = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    if name not in having:
        raise ValueError(f"device '{name}' is not available; expected {' or '.join(having)}")
    return name


def convert(args: argparse.Namespace) -> None:
    from . import zoo

    done = zoo.convert(args.source, args.target, preset=args.model)
    print(f"{args.target}: {done['preset']}, {done['tensors']} tensors, sha256 {done['sha256']}")


def info(args: argparse.Namespace) -> None:
    from . import info as report

    collected = report.collect()
    print(json.dumps(collected, indent=2) if args.json else report.format_text(collected))


if __name__ == "__main__":
    raise SystemExit(main())
