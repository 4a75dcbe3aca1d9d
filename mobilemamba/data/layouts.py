"""Opens one part of a data set for an evaluation, with the class numbers of a model.

Images lie in class folders, in one folder beside a file that states their classes, or in a tar file of either kind.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .datasets import ON_BAD_IMAGE, load
from .folder import ImageFiles, listing, visible
from .ground_truth import SYNSET, read_ground_truth
from .image_files import describe_skipped, find_images
from .imagenet import IMAGENET_LABELS, IMAGENET_NAMES
from .preprocessing import Preprocessing
from .splits import Split
from .tar import Place, TarImages, find_in_tar

__all__ = ["load_split"]

PARTS = ("train", "val", "test")


def load_split(
    spec: str,
    split: str,
    classes: Sequence[str] | int,
    preprocessing: Preprocessing,
    *,
    ground_truth: Path | None = None,
    on_bad_image: str = "fail",
) -> tuple[Split, str]:
    """Open one part of a data set. Its labels are the model's class numbers.

    Args:
        spec: ``fashion-mnist[:DIR]`` or ``digits``; ``folder:DIR``, with images in ``DIR/SPLIT/CLASS/`` or, if DIR has
            no folder SPLIT, in ``DIR/CLASS/``; or ``tar:FILE``, an uncompressed tar file of such folders, or of a tar
            file for each class. It is read without unpacking.
        split: ``train``, ``val``, ``test`` or the name of another folder in DIR. Fashion-MNIST and digits have two
            parts: ``train``, and one that is called ``val`` and ``test``.
        classes: names of the model's classes, or their number if it does not know the names. A WordNet id of
            ImageNet-1k and its short name are the same class.
        preprocessing: the model's.
        ground_truth: for ``folder`` and ``tar``, a file that states the classes of the images
            (:func:`mobilemamba.data.ground_truth.read_ground_truth`); folders then have no meaning.
        on_bad_image: ``"fail"`` or ``"skip"``, as for :func:`load`.

    Returns:
        The images, and a line that says what was found.

    Raises:
        ValueError: an unknown name, a damaged file, no images, or classes that the model does not have.
        OSError: a file or folder is missing, or cannot be read.
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image: expected {' or '.join(ON_BAD_IMAGE)}, got '{on_bad_image}'")
    kind, _, where = spec.partition(":")
    if kind not in ("folder", "tar") or not where:
        return _load_known(spec, split, classes, ground_truth)
    root, skipped = Path(os.path.expanduser(where)), Counter[str]()
    places: dict[str, Place] = {}
    if kind == "folder":
        root = _folder_of(root, split)
        names = [path[len(os.fspath(root)) + 1 :] for path in find_images(root, skipped)]
    else:
        places = _in_part(find_in_tar(root, skipped), split, root)
        names = list(places)
    if not names:
        told = describe_skipped(skipped)
        raise ValueError(f"{root}: expected images, got none" + (f"; {told}" if told else ""))

    if ground_truth is not None:
        class_of, without = read_ground_truth(ground_truth, names), f"not in {ground_truth.name}"
    else:
        class_of = {name: name.split("/", 1)[0] for name in names if "/" in name}
        without = "outside the class folders"
        if not class_of:
            raise ValueError(
                f"{root}: expected a folder for each class, got {len(names)} images without; a file can state their "
                "classes (--ground-truth)"
            )
    if missing := len(names) - len(class_of):
        skipped[without] += missing
    numbers = _class_numbers(class_of.values(), classes, spec, numbered=ground_truth is not None)
    labels = torch.tensor([numbers[name] for name in class_of.values()])
    skip = on_bad_image == "skip"
    images: ImageFiles
    if kind == "tar":
        found = tuple(places[name] for name in class_of)
        images = TarImages(os.fspath(root), list(class_of), labels, preprocessing, skip, places=found)
    else:
        images = ImageFiles(os.fspath(root), list(class_of), labels, preprocessing, skip)
        if not skip:
            images.check()
    told = f"{root}: {len(labels)} images, {len(numbers)} classes"
    return images, "; ".join(filter(None, (told, describe_skipped(skipped))))


