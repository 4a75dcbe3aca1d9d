"""Effective receptive fields of presets beside peers of timm, on the same images: a table and a figure.

    python benchmarks/receptive_field.py --data folder:DIR --figure receptive-fields.png
    python benchmarks/receptive_field.py --data folder:DIR --model t2 --peers repvit_m1_0 shvit_s3 --images 4 --random

The field is that of ``mobilemamba erf``: the mean absolute gradient of the last feature map's centre with respect to
the pixels (Luo et al. 2016, arXiv 1701.04128). Each network takes the images as its published weights do, in its own
resolution. A column states the area of the smallest centred square that holds 20, 50 or 99 % of the gradient.

The published weights of both are downloaded. With ``--random`` nothing is: weights are random, BatchNorm has the
statistics of random images, and the fields say what the architecture reaches before training.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import common
import contestants
import peers
import torch
from torch import Tensor, nn

import mobilemamba
from mobilemamba import weights
from mobilemamba.data import Preprocessing
from mobilemamba.data.samples import sample_images
from mobilemamba.training.pictures import check_target, draw_fields
from mobilemamba.training.receptive_field import SHARES, effective_receptive_field, square_that_holds

COLUMNS = ["network", "weights", "images", "pixels", "map", *(f"{share:.0%} in" for share in SHARES)]
PEERS = ["mobilenetv4_conv_medium", "repvit_m1_0", "shvit_s4", "mobilenetv4_hybrid_medium"]


def ours(name: str, random: bool) -> tuple[nn.Module, Preprocessing]:
    model = contestants.make_model(name)[0] if random else mobilemamba.create_model(name, pretrained=True).eval()
    return model, weights.entry(name).preprocessing


def peer(name: str, random: bool) -> tuple[nn.Module, Preprocessing]:
    import timm

    facts = peers.PEERS[name]
    if random:
        torch.manual_seed(0)
        model = contestants.calibrate(peers.build(name), torch.randn(4, 3, facts.pixels, facts.pixels))
    else:
        model = timm.create_model(f"{name}.{facts.weights}", pretrained=True).eval()
    stated = timm.data.resolve_model_data_config(model)
    return model, Preprocessing(
        resize=math.floor(facts.pixels / stated["crop_pct"]),
        crop=facts.pixels,
        mean=tuple(stated["mean"]),
        std=tuple(stated["std"]),
        interpolation="bilinear" if stated["interpolation"] == "bilinear" else "bicubic",
    )


def map_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The last feature map ``(B, C, h, w)``; some networks of timm have tokens ``(B, h * h, C)``."""

    def features(images: Tensor) -> Tensor:
        maps: Tensor = model.forward_features(images)  # type: ignore[operator]
        if maps.dim() == 3:
            side = math.isqrt(maps.size(1))
            maps = maps.mT.unflatten(2, (side, side))
        return maps

    return features


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="SPEC", help="folder:DIR, or another one of mobilemamba erf")
    parser.add_argument("--model", nargs="*", default=["s6"], choices=mobilemamba.list_models())
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=peers.IN_TIMM, metavar="PEER")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--random", action="store_true", help="random weights: no download")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--figure", type=Path, metavar="FILE", help="svg or png; needs matplotlib")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images: expected at least 1, got {args.images}")
    if not args.model and not args.peers:
        parser.error("--model, --peers: expected at least one network, got none")
    if args.peers and not peers.is_available():
        parser.error("--peers needs timm, which is not installed: pip install '.[bench]'")
    if args.figure:
        check_target(args.figure)
    settings = {"data": args.data, **common.setting(args.device)}
    if args.peers:
        settings["timm"] = common.version("timm")
    report = common.Report(settings, COLUMNS, args.json, None)
    fields: dict[str, Tensor] = {}
    for name, make in [*((name, ours) for name in args.model), *((name, peer) for name in args.peers)]:
        model, preprocessing = make(name, args.random)
        features = map_of(model.to(args.device))
        count, images = sample_images(args.data, args.images, preprocessing)
        field = effective_receptive_field(features, (image.to(args.device) for image in images))
        title = name if make is ours else peers.PEERS[name].title
        fields[title] = field
        with torch.no_grad():
            size = features(torch.zeros(1, preprocessing.channels, *field.shape, device=args.device)).shape[2:]
        areas = [square_that_holds(field, share).area for share in SHARES]
        kind = "random" if args.random else "published"
        row = [title, kind, str(count), str(len(field)), " x ".join(map(str, size)), *(f"{a:.1%}" for a in areas)]
        facts = {"network": name, "weights": kind, "images": count, "pixels": len(field), "map": list(size)}
        report.add(row, {**facts, "areas": dict(zip(map(str, SHARES), areas, strict=True))})
    if args.figure:
        draw_fields(fields, args.figure)
    return report.close()


if __name__ == "__main__":
    raise SystemExit(main())
