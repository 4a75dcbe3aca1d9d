"""Frozen parts of a network: norms that keep their statistics, and layers that stay as they are."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import DropPath

__all__ = ["FrozenBatchNorm", "freeze_layers", "freeze_statistics"]


class FrozenBatchNorm(_BatchNorm):
    """A BatchNorm that stays in evaluation mode: it normalises with its running statistics and never updates them."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)

    def _check_input_dim(self, input: Tensor) -> None:
        """Every number of dimensions is right: it stands for the norms of one and of two."""


def freeze_statistics(module: nn.Module, affine: bool = False) -> None:
    """Keep the running statistics of every BatchNorm under ``module`` as they are, in place.

    Args:
        affine: keep their weights and biases too. Otherwise these are trained if they were.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            # The class changes, not the module: references, names and hooks stay, and copies are frozen too.
            norm.__class__ = FrozenBatchNorm
            norm.eval()
            if affine:
                norm.requires_grad_(False)


def freeze_layers(module: nn.Module) -> None:
    """Keep everything under ``module`` as it is, in place: parameters, statistics, and no stochastic depth in it."""
    module.requires_grad_(False)
    freeze_statistics(module, affine=True)
    for layer in module.modules():
        if isinstance(layer, DropPath):
            layer.rate = 0.0
