"""``mobilemamba plot``: draws the loss and the accuracy, AP or mIoU of training runs."""

import argparse
from pathlib import Path

from ..training.curves import read_curves
from ..training.pictures import draw_curves
from .options import Parser

HELP = "Draw the loss and the accuracy, AP or mIoU of training runs, finished or in progress."


def add_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")
    text = "picture to write, .png or .svg (default: curves.png)"
    parser.add_argument("--out", type=Path, default=Path("curves.png"), metavar="FILE", help=text)


def run(args: argparse.Namespace) -> None:
    runs = [read_curves(path) for path in args.runs]
    draw_curves(runs, args.out)
    states = ", ".join(f"{curves.name} ({curves.state})" for curves in runs)
    print(f"{args.out}: {states}")
