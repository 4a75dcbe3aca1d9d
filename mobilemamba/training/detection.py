"""The average precision of a detector on images with objects, as COCO defines it, by pycocotools."""

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.coco import CocoImages
from ..data.joint import as_tensors
from ..data.loading import evaluation_batches
from ..data.masks import mask_library
from ..downstream.finite import refuse_infinite
from .log import progress as progress_line
from .processes import ALONE, Processes

__all__ = ["DetectionResult", "evaluate_detector"]


@dataclass(frozen=True)
class DetectionResult:
    """The average precision (AP) of a detector, from 0 to 1.

    Args:
        measures: ``AP`` (mean over classes and over the IoU thresholds 0.5, 0.55 ... 0.95), ``AP50`` and ``AP75`` (at
            one threshold) of the boxes; of a detector of masks also ``mask_AP``, ``mask_AP50`` and ``mask_AP75``.
        classes: for each class its ``label`` and the same measures; None where no image has the class.
        count: images that count.
        bad: images that could not be read and do not count.
        seconds: from the first image read to the last one detected, in this process.
    """

    measures: dict[str, float]
    classes: list[dict[str, Any]]
    count: int
    bad: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.count / self.seconds


@torch.inference_mode()
def evaluate_detector(
    model: nn.Module,
    split: CocoImages,
    batch_size: int = 8,
    *,
    workers: int = 0,
    processes: Processes = ALONE,
    precision: str = "float32",
    progress: Callable[[int, int, float], str] | None = None,
) -> DetectionResult:
    """The average precision of ``model.fuse()`` on ``split``. Bad images that are skipped do not count.

    Crowds are COCO's: detections in them count neither as right nor as wrong. At most 100 detections in an image count.

    Args:
        model: a detector of :mod:`mobilemamba.downstream`, on any device. If ``split.masks`` is set, its masks count
            too.
        batch_size: images per forward pass in this process.
        workers: processes that decode; 0 decodes here.
        processes: those that evaluate together, each a share of the images.
        precision: type of the activations: float32, or bfloat16 or float16 (autocast).
        progress: as for :func:`evaluate`.

    Raises:
        FloatingPointError: an output of the model is not finite.
        ImportError: pycocotools is missing.
        ValueError: an image or its annotations are bad and bad images are not skipped; no image can be read;
            ``split.masks`` is set and the model finds no masks; or the model has more classes than ``split``.
    """
    library = mask_library()
    device, fused = next(model.parameters()).device, refuse_infinite(model.fuse())  # type: ignore[operator]
    start = time.perf_counter()
    batches = evaluation_batches(
        split, as_tensors, batch_size=batch_size, share=processes.share, workers=workers, pin=device.type == "cuda"
    )
    if progress is not None:
        batches = progress_line(batches, progress, math.ceil(len(split) / processes.count / batch_size))
    seen: list[int] = []
    found: list[dict[str, Any]] = []
    for images, targets in batches:
        pixels = [image.to(device, non_blocking=True).float().div_(255) for image in images]
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            results = fused(pixels)
        for target, result in zip(targets, results, strict=True):
            i = int(target["index"])
            seen.append(i)
            found += detections(split, i, result, library)
    seconds = time.perf_counter() - start
    everything = processes.gather((seen, found))
    seen = sorted(i for part, _ in everything for i in part)
    if not seen:
        raise ValueError(f"{split.file}: expected test images, got none that can be read")
    rows = [row for _, part in everything for row in part]
    measures: dict[str, float] = {}
    classes: list[dict[str, Any]] = [{"label": label} for label in split.labels]
    for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + split.masks]:
        for name, values in average_precision(split, seen, rows, kind).items():
            present = [value for value in values if value is not None]
            measures[prefix + name] = sum(present) / len(present) if present else 0.0
            for row, value in zip(classes, values, strict=True):
                row[prefix + name] = value
    return DetectionResult(measures, classes, len(seen), len(split) - len(seen), seconds)


def detections(split: CocoImages, i: int, result: dict[str, Tensor], library: Any) -> list[dict[str, Any]]:
    """What a detector found in image ``i``, in COCO's format of results."""
    if split.masks and "masks" not in result:
        raise ValueError(f"{split.file}: expected a detector of masks for a split with masks, got one of boxes")
    if (highest := max(result["labels"].tolist(), default=0)) > len(split.labels):
        raise ValueError(f"{split.file}: expected a detector of its {len(split.labels)} classes, got label {highest}")
    boxes = result["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    rows: list[dict[str, Any]] = [
        {"image_id": split.ids[i], "category_id": split.category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), result["labels"].tolist(), result["scores"].float().tolist(), strict=True
        )
    ]
    if split.masks:
        masks = (result["masks"][:, 0] >= 0.5).cpu().numpy().astype(np.uint8)
        for row, mask in zip(rows, masks, strict=True):
            row["segmentation"] = library.encode(np.asfortranarray(mask))
    return rows


def average_precision(
    split: CocoImages, seen: list[int], rows: list[dict[str, Any]], kind: str
) -> dict[str, list[float | None]]:
    """AP, AP50 and AP75 of each class, by pycocotools. None for a class that no image has.

    Args:
        seen: indices of the images that count.
        rows: detections in COCO's format of results.
        kind: ``"bbox"`` or ``"segm"``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    annotations = [dict(each) for i in seen for each in json.loads(split.annotations[i])]
    for number, each in enumerate(annotations, 1):
        each["id"] = number  # COCOeval takes the id 0 for "no match"
        each.setdefault("iscrowd", 0)
        each.setdefault("area", each["bbox"][2] * each["bbox"][3])
    truth.dataset = {
        "images": [{"id": split.ids[i], "width": split.sizes[i][0], "height": split.sizes[i][1]} for i in seen],
        "annotations": annotations,
        "categories": [{"id": key, "name": name} for key, name in zip(split.category_ids, split.labels, strict=True)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it does, in several lines
        truth.createIndex()
        if not rows:
            present = {each["category_id"] for each in annotations if not each["iscrowd"]}
            zeros: list[float | None] = [0.0 if key in present else None for key in split.category_ids]
            return {"AP": zeros, "AP50": zeros, "AP75": zeros}
        unused = "segmentation" if kind == "bbox" else "bbox"  # loadRes looks at one of the two
        results = truth.loadRes([{key: value for key, value in row.items() if key != unused} for row in rows])
        evaluation = COCOeval(truth, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (threshold, recall, class), all sizes, 100 detections
    thresholds = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    return {
        name: [
            None if (part := precision[where, :, k])[part > -1].size == 0 else float(part[part > -1].mean())
            for k in range(len(split.category_ids))
        ]
        for name, where in thresholds.items()
    }
