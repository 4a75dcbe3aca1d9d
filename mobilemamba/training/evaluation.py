"""The accuracy of a model on one part of a data set."""

import torch

from ..data import Preprocessing, Split
from ..models import MobileMamba

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(model: MobileMamba, split: Split, preprocessing: Preprocessing, batch_size: int = 500) -> float:
    """Top-1 accuracy of ``model.fuse()`` on ``split``, from 0 to 1.

    Args:
        model: on any device; the images follow it.
        preprocessing: normalises the images.
        batch_size: images per forward pass.
    """
    fused, device = model.fuse(), next(model.parameters()).device
    right = 0
    for index in torch.arange(len(split.labels)).split(batch_size):
        images = preprocessing.normalize(split.images(index).to(device))
        right += int((fused(images).argmax(1).cpu() == split.labels[index]).sum())
    return right / len(split.labels)
