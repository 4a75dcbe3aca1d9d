"""The accuracy of a model on one part of a data set."""

import torch
from torch import nn

from ..data import Preprocessing, Split

__all__ = ["evaluate"]


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, preprocessing: Preprocessing, batch_size: int = 500) -> float:
    """Share of the images of ``split`` that ``model`` gets right, with BatchNorm folded."""
    fused, device = model.fuse(), next(model.parameters()).device
    right = 0
    for index in torch.arange(len(split.labels)).split(batch_size):
        images = preprocessing.normalize(split.images(index).to(device))
        right += int((fused(images).argmax(1).cpu() == split.labels[index]).sum())
    return right / len(split.labels)
