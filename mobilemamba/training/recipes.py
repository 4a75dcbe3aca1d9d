"""Recipes: options of a training run by name."""

from typing import Any

__all__ = ["DEFAULT_RECIPES", "RECIPES", "recipe"]

_PUBLISHED: dict[str, Any] = {
    "model": "s6",
    "epochs": 300,
    "batch_size": 1024,
    "lr": 3e-3,  # the configurations have 1.5e-3 for 512 images; the trainer multiplies by batch / 512
    "warmup_epochs": 20.0,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "ema_decay": 0.9998,
    "label_smoothing": 0.1,
    "flip": True,
    "shift": 0,
    "crop_scale": 0.08,
    "interpolation": "random",
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "erase": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_prob": 1.0,
    "mix_switch": 0.5,
    "precision": "float16",
    "seed": 42,
}

_DETECTION: dict[str, Any] = {
    "task": "detect",
    "model": "b1",
    "pretrained": "plain",
    "epochs": 12,
    "batch_size": 16,
    "lr": 2e-4,
    "schedule": "late-cosine",
    "warmup_epochs": 500 * 16 / 117266,  # 500 steps on COCO's training images with objects
    "weight_decay": 0.05,
    "decay_vectors": True,
    "clip_grad": 0.1,
    "ema_decay": 0.0,
}

_SEGMENTATION: dict[str, Any] = {
    **_DETECTION,
    "task": "segment",
    "model": "b4",
    "kind": "deeplabv3",
    "epochs": 127,  # 80,000 steps on ADE20K's 20,210 training images
    "batch_size": 32,
    "lr": 1.2e-4,
    "warmup_epochs": 500 * 32 / 20210,
    "scale": (0.5, 2.0),
    "photometric": True,
    "reduce_zero_label": True,
}

# nano's weights for grey clothes are a start for shapes too. The first stride of the detectors' backbone is 8.
_SHAPES: dict[str, Any] = {
    "pretrained": "plain",
    "norm_eval": False,
    "image_size": 128,
    "lr": 1e-3,
    "clip_grad": 1.0,
}

#: Options that differ from the defaults of :class:`TrainConfig`. The published ones are those of the configurations
#: ``mobilemamba_*.py`` (plain) and ``mobilemamba_*s.py`` (distilled) of the authors' repository, and of arXiv
#: 2411.15941. The teacher of the distilled models is TResNet-L v2 with
#: 83.9 % top-1.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "published-300": _PUBLISHED,
    "published-1000": {**_PUBLISHED, "epochs": 1000, "distill": "soft", "temperature": 1.0},
    "fine-tune": {
        "pretrained": "plain",
        "epochs": 30,
        "batch_size": 64,
        "lr": 2.5e-4,
        "warmup_epochs": 2.0,
        "weight_decay": 1e-4,
        "shift": 0,
        "crop_scale": 0.25,
        "erase": 0.0,
    },
    # Random weights, and images of the published size
    "detect": {"task": "detect", "batch_size": 16, "lr": 1e-3, "ema_decay": 0.99},
    "segment": {"task": "segment", "batch_size": 16, "lr": 1e-3, "ema_decay": 0.99, "photometric": True},
    # About half an hour each on two cores (docs/downstream.md)
    "shapes-retinanet": {
        **_SHAPES,
        "task": "detect",
        "kind": "retinanet",
        "epochs": 12,
        "batch_size": 4,
        "ema_decay": 0.998,
        "model_options": '{"pyramid_channels": 96, "backbone_options": {"patch_strides": [2, 2, 2]}}',
    },
    "shapes-mask-rcnn": {
        **_SHAPES,
        "task": "detect",
        "kind": "mask_rcnn",
        "epochs": 8,
        "batch_size": 4,
        "ema_decay": 0.998,
        "model_options": '{"pyramid_channels": 64, "backbone_options": {"patch_strides": [2, 2, 2]}, '
        '"rpn_pre_nms_top_n_train": 300, "rpn_post_nms_top_n_train": 100, "box_batch_size_per_image": 32, '
        '"rpn_pre_nms_top_n_test": 300, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 30}',
    },
    "shapes-semantic-fpn": {
        **_SHAPES,
        "task": "segment",
        "kind": "semantic_fpn",
        "epochs": 18,
        "batch_size": 8,
        "ema_decay": 0.995,
        "model_options": '{"pyramid_channels": 96, "channels": 64}',
    },
    # The configurations for COCO and ADE20K of the authors' repository
    "published-retinanet": {**_DETECTION, "kind": "retinanet"},
    "published-mask-rcnn": {**_DETECTION, "kind": "mask_rcnn"},
    "published-ssdlite": {
        **_DETECTION,
        "kind": "ssdlite",
        "epochs": 600,  # 120 of a set that is repeated five times
        "batch_size": 192,
        "lr": 2.4e-3,
        "warmup_epochs": 500 * 192 / 117266,
        "photometric": True,
        "iou_crop": True,
    },
    "published-semantic-fpn": {
        **_SEGMENTATION,
        "kind": "semantic_fpn",
        "epochs": 253,  # 160,000 steps
        "warmup_epochs": 1500 * 32 / 20210,
        "clip_grad": 0.0,
        "head_lr": 10.0,
    },
    "published-deeplabv3": _SEGMENTATION,
    "published-pspnet": {**_SEGMENTATION, "kind": "pspnet"},
}

#: The recipe of each task where none is given.
DEFAULT_RECIPES = {"classify": "default", "detect": "detect", "segment": "segment"}


def recipe(name: str) -> dict[str, Any]:
    """The options of the recipe ``name``.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe '{name}'; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
