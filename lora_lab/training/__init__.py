"""The training loop and its settings; evaluation."""

from .config import TrainConfig
from .evaluation import (
    accuracy,
    answers,
    auc,
    best_choices,
    f1,
    forgetting,
    perplexity,
    predict_classes,
    rouge,
    samples,
    score_choices,
)
from .fitting import evaluate, fit
from .loop import Interrupted
from .precision import fastest_precision
from .probing import linear_probe
from .result import FitResult
from .sharding import shard
from .sweeps import Sweep, Trial, grid, sweep

__all__ = [
    "FitResult", "Interrupted", "Sweep", "TrainConfig", "Trial", "accuracy", "answers", "auc", "best_choices", "evaluate", "f1", "fastest_precision",
    "fit", "forgetting", "grid", "linear_probe", "perplexity", "predict_classes", "rouge", "samples", "score_choices", "shard", "sweep",
]  # fmt: skip
