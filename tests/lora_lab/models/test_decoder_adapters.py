"""GPT-2, GPT-NeoX and Falcon under adapters, the same as PEFT's on transformers' models; in four bits, in 16 bits, compiled."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from decoder_tools import FAMILIES, ours, pair, theirs
from llama_tools import compiled, ids, logits_of, relative_error
from small_models import randomise
from torch.testing import assert_close

import lora_lab
from lora_lab.fused.layouts import known_layout
from lora_lab.models.recompute import Recomputable

ATTENTION = r".*\.(attn|attention|self_attention)\.(c_attn|c_proj|query_key_value|dense)"


@pytest.mark.parametrize("request_, peft_request", [("all-linear", "all-linear"), ("attention", ATTENTION)])
@pytest.mark.parametrize("shape", FAMILIES)
def test_the_same_modules_as_pefts_are_adapted(shape: str, request_: str, peft_request: str) -> None:
    mine, reference = pair(shape)
    lora_lab.inject(mine, rank=3, target_modules=request_)
    wrapped = peft.get_peft_model(reference, peft.LoraConfig(r=3, target_modules=peft_request))
    adapted = {name.removeprefix("base_model.model."): p.shape for name, p in wrapped.named_parameters() if p.requires_grad}
    here = {name: p.shape for name, p in mine.named_parameters() if p.requires_grad}
    assert {name.removesuffix(".weight"): shape for name, shape in adapted.items()} == {name.removesuffix(".weight"): s for name, s in here.items()}


@pytest.mark.parametrize("settings, peft_settings", [({}, {}), ({"variant": "dora"}, {"use_dora": True})])
@pytest.mark.parametrize("shape", FAMILIES)
def test_adapters_are_exchanged_with_peft_on_transformers(shape: str, settings: Any, peft_settings: Any, tmp_path: Any) -> None:
    base, reference = pair(shape)
    tokens, plain = ids(), logits_of(base, input_ids=ids())
    mine = randomise(lora_lab.inject(copy.deepcopy(base), rank=4, **settings).eval(), by=0.2)
    lora_lab.save(mine, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (wrapped, mine))) < 1e-4
    assert relative_error(logits_of(mine, input_ids=tokens), plain) > 1e-2
    theirs_ = peft.get_peft_model(reference, peft.LoraConfig(r=4, target_modules="all-linear", **peft_settings))
    randomise(theirs_, by=0.2).eval().save_pretrained(tmp_path / "theirs")
    loaded = lora_lab.load(base, tmp_path / "theirs").eval()
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (loaded, theirs_))) < 1e-4
    merged = lora_lab.merge(loaded)
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (merged, theirs_))) < 1e-4


@pytest.mark.parametrize("shape", FAMILIES)
def test_per_sample_equals_row_by_row(shape: str) -> None:
    mine, _ = pair(shape)
    for name in ("a", "b"):
        lora_lab.inject(mine, rank=2, adapter=name, init="random")
    tokens, names = ids(3), ["a", None, "b"]
    with lora_lab.per_sample(mine, names):
        together = logits_of(mine, input_ids=tokens)
    alone = []
    for row, name in zip(tokens, names, strict=True):
        alone.append(logits_of(lora_lab.use(mine, name), input_ids=row[None]))
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert relative_error(together[0], logits_of(mine, input_ids=tokens)[0]) > 1e-3


@pytest.mark.parametrize("shape", FAMILIES)
def test_parts_of_the_fused_projection_are_known_as_in_transformers(shape: str) -> None:
    mine, reference = pair(shape)
    fused = [path for path, _ in mine.named_modules() if path.endswith(("c_attn", "query_key_value"))]
    assert len(fused) == 2
    for path in fused:
        assert (layout := known_layout(mine, path)) is not None
        assert layout == known_layout(reference, path)


@pytest.mark.parametrize("shape", FAMILIES)
def test_four_bits_are_those_of_transformers_model(shape: str) -> None:
    mine, reference = (lora_lab.quantize(model, "nf4") for model in pair(shape))
    tokens = ids()
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (mine, reference))) < 1e-4


# Precision and compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", FAMILIES)
def test_sixteen_bits_are_as_near_as_transformers(shape: str) -> None:
    """Of both, the distance from float32: autocast, and weights in bfloat16."""
    mine, reference = pair(shape)
    tokens = ids()
    exact = logits_of(mine, input_ids=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = [relative_error(logits_of(model, input_ids=tokens).float(), exact) for model in (mine, reference)]
    pure = [relative_error(logits_of(model.bfloat16(), input_ids=tokens).float(), exact) for model in (mine, reference)]
    for ours_, theirs_ in (cast, pure):
        assert 0 < ours_ < 2 * theirs_ + 1e-3


@pytest.mark.parametrize("shape", ["gpt2", "neox", "falcon-7b", "falcon-rw-1b"])
def test_a_block_compiles_without_a_graph_break(shape: str) -> None:
    mine = ours(theirs(shape))
    block = next(module for module in mine.modules() if isinstance(module, Recomputable))
    context: list[Any] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: context.extend(inputs))
    logits_of(mine, input_ids=ids())
    hook.remove()
    slopes = []
    with compiled(block) as fast:
        for run in (fast, block):
            run(*context).square().mean().backward()
            slopes.append([parameter.grad.clone() for parameter in block.parameters()])
            block.zero_grad()
    assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)
