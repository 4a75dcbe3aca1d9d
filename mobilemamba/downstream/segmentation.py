"""The published segmenters by name, their loss, and the class that they share. They need no torchvision."""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import MobileMamba, checks
from .backbones import Backbone, Pretrained, make_backbone
from .fusing import Fusible
from .necks import FeaturePyramid, WithNeck
from .segmentation_heads import DeepLabV3Head, FCNHead, PSPHead, SemanticFPNHead, resize

__all__ = ["Segmenter", "deeplabv3", "pspnet", "segmentation_loss", "semantic_fpn"]

AUX_WEIGHT = 0.4  # of the auxiliary loss


class Segmenter(Fusible, nn.Module):
    """Images ``(B, C, H, W)`` -> ``OrderedDict`` of ``"out"``, logits ``(B, num_classes, H, W)``, and maybe ``"aux"``.

    It is called as torchvision's segmentation models are, and its parts have their names. Images are normalised, of any
    size from 1 on. Logits are computed at a stride of the backbone and resized to the images, bilinear.

    Args:
        backbone: images -> feature maps by name, finest first.
        classifier: feature maps by name -> logits.
        num_classes: channels of the logits.
        aux_classifier: as ``classifier``; its logits ``"aux"`` only serve training.
    """

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, num_classes: int, aux_classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone, self.classifier, self.aux_classifier = backbone, classifier, aux_classifier

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        outputs: dict[str, Tensor] = OrderedDict()
        outputs["out"] = resize(self.classifier(maps), images)
        if self.aux_classifier is not None:
            outputs["aux"] = resize(self.aux_classifier(maps), images)
        return outputs

    @torch.jit.unused
    @torch.no_grad()
    def predict(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The class of every pixel, ``(B, height, width)`` int64, in evaluation mode, as published.

        Args:
            images: as for the call.
            size: height and width of the original images, before they were resized to ``images``. The logits of
                ``images`` are resized to it before the class is chosen. None: that of ``images``.
        """
        if self.training:
            raise ValueError("predict: expected a model in evaluation mode, got one in training mode; call eval()")
        logits = self.without_aux()(images)["out"]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits would make classes equal
        if size is not None and tuple(size) != tuple(logits.shape[2:]):
            size = checks.integers("size", tuple(size), 2)
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.argmax(1)

    @torch.jit.unused
    def network(self) -> MobileMamba:
        """The network that gives the feature maps."""
        return next(module for module in self.modules() if isinstance(module, MobileMamba))

    @torch.jit.unused
    def without_aux(self) -> "Segmenter":
        """The same model, its modules not copied, without the auxiliary head, which only serves training."""
        model = copy.copy(self)
        model._modules = {name: module for name, module in self._modules.items() if name != "aux_classifier"}
        model.aux_classifier = None
        return model

    @torch.jit.unused
    def fuse(self) -> "Segmenter":
        """A copy for inference, in evaluation mode: the backbone is fused, BatchNorms behind convolutions are folded.

        The copy has no auxiliary head.

        Raises:
            ValueError: as :meth:`mobilemamba.MobileMamba.fuse`.
        """
        return Fusible.fuse(self.without_aux()).requires_grad_(False)


def segmentation_loss(outputs: Mapping[str, Tensor], labels: Tensor, ignore_index: int = 255) -> Tensor:
    """The published loss, a scalar: cross-entropy of ``"out"``, plus 0.4 times that of ``"aux"`` if there is one.

    Each is a sum over the pixels, divided by the number of all pixels. PyTorch's mean leaves ignored pixels out.

    Args:
        outputs: logits ``(B, num_classes, H, W)`` by name.
        labels: classes ``(B, H, W)``, int64, from 0; or ``ignore_index`` for pixels without a class.

    Raises:
        ValueError: the shape or the type of the labels does not fit.
        IndexError: a label is neither a class nor ``ignore_index``.
    """
    expected = (len(outputs["out"]), *outputs["out"].shape[2:])
    if tuple(labels.shape) != expected or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape {list(expected)}, got {labels.dtype} of shape {list(labels.shape)}"
        )
    losses = {
        name: F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / max(1, labels.numel())
        for name, logits in outputs.items()
    }
    return losses["out"] + AUX_WEIGHT * losses["aux"] if "aux" in losses else losses["out"]


def semantic_fpn(
    backbone: Backbone = "b4",
    num_classes: int = 150,
    pretrained_backbone: Pretrained = False,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    pyramid_channels: int = 256,
    channels: int = 128,
    dropout: float = 0.1,
) -> Segmenter:
    """Semantic FPN with the published pyramid (strides 16 to 64) and head. Logits have the stride of the first stage.

    Args:
        backbone: name of a preset, or a :class:`mobilemamba.FeatureExtractor` of three stages.
        num_classes: classes; there is none for the background. The published models have the 150 of ADE20K.
        pretrained_backbone: weights of the backbone, as ``pretrained`` of :func:`mobilemamba.create_model`.
        backbone_options: options of :func:`mobilemamba.feature_extractor`, such as ``widths`` or ``frozen_stages``. As
            published, statistics of the backbone's norms are trained.
        pyramid_channels, channels: of the pyramid's levels and of the head.
        dropout: rate of the channels that are dropped before the last layer.

    Returns:
        A :class:`Segmenter`, which documents images and outputs; :func:`segmentation_loss` takes its outputs.

    Raises:
        OSError, TypeError, ValueError: as for :func:`mobilemamba.feature_extractor`; an argument is out of its range.

    Source: arXiv 1901.02446; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    torchvision has no such model. Of its ``FeaturePyramidNetwork``, initial biases and weights differ.
    """
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 3)
    neck = FeaturePyramid(body.out_channels, checks.integer("pyramid_channels", pyramid_channels))
    width, num_classes, rate = _checked(channels, num_classes, dropout)
    head = SemanticFPNHead([neck.out_channels] * len(body.out_channels), width, num_classes, rate)
    return Segmenter(WithNeck(body, neck, neck.out_channels, body.feature_info.reduction()), head, num_classes)


def deeplabv3(
    backbone: Backbone = "b4",
    num_classes: int = 150,
    pretrained_backbone: Pretrained = False,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    dropout: float = 0.1,
    dilations: Sequence[int] = (12, 24, 36),
    aux: bool = True,
) -> Segmenter:
    """DeepLabv3 with the published head on the last stage and auxiliary head on the one before.

    Training needs at least two images in a batch: the global mean is one pixel, and a BatchNorm needs more than one
    value.

    Args:
        backbone, num_classes, pretrained_backbone, backbone_options, dropout: as for :func:`semantic_fpn`.
        channels: of each branch, the bottleneck and the auxiliary head.
        dilations: of the 3x3 branches, in pixels of the last feature map.
        aux: whether there is an auxiliary head.

    Returns, Raises: as :func:`semantic_fpn`.

    Source: arXiv 1706.05587; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    Differs from torchvision's ``deeplabv3_resnet50``: the backbone is not dilated, so logits have a stride of 64; the
    global mean is the first branch; one 3x3 convolution takes the branches, where torchvision has a 1x1, dropout of
    half of the pixels, and a 3x3; dropout takes whole channels before the last layer; the auxiliary head has as many
    channels as the main head.
    """
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 3)
    width, classes, rate = _checked(channels, num_classes, dropout)
    head = DeepLabV3Head(body.out_channels[-1], width, classes, rate, checks.integers("dilations", dilations))
    return Segmenter(body, head, classes, _aux_head(aux, body.out_channels[-2], width, classes, rate))


def pspnet(
    backbone: Backbone = "b4",
    num_classes: int = 150,
    pretrained_backbone: Pretrained = False,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    channels: int = 256,
    dropout: float = 0.1,
    bins: Sequence[int] = (1, 2, 3, 6),
    aux: bool = True,
) -> Segmenter:
    """PSPNet with the published head on the last stage and auxiliary head on the one before.

    Training needs at least two images in a batch, as :func:`deeplabv3`.

    Args:
        backbone, num_classes, pretrained_backbone, backbone_options, dropout: as for :func:`semantic_fpn`.
        channels: of each grid, the bottleneck and the auxiliary head.
        bins: cells per side of the grids over which the last feature map is averaged.
        aux: whether there is an auxiliary head.

    Returns, Raises: as :func:`semantic_fpn`.

    Source: arXiv 1612.01105; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    torchvision has no such model. Differs from the paper: the backbone is not dilated, so logits have a stride of 64.
    """
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 3)
    width, classes, rate = _checked(channels, num_classes, dropout)
    head = PSPHead(body.out_channels[-1], width, classes, rate, checks.integers("bins", bins))
    return Segmenter(body, head, classes, _aux_head(aux, body.out_channels[-2], width, classes, rate))


def _checked(channels: int, num_classes: int, dropout: float) -> tuple[int, int, float]:
    return (
        checks.integer("channels", channels),
        checks.integer("num_classes", num_classes),
        checks.real("dropout", dropout, below=1),
    )


def _aux_head(aux: bool, in_channels: int, channels: int, num_classes: int, dropout: float) -> FCNHead | None:
    return FCNHead(in_channels, channels, num_classes, dropout) if checks.flag("aux", aux) else None
