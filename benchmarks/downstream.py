"""Times detectors and segmenters on our backbone and, with the same heads, on others; the backbone alone too.

    python benchmarks/downstream.py --json FILE
    python benchmarks/downstream.py --model retinanet --ours b1 --peers resnet50 --rounds 9

Images are 1280 x 800 pixels for Mask R-CNN and RetinaNet, 320 x 320 for SSDLite, 512 x 512 for Semantic FPN. Ours are
fused and eager. The others are timm's (`pip install '.[bench,downstream]'`), with BatchNorm fused where timm does it,
channels last; their backbones run eager and under torch.compile, with inductor's freezing on a CPU, which folds
BatchNorm for all of them, and with max-autotune on a GPU. "Backbone" is its time alone, "rest" is what the whole takes
beyond that: neck, heads, and the choice of boxes.

A pyramid on the others is torchvision's, on the strides that they have from 4 or 8 on to 32, with its usual coarser
levels, so that heads and anchors have maps of the same sizes as with ours. Semantic FPN adds three maps: at strides of
16, 32 and 64 with ours, as published, and of 8, 16 and 32 with the others, which have no 64. Weights are random. So no
score of RetinaNet, SSDLite and Mask R-CNN's second stage is above its threshold, but for SSDLite's classes; RPN keeps
its 1000 proposals, and Mask R-CNN's masks are left out.
"""

import argparse
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import models
import peers
import torch
from contestants import calibrate, forward
from torch import Tensor, nn

import mobilemamba
from mobilemamba import downstream
from mobilemamba.downstream.necks import FeaturePyramid, WithNeck

#: Height and width of the images, and the strides that the others' maps have.
MODELS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "mask_rcnn": ((800, 1280), (4, 8, 16, 32)),
    "retinanet": ((800, 1280), (8, 16, 32)),
    "ssdlite": ((320, 320), (16, 32)),
    "semantic_fpn": ((512, 512), (8, 16, 32)),
}
PEERS = ("mobilenetv3_large_100", "resnet50", "mobilenetv4_conv_medium", "repvit_m1_0")
COLUMNS = ["model", "backbone", "form", "whole, ms", "min to max", "backbone, ms", "rest, ms", "backbone, against ours"]


class PeerMaps(nn.Module):
    """A network of timm without its head: images -> its maps at ``strides``, by name."""

    def __init__(self, name: str, strides: Sequence[int]) -> None:
        super().__init__()
        import timm

        known = timm.create_model(name, features_only=True).feature_info.reduction()
        network = timm.create_model(name, features_only=True, out_indices=[known.index(stride) for stride in strides])
        self.out_channels = network.feature_info.channels()
        calibrate(network, torch.randn(2, 3, 320, 320))
        self.network = peers.fuse(network).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images.contiguous(memory_format=torch.channels_last)
        return OrderedDict((str(i), x) for i, x in enumerate(self.network(images)))


class Renamed(nn.Module):
    """A neck whose levels are named ``"0"``, ``"1"``, ... as ours are."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return OrderedDict((str(i), x) for i, x in enumerate(self.neck(maps).values()))


def make_ours(kind: str, name: str) -> nn.Module:
    """A model on our backbone, fused."""
    options: dict[str, Any] = {"size": MODELS[kind][0][0]} if kind == "ssdlite" else {}
    model = downstream.create_model(kind, name, **options)
    calibrate(model.backbone.body.body, torch.randn(2, 3, 320, 320))
    return model.eval().fuse()


def make_peer(kind: str, name: str) -> nn.Module:
    """The same model on a backbone of timm."""
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

    model = make_ours(kind, "s6")
    size, strides = MODELS[kind]
    body = PeerMaps(name, strides)
    if kind == "ssdlite":
        from mobilemamba.downstream.backbones import level_sides
        from mobilemamba.downstream.ssd import ExtraLevels, SSDLite

        neck, sides = ExtraLevels(body.out_channels[-1]), level_sides(size[0], strides, 6)
        channels = [*body.out_channels, *neck.out_channels]
        backbone = WithNeck(body, neck, channels, [round(320 / side) for side in sides])
        return SSDLite(backbone, 91, sides, model.transform).eval()
    if kind == "semantic_fpn":
        model.backbone.body, model.backbone.neck = body, FeaturePyramid(body.out_channels)
        return model.eval()
    last = LastLevelMaxPool() if kind == "mask_rcnn" else LastLevelP6P7(256, 256)
    model.backbone.body = body
    model.backbone.neck = Renamed(FeaturePyramidNetwork(body.out_channels, 256, last))
    return model.eval()


def inputs(kind: str, device: torch.device) -> tuple[Any, Tensor]:
    """What the whole model takes, and what its backbone gets of it."""
    images = torch.rand(1, 3, *MODELS[kind][0], device=device)
    return (images if kind == "semantic_fpn" else list(images)), images


def contestants(kind: str, name: str, device: torch.device) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """For each form its whole model and its backbone, to be called."""
    torch.manual_seed(0)
    model = (make_ours if name in mobilemamba.PRESETS else make_peer)(kind, name).to(device)
    whole, images = inputs(kind, device)
    forms = {"fused" if name in mobilemamba.PRESETS else "eager": model.backbone.body}
    if name not in mobilemamba.PRESETS:
        options = {"mode": "max-autotune"} if device.type == "cuda" else {"options": {"freezing": True}}
        forms["compiled"] = torch.compile(model.backbone.body, fullgraph=True, dynamic=False, **options)

    def run(body: nn.Module) -> Any:
        model.backbone.body = body
        return forward(model, whole)

    return {form: (partial(run, body), partial(forward, body, images)) for form, body in forms.items()}


def compare(kind: str, names: Sequence[str], device: torch.device, rounds: int, report: common.Report) -> None:
    torch.compiler.reset()
    calls: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name in names:
        for form, (whole, backbone) in contestants(kind, name, device).items():
            calls[name, form, "whole"], calls[name, form, "backbone"] = whole, backbone
    times = models.by_turns({key: partial(models.turn_of, call, 1, device) for key, call in calls.items()}, rounds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    ours = medians[names[0], "fused", "backbone"]
    for name, form, part in calls:
        if part == "backbone":
            continue
        whole, backbone = medians[name, form, "whole"], medians[name, form, "backbone"]
        every = times[name, form, "whole"]
        row = [kind, name, form, f"{whole:.0f}", f"{min(every):.0f} to {max(every):.0f}", f"{backbone:.1f}"]
        row += [f"{whole - backbone:.0f}", f"{backbone / ours:.2f}x"]
        result = {"model": kind, "backbone": name, "form": form, "size": MODELS[kind][0], "whole ms": every}
        report.add(row, {**result, "backbone ms": times[name, form, "backbone"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ours", nargs="+", default=["b1"], choices=mobilemamba.list_models())
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="NAME", help="timm's models")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {**common.setting(args.device), "torchvision": common.version("torchvision")}
    settings |= {"timm": common.version("timm")} if args.peers else {}
    report = common.Report(settings, COLUMNS, args.json, None)
    for kind in args.model:
        compare(kind, [*args.ours, *args.peers], args.device, args.rounds, report)
    raise SystemExit(report.close())


if __name__ == "__main__":
    main()
