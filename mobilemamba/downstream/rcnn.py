"""Mask R-CNN as published: torchvision's classes, with the parts that differ."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, roi_align

from .anchors import pyramid_anchors
from .boxes import BoxCoder, Matcher, best_boxes, denominator
from .fusing import Fusible
from .necks import WithNeck
from .scripting import inherited
from .transform import Transform

__all__ = ["MaskRCNN"]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RegionProposalNetwork with the published coder, matcher and losses, and without a smallest size."""

    # For TorchScript. torchvision's annotations would compile its own coder and matcher.
    __annotations__ = {"fg_bg_sampler": BalancedPositiveNegativeSampler}

    def __init__(self, matcher: Matcher, **options: Any) -> None:
        super().__init__(fg_iou_thresh=matcher.high_threshold, bg_iou_thresh=matcher.low_threshold, **options)
        self.box_coder, self.proposal_matcher = BoxCoder(), matcher
        self.min_size = torch.finfo(torch.float32).tiny  # only boxes without area are dropped

    _filter = inherited(RegionProposalNetwork.filter_proposals, "_filter")

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's, for logits of 16 bits too: boxes have at least 32 bits, and NMS takes one dtype."""
        return self._filter(proposals, objectness.to(proposals.dtype), image_shapes, num_anchors_per_level)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both losses are sums over the sampled anchors, divided by their number; an image counts at least one of each
        kind."""
        positive, negative = self.fg_bg_sampler(labels)
        count = 0
        for p, n in zip(positive, negative):  # noqa: B905 - TorchScript has no strict
            count += max(int(p.sum()), 1) + max(int(n.sum()), 1)
        chosen = torch.where(torch.cat(positive))[0]
        sampled = torch.where(torch.cat(positive) | torch.cat(negative))[0]
        logits, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="sum")
        deltas = torch.cat(regression_targets)[chosen]
        box_loss = F.l1_loss(pred_bbox_deltas[chosen], deltas, reduction="sum")
        return objectness_loss / denominator(count), box_loss / denominator(count)


class ProposalAlign(MultiScaleRoIAlign):
    """torchvision's MultiScaleRoIAlign with aligned corners, as many samples as pixels, and given strides.

    A box of side ``s`` is read from level ``floor(log2(s / (14 * strides[0])))``, as far as there is one.

    Args:
        strides: of the levels that are read, which are the first ones.
        output_size: side of the result.
    """

    __annotations__ = {"strides": list[int]}

    def __init__(self, strides: Sequence[int], output_size: int) -> None:
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=0)
        self.strides = list(strides)

    def levels(self, rois: Tensor) -> Tensor:
        """The level of each box of ``rois`` ``(N, 5)``: image, x1, y1, x2, y2."""
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        return (sides / (14 * self.strides[0]) + 1e-6).log2().floor().clamp(0, len(self.strides) - 1).long()

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Features ``(N, C, output_size, output_size)`` of the boxes of all images."""
        maps = list(x.values())[: len(self.strides)]
        index = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat((index, torch.cat(boxes)), dim=1)
        chosen = self.levels(rois)
        result = maps[0].new_zeros([len(rois), maps[0].size(1), self.output_size[0], self.output_size[1]])
        for i, level in enumerate(maps):
            rows = torch.where(chosen == i)[0]
            part = roi_align(level.to(rois.dtype), rois[rows], self.output_size, 1 / self.strides[i], 0, True)
            result = result.index_put((rows,), part.to(result.dtype))
        return result


