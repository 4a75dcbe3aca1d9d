"""``mobilemamba evaluate``: prints the accuracy, AP or mIoU of a model on one part of a data set, and its speed."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import downstream, weights
from ..data import Preprocessing, default_workers, load_split
from ..data.coco import CocoImages, load_coco_split
from ..data.datasets import ON_BAD_IMAGE
from ..data.folder import listing
from ..data.loading import MAX_WORKERS
from ..data.mask_folder import MaskFolder, load_masks_split
from ..deploy import open_exported
from ..training import (
    DetectionResult,
    Result,
    SegmentationResult,
    evaluate,
    evaluate_detector,
    evaluate_outputs,
    evaluate_segmenter,
)
from ..training.log import clock
from ..weights.files import atomic_write
from .options import Parser, add_device_option, add_model_options, checked_device, open_model, positive

HELP = (
    "Print the accuracy of a classifier on a data set, beside the published figures; the COCO AP of a detector; or the "
    "mIoU of a segmenter."
)

PRECISIONS = ("float32", "bfloat16", "float16")


def add_options(parser: Parser) -> None:
    text = (
        "folder:DIR (images in DIR/SPLIT/CLASS/ or DIR/CLASS/), tar:FILE (a tar file of such folders), "
        "fashion-mnist[:DIR] or digits. CLASS is a name of the model's, or ImageNet's WordNet id. For a detector "
        "coco:DIR (DIR/SPLIT.json in COCO's format, and images), for a segmenter masks:DIR (images/ and masks/)"
    )
    parser.add_argument("--data", required=True, metavar="SPEC", help=text)
    parser.add_argument("--split", default="val", metavar="NAME", help="part of the data (default: val)")
    text = "classes of the images in FILE instead of class folders: lines IMAGE CLASS, or one of ImageNet's own files"
    parser.add_argument("--ground-truth", type=Path, metavar="FILE", help=text)
    text = "a file that is not a complete image: stop, or name it and go on without it (default: fail)"
    parser.add_argument("--on-bad-image", choices=ON_BAD_IMAGE, default="fail", help=text)
    text = "masks:DIR has 0 for ignored pixels, and v for class v - 1 (ADE20K)"
    parser.add_argument("--reduce-zero-label", action="store_true", help=text)
    add_model_options(parser)
    text = "a classifier that export wrote as onnx, executorch or litert, instead of a model; it runs on the CPU"
    parser.add_argument("--exported", type=Path, metavar="FILE", help=text)
    text = "images per pass (default: 64; for detectors and segmenters 8)"
    parser.add_argument("--batch-size", type=positive, metavar="N", help=text)
    text = f"processes that decode images (default: one for each CPU, at most {MAX_WORKERS})"
    parser.add_argument("--workers", type=int, metavar="N", help=text)
    add_device_option(parser)
    text = "type of the weights and activations (default: float32)"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help=text)
    group = parser.add_argument_group("files to write, with accuracies from 0 to 1")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything but the confusion matrix")
    group.add_argument("--csv", type=Path, metavar="FILE", help="a table with a row for each class")
    text = "confusion matrix as CSV: a row for each class, a column for each prediction"
    group.add_argument("--confusion", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> None:
    device = checked_device(args.device)
    for target in (args.json, args.csv, args.confusion):
        if target is not None:
            check_target(target)  # now, not after the evaluation
    whole_images = args.data.startswith(("coco:", "masks:"))
    if args.batch_size is None:
        args.batch_size = 8 if whole_images else 64
    if whole_images:
        return run_downstream(args, device)
    if args.reduce_zero_label:
        raise ValueError(f"--reduce-zero-label is for masks:DIR, got --data {args.data}")
    evaluate_split, labels, classes, preprocessing = opened(args, device)
    split, found = load_split(
        args.data,
        args.split,
        labels or classes,
        preprocessing,
        ground_truth=args.ground_truth,
        on_bad_image=args.on_bad_image,
    )
    print(found, flush=True)
    workers = default_workers(split) if args.workers is None else args.workers

    result = evaluate_split(
        split,
        preprocessing,
        args.batch_size,
        workers=workers,
        confusion=args.confusion is not None,
        progress=partial(describe, args.batch_size),
    )
    source = args.checkpoint or args.exported
    published = None if source else weights.entry(args.model or "nano", args.distilled)
    how = f"{args.exported.name if args.exported else f'{device}, {args.precision}'}, batches of {args.batch_size}"
    print(table(result, classes, how, published))
    if result.bad:
        print(f"{int(result.bad)} bad images were skipped; each is named above", file=sys.stderr)
    rows = class_rows(result, labels)
    if args.json:
        facts = {
            "model": args.model or (published and published.preset),
            "weights": published.variant if published else str(source),
            "data": args.data,
            "split": args.split,
            "images": result.count,
            "bad_images": int(result.bad),
            "top1": result.top1,
            "top5": result.top5,
            "published_top1": published and published.top1 and round(published.top1 / 100, 6),
            "published_top5": published and published.top5 and round(published.top5 / 100, 6),
            "images_per_s": round(result.images_per_s, 1),
            "seconds": round(result.seconds, 3),
            "device": device,
            "precision": None if args.exported else args.precision,
            "batch_size": args.batch_size,
            "workers": workers,
            "preprocessing": preprocessing.to_dict(),
            "classes": rows,
        }
        write(args.json, json.dumps(facts, indent=2) + "\n")
    if args.csv:
        write(args.csv, as_csv([list(rows[0]), *(list(row.values()) for row in rows)]))
    if args.confusion:
        assert result.confusion is not None
        names = [str(row["label"]) for row in rows]
        lines = [[name, *counts] for name, counts in zip(names, result.confusion.tolist(), strict=True)]
        write(args.confusion, as_csv([["", *names], *lines]))


def opened(
    args: argparse.Namespace, device: str
) -> tuple[Callable[..., Result], Sequence[str] | None, int, Preprocessing]:
    """What evaluates the classifier that the options name, its labels, the number of its classes, its preprocessing."""
    if args.exported is None:
        model, labels, preprocessing = open_model(args)
        if model.num_classes == 0:
            raise ValueError(
                f"{args.checkpoint}: expected a model with classes, got one without a head (num_classes=0)"
            )
        evaluate_split = partial(evaluate, model.to(device, getattr(torch, args.precision)))
        return evaluate_split, labels, model.num_classes, preprocessing
    if given := [name for name in NOT_OF_FILES if getattr(args, name)]:
        raise ValueError(f"expected either --exported or --{given[0]}, got both")
    if device != "cpu" or args.precision != "float32":
        raise ValueError(f"--exported: expected --device cpu and no --precision, got {device}, {args.precision}")
    file = open_exported(args.exported)
    return partial(evaluate_outputs, file, len(file.labels)), file.labels, len(file.labels), file.preprocessing


#: What an exported file says itself.
NOT_OF_FILES = ("model", "distilled", "checkpoint", "labels", "mean", "std", "resize", "crop", "interpolation")
#: Options of classifiers.
OF_CLASSIFIERS = (
    *("model", "distilled", "labels", "mean", "std", "resize", "crop", "interpolation", "ground_truth", "confusion"),
    "exported",
)


def run_downstream(args: argparse.Namespace, device: str) -> None:
    """Evaluate a detector on ``coco:DIR``, or a segmenter on ``masks:DIR``."""
    if args.checkpoint is None:
        raise ValueError(f"expected --checkpoint, a detector or segmenter to evaluate on {args.data}")
    if given := [name for name in OF_CLASSIFIERS if getattr(args, name)]:
        raise ValueError(f"--{given[0].replace('_', '-')} is for classifiers; it would have no effect")
    model, stored = downstream.open_model(args.checkpoint)
    kind, _, where = args.data.partition(":")
    if (stored.task == "detect") != (kind == "coco"):
        raise ValueError(f"{args.checkpoint}: expected a model for {args.data}, got the {stored.task}er {stored.kind}")
    root, skip = Path(where).expanduser(), args.on_bad_image == "skip"
    split: CocoImages | MaskFolder
    if kind == "coco":
        if args.reduce_zero_label:
            raise ValueError(f"--reduce-zero-label is for masks:DIR, got --data {args.data}")
        split = load_coco_split(root, args.split, masks=stored.kind == "mask_rcnn", skip=skip)
    else:
        split = load_masks_split(root, args.split, args.reduce_zero_label, skip)
    if stored.labels is not None and list(split.labels) != stored.labels:
        raise ValueError(
            f"{root}: expected the classes of {args.checkpoint}, {listing(stored.labels)}; got "
            f"{listing(list(split.labels))}"
        )
    print(f"{args.data} ({args.split}): {len(split)} images, {len(split.labels)} classes", flush=True)
    options: dict[str, Any] = {
        "workers": default_workers(split) if args.workers is None else args.workers,
        "precision": args.precision,
        "progress": partial(describe, args.batch_size),
    }
    model = model.to(device)
    result: DetectionResult | SegmentationResult
    if isinstance(split, CocoImages):
        result = evaluate_detector(model, split, args.batch_size, **options)
    else:
        result = evaluate_segmenter(model, split, stored.preparation, args.batch_size, **options)
    for name, value in result.measures.items():
        print(f"{name.replace('_', ' '):14} {percent(value)}")
    print(f"{'images/s':14} {result.images_per_s:.1f}  ({device}, {args.precision}, batches of {args.batch_size})")
    if result.bad:
        print(f"{result.bad} bad images were skipped; each is named above", file=sys.stderr)
    if args.json:
        facts = {
            "weights": str(args.checkpoint),
            "kind": stored.kind,
            "backbone": stored.backbone,
            "data": args.data,
            "split": args.split,
            "images": result.count,
            "bad_images": result.bad,
            **result.measures,
            "images_per_s": round(result.images_per_s, 1),
            "seconds": round(result.seconds, 3),
            "device": device,
            "precision": args.precision,
            "batch_size": args.batch_size,
            "workers": options["workers"],
            "classes": result.classes,
        }
        write(args.json, json.dumps(facts, indent=2) + "\n")
    if args.csv:
        write(args.csv, as_csv([list(result.classes[0]), *(list(row.values()) for row in result.classes)]))


def describe(batch_size: int, done: int, total: int, seconds: float) -> str:
    """The progress line of the terminal, after ``done`` batches."""
    rate = done * batch_size / seconds
    return f"batch {done}/{total}  {rate:.0f} images/s  {clock(seconds / done * (total - done))} left"


def table(result: Result, classes: int, how: str, published: weights.WeightsEntry | None) -> str:
    """The lines that are printed."""
    right, count = int(result.right.sum()), result.count
    lines = [f"top-1      {percent(result.top1)}  ({right} of {count} images)"]
    if classes > 5:
        lines.append(f"top-5      {percent(result.top5)}")
    if published is not None:
        figures = (("top-1", published.top1), ("top-5", published.top5))
        told = ", ".join(f"{name} {figure} %" for name, figure in figures if figure is not None)
        lines.append(f"published  {told}, on {published.tested_on}")
    return "\n".join([*lines, f"images/s   {result.images_per_s:.1f}  ({how})"])


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def class_rows(result: Result, labels: Sequence[str] | None) -> list[dict[str, Any]]:
    """A row for each class of the model. Shares of nothing are None.

    Its accuracies are recall, in the first and in the first five predictions; ``precision`` is the share of its images
    among those that are predicted to be of the class.
    """
    columns = (result.images, result.right, result.right5, result.predicted)
    counts = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {
            "class": number,
            "label": labels[number] if labels else str(number),
            "images": images,
            "top1": share(right, images),
            "top5": share(right5, images),
            "precision": share(right, predicted),
        }
        for number, (images, right, right5, predicted) in enumerate(counts)
    ]


def share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} into")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: no permission to write {path.name} into this folder")


def write(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(path)
