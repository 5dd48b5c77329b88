"""Texts with a label, as a language model reads and answers them: the text in a template's place, a word for each label.

    template = "Review: {text}\\nSentiment:"      answers = [" negative", " positive"]
    rows = verbalize(rows, tokenizer, template, answers)                        for `fit`: only the answer has labels
    questions = [read_ids(filled(template, row), tokenizer) for row in rows]
    scores = score_choices(model, questions, tokenizer, answers, end=True)      taught with the end, so scored with it

Source: Schick & Schuetze 2021 (arXiv:2001.07676), section 3: pattern and verbalizer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from ..errors import LoraLabError
from .continuation import beginning_ids, continuing_ids
from .formats import Row, Rows, check_labelled, each_encoded
from .templates import IGNORE, Example, need_tokenizer


def filled(template: str, row: Row) -> str:
    """The template with the row's text (and text_pair) in it. Raises LoraLabError for a template without {text}.

    >>> filled("Review: {text}\\nSentiment:", {"text": "Dull {and} long.", "label": 0})
    'Review: Dull {and} long.\\nSentiment:'
    """
    if "{text}" not in template:
        raise LoraLabError(f"template {template!r} has no {{text}}, where the row's text is to stand")
    return re.sub(r"\{(text|text_pair)\}", lambda place: str(row.get(place[1], "")), template)


def verbalize(rows: Sequence[Row], tokenizer: Any, template: str, answers: Sequence[str], *, end: bool = True, encodes: bool = False) -> Rows:
    """Each text/label row as {"input_ids", "labels"}: the filled template, and behind it the answer, which alone has labels.

    answers: of each label, in their order, as they stand behind the template, the blank included: " positive".  end: the stop token is learned,
    too, so that generation ends behind the answer.  encodes: for an encoder-decoder, whose labels are the answer itself.
    Raises LoraLabError, naming the row, for one without text or label, and for a label that has no answer.
    """

    ids = {} if tokenizer is None else {text: answer_ids(text, tokenizer, encodes) for text in answers}

    def encode(row: Row, where: str) -> Example:
        check_labelled(row, where)
        need_tokenizer(tokenizer, where)
        answer = ids[answers[place_of(row.get("label"), answers, where)]]
        stop = [tokenizer.eos_token_id] if (end or encodes) and getattr(tokenizer, "eos_token_id", None) is not None else []
        read = read_ids(filled(template, row), tokenizer, encodes)
        if encodes:
            return {"input_ids": read, "labels": [*answer, *stop]}
        return {"input_ids": [*read, *answer, *stop], "labels": [IGNORE] * len(read) + [*answer, *stop]}

    encoded = each_encoded(rows, encode)
    return Rows(encoded, rows.source, rows.lines) if isinstance(rows, Rows) else Rows(encoded)


def read_ids(text: str, tokenizer: Any, encodes: bool = False) -> list[int]:
    """A filled template as the model reads it: a causal model's begins as its tokenizer begins every text (Llama's with <s>)."""
    return list(tokenizer.encode(text)) if encodes else beginning_ids(tokenizer, text)


def answer_ids(text: str, tokenizer: Any, encodes: bool = False) -> list[int]:
    """An answer's tokens, without its end. An encoder-decoder's text begins with it."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if encodes else continuing_ids(tokenizer, text)


def one_begins_another(answers: Sequence[str], tokenizer: Any, encodes: bool = False) -> bool:
    """Whether the tokens of one answer are the first ones of another, such as of " billing" and " billing dispute".

    The longer one is never the likelier then: answers have to be taught and scored with their end.
    """
    ids = [answer_ids(answer, tokenizer, encodes) for answer in answers]
    return any(left == right[: len(left)] for left, right in itertools.permutations(ids, 2))


def place_of(label: Any, answers: Sequence[str], where: str) -> int:
    """The place of a label among the answers: its number, or the answer itself. Raises LoraLabError, beginning with `where`, for another.

    >>> place_of(1, [" no", " yes"], "row 0"), place_of("yes", [" no", " yes"], "row 0")
    (1, 1)
    """
    if isinstance(label, int) and 0 <= label < len(answers):
        return label
    matching = [index for index, answer in enumerate(answers) if isinstance(label, str) and answer.strip() == label.strip()]
    if not matching:
        raise LoraLabError(f"{where}: its answer {label!r:.60} is none of the choices {list(answers)!r:.200}")
    return matching[0]
