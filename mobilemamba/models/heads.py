"""The heads: classifiers on pooled features."""

import torch
from torch import Tensor, nn

from .folded import FoldedLinear, scale_and_shift

__all__ = ["Classifier", "DistilledClassifier", "Logits"]

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
