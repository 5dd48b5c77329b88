"""The tokens of a text that stands behind another.

SentencePiece's tokenizers (Llama 2's, Mistral's, TinyLlama's) put a "▁" before what they take for the beginning of a text. Tokenised by itself an
answer would begin with one that the whole text does not have: " yes" as "▁▁yes", and "yes" behind a line break as "▁yes".
"""

from __future__ import annotations

from typing import Any

SEAM = "\n"  # what such a tokenizer never joins with what follows


def continuing_ids(tokenizer: Any, text: str, behind: str = SEAM) -> list[int]:
    """The ids of a text behind another, without special tokens of their own. tokenizer: ours or transformers'.

    behind: the other text, which counts where it ends in a special token: what follows one is a beginning, too.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not text or not marks_beginnings(tokenizer):
        return ids
    for other in (behind, SEAM):
        before, whole = (list(tokenizer.encode(each, add_special_tokens=False)) for each in (other, other + text))
        if whole[: len(before)] == before and len(whole) > len(before):  # else the two are joined in a token
            return whole[len(before) :]
    return ids


def beginning_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that nothing stands before: behind the token that a text begins with, where the tokenizer puts one there unasked."""
    ids: list[int] = list(tokenizer.encode(text, add_special_tokens=False))
    begin: list[Any] = [getattr(tokenizer, "bos_token_id", None)]
    unasked = begin != [None] and ids[:1] != begin and list(tokenizer.encode(SEAM))[:1] == begin
    return [*begin, *ids] if unasked else ids


def marks_beginnings(tokenizer: Any) -> bool:
    """Whether a letter behind a line break is another token than by itself."""
    before, whole, alone = (list(tokenizer.encode(text, add_special_tokens=False)) for text in (SEAM, f"{SEAM}a", "a"))
    return whole[: len(before)] == before and whole[len(before) :] != alone
