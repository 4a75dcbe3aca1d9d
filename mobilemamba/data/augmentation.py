"""Augmentation: random changes of training images, by timm and torchvision."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from .preprocessing import Preprocessing, to_tensor

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Augmentation"]

INTERPOLATIONS = ("bicubic", "bilinear", "random")
# timm skips over parts that it does not know, so "rand-mstdx" would be a RandAugment without noise
RAND_AUGMENT = re.compile(r"rand(-([mn]\d+|(p|mstd)\d+(\.\d+)?|mmax\d+|inc[01]|tweights|t3aw?))*")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images. The defaults change nothing.

    An image goes through random resized crop, flip, RandAugment or colour jitter, and shift, in this order. Then a
    batch of normalised images goes through random erasing, and mixup or cutmix. The steps are timm's; the shift is
    torchvision's, because timm has none.

    Args:
        flip: mirror each image with probability 1/2.
        shift: largest shift in pixels, in each direction; the border is filled with black.
        erase: probability that a rectangle of 2 % to 33 % of the image becomes noise (random erasing, arXiv
            1708.04896).
        crop_scale: smallest share of the area that a random resized crop keeps, in (0, 1]; its aspect ratio is from 3/4
            to 4/3. 0: no such crop, the images are resized and cropped as in an evaluation.
        interpolation: of the random resized crop and of RandAugment: ``"bicubic"``, ``"bilinear"``, or ``"random"`` for
            one of both, drawn for each image.
        rand_augment: RandAugment (arXiv 1909.13719) in timm's notation, such as ``"rand-m9-mstd0.5-inc1"``.
        color_jitter: largest relative change of brightness, contrast and saturation. As in timm, RandAugment replaces
            it where both are given, except with the operations ``t3a`` and ``t3aw``.
        mixup, cutmix: parameter alpha of the Beta distribution of the mixing ratio (arXiv 1710.09412, 1905.04899).
        mix_prob: probability that a batch is mixed.
        mix_switch: probability of cutmix where a batch is mixed and both are on.
        label_smoothing: share of the target that is spread over all classes.

    Raises:
        ValueError: a field is out of its range.
    """

    flip: bool = False
    shift: int = 0
    erase: float = 0.0
    crop_scale: float = 0.0
    interpolation: str = "bicubic"
    rand_augment: str = ""
    color_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    mix_switch: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("erase", "crop_scale", "mix_prob", "mix_switch", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("shift", "color_jitter", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be {', '.join(INTERPOLATIONS)}, got '{self.interpolation}'")
        if self.rand_augment and not RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(f"rand_augment must be like 'rand-m9-mstd0.5-inc1', got '{self.rand_augment}'")

    def image_transform(self, preprocessing: Preprocessing) -> "Callable[[Image.Image], Tensor]":
        """A function from a PIL image to uint8 ``(C, crop, crop)``, to be used by :func:`training_batches`.

        It draws from the global generators of Python, NumPy and torch. It can be pickled.

        Args:
            preprocessing: size and colour mode of the images.

        Raises:
            ImportError: a step needs timm and torchvision.
            ValueError: the model has neither 1 nor 3 channels.
        """
        evaluation = preprocessing.pixels()  # refuses numbers of channels that image files do not have
        if not (self.flip or self.shift or self.crop_scale or self.rand_augment or self.color_jitter):
            return evaluation
        timm_data, v2 = libraries()
        geometry, colours, _ = timm_data.create_transform(
            preprocessing.crop,
            is_training=True,
            scale=(self.crop_scale or 1.0, 1.0),
            hflip=0.5 if self.flip else 0.0,
            color_jitter=self.color_jitter or None,
            auto_augment=self.rand_augment or None,
            interpolation=self.interpolation,
            mean=preprocessing.mean,
            normalize=False,
            separate=True,
        )
        for operation in colours.transforms[0].ops if self.rand_augment else []:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = functools.partial(posterize, operation.aug_fn)
        crop, *flip = geometry.transforms
        first = [preprocessing.convert, crop] if self.crop_scale else [preprocessing.fit]
        shift = [v2.RandomCrop(preprocessing.crop, padding=self.shift)] if self.shift else []
        return Steps([*first, *flip, *colours.transforms, *shift])

    def batch_transform(self, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function from a batch to the batch with erasing and mixing, and its soft targets.

        It takes normalised images, float32 ``(B, C, H, W)``, and labels, int64 ``(B,)``, on any device. It returns
        images, which may be in the same memory, and targets, float32 ``(B, num_classes)``, whose rows sum to 1. It
        draws from the global generators of Python and NumPy, and for the noise from that of the device. To be mixed, B
        must be even (ValueError): image i is mixed with image B - 1 - i.

        Raises:
            ImportError: a step needs timm and torchvision.
        """
        erase = mix = None
        if self.erase or self.mixup or self.cutmix:
            timm_data, _ = libraries()
            if self.erase:
                erase = functools.partial(timm_data.random_erasing.RandomErasing, self.erase, mode="pixel")
            if self.mixup or self.cutmix:
                mix = timm_data.Mixup(
                    mixup_alpha=self.mixup,
                    cutmix_alpha=self.cutmix,
                    prob=self.mix_prob,
                    switch_prob=self.mix_switch,
                    label_smoothing=self.label_smoothing,
                    num_classes=num_classes,
                )

        def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if erase is not None:
                images = erase(device=images.device)(images)
            if mix is None:
                targets = F.one_hot(labels, num_classes).float()
                return images, targets * (1 - self.label_smoothing) + self.label_smoothing / num_classes
            if len(images) % 2:
                raise ValueError(f"mixup and cutmix need an even number of images in a batch, got {len(images)}")
            return mix(images, labels)

        return transform


@dataclass(frozen=True)
class Steps:
    """From a PIL image to uint8 ``(C, H, W)``."""

    steps: "list[Callable[[Image.Image], Image.Image]]"

    def __call__(self, image: "Image.Image") -> Tensor:
        for step in self.steps:
            image = step(image)
        return to_tensor(image)


def posterize(original: "Callable[..., Image.Image]", image: "Image.Image", bits: int, **options: Any) -> "Image.Image":
    """timm's operation. At magnitude 10 timm asks for 0 bits: a black image, which Pillow 13 refuses to make."""
    from PIL import Image

    return original(image, bits, **options) if bits else Image.new(image.mode, image.size)


def libraries() -> tuple[Any, Any]:
    """The modules ``timm.data`` and ``torchvision.transforms.v2``."""
    try:
        import timm.data
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit the torch
        raise ImportError(
            f"augmentation needs timm and torchvision: pip install 'mobilemamba[train]'; without it, "
            f"train with --no-flip --shift 0 --erase 0 ({error})"
        ) from error
    return timm.data, v2
