"""The networks that ours stands beside: facts, and how timm makes them.

timm is an optional extra (``pip install '.[bench]'``). It imports torchvision, which has to fit the torch that is
there. Weights are random: they do not matter for speed, and nothing is downloaded.
"""

import importlib.util
from dataclasses import dataclass

from torch import nn

__all__ = ["PEERS", "SOURCE", "Peer", "build", "fuse", "is_available"]

#: Where resolutions and accuracies are from; the models' cards are named like timm's models.
SOURCE = "timm's results/results-imagenet.csv: its measurement of the published weights, at the resolution stated"


@dataclass(frozen=True)
class Peer:
    """A network of timm: ``weights`` names the published ones whose ImageNet top-1 in percent this is."""

    title: str
    family: str
    weights: str
    pixels: int
    top1: float
    distilled: bool = False


PEERS = {
    "mobilenetv3_large_100": Peer("MobileNetV3-L", "MobileNetV3", "ra_in1k", 224, 75.8),
    "efficientvit_m5": Peer("EfficientViT-M5", "EfficientViT", "r224_in1k", 224, 77.1),
    "shvit_s3": Peer("SHViT-S3", "SHViT", "in1k", 224, 77.4),
    "fasternet_t2": Peer("FasterNet-T2", "FasterNet", "in1k", 224, 78.7),
    "mobilenetv4_conv_medium": Peer("MobileNetV4-conv-M", "MobileNetV4", "e500_r224_in1k", 224, 79.1),
    "shvit_s4": Peer("SHViT-S4", "SHViT", "in1k", 256, 79.4),
    "efficientformerv2_s1": Peer("EfficientFormerV2-S1", "EfficientFormerV2", "snap_dist_in1k", 224, 79.7, True),
    "repvit_m1_0": Peer("RepViT-M1.0", "RepViT", "dist_300e_in1k", 224, 80.2, True),
}


def is_available() -> bool:
    return importlib.util.find_spec("timm") is not None


def build(name: str) -> nn.Module:
    """The network as it is trained."""
    import timm

    return timm.create_model(name)


def fuse(model: nn.Module) -> nn.Module:
    """BatchNorm fused and branches merged where timm offers it: SHViT, EfficientViT and RepViT."""
    from timm.utils import reparameterize_model

    return reparameterize_model(model, inplace=True)
