"""``mobilemamba erf``: draws the effective receptive field of a model, and prints the area that holds most of it."""

import argparse
from pathlib import Path

from ..data.samples import sample_images
from ..training.pictures import check_target, draw_fields
from ..training.receptive_field import SHARES, effective_receptive_field, square_that_holds
from .options import Parser, add_device_option, add_model_options, checked_device, open_model, positive

HELP = "Draw which pixels the centre of the last feature map depends on, averaged over images."


def add_options(parser: Parser) -> None:
    text = "folder:DIR (all images in DIR, at any depth), fashion-mnist[:DIR] or digits (the test images)"
    parser.add_argument("--data", required=True, metavar="SPEC", help=text)
    text = "picture to write, .png or .svg (default: erf.png)"
    parser.add_argument("--out", type=Path, default=Path("erf.png"), metavar="FILE", help=text)
    text = "images to average over, spread evenly over the data; all, if there are fewer (default: 50)"
    parser.add_argument("--images", type=positive, default=50, metavar="N", help=text)
    add_device_option(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    device = checked_device(args.device)
    check_target(args.out)  # now, not after the gradients
    model, _, preprocessing = open_model(args)
    count, images = sample_images(args.data, args.images, preprocessing)
    model = model.to(device).eval()
    field = effective_receptive_field(model.forward_features, (image.to(device) for image in images))
    draw_fields({args.model or (args.checkpoint.stem if args.checkpoint else "nano"): field}, args.out)
    print(f"{count} images of {len(field)} x {len(field)} pixels")
    for share in SHARES:
        square = square_that_holds(field, share)
        print(f"{share:4.0%} of the gradient in a square of {square.side} pixels, {square.area:.1%} of the area")
    print(args.out)
