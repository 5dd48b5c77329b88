"""16-bit weights that learn: the step is taken in float32, and rounded up or down by chance, right on average.

Rounded to the nearest, a bfloat16 weight stays where it is until an update is worth 1/256 of it: AdamW at 2e-5 moves 12 % of the weights.
Rounded by chance, a weight moves one step as often as the update's share of a step, and the mean of many updates is the mean in float32.
Source: Gupta et al. 2015 (arXiv:1502.02551), section 3; for bfloat16 training: Zamirai et al. 2020 (arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..wrapping import is_divided
from .dtensors import joined_like, piece

Make = Callable[[Any, float, float], torch.optim.Optimizer]  # parameters or groups, learning rate, weight decay


def round_stochastically(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a 16-bit dtype: one of the two numbers next to each value, the nearer one more often, so that the mean is the value.

    >>> ones = round_stochastically(torch.full((10_000,), 1 + 1 / 512), torch.bfloat16)  # half-way between 1 and 1 + 1/128 lies 1 + 1/256
    >>> sorted({*ones.tolist()})
    [1.0, 1.0078125]
    """
    if is_divided(x):
        return joined_like(x, round_stochastically(piece(x), dtype))
    nearest = x.to(dtype)
    lower = torch.where(nearest.abs() > x.abs(), _next(nearest, -1), nearest)  # towards zero
    low, upper = lower.to(x.dtype), _next(lower, 1)
    share = (x - low) / (upper.to(x.dtype) - low)
    return torch.where(torch.rand_like(x) < share, upper, lower)


def _next(x: Tensor, step: int) -> Tensor:
    """The neighbour of each number, away from zero (1) or towards it (-1): in floating point that is the neighbouring whole number."""
    return (x.view(torch.int16) + step).view(x.dtype)


class RoundedStochastically(torch.optim.Optimizer):
    """Another optimizer for 16-bit weights, whose states are 16 bit, too; one weight at a time is wide, for its step.

    make: (parameters, learning rate, weight decay) -> the optimizer. groups: as torch optimizers take them.
    """

    def __init__(self, groups: Iterable[Any], learning_rate: float, weight_decay: float, make: Make) -> None:
        super().__init__(groups, {"lr": learning_rate, "weight_decay": weight_decay})
        self.make = make

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group["lr"], group["weight_decay"])

    def _step(self, parameter: nn.Parameter, rate: float, weight_decay: float) -> None:
        if parameter.dtype.itemsize >= 4:  # an adapter beside them
            wide = parameter
        else:
            wide = nn.Parameter(parameter.float())
            wide.grad = None if parameter.grad is None else parameter.grad.float()
        optimizer = self.make([wide], rate, weight_decay)
        optimizer.state[wide] = {name: _widened(value) for name, value in self.state[parameter].items()}
        with torch.enable_grad():
            optimizer.step()
        narrow = parameter.dtype if wide is not parameter else None
        self.state[parameter] = {name: _narrowed(value, narrow) for name, value in optimizer.state[wide].items()}
        if wide is not parameter:
            parameter.copy_(round_stochastically(wide.detach(), parameter.dtype))


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4 else value


def _narrowed(value: Any, dtype: torch.dtype | None) -> Any:
    """States go back to 16 bit, by chance as well: a mean that forgets 1/1000 a step would otherwise forget nothing. Counters stay."""
    return value if dtype is None or not isinstance(value, Tensor) or value.ndim == 0 else round_stochastically(value, dtype)