class BoxPredictor(nn.Module):
    """Class scores ``(N, num_classes)``, background first, and deltas ``(N, 4 * (num_classes - 1))`` without it.

    torchvision's FastRCNNPredictor has deltas of the background too, which nothing trains.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 * (num_classes - 1))
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class MaskPredictor(nn.Sequential):
    """Mask logits ``(N, num_classes - 1, 28, 28)`` of features ``(N, C, 14, 14)``; channel 0 is label 1."""

    def __init__(self, channels: int, num_classes: int) -> None:
        upsample, logits = nn.ConvTranspose2d(channels, channels, 2, 2), nn.Conv2d(channels, num_classes - 1, 1)
        super().__init__(OrderedDict(upsample=upsample, relu=nn.ReLU(inplace=True), logits=logits))
        for layer in (upsample, logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class Heads(RoIHeads):
    """torchvision's RoIHeads with the published assignment, losses and test settings.

    Ground truths are the first proposals and belong to themselves. The box loss is L1. A mask target is binary.
    """

    __annotations__ = {"fg_bg_sampler": BalancedPositiveNegativeSampler}  # as in ProposalNetwork

    def __init__(self, matcher: Matcher, mask_stride: int, **parts: Any) -> None:
        high, low = matcher.high_threshold, matcher.low_threshold
        super().__init__(fg_iou_thresh=high, bg_iou_thresh=low, bbox_reg_weights=None, **parts)
        self.box_coder, self.proposal_matcher = BoxCoder((0.1, 0.1, 0.2, 0.2)), matcher
        self.mask_stride = mask_stride

    def add_gt_proposals(self, proposals: list[Tensor], gt_boxes: list[Tensor]) -> list[Tensor]:
        return [torch.cat((truth, boxes)) for boxes, truth in zip(proposals, gt_boxes)]  # noqa: B905

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, the ground truth and the label of each proposal; the first ones are the ground truths."""
        indices: list[Tensor] = []
        labels: list[Tensor] = []
        for boxes, truth, label in zip(proposals, gt_boxes, gt_labels):  # noqa: B905
            count = len(truth)
            index = torch.full([len(boxes)], -1, dtype=torch.int64, device=boxes.device)
            index[:count] = torch.arange(count, device=boxes.device)
            if count > 0 and len(boxes) > count:
                index[count:] = self.proposal_matcher(box_iou(truth, boxes[count:]))
            assigned = torch.zeros_like(index)
            positive = torch.where(index >= 0)[0]
            assigned[positive] = label[index[positive]]
            assigned[index == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1
            indices.append(index.clamp(min=0))
            labels.append(assigned)
        return indices, labels

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        sizes = [len(boxes) for boxes in proposals]
        scores_of = class_logits.softmax(1)[:, 1:].split(sizes)
        boxes_of = self.box_coder.decode_single(box_regression, torch.cat(proposals)).split(sizes)
        found: list[dict[str, Tensor]] = []
        for scores, boxes, shape in zip(scores_of, boxes_of, image_shapes):  # noqa: B905
            row, label = torch.where(scores > self.score_thresh)
            boxes = clip_boxes_to_image(boxes.reshape(len(scores), scores.size(1), 4)[row, label], shape)
            kept = best_boxes(boxes, scores[row, label], label + 1, self.nms_thresh, self.detections_per_img)
            found.append(kept)
        return [d["boxes"] for d in found], [d["scores"] for d in found], [d["labels"] for d in found]

    def box_losses(
        self, class_logits: Tensor, box_regression: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> dict[str, Tensor]:
        """Cross entropy and L1 of the label's deltas, both divided by the number of sampled proposals."""
        label = torch.cat(labels)
        count = denominator(len(label))
        positive = torch.where(label > 0)[0]
        deltas = box_regression.reshape(len(label), box_regression.size(1) // 4, 4)[positive, label[positive] - 1]
        return {
            "loss_classifier": F.cross_entropy(class_logits, label, reduction="sum") / count,
            "loss_box_reg": F.l1_loss(deltas, torch.cat(targets)[positive], reduction="sum") / count,
        }

    def mask_loss(
        self,
        logits: Tensor,
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        masks: list[Tensor],
        canvas: tuple[int, int],
    ) -> Tensor:
        """Binary cross entropy of the labels' masks.

        A target is where the RoIAlign of the ground truth's mask is at least 0.5. Masks are padded to ``canvas``
        (height, width), the size of the batch: at the border of an image RoIAlign reads the padding.
        """
        if logits.size(0) == 0:
            return logits.sum() * 0
        targets: list[Tensor] = []
        for box, index, mask in zip(boxes, matched, masks):  # noqa: B905
            mask = F.pad(mask, [0, canvas[1] - mask.size(2), 0, canvas[0] - mask.size(1)])
            rois = torch.cat((index[:, None].to(box.dtype), clip_boxes_to_image(box, canvas)), dim=1)
            targets.append(roi_align(mask[:, None].to(box.dtype), rois, logits.size(2), 1.0, 0, True)[:, 0] >= 0.5)
        label = torch.cat(labels) - 1
        chosen = logits[torch.arange(len(label), device=label.device), label]
        return F.binary_cross_entropy_with_logits(chosen, torch.cat(targets).to(logits.dtype))

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's: detections ``boxes``, ``labels``, ``scores``, ``masks (N, 1, 28, 28)``; or the losses."""
        losses: dict[str, Tensor] = {}
        found: list[dict[str, Tensor]] = []
        if self.training:
            assert targets is not None
            proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
            scores, regression = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
            losses = self.box_losses(scores, regression, labels, deltas)
            positive = [torch.where(label > 0)[0] for label in labels]
            proposals = [boxes[rows] for boxes, rows in zip(proposals, positive)]  # noqa: B905
            matched = [index[rows] for index, rows in zip(matched, positive)]  # noqa: B905
            labels = [label[rows] for label, rows in zip(labels, positive)]  # noqa: B905
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, proposals, image_shapes)))
            height, width = features["0"].shape[-2:]
            canvas = (height * self.mask_stride, width * self.mask_stride)
            masks = [target["masks"] for target in targets]
            losses["loss_mask"] = self.mask_loss(logits, proposals, matched, labels, masks, canvas)
            return found, losses
        scores, regression = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        boxes, values, labels = self.postprocess_detections(scores, regression, proposals, image_shapes)
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks = maskrcnn_inference(logits, [label - 1 for label in labels])
        for i in range(len(boxes)):
            found.append({"boxes": boxes[i], "labels": labels[i], "scores": values[i], "masks": masks[i]})
        return found, losses


