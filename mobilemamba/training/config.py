"""The options of a training run that determine its result."""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from .. import downstream
from ..data import Augmentation
from ..data.datasets import ON_BAD_IMAGE
from ..models import checks
from ..models.options import ModelOptions
from ..models.presets import PRESETS, check_preset
from ..weights import entry
from .finetuning import FREEZABLE

__all__ = ["CHANGEABLE", "MEASURES", "TASKS", "TrainConfig"]

T = TypeVar("T")

#: The options that may differ when a run is resumed. Data and teacher may be elsewhere, but must be the same.
CHANGEABLE = ("data", "epochs", "on_bad_image", "teacher")

DISTILL = ("soft", "hard")
INTERPOLATIONS = ("bicubic", "bilinear", "random")
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "late-cosine")

#: What can be trained, and the data of each task.
TASKS = {"classify": "folder:DIR, fashion-mnist or digits", "detect": "coco:DIR", "segment": "masks:DIR"}

#: The measure of a result that each task reports first, from 0 to 1.
MEASURES = {"classify": "accuracy", "detect": "AP", "segment": "mIoU"}

PREFIXES = {"detect": "coco:", "segment": "masks:"}
DEFAULT_KINDS = {"detect": "retinanet", "segment": "semantic_fpn"}

#: The options that only some tasks have. A run of another task refuses them.
OF_TASKS = {
    "classify": (
        *("freeze", "freeze_norm", "shift", "crop_scale", "interpolation", "rand_augment", "color_jitter", "erase"),
        *("mixup", "cutmix", "mix_prob", "mix_switch", "label_smoothing"),
        *("teacher", "teacher_mean", "teacher_std", "teacher_size", "distill", "temperature", "distill_weight"),
    ),
    "detect": ("kind", "norm_eval", "frozen_stages", "scale", "photometric", "iou_crop"),
    "segment": ("kind", "norm_eval", "frozen_stages", "scale", "photometric", "reduce_zero_label"),
}

#: Keys of ``model_options``, and of its ``backbone_options``, that another option determines.
DETERMINED = {
    "kind": "kind",
    "backbone": "model",
    "num_classes": "data",
    "pretrained_backbone": "pretrained",
    "size": "image_size",
    "min_size": "image_size",
}
DETERMINED_OF_CLASSIFIER = {
    "num_classes": "data",
    "in_chans": "data",
    "widths": "widths",
    "drop_path_rate": "drop_path",
    "distillation": "teacher",
}
DETERMINED_OF_BACKBONE = {
    "norm_eval": "norm_eval",
    "frozen_stages": "frozen_stages",
    "widths": "widths",
    "drop_path_rate": "drop_path",
    "in_chans": "data",
}


