"""The accuracy of a model on one part of a data set."""

import torch

from ..data import Preprocessing, Split
from ..models import MobileMamba

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(model: MobileMamba, split: Split, preprocessing: Preprocessing, batch_size: int = 128) -> float:
    """Top-1 accuracy of ``model.fuse()`` on ``split``, from 0 to 1. Bad images that are skipped do not count.

    Args:
        model: on any device; the images follow it.
        preprocessing: normalises the images.
        batch_size: images per forward pass.

    Raises:
        ValueError: no image can be read, or one cannot and bad images are not skipped.
    """
    fused, device = model.fuse(), next(model.parameters()).device
    right = count = 0
    for index in torch.arange(len(split.labels)).split(batch_size):
        images, labels = split.batch(index)
        if len(labels):
            logits = fused(preprocessing.normalize(images.to(device)))
            right, count = right + int((logits.argmax(1).cpu() == labels).sum()), count + len(labels)
    if not count:
        raise ValueError("expected test images, got none that can be read")
    return right / count
