"""``mobilemamba segment``: names the class of each pixel of images, and draws the classes over copies."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from ..data import open_image
from ..data.preprocessing import to_mode, to_tensor
from ..downstream import Segmenter
from .drawing import Drawings, class_colors, open_model
from .images import ImageReader, add_images_argument
from .options import Parser, add_device_option, checked_device
from .results import print_json, print_tables

HELP = (
    "Name the class of each pixel with a trained segmenter. "
    "The exit code is 1 if some images cannot be read or give outputs that are not finite."
)


def add_options(parser: Parser) -> None:
    add_images_argument(parser)
    parser.add_argument("--model", "--checkpoint", type=Path, required=True, metavar="PATH", help="trained segmenter")
    text = (
        "draw the classes over copies, IMAGE.segment.png, and write them as numbers, IMAGE.classes.png; copies are not "
        "coloured where the class is 'background', or class 0 of a model without names"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    device = checked_device(args.device)
    model, stored = open_model(args.model, "segment")
    segmenter = cast(Segmenter, model).to(device)
    names = stored.labels or [f"class {i}" for i in range(stored.num_classes)]
    chosen = class_colors(stored.labels, stored.num_classes)
    colors = torch.tensor([color or (0, 0, 0) for color in chosen])
    colored = torch.tensor([color is not None for color in chosen])
    overlays, planes = (
        (Drawings(args.out, f".{what}.png") for what in ("segment", "classes")) if args.out else (None, None)
    )
    reader = ImageReader("segment", lambda path: to_mode(open_image(path), "RGB"))

    def results() -> Iterator[dict[str, Any]]:
        for ((path, image),) in reader.chunks(args.images, 1):
            try:
                pixels = stored.preparation(image)[None].to(device)
                classes = segmenter.predict(pixels, (image.height, image.width))[0].cpu()
            except FloatingPointError as error:
                reader.refuse(f"{path}: {error}")
                continue
            shares = classes.flatten().bincount(minlength=len(names)).tolist()
            order = sorted((i for i, count in enumerate(shares) if count), key=lambda i: -shares[i])
            result: dict[str, Any] = {
                "image": path,
                "classes": [
                    {"class": i, "label": names[i], "pixels": shares[i], "share": round(shares[i] / classes.numel(), 4)}
                    for i in order
                ],
            }
            if overlays and planes:
                plain = to_tensor(image)
                mixed = (plain + colors[classes].permute(2, 0, 1)) // 2
                result["drawing"] = overlays.save(path, torch.where(colored[classes], mixed, plain).to(torch.uint8))
                result["plane"] = planes.save(path, classes.to(torch.uint8))
            yield result

    print_json(results()) if args.json else print_tables(results(), table)
    return int(reader.failed)


def table(result: dict[str, Any]) -> str:
    """The image's path, then a line for each class that it has: its name, and its share of the pixels."""
    lines = [result["image"] + (f" -> {result['drawing']}" if "drawing" in result else "")]
    width = max(len(item["label"]) for item in result["classes"])
    lines += [f"  {item['label']:<{width}}  {item['share']:6.1%}" for item in result["classes"]]
    return "\n".join(lines)
