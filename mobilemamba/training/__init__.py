"""Training: the loop, its options, freezing, evaluation, curves."""

from .config import TrainConfig
<<<<<<< HEAD
from .distillation import open_teacher
from .evaluation import evaluate
from .interruption import EXIT_CODE, Interrupted
=======
from .evaluation import Result, evaluate
from .finetuning import FREEZABLE, freeze, freeze_norms
>>>>>>> bb1e28ac0261e9afbbf7806a629e224014b42dd5
from .loop import train
from .optimization import learning_rate, moving_average, parameter_groups
from .recipes import RECIPES, recipe
from .state import stored_config

__all__ = [
<<<<<<< HEAD
    "EXIT_CODE",
    "RECIPES",
    "Interrupted",
    "TrainConfig",
    "evaluate",
    "learning_rate",
    "moving_average",
    "open_teacher",
    "parameter_groups",
    "recipe",
=======
    "FREEZABLE",
    "Ema",
    "Result",
    "TrainConfig",
    "evaluate",
    "freeze",
    "freeze_norms",
    "learning_rate",
    "parameter_groups",
>>>>>>> bb1e28ac0261e9afbbf7806a629e224014b42dd5
    "stored_config",
    "train",
]
