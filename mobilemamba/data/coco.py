"""Images with objects: annotations in COCO's JSON format, and a folder of images for each part."""

import hashlib
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .folder import check_files, listing
from .masks import decode, is_number, mask_library, mask_problem
from .preprocessing import image_header, open_image, to_mode
from .splits import AnnotatedData

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CocoImages", "load_coco", "load_coco_split"]

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}

#: Pixels by which a box may leave its image. COCO's own boxes do so by rounding.
TOLERANCE = 1.0

#: Least side of a box, as a share of the longer side of its image: four steps of float32 at the far edge.
RESOLUTION = 2.0**-21


@dataclass(frozen=True)
class CocoImages:
    """Images and their objects, read on demand.

    Args:
        file: the JSON file.
        folder: the folder of the images.
        names: path of each image below ``folder``.
        ids: COCO's number of each image.
        sizes: width and height of each image; :meth:`size` checks them.
        annotations: COCO's annotations of each image, as JSON: text takes a tenth of the memory of dicts, and worker
            processes share it.
        category_ids: COCO's number of each class, in ascending order.
        labels: name of each class, in the same order.
        masks: whether targets have masks; that needs pycocotools.
        skip: whether images that cannot be read, or whose annotations cannot be used, are named once on stderr and
            skipped. Otherwise they are an error.
        bad: what is wrong with the skipped images, by index.
    """

    file: str
    folder: str
    names: list[str]
    ids: list[int]
    sizes: list[tuple[int, int]]
    annotations: list[bytes]
    category_ids: tuple[int, ...]
    labels: tuple[str, ...]
    masks: bool = False
    skip: bool = False
    bad: dict[int, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> "Image.Image":
        """Image ``i`` in mode RGB, upright.

        Raises:
            ValueError, OSError: it cannot be read, or has another size than the JSON file says; the message names it.
        """
        size = self.size(i)
        path = os.path.join(self.folder, self.names[i])
        image = open_image(path)
        if image.size != size:
            found = f"{image.width} x {image.height}"
            raise ValueError(f"{path}: expected {size[0]} x {size[1]} pixels, as {self.file} says, got {found}")
        try:
            return to_mode(image, "RGB")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def size(self, i: int) -> tuple[int, int]:
        """Width and height of image ``i``, as the JSON file says.

        Raises:
            ValueError: they are no sizes; the message names the file.
        """
        if not all(type(side) is int and side > 0 for side in self.sizes[i]):
            width, height = self.sizes[i]
            raise ValueError(
                f"{self.file}: image {self.names[i]}: expected a width and height of at least one pixel, got "
                f"{width!r:.80} and {height!r:.80}"
            )
        return self.sizes[i]

    def objects(self, i: int) -> list[dict[str, Any]]:
        """COCO's annotations of image ``i``, checked.

        Raises:
            ValueError: a category is unknown, a box is outside the image, a mask has another size, or a value has
                another type; the message names the file.
        """
        size = self.size(i)
        objects: list[dict[str, Any]] = json.loads(self.annotations[i])
        for annotation in objects:
            if problem := self.problem(annotation, size):
                raise ValueError(f"{self.file}: annotation {annotation['id']!s:.80} of {self.names[i]}: {problem}")
        return objects

    def problem(self, annotation: dict[str, Any], size: tuple[int, int]) -> str:
        """What is wrong with an annotation of an image of ``size``; empty if nothing is."""
        width, height = size
        category = annotation["category_id"]
        if not is_number(category) or category not in self.category_ids:
            known = listing([str(key) for key in self.category_ids])
            return f"expected one of the categories {known}, got {category!r:.80}"
        if annotation.get("iscrowd", 0) not in (0, 1):
            return f"expected iscrowd to be 0 or 1, got {annotation['iscrowd']!r:.80}"
        area = annotation.get("area", 0)
        if not (is_number(area) and 0 <= area < math.inf):
            return f"expected an area of 0 or more, got {area!r:.80}"
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            return f"expected a box of four numbers, got {box!r:.80}"
        x, y, w, h = box
        inside = x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE
        if not (inside and w >= 0 and h >= 0):
            return f"expected a box x, y, width, height inside the {width} x {height} pixels of the image, got {box}"
        return mask_problem(annotation.get("segmentation"), height, width) if self.masks else ""

    def target(self, i: int) -> dict[str, Tensor]:
        """The objects of image ``i`` that a detector learns from: all but crowds and boxes without area.

        Returns:
            ``boxes`` float32 ``(N, 4)``, x1, y1, x2, y2 in pixels; ``labels`` int64 ``(N,)`` from 1; and with
            :attr:`masks`, ``masks`` uint8 ``(N, H, W)``.

        Raises:
            ValueError: as :meth:`objects`.
        """
        width, height = size = self.size(i)
        number = {key: place for place, key in enumerate(self.category_ids, 1)}
        objects = [each for each in self.objects(i) if learned(each, size)]
        boxes = [visible_box(each, size) for each in objects]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([number[each["category_id"]] for each in objects], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(decode(each["segmentation"], height, width)) for each in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        return target

    def check(self) -> None:
        """Check every annotation, and that every image file is there, complete, and of the size in the JSON file.

        Raises:
            ValueError: as :meth:`objects`, or some files are not such images; the message names the first one.
        """
        for i in range(len(self)):
            try:
                self.objects(i)
            except ValueError as error:
                raise ValueError(f"{error}: mend the file, or skip the image with --on-bad-image skip") from error

        def check_size(i: int) -> None:
            if image_header(os.path.join(self.folder, self.names[i]))[0] != self.sizes[i]:
                self.image(i)

        check_files(self.folder, self.names, lambda path: open_image(path), check_size)

    def with_objects(self) -> "tuple[CocoImages, list[str], int]":
        """The images that have objects to learn from, the names of the others, and the number of boxes without area.

        With :attr:`skip`, images with bad annotations stay: they are named when their turn comes.
        """
        kept, others, flat = [], [], 0
        for i in range(len(self)):
            try:
                objects = self.objects(i) if self.skip else json.loads(self.annotations[i])  # else check() was there
            except ValueError:
                kept.append(i)
                continue
            found = sum(learned(each, self.sizes[i]) for each in objects)
            flat += sum(not each.get("iscrowd") for each in objects) - found
            if found:
                kept.append(i)
            else:
                others.append(self.names[i])
        parts = ("names", "ids", "sizes", "annotations")
        selected: dict[str, Any] = {name: [getattr(self, name)[i] for i in kept] for name in parts}
        return replace(self, **selected, bad={}), others, flat

    def fingerprint(self) -> dict[str, list[Any]]:
        digest = hashlib.sha256(repr((self.names, self.category_ids, self.labels)).encode("utf-8", "surrogateescape"))
        for text in self.annotations:
            digest.update(text)
        return {"all": [len(self), digest.hexdigest()]}


def visible_box(annotation: dict[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the part of a checked box inside the image."""
    x, y, w, h = annotation["bbox"]
    return max(x, 0.0), max(y, 0.0), min(x + w, size[0]), min(y + h, size[1])


def learned(annotation: dict[str, Any], size: tuple[int, int]) -> bool:
    """Whether a detector learns from this object: it is no crowd, and its box has an area inside the image.

    The area must outlast the rounding of the coordinates to float32, in the target and once more in a resize.
    """
    x1, y1, x2, y2 = visible_box(annotation, size)
    least = max(size) * RESOLUTION
    return not annotation.get("iscrowd") and x2 - x1 > least and y2 - y1 > least


def read_json(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of a JSON file in COCO's format, with the fields that are needed.

    Raises:
        ValueError: it is something else; the message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON in COCO's format, got something else ({error})") from error
    for part, names in NEEDED.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{file}: expected JSON in COCO's format, got one without a list '{part}'")
        for number, row in enumerate(rows):
            if missing := [name for name in names if name not in row]:
                raise ValueError(f"{file}: {part}[{number}]: expected {', '.join(names)}, got no {', '.join(missing)}")
        if part == "annotations":
            continue
        # a detector's classes are in the order of these numbers
        types, kind = ((int, str), " or text") if part == "images" else ((int,), "")
        for number, row in enumerate(rows):
            if type(row["id"]) not in types:
                raise ValueError(
                    f"{file}: {part}[{number}]: expected a whole number{kind} as id, got {row['id']!r:.80}"
                )
            if part == "images" and not (isinstance(name := row["file_name"], str) and name and "\0" not in name):
                raise ValueError(f"{file}: images[{number}]: expected the name of a file, got {name!r:.80}")
        if twice := [key for key, n in Counter(row["id"] for row in rows).items() if n > 1]:
            raise ValueError(f"{file}: {part}: expected ids that differ, got {twice[0]} twice")
    if not content["categories"]:
        raise ValueError(f"{file}: expected categories, got none")
    return content


def load_coco_split(root: Path, part: str, masks: bool = False, skip: bool = False) -> CocoImages:
    """One part of a data set in COCO's format.

    The annotations are in ``root/PART.json`` or, as COCO has them, in ``root/annotations/instances_PART2017.json`` (any
    year or none). The images are in ``root/images/PART``, ``root/PART2017``, ``root/images`` or ``root``.

    Args:
        part: ``train``, ``val`` or another name.
        masks: read masks too.
        skip: skip bad images and annotations of missing images. Otherwise everything is checked here.

    Raises:
        FileNotFoundError: the folder, the file or the images are missing.
        ValueError: the file is damaged, or as :meth:`CocoImages.check`; the message names the file.
    """
    if masks:
        mask_library()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder with {part}.json or annotations/, got no folder")
    files = [root / f"{part}.json", *sorted(root.glob(f"annotations/instances_{part}*.json"))]
    files = [file for file in files if file.is_file()]
    if len(files) != 1:
        wanted = f"one of {part}.json and annotations/instances_{part}*.json"
        raise FileNotFoundError(f"{root}: expected {wanted}, got {listing([str(x) for x in files]) or 'none'}")
    (file,) = files
    content = read_json(file)
    rows = {row["id"]: row for row in content["images"]}
    if not rows:
        raise ValueError(f"{file}: expected images, got none")
    categories = {row["id"]: str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])}
    grouped: dict[Any, list[dict[str, Any]]] = {key: [] for key in rows}
    for annotation in content["annotations"]:
        place = f"{file}: annotation {annotation['id']!s:.80}"
        image = annotation["image_id"]
        if isinstance(image, int | float | str) and image in grouped:
            grouped[image].append(annotation)
        elif skip:
            print(f"skipped: {place} is of image {image!s:.80}, which the file does not list", file=sys.stderr)
        else:
            raise ValueError(
                f"{place}: expected the id of an image in the file, got {image!s:.80}: mend the file, or skip it with "
                "--on-bad-image skip"
            )
    names = [row["file_name"] for row in rows.values()]
    name = file.stem.removeprefix("instances_")
    folders = [root / "images" / name, root / name, root / "images", root]
    present = (place for place in folders if place.is_dir() and any((place / each).is_file() for each in names))
    folder = next(present, None)
    if folder is None:
        tried = ", ".join(map(str, folders))
        raise FileNotFoundError(f"{file}: expected images such as {names[0]} in one of {tried}, got none of them")
    images = CocoImages(
        os.fspath(file),
        os.fspath(folder),
        names,
        list(rows),
        [(row["width"], row["height"]) for row in rows.values()],
        [json.dumps(objects).encode() for objects in grouped.values()],
        tuple(categories),
        tuple(categories.values()),
        masks,
        skip,
    )
    if not skip:
        images.check()
    return images


def load_coco(root: Path, masks: bool = False, skip: bool = False) -> AnnotatedData:
    """The parts ``train`` and ``val`` in ``root``. Training images without objects to learn from are left out.

    Args, Raises: as :func:`load_coco_split`.

    Raises:
        ValueError: the parts have different categories, or no training image has an object.
    """
    train, test = (load_coco_split(root, part, masks, skip) for part in ("train", "val"))
    classes = [dict(zip(part.category_ids, part.labels, strict=True)) for part in (train, test)]
    if classes[0] != classes[1]:
        differing = [
            f"{key} {classes[0].get(key)}"
            for key in {**classes[0], **classes[1]}
            if classes[0].get(key) != classes[1].get(key)
        ]
        raise ValueError(f"{test.file}: expected the categories of {train.file}, got others: {listing(differing)}")
    learnable, others, flat = train.with_objects()
    if not len(learnable):
        raise ValueError(f"{train.file}: expected objects, got images without any")
    notes = [f"{len(others)} training images without objects left out ({listing(others)})"] if others else []
    if flat:
        notes.append(f"{flat} training boxes without area left out")
    return AnnotatedData(learnable, test, train.labels, tuple(notes), train.category_ids)
