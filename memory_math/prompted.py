"""A live model with prompts before it, as prompt_tuning_lab makes them: the model that it is about, and what stands before that one's texts.

It is known by its attributes: `lora_base` is the model inside (architectures.py), `tasks` has a prompt for each name, and `active` is the name
whose turn it is. A prompt has a `method`, `num_virtual_tokens`, and the `hidden_size` of the network that makes it, or None.
"""

from __future__ import annotations

from typing import Any

from .architectures import base_of
from .request import VIRTUAL, Usual


def prompt_of(source: object) -> dict[str, Any]:
    """Keywords of `predict` for the active task of a prompted model; none where no task is active, or there are no tasks."""
    tasks, active = getattr(source, "tasks", {}), getattr(source, "active", None)
    if base_of(source) is source or not isinstance(active, str) or active not in tasks:
        return {}
    prompt = tasks[active]
    projected = prompt.method == "prefix" and prompt.hidden_size is not None
    return {"prompt": prompt.method, "num_virtual_tokens": prompt.num_virtual_tokens, "encoder_hidden_size": prompt.hidden_size,
            "prefix_projection": projected}  # fmt: skip


def with_prompt_of(source: object, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked, filled up with what the source has before its texts where virtual tokens play a part."""
    found = prompt_of(source)
    if not found or (asked["method"] not in VIRTUAL and asked["method"] != "inference"):
        return asked
    if isinstance(asked["num_virtual_tokens"], Usual):
        asked = {**asked, "num_virtual_tokens": found["num_virtual_tokens"]}
    if asked["method"] == "inference" and asked["prompt"] is None:
        asked = {**asked, "prompt": found["prompt"]}
    if found["prompt"] not in (asked["method"], asked["prompt"]):
        return asked  # another kind is asked for, whose network this one's is not
    return {**asked, **{name: found[name] for name in ("encoder_hidden_size", "prefix_projection") if asked[name] is None}}
