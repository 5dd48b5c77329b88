"""What a model writes, in batches; and before and after beside each other."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import nn

from ...adapters import check_names, disabled, use
from ...data.seq2seq import question_of
from ...errors import LoraLabError
from .before_after import check_switchable
from .passes import Prompt
from .writing import write

CELL = 'style="border: 1px solid #d9d9d9; padding: 0.4em 0.7em; text-align: left; vertical-align: top; white-space: pre-wrap"'


def answers(model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, *, batch_size: int = 8, seed: int = 0, progress: bool = True,
            **generation: Any) -> list[str]:  # fmt: skip
    """The model's text for each prompt, in their order, generated in batches of like length.

    prompts: texts, token ids, or rows, whose own answer is left out.  seed: prompt i samples from its own stream seed + i.
    generation: as `models.generate` takes it (max_new_tokens, temperature, ...); greedy without.
    """
    return [each.text for each in write(model, prompts, tokenizer, batch_size=batch_size, seed=seed, progress=progress, **generation)]


def samples(model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, *, adapters: Mapping[str, str | None] | None = None,
            before: Sequence[str] | None = None, **options: Any) -> Samples:  # fmt: skip
    """The same prompts and the same random numbers in every column: before (adapters off) and after (as the model is).

    adapters: other columns, heading -> adapter, or None for the model without any.  before: the texts written earlier, for weights that were
    trained themselves and cannot be switched off.  options: as `answers` takes them.
    Raises LoraLabError where before and after would be the same.
    """
    if adapters is not None:
        check_names(model, [name for name in adapters.values() if name is not None], f"samples(adapters={dict(adapters)!r})")
    elif before is None:
        check_switchable(model, "before=the texts from before training")
    elif len(before) != len(prompts):
        raise LoraLabError(f"before has {len(before)} texts for {len(prompts)} prompts: expected one each")
    columns: dict[str, list[str]] = {} if before is None else {"before": list(before)}
    for heading, name in {"before": None, "after": ""}.items() if adapters is None else adapters.items():
        if heading not in columns:
            with _selected(model, name):
                columns[heading] = answers(model, prompts, tokenizer, **options)
    return Samples([_shown(prompt, tokenizer) for prompt in prompts], columns)


@contextlib.contextmanager
def _selected(model: nn.Module, name: str | None) -> Iterator[None]:
    """With this adapter alone, with none, or ("") with those that are active; the selection comes back."""
    if name == "":
        yield
        return
    with disabled(model):
        if name is not None:
            use(model, name)
        yield


def _shown(prompt: Prompt, tokenizer: Any) -> str:
    if isinstance(prompt, Mapping):
        return question_of(dict(prompt))
    return prompt if isinstance(prompt, str) else str(tokenizer.decode(list(prompt)))


@dataclass(frozen=True)
class Samples:
    """columns: heading -> a text for each prompt. Prints as a text table; in a notebook it is an HTML table."""

    prompts: list[str]
    columns: dict[str, list[str]]

    def table(self, width: int = 120) -> str:
        """Each prompt above its texts, `width` characters wide."""
        each = max((width - 3 * (len(self.columns) - 1)) // len(self.columns), 12)
        return "\n\n".join(self._block(row, each, width) for row in range(len(self.prompts)))

    def _block(self, row: int, each: int, width: int) -> str:
        cells = [[heading, "-" * each, *_wrapped(texts[row], each)] for heading, texts in self.columns.items()]
        height = max(map(len, cells))
        lines = [" | ".join((cell[i] if i < len(cell) else "").ljust(each) for cell in cells).rstrip() for i in range(height)]
        return "\n".join([*(f"> {line}" for line in _wrapped(self.prompts[row], width - 2)), *lines])

    def markdown(self) -> str:
        rows = [["prompt", *self.columns], ["---"] * (1 + len(self.columns)), *self._rows()]
        return "\n".join("| " + " | ".join(map(_markdown, row)) + " |" for row in rows) + "\n"

    def html(self) -> str:
        """A table that brings its own looks, with nothing outside it; every text is escaped."""
        head = "".join(f"<th {CELL}>{escape(heading)}</th>" for heading in ("prompt", *self.columns))
        body = "\n".join("<tr>" + "".join(f"<td {CELL}>{escape(text)}</td>" for text in row) + "</tr>" for row in self._rows())
        return f'<table style="border-collapse: collapse">\n<tr>{head}</tr>\n{body}\n</table>\n'

    def _rows(self) -> list[list[str]]:
        return [[prompt, *(texts[row] for texts in self.columns.values())] for row, prompt in enumerate(self.prompts)]

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return self.html()


def _wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() for line in textwrap.wrap(part, width)] or ["(nothing)"]


def _markdown(text: str) -> str:
    return escape(text, quote=False).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
