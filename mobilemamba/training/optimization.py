"""Parameter groups, the learning rate of each step, and the moving average of the weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["learning_rate", "moving_average", "parameter_groups"]

Tensors = tuple[Tensor, ...] | list[Tensor]


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_vectors: bool = False,
    head_lr: float = 1.0,
    heads: Sequence[str] = ("head",),
) -> list[dict[str, Any]]:
    """Groups for AdamW: first the parameters with weight decay, then those without.

    Parameters of one dimension (biases, norms) and those that a module's ``no_weight_decay()`` names have none. Frozen
    parameters are in no group.

    Args:
        decay_vectors: parameters of one dimension have weight decay too.
        head_lr: factor of the learning rate of the parameters of the head. Where it is not 1, they are two more groups.
            Each group has the factor as ``lr_scale``.
        heads: names of the children of ``model`` that are its head.

    Raises:
        ValueError: ``head_lr`` is not 1, and no parameter of a head is trained.
    """
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    groups: list[list[Tensor]] = [[], [], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_head = head_lr != 1 and name.partition(".")[0] in heads
            groups[2 * in_head + ((parameter.dim() <= 1 and not decay_vectors) or name in exempt)].append(parameter)
    if head_lr != 1 and not groups[2] + groups[3]:
        raise ValueError(f"head_lr: expected a model with parameters to train in {' or '.join(heads)}, got none")
    return [
        {"params": group, "weight_decay": 0.0 if i % 2 else weight_decay, "lr_scale": head_lr if i > 1 else 1.0}
        for i, group in enumerate(groups[: 2 if head_lr == 1 else 4])
    ]


def learning_rate(step: int, steps: int, warmup: int, highest: float, schedule: str = "cosine") -> float:
    """The learning rate of ``step`` (from 0) out of ``steps``.

    It rises linearly from ``highest / 1000`` to ``highest`` over ``warmup`` steps, then falls as a cosine to
    ``highest / 100``. With the schedule ``"late-cosine"`` of the published detectors and segmenters it rises from
    ``highest / 100000``, stays until half of the steps are done, and falls as a cosine to 0.
    """
    if schedule == "late-cosine":
        if step < warmup:
            return highest * (1e-5 + (1 - 1e-5) * step / warmup)
        return highest * (1 + math.cos(math.pi * max(0.0, 2 * step / max(1, steps) - 1))) / 2
    if step < warmup:
        return highest * (0.001 + 0.999 * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
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
