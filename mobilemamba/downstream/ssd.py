"""SSDLite as published: torchvision's SSD and the head of its SSDLite, with the parts that differ."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation

from .anchors import ssd_anchors
from .boxes import BoxCoder, Matcher, best_of_levels, denominator
from .fusing import Fusible
from .necks import WithNeck
from .scripting import inherited
from .transform import Transform

__all__ = ["ANCHOR_SIZES", "ExtraLevels", "SSDLite"]

#: Sizes of the anchors of the six levels, and one more; pixels of the input, whatever its size.
ANCHOR_SIZES = (48, 100, 150, 202, 253, 304, 320)

NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)


class ExtraLevels(nn.Module):
    """Four levels after the last map, each of half the size: a dictionary of maps -> a dictionary with four more.

    A level is a 1x1 convolution to half of its channels, a depthwise 3x3 convolution with stride 2 and a 1x1
    convolution, each with BatchNorm and ReLU6.

    Args:
        in_channels: channels of the last map.
        out_channels: channels of the levels.
    """

    def __init__(self, in_channels: int, out_channels: Sequence[int] = (512, 256, 256, 128)) -> None:
        super().__init__()
        conv = partial(Conv2dNormActivation, norm_layer=NORM, activation_layer=nn.ReLU6)
        self.out_channels = list(out_channels)
        self.levels = nn.ModuleList()
        for width in out_channels:
            half = width // 2
            layers = conv(in_channels, half, 1), conv(half, half, 3, 2, groups=half), conv(half, width, 1)
            self.levels.append(nn.Sequential(*layers))
            in_channels = width
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.03)

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = OrderedDict()
        levels = list(maps.values())
        x = levels[-1]
        for level in self.levels:
            x = level(x)
            levels.append(x)
        for i, x in enumerate(levels):
            result[str(i)] = x
        return result


class SSDLite(Fusible, SSD):
    """SSDLite; :func:`mobilemamba.downstream.ssdlite` makes it and tells its arguments.

    Args:
        sides: sides of the maps of the six levels, in their pixels.
    """

    __annotations__ = {"level_sizes": list[int]}  # torchvision's would compile its own coder and matcher

    def __init__(
        self,
        backbone: WithNeck,
        num_classes: int,
        sides: Sequence[int],
        transform: Transform,
        *,
        score_thresh: float = 0.02,
        nms_thresh: float = 0.45,
        detections_per_img: int = 200,
        iou_thresh: float = 0.5,
        topk_candidates: int = 1000,
        positive_fraction: float = 0.25,
    ) -> None:
        anchors = ssd_anchors(backbone.strides, ANCHOR_SIZES)
        counts = anchors.num_anchors_per_location()
        head = SSDLiteHead(backbone.out_channels, counts, num_classes, NORM)
        for m in head.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.001)
        super().__init__(
            backbone,
            anchors,
            transform.fixed_size,
            num_classes,
            head=head,
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
            positive_fraction=positive_fraction,
        )
        self.transform, self.box_coder = transform, BoxCoder((0.1, 0.1, 0.2, 0.2))
        self.proposal_matcher = Matcher(iou_thresh, iou_thresh, least=0.0, all_best=False)
        self.level_sizes = [count * side**2 for count, side in zip(counts, sides, strict=True)]

    _losses = inherited(SSD.compute_loss, "_losses")

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = self._losses(targets, head_outputs, anchors, matched_idxs)
        count = 0
        for matched in matched_idxs:
            count += int((matched >= 0).sum())
        losses["bbox_regression"] = losses["bbox_regression"] * (max(count, 1) / denominator(count))
        return losses

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores = head_outputs["cls_logits"].softmax(2)[:, :, 1:]
        deltas = head_outputs["bbox_regression"]
        found: list[dict[str, Tensor]] = []
        for i, shape in enumerate(image_shapes):
            found.append(
                best_of_levels(
                    list(scores[i].split(self.level_sizes)),
                    list(deltas[i].split(self.level_sizes)),
                    list(image_anchors[i].split(self.level_sizes)),
                    self.box_coder,
                    shape,
                    self.score_thresh,
                    self.topk_candidates,
                    self.nms_thresh,
                    self.detections_per_img,
                )
            )
        return found
