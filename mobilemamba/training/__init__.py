"""Training: the loop, its options, fine-tuning, distillation, evaluation."""

from .config import TrainConfig
from .detection import DetectionResult, evaluate_detector
from .distillation import open_teacher
from .evaluation import Result, evaluate, evaluate_outputs
from .finetuning import FREEZABLE, freeze, freeze_norms
from .interruption import EXIT_CODE, Interrupted
from .loop import train
from .optimization import learning_rate, moving_average, parameter_groups
from .recipes import RECIPES, recipe
from .segmentation import SegmentationResult, evaluate_segmenter
from .state import stored_config, stored_how

__all__ = [
    "EXIT_CODE",
    "FREEZABLE",
    "RECIPES",
    "DetectionResult",
    "Interrupted",
    "Result",
    "SegmentationResult",
    "TrainConfig",
    "evaluate",
    "evaluate_detector",
    "evaluate_outputs",
    "evaluate_segmenter",
    "freeze",
    "freeze_norms",
    "learning_rate",
    "moving_average",
    "open_teacher",
    "parameter_groups",
    "recipe",
    "stored_config",
    "stored_how",
    "train",
]
