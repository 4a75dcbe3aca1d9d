"""The accuracy of a model on one part of a data set: top-1, top-5, by class, and the confusion matrix."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Preprocessing, Split
from ..data.loading import evaluation_batches
from ..models import MobileMamba
from .log import progress as progress_line

__all__ = ["Result", "evaluate", "evaluate_outputs"]


@dataclass(frozen=True)
class Result:
    """How many images of each class a model has right. Accuracies are from 0 to 1.

    Args:
        images, right, right5: int64 ``(classes,)``: images of each class, how many of them have their class as the most
            probable one, and as one of the five most probable ones.
        predicted: int64 ``(classes,)``: images for which each class is the most probable one.
        confusion: int64 ``(classes, classes)``: images by their class (row) and the most probable class (column). None
            if nobody asked for it.
        bad: images that could not be read and do not count, int64 ``()``.
        seconds: from the first image read to the last one counted.
    """

    images: Tensor
    right: Tensor
    right5: Tensor
    predicted: Tensor
    confusion: Tensor | None
    bad: Tensor
    seconds: float

    @property
    def count(self) -> int:
        """Images that count.

        Raises:
            ValueError: there are none.
        """
        if not (count := int(self.images.sum())):
            raise ValueError("expected test images, got none that can be read")
        return count

    @property
    def top1(self) -> float:
        """Share of the images whose class is the most probable one. Raises as :attr:`count`."""
        return int(self.right.sum()) / self.count

    @property
    def top5(self) -> float:
        """Share of the images whose class is one of the five most probable ones. Raises as :attr:`count`."""
        return int(self.right5.sum()) / self.count

    @property
    def images_per_s(self) -> float:
        return self.count / self.seconds

    def summed(self, total: Callable[[Tensor], Tensor]) -> "Result":
        """The result of several processes, each of which evaluated its share.

        Args:
            total: the sum of a tensor over the processes.
        """
        return Result(
            images=total(self.images),
            right=total(self.right),
            right5=total(self.right5),
            predicted=total(self.predicted),
            confusion=None if self.confusion is None else total(self.confusion),
            bad=total(self.bad),
            seconds=self.seconds,
        )


@torch.inference_mode()
def evaluate(
    model: MobileMamba, split: Split, preprocessing: Preprocessing, batch_size: int = 128, **options: Any
) -> Result:
    """Count the images of ``split`` that ``model.fuse()`` has right, as :func:`evaluate_outputs` does.

    Args:
        model: on any device, in any floating-point type; the images follow it.
        split, preprocessing, batch_size, options: as of :func:`evaluate_outputs`.

    Raises:
        ValueError: the images have other channels than the model; and as :func:`evaluate_outputs`.
        FloatingPointError: an output of the model is not finite.
    """
    preprocessing.check_channels(model.in_chans)
    first, fused = next(model.parameters()), model.fuse()

    def logits(images: Tensor) -> Tensor:
        return fused(images.to(first.dtype))

    return evaluate_outputs(logits, model.num_classes, split, preprocessing, batch_size, device=first.device, **options)


@torch.inference_mode()
def evaluate_outputs(
    logits_of: Callable[[Tensor], Tensor],
    classes: int,
    split: Split,
    preprocessing: Preprocessing,
    batch_size: int = 128,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    confusion: bool = False,
    progress: Callable[[int, int, float], str] | None = None,
) -> Result:
    """Count the images of ``split`` whose largest output is of their class. Bad images that are skipped do not count.

    Args:
        logits_of: normalised float32 images ``(B, C, H, W)`` on ``device`` -> logits ``(B, classes)``.
        preprocessing: resizes, crops and normalises the images.
        batch_size: images per forward pass.
        workers: processes that decode; 0 decodes here.
        share: ``(i, n)``: only the images ``i, i + n, i + 2 n ...``, for n processes.
        confusion: count the confusion matrix too; it takes 8 bytes times the square of the classes.
        progress: on a terminal, the text of a line that shows how far the evaluation is, from the number of batches
            done, the number of all batches and the seconds.

    Raises:
        ValueError: a class is not below ``classes``; or an image cannot be read and bad images are not skipped.
        FloatingPointError: an output is not finite.
    """
    device = torch.device(device)
    if len(split.labels) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < classes:
        raise ValueError(f"labels: expected classes from 0 to {classes - 1}, got {int(split.labels.max())}")
    images, right, right5, predicted = (torch.zeros(classes, dtype=torch.int64) for _ in range(4))
    matrix = torch.zeros(classes, classes, dtype=torch.int64) if confusion else None
    expected = len(range(share[0], len(split.labels), share[1]))
    start = time.perf_counter()
    batches = evaluation_batches(
        split, preprocessing, batch_size=batch_size, share=share, workers=workers, pin=device.type == "cuda"
    )
    if progress is not None:
        batches = progress_line(batches, progress, math.ceil(expected / batch_size))
    for pixels, labels in batches:
        pixels = pixels.to(device, non_blocking=True)
        logits = logits_of(preprocessing.normalize(pixels))
        if not logits.isfinite().all():
            raise FloatingPointError(f"expected finite outputs of the model, got others in {logits.dtype}")
        top = logits.topk(min(5, classes)).indices.cpu()
        hits = top == labels[:, None]
        images += labels.bincount(minlength=classes)
        right += labels[hits[:, 0]].bincount(minlength=classes)
        right5 += labels[hits.any(1)].bincount(minlength=classes)
        predicted += top[:, 0].bincount(minlength=classes)
        if matrix is not None:
            matrix += (labels * classes + top[:, 0]).bincount(minlength=classes**2).view_as(matrix)
    seconds = time.perf_counter() - start
    return Result(images, right, right5, predicted, matrix, expected - images.sum(), seconds)