def tuples(value: Any) -> Any:
    """``value`` with tuples for lists, at any depth."""
    if isinstance(value, dict):
        return {name: tuples(part) for name, part in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def option(default: T, text: str, choices: tuple[str, ...] | None = None) -> T:
    """A field of :class:`TrainConfig`. ``mobilemamba train`` has an option of its name, with ``text`` as the help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The options that determine the result of a training run, to the last bit on one machine.

    ``mobilemamba train --help`` says what each one means. ``drop_path`` and ``image_size`` are the preset's where they
    are not given.

    Raises:
        ValueError: an option is out of its range, options exclude each other, or the preset is unknown.
    """

    task: str = option("classify", "what to train: a classifier, a detector or a segmenter", tuple(TASKS))
    kind: str | None = option(
        None,
        "detector (retinanet, mask_rcnn, ssdlite) or segmenter (semantic_fpn, deeplabv3, pspnet) of --task detect or "
        "segment (default: the first one)",
    )
    model: str = option("nano", "preset of the model; of its backbone, for detectors and segmenters")
    widths: tuple[int, ...] | None = option(None, "channels of the stages, such as 96,192,256, for other widths")
    pretrained: str | None = option(None, "weights to start from: plain, distilled, or the path of a checkpoint")
    model_options: str = option(
        "",
        'further arguments of the classifier, detector or segmenter as JSON, such as \'{"mixer": "ttt"}\' or '
        "'{\"box_batch_size_per_image\": 128}'",
    )
    norm_eval: bool | None = option(
        None, "the backbone's BatchNorm keeps its statistics (default: in RetinaNet and Mask R-CNN with --pretrained)"
    )
    frozen_stages: int = option(
        -1, "-1 trains everything; 0 freezes the stem; k freezes the stem and the first k stages"
    )
    freeze: str = option("none", "the part of the model that does not learn", FREEZABLE)
    freeze_norm: bool = option(False, "BatchNorm keeps its statistics, weight and bias")
    drop_path: float | None = option(None, "rate of stochastic depth (default: the preset's)")

    data: str = option(
        "fashion-mnist",
        "fashion-mnist[:DIR], folder:DIR (images in train/CLASS/ and val/CLASS/) or digits (scikit-learn's); coco:DIR "
        "(COCO's JSON) for --task detect; masks:DIR (images/ and masks/) for --task segment",
    )
    image_size: int | None = option(
        None,
        "height and width in pixels, for folder:DIR only (default: the preset's); of a detector the short side (800, "
        "SSDLite: 320), of a segmenter the short side and the side of the crop (512)",
    )
    reduce_zero_label: bool = option(False, "masks have 0 for ignored pixels, and v for class v - 1 (ADE20K)")
    on_bad_image: str = option(
        "fail",
        "a file that is not a complete image, or has bad annotations: stop, or name it and go on without it",
        ON_BAD_IMAGE,
    )

    epochs: int = option(20, "passes over the training images")
    batch_size: int = option(128, "images per step, over all processes")
    accumulate: int = option(1, "parts of a batch that a process computes one after the other, for less memory")
    lr: float = option(2e-3, "highest learning rate")
    warmup_epochs: float = option(1.0, "epochs of linear warm-up")
    schedule: str = option(
        "cosine",
        "after the warm-up a cosine down to lr / 100; or, late-cosine, lr until half of the steps, then a cosine to 0",
        SCHEDULES,
    )
    head_lr: float = option(1.0, "factor of the learning rate of the head: of all but the backbone and its pyramid")
    weight_decay: float = option(0.05, "weight decay of AdamW, on weights with more than one dimension")
    decay_vectors: bool = option(False, "weight decay on biases and norms too")
    clip_grad: float = option(5.0, "largest norm of the gradient; a longer one is scaled down; 0: no limit")
    ema_decay: float = option(0.999, "decay per step of the moving average of the weights; the average is the result")
    label_smoothing: float = option(0.1, "share of the target that is spread over all classes")
    seed: int = option(0, "seed of the initial weights, the order of the images and the augmentation")

    flip: bool = option(True, "mirror each image with probability 1/2")
    shift: int = option(2, "largest random shift of an image, in pixels")
    scale: tuple[float, ...] | None = option(
        None, "smallest and largest factor of a random resize, such as 0.5,2; a crop of --image-size follows"
    )
    photometric: bool = option(False, "random brightness, contrast, saturation and hue")
    iou_crop: bool = option(False, "SSD's random canvas and crop")
    crop_scale: float = option(0.0, "smallest share of the area of a random resized crop; 0: no such crop")
    interpolation: str = option("bicubic", "of a random resized crop", INTERPOLATIONS)
    rand_augment: str = option("", "RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1")
    color_jitter: float = option(0.0, "range of brightness, contrast and saturation; unused beside RandAugment")
    erase: float = option(0.25, "probability that a rectangle of the image becomes noise")
    mixup: float = option(0.0, "alpha of mixup; 0: none")
    cutmix: float = option(0.0, "alpha of cutmix; 0: none")
    mix_prob: float = option(1.0, "probability that a batch is mixed, where mixup or cutmix is on")
    mix_switch: float = option(0.5, "probability of cutmix where both are on")

    teacher: str | None = option(
        None, "a timm model, a preset (s6, s6:distilled), or the path of a checkpoint, TorchScript or .pt2 file"
    )
    teacher_mean: tuple[float, ...] | None = option(None, "channel means of the teacher (default: what it states)")
    teacher_std: tuple[float, ...] | None = option(None, "standard deviations of the teacher's channels")
    teacher_size: int | None = option(None, "height and width of the teacher's images (default: what it states)")
    distill: str = option("soft", "soft: KL divergence; hard: the teacher's class, on a second head (DeiT)", DISTILL)
    temperature: float = option(1.0, "temperature of the soft loss")
    distill_weight: float | None = option(None, "weight of the teacher's loss (default: 5 for soft, 1 for hard)")

    precision: str = option("float32", "type of the activations; float16 scales the loss", PRECISIONS)
    compile: bool = option(False, "torch.compile")
    grad_checkpointing: bool = option(False, "recompute each block in the backward pass: less memory, more time")
    sync_batchnorm: bool = option(False, "BatchNorm statistics of the whole batch, over all processes")
    half: bool = option(False, "store the result's weights as float16")

    def __post_init__(self) -> None:
        check_preset(self.model)
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{option.name} must be {' or '.join(choices)}, got {value}")
        self.check_task()
        self.check_arguments()
        self.check_used()
        if self.drop_path is None:
            object.__setattr__(self, "drop_path", PRESETS[self.model].get("drop_path_rate", 0.0))
        if self.image_size is None and self.data.startswith("folder:"):
            object.__setattr__(self, "image_size", entry(self.model).preprocessing.crop)
        if self.image_size is None and self.task != "classify":
            size = 512 if self.task == "segment" else 320 if self.kind == "ssdlite" else 800
            object.__setattr__(self, "image_size", size)
        if self.teacher and self.distill_weight is None:
            object.__setattr__(self, "distill_weight", 5.0 if self.distill == "soft" else 1.0)
        for name in ("epochs", "batch_size", "accumulate", "lr", "head_lr", "temperature"):
            self.check(name, "positive", 0 < getattr(self, name) < math.inf)
        for name in ("warmup_epochs", "weight_decay", "clip_grad", "shift", "color_jitter", "mixup", "cutmix"):
            self.check(name, "at least 0", 0 <= getattr(self, name) < math.inf)
        self.check("distill_weight", "at least 0", 0 <= (self.distill_weight or 0) < math.inf)
        self.check("warmup_epochs", f"at most the {self.epochs} epochs", self.warmup_epochs <= self.epochs)
        for name in ("label_smoothing", "ema_decay", "drop_path", "crop_scale", "erase", "mix_prob", "mix_switch"):
            self.check(name, "from 0 to 1", 0 <= getattr(self, name) <= 1)
        self.check("seed", "from 0 up to 2**40", 0 <= self.seed < 2**40)
        if self.widths is not None and self.task == "classify":
            depths = checks.integers("depths", self.arguments.get("depths", PRESETS[self.model]["depths"]), least=0)
            fits = len(self.widths) == len(depths)
            self.check("widths", f"{len(depths)} numbers, one for each stage", fits)
        self.check("frozen_stages", "from -1 to 3", -1 <= self.frozen_stages <= 3)
        scale = self.scale is None or (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] < math.inf)
        self.check("scale", "a smallest and a largest factor above 0, such as 0.5,2", scale)

    def check_task(self) -> None:
        """Fill in the kind of detector or segmenter, and refuse data that the task cannot use."""
        if self.task != "classify":
            kinds = [name for name, (task, _) in downstream.KINDS.items() if task == self.task]
            if self.kind is None:
                object.__setattr__(self, "kind", DEFAULT_KINDS[self.task])
            self.check("kind", f"{' or '.join(kinds)} for --task {self.task}", self.kind in kinds)
        data = next((task for task, prefix in PREFIXES.items() if self.data.startswith(prefix)), "classify")
        if data != self.task:
            raise ValueError(f"data: expected {TASKS[self.task]} for --task {self.task}, got '{self.data}'")

    def check_arguments(self) -> None:
        """Refuse :attr:`model_options` that are no JSON, and those that another option determines."""
        given, inner = self.arguments, self.arguments.get("backbone_options", {})
        if self.task == "classify":
            determined = [(given, DETERMINED_OF_CLASSIFIER)]
            for name in given.keys() - ModelOptions.__annotations__.keys():
                raise ValueError(f"model_options: expected arguments of MobileMamba, got '{name}'")
        elif isinstance(inner, dict):
            determined = [(given, DETERMINED), (inner, DETERMINED_OF_BACKBONE)]
        else:
            raise ValueError(f"model_options: backbone_options: expected a JSON object, got {inner!r}")
        for names, known in determined:
            for name in names:
                if name in known:
                    option = known[name].replace("_", "-")
                    raise ValueError(f"model_options: expected no {name}: --{option} determines it")

    def check_used(self) -> None:
        """Refuse options that would have no effect."""
        mixes, distils = self.mixup > 0 or self.cutmix > 0, self.teacher is not None
        conditions = {
            "mix_prob": ("--mixup or --cutmix", mixes),
            "mix_switch": ("--mixup and --cutmix", self.mixup > 0 and self.cutmix > 0),
            "interpolation": ("--crop-scale or --rand-augment", self.crop_scale > 0 or self.rand_augment != ""),
            "distill": ("--teacher", distils),
            "distill_weight": ("--teacher", distils),
            "temperature": ("--teacher and --distill soft", distils and self.distill == "soft"),
            **{f"teacher_{name}": ("--teacher", distils) for name in ("mean", "std", "size")},
            "compile": ("--task classify or segment: a detector's outputs have no fixed size", self.task != "detect"),
            "grad_checkpointing": ("a run without --compile, which decides what to recompute", not self.compile),
        }
        for option in fields(self):
            tasks = [task for task, names in OF_TASKS.items() if option.name in names]
            needed, used = conditions.get(option.name, ("", True))
            if tasks and self.task not in tasks:
                needed, used = f"--task {' or '.join(tasks)}", False
            if not used and getattr(self, option.name) != option.default:
                raise ValueError(f"{option.name} is for {needed}; it would have no effect")

    def check(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def arguments(self) -> dict[str, Any]:
        """:attr:`model_options` as arguments, with tuples for lists.

        Raises:
            ValueError: the text is no JSON object.
        """
        try:
            arguments = json.loads(self.model_options or "{}")
        except ValueError as error:
            raise ValueError(f"model_options: expected a JSON object, got {self.model_options!r} ({error})") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"model_options: expected a JSON object, got {self.model_options!r}")
        return tuples(arguments)

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of the training images."""
        return Augmentation(**{option.name: getattr(self, option.name) for option in fields(Augmentation)})

    @property
    def backbone_options(self) -> dict[str, Any]:
        """What the network has instead of the preset's arguments, besides classes and channels."""
        options: dict[str, Any] = {"drop_path_rate": self.drop_path}
        if self.widths:
            options["widths"] = self.widths
        two_heads = self.pretrained == "distilled" or (self.teacher and self.distill == "hard")
        if self.task == "classify" and two_heads:
            options["distillation"] = True
        if self.task == "classify":
            options |= self.arguments
        return options
