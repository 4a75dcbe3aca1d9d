"""Training: the loop, its options, evaluation."""

from .config import TrainConfig
from .evaluation import evaluate
from .loop import train
from .optimization import Ema, learning_rate, parameter_groups

__all__ = ["Ema", "TrainConfig", "evaluate", "learning_rate", "parameter_groups", "train"]
