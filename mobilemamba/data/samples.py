"""A sample of a data set's images, prepared for a model; their classes do not matter."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from .datasets import load
from .image_files import describe_skipped, find_images
from .preprocessing import ImageOrPath, Preprocessing

__all__ = ["sample_images"]

Item = TypeVar("Item")


def sample_images(spec: str, count: int, preprocessing: Preprocessing) -> tuple[int, Iterator[Tensor]]:
    """Images that are spread evenly over a data set.

    Args:
        spec: ``folder:DIR``: all images in DIR, at any depth. ``fashion-mnist[:DIR]`` or ``digits``: the test images.
        count: how many. If the data set has fewer, all of them.
        preprocessing: the model's.

    Returns:
        The number of images, and the images one at a time: float32 ``(1, C, crop, crop)``, normalised.

    Raises:
        ValueError: an unknown name, or no images; in the iteration, an image that cannot be read.
        OSError: a file or folder is missing, or cannot be read.
    """
    kind, _, where = spec.partition(":")
    images: list[ImageOrPath]
    if kind == "folder" and where:
        root, skipped = Path(os.path.expanduser(where)), Counter[str]()
        images = [*_spread(list(find_images(root, skipped)), count)]
        if not images:
            told = describe_skipped(skipped)
            raise ValueError(f"{root}: expected images, got none" + (f"; {told}" if told else ""))
    else:
        test = load(spec).test
        images = [test.image(i) for i in _spread(range(len(test)), count)]
    transform = preprocessing.transforms()
    return len(images), (transform(image)[None] for image in images)


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
