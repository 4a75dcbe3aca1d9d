"""``mobilemamba quantize``: writes a classifier whose matrix products run in 8 bits, and prints what that costs."""

import argparse
import copy
from pathlib import Path

import torch

from ..data import default_workers, load_split
from ..deploy import DTYPES, export
from ..training import evaluate
from .evaluate import percent
from .export import calibration
from .options import Parser, add_model_options, open_model, positive

HELP = "Write a classifier for CPUs whose matrix products run in 8 bits, and print its accuracy beside the model's."


def add_options(parser: Parser) -> None:
    text = "folder:DIR, fashion-mnist or another data set of evaluate: train/ is for calibration, val/ for the accuracy"
    parser.add_argument("--data", required=True, metavar="SPEC", help=text)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    text = "form of the file, as of export: torchscript; or aoti, a .pt2 package (default: by the name of FILE)"
    parser.add_argument("--format", choices=("torchscript", "aoti"), help=text)
    text = "type of the images, the logits and of what is not in 8 bits (default: float32)"
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=text)
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images per pass (default: 64)")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    format = args.format or ("aoti" if args.out.suffix == ".pt2" else "torchscript")
    model, labels, preprocessing = open_model(args)
    images = calibration(args.data, model, labels, preprocessing)
    split, found = load_split(args.data, "val", labels or model.num_classes, preprocessing)
    print(found, flush=True)
    dtype = getattr(torch, args.dtype)
    forms = {args.dtype: copy.deepcopy(model).to(dtype), "8 bits": model.quantize(images.split(64)).to(dtype)}
    for name, form in forms.items():
        result = evaluate(form, split, preprocessing, args.batch_size, workers=default_workers(split))
        print(
            f"{name:9} top-1 {percent(result.top1)}  top-5 {percent(result.top5)}  {result.images_per_s:.0f} images/s"
        )
    export(
        model,
        args.out,
        format,
        labels=labels,
        preprocessing=preprocessing,
        dtype=args.dtype,
        calibration=images,
    )
    print(f"{args.out}: {format}, {args.out.stat().st_size / 1e6:.1f} MB; {len(images)} images chose the ranges")
