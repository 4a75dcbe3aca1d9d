"""``mobilemamba convert``: writes the weights of any readable checkpoint in this package's format."""

import argparse
from pathlib import Path

from .. import zoo
from .options import Parser

HELP = "Convert a checkpoint to this package's format. Every key must fit the model."


def add_options(parser: Parser) -> None:
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint: a published one, or one of this package")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write: *.safetensors, *.pt or *.pth")
    parser.add_argument("--model", metavar="NAME", help="preset of IN, if the file does not state it")


def run(args: argparse.Namespace) -> None:
    done = zoo.convert(args.source, args.target, preset=args.model)
    print(f"{args.target}: {done['preset']}, {done['tensors']} tensors, sha256 {done['sha256']}")
