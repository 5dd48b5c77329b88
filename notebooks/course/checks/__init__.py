"""Checks of the exercises: they print "yes: ..." or "not yet: ..." with the likely mistake, and never raise.

A check is a function of the learner's answer (or answers). It raises `NotYet` for what is wrong and returns the words for what is right:

    @check
    def trainable_weights(answer):
        count = result(answer, 512, 64, 8)                                   # calls the learner's function; a stub, a typo inside: "not yet"
        refuse(count, {32_768: "that is W itself, 512 × 64, which stays frozen: count A and B"})
        expect(equal(count, 4_608), f"it says {count}; A is [8, 512] and B is [64, 8]")
        return "4,608 instead of 32,768: 85.9 % fewer."

Each module here belongs to the notebook of its name; `tests/notebooks/test_checks_<module>.py` gives each check right and wrong answers.
"""

from __future__ import annotations

import functools
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class NotYet(Exception):
    """The answer is not right yet; the message names the likely mistake."""


def check(function: Callable[..., str]) -> Callable[..., None]:
    """Make a check of a function that returns what a right answer shows, and raises NotYet for any other.

    Whatever else goes wrong with an answer is caught, too. Random numbers of the notebook are left as they were.
    """

    @functools.wraps(function)
    def checked(*answers: Any) -> None:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            print(_verdict(function, answers))

    checked.is_check = True  # type: ignore[attr-defined]
    return checked


def _verdict(function: Callable[..., str], answers: tuple[Any, ...]) -> str:
    try:
        return f"yes: {function(*answers)}"
    except NotYet as reason:
        return f"not yet: {reason}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever an answer may be, a lesson goes on
        return f"not yet: your answer is of a kind that cannot be checked ({_short(error)})"


# What checks are made of ---------------------------------------------------------------------------------------------------------


def expect(truth: Any, otherwise: str) -> None:
    """Raise NotYet with these words unless it is true."""
    if not truth:
        raise NotYet(otherwise)


def refuse(value: Any, mistakes: Mapping[Any, str], relative: float = 1e-3) -> None:
    """Raise NotYet with the words of the wrong number that this is."""
    for wrong, words in mistakes.items():
        if equal(value, wrong, relative):
            raise NotYet(words)


def result(function: Any, *arguments: Any, **named: Any) -> Any:
    """What the learner's function returns for these arguments. Raises NotYet where it is none, fails inside, or returns nothing."""
    if function is None or function is ...:
        raise NotYet("there is no answer yet: write it in place of the ...")
    if not callable(function):
        raise NotYet(f"give the function itself, without calling it: this is {_shown(function)}")
    try:
        value = function(*arguments, **named)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NotYet(f"your code stops with {_short(error)}{_line(error)}") from None
    if value is None or value is ...:
        raise NotYet("your function returns nothing yet: put your code in place of the ..., and end it with return")
    return value


def number(value: Any, what: str = "the answer") -> float:
    """The value as a float. Raises NotYet for what is no number, and for one that is not finite."""
    if value is None or value is ...:
        raise NotYet("there is no answer yet: write it in place of the ...")
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise NotYet(f"{what} is {_shown(value)}, expected a number")
    if not math.isfinite(value):
        raise NotYet(f"{what} is {value}: something was divided by zero, or overflowed")
    return float(value)


def tensor(value: Any, shape: tuple[int, ...], what: str = "the answer") -> Tensor:
    """The value as a tensor of this shape. Raises NotYet for any other."""
    if not isinstance(value, Tensor):
        raise NotYet(f"{what} is {_shown(value)}, expected a tensor {list(shape)}")
    if tuple(value.shape) != tuple(shape):
        raise NotYet(f"{what} has the shape {list(value.shape)}, expected {list(shape)}")
    return value.detach()


def equal(left: Any, right: Any, relative: float = 1e-4) -> bool:
    """Whether two numbers or tensors agree, but for rounding; what cannot be compared does not."""
    try:
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            a, b = torch.as_tensor(left).detach().double(), torch.as_tensor(right).detach().double()
            return a.shape == b.shape and bool(torch.allclose(a, b, rtol=relative, atol=relative * max(float(b.abs().max()), 1e-12)))
        return bool(abs(left - right) <= relative * max(abs(right), 1e-12))
    except Exception:
        return False


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "something that cannot be shown"
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _short(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        lines = []
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def _line(error: BaseException) -> str:
    """Where in the learner's cell it happened; nothing where the call itself does not fit."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    inside = [frame for frame in frames if "site-packages" not in frame.filename and frame.line]
    return f", in the line: {inside[0].line.strip()}" if inside else ""
