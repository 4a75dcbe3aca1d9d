"""The mean intersection over union of a segmenter on images with a class for each pixel."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.joint import SegmentationTransform
from ..data.loading import evaluation_batches
from ..data.mask_folder import IGNORED, MaskFolder
from ..downstream.checkpoint import Preparation
from ..downstream.finite import refuse_infinite
from .log import progress as progress_line
from .processes import ALONE, Processes

__all__ = ["SegmentationResult", "evaluate_segmenter"]


@dataclass(frozen=True)
class SegmentationResult:
    """How many pixels of each class a segmenter has right.

    Args:
        confusion: int64 ``(classes, classes)``: pixels by their class (row) and the most probable class (column).
            Ignored pixels do not count.
        labels: names of the classes.
        count: images that count.
        bad: images that could not be read and do not count.
        seconds: from the first image read to the last one counted, in this process.
    """

    confusion: Tensor
    labels: tuple[str, ...]
    count: int
    bad: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.count / self.seconds

    @property
    def iou(self) -> list[float | None]:
        """Intersection over union of each class, from 0 to 1; None where neither images nor predictions have it."""
        right = self.confusion.diagonal()
        union = self.confusion.sum(0) + self.confusion.sum(1) - right
        return [int(r) / int(u) if u else None for r, u in zip(right, union, strict=True)]

    @property
    def measures(self) -> dict[str, float]:
        """``mIoU``, the mean of :attr:`iou`, and ``pixel_accuracy``, the share of the pixels that are right."""
        present = [value for value in self.iou if value is not None]
        right = int(self.confusion.diagonal().sum()) / max(1, int(self.confusion.sum()))
        return {"mIoU": sum(present) / len(present) if present else 0.0, "pixel_accuracy": right}

    @property
    def classes(self) -> list[dict[str, Any]]:
        """For each class its ``label``, ``IoU`` and ``accuracy``, the share of its pixels that are right."""
        pixels, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [
            {"label": label, "IoU": iou, "accuracy": part / whole if whole else None}
            for label, iou, part, whole in zip(self.labels, self.iou, right, pixels, strict=True)
        ]


@torch.inference_mode()
def evaluate_segmenter(
    model: nn.Module,
    split: MaskFolder,
    preparation: Preparation,
    batch_size: int = 8,
    *,
    workers: int = 0,
    processes: Processes = ALONE,
    precision: str = "float32",
    progress: Callable[[int, int, float], str] | None = None,
) -> SegmentationResult:
    """Count the pixels of ``split`` that ``model.fuse()`` has right. Bad images that are skipped do not count.

    The image is resized as ``preparation`` says and goes through the model whole. The outputs are resized to the
    image's own size, bilinearly, and the most probable class counts.

    Args:
        model: a segmenter of :mod:`mobilemamba.downstream`, on any device.
        batch_size: images per forward pass in this process, where they have one size.
        workers, processes, precision, progress: as for :func:`evaluate_detector`.

    Raises:
        FloatingPointError: an output of the model is not finite.
        ValueError: an image or its mask is bad and bad images are not skipped; no image can be read; or
            the model has other classes than ``split``.
    """
    classes = len(split.labels)
    assert preparation.size is not None
    transform = SegmentationTransform(preparation.size, training=False)
    device, fused = next(model.parameters()).device, refuse_infinite(model.fuse())  # type: ignore[operator]
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    seen = 0
    start = time.perf_counter()
    batches = evaluation_batches(
        split, transform, batch_size=batch_size, share=processes.share, workers=workers, pin=device.type == "cuda"
    )
    if progress is not None:
        batches = progress_line(batches, progress, math.ceil(len(split) / processes.count / batch_size))
    for images, targets in batches:
        same = len({image.shape for image in images}) == 1
        groups = [range(len(images))] if same else [range(i, i + 1) for i in range(len(images))]
        for group in groups:
            pixels = torch.stack([images[i] for i in group]).to(device, non_blocking=True)
            with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
                logits = fused(preparation.normalize(pixels))["out"]
            if logits.shape[1] != classes:
                raise ValueError(f"{split.root}: expected a segmenter of {classes} classes, got {logits.shape[1]}")
            for i, output in zip(group, logits.float(), strict=True):
                mask = targets[i]["mask"].to(device).long()
                if output.shape[-2:] != mask.shape:
                    output = F.interpolate(output[None], mask.shape, mode="bilinear", align_corners=False)[0]
                counts = mask != IGNORED
                pairs = mask[counts] * classes + output.argmax(0)[counts]
                confusion += pairs.bincount(minlength=classes * classes).cpu()
        seen += len(images)
    seconds = time.perf_counter() - start
    confusion, total = processes.sum(confusion).cpu(), int(processes.sum(torch.tensor(seen)))
    if not total:
        raise ValueError(f"{split.root}: expected test images, got none that can be read")
    return SegmentationResult(confusion.view(classes, classes), split.labels, total, len(split) - total, seconds)