def _load_known(spec: str, split: str, classes: Sequence[str] | int, ground_truth: Path | None) -> tuple[Split, str]:
    """A data set that has labels of its own."""
    dataset = load(spec)
    if ground_truth is not None:
        raise ValueError(f"ground truth: expected folder:DIR or tar:FILE with it, got '{spec}'")
    if split not in PARTS:
        raise ValueError(f"split: expected {', '.join(PARTS[:-1])} or {PARTS[-1]} for data '{spec}', got '{split}'")
    part = dataset.train if split == "train" else dataset.test
    numbers = _class_numbers(dataset.labels, classes, spec, numbered=False)
    labels = torch.tensor([numbers[name] for name in dataset.labels])[part.labels]
    told = f"{spec} ({'train' if split == 'train' else 'test'}): {len(labels)} images, {len(dataset.labels)} classes"
    return dataclasses.replace(part, labels=labels), told  # type: ignore[type-var]


def _folder_of(root: Path, split: str) -> Path:
    """``root/split`` if there is such a folder, or ``root`` if it is not a folder of parts."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: expected a folder of images, got {'a file' if root.exists() else 'no folder'}"
        )
    if (root / split).is_dir():
        return root / split
    _refuse_other_parts([path.name for path in visible(root) if path.is_dir()], split, root)
    return root


def _in_part(images: Mapping[str, Place], split: str, root: Path) -> dict[str, Place]:
    """The images below folders called ``split``, or all images if no folder has this name.

    Their names begin below that folder, or with the first folder that is not the same for all.
    """
    folders = {name: name.split("/")[:-1] for name in images}
    if any(split in parts for parts in folders.values()):
        depths = {name: parts.index(split) + 1 for name, parts in folders.items() if split in parts}
    else:
        common = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders.values(), strict=False))
        depth = max(0, min([len(list(common)), *(len(parts) - 1 for parts in folders.values())]))
        for level in range(depth + 1):
            _refuse_other_parts([parts[level] for parts in folders.values() if len(parts) > level], split, root)
        depths = dict.fromkeys(images, depth)
    found = {"/".join(name.split("/")[depth:]): images[name] for name, depth in depths.items()}
    if len(found) < len(depths):
        raise ValueError(f"{root}: expected one folder {split}, got several with images of the same name")
    return found


def _refuse_other_parts(folders: Iterable[str], split: str, root: Path) -> None:
    found = set(folders)
    if found and found <= {*PARTS, "validation"}:
        raise FileNotFoundError(f"{root}: expected a folder {split}, got {', '.join(sorted(found))} (--split)")


def _class_numbers(names: Iterable[str], classes: Sequence[str] | int, spec: str, *, numbered: bool) -> dict[str, int]:
    """The model's number of each class in ``names``.

    Args:
        numbered: ``names`` may be the numbers themselves.

    Raises:
        ValueError: the model does not have some of the classes, or it has two of the same name.
    """
    found = sorted(set(names))
    count = classes if isinstance(classes, int) else len(classes)
    labels = () if isinstance(classes, int) else tuple(IMAGENET_NAMES.get(name, name) for name in classes)
    if not labels and count == len(IMAGENET_NAMES) and all(map(SYNSET.fullmatch, found)):
        labels = IMAGENET_LABELS
    if not labels and not numbered:
        raise ValueError(f"{spec}: the model does not know the names of its {count} classes; state them (--labels)")
    index = {label: number for number, label in enumerate(labels)}
    if len(index) < len(labels):
        twice = next(name for name, times in Counter(labels).items() if times > 1)
        raise ValueError(f"labels: expected names that differ, got '{twice}' twice")
    if numbered:
        index |= {name: int(name) for name in found if name.isdecimal() and name not in index and int(name) < count}
    numbers = {name: index.get(IMAGENET_NAMES.get(name, name), -1) for name in found}
    if unknown := [name for name, number in numbers.items() if number < 0]:
        known = f"such as {listing(list(labels))}" if labels else f"from 0 to {count - 1}"
        raise ValueError(f"{spec}: expected the model's {count} classes, {known}; got {listing(unknown)}")
    return numbers
