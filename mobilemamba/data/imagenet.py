"""The classes of ImageNet-1k in the usual order: for each its WordNet id and a short name."""

from pathlib import Path

__all__ = ["IMAGENET_LABELS", "IMAGENET_NAMES", "IMAGENET_SYNSETS"]

_ROWS = [
    line.split("\t")
    for line in (Path(__file__).parent / "assets" / "imagenet1k.txt").read_text(encoding="utf-8").splitlines()
]

#: WordNet ids such as ``n01440764``, which name the folders. Their order is the classes'. Source: ILSVRC2012.
IMAGENET_SYNSETS = tuple(synset for synset, _ in _ROWS)

#: Short names, all different. Source: torchvision 0.29.1, torchvision.models._meta._IMAGENET_CATEGORIES.
IMAGENET_LABELS = tuple(label for _, label in _ROWS)

#: The short name of each WordNet id.
IMAGENET_NAMES = dict(zip(IMAGENET_SYNSETS, IMAGENET_LABELS, strict=True))
