"""Fine-tuning: a model with pretrained weights for the classes of a data set, and frozen parts."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .. import weights
from ..data import Preprocessing
from ..data.imagenet import IMAGENET_NAMES
from ..models import MobileMamba
from ..models.frozen import FrozenBatchNorm, freeze_layers, freeze_statistics

__all__ = ["FREEZABLE", "FrozenBatchNorm", "freeze", "freeze_norms", "same_classes", "start_from"]

#: What :func:`freeze` takes.
FREEZABLE = ("none", "stem", "stages", "all-but-head")


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether both are the same classes in the same order. ImageNet's may be names or WordNet ids."""
    return [IMAGENET_NAMES.get(label, label) for label in one] == [IMAGENET_NAMES.get(label, label) for label in other]


def start_from(
    pretrained: str, model: MobileMamba, preset: str, labels: Sequence[str], preprocessing: Preprocessing
) -> Preprocessing:
    """Load pretrained weights into ``model``, and give it a new head if they know other classes.

    What is not as in the weights is said on stderr, a line each.

    Args:
        pretrained: ``"plain"``, ``"distilled"``, or the path of a checkpoint.
        labels, preprocessing: of the data.

    Returns:
        ``preprocessing`` with the mean and std that the weights were trained with.

    Raises:
        OSError, ValueError: as :func:`mobilemamba.weights.load_pretrained`.
    """
    source = True if pretrained == "plain" else pretrained
    stored = weights.load_pretrained(model, preset, source, allow_head_mismatch=True)
    if stored.labels and len(stored.labels) == len(labels) and not same_classes(stored.labels, labels):
        model.reset_classifier(len(labels))
        print(f"{stored.path}: its {len(labels)} classes are others; replaced by a new head", file=sys.stderr)
    known = stored.preprocessing
    if known is None or (known.mean, known.std) == (preprocessing.mean, preprocessing.std):
        return preprocessing
    print(
        f"{stored.path}: images are normalised as for these weights: mean {known.mean}, std {known.std}",
        file=sys.stderr,
    )
    return replace(preprocessing, mean=known.mean, std=known.std)


def freeze(model: MobileMamba, part: str) -> None:
    """Keep a part of ``model`` as it is, in place: parameters, running statistics, and no stochastic depth in it.

    Args:
        part: ``"stem"`` (the patch embedding), ``"stages"`` (all stages without the stem), ``"all-but-head"``
            (both), or ``"none"``.

    Raises:
        ValueError: ``part`` is something else.
    """
    if part not in FREEZABLE:
        raise ValueError(f"freeze: expected {', '.join(FREEZABLE[:-1])} or {FREEZABLE[-1]}, got '{part}'")
    frozen: list[nn.Module] = []
    if part in ("stem", "all-but-head"):
        frozen.append(model.patch_embed)
    if part in ("stages", "all-but-head"):
        frozen.append(model.stages)
    for module in frozen:
        freeze_layers(module)


def freeze_norms(model: MobileMamba) -> None:
    """Keep the statistics, weights and biases of every BatchNorm in the stem and the stages as they are, in place.

    The head's BatchNorm is trained: in a new head it has no statistics yet.
    """
    freeze_statistics(model.patch_embed, affine=True)
    freeze_statistics(model.stages, affine=True)
