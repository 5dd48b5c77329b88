"""Libraries whose memory behaviour changed, and since when.

`predict(..., versions={"transformers": "4.28", "bitsandbytes": "0.41.1"})` asks for a step as these versions ran it; a library that is not
named is the one the models here were written from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import MemoryMathError

CURRENT = {"torch": "2.13", "transformers": "5.23", "bitsandbytes": "0.49"}


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version as a tuple that sorts; zeros at the end are left out, for 2 and 2.0 are one version.

    >>> release("0.43.2.dev0") < release("0.43.10"), release("2") == release("2.0")
    (True, True)
    """
    numbers = re.match(r"\d+(\.\d+)*", str(version))
    if numbers is None:
        raise MemoryMathError(f"version {version!r}: expected something like '4.44' or '0.43.2'")
    release = [int(number) for number in numbers.group().split(".")]
    while release and not release[-1]:
        release.pop()
    return tuple(release)


@dataclass(frozen=True)
class Versions:
    """asked: what the user named."""

    asked: Mapping[str, str] = field(default_factory=dict)

    def before(self, library: str, version: str) -> bool:
        """Whether `library` is older than `version` in this request."""
        return release(self.asked.get(library, CURRENT[library])) < release(version)


def versions_of(asked: object) -> Versions:
    """The versions of a request, or MemoryMathError.

    >>> versions_of({"transformers": "4.28"}).before("transformers", "4.45")
    True
    """
    if asked is None:
        return Versions()
    if not isinstance(asked, Mapping):
        raise MemoryMathError(f"versions={asked!r}: expected a dict like {{'transformers': '4.44'}}")
    for library, version in asked.items():
        if library not in CURRENT:
            raise MemoryMathError(f"versions names {library!r}, expected {', '.join(CURRENT)}: of no other library are older versions modelled")
        release(version)
    return Versions(dict(asked))


def kept_inputs(versions: Versions) -> frozenset[str]:
    """Operations of PyTorch that kept their input for backward although they did not need it.

    softmax and log_softmax before 1.11 (pull request 65242), mean before 2.2 (issue 109876, pull request 109935).

    >>> sorted(kept_inputs(versions_of({"torch": "2.1"})))
    ['mean']
    """
    since = {"softmax": "1.11", "mean": "2.2"}
    return frozenset(name for name, version in since.items() if versions.before("torch", version))
