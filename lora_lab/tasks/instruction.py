"""Do as you are told: instruction, input and output, or whole chats."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..data.formats import ROLES, Row, check_row
from ..data.tables.columns import Columns
from ..data.tables.labels import Classes
from ..errors import LoraLabError
from .base import CHATS, INSTRUCTIONS, Cells, Reader, Reading, Task, Unusable, Way, digest, model_kind, text_in
from .writing import Writer

SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", **{role: role for role in ROLES}}  # ShareGPT's names: "from", "value"


class Instruction(Task):
    name = "instruction"
    shapes = (INSTRUCTIONS, CHATS)

    def row(self, cells: Cells, classes: Classes | None) -> Row:
        return chat(cells["messages"], cells.get("system")) if "messages" in cells else instructed(cells)

    def key(self, row: Row) -> str:
        """What is asked; of a chat the first question, for a system message may be that of every row."""
        if "instruction" in row:
            return digest(row["instruction"], row["input"])
        return digest(next(turn["content"] for turn in row["messages"] if turn["role"] != "system"))

    def request(self, row: Row, words: str) -> Row:
        return row

    def reader(self, model: nn.Module, tokenizer: Any, columns: Columns, classes: Classes | None, reading: Reading) -> Reader:
        return writer_of(self, model, tokenizer, reading)


def writer_of(task: Any, model: nn.Module, tokenizer: Any, reading: Reading) -> Writer:
    """Raises LoraLabError for a model that writes no text."""
    if (kind := model_kind(model)) not in ("causal", "encoder-decoder"):
        raise LoraLabError(f"a {type(model).__name__} reads text and writes none: answers need a causal language model or an encoder-decoder")
    return Writer(task, tokenizer, reading, kind == "encoder-decoder", [Way("")])


def instructed(cells: Cells) -> Row:
    """The row of an instruction. Raises Unusable where something is missing."""
    given = cells.get("input")
    if given is not None and not isinstance(given, str):
        raise Unusable(f"the input is no text but a {type(given).__name__}")
    return {"instruction": text_in(cells, "instruction"), "input": (given or "").strip(), "output": text_in(cells, "output")}


def chat(cell: Any, system: Any = None) -> Row:
    """The row of a chat: role and content, or ShareGPT's from and value; in a table as JSON. Raises Unusable for what is none.

    system: a column of its own for the message that goes first.
    """
    if system is not None and not isinstance(system, str):
        raise Unusable(f"the system message is no text but a {type(system).__name__}")
    try:
        turns = json.loads(cell) if isinstance(cell, str) else cell
        messages = [{"role": SPEAKERS[turn.get("role", turn.get("from"))], "content": turn.get("content", turn.get("value"))} for turn in turns]
        first = messages[:1] if messages and messages[0]["role"] == "system" else []
        talk = messages[len(first) :]
        while talk and talk[0]["role"] == "assistant":  # ShareGPT's talks may begin in the middle
            talk = talk[1:]
        if not first and isinstance(system, str) and system.strip():
            first = [{"role": "system", "content": system}]
        messages = [*first, *talk]
        check_row({"messages": messages}, "the chat")
    except (ValueError, TypeError, AttributeError, KeyError):  # LoraLabError is a ValueError
        raise Unusable("no chat of user and assistant") from None
    if messages[-1]["role"] != "assistant":
        raise Unusable("the chat does not end with an answer")
    return {"messages": messages}
