"""Small models in float64, ours and transformers' of one random weight, and ways to run them under prefixes."""

from __future__ import annotations

import contextlib
from typing import Any

import bert_tools
import decoder_tools
import llama_tools
import t5_tools
import torch
import transformers
from torch import Tensor, nn

from prompt_tuning_lab.prefix import random_prefix
from prompt_tuning_lab.prefix_cache import encode, new_cache, prefix_shape, refuse_dropped
from prompt_tuning_lab.prefix_insertion import _encoded, cache_asked_for, insert_prefixes, prefix_block, without_cache

CAUSAL = ["gpt2", "neox", "falcon-7b", "falcon-rw-1b", "llama", "mistral", "qwen2"]
WINDOW = 4  # of the Mistral


def both(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """{"ours": model, "theirs": model}, in eval mode."""
    theirs = _theirs(name).eval()
    tools = t5_tools if name.startswith("t5") else bert_tools if name.startswith(("Bert", "Roberta")) else decoder_tools
    return {"ours": tools.ours(theirs).to(dtype), "theirs": theirs.to(dtype)}


def model(side: str, name: str, dtype: torch.dtype = torch.float64) -> Any:
    return both(name, dtype)[side]


def _theirs(name: str) -> Any:
    torch.manual_seed(0)
    if name.startswith("t5"):  # transformers' own generate cannot run a decoder that is deeper than its encoder
        return t5_tools.theirs("1.1", **({"num_layers": 3, "num_decoder_layers": 2} if name == "t5-deep-encoder" else {}))
    if name.startswith(("Bert", "Roberta")):
        return bert_tools.theirs(name)
    if name not in ("llama", "mistral", "qwen2"):
        return decoder_tools.theirs(name)
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[name]
    window = {"sliding_window": WINDOW} if name == "mistral" else {}
    config = llama_tools.config(architectures=[f"{family}ForCausalLM"], model_type=name, pad_token_id=0, **window)
    return llama_tools.randomised(getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config)))


def random_states(base: nn.Module, length: int, seed: int = 5, std: float = 0.5) -> Tensor:
    """A prefix that matters, of the base's dtype: [L, 2, P, N, D]."""
    states = random_prefix(prefix_shape(base), length, std, torch.Generator().manual_seed(seed))
    return states.to(next(base.parameters()).dtype)


def run(base: nn.Module, prefixes: Any, which: Any, **inputs: Any) -> Any:
    out = base(**insert_prefixes(base, prefixes, which, inputs))
    return out if cache_asked_for(inputs) else without_cache(out)


class Prefixed(nn.Module):
    """A base that has prefixes before each row, for what only needs a model: `lora_lab.models.generation.generate`."""

    def __init__(self, base: nn.Module, prefixes: list[Tensor], which: list[int]) -> None:
        super().__init__()
        self.base, self.prefixes, self.which = base, prefixes, which
        self.config = base.config

    def forward(self, **inputs: Any) -> Any:
        return run(self.base, self.prefixes, self.which, **inputs)


@contextlib.contextmanager
def hooked(base: Any, prefixes: list[Tensor], which: list[int]) -> Any:
    """transformers' own generate calls the base's forward: inside the block that finds the prefixes, each row's for its beams, too."""

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        asked.append(cache_asked_for(kwargs))
        rows = [index for index in which for _ in range(len(ids) // len(which))]
        return args, insert_prefixes(base, prefixes, rows, kwargs)

    def after(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        return out if asked.pop() else without_cache(out)

    asked: list[bool] = []
    handles = [base.register_forward_pre_hook(before, with_kwargs=True), base.register_forward_hook(after, with_kwargs=True)]
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


def encode_with_prefixes(base: Any, prefixes: list[Tensor], which: list[int], inputs: dict[str, Any]) -> Any:
    """What a T5's encoder makes of `inputs` under these prefixes: the encoder_outputs for generate, which else would encode without them."""
    refuse_dropped(base)
    if all(index < 0 for index in which):
        return encode(base, inputs, new_cache(base, base.config.num_layers), None)
    return _encoded(base, prefix_block(base, prefixes, which), inputs)


def generated(base: Any, prefixes: list[Tensor], which: list[int], ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """New tokens by transformers' generate, [B, new]."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    given: dict[str, Any] = {"input_ids": ids}
    if base.config.is_encoder_decoder:
        with torch.no_grad():
            given = {"encoder_outputs": encode_with_prefixes(base, prefixes, which, {"input_ids": ids, "attention_mask": mask})}
    with hooked(base, prefixes, which):
        out = base.generate(**given, attention_mask=mask, **options)
    return out[:, 1 if base.config.is_encoder_decoder else ids.shape[1] :]
