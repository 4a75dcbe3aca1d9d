"""Draws a data set for detectors and segmenters: coloured shapes on textured backgrounds, from a seed.

``python -m mobilemamba.data.shapes DIR`` writes what ``coco:DIR`` and ``masks:DIR`` read: ``train.json`` and
``val.json`` in COCO's format, ``images/train`` and ``images/val`` (JPEG), ``masks/train`` and ``masks/val`` (PNG with
the class of each pixel, 0 for the background), and ``classes.txt`` with the names of these classes.

A circle, a square, a triangle or a star has a random colour, size and rotation. A shape may hide at most half of
another one. Boxes, areas and masks are those of the visible part.
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .masks import run_lengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CATEGORIES", "draw", "write"]

#: COCO's id and the name of each class. The ids have gaps, as COCO's own do.
CATEGORIES = {1: "circle", 3: "square", 4: "triangle", 7: "star"}

SMOOTH = 4  # shapes are drawn at this multiple of the size and reduced, which smooths their edges
MOST_HIDDEN = 0.5  # share of a shape that later ones may hide


def draw(size: int, seed: tuple[int, ...]) -> "tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]":
    """One drawing.

    Args:
        size: height and width in pixels, at least 32.
        seed: whole numbers that determine the drawing.

    Returns:
        The picture, uint8 ``(size, size, 3)``; and for each shape its class (index in :data:`CATEGORIES`) and the mask
        of its visible part, bool ``(size, size)``.

    Raises:
        ValueError: ``size`` is below 32.
    """
    if size < 32:
        raise ValueError(f"size: expected at least 32 pixels, got {size}")
    random = np.random.default_rng(seed)
    picture = background(size, random)
    shapes: list[tuple[int, Any, int]] = []  # class, visible part, its area before others hid some of it
    for _ in range(random.integers(1, 6)):
        kind = int(random.integers(len(CATEGORIES)))
        for _ in range(20):  # places to try
            cover = coverage(outline(kind, size, random), size)
            mask = cover >= 0.5
            left = [int((visible & ~mask).sum()) for _, visible, _ in shapes]
            if all(now >= (1 - MOST_HIDDEN) * whole for now, (_, _, whole) in zip(left, shapes, strict=True)):
                break
        else:
            continue
        colour = random.uniform(0, 255, 3)
        while np.abs(colour - picture[mask].mean(0)).max() < 60:  # else it would be lost in the background
            colour = random.uniform(0, 255, 3)
        shading = colour + 12 * smooth_noise(size, 8, random)[..., None]
        picture = picture + cover[..., None] * (shading - picture)
        shapes = [(other, visible & ~mask, whole) for other, visible, whole in shapes]
        shapes.append((kind, mask, int(mask.sum())))
    picture = picture + random.normal(0, random.uniform(0, 6), picture.shape)
    return picture.round().clip(0, 255).astype(np.uint8), [(kind, visible) for kind, visible, _ in shapes]


def background(size: int, random: np.random.Generator) -> "NDArray[np.float64]":
    """Two colours mixed by noise or stripes of several scales: float64 ``(size, size, 3)`` from 0 to 255."""
    first, second = random.uniform(20, 235, 3), random.uniform(20, 235, 3)
    share = sum(smooth_noise(size, cells, random) / 2**i for i, cells in enumerate((3, 8, 24)))
    if random.random() < 0.4:
        angle, period = random.uniform(0, math.pi), random.uniform(size / 24, size / 6)
        y, x = np.mgrid[:size, :size]
        share = share / 2 + np.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
    share = 0.5 + random.uniform(0.1, 0.5) * share
    return (first + (second - first) * np.clip(share, 0, 1)[..., None]).clip(0, 255)


def smooth_noise(size: int, cells: int, random: np.random.Generator) -> "NDArray[np.float64]":
    """Noise with about ``cells`` hills along each side: float64 ``(size, size)`` of standard deviation about 1."""
    from PIL import Image

    coarse = Image.fromarray(random.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def outline(kind: int, size: int, random: np.random.Generator) -> "NDArray[np.float64]":
    """The corners of a shape with a random size, place and rotation: float64 ``(N, 2)``, x and y in pixels."""
    radius = random.uniform(0.1, 0.25) * size
    angle = random.uniform(0, 2 * math.pi)
    centre = random.uniform(0.8 * radius, size - 0.8 * radius, 2)
    corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[list(CATEGORIES.values())[kind]]
    angles = angle + np.arange(corners) * 2 * math.pi / corners
    # an inner radius of 0.45 makes a star's arms a little thicker than those of a pentagram (0.38)
    radii = radius * np.where(np.arange(corners) % 2, 0.45 if corners == 10 else 1.0, 1.0)
    return centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def coverage(corners: "NDArray[np.float64]", size: int) -> "NDArray[np.float64]":
    """The share of each pixel that a polygon covers: float64 ``(size, size)``."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (size * SMOOTH, size * SMOOTH))
    ImageDraw.Draw(canvas).polygon([(x * SMOOTH, y * SMOOTH) for x, y in corners], fill=1)
    return np.asarray(canvas, dtype=np.float64).reshape(size, SMOOTH, size, SMOOTH).mean((1, 3))


def write(folder: Path, images: int = 2000, val_images: int = 500, size: int = 128, seed: int = 0) -> None:
    """Write a data set of drawings into ``folder``, which must be empty or missing.

    Args:
        images, val_images: number of drawings for training and for validation.
        size: height and width in pixels.
        seed: another one gives other drawings.

    Raises:
        FileExistsError: ``folder`` has files.
        ValueError: a number is out of its range.
    """
    from PIL import Image

    if min(images, val_images) < 1:
        raise ValueError(f"images: expected at least 1 drawing in each part, got {images} and {val_images}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected an empty folder or none, got one with files")
    counts: list[tuple[str, int]] = [("train", images), ("val", val_images)]
    for part, (name, count) in enumerate(counts):
        for kind in ("images", "masks"):
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
        content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": key, "name": value} for key, value in CATEGORIES.items()]
        for i in range(count):
            picture, shapes = draw(size, (seed, part, i))
            stem = f"{i:06d}"
            Image.fromarray(picture).save(folder / "images" / name / f"{stem}.jpg", quality=92)
            classes = np.zeros((size, size), dtype=np.uint8)
            content["images"].append({"id": i + 1, "file_name": f"{stem}.jpg", "height": size, "width": size})
            for number, visible in shapes:
                classes[visible] = number + 1
                rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
                left, top = int(columns[0]), int(rows[0])
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": i + 1,
                        "category_id": list(CATEGORIES)[number],
                        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                        "area": int(visible.sum()),
                        "iscrowd": 0,
                        "segmentation": run_lengths(visible),
                    }
                )
            Image.fromarray(classes).save(folder / "masks" / name / f"{stem}.png")
        (folder / f"{name}.json").write_text(json.dumps(content))
    names = ["background", *CATEGORIES.values()]
    (folder / "classes.txt").write_text("".join(f"{label}\n" for label in names))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mobilemamba.data.shapes", description="Draw a data set of shapes.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; empty or missing")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="for training (default: 2000)")
    parser.add_argument("--val-images", type=int, default=500, metavar="N", help="for validation (default: 500)")
    parser.add_argument("--size", type=int, default=128, metavar="N", help="height and width (default: 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the drawings (default: 0)")
    return parser


def main() -> None:
    parser = make_parser()
    args = vars(parser.parse_args())
    try:
        write(**args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