class MaskRCNN(Fusible, GeneralizedRCNN):
    """Mask R-CNN; :func:`mobilemamba.downstream.mask_rcnn` makes it and tells its arguments."""

    def __init__(
        self,
        backbone: WithNeck,
        num_classes: int,
        transform: Transform,
        *,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        rpn_fg_iou_thresh: float = 0.7,
        rpn_bg_iou_thresh: float = 0.3,
        rpn_batch_size_per_image: int = 256,
        rpn_positive_fraction: float = 0.5,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_fg_iou_thresh: float = 0.5,
        box_bg_iou_thresh: float = 0.5,
        box_batch_size_per_image: int = 512,
        box_positive_fraction: float = 0.25,
    ) -> None:
        channels, anchors = backbone.out_channels, pyramid_anchors(backbone.strides, (8.0,))
        assert isinstance(channels, int)  # those of a pyramid
        rpn = ProposalNetwork(
            Matcher(rpn_fg_iou_thresh, rpn_bg_iou_thresh, least=rpn_bg_iou_thresh),
            anchor_generator=anchors,
            head=RPNHead(channels, 3),
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=rpn_positive_fraction,
            pre_nms_top_n={"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            nms_thresh=rpn_nms_thresh,
        )
        strides = backbone.strides[:-1]  # the last level serves the proposals alone
        heads = Heads(
            Matcher(box_fg_iou_thresh, box_bg_iou_thresh, least=box_fg_iou_thresh),
            strides[0],
            box_roi_pool=ProposalAlign(strides, 7),
            box_head=TwoMLPHead(channels * 7 * 7, 1024),
            box_predictor=BoxPredictor(1024, num_classes),
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=box_positive_fraction,
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            mask_roi_pool=ProposalAlign(strides, 14),
            mask_head=MaskRCNNHeads(channels, [channels] * 4, 1),
            mask_predictor=MaskPredictor(channels, num_classes),
        )
        for layer in heads.box_head.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(backbone, rpn, heads, transform)
