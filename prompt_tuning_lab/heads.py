"""Models with a head that pools hidden states or points at them: classes of a text or of its tokens, answer spans, words under masks.

    hidden = backbone([prompt; text])      the prompt is put in before the backbone
    logits = head(hidden of the text)      and taken out right behind it

So the head, its pooling, labels and start and end positions see the text alone: BERT's head reads [CLS] and not a virtual token, GPT-2's
finds the last word by the ids it knows, positions of an answer are the text's own (traps T15 and T15b).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError

from .insertion import Inserted

Insert = Callable[[dict[str, Any]], Inserted]


@contextlib.contextmanager
def inserted_before(
    backbone: nn.Module, arguments: Sequence[str], insert: Insert, text_only: Callable[[Any, Inserted], Any]
) -> Iterator[None]:
    """Inside the block a call of `backbone` reads the prompt, too, and gives back what belongs to the text. For one call: hooks, gone after it.

    arguments: of the backbone's forward, in their order.  insert: from what it is called with to what it is called with instead.
    text_only: takes the prompt out of the output again.  Other threads that call the backbone meanwhile have their own block, or none.
    """
    calls: list[Inserted] = []
    caller = _thread()

    def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _thread() != caller:
            return None
        inputs = {**dict(zip(arguments, args, strict=False)), **given}
        inputs.pop("cache_position", None)  # transformers 4 counts the text's; without it the model counts its cache
        calls.append(insert(inputs))
        return (), calls[-1].inputs

    def after(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        return text_only(out, calls.pop()) if _thread() == caller else None

    handles = [backbone.register_forward_pre_hook(before, with_kwargs=True), backbone.register_forward_hook(after, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def pooled(backbone: Any, hidden: Tensor, before: Tensor) -> Tensor:
    """The pooler's output for the text's own first position. hidden: [B, T, H].  before: [B, H], what it made of a virtual token.

    Raises LoraLabError for a pooler that is no function of the hidden states.
    """
    pooler, result = getattr(backbone, "pooler", None), None
    if isinstance(pooler, nn.Linear):  # ALBERT and BigBird keep their poolers in two parts
        activation = getattr(backbone, "pooler_activation", None) or getattr(backbone, "activation", None)
        result = activation(pooler(hidden[:, 0])) if callable(activation) else None
    elif pooler is not None:
        result = pooler(hidden)
    if not isinstance(result, Tensor) or result.shape != before.shape:
        raise LoraLabError(f"a {type(backbone).__name__} makes its pooler_output in a way that is not known here, so it cannot be made again of the "
                           "text alone: use a prefix, which has no positions among the text's")  # fmt: skip
    return result
