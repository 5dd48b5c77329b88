"""Rows to prompts, and prompts to labelled token ids.

The prompt's tokens get the label -100, so that only the answer is learned. Prompt and answer are tokenised apart: at inference the
prompt also comes without the answer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import LoraLabError
from .continuation import continuing_ids
from .formats import Row, check_row, each_encoded

LONGEST_TOKEN = 256  # characters: those of vocabularies are far shorter, but for runs of spaces
IGNORE = -100  # the label of a token that is not learned: PyTorch's cross-entropy skips it
Example = dict[str, list[int]]

# Taori et al. 2023, Stanford Alpaca: for models without a chat template.
ALPACA = ("Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n{input}### Response:\n")  # fmt: skip


def messages_of(row: Row) -> list[dict[str, str]]:
    """Any row as messages; an instruction and its input become the user's one message."""
    if "messages" in row:
        return list(row["messages"])
    answer = [{"role": "assistant", "content": row["output"]}] if "output" in row else []
    return [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input") or "")))}, *answer]


def _told(row: Row) -> list[dict[str, str]]:
    """The same for a template: beside the user's content stand the instruction and the input, for formats that have a place for each."""
    first, *others = messages_of(row)
    return [first, *others] if "messages" in row else [{**first, "instruction": row["instruction"], "input": row.get("input") or ""}, *others]


def prompt_of(row: Row, tokenizer: Any) -> str:
    """The text after which the model is to answer: the row rendered without its last answer."""
    if has_chat_template(tokenizer):
        messages = _told(row)
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    if "messages" in row:
        raise LoraLabError("this tokenizer has no chat template, so rows with messages cannot be rendered: use instruction / input / output rows")
    given, bos = row.get("input") or "", getattr(tokenizer, "bos_token_id", None)
    start = "" if bos is None else str(tokenizer.decode([bos], skip_special_tokens=False))
    return start + ALPACA.format(instruction=row["instruction"], input=f"### Input:\n{given}\n\n" if given else "",
                                 paired=", paired with an input that provides further context" if given else "")  # fmt: skip


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def encode_rows(rows: Sequence[Row], tokenizer: Any, max_length: int | None = None) -> list[Example]:
    """Each row as {"input_ids", "labels"}; labels are -100 on the prompt. Rows that are encoded already pass through.

    max_length: tokens a row may have. Raises LoraLabError, naming the row, for one that is longer, empty, or has no labels.
    """
    return each_encoded(rows, lambda row, where: _checked(_encode(row, tokenizer, where, max_length), max_length, where))


def _encode(row: Row, tokenizer: Any, where: str, max_length: int | None = None) -> Example:
    if isinstance(row, Mapping) and "input_ids" in row:
        return _encoded_already(row, where)
    check_row(row, where)
    check_size((message["content"] for message in messages_of(row)), max_length, where)
    need_tokenizer(tokenizer, where)
    pieces = _chat_pieces(row, tokenizer, where) if has_chat_template(tokenizer) else _alpaca_pieces(row, tokenizer)
    example: Example = {"input_ids": [], "labels": []}
    for ids, learned in pieces:
        example["input_ids"] += ids
        example["labels"] += ids if learned else [IGNORE] * len(ids)
    return example


def check_size(texts: Iterable[str], max_length: int | None, where: str) -> None:
    """Raise LoraLabError for what cannot be so few tokens, before a tokenizer takes a hundred bytes for each of its characters."""
    characters = sum(map(len, texts))
    if max_length is not None and characters > max_length * LONGEST_TOKEN:
        raise LoraLabError(f"{where}: the row has {characters:,} characters, which cannot be {max_length} tokens (max_length, or the model's "
                           "context): shorten the row")  # fmt: skip


def need_tokenizer(tokenizer: Any, where: str) -> None:
    if tokenizer is None:
        raise LoraLabError(f"{where} is text, so a tokenizer is needed: fit(model, rows, tokenizer=tokenizer)")


def token_ids(values: Any, where: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise LoraLabError(f"{where}: input_ids and labels are {values!r:.60}, expected lists of whole numbers") from None


def _encoded_already(row: Row, where: str) -> Example:
    """Ids and labels as given; positions that the row's own attention_mask calls padding are dropped."""
    ids, labels = token_ids(row["input_ids"], where), token_ids(row.get("labels", row["input_ids"]), where)
    mask = token_ids(row.get("attention_mask", [1] * len(ids)), where)
    if not len(ids) == len(labels) == len(mask):
        raise LoraLabError(f"{where}: {len(ids)} input_ids but {len(labels)} labels and {len(mask)} attention_mask values: expected one each")
    kept = [index for index, text in enumerate(mask) if text]
    return {"input_ids": [ids[index] for index in kept], "labels": [labels[index] for index in kept]}


def _chat_pieces(row: Row, tokenizer: Any, where: str) -> Iterator[tuple[list[int], bool]]:
    """(ids, learned?) turn by turn: what the template writes between answers, and each answer up to its end token."""
    messages, done, ends = _told(row), "", _end_ids(tokenizer)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _rendered(tokenizer, messages[:turn], where, add_generation_prompt=True)
        whole = _rendered(tokenizer, messages[: turn + 1], where)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise LoraLabError(f"{where}: the chat template rewrites earlier turns, so the answers cannot be told from the prompt")
        asked = prompt[len(done) :]
        yield continuing_ids(tokenizer, asked, done) if done else tokenizer.encode(asked, add_special_tokens=False), False
        answer = continuing_ids(tokenizer, whole[len(prompt) :], prompt)
        end = max((i + 1 for i, token in enumerate(answer) if token in ends), default=len(answer))
        yield answer[:end], True
        yield answer[end:], False  # ChatML's line break: generation has stopped before it
        done = whole


def _rendered(tokenizer: Any, messages: list[dict[str, str]], where: str, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template refuses with jinja2's error, with ours, or with whatever its code runs into
        raise LoraLabError(f"{where}: {error}") from None


def _end_ids(tokenizer: Any) -> set[int | None]:
    """What ends an answer: our tokenizers know several ids, transformers' one."""
    return {*(getattr(tokenizer, "end_ids", None) or [getattr(tokenizer, "eos_token_id", None)])}


def _alpaca_pieces(row: Row, tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    eos = getattr(tokenizer, "eos_token_id", None)
    prompt = prompt_of(row, tokenizer)
    yield tokenizer.encode(prompt, add_special_tokens=False), False
    yield [*continuing_ids(tokenizer, row["output"], prompt), *([eos] if eos is not None else [])], True


def _checked(example: Example, max_length: int | None, where: str) -> Example:
    tokens = len(example["input_ids"])
    if tokens != len(example["labels"]):
        raise LoraLabError(f"{where}: {tokens} input_ids but {len(example['labels'])} labels: expected one label each")
    if max_length is not None and tokens > max_length:
        raise LoraLabError(f"{where}: the row has {tokens} tokens, but max_length, or the model's context, is {max_length}: shorten the row, "
                           "or raise max_length where the model allows it")  # fmt: skip
    if all(label == IGNORE for label in example["labels"][1:]):
        raise LoraLabError(f"{where}: no token of the row has a label: there is nothing to learn from it")
    return example
