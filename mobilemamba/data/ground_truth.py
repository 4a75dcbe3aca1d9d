"""Reads files that state the class of each image of a flat folder, as ImageNet's validation images come."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SYNSET", "read_ground_truth"]

SYNSET = re.compile(r"n\d{8}")  # a WordNet id, which names a class
KAGGLE_HEADER = "ImageId,PredictionString"


def read_ground_truth(path: Path, images: Sequence[str]) -> dict[str, str]:
    """The class of each image that ``path`` states one for: its name, WordNet id or number, as the file writes it.

    The file has one of these layouts:

    - ``FILE CLASS`` lines, with a space, a tab or a comma between the two. FILE is the path of an image, its name, or
      its name without suffix. CLASS may have spaces.
    - Kaggle's ``LOC_val_solution.csv``: the line ``ImageId,PredictionString``, then ``NAME,CLASS X Y X Y CLASS ...``.
    - A WordNet id in each line, for the images in the order of their names.
    - ``ILSVRC2012_validation_ground_truth.txt``, with a number from 1 in each line, for the images in the order of
      their names. These numbers are not in the order of the classes: ``meta.mat``, from the same archive, must lie
      beside the file. Reading it needs SciPy.

    Args:
        images: paths of the images, with ``/`` between their parts.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line has another layout; images cannot be told apart by their names; or the file states no class
            for any image.
        ImportError: SciPy is missing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got other bytes ({error})") from error
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise ValueError(f"{path}: expected the classes of images, got an empty file")
    if all(re.fullmatch(r"n?\d+", line) for line in lines.values()):
        return _in_order(path, list(lines.values()), images)

    classes: dict[str, str] = {}
    for number, line in lines.items():
        if line == KAGGLE_HEADER:
            continue
        match = re.fullmatch(r"([^\t]+?)\s*\t\s*(.+)|([^,]+?)\s*,\s*(.+)|(\S+)\s+(.+)", line)
        if match is None:
            raise ValueError(f"{path}, line {number}: expected FILE CLASS, got '{line:.60}'")
        file, name = (part for part in match.groups() if part is not None)
        if KAGGLE_HEADER in lines.values():
            name = name.split()[0]
        if classes.setdefault(os.path.normpath(file), name) != name:
            raise ValueError(f"{path}, line {number}: a second class for {file}")

    found: dict[str, str] = {}
    same_key: dict[str, str] = {}
    for image in images:
        for key in (image, os.path.basename(image), os.path.splitext(os.path.basename(image))[0]):
            if key in classes:
                found[image] = classes[key]
                if key != image and same_key.setdefault(key, image) != image:
                    raise ValueError(f"{path}: '{key}' may be {same_key[key]} or {image}; expected paths in the file")
                break
    if not found:
        raise ValueError(
            f"{path}: expected the classes of the images, such as {images[0]}; it has {next(iter(classes))}"
        )
    return found


def _in_order(path: Path, classes: list[str], images: Sequence[str]) -> dict[str, str]:
    """The classes of images in the order of their names."""
    if len(classes) != len(images):
        raise ValueError(f"{path}: expected a line for each of the {len(images)} images, got {len(classes)} lines")
    if not all(map(SYNSET.fullmatch, classes)):
        meta = path.parent / "meta.mat"
        if not meta.is_file():
            raise ValueError(
                f"{path}: expected lines FILE CLASS, got only numbers; if they are ILSVRC2012's, their order is "
                f"not that of the classes, and {meta} from the same archive is needed"
            )
        synsets = _ilsvrc_synsets(meta)
        try:
            classes = [synsets[int(number)] for number in classes]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected ILSVRC2012's class numbers from 1 to 1000, got {error}") from error
    return dict(zip(sorted(images, key=os.path.basename), classes, strict=True))


def _ilsvrc_synsets(meta: Path) -> dict[int, str]:
    """WordNet ids by ILSVRC2012's class number, from the development kit's ``meta.mat``."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(f"{meta} needs SciPy: pip install scipy") from error
    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0
        }  # the others are groups of classes
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{meta}: expected meta.mat of ILSVRC2012's development kit ({error})") from error
