"""RetinaNet as published: torchvision's class, with the parts that differ."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou, sigmoid_focal_loss

from .anchors import pyramid_anchors
from .boxes import BoxCoder, Matcher, best_of_levels, denominator
from .fusing import Fusible
from .necks import WithNeck
from .transform import Transform

__all__ = ["RetinaNet"]


class RetinaNet(Fusible, TorchvisionRetinaNet):
    """RetinaNet; :func:`mobilemamba.downstream.retinanet` makes it and tells its arguments."""

    __annotations__: dict[str, Any] = {}  # torchvision's would compile its own coder and matcher for TorchScript

    def __init__(
        self,
        backbone: WithNeck,
        num_classes: int,
        transform: Transform,
        *,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        topk_candidates: int = 1000,
    ) -> None:
        anchors = pyramid_anchors(backbone.strides, [4 * 2 ** (k / 3) for k in range(3)])
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            head=RetinaNetHead(backbone.out_channels, 9, num_classes - 1),
            proposal_matcher=Matcher(fg_iou_thresh, bg_iou_thresh, least=0.0),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
        )
        self.transform, self.box_coder = transform, BoxCoder()

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> dict[str, Tensor]:
        """Focal loss of all anchors that are not ignored, and L1 of the positive ones. Both are sums over the batch.

        They are divided by the batch's positive anchors, of which an image has at least one.
        """
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        classification, regression, count = logits.new_zeros(()), deltas.new_zeros(()), 0
        for i, target in enumerate(targets):
            boxes, anchor = target["boxes"], anchors[i]
            matched = torch.full([len(anchor)], -1, dtype=torch.int64, device=anchor.device)
            if len(boxes) > 0:
                matched = self.proposal_matcher(box_iou(boxes, anchor))
            positive = torch.where(matched >= 0)[0]
            truth = torch.zeros_like(logits[i])
            truth[positive, target["labels"][matched[positive]] - 1] = 1.0
            used = torch.where(matched != self.proposal_matcher.BETWEEN_THRESHOLDS)[0]
            classification = classification + sigmoid_focal_loss(logits[i][used], truth[used], reduction="sum")
            wanted = self.box_coder.encode_single(boxes[matched[positive]], anchor[positive])
            regression = regression + F.l1_loss(deltas[i][positive], wanted, reduction="sum")
            count += max(len(positive), 1)
        return {
            "classification": classification / denominator(count),
            "bbox_regression": regression / denominator(count),
        }

    def postprocess_detections(
        self,
        head_outputs: dict[str, list[Tensor]],
        anchors: list[list[Tensor]],
        image_shapes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        scores = [logits.sigmoid() for logits in head_outputs["cls_logits"]]
        found: list[dict[str, Tensor]] = []
        for i, shape in enumerate(image_shapes):
            found.append(
                best_of_levels(
                    [level[i] for level in scores],
                    [level[i] for level in head_outputs["bbox_regression"]],
                    anchors[i],
                    self.box_coder,
                    shape,
                    self.score_thresh,
                    self.topk_candidates,
                    self.nms_thresh,
                    self.detections_per_img,
                )
            )
        return found
