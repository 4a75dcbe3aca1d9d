"""Opens one part of a data set for an evaluation, with the class numbers of a model.

Images lie in class folders, in one folder beside a file that states their classes, or in a tar file of either kind.
Classes have the model's names, or WordNet ids where those are ImageNet's.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from .datasets import load
from .folder import ImageFiles, listing
from .ground_truth import read_ground_truth
from .image_files import describe_skipped, find_images
from .imagenet import IMAGENET_LABELS, IMAGENET_SYNSETS
from .preprocessing import Preprocessing
from .splits import Split
from .tar import TarImages, find_in_tar

__all__ = ["load_split"]

PARTS = ("train", "val", "test")
SYNSET = re.compile(r"n\d{8}")
NAMES = dict(zip(IMAGENET_SYNSETS, IMAGENET_LABELS, strict=True))
OUTSIDE = "outside the class folders"


def load_split(
    spec: str,
    split: str,
    classes: Sequence[str] | int,
    *,
    ground_truth: Path | None = None,
    on_bad_image: str = "fail",
) -> tuple[Split, str]:
    """Open one part of a data set. Its labels are the model's class numbers.

    Args:
        spec: ``fashion-mnist[:DIR]`` or ``digits``; ``folder:DIR``, with images in ``DIR/SPLIT/CLASS/`` or, if DIR has
            no folder SPLIT, in ``DIR/CLASS/``; or ``tar:FILE``, a tar file of such folders, or of one tar file for each
            class, not compressed. It is read without unpacking.
        split: ``train``, ``val``, ``test`` or the name of another folder in DIR. Fashion-MNIST and digits have a
            ``train`` part, and one that is called ``val`` and ``test``.
        classes: names of the model's classes, or their number if the names are unknown. A WordNet id of ImageNet-1k and
            its short name are the same class. Without names, the model's classes are those of the data in the order
            of their names.
        ground_truth: the classes of the images, for ``folder`` and ``tar``, instead of class folders
            (:func:`read_ground_truth`).
        on_bad_image: ``"fail"`` or ``"skip"``, as for :func:`load`.

    Returns:
        The images, and a line that says what was found.

    Raises:
        ValueError: an unknown name, a damaged file, no images, or classes that the model does not have.
        FileNotFoundError: a file or folder is missing.
    """
    kind, _, where = spec.partition(":")
    path = Path(os.path.expanduser(where))
    if kind not in ("folder", "tar") or not where:
        if ground_truth is not None:
            raise ValueError(f"ground truth: expected it for folder:DIR or tar:FILE only, got it with data '{spec}'")
        dataset = load(spec)
        if split not in PARTS:
            raise ValueError(f"split: expected train, val or test for data '{spec}', got '{split}'")
        part = dataset.train if split == "train" else dataset.test
        mapping = class_indices(dataset.labels, classes, spec)
        numbers = torch.tensor([mapping[label] for label in dataset.labels])
        part = dataclasses.replace(part, labels=numbers[part.labels])  # type: ignore[type-var]
        return part, f"{spec} ({split}): {len(part.labels)} images, {len(dataset.labels)} classes"

    skipped: Counter[str] = Counter()
    if kind == "folder":
        root = folder_of(path, split)
        names = [found[len(os.fspath(root)) + 1 :] for found in find_images(root, skipped)]
    else:
        root = path
        names, places = find_in_tar(path, split, skipped)
    where = os.fspath(root)
    stated: dict[str, str]
    if ground_truth is not None:
        stated = read_ground_truth(ground_truth, names)
        skipped[f"not in {ground_truth.name}"] = len(names) - len(stated)
    else:
        stated = {name: name.split("/", 1)[0] for name in names if "/" in name}
        skipped[OUTSIDE] = len(names) - len(stated)
    ...
