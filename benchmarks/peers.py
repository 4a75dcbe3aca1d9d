"""The networks that ours stands beside: facts, and how they are made: by timm, or here where timm has none.

timm is an optional extra (``pip install '.[bench]'``). It imports torchvision, which has to fit the torch that is
there. Weights are random: they do not matter for speed, and nothing is downloaded.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import efficientvmamba
import localvim
from torch import nn

__all__ = ["HERE", "IN_TIMM", "PEERS", "Peer", "build", "fuse", "is_available", "sources"]


@dataclass(frozen=True)
class Peer:
    """A network: ``weights`` names those in timm whose ImageNet top-1 in percent this is; None: it is of ``HERE``."""

    title: str
    family: str
    weights: str | None
    pixels: int
    top1: float
    distilled: bool = False


PEERS = {
    "mobilenetv2_100": Peer("MobileNetV2-1.0", "MobileNetV2", "ra_in1k", 224, 72.9),
    "ghostnet_100": Peer("GhostNet-1.0", "GhostNet", "in1k", 224, 74.0),
    "mobilevitv2_075": Peer("MobileViTv2-0.75", "MobileViTv2", "cvnets_in1k", 256, 75.6),
    "mobilenetv3_large_100": Peer("MobileNetV3-L", "MobileNetV3", "ra_in1k", 224, 75.8),
    "levit_128s": Peer("LeViT-128S", "LeViT", "fb_dist_in1k", 224, 76.5, True),
    "mobilenetv2_140": Peer("MobileNetV2-1.4", "MobileNetV2", "ra_in1k", 224, 76.5),
    "efficientvit_m5": Peer("EfficientViT-M5", "EfficientViT", "r224_in1k", 224, 77.1),
    "hgnetv2_b0": Peer("HGNetV2-B0", "HGNetV2", "ssld_stage2_ft_in1k", 224, 77.4, True),
    "shvit_s3": Peer("SHViT-S3", "SHViT", "in1k", 224, 77.4),
    "mobilevitv2_100": Peer("MobileViTv2-1.0", "MobileViTv2", "cvnets_in1k", 256, 78.1),
    "levit_128": Peer("LeViT-128", "LeViT", "fb_dist_in1k", 224, 78.5, True),
    "fasternet_t2": Peer("FasterNet-T2", "FasterNet", "in1k", 224, 78.7),
    "hgnetv2_b1": Peer("HGNetV2-B1", "HGNetV2", "ssld_stage2_ft_in1k", 224, 78.9, True),
    "mobilenetv4_conv_medium": Peer("MobileNetV4-conv-M", "MobileNetV4", "e500_r224_in1k", 224, 79.1),
    "shvit_s4": Peer("SHViT-S4", "SHViT", "in1k", 256, 79.4),
    "efficientformerv2_s1": Peer("EfficientFormerV2-S1", "EfficientFormerV2", "snap_dist_in1k", 224, 79.7, True),
    "levit_192": Peer("LeViT-192", "LeViT", "fb_dist_in1k", 224, 79.9, True),
    "repvit_m1_0": Peer("RepViT-M1.0", "RepViT", "dist_300e_in1k", 224, 80.2, True),
    "mobilevitv2_150": Peer("MobileViTv2-1.5", "MobileViTv2", "cvnets_in1k", 256, 80.4),
    "mobilenetv4_hybrid_medium": Peer("MobileNetV4-hybrid-M", "MobileNetV4", "e500_r224_in1k", 224, 80.4),
    "mobilevitv2_200": Peer("MobileViTv2-2.0", "MobileViTv2", "cvnets_in1k", 256, 81.1),
    "repvit_m1_1": Peer("RepViT-M1.1", "RepViT", "dist_450e_in1k", 224, 81.3, True),
    "levit_256": Peer("LeViT-256", "LeViT", "fb_dist_in1k", 224, 81.5, True),
    "hgnetv2_b2": Peer("HGNetV2-B2", "HGNetV2", "ssld_stage2_ft_in1k", 224, 81.6, True),
    "repvit_m1_5": Peer("RepViT-M1.5", "RepViT", "dist_450e_in1k", 224, 82.5, True),
    "levit_384": Peer("LeViT-384", "LeViT", "fb_dist_in1k", 224, 82.6, True),
    "hgnetv2_b3": Peer("HGNetV2-B3", "HGNetV2", "ssld_stage2_ft_in1k", 224, 82.9, True),
    "hgnetv2_b4": Peer("HGNetV2-B4", "HGNetV2", "ssld_stage2_ft_in1k", 224, 83.7, True),
    "efficientvmamba_t": Peer("EfficientVMamba-T", "EfficientVMamba", None, 224, 76.5),
    "efficientvmamba_s": Peer("EfficientVMamba-S", "EfficientVMamba", None, 224, 78.7),
    "efficientvmamba_b": Peer("EfficientVMamba-B", "EfficientVMamba", None, 224, 81.8),
    "localvim_t": Peer("LocalVim-T", "LocalVim", None, 224, 76.2),
    "localvim_s": Peer("LocalVim-S", "LocalVim", None, 224, 81.1),
}

HERE = {**efficientvmamba.NETWORKS, **localvim.NETWORKS}
IN_TIMM = [name for name, peer in PEERS.items() if peer.weights is not None]


def is_available() -> bool:
    return importlib.util.find_spec("timm") is not None


def sources(names: Iterable[str]) -> str:
    """Where resolutions and accuracies are from; the models' cards are named like timm's models."""
    chosen = set(names)
    timm = "timm's results/results-imagenet.csv: its measurement of the published weights, at the resolution stated"
    own = "their authors' tables, of weights that are not used here: " + ", ".join(sorted(chosen - set(IN_TIMM)))
    return "; ".join(([timm] if chosen & set(IN_TIMM) else []) + ([own] if chosen - set(IN_TIMM) else []))


def build(name: str) -> nn.Module:
    """The network as it is trained."""
    if name in HERE:
        return HERE[name]()
    import timm

    return timm.create_model(name)


def fuse(model: nn.Module) -> nn.Module:
    """BatchNorm fused and branches merged where timm offers it: SHViT, EfficientViT, RepViT and LeViT."""
    from timm.utils import reparameterize_model

    return reparameterize_model(model, inplace=True)
