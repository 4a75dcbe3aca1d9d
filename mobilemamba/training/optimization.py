"""Parameter groups, the learning rate of each step, and the moving average of the weights."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..models import MobileMamba

__all__ = ["Ema", "learning_rate", "parameter_groups"]


def parameter_groups(model: MobileMamba, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: first the parameters with weight decay, then those without.

    Parameters of one dimension (biases, norms) and those of ``model.no_weight_decay()`` have none.
    """
    exempt = model.no_weight_decay()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
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


class Ema:
    """Exponential moving average of a model's parameters and running statistics, in ``self.model``.

    The decay of step t is at most ``(1 + t) / (10 + t)``, so that the first steps are soon forgotten.
    """

    def __init__(self, model: MobileMamba, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: MobileMamba, step: int) -> None:
        """Add the state of ``model`` after step ``step`` (from 0) to the average."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([mine for mine, _ in averaged], [new for _, new in averaged], 1 - decay)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)
