"""The published detectors by name. torchvision is imported when one is made."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from ..models import FeatureExtractor, checks
from .backbones import Backbone, Pretrained, level_sides, make_backbone, with_pyramid
from .necks import WithNeck

if TYPE_CHECKING:
    from .rcnn import MaskRCNN
    from .retina import RetinaNet
    from .ssd import SSDLite
    from .transform import Transform

__all__ = ["mask_rcnn", "retinanet", "ssdlite"]


def mask_rcnn(
    backbone: Backbone = "b1",
    num_classes: int = 91,
    pretrained_backbone: Pretrained = False,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    pyramid_channels: int = 256,
    **options: Any,
) -> "MaskRCNN":
    """Mask R-CNN with the published pyramid (strides 4 to 64), heads, losses and test settings.

    It is a torchvision ``GeneralizedRCNN`` and is called as torchvision's detectors are. Input: a list of images
    ``(C, H, W)`` in 0..1, of any sizes.

    Training needs a list of targets too: dicts of ``boxes`` ``(N, 4)`` (x1, y1, x2, y2 in pixels), ``labels`` ``(N,)``
    (int64, from 1) and ``masks`` ``(N, H, W)`` (0 or 1). It returns the losses ``loss_objectness``,
    ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg`` and ``loss_mask``.

    Evaluation returns a dict for each image, best detection first: ``boxes`` ``(N, 4)``, ``labels`` ``(N,)``,
    ``scores`` ``(N,)`` and ``masks`` ``(N, 1, H, W)``. These are probabilities; the published mask is where they are at
    least 0.5.

    Args:
        backbone: name of a preset, or a :class:`mobilemamba.FeatureExtractor` of three stages.
        num_classes: classes with the background, which is label 0. The published models have 81.
        pretrained_backbone: weights of the backbone, as ``pretrained`` of :func:`mobilemamba.create_model`.
        backbone_options: options of :func:`mobilemamba.feature_extractor`, such as ``widths`` or ``frozen_stages``.
            ``norm_eval`` is True by default if there are weights, as published, and otherwise False.
        min_size, max_size: limits of the shorter and the longer side in pixels; images are resized to meet one of them.
            In training ``min_size`` is drawn from a sequence.
        image_mean, image_std: normalisation, a value for each channel. Images of 3 channels have ImageNet's by default.
        pyramid_channels: channels of the pyramid and of the convolutions of the heads; published: 256.
        options: torchvision's, with the published defaults: ``rpn_pre_nms_top_n_train`` (2000),
            ``rpn_pre_nms_top_n_test`` (1000), ``rpn_post_nms_top_n_train`` (1000), ``rpn_post_nms_top_n_test`` (1000),
            ``rpn_nms_thresh`` (0.7), ``rpn_fg_iou_thresh`` (0.7), ``rpn_bg_iou_thresh`` (0.3),
            ``rpn_batch_size_per_image`` (256), ``rpn_positive_fraction`` (0.5), ``box_score_thresh`` (0.05),
            ``box_nms_thresh`` (0.5), ``box_detections_per_img`` (100), ``box_fg_iou_thresh`` (0.5),
            ``box_bg_iou_thresh`` (0.5), ``box_batch_size_per_image`` (512), ``box_positive_fraction`` (0.25).

    Raises:
        ImportError: torchvision is missing.
        ValueError, TypeError, OSError: an argument is out of its range, or as :func:`mobilemamba.feature_extractor`.

    Source: arXiv 1703.06870; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    Differs from torchvision's ``maskrcnn_resnet50_fpn``:

    - Anchors are not rounded. dw and dh are clamped on both sides.
    - A low-quality match goes to the ground truth that has its highest IoU with it.
    - RoIAlign has aligned corners and as many samples as pixels.
    - Ground truths are the first proposals and belong to themselves. The box losses are L1. Mask targets are binary.
    - No small box is dropped. The background has no deltas and no mask. Masks are pasted at the centres of the pixels.
    """
    need_torchvision()
    from .rcnn import MaskRCNN

    options = _checked(MaskRCNN, options)
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 3, norm_eval=bool(pretrained_backbone))
    transform = _transform(body, num_classes, min_size, max_size, image_mean, image_std, masks=True)
    neck = with_pyramid(body, 4, False, pyramid_channels)
    return MaskRCNN(neck, num_classes, transform, **options)


def retinanet(
    backbone: Backbone = "b1",
    num_classes: int = 91,
    pretrained_backbone: Pretrained = False,
    *,
    backbone_options: Mapping[str, Any] | None = None,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    pyramid_channels: int = 256,
    **options: Any,
) -> "RetinaNet":
    """RetinaNet with the published pyramid (strides 8 to 128), heads, losses and test settings.

    It is torchvision's ``RetinaNet`` and is called as that. Images, targets and detections are those of
    :func:`mask_rcnn` without ``masks``; the losses are ``classification`` and ``bbox_regression``.

    Args:
        backbone, num_classes, pretrained_backbone, backbone_options: as for :func:`mask_rcnn`.
        min_size, max_size, image_mean, image_std, pyramid_channels: as for :func:`mask_rcnn`.
        options: torchvision's, with the published defaults: ``score_thresh`` (0.05), ``nms_thresh`` (0.5),
            ``detections_per_img`` (100), ``fg_iou_thresh`` (0.5), ``bg_iou_thresh`` (0.4), ``topk_candidates`` (1000).

    Raises:
        ImportError, ValueError, TypeError, OSError: as :func:`mask_rcnn`.

    Source: arXiv 1708.02002; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    Differs from torchvision's ``retinanet_resnet50_fpn``: the background has no logit; the losses are divided by the
    positive anchors of the batch, not of each image; sizes of anchors are not truncated; anchors, coder and matcher are
    those of :func:`mask_rcnn`; boxes without area are dropped; at most 100 detections.
    """
    need_torchvision()
    from .retina import RetinaNet

    options = _checked(RetinaNet, options)
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 3, norm_eval=bool(pretrained_backbone))
    transform = _transform(body, num_classes, min_size, max_size, image_mean, image_std)
    neck = with_pyramid(body, 8, True, pyramid_channels)
    return RetinaNet(neck, num_classes, transform, **options)


def ssdlite(
    backbone: Backbone = "b1",
    num_classes: int = 91,
    pretrained_backbone: Pretrained = False,
    *,
    size: int = 320,
    backbone_options: Mapping[str, Any] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    **options: Any,
) -> "SSDLite":
    """SSDLite with the published extra levels, heads, losses and test settings.

    It is torchvision's ``SSD`` and is called as that. Images, targets and detections are those of :func:`mask_rcnn`
    without ``masks``; the losses are ``classification`` and ``bbox_regression``. Training needs batches of at least two
    images: the last level is one pixel large, and a BatchNorm needs more than one value.

    Args:
        backbone: name of a preset, or a :class:`mobilemamba.FeatureExtractor` of the stages 0 and 1.
        num_classes, pretrained_backbone, backbone_options, image_mean, image_std: as for :func:`mask_rcnn`;
            ``norm_eval`` is False by default.
        size: side of the square to which images are resized, without keeping their ratio. Published: 320 and 512. The
            anchors have the same sizes and strides in pixels at every size, as published.
        options: torchvision's, with the published defaults: ``score_thresh`` (0.02), ``nms_thresh`` (0.45),
            ``detections_per_img`` (200), ``iou_thresh`` (0.5), ``topk_candidates`` (1000), ``positive_fraction``
            (0.25).

    Raises:
        ImportError, ValueError, TypeError, OSError: as :func:`mask_rcnn`.

    Source: arXiv 1801.04381; "MobileMamba" (arXiv 2411.15941) with the settings of its published configuration.

    Differs from torchvision's ``ssdlite320_mobilenet_v3_large``: sizes and strides of the anchors; a level keeps its
    best pairs of anchor and class, not the best anchors of each class; boxes without area are dropped; the coder is
    that of :func:`mask_rcnn`.
    """
    need_torchvision()
    from .ssd import ANCHOR_SIZES, ExtraLevels, SSDLite

    size, options = checks.integer("size", size), _checked(SSDLite, options)
    body = make_backbone(backbone, pretrained_backbone, backbone_options, 2, norm_eval=False)
    transform = _transform(
        body, num_classes, size, size, image_mean, image_std, size_divisible=1, fixed_size=(size, size)
    )
    neck, reduction = ExtraLevels(body.out_channels[-1]), body.feature_info.reduction()
    levels = len(ANCHOR_SIZES) - 1
    strides = [round(320 / side) for side in level_sides(320, reduction, levels)]
    channels = [*body.out_channels, *neck.out_channels]
    sides = level_sides(size, reduction, levels)
    return SSDLite(WithNeck(body, neck, channels, strides), num_classes, sides, transform, **options)


def need_torchvision() -> None:
    """Refuse to make a detector without torchvision.

    Raises:
        ImportError: torchvision is missing.
    """
    try:
        import torchvision.models.detection  # noqa: F401
    except ImportError as error:
        raise ImportError(f"a detector needs torchvision: pip install 'mobilemamba[downstream]' ({error})") from error


def _checked(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` by the defaults of the class: a share or threshold from 0 to 1, or a number of things from 1 on.

    An option that the class does not have is left to its constructor, which refuses it.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    result = {}
    for name, value in options.items():
        if isinstance(defaults.get(name), float):
            value = checks.real(name, value)
            if value > 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value}")
        elif isinstance(defaults.get(name), int):
            value = checks.integer(name, value)
        result[name] = value
    return result


def _transform(
    body: FeatureExtractor,
    num_classes: int,
    min_size: int | Sequence[int],
    max_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    **options: Any,
) -> "Transform":
    from .transform import Transform

    num_classes = checks.integer("num_classes", num_classes, least=2)
    sizes = checks.integers("min_size", list(min_size) if isinstance(min_size, Iterable) else [min_size])
    channels = body.body.in_chans
    normalisation = []
    for name, value, default in (("image_mean", mean, IMAGENET_MEAN), ("image_std", std, IMAGENET_STD)):
        if value is None and channels == len(default):
            value = default
        if not isinstance(value, Iterable) or len(value) != channels:
            raise ValueError(f"{name}: expected a value for each of the {channels} channels, got {value!r:.100}")
        normalisation.append([checks.real(name, v, least=-math.inf) for v in value])
    if not all(0 < v < math.inf for v in normalisation[1]) or not all(map(math.isfinite, normalisation[0])):
        raise ValueError(
            f"image_mean and image_std: expected finite means and positive deviations, got {normalisation}"
        )
    return Transform(sizes, checks.integer("max_size", max_size), *normalisation, num_classes=num_classes, **options)
