"""``mobilemamba export``: writes a model for programs without Python."""

import argparse
from pathlib import Path

from ..deploy import DTYPES, FORMATS, export
from .options import Parser, add_device_option, add_model_options, checked_device, open_model

HELP = "Write a model for programs without Python. The file is checked after it is written."

FORMAT_HELP = "torchscript and aoti run with LibTorch and this library, onnx with ONNX Runtime"


def add_options(parser: Parser) -> None:
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write")
    parser.add_argument("--format", required=True, choices=FORMATS, help=FORMAT_HELP)
    add_model_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the images (default: float32)")
    parser.add_argument("--trainable", action="store_true", help="keep BatchNorm instead of folding it")
    add_device_option(parser, ", the device that the file will run on")


def run(args: argparse.Namespace) -> None:
    device = checked_device(args.device)
    model, labels, preprocessing = open_model(args)
    difference = export(
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
