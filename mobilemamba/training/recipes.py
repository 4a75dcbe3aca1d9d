"""Recipes: options of a training run by name."""

from typing import Any

__all__ = ["RECIPES", "recipe"]

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
}


def recipe(name: str) -> dict[str, Any]:
    """The options of the recipe ``name``.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe '{name}'; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
