"""Masks of objects as COCO stores them: polygons, run lengths, and run lengths as text."""

from typing import Any

import numpy as np

__all__ = ["decode", "is_number", "mask_library", "mask_problem", "run_lengths", "text_counts"]


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number; ``true`` and ``false`` are none."""
    return type(value) in (int, float)


def mask_problem(segmentation: object, height: int, width: int) -> str:
    """What is wrong with polygons or run lengths, as COCO has them; empty if nothing is."""
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width] or not all(type(side) is int for side in size):
            return f"expected a mask of {height} x {width} (height, width), got {size!r:.80}"
        lengths = text_counts(counts) if isinstance(counts, str) else counts
        if not isinstance(lengths, list) or not all(type(length) is int and length >= 0 for length in lengths):
            return f"expected run lengths, got {counts!r:.80}"
        if sum(lengths) != height * width:
            return f"expected run lengths of {height * width} pixels, got {sum(lengths)}"
        return ""
    if not isinstance(segmentation, list) or not segmentation:
        return f"expected a mask (polygons or run lengths), got {segmentation!r:.80}"
    for part in segmentation:
        if not isinstance(part, list) or len(part) < 6 or len(part) % 2 or not all(map(is_number, part)):
            return f"expected polygons of three corners or more, x and y of each, got {part!r:.80}"
        for values, side in ((part[::2], width), (part[1::2], height)):
            if not all(-side <= value <= 2 * side for value in values):  # not so with NaN either
                return f"expected polygons near the {width} x {height} pixels of the image, got {part!r:.80}"
    return ""


def text_counts(text: str) -> list[int] | None:
    """The run lengths in COCO's text form, or None if it is none.

    A character has five bits of a number, lowest first, and a sixth that says whether more follow. The numbers are
    signed. From the fourth on they are differences to the length two runs before.
    """
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord("0")
    if not data.size or data.min() < 0 or data.max() > 63 or data[-1] & 32:
        return None
    ends = np.flatnonzero(data & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    characters = ends - starts + 1
    if characters.max() > 7:  # more than 32 bits
        return None
    shifts = 5 * (np.arange(data.size) - np.repeat(starts, characters))
    values = np.add.reduceat((data & 31) << shifts, starts) - np.where(data[ends] & 16, 1 << 5 * characters, 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values.tolist()


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
