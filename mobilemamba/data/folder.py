"""A data set of image files: ``DIR/train/CLASS/...`` and ``DIR/val/CLASS/...``."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .image_files import describe_skipped, find_images, has_its_end, read_ahead
from .preprocessing import Preprocessing, open_image
from .splits import DataSet

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageFiles", "load_folder"]

CHUNK = 256  # files that a thread checks at once
NAMED = 5  # names in a message


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded on demand.

    Args:
        root: their folder.
        names: path of each file below ``root``; the first part is the class.
        labels: int64 ``(N,)``.
        preprocessing: its colour mode is that of the images.
        skip: whether files that cannot be read are named once on stderr and skipped. Otherwise they are an error.
        bad: what is wrong with the skipped files, by index.
    """

    root: str
    names: list[str]
    labels: Tensor
    preprocessing: Preprocessing
    skip: bool = False
    bad: dict[int, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> "Image.Image":
        return self._open(os.path.join(self.root, self.names[i]))

    def _open(self, path: str, content: bytes | None = None) -> "Image.Image":
        """The upright image in the colour mode of the model, so that a file in another mode is refused by its name."""
        image = open_image(path, content)
        try:
            return self.preprocessing.convert(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self) -> None:
        """Look at both ends of each JPEG, PNG and WebP file, and decode those that look damaged, and other formats.

        Raises:
            ValueError: some files are not complete images; the message names the first of them and says how many.
        """
        check_files(self.root, self.names, self._open)

    def fingerprint(self) -> dict[str, list[Any]]:
        found = {}
        for label, names in itertools.groupby(self.names, lambda name: name.split(os.sep, 1)[0]):
            listed = list(names)
            digest = hashlib.sha256("\0".join(listed).encode("utf-8", "surrogateescape")).hexdigest()
            found[label] = [len(listed), digest]
        return found


def check_files(
    root: str, names: list[str], read: Callable[[str], object], look: Callable[[int], object] | None = None
) -> None:
    """Look at both ends of each JPEG, PNG and WebP file, and ``read`` those that look damaged, and other formats.

    Args:
        look: called with the place in ``names`` of each complete file. It may raise OSError or ValueError.

    Raises:
        ValueError: some files are not complete images, or ``look`` finds something; the message names the first of them
            and says how many.
    """

    def problems(chunk: list[tuple[int, str]]) -> list[tuple[str, str]]:
        found = []
        for i, name in chunk:
            path = os.path.join(root, name)
            try:
                if not has_its_end(path):
                    read(path)
                if look is not None:
                    look(i)
            except FileNotFoundError:
                found.append((path, f"{path}: no such image file"))
            except (OSError, ValueError) as error:
                found.append((path, str(error)))
        return found

    iterator = enumerate(names)
    chunks = iter(lambda: list(itertools.islice(iterator, CHUNK)), [])
    bad = [problem for chunk in read_ahead(problems, chunks, 4 * torch.get_num_threads()) for problem in chunk]
    if bad:
        others = ", ".join(path for path, _ in bad[1:NAMED]) + (" ..." if len(bad) > NAMED else "")
        raise ValueError(
            bad[0][1]
            + (f"; {len(bad) - 1} more: {others}" if others else "")
            + ": mend or remove bad images, or skip them with --on-bad-image skip"
        )


def load_folder(root: Path, size: int, skip: bool = False) -> DataSet:
    """RGB images of ``size`` pixels from ``root/train/CLASS/`` and ``root/val/CLASS/``; labels are the folder names.

    Args:
        skip: skip bad images. Otherwise all files are checked here (:meth:`ImageFiles.check`).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a class has no training images, ``val`` has other classes or no images, or files are bad.
    """
    skipped: Counter[str] = Counter()
    names = class_folders(root, "train", skipped)
    extra = sorted(set(class_folders(root, "val", skipped)) - set(names))
    if extra:
        raise ValueError(f"{root / 'val'}: expected only classes of {root / 'train'}, got {', '.join(extra)}")
    preprocessing = Preprocessing(resize=int(size / 0.875), crop=size)

    def find(part: str) -> ImageFiles:
        folder = os.fspath(root / part)
        files = [list(find_images(path, skipped)) if path.is_dir() else [] for path in (root / part / n for n in names)]
        if part == "train" and (empty := [name for name, found in zip(names, files, strict=True) if not found]):
            raise ValueError(f"{folder}: expected images in each class folder, got none in {listing(empty)}")
        if not any(files):
            told = describe_skipped(skipped)
            raise ValueError(
                f"{folder}: expected images in the class folders, got none" + (f"; {told}" if told else "")
            )
        labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(found) for found in files]))
        relative = [path[len(folder) + 1 :] for path in itertools.chain(*files)]
        return ImageFiles(folder, relative, labels, preprocessing, skip)

    train, test = find("train"), find("val")
    if not skip:
        for part in (train, test):
            part.check()
    return DataSet(train, test, names, preprocessing, skipped)


def class_folders(root: Path, part: str, skipped: Counter[str]) -> tuple[str, ...]:
    """The names of the folders in ``root/part``, sorted. ``skipped`` counts the files beside them."""
    folder = root / part
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder with train/CLASS and val/CLASS, got no folder")
    if not folder.is_dir():
        there = listing([path.name for path in visible(root) if path.is_dir()])
        raise FileNotFoundError(
            f"{folder}: expected a folder of class folders, got none; {root} has {there or 'no folders'}"
        )
    inside = visible(folder)
    names = tuple(path.name for path in inside if path.is_dir())
    if not names:
        raise ValueError(f"{folder}: expected one folder of images for each class, got no folder")
    if loose := len(inside) - len(names):
        skipped["outside the class folders"] += loose
    return names


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def listing(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
