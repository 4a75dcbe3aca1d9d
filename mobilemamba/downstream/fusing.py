"""The fused form of a downstream model."""

import copy
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import Self

__all__ = ["Fusible"]

Model = TypeVar("Model", bound=nn.Module)


class Fusible:
    """Gives a model :meth:`fuse`."""

    def fuse(self) -> Self:
        """A copy for inference, in evaluation mode: the backbone is fused, BatchNorms behind convolutions are folded.

        Source: :meth:`mobilemamba.MobileMamba.fuse` for the backbone.
        """
        model: Any = copy.deepcopy(self)
        return _fold(model.eval())


def _fold(module: Model) -> Model:
    """Fuses the children of ``module`` that know how to, and folds the BatchNorms of its sequences, in place."""
    for name, child in module.named_children():
        fuse = getattr(child, "fuse", None)
        setattr(module, name, fuse() if isinstance(fuse, MethodType) else _fold(child))
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1, 0, -1):
            conv, norm = module[i - 1], module[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                module[i - 1] = fuse_conv_bn_eval(conv, norm)
                del module[i]
    return module
