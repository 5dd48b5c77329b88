"""Amounts that need not be whole: tokens, operations, speeds, prices, and shares of a peak."""

from __future__ import annotations

from numbers import Real

from .errors import MemoryMathError

LEAST, MOST = 1e-100, 1e100  # of an amount: products and quotients of a few stay numbers that a float can hold


def positive(name: str, value: object) -> float:
    """`value`, where it is a number above 0, as an int or a float; an int of any size is compared without becoming a float.

    >>> positive("tokens", 2e12)
    2000000000000.0
    """
    try:
        number = value if isinstance(value, (int, float)) else float(value) if isinstance(value, Real) else None
    except OverflowError:
        number = None
    if isinstance(value, bool) or number is None or not LEAST <= number <= MOST:
        raise MemoryMathError(f"{name}={value!r}: expected a number above 0, from {LEAST:g} to {MOST:g}")
    return number


def share(name: str, value: object) -> float:
    """`value` as it is, where it is a part of the peak."""
    part = positive(name, value)
    if part > 1:
        raise MemoryMathError(f"{name}={value!r}: expected a share of the peak, above 0 and at most 1 (45 % is 0.45)")
    return part
