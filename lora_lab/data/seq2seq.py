"""Rows for encoder-decoders, which answer what they have read: T5, BART.

    {"input_ids": [...], "labels": [...]}    what the encoder reads, and all that the decoder is to write: neither is as long as the other
    instruction / input / output             the encoder reads the instruction and the input as they are, a blank line between them
    messages                                 it reads all messages before the last answer, blank lines between them

No template: such models are taught in plain words (Wei et al. 2021, arXiv:2109.01652, section 2.1; FLAN-T5: Chung et al. 2022,
arXiv:2210.11416). Either text gets the special tokens that the tokenizer adds, T5's end token behind it; an answer always ends with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LoraLabError
from .formats import Row, check_row, each_encoded
from .templates import IGNORE, Example, check_size, messages_of, need_tokenizer, token_ids


def encode_answers(rows: Sequence[Row], tokenizer: Any, max_length: int | None = None) -> list[Example]:
    """Each row as {"input_ids", "labels"}, of lengths of their own. Rows that are encoded already pass through.

    max_length: tokens either may have. Raises LoraLabError, naming the row, for one that is longer, empty, or has no labels.
    """
    return each_encoded(rows, lambda row, where: _checked(_encode(row, tokenizer, where, max_length), max_length, where))


def question_of(row: Row) -> str:
    """What an encoder-decoder reads of a row.

    >>> question_of({"instruction": "Summarize.", "input": "A long text.", "output": "Short."})
    'Summarize.\\n\\nA long text.'
    """
    return _parts(row)[0]


def _parts(row: Row) -> tuple[str, str]:
    """The question and the answer; "" where the row has none."""
    messages = messages_of(row)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    answer = messages[last]["content"] if last < len(messages) else ""
    return "\n\n".join(message["content"] for message in messages[:last]), answer


def _encode(row: Row, tokenizer: Any, where: str, max_length: int | None) -> Example:
    if isinstance(row, Mapping) and "input_ids" in row:
        return _encoded_already(row, where)
    check_row(row, where)
    question, answer = _parts(row)
    check_size((question, answer), None if max_length is None else 2 * max_length, where)
    need_tokenizer(tokenizer, where)
    eos, labels = getattr(tokenizer, "eos_token_id", None), list(tokenizer.encode(answer))
    if eos is not None and labels[-1:] != [eos]:
        labels.append(eos)
    return {"input_ids": list(tokenizer.encode(question)), "labels": labels}


def _encoded_already(row: Row, where: str) -> Example:
    """Ids and labels as given; positions that the row's own attention_mask calls padding are dropped."""
    if "labels" not in row:
        raise LoraLabError(f"{where}: input_ids without labels: an encoder-decoder needs the tokens it is to write")
    ids = token_ids(row["input_ids"], where)
    mask = token_ids(row.get("attention_mask", [1] * len(ids)), where)
    if len(mask) != len(ids):
        raise LoraLabError(f"{where}: {len(ids)} input_ids but {len(mask)} attention_mask values: expected one each")
    return {"input_ids": [token for token, text in zip(ids, mask, strict=True) if text], "labels": token_ids(row["labels"], where)}


def _checked(example: Example, max_length: int | None, where: str) -> Example:
    for name, what in (("input_ids", "question"), ("labels", "answer")):
        tokens = len(example[name])
        if max_length is not None and tokens > max_length:
            raise LoraLabError(f"{where}: the {what} has {tokens} tokens, but max_length, or the model's context, is {max_length}: shorten it, or "
                               "raise max_length where the model allows it")  # fmt: skip
    if not example["input_ids"]:
        raise LoraLabError(f"{where}: no input_ids: there is nothing to read")
    if all(label == IGNORE for label in example["labels"]):
        raise LoraLabError(f"{where}: no token of the row has a label: there is nothing to learn from it")
    return example
