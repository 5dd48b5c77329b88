"""What is demanded of every check of an exercise: the right answers pass, and the stub and each wrong answer hear what is wrong with them.

    def test_trainable_weights():
        each_gets_its_own(
            check.trainable_weights,
            right=[lambda i, o, r: r * (i + o)],
            wrong={"W itself": lambda i, o, r: i * o, "only A": lambda i, o, r: r * i, "B is": lambda i, o, r: 2 * r * i},
        )

The keys of `wrong` are words of the message that names the mistake. An answer that is a tuple is the check's several arguments.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


def stub(*_: Any, **__: Any) -> None: ...


def fails(*_: Any, **__: Any) -> Any:
    raise KeyError("a name that is not there")


def leaves(*_: Any, **__: Any) -> Any:
    raise SystemExit("leaving")


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError("no text of me")


JUNK = (
    None, ..., "text", b"", 0, -1, True, float("nan"), float("inf"), [], {}, object(), int, Unshowable(), Unshowable, torch.full((2, 2), torch.nan),
    torch.empty(0), stub, fails, leaves, lambda: None, lambda *_, **__: "text", lambda *_, **__: float("nan"), lambda *_, **__: torch.ones(3, 1, 2),
    lambda *_, **__: [[]], lambda *_, **__: Unshowable(),
)  # fmt: skip


def said(check: Callable[..., None], answer: Any) -> str:
    """What the check prints; it may not raise, and returns nothing."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert check(*(answer if isinstance(answer, tuple) else (answer,))) is None
    return out.getvalue().strip()


def each_gets_its_own(check: Callable[..., None], right: Iterable[Any], wrong: Mapping[str, Any], *, arguments: int = 1) -> None:
    """Assert all of it. right: answers, at least one.  wrong: words of the message -> an answer, at least three.  arguments: of the check."""
    for answer in right:
        assert said(check, answer).startswith("yes: "), said(check, answer)
    assert said(check, (stub,) * arguments).startswith("not yet: "), said(check, (stub,) * arguments)
    assert len(wrong) >= 3, "an exercise has at least three plausible wrong answers"
    messages = {words: said(check, answer) for words, answer in wrong.items()}
    for words, message in messages.items():
        assert message.startswith("not yet: "), f"{words!r} is taken for right: {message}"
        assert words in message, f"expected {words!r} in: {message}"
    assert len({*messages.values()}) == len(messages), f"two mistakes get the same words: {messages}"
    for junk in JUNK:
        assert said(check, (junk,) * arguments).startswith("not yet: "), repr(type(junk))
