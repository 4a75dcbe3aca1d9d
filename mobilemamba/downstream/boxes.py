"""Box coder, matcher and choice of the best boxes, as published, in place of torchvision's."""

import math

import torch
from torch import Tensor, nn
from torchvision.models.detection import _utils
from torchvision.ops import batched_nms, clip_boxes_to_image

from .scripting import inherited

__all__ = ["BoxCoder", "Matcher", "best_boxes", "best_of_levels", "denominator"]


def denominator(count: int) -> float:
    """``count``, at least 1, and the eps of float32, which the published losses add."""
    return max(count, 1) + 1.1920928955078125e-07


class BoxCoder(nn.Module, _utils.BoxCoder):
    """torchvision's BoxCoder that clamps ``dw`` and ``dh`` on both sides, to ``+-log(1000 / 16)``.

    It is a module because TorchScript knows subclasses of modules only.

    Args:
        stds: the deltas (dx, dy, dw, dh) of a box are multiplied by them.
    """

    def __init__(self, stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        nn.Module.__init__(self)
        x, y, w, h = stds
        limit = math.log(1000 / 16)
        _utils.BoxCoder.__init__(self, (1 / x, 1 / y, 1 / w, 1 / h), limit)
        self.least = [-math.inf, -math.inf, -limit / w, -limit / h]

    _decode = inherited(_utils.BoxCoder.decode_single, "_decode")
    _encode = inherited(_utils.BoxCoder.encode_single, "_encode")

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Deltas ``(N, 4)`` from ``proposals`` to ``reference_boxes``, both ``(N, 4)``; in the dtype of the latter."""
        return self._encode(reference_boxes, proposals).to(reference_boxes.dtype)

    @torch.jit.export
    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes ``(N, 4 * K)`` from deltas of that shape and the boxes ``(N, 4)`` that they start from.

        They have the dtype of the deltas, but at least 32 bits.
        """
        deltas = rel_codes.to(boxes.dtype).reshape(rel_codes.size(0), rel_codes.size(1) // 4, 4)
        least = torch.tensor(self.least, dtype=deltas.dtype, device=deltas.device)
        decoded = self._decode(torch.maximum(deltas, least).flatten(1), boxes)
        return decoded.to(torch.float64 if rel_codes.dtype == torch.float64 else torch.float32)


class Matcher(nn.Module, _utils.Matcher):
    """torchvision's Matcher with the published rule for low-quality matches. It is a module as :class:`BoxCoder` is.

    For each ground truth in turn, the boxes of its highest IoU are assigned to it, whatever they were assigned to
    before. torchvision assigns them to the ground truth that they overlap most.

    Args:
        high: boxes with an IoU of at least this are positive.
        low: boxes with an IoU below this are negative. Those between are ignored.
        least: IoU that a low-quality match needs.
        all_best: whether a ground truth gets all boxes of its highest IoU, or the first one.
    """

    def __init__(self, high: float, low: float, least: float, all_best: bool = True) -> None:
        nn.Module.__init__(self)
        _utils.Matcher.__init__(self, high, low, allow_low_quality_matches=True)
        self.least, self.all_best = least, all_best

    forward = _utils.Matcher.__call__

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Changes ``matches`` ``(N)`` in place by the IoU ``(M, N)`` of ground truths and boxes."""
        best, first = match_quality_matrix.max(dim=1)
        if self.all_best:
            # A ground truth apart from all boxes has them all at its highest IoU: it gets none.
            equal = (match_quality_matrix == best[:, None]) & ((best >= self.least) & (best > 0))[:, None]
            truth, box = torch.where(equal)
        else:
            truth = torch.where(best >= self.least)[0]
            box = first[truth]
        # Of several ground truths the last one stays; an indexed assignment would not say which on a GPU.
        last = torch.full_like(matches, -1).scatter_reduce(0, box, truth, "amax")
        matches.copy_(torch.where(last >= 0, last, matches))


def best_boxes(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, limit: int) -> dict[str, Tensor]:
    """The ``limit`` best of the boxes that class-wise NMS keeps, best first. Scores get the dtype of the boxes."""
    scores = scores.to(boxes.dtype)  # NMS takes one dtype, and boxes have at least 32 bits
    keep = batched_nms(boxes, scores, labels, iou)[:limit]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def best_of_levels(
    scores: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    coder: BoxCoder,
    image_shape: tuple[int, int],
    threshold: float,
    candidates: int,
    iou: float,
    limit: int,
) -> dict[str, Tensor]:
    """Detections in one image by a detector of one stage.

    Args:
        scores: for each level ``(N, K)``; column 0 is label 1.
        deltas, anchors: for each level ``(N, 4)``.
        image_shape: height and width of the image without padding, to which the boxes are clipped.
        threshold: scores must be above it.
        candidates: pairs of anchor and class that each level keeps for NMS.
        iou: threshold of NMS.
        limit: detections that are kept.
    """
    boxes_of: list[Tensor] = []
    scores_of: list[Tensor] = []
    labels_of: list[Tensor] = []
    for score, delta, anchor in zip(scores, deltas, anchors, strict=True):
        pairs = torch.where(score.flatten() > threshold)[0]
        values, order = score.flatten()[pairs].topk(min(candidates, pairs.numel()))
        pairs = pairs[order]
        rows = torch.div(pairs, score.size(1), rounding_mode="floor")
        boxes = clip_boxes_to_image(coder.decode_single(delta[rows], anchor[rows]), image_shape)
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = torch.where((sides > 0).all(dim=1))[0]
        boxes_of.append(boxes[keep])
        scores_of.append(values[keep])
        labels_of.append((pairs % score.size(1) + 1)[keep])
    return best_boxes(torch.cat(boxes_of), torch.cat(scores_of), torch.cat(labels_of), iou, limit)
