"""``mobilemamba detect``: finds objects in images, and draws their boxes and masks into copies."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import open_image
from ..data.masks import run_lengths
from ..data.preprocessing import to_mode, to_tensor
from ..downstream.checkpoint import DownstreamCheckpoint
from .drawing import Drawings, class_color, open_model
from .images import ImageReader, add_images_argument
from .options import Parser, add_device_option, checked_device, number
from .results import print_json, print_tables

HELP = (
    "Find objects in images with a trained detector. "
    "The exit code is 1 if some images cannot be read or give outputs that are not finite."
)


def add_options(parser: Parser) -> None:
    add_images_argument(parser)
    parser.add_argument("--model", "--checkpoint", type=Path, required=True, metavar="PATH", help="trained detector")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="draw boxes and masks into copies, IMAGE.detect.png")
    parser.add_argument("--threshold", type=number, default=0.5, metavar="P", help="least score (default: 0.5)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold: expected a score from 0 to 1, got {args.threshold}")
    device = checked_device(args.device)
    detector, stored = open_model(args.model, "detect")
    detector.to(device)
    keep_scores_above(args.threshold, detector)
    drawings = Drawings(args.out, ".detect.png") if args.out else None
    reader = ImageReader("detect", lambda path: to_mode(open_image(path), "RGB"))

    def results() -> Iterator[dict[str, Any]]:
        for ((path, image),) in reader.chunks(args.images, 1):
            try:
                with torch.inference_mode():
                    (found,) = detector([stored.preparation(image).to(device)])
            except FloatingPointError as error:
                reader.refuse(f"{path}: {error}")
                continue
            found = {name: values.cpu() for name, values in found.items()}
            found = {name: values[found["scores"] >= args.threshold] for name, values in found.items()}
            detections = describe(found, stored)
            result: dict[str, Any] = {"image": path, "detections": detections}
            if drawings:
                result["drawing"] = drawings.save(path, draw(to_tensor(image), found, detections))
            yield result

    print_json(results()) if args.json else print_tables(results(), table)
    return int(reader.failed)


def keep_scores_above(threshold: float, detector: nn.Module) -> None:
    """Raise the detector's own threshold: Mask R-CNN pastes each mask into a whole image, 48 MB for 12 megapixels."""
    chooser: Any = getattr(detector, "roi_heads", detector)
    below = threshold - 1e-6  # the detector keeps scores above its threshold; the command keeps equal ones too
    chooser.score_thresh = max(chooser.score_thresh, below)


def describe(found: dict[str, Tensor], stored: DownstreamCheckpoint) -> list[dict[str, Any]]:
    """For each object its class, score, box in pixels and, where the model has them, mask as COCO's run lengths."""
    detections = []
    for i, label in enumerate(found["labels"].tolist()):
        box = [round(value, 2) for value in found["boxes"][i].tolist()]
        score = round(float(found["scores"][i]), 4)
        name = stored.labels[label - 1] if stored.labels else f"class {label}"  # class 0 is the background
        detection = {"class": label, "label": name, "score": score, "box": box}
        if stored.category_ids:
            detection["category_id"] = stored.category_ids[label - 1]
        if "masks" in found:
            detection["mask"] = run_lengths((found["masks"][i, 0] >= 0.5).numpy())
        detections.append(detection)
    return detections


def draw(pixels: Tensor, found: dict[str, Tensor], detections: list[dict[str, Any]]) -> Tensor:
    """The image ``(3, H, W)``, uint8, with the objects drawn into it."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    if not detections:
        return pixels
    colors = [class_color(detection["class"]) for detection in detections]
    if "masks" in found:
        pixels = draw_segmentation_masks(pixels, found["masks"][:, 0] >= 0.5, alpha=0.5, colors=colors)
    texts = [f"{detection['label']} {detection['score']:.0%}" for detection in detections]
    width = max(1, max(pixels.shape) // 400)
    return draw_bounding_boxes(pixels, found["boxes"], texts, colors=colors, width=width)


def table(result: dict[str, Any]) -> str:
    """The image's path, then a line for each object: its class, score, and box."""
    lines = [result["image"] + (f" -> {result['drawing']}" if "drawing" in result else "")]
    width = max((len(detection["label"]) for detection in result["detections"]), default=0)
    for detection in result["detections"]:
        box = " ".join(f"{value:7.1f}" for value in detection["box"])
        lines.append(f"  {detection['label']:<{width}}  {detection['score']:6.1%}  {box}")
    return "\n".join(lines if result["detections"] else [*lines, "  nothing found"])
