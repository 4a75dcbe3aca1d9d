"""The fused form of a downstream model."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["Fusible"]

Model = TypeVar("Model", bound=nn.Module)


class Fusible:
    """Gives a model :meth:`fuse`."""

    def fuse(self: Model) -> Model:
        """A copy for inference, in evaluation mode: the backbone is fused, BatchNorms behind convolutions are folded.

        Source: :meth:`mobilemamba.MobileMamba.fuse` for the backbone.
        """
        return _fold(copy.deepcopy(self).eval())


def _fold(module: Model) -> Model:
    """Fuses the children of ``module`` that know how to, and folds the BatchNorms of its sequences, in place."""
    for name, child in module.named_children():
        setattr(module, name, child.fuse() if hasattr(child, "fuse") else _fold(child))
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1, 0, -1):
            conv, norm = module[i - 1], module[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                module[i - 1] = fuse_conv_bn_eval(conv, norm)
                del module[i]
    return module
