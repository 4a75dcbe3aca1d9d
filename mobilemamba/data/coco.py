"""Images with objects: annotations in COCO's JSON format, and a folder of images for each part."""

import hashlib
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .folder import check_files, listing
from .preprocessing import open_image, to_mode
from .splits import AnnotatedData

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CocoImages", "load_coco", "load_coco_split", "mask_library", "run_lengths"]

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}

#: Pixels by which a box may leave its image. COCO's own boxes do so by rounding.
TOLERANCE = 1.0


@dataclass(frozen=True)
class CocoImages:
    """Images and their objects, read on demand.

    Args:
        file: the JSON file.
        folder: the folder of the images.
        names: path of each image below ``folder``.
        ids: COCO's number of each image.
        sizes: width and height of each image.
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
        path = os.path.join(self.folder, self.names[i])
        image = open_image(path)
        if image.size != self.sizes[i]:
            (width, height), found = self.sizes[i], f"{image.width} x {image.height}"
            raise ValueError(f"{path}: expected {width} x {height} pixels, as {self.file} says, got {found}")
        try:
            return to_mode(image, "RGB")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def objects(self, i: int) -> list[dict[str, Any]]:
        """COCO's annotations of image ``i``, checked.

        Raises:
            ValueError: a box is outside the image, or a mask has another size; the message names the file.
        """
        objects: list[dict[str, Any]] = json.loads(self.annotations[i])
        for annotation in objects:
            if problem := self.problem(annotation, self.sizes[i]):
                raise ValueError(f"{self.file}: annotation {annotation['id']} of {self.names[i]}: {problem}")
        return objects

    def problem(self, annotation: dict[str, Any], size: tuple[int, int]) -> str:
        """What is wrong with an annotation of an image of ``size``; empty if nothing is."""
        width, height = size
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)):
            return f"expected a box of four numbers, got {box!r:.80}"
        x, y, w, h = box
        inside = x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE
        if not (inside and w >= 0 and h >= 0):
            return f"expected a box x, y, width, height inside the {width} x {height} pixels of the image, got {box}"
        if not self.masks:
            return ""
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, dict):
            if segmentation.get("size") != [height, width]:
                return f"expected a mask of {height} x {width} (height, width), got {segmentation.get('size')}"
            counts = segmentation.get("counts")
            if isinstance(counts, list) and sum(counts) != height * width:
                return f"expected run lengths of {height * width} pixels, got {sum(counts)}"
            return "" if isinstance(counts, list | str) else f"expected run lengths, got {counts!r:.80}"
        polygons = isinstance(segmentation, list) and segmentation
        if not polygons or not all(isinstance(part, list) and len(part) >= 6 for part in polygons):
            return f"expected a mask (polygons of three corners or more, or run lengths), got {segmentation!r:.80}"
        return ""

    def target(self, i: int) -> dict[str, Tensor]:
        """The objects of image ``i`` that a detector learns from: all but crowds and boxes without area.

        Returns:
            ``boxes`` float32 ``(N, 4)``, x1, y1, x2, y2 in pixels; ``labels`` int64 ``(N,)`` from 1; and with
            :attr:`masks`, ``masks`` uint8 ``(N, H, W)``.

        Raises:
            ValueError: as :meth:`objects`.
        """
        width, height = self.sizes[i]
        number = {key: place for place, key in enumerate(self.category_ids, 1)}
        objects, boxes = [], []
        for each in self.objects(i):
            x, y, w, h = each["bbox"]
            box = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
            if not each.get("iscrowd") and box[0] < box[2] and box[1] < box[3]:
                objects.append(each)
                boxes.append(box)
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([number[each["category_id"]] for each in objects], dtype=torch.int64),
        }
        if self.masks:
            masks = [torch.from_numpy(decode(each["segmentation"], height, width)) for each in objects]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
        return target

    def check(self) -> None:
        """Check every annotation, and that every image file is there and complete.

        Raises:
            ValueError: as :meth:`objects`, or some files are not complete images; the message names the first one.
        """
        for i in range(len(self)):
            self.objects(i)
        check_files(self.folder, self.names, lambda path: open_image(path))

    def with_objects(self) -> "tuple[CocoImages, list[str]]":
        """The images that have objects to learn from, and the names of the others."""
        kept, others = [], []
        for i, text in enumerate(self.annotations):
            if any(map(learned, json.loads(text))):
                kept.append(i)
            else:
                others.append(self.names[i])
        parts = ("names", "ids", "sizes", "annotations")
        selected: dict[str, Any] = {name: [getattr(self, name)[i] for i in kept] for name in parts}
        return replace(self, **selected, bad={}), others

    def fingerprint(self) -> dict[str, list[Any]]:
        digest = hashlib.sha256(repr((self.names, self.category_ids, self.labels)).encode("utf-8", "surrogateescape"))
        for text in self.annotations:
            digest.update(text)
        return {"all": [len(self), digest.hexdigest()]}


def learned(annotation: dict[str, Any]) -> bool:
    """Whether a detector learns from this object: it is no crowd, and its box has an area."""
    return not annotation.get("iscrowd") and annotation["bbox"][2] > 0 and annotation["bbox"][3] > 0


def mask_library() -> Any:
    """The module ``pycocotools.mask``.

    Raises:
        ImportError: pycocotools is missing.
    """
    try:
        import pycocotools.mask
    except ImportError as error:
        raise ImportError("masks and COCO AP need pycocotools: pip install 'mobilemamba[downstream]'") from error
    return pycocotools.mask


def run_lengths(mask: "np.ndarray[Any, np.dtype[np.bool_]]") -> dict[str, list[int]]:
    """A mask, bool ``(H, W)``, in COCO's uncompressed form: lengths of runs of 0 and 1 in turn, down the columns.

    The first length is that of a run of 0, and is 0 if the mask begins with 1.
    """
    line = mask.T.ravel()
    bounds = np.flatnonzero(line[1:] != line[:-1]) + 1
    counts: list[int] = np.diff(bounds, prepend=0, append=line.size).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if line[0] else counts}


def decode(segmentation: Any, height: int, width: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The mask uint8 ``(height, width)`` of polygons, or of run lengths as a list or as COCO's text."""
    library = mask_library()
    if isinstance(segmentation, list):
        return library.decode(library.merge(library.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        segmentation = library.frPyObjects(segmentation, height, width)
    return library.decode(segmentation)


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
        if part != "annotations" and (twice := [key for key, n in Counter(row["id"] for row in rows).items() if n > 1]):
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
        place = f"{file}: annotation {annotation['id']}"
        if annotation["category_id"] not in categories:
            known = listing([str(key) for key in categories])
            raise ValueError(f"{place}: expected one of the categories {known}, got {annotation['category_id']}")
        if annotation["image_id"] in grouped:
            grouped[annotation["image_id"]].append(annotation)
        elif skip:
            print(
                f"skipped: {place} is of image {annotation['image_id']}, which the file does not list", file=sys.stderr
            )
        else:
            raise ValueError(
                f"{place}: expected the id of an image in the file, got {annotation['image_id']}: mend the file, or "
                "skip it with --on-bad-image skip"
            )
    first = str(next(iter(rows.values()))["file_name"])
    name = file.stem.removeprefix("instances_")
    folders = [root / "images" / name, root / name, root / "images", root]
    folder = next((folder for folder in folders if (folder / first).exists()), None)
    if folder is None:
        tried = ", ".join(map(str, folders))
        raise FileNotFoundError(f"{file}: no image {first} in {tried}")
    images = CocoImages(
        os.fspath(file),
        os.fspath(folder),
        [str(row["file_name"]) for row in rows.values()],
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
    learnable, others = train.with_objects()
    if not len(learnable):
        raise ValueError(f"{train.file}: expected objects, got images without any")
    notes = [f"{len(others)} training images without objects left out ({listing(others)})"] if others else []
    flat = sum(not each.get("iscrowd") and not learned(each) for text in train.annotations for each in json.loads(text))
    if flat:
        notes.append(f"{flat} training boxes without area left out")
    return AnnotatedData(learnable, test, train.labels, tuple(notes), train.category_ids)
