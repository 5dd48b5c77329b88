"""The training loop and its settings."""

from .config import TrainConfig
from .loop import FitResult, evaluate, fit
from .precision import fastest_precision

__all__ = ["FitResult", "TrainConfig", "evaluate", "fastest_precision", "fit"]
