"""``mobilemamba classify``: prints the most probable classes of images, as they are made."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from .images import ImageReader, add_images_argument
from .options import Parser, add_device_option, add_model_options, checked_device, open_model, positive
from .results import print_json, print_tables

HELP = "Print the most probable classes of images. The exit code is 1 if some of them cannot be read."


def add_options(parser: Parser) -> None:
    add_images_argument(parser)
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
    reader = ImageReader("classify", prepare)

    def results() -> Iterator[dict[str, Any]]:
        for chunk in reader.chunks(args.images, args.batch_size):
            with torch.inference_mode():
                rows = model(torch.stack([image for _, image in chunk]).to(device)).float().cpu()
            for (path, _), row in zip(chunk, rows, strict=True):
                if not row.isfinite().all():
                    reader.refuse(f"{path}: expected finite outputs of the model, got {row.tolist()!s:.60}")
                    continue
                top = row.softmax(0).topk(min(args.topk, model.num_classes))
                predictions = [
                    {"class": index, "label": labels[index] if labels else None, "probability": probability}
                    for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
                yield {"image": path, "predictions": predictions}

    print_json(results()) if args.json else print_tables(results(), table)
    return int(reader.failed)


def table(result: dict[str, Any]) -> str:
    """The image's path, then a line for each class."""
    rows = [(p["label"] or f"class {p['class']}", p["probability"]) for p in result["predictions"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join([result["image"], *(f"  {name:<{width}}  {probability:6.1%}" for name, probability in rows)])
