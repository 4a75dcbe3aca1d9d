"""Training: the loop, its options, evaluation."""

from .config import TrainConfig
from .evaluation import evaluate
from .loop import train
from .optimization import Ema, learning_rate, parameter_groups
from .state import stored_config

__all__ = ["Ema", "TrainConfig", "evaluate", "learning_rate", "parameter_groups", "stored_config", "train"]
