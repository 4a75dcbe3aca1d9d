"""Detection and segmentation as tasks of a run."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import downstream
from ..data import IMAGENET_MEAN, IMAGENET_STD, AnnotatedData
from ..data.joint import DetectionTransform, SegmentationTransform
from ..downstream.checkpoint import DownstreamCheckpoint, Preparation, read_checkpoint, save_model
from ..weights import entry, load
from ..weights.loading import adapt_channels
from .config import TrainConfig
from .detection import evaluate_detector
from .processes import Processes
from .segmentation import evaluate_segmenter
from .tasks import Part, Task

__all__ = ["Detection", "Segmentation"]


class Downstream(Task):
    """What detection and segmentation have in common. Arguments: :class:`Task`."""

    def __init__(self, config: TrainConfig, dataset: AnnotatedData, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        assert config.kind is not None  # TrainConfig fills it in
        self.kind: str = config.kind
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD

    def create(self, resume: bool) -> nn.Module:
        pretrained = None if resume else self.config.pretrained
        if pretrained:
            self.mean, self.std = normalisation(pretrained, self.config.model)
        source: bool | str = {"plain": True, None: False}.get(pretrained, pretrained)  # type: ignore[assignment]
        args = (self.kind, self.config.model, self.num_classes)
        try:
            return downstream.create_model(*args, pretrained_backbone=source, **self.options())
        except TypeError as error:
            given = self.config.arguments
            unknown = re.search(r"(?:unexpected keyword argument '|expected no )(\w+)", str(error))
            if unknown is None or unknown[1] not in {**given, **given.get("backbone_options", {})}:
                raise
            raise ValueError(f"model_options: {self.config.model_options}: {error}") from error

    @property
    def num_classes(self) -> int:
        return len(self.dataset.labels)

    def options(self) -> dict[str, Any]:
        """The arguments of the model's function."""
        config, given = self.config, self.config.arguments
        backbone = {"in_chans": 3, **config.backbone_options, **given.pop("backbone_options", {})}
        norm_eval = config.norm_eval
        if norm_eval is None:
            norm_eval = bool(config.pretrained) and self.kind in ("mask_rcnn", "retinanet")
        backbone |= {"norm_eval": norm_eval, "frozen_stages": config.frozen_stages}
        return {"backbone_options": backbone, **given}

    def checkpoint(self, tensors: dict[str, Tensor]) -> DownstreamCheckpoint:
        options = self.options()
        backbone = {name: value for name, value in options["backbone_options"].items() if name != "drop_path_rate"}
        return DownstreamCheckpoint(
            tensors,
            self.kind,
            self.config.model,
            self.num_classes,
            {**options, "backbone_options": backbone},
            list(self.dataset.labels),
            list(self.dataset.category_ids) or None,
            self.preparation,
        )

    @property
    def preparation(self) -> Preparation:
        return Preparation()

    def meta(self) -> dict[str, Any]:
        return self.checkpoint({}).meta()

    def save(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        save_model(path, self.checkpoint(tensors))
        return read_checkpoint(path).state_dict

    @property
    def scale(self) -> tuple[float, float] | None:
        return None if self.config.scale is None else (self.config.scale[0], self.config.scale[1])


class Detection(Downstream):
    """Boxes, and masks with Mask R-CNN, of the objects in an image. Arguments: :class:`Task`."""

    heads = ("rpn", "roi_heads", "head")  # mmdetection's rpn_head, roi_head, bbox_head

    def __init__(self, config: TrainConfig, dataset: AnnotatedData, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        self.least_images = 2 if self.kind == "ssdlite" else 1  # its last maps have one pixel

    @property
    def num_classes(self) -> int:
        return len(self.dataset.labels) + 1  # and the background

    def options(self) -> dict[str, Any]:
        side = self.config.image_size
        assert side is not None
        # the published limit of the long side is 1333 for 800
        size = {"size": side} if self.kind == "ssdlite" else {"min_size": side, "max_size": round(side * 1333 / 800)}
        return {**size, "image_mean": self.mean, "image_std": self.std, **super().options()}

    def restore(self, model: nn.Module, meta: dict[str, Any]) -> None:
        self.mean, self.std = (tuple(meta["options"][name]) for name in ("image_mean", "image_std"))
        transform: Any = model.transform
        transform.image_mean, transform.image_std = list(self.mean), list(self.std)

    def prepare(self) -> None:
        config = self.config
        self.transform = DetectionTransform(
            config.flip, config.photometric, config.iou_crop, self.scale, config.image_size
        )

    def parts(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Part]:
        """Args: images uint8 ``(3, H, W)``; targets of :class:`CocoImages`."""
        pixels = [image.to(self.device, non_blocking=True).float().div_(255) for image in images]
        known = [
            {name: value.to(self.device, non_blocking=True) for name, value in target.items() if name != "index"}
            for target in targets
        ]
        size = len(images) // self.config.accumulate
        return [(pixels[i : i + size], known[i : i + size]) for i in range(0, len(images), size)]

    def loss(self, network: nn.Module, *part: Any) -> Tensor:
        """Args: images ``(3, H, W)`` from 0 to 1; targets."""
        with self.autocast():
            losses = network(*part)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def evaluate(self, model: nn.Module, batch_size: int, workers: int, processes: Processes) -> dict[str, float]:
        test = self.dataset.test
        return evaluate_detector(model, test, batch_size, workers=workers, processes=processes).measures


class Segmentation(Downstream):
    """A class for each pixel. Arguments: :class:`Task`."""

    heads = ("classifier", "aux_classifier")  # mmsegmentation's decode_head, auxiliary_head

    def __init__(self, config: TrainConfig, dataset: AnnotatedData, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        # these have a BatchNorm behind a mean over the image
        self.least_images = 2 if self.kind in ("deeplabv3", "pspnet") else 1

    def restore(self, model: nn.Module, meta: dict[str, Any]) -> None:
        self.mean, self.std = (tuple(meta["preprocessing"][name]) for name in ("mean", "std"))

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.config.image_size, self.mean, self.std)

    def prepare(self) -> None:
        config, scale = self.config, self.scale or (1.0, 1.0)
        assert config.image_size is not None
        self.transform = SegmentationTransform(config.image_size, scale, config.flip, config.photometric)

    def parts(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Part]:
        """Args: images uint8 ``(3, size, size)``; targets of :class:`MaskFolder`."""
        pixels = torch.stack(images).to(self.device, non_blocking=True)
        masks = torch.stack([target["mask"] for target in targets]).to(self.device, non_blocking=True).long()
        count = self.config.accumulate
        return list(zip(self.preparation.normalize(pixels).chunk(count), masks.chunk(count), strict=True))

    def loss(self, network: nn.Module, *part: Any) -> Tensor:
        """Args: normalised images ``(B, 3, size, size)``; classes int64 ``(B, size, size)``."""
        images, masks = part
        with self.autocast():
            outputs = network(images)
        return downstream.segmentation_loss({name: logits.float() for name, logits in outputs.items()}, masks)

    def evaluate(self, model: nn.Module, batch_size: int, workers: int, processes: Processes) -> dict[str, float]:
        test = self.dataset.test
        result = evaluate_segmenter(model, test, self.preparation, batch_size, workers=workers, processes=processes)
        return result.measures


def normalisation(pretrained: str, preset: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB images that pretrained weights expect."""
    named = pretrained in ("plain", "distilled")
    stored = load(entry(preset, distilled=pretrained == "distilled") if named else pretrained, preset)
    if (known := stored.preprocessing) is None:
        return IMAGENET_MEAN, IMAGENET_STD
    known = adapt_channels(stored, 3).preprocessing or known
    return known.mean, known.std
