"""What a task is, and what stands between it and a model.

A `Task` knows data: which shapes of files it reads, what a row of them becomes, what makes two rows the same. It knows no model.
A `Reader` is a task for one kind of model: how a row is put to it, what it learns from a row, how good its answers are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ..data.formats import Row
from ..data.tables.columns import Columns, Role, Shape
from ..data.tables.files import Table
from ..data.tables.labels import Classes
from ..errors import LoraLabError
from ..models.base import PretrainedModel, is_encoder_decoder
from ..models.causal import CausalLM
from ..wrapping import base_of

Cells = Mapping[str, Any]  # role -> what a row has there
Scores = dict[str, float]
GREEDY: dict[str, Any] = {"max_new_tokens": 64, "temperature": 0.0}

# Roles that several tasks have
LABEL = Role("label", (("label", "labels", "sentiment", "polarity", "class", "target"), ("rating", "stars", "score", "category")),
             by_values="classes")  # fmt: skip
INSTRUCTION = Role("instruction", (("instruction",), ("prompt", "question")))
INPUT = Role("input", (("input",), ("context",)), needed=False)
OUTPUT = Role("output", (("output",), ("response", "answer", "completion")))
MESSAGES = Role("messages", (("messages",), ("conversations", "conversation")))
INSTRUCTIONS = Shape("instruction, input and output (Alpaca, Dolly)", (INSTRUCTION, INPUT, OUTPUT))
SYSTEM = Role("system", (("system", "system_prompt"),), needed=False)
CHATS = Shape("messages (chat)", (MESSAGES, SYSTEM))


class Unusable(LoraLabError):
    """A row that cannot be learned from. The message is the reason, without the row's place: rows with one reason are counted together."""


@dataclass(frozen=True)
class Way:
    """How a model is asked. words: an instruction, or a template with {text} in it.  shots: rows that are shown first, with their answers."""

    words: str
    shots: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How readers compute. generation: of `models.generate`."""

    precision: str = "fp32"
    batch_size: int = 8
    generation: Mapping[str, Any] = field(default_factory=lambda: GREEDY)
    progress: bool = False


class Task:
    """name: of --task.  shapes: of data that it reads.  labelled: its rows have a class."""

    name: ClassVar[str]
    shapes: ClassVar[tuple[Shape, ...]]
    labelled: ClassVar[bool] = False

    def table(self, table: Table, columns: Mapping[str, str]) -> Table:
        """The rows of a file as the task has them, where one of the file is several. columns: role -> column, what the user has decided."""
        return table

    def row(self, cells: Cells, classes: Classes | None) -> Row:
        """The row that these cells are. Raises Unusable, or LoraLabError for what is no mere gap."""
        raise NotImplementedError

    def key(self, row: Row) -> str:
        """What may not stand in two parts of the data."""
        raise NotImplementedError

    def reader(self, model: nn.Module, tokenizer: Any, columns: Columns, classes: Classes | None, reading: Reading) -> Reader:
        """Raises LoraLabError for a model that cannot do it."""
        raise NotImplementedError


class Reader:
    """quality: the score that methods are compared by.  way: how a model that is taught is asked.

    has_words: there are words of ours around what a row says.  new_head: the model gets one, which trains beside an adapter.
    """

    quality: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    has_words: ClassVar[bool] = True
    new_head: ClassVar[bool] = False
    way: Way

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self.tokenizer, self.reading = tokenizer, reading

    def ways(self) -> list[Way]:
        """To ask a model that was not taught, the best of which is looked for."""
        raise NotImplementedError

    def ask_in(self, words: str) -> None:
        """Other words than the usual ones. Raises LoraLabError where rows are read as they are."""
        if words != self.way.words and not self.has_words:
            raise LoraLabError(f"{words!r}: rows of this task are read by this model as they are, without a template or an instruction around them")
        self.way = replace(self.way, words=words)

    def few(self, rows: Sequence[Row], count: int, seed: int) -> Way:
        """A way that shows so many rows (of each class), others for each seed. Raises LoraLabError where this model is shown none."""
        raise NotImplementedError

    def questions(self, rows: Sequence[Row], way: Way | None = None) -> list[list[int]]:
        """The tokens that the model reads of each row."""
        raise NotImplementedError

    def longest(self, rows: Sequence[Row], way: Way | None = None) -> int:
        """Tokens of the longest row in the model's context, the answer included."""
        raise NotImplementedError

    def hint(self) -> str | None:
        """What is to be done, in words that a soft prompt can begin as; None where each row says it itself."""
        return self.way.words.strip() or None

    def examples(self, rows: Sequence[Row]) -> Any:
        """The rows for `fit`: tokens, and what of them is learned."""
        raise NotImplementedError

    def shown(self, row: Row) -> str:
        """The row as the model reads it, and the answer."""
        raise NotImplementedError

    def scores(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> Scores:
        """Everything that is measured of the answers. way: None is that of a model that was taught."""
        raise NotImplementedError

    def score(self, model: nn.Module, rows: Sequence[Row], way: Way | None = None) -> float:
        """Their quality alone."""
        return self.scores(model, rows, way)[self.quality]

    def without_model(self, rows: Sequence[Row]) -> tuple[str, Scores] | None:
        """(name, scores) of an answer that needs no model, below which nothing has been learned."""
        return None

    def prepared(self, model: Any, rows: Sequence[Row]) -> Any:
        """The model that learns, rows being those it will learn from: an encoder gets a head."""
        return model

    def restored(self, model: Any) -> Any:
        """The same for an adapter that was learned earlier and brings its head along."""
        return model


def model_kind(model: nn.Module) -> str:
    """"causal", "encoder-decoder", "classifier" (an encoder with a head for classes) or "encoder". Raises LoraLabError for another."""
    base, name = base_of(model), type(base_of(model)).__name__
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    if is_encoder_decoder(base) and name.endswith("ForConditionalGeneration"):
        return "encoder-decoder"
    if isinstance(base, CausalLM):
        return "causal"
    if isinstance(base, PretrainedModel) and name.endswith("Model") and not is_encoder_decoder(base):
        return "encoder"
    raise LoraLabError(f"a {name} has no place in these tasks: expected a causal language model, an encoder-decoder, or an encoder")


def text_in(cells: Cells, role: str) -> str:
    """The text of a role. Raises Unusable where there is none."""
    value = cells.get(role)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(f"no {role}")
    if not isinstance(value, str):
        raise Unusable(f"the {role} is no text but a {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise Unusable(f"the {role} holds half of a character")  # JSON can spell one, no tokenizer takes it
    return value.strip()


def digest(*texts: str) -> str:
    """One text of several, for keys.

    >>> digest("a", "b") != digest("ab", "")
    True
    """
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
