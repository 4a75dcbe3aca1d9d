"""Images with a class for each pixel: a folder of images, and one of masks with the same names."""

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .folder import check_files
from .image_files import find_images
from .preprocessing import image_header, open_image, to_mode
from .splits import AnnotatedData

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IGNORED", "MaskFolder", "load_masks", "load_masks_split"]

IGNORED = 255  # the class of pixels that do not count

#: Pillow's modes of images with a number for each pixel; "1" has the classes 0 and 1.
MODES = ("1", "L", "P", "I;16", "I")

#: Names of the parts' folders: this package's, and ADE20K's.
PARTS = {"train": ("train", "training"), "val": ("val", "validation")}


@dataclass(frozen=True)
class MaskFolder:
    """Images and their masks, read on demand.

    Args:
        root, masks_root: the folders of the images and of the masks.
        names, masks: path of each image and of its mask below them.
        labels: names of the classes.
        reduce_zero_label: ADE20K's convention: the value 0 is ignored, and value v is class v - 1.
        skip, bad: as of :class:`CocoImages`.
    """

    root: str
    masks_root: str
    names: list[str]
    masks: list[str]
    labels: tuple[str, ...]
    reduce_zero_label: bool = False
    skip: bool = False
    bad: dict[int, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> "Image.Image":
        """Image ``i`` in mode RGB, upright."""
        path = os.path.join(self.root, self.names[i])
        image = open_image(path)
        try:
            return to_mode(image, "RGB")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def target(self, i: int) -> dict[str, Tensor]:
        """``mask``, uint8 ``(H, W)``: the class of each pixel of image ``i``, or :data:`IGNORED`.

        Raises:
            ValueError, OSError: the mask cannot be read, is no image of class numbers, has a number that is no class,
                or has another size than the image; the message names it.
        """
        path = os.path.join(self.masks_root, self.masks[i])
        image = open_image(path)
        if image.mode not in MODES:
            raise ValueError(
                f"{path}: expected a mask with a class number for each pixel (a mode of {', '.join(MODES)}), got the "
                f"mode {image.mode}"
            )
        if not self.fits(i, image.size):
            width, height = self.image(i).size
            raise ValueError(
                f"{path}: expected a mask of {width} x {height} pixels, as its image, got "
                f"{image.width} x {image.height}"
            )
        values = np.asarray(image)
        if image.mode == "1":
            values = values.astype(np.uint8)
        if self.reduce_zero_label:
            values = np.where(values == 0, IGNORED, np.where(values == IGNORED, IGNORED, values.astype(np.int64) - 1))
        classes = len(self.labels)
        outside = (values != IGNORED) & ((values < 0) | (values >= classes))
        if outside.any():
            found = int(values[outside].max()) + self.reduce_zero_label
            allowed = f"{int(self.reduce_zero_label)} to {classes - 1 + self.reduce_zero_label} or {IGNORED}"
            raise ValueError(f"{path}: expected class numbers {allowed}, got {found}")
        return {"mask": torch.from_numpy(values.astype(np.uint8))}

    def fits(self, i: int, size: tuple[int, int]) -> bool:
        """Whether image ``i`` has this width and height."""
        return image_header(os.path.join(self.root, self.names[i]))[0] == size or self.image(i).size == size

    def check(self) -> None:
        """Look at both ends of each image and mask, and compare their sizes.

        Raises:
            ValueError: some files are not complete, or some masks have colours or another size than their image; the
                message names the first one.
        """

        def check_mask(i: int) -> None:
            size, mode = image_header(os.path.join(self.masks_root, self.masks[i]))
            if mode not in MODES or not self.fits(i, size):
                self.target(i)

        check_files(self.root, self.names, lambda path: open_image(path))
        check_files(self.masks_root, self.masks, lambda path: open_image(path), check_mask)

    def fingerprint(self) -> dict[str, list[Any]]:
        facts = (self.names, self.masks, self.labels, self.reduce_zero_label)
        return {"all": [len(self), hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()]}


def read_classes(root: Path) -> tuple[str, ...]:
    """The names of the classes: the lines of ``root/classes.txt``, or the last column of ADE20K's objectInfo150.txt.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the file has no names, more than 255 or an empty line, or is no text; the message names it.
    """
    ours, ade = root / "classes.txt", root / "objectInfo150.txt"
    path = next((path for path in (ours, ade) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root}: expected classes.txt with the name of a class in each line, got no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got other bytes ({error})") from error
    heading = int(path == ade)  # lines before the names
    names = tuple(line.split("\t")[-1] if heading else line for line in lines[heading:])
    for number, name in enumerate(names, 1 + heading):
        if not name.strip():
            raise ValueError(f"{path}, line {number}: expected the name of a class, got an empty line")
    if not 1 <= len(names) <= IGNORED:
        raise ValueError(f"{path}: expected 1 to {IGNORED} names of classes, one in each line, got {len(names)}")
    return names


def load_masks_split(root: Path, part: str, reduce_zero_label: bool = False, skip: bool = False) -> MaskFolder:
    """One part of a data set of images and masks.

    The images are in ``root/images/PART`` or ``root/PART/images``, the masks in ``masks`` instead of ``images``, or
    ``annotations`` (ADE20K), with the same names but for the suffix. PART may be ADE20K's ``training`` or
    ``validation``. Names of the classes: ``root/classes.txt`` or ``root/objectInfo150.txt``.

    Args:
        part: ``train``, ``val`` or another name.
        reduce_zero_label: as of :class:`MaskFolder`.
        skip: skip bad images and those without a mask. Otherwise they are an error, and the files are checked here.

    Raises:
        FileNotFoundError: a folder or the names of the classes are missing, or an image has no mask.
        ValueError: there are no images, or some files are bad; the message names the first one.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder with images/ and masks/, got no folder")
    pairs = [
        pair
        for name in PARTS.get(part, (part,))
        for pair in (
            (root / "images" / name, root / "masks" / name),
            (root / name / "images", root / name / "masks"),
            (root / "images" / name, root / "annotations" / name),
        )
    ]
    found = next(((images, masks) for images, masks in pairs if images.is_dir() and masks.is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"{root}: expected the folders images/{part} and masks/{part}, got none such")
    folder, masks_folder = found
    labels = read_classes(root)
    names, masks = (
        {os.path.splitext(path)[0][len(os.fspath(place)) + 1 :]: path for path in find_images(place, Counter())}
        for place in found
    )
    if not names:
        raise ValueError(f"{folder}: expected images, got none")
    for what, alone, where in (
        ("a mask", {names[stem] for stem in names.keys() - masks.keys()}, masks_folder),
        ("an image", {masks[stem] for stem in masks.keys() - names.keys()}, folder),
    ):
        for file in sorted(alone):
            problem = f"{file}: expected {what} of this name in {where}, got none"
            if not skip:
                raise FileNotFoundError(problem)
            print(f"skipped: {problem}", file=sys.stderr)
    both = sorted(names.keys() & masks.keys())
    if not both:
        raise ValueError(f"{masks_folder}: expected masks with the names of the images, got none")
    images = MaskFolder(
        os.fspath(folder),
        os.fspath(masks_folder),
        [names[stem][len(os.fspath(folder)) + 1 :] for stem in both],
        [masks[stem][len(os.fspath(masks_folder)) + 1 :] for stem in both],
        labels,
        reduce_zero_label,
        skip,
    )
    if not skip:
        images.check()
    return images


def load_masks(root: Path, reduce_zero_label: bool = False, skip: bool = False) -> AnnotatedData:
    """The parts ``train`` and ``val`` in ``root``.

    Args, Raises: as :func:`load_masks_split`.
    """
    train, test = (load_masks_split(root, part, reduce_zero_label, skip) for part in ("train", "val"))
    return AnnotatedData(train, test, train.labels)
