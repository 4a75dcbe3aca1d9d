"""What the optimizer is given: parameter groups, the learning rate of a step, averaged weights."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ema", "learning_rate", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: no decay on biases and other 1-D parameters nor on ``model.no_weight_decay()``."""
    exempt = model.no_weight_decay()
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        groups[parameter.dim() <= 1 or name in exempt].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Linear from ``highest / 1000`` over ``warmup`` steps, then a cosine down to ``highest / 100`` at ``steps``."""
    if step < warmup:
        return highest * (0.001 + 0.999 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Ema:
    """Exponential moving average of parameters and statistics; the decay warms up as ``(1 + t) / (10 + t)``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in ``model`` after step ``step`` (from 0)."""
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [(mine, new) for mine, new in pairs if mine.is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([mine for mine, _ in averaged], [new for _, new in averaged], 1 - decay)
        for mine, new in pairs:
            if not mine.is_floating_point():
                mine.copy_(new)
