"""Training: the loop, its options, freezing, evaluation, curves."""

from .config import TrainConfig
from .evaluation import Result, evaluate
from .finetuning import FREEZABLE, freeze, freeze_norms
from .loop import train
from .optimization import Ema, learning_rate, parameter_groups
from .state import stored_config

__all__ = [
    "FREEZABLE",
    "Ema",
    "Result",
    "TrainConfig",
    "evaluate",
    "freeze",
    "freeze_norms",
    "learning_rate",
    "parameter_groups",
    "stored_config",
    "train",
]
