"""Optimizers and learning-rate schedules by name.

    adamw      Loshchilov & Hutter 2019 (arXiv:1711.05101), decay apart from the gradient      2 states a weight
    adam       Kingma & Ba 2015 (arXiv:1412.6980)                                              2
    sgd        the decay is part of the gradient                                               0
    momentum   SGD with a momentum of 0.9 (Sutskever et al. 2013)                              1
    adafactor  Shazeer & Stern 2018 (arXiv:1804.04235): a matrix's rows and columns            about 0
    lion       Chen et al. 2023 (arXiv:2302.06675), algorithm 2: the sign of a mean            1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .rounding import Make, RoundedStochastically

Parameters = Sequence[nn.Parameter] | Sequence[dict[str, Any]]


def _fused(parameters: Any) -> bool:
    """One kernel, and no temporary as large as the weights."""
    return all(p.device.type in ("cpu", "cuda", "mps", "xpu") and p.is_floating_point() for p in _all(parameters))


def _all(parameters: Any) -> list[nn.Parameter]:
    return [p for given in parameters for p in (given["params"] if isinstance(given, dict) else [given])]


def _adamw(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=_fused(parameters))


def _adam(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay, fused=_fused(parameters))


def _sgd(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)


def _momentum(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay, momentum=0.9)


def _adafactor(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=weight_decay)


def _lion(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return Lion(parameters, learning_rate, weight_decay=weight_decay)


class Lion(torch.optim.Optimizer):
    """Every weight moves by the learning rate, in the direction of a mean of gradients; a good rate is a tenth of AdamW's.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (now, later), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = torch.lerp(p.grad, mean, now).sign_()
                p.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
                mean.lerp_(p.grad, 1 - later)


OPTIMIZERS: dict[str, Make] = {"adamw": _adamw, "adam": _adam, "sgd": _sgd, "momentum": _momentum, "adafactor": _adafactor, "lion": _lion}


def make_optimizer(name: str, parameters: Parameters, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of that name; where some of the weights are 16 bit, with stochastic rounding."""
    if any(p.dtype.itemsize < 4 for p in _all(parameters)):
        return RoundedStochastically(parameters, learning_rate, weight_decay, OPTIMIZERS[name])
    return OPTIMIZERS[name](parameters, learning_rate, weight_decay)


# Each schedule maps progress, 0 at the end of the warm-up and 1 after the last step, to a share of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_share(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """What part of the learning rate step `step` (0-based) of `steps` uses. The first step's is never zero.

    >>> [learning_rate_share(step, 6, 2, "linear") for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(steps - warmup_steps, 1))
