"""The heads: classifiers on pooled features."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .folded import FoldedLinear, scale_and_shift

__all__ = ["Classifier", "DistilledClassifier", "Logits", "one_head"]

Logits = Tensor | tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """BatchNorm and a linear layer on pooled features. ``(B, C) -> (B, num_classes)``."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        scale, shift = scale_and_shift(self.norm)
        return FoldedLinear(self.linear.weight * scale, self.linear.bias + self.linear.weight @ shift)


class DistilledClassifier(nn.Module):
    """Two classifiers on pooled features: ``(B, C) -> (B, num_classes)``.

    Training returns both outputs, evaluation their mean.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.labels: nn.Module = Classifier(dim, num_classes)
        self.teacher: nn.Module = Classifier(dim, num_classes)

    def forward(self, x: Tensor) -> Logits:
        labels, teacher = self.labels(x), self.teacher(x)
        if self.training:
            return labels, teacher
        return (labels + teacher) / 2

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        labels, teacher = self.labels, self.teacher
        assert isinstance(labels, FoldedLinear)
        assert isinstance(teacher, FoldedLinear)
        # the mean of two linear layers is one linear layer
        labels.conv.weight.add_(teacher.conv.weight).div_(2)
        labels.conv.bias.add_(teacher.conv.bias).div_(2)
        return labels


def one_head(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model with one head from those of a model with two: its logits are the mean of theirs.

    The norm keeps the running statistics of the first head. In evaluation mode the logits are equal up to rounding; in
    training too where both heads have the same statistics, as heads that were trained together have. Weights with one
    head, or none, are returned as they are.
    """
    labels, teacher = "head.labels.", "head.teacher."
    if labels + "linear.weight" not in tensors:
        return dict(tensors)
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith((labels, teacher))}
    first, second = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (labels, teacher)
    )
    mean, deviation = _statistics(first)
    weight, bias = torch.zeros(()).double(), torch.zeros(()).double()
    for head in (first, second):
        own_mean, own_deviation = _statistics(head)
        linear = head["linear.weight"].double()
        scale = head["norm.weight"].double() * deviation / own_deviation  # of what the first head's norm normalises
        shift = head["norm.bias"].double() + head["norm.weight"].double() * (mean - own_mean) / own_deviation
        weight, bias = weight + linear * scale / 2, bias + (head["linear.bias"].double() + linear @ shift) / 2
    kind = first["linear.weight"].dtype
    head = {name: tensor for name, tensor in first.items() if name.startswith("norm.")}
    head["norm.weight"], head["norm.bias"] = torch.ones_like(head["norm.weight"]), torch.zeros_like(head["norm.bias"])
    head["linear.weight"], head["linear.bias"] = weight.to(kind), bias.to(kind)
    return {**body, **{f"head.{name}": tensor for name, tensor in head.items()}}


def _statistics(head: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Running mean and standard deviation of the norm of a head, as :class:`Classifier` names them, in float64."""
    return head["norm.running_mean"].double(), (head["norm.running_var"].double() + nn.BatchNorm1d(1).eps).sqrt()
