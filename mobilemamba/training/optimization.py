"""Parameter groups, the learning rate of each step, and the moving average of the weights."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..models import MobileMamba

__all__ = ["learning_rate", "moving_average", "parameter_groups"]

Tensors = tuple[Tensor, ...] | list[Tensor]


def parameter_groups(model: MobileMamba, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: first the parameters with weight decay, then those without.

    Parameters of one dimension (biases, norms) and those of ``model.no_weight_decay()`` have none. Frozen parameters
    are in no group.
    """
    exempt = model.no_weight_decay()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() <= 1 or name in exempt].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """The learning rate of ``step`` (from 0) out of ``steps``.

    It rises linearly from ``highest / 1000`` to ``highest`` over ``warmup`` steps, then falls as a cosine to
    ``highest / 100``.
    """
    if step < warmup:
        return highest * (0.001 + 0.999 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def moving_average(model: MobileMamba, decay: float) -> AveragedModel:
    """Exponential moving average of the parameters and the running statistics of ``model``.

    The decay of step t is at most ``(1 + t) / (10 + t)``, so that the first steps are soon forgotten.
    """

    @torch.no_grad()
    def update(mine: Tensors, new: Tensors, step: Tensor | int) -> None:
        if mine[0].is_floating_point():
            t = int(step)
            torch._foreach_lerp_(mine, new, 1 - min(decay, (1 + t) / (10 + t)))
        else:
            torch._foreach_copy_(mine, new)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.module.eval().requires_grad_(False)
    return average
