"""``mobilemamba export``: writes a model for programs without Python."""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..data import Preprocessing, evaluation_batches, load_split
from ..deploy import DTYPES, FORMATS, export
from ..models import MobileMamba
from .options import Parser, add_device_option, add_model_options, checked_device, open_model, positive

HELP = "Write a model for programs without Python. The file is checked after it is written."

FORMAT_HELP = (
    "torchscript and aoti run with LibTorch and this library; onnx, executorch, coreml and litert have standard "
    "operators only"
)
CALIBRATION_IMAGES = 256


def size(text: str) -> tuple[int, int]:
    """The type of ``--size``: ``224`` or ``160x288``, height first."""
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(
            f"expected pixels such as 224, or height and width such as 160x288, got {text}"
        )
    sides = [positive(part) for part in parts]
    return sides[0], sides[-1]


def stages(text: str) -> tuple[int, ...]:
    """The type of ``--features``: numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of stages such as 0,1,2, got '{text}'") from None


def add_options(parser: Parser) -> None:
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--format", required=True, choices=FORMATS, help=FORMAT_HELP)
    add_model_options(parser)
    text = "type of the weights (default: float32; coreml: float16)"
    parser.add_argument("--dtype", choices=DTYPES, help=text)
    parser.add_argument("--trainable", action="store_true", help="keep BatchNorm instead of folding it")
    add_device_option(parser, ", the device that the file will run on")
    group = parser.add_argument_group("onnx, executorch, coreml and litert, which have one image size")
    text = "side of the images in pixels, to which resize and crop are scaled; or height and width, 160x288"
    group.add_argument("--size", type=size, metavar="N", help=text)
    group.add_argument("--dynamic", action="store_true", help="onnx: a file for any image size, with loops")
    text = "outputs are the feature maps of these stages, numbered from 0, instead of logits"
    group.add_argument("--features", type=stages, metavar="N,...", default=(), help=text)
    text = "executorch: convolutions in 8 bits, calibrated with images of --data"
    group.add_argument("--int8", action="store_true", help=text)
    text = f"folder:DIR, fashion-mnist or another data set of evaluate; {CALIBRATION_IMAGES} images of it are used"
    group.add_argument("--data", metavar="SPEC", help=text)


def run(args: argparse.Namespace) -> None:
    device = checked_device(args.device)
    if args.int8 != (args.data is not None):
        raise ValueError("expected --int8 and --data together: 8 bits are calibrated with images")
    if args.int8 and args.format != "executorch":  # before the images are read
        raise ValueError(
            f"--int8 is for executorch, got {args.format}; mobilemamba quantize writes torchscript and aoti, and an "
            "onnx file is quantized by ONNX Runtime"
        )
    model, labels, preprocessing = open_model(args)
    if args.size is not None and args.size[0] == args.size[1]:
        preprocessing = scaled(preprocessing, args.size[0])
    difference = export(
        model.to(device),
        args.target,
        args.format,
        labels=labels,
        preprocessing=preprocessing,
        dtype=args.dtype,
        fuse=not args.trainable,
        size=args.size,
        dynamic=args.dynamic,
        features=args.features,
        calibration=calibration(args.data, model, labels, preprocessing) if args.int8 else None,
    )
    dtype = "int8" if args.int8 else args.dtype or FORMATS[args.format][0]
    what = "feature maps" if args.features else "logits"
    files = args.target.rglob("*") if args.target.is_dir() else [args.target]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{args.target}: {args.format}, {dtype}, {megabytes:.1f} MB, {what} within {difference:.1e} of the model's")
    if args.format == "executorch":
        records = json.loads(Path(f"{args.target}.json").read_text(encoding="utf-8"))
        left = records.get("executorch.not_delegated")
        print(f"XNNPACK runs {records['executorch.delegated']} operators" + (f", but not {left}" if left else ""))
    if args.format == "coreml":
        print("compared before the conversion: Core ML runs on Apple's systems only")


def scaled(preprocessing: Preprocessing, side: int) -> Preprocessing:
    """The same share of the image, in ``side`` pixels."""
    resize = max(side, round(preprocessing.resize * side / preprocessing.crop))
    return dataclasses.replace(preprocessing, resize=resize, crop=side)


def calibration(spec: str, model: MobileMamba, labels: Sequence[str] | None, preprocessing: Preprocessing) -> Tensor:
    """Images ``(N, C, crop, crop)`` from all over the training part of a data set, normalised."""
    split, found = load_split(spec, "train", labels or model.num_classes, preprocessing)
    print(found, flush=True)
    every = max(1, math.ceil(len(split.labels) / CALIBRATION_IMAGES))
    batches = evaluation_batches(split, preprocessing, batch_size=64, share=(0, every))
    return torch.cat([preprocessing.normalize(pixels) for pixels, _ in batches])
