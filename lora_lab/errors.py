"""The one error class of the library, and the phrase that suggests what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraLabError(ValueError):
    """A mistake in what the caller asked for: the message names the value, what was expected and the likely fix."""


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """`` (did you mean 'gate_proj'?)``, or nothing where no choice is close.

    >>> did_you_mean("gate_porj", ["q_proj", "gate_proj"])
    " (did you mean 'gate_proj'?)"
    """
    near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
