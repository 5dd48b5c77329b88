"""Text from a prompted model: our loop for our models, transformers' own generate for its models. The text alone is what goes in and comes out.

The prompt goes in with the first step, while the cache is missing or empty, and stays in the cache; the mask is longer by it in every step.
Each step is a call of the prompted model, so rows may have different tasks, and beams and sampling are what they are without a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models import generate as our_generate
from lora_lab.models.base import PretrainedModel

from .base_model import cache_length, check_text, context_length
from .heads import inserted_before

if TYPE_CHECKING:
    from .prompted_model import PromptedModel

CROPPING = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")  # they cut the cache to the text's length, and the prompt off
GROWING = ("dynamic", "offloaded", "quantized")  # caches that have room for the prompt; others are made for the text alone


def generate(prompted: PromptedModel, *args: Any, **options: Any) -> Any:
    """What the base's own generate gives, with the prompt: the arguments are those of `lora_lab.models.generate`, or of transformers'.

    transformers' result begins with the caller's input_ids, as without a prompt; max_new_tokens and max_length count text.
    Raises LoraLabError, before anything runs, where prompt, text and max_new_tokens are more than the model has positions for, and for
    ways of generating that would lose the prompt.
    """
    base = prompted.base
    if isinstance(base, PretrainedModel):
        return our_generate(prompted, *args, **options)
    if not callable(getattr(base, "generate", None)):
        raise LoraLabError(f"a {type(base).__name__} reads text and writes none: generate needs a causal language model or an encoder-decoder")
    if all(name is None for name in prompted.rows or [prompted.active]):
        return base.generate(*args, **options)  # type: ignore[operator]
    _check(prompted, args, options)
    if prompted.kind.encodes:
        args, options = (), _encoded(prompted, args, options)
    with inserted_before(base, prompted.kind.arguments, prompted.insert, prompted.text_only):
        return base.generate(*args, **options)  # type: ignore[operator]


def _given(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
    """What is read: ids or embeddings, under any of the names transformers has for it."""
    named = (options.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return next((each for each in (*args[:1], *named) if each is not None), None)


@torch.no_grad()
def _encoded(prompted: PromptedModel, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """transformers encodes apart from the model's own forward, so it is given what the encoder makes of prompt and text (trap T12)."""
    given, options = _given(args, options), {name: value for name, value in options.items() if name not in ("inputs", "input_ids", "inputs_embeds")}
    if given is None:
        return options
    pad, mask = prompted.config.pad_token_id, options.get("attention_mask")
    if mask is None and given.ndim == 2 and pad is not None and pad != prompted.config.eos_token_id:
        mask = (given != pad).long()  # as transformers does
    inputs = {"input_ids" if given.ndim == 2 else "inputs_embeds": given, **({} if mask is None else {"attention_mask": mask})}
    inserted = prompted.insert(inputs).inputs
    encoded = inserted.get("encoder_outputs")
    if encoded is None:
        encoder: nn.Module = prompted.base.get_encoder()  # type: ignore[operator]
        encoded = encoder(**{name: value for name, value in inserted.items() if name in ("input_ids", "inputs_embeds", "attention_mask")})
    return {**options, "encoder_outputs": encoded, **({} if mask is None else {"attention_mask": mask})}


def _asked(options: dict[str, Any], name: str, otherwise: Any = None) -> Any:
    """A setting of this call, or of the generation_config it is given; else that of `otherwise`, the model's own."""
    found = (options.get(name), *(getattr(config, name, None) for config in (options.get("generation_config"), otherwise)))
    return next((value for value in found if value is not None), None)


def _check(prompted: PromptedModel, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    own = getattr(prompted.base, "generation_config", None)
    for name in CROPPING:
        if _asked(options, name, own) is not None:
            raise LoraLabError(f"{name} with a prompt: it would cut the prompt's part off the cache; leave it out")
    if (cache := _asked(options, "cache_implementation", own)) not in (None, *GROWING):
        raise LoraLabError(f"cache_implementation={cache!r} with a prompt: it makes room for the text alone; leave it out, or take one of "
                           f"{', '.join(GROWING)}")  # fmt: skip
    if cache_length(options.get("past_key_values")):
        raise LoraLabError("past_key_values that are not empty: transformers' generate would count the prompt in them as text. Call the prompted "
                           "model itself to go on from a cache, or generate without one")  # fmt: skip
    given, context = _given(args, options), context_length(prompted.base, prompted.kind)
    if given is None:
        return
    check_text({"input_ids" if given.ndim < 3 else "inputs_embeds": given}, prompted.get_input_embeddings().embedding_dim, prompted.kind.encodes)
    new, longest = (_asked(options, name) for name in ("max_new_tokens", "max_length"))
    if new is None and longest is not None:
        new = longest - given.shape[1]
    if new is None or context is None or prompted.kind.encodes:
        return
    mask, virtual = options.get("attention_mask"), prompted.virtual_tokens
    text = given.shape[1] if mask is None else int(mask.sum(1).max())
    if virtual + text + new > context:
        raise LoraLabError(f"{virtual} virtual tokens, a text of {text} and max_new_tokens={new} are {virtual + text + new} positions, the model's "
                           f"context is {context}: shorten the text or lower max_new_tokens by {virtual + text + new - context}")  # fmt: skip
