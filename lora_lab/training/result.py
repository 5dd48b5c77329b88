"""The numbers of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FitResult:
    """losses: mean over the labelled tokens of each step, of a classifier: over its rows.  eval_losses: the same before the first step, at
    eval_every, after the last.

    tokens: of the rows, padding not counted.  label_tokens: those that were learned, of a classifier: rows.  seconds: of the steps, evaluation
    and saving left out.  peak_bytes: see `accounting.peak_bytes`.  skipped_steps: float16 overflows.  computed_tokens: padding counted,
    too.  best_step: with keep_best the step whose weights the model has.  stopped_early: whether early_stopping ended the run.
    """

    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    skipped_steps: int = 0
    computed_tokens: int = 0
    best_step: int | None = None
    stopped_early: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def padding_share(self) -> float:
        """The part of the computed positions that was padding, 0 to 1."""
        return 1.0 - self.tokens / max(self.computed_tokens, 1)
