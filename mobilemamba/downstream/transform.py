"""Images and targets into a batch, and detections back: torchvision's transform with the published arithmetic."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, _resize_image_and_masks

from .scripting import inherited

__all__ = ["Transform", "paste_masks"]


class Transform(GeneralizedRCNNTransform):
    """torchvision's GeneralizedRCNNTransform with three differences, all as published, and with checks of its input.

    Resized sides are rounded, not truncated. Boxes are scaled by the quotient of the sizes in the boxes' own precision.
    Masks are pasted by bilinear interpolation at the centres of the pixels (:func:`paste_masks`).

    Args:
        min_size, max_size, mean, std: as torchvision's.
        num_classes: classes with the background, for the check of the labels.
        masks: whether targets must have masks.
        options: torchvision's.
    """

    def __init__(
        self,
        min_size: Sequence[int],
        max_size: int,
        mean: list[float],
        std: list[float],
        *,
        num_classes: int,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(min_size, max_size, mean, std, **options)
        self.num_classes, self.masks = num_classes, masks

    _batch = inherited(GeneralizedRCNNTransform.forward, "_batch")

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        if not torch.jit.is_scripting():
            self.check_images(images)
            if targets is not None:
                self.check_targets(images, targets)
        return self._batch(images, targets)

    @torch.jit.unused
    def check_images(self, images: list[Tensor]) -> None:
        """Refuse images that the backbone cannot take.

        Raises:
            ValueError: the message, one line, names the image.
        """
        if len(images) == 0:
            raise ValueError("images: expected at least one image, got none")
        channels = len(self.image_mean)
        for i, image in enumerate(images):
            if image.dim() != 3 or image.size(0) != channels or image.numel() == 0 or not image.is_floating_point():
                raise ValueError(
                    f"images[{i}]: expected floating-point values (0..1) of shape ({channels}, height, width), "
                    f"got {image.dtype} of shape {tuple(image.shape)}"
                )

    @torch.jit.unused
    def check_targets(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Refuse targets that do not fit the images.

        Raises:
            ValueError: the message, one line, names the target and its entry.
        """
        if len(targets) != len(images):
            raise ValueError(f"targets: expected one for each of the {len(images)} images, got {len(targets)}")
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            height, width = image.shape[-2:]
            for name in ("boxes", "labels", "masks") if self.masks else ("boxes", "labels"):
                if not isinstance(target.get(name), Tensor):
                    raise ValueError(f"targets[{i}]: expected a tensor '{name}', got {type(target.get(name)).__name__}")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.dim() != 2 or boxes.size(1) != 4 or not boxes.is_floating_point():
                raise ValueError(
                    f"targets[{i}]['boxes']: expected floating-point values of shape (N, 4), "
                    f"got {boxes.dtype} of shape {tuple(boxes.shape)}"
                )
            flat = (~(boxes[:, 2:] > boxes[:, :2]).all(1) | ~boxes.isfinite().all(1)).nonzero()
            if len(flat):
                box = boxes[flat[0, 0]].tolist()
                raise ValueError(f"targets[{i}]['boxes']: expected x1 < x2 and y1 < y2, got {box} at {int(flat[0, 0])}")
            if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"targets[{i}]['labels']: expected int64 of shape ({len(boxes)},), one for each box, "
                    f"got {labels.dtype} of shape {tuple(labels.shape)}"
                )
            wrong = labels[(labels < 1) | (labels >= self.num_classes)]
            if len(wrong):
                raise ValueError(
                    f"targets[{i}]['labels']: expected 1 to {self.num_classes - 1} (0 is the background), "
                    f"got {int(wrong[0])}"
                )
            if self.masks and target["masks"].shape != (len(boxes), height, width):
                raise ValueError(
                    f"targets[{i}]['masks']: expected the shape {(len(boxes), height, width)}, one for each box and of "
                    f"the image's size, got {tuple(target['masks'].shape)}"
                )

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        if self.training and self._skip_resize:
            return image, target
        size: tuple[int, int] | None = self.fixed_size
        if size is None:
            shorter = float(self.torch_choice(self.min_size) if self.training else self.min_size[-1])
            scale = min(shorter / min(height, width), self.max_size / max(height, width))
            size = (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))
        image, target = _resize_image_and_masks(image, 0, 0, target, size)
        if target is not None:
            target["boxes"] = scale_boxes(target["boxes"], (height, width), (size[1], size[0]))
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        if self.training:
            return result
        for found, size, original in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = scale_boxes(found["boxes"], size, original)
            if "masks" in found:
                found["masks"] = paste_masks(found["masks"], found["boxes"], original)
        return result


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Boxes ``(N, 4)`` of an image of size ``old`` (height, width) after resizing to ``new``."""
    y, x = new[0] / old[0], new[1] / old[1]
    return boxes * torch.tensor([x, y, x, y], dtype=boxes.dtype, device=boxes.device)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes in the whole image: bilinear interpolation at the pixels' centres, 0 outside the box.

    Args:
        masks: probabilities ``(N, 1, h, w)``.
        boxes: ``(N, 4)``, x1, y1, x2, y2 in pixels.
        size: height and width of the image.

    Returns:
        Probabilities ``(N, 1, height, width)`` of at least 32 bits; the published mask is where they are at least 0.5.
    """
    height, width = size
    # 16 bits cannot tell neighbouring pixels apart: bfloat16 has no integers above 256 that are odd.
    masks = masks.to(torch.float64 if masks.dtype == torch.float64 else torch.float32)
    pasted = masks.new_zeros((masks.size(0), 1, height, width))
    corners: list[list[float]] = boxes.double().tolist()
    for i, (x1, y1, x2, y2) in enumerate(corners):
        # Pixels further away than one from the box are below 0.5 in any mask.
        left, right = max(0, math.floor(x1) - 1), min(width, math.ceil(x2) + 1)
        top, bottom = max(0, math.floor(y1) - 1), min(height, math.ceil(y2) + 1)
        x = torch.arange(left, right, dtype=masks.dtype, device=masks.device) + 0.5
        y = torch.arange(top, bottom, dtype=masks.dtype, device=masks.device) + 0.5
        x = (x - x1) / max(x2 - x1, 1e-6) * 2 - 1
        y = (y - y1) / max(y2 - y1, 1e-6) * 2 - 1
        y, x = torch.meshgrid(y, x, indexing="ij")
        part = grid_sample(masks[i : i + 1], torch.stack((x, y), dim=2)[None], align_corners=False)
        pasted[i, :, top:bottom, left:right] = part[0]
    return pasted
