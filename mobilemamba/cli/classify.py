"""``mobilemamba classify``: prints the most probable classes of images, as they are made."""

import argparse
import glob
import itertools
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..data import find_images
from ..data.image_files import describe_skipped, read_ahead
from .options import Parser, add_device_option, add_model_options, checked_device, one_line, open_model, positive

HELP = "Print the most probable classes of images. The exit code is 1 if some of them cannot be read."


def add_options(parser: Parser) -> None:
    text = "image file, folder (with its subfolders), or pattern such as 'DIR/*.jpg'"
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help=text)
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per pass (default: 32)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    device = checked_device(args.device)
    model, labels, preprocessing = open_model(args)
    if model.num_classes == 0:
        raise ValueError(f"{args.checkpoint}: expected a model with classes, got one without a head (num_classes=0)")
    prepare = preprocessing.transforms()
    model = model.fuse().to(device)
    failed = False

    def refuse(error: Exception | str) -> None:
        nonlocal failed
        failed = True
        message = one_line(error) if isinstance(error, Exception) else error
        print(f"mobilemamba classify: error: {message}", file=sys.stderr)

    def read(path: str) -> tuple[str, torch.Tensor | Exception]:
        try:
            return path, prepare(path)
        except (OSError, ValueError) as error:
            return path, error

    def results() -> Iterator[dict[str, Any]]:
        images = read_ahead(read, find(args.images, refuse), 2 * args.batch_size)
        while chunk := list(itertools.islice(images, args.batch_size)):
            good = [(path, image) for path, image in chunk if isinstance(image, torch.Tensor)]
            for _, error in chunk:
                if isinstance(error, Exception):
                    refuse(error)
            if not good:
                continue
            with torch.inference_mode():
                rows = model(torch.stack([image for _, image in good]).to(device)).float().cpu()
            for (path, _), row in zip(good, rows, strict=True):
                if not row.isfinite().all():
                    refuse(f"{path}: expected finite outputs of the model, got {row.tolist()!s:.60}")
                    continue
                top = row.softmax(0).topk(min(args.topk, model.num_classes))
                predictions = [
                    {"class": index, "label": labels[index] if labels else None, "probability": probability}
                    for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
                yield {"image": path, "predictions": predictions}

    (print_json if args.json else print_tables)(results())
    return int(failed)


def find(arguments: Iterable[Path], refuse: Callable[[Exception | str], None]) -> Iterator[str]:
    """The paths of the images that the arguments name: files, folders, patterns."""
    for argument in map(str, arguments):
        paths = [argument]
        if set("*?[") & set(argument) and not os.path.lexists(argument):
            paths = sorted(glob.glob(argument))
            if not paths:
                refuse(f"{argument}: no file matches this pattern")
        for path in paths:
            yield from images_in(path, refuse) if os.path.isdir(path) else (path,)


def images_in(folder: str, refuse: Callable[[Exception | str], None]) -> Iterator[str]:
    skipped: Counter[str] = Counter()
    count = 0
    try:
        for count, path in enumerate(find_images(folder, skipped), 1):  # noqa: B007
            yield path
    except OSError as error:
        refuse(error)
        return
    told = describe_skipped(skipped)
    if not count:
        refuse(f"{folder}: expected images in the folder, got none" + (f"; {told}" if told else ""))
    elif told:
        print(f"mobilemamba classify: {folder}: {told}", file=sys.stderr)


def print_tables(results: Iterable[dict[str, Any]]) -> None:
    for i, result in enumerate(results):
        print(*([""] if i else []), table(result), sep="\n", flush=True)


def print_json(results: Iterable[dict[str, Any]]) -> None:
    """One list, written item by item."""
    start = "["
    for result in results:
        print(start + "\n" + textwrap.indent(json.dumps(result, indent=2), "  "), end="", flush=True)
        start = ","
    print("\n]" if start == "," else "[]")


def table(result: dict[str, Any]) -> str:
    """The image's path, then a line for each class."""
    rows = [(p["label"] or f"class {p['class']}", p["probability"]) for p in result["predictions"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join([result["image"], *(f"  {name:<{width}}  {probability:6.1%}" for name, probability in rows)])
