"""The training loop and its settings."""

from .config import TrainConfig
from .loop import evaluate, fit
from .precision import fastest_precision
from .result import FitResult
from .run import Interrupted
from .sharding import shard

__all__ = ["FitResult", "Interrupted", "TrainConfig", "evaluate", "fastest_precision", "fit", "shard"]
