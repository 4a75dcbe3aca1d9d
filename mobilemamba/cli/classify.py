"""``mobilemamba classify``: prints the most probable classes of images."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .options import Parser, add_device_option, add_model_options, checked_device, open_model, positive

HELP = "Print the most probable classes of images."


def add_options(parser: Parser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images per pass (default: 32)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> None:
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


def table(result: dict[str, Any]) -> str:
    """The image's path, then a line for each class."""
    rows = [(p["label"] or f"class {p['class']}", p["probability"]) for p in result["predictions"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join([result["image"], *(f"  {name:<{width}}  {probability:6.1%}" for name, probability in rows)])
