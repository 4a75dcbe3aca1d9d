"""What a run learns: the parts of training that differ between classifiers, detectors and segmenters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, weights
from ..models import MobileMamba
from ..models.options import ModelOptions
from ..zoo import create_model
from .config import MEASURES, TrainConfig
from .distillation import hard_loss, open_teacher, soft_loss
from .evaluation import evaluate
from .finetuning import freeze, freeze_norms, start_from
from .processes import Processes

__all__ = ["Classification", "Task"]

Part = tuple[Any, ...]


class Task(ABC):
    """What a run learns.

    Args:
        config, dataset: of the run.
        device: of this process.
    """

    least_images = 1  # in each part of a batch
    heads: tuple[str, ...] = ("head",)  #: the children of the model that are its head

    def __init__(self, config: TrainConfig, dataset: Any, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device

    @property
    def measure(self) -> str:
        """The name of the measure that counts."""
        return MEASURES[self.config.task]

    def check_parts(self, images: int) -> None:  # noqa: B027  (most tasks have nothing to say)
        """Refuse batches of this number of images in each process."""

    @abstractmethod
    def create(self, resume: bool) -> nn.Module:
        """A new model, with pretrained weights unless ``resume`` is set: then :meth:`restore` follows."""

    def freeze(self, model: nn.Module) -> None:  # noqa: B027  (a feature extractor freezes its parts itself)
        """Keep parts of ``model`` as they are, in place."""

    @abstractmethod
    def restore(self, model: nn.Module, meta: dict[str, Any]) -> None:
        """Take over what pretrained weights determined, from the facts of a stored run."""

    @abstractmethod
    def prepare(self) -> None:
        """Make what depends on the preprocessing of the images, which may be that of pretrained weights."""

    #: From a training image, and its target if it has one, to what a batch has. Set by :meth:`prepare`.
    transform: Callable[..., Any]

    @abstractmethod
    def parts(self, images: Any, targets: Any) -> list[Part]:
        """The ``accumulate`` equal parts of a batch, on the device, as arguments of :meth:`loss`."""

    @abstractmethod
    def loss(self, network: nn.Module, *part: Any) -> Tensor:
        """The mean loss of a part of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batch_size: int, workers: int, processes: Processes) -> dict[str, float]:
        """The measures of ``model`` on the test images, by name; :attr:`measure` is the first.

        Args:
            batch_size: images per forward pass in this process.
        """

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """The facts about the model that go into every checkpoint."""

    @abstractmethod
    def save(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store a model for inference; returns its weights, read back."""

    def autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.precision
        return torch.autocast(self.device.type, getattr(torch, precision), enabled=precision != "float32")


class Classification(Task):
    """A class for each image, from its labels and perhaps from a teacher. Arguments: :class:`Task`."""

    least_images = 2  # BatchNorm at the head sees one value of each image

    def __init__(self, config: TrainConfig, dataset: data.DataSet, device: torch.device) -> None:
        super().__init__(config, dataset, device)
        self.preprocessing = dataset.preprocessing
        self.mix = config.augmentation.batch_transform(len(dataset.labels))
        self.model_args = ModelOptions(num_classes=len(dataset.labels), in_chans=dataset.preprocessing.channels)
        self.model_args.update(config.backbone_options)  # type: ignore[typeddict-item]

    def check_parts(self, images: int) -> None:
        if (self.config.mixup or self.config.cutmix) and images % 2:
            raise ValueError(
                f"batch_size: mixup and cutmix need an even number of images in each process, got {images}"
            )

    def create(self, resume: bool) -> MobileMamba:
        config = self.config
        model = create_model(config.model, **self.model_args)
        if config.pretrained and not resume:
            args = (model, config.model, self.dataset.labels, self.dataset.preprocessing)
            self.preprocessing = start_from(config.pretrained, *args)
        return model

    def freeze(self, model: nn.Module) -> None:
        assert isinstance(model, MobileMamba)
        freeze(model, self.config.freeze)
        if self.config.freeze_norm:
            freeze_norms(model)

    def restore(self, model: nn.Module, meta: dict[str, Any]) -> None:
        if self.config.pretrained:
            stored = data.Preprocessing.from_dict(meta.get("preprocessing"))
            self.preprocessing = replace(self.preprocessing, mean=stored.mean, std=stored.std)

    def prepare(self) -> None:
        self.transform = self.config.augmentation.image_transform(self.preprocessing)
        self.teacher = None
        if self.config.teacher:
            self.teacher = open_teacher(self.config, self.preprocessing, self.dataset.labels, self.device)

    def parts(self, images: Tensor, targets: Tensor) -> list[Part]:
        """Args: images uint8 ``(B, C, H, W)``, augmented; classes int64 ``(B,)``."""
        normal = self.preprocessing.normalize(images.to(self.device, non_blocking=True))
        normal, soft = self.mix(normal, targets.to(self.device, non_blocking=True))
        count = self.config.accumulate
        return list(zip(normal.chunk(count), soft.chunk(count), strict=True))

    def loss(self, network: nn.Module, *part: Any) -> Tensor:
        """Args: normalised images ``(B, C, H, W)``, targets ``(B, classes)``."""
        config, (images, targets) = self.config, part
        with self.autocast():
            outputs = network(images)
            aims = self.teacher(images) if self.teacher else None
        own, other = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = F.cross_entropy(own.float(), targets)
        if aims is not None:
            assert config.distill_weight is not None  # TrainConfig fills it in
            hard = config.distill == "hard"
            term = hard_loss(other, aims) if hard else soft_loss(other, aims, config.temperature)
            return loss + config.distill_weight * term
        return loss if own is other else (loss + F.cross_entropy(other.float(), targets)) / 2

    def evaluate(self, model: nn.Module, batch_size: int, workers: int, processes: Processes) -> dict[str, float]:
        assert isinstance(model, MobileMamba)
        part, share = self.dataset.test, processes.share
        result = evaluate(model, part, self.preprocessing, batch_size, workers=workers, share=share)
        return {self.measure: result.summed(processes.sum).top1}

    def meta(self) -> dict[str, Any]:
        return {
            "preset": self.config.model,
            "model_args": {name: value for name, value in self.model_args.items() if name != "drop_path_rate"},
            "labels": list(self.dataset.labels),
            "preprocessing": self.preprocessing.to_dict(),
        }

    def save(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weights.save(path, weights.Checkpoint(tensors, **{**self.meta(), "preprocessing": self.preprocessing}))
        return weights.read(path).state_dict
