"""Rotary positions of every kind against transformers', from configs of transformers 4 and 5."""

from __future__ import annotations

import pytest
import torch
from llama_tools import assert_same, compiled, config, ids, logits_of, ours, pair, relative_error, theirs
from torch.testing import assert_close

from lora_lab.models import LlamaConfig, LlamaForCausalLM, generate
from lora_lab.models.base import context_of
from lora_lab.models.rotary import KINDS

FACTORS = [1.0, 1.5, 2.0, 4.0]
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1], "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.2}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": YARN,
    "yarn, default betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, attention factor": {**YARN, "attention_factor": 1.3},
    "yarn, not truncated": {**YARN, "truncate": False},
    "longrope": LONG,
    "longrope, factor": {**LONG, "factor": 8.0},
    "longrope, attention factor": {**LONG, "attention_factor": 0.9},
}


@pytest.mark.parametrize("length", [9, 24])
@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rotary_scaling_is_transformers(rope, length):
    """9 positions lie inside the trained context of 16, 24 beyond it."""
    changes = {"max_position_embeddings": 16} if rope == "dynamic" else {}
    mine, reference = pair(**changes, rope_parameters={"rope_theta": 100.0, **ROPES[rope]})
    tokens = ids(length=length)
    assert_same(mine, reference, input_ids=tokens)
    if rope != "default" and not (rope == "dynamic" and length == 9):  # the scaling does something
        plain = LlamaForCausalLM(LlamaConfig.from_dict(config(**changes, rope_theta=100.0))).eval()
        plain.load_state_dict(mine.state_dict())
        assert relative_error(logits_of(plain, input_ids=tokens), logits_of(mine, input_ids=tokens)) > 1e-3


def test_the_cases_above_cover_every_kind_of_scaling():
    assert {rope["rope_type"] for rope in ROPES.values()} == set(KINDS)


@pytest.mark.parametrize("rope", ROPES)
def test_configs_of_transformers_4_and_5_say_the_same(rope):
    numbers = dict(ROPES[rope])
    kind = numbers.pop("rope_type")
    of_5 = LlamaConfig.from_dict(config(rope_parameters={"rope_theta": 100.0, "rope_type": kind, **numbers}))
    if rope == "default":
        spellings = [config(rope_theta=100.0), config(rope_theta=100.0, rope_scaling=None)]
    else:
        spellings = [config(rope_theta=100.0, rope_scaling={word: kind, **numbers}) for word in ("type", "rope_type")]
    for of_4 in spellings:
        assert LlamaConfig.from_dict(of_4).rope == of_5.rope
    assert LlamaConfig.from_dict(of_5.to_dict()).rope == of_5.rope


def test_an_original_context_outside_the_rope_settings_has_the_last_word_as_in_transformers():
    both = {"rope_scaling": {**LONG, "original_max_position_embeddings": 32}, "original_max_position_embeddings": 16}
    reference = theirs(**both)
    mine = LlamaForCausalLM(LlamaConfig.from_dict(config(**both))).eval()
    mine.load_state_dict(reference.state_dict())
    assert mine.config.rope.numbers["original_max_position_embeddings"] == 16
    tokens = ids(length=24)
    assert relative_error(logits_of(mine, input_ids=tokens), logits_of(reference, input_ids=tokens)) < 1e-4


@pytest.mark.parametrize(("rope", "context"), [("linear", 48), ("dynamic", 64), ("yarn", 16), ("default", 16)])
def test_texts_may_be_as_long_as_stretched_positions_reach(rope, context):
    """A Vicuna of 16k says max_position_embeddings=4096 and factor=4; transformers generates beyond the 4,096, and so do we."""
    reference = theirs(max_position_embeddings=16, rope_parameters={"rope_theta": 100.0, **ROPES[rope]})
    mine = ours(reference)
    assert context_of(mine) == context_of(reference) == context
    prompt = ids(length=12)[:1]
    if context > 16:
        found = generate(mine, prompt.tolist(), max_new_tokens=20, stop_ids=[], temperature=0.0).ids[0]
        more = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(prompt, **more)
        assert found == expected[0, 12:].tolist()


@pytest.mark.parametrize("how", ["cast", "default dtype"])
def test_16_bit_does_not_touch_the_rotary_frequencies(how):
    """bfloat16 keeps eight bits of a frequency, and makes a base of 10,000 into 9,984."""
    model, _ = pair()
    positions = torch.arange(1000)[None]
    expected = model.config.rope(positions)
    if how == "cast":
        assert_close(model.to(torch.bfloat16).config.rope(positions), expected, rtol=0, atol=0)
        return
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_close(LlamaForCausalLM(LlamaConfig.from_dict(config())).config.rope(positions), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rope", ["default", "dynamic", "longrope"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_model_compiles_without_a_graph_break(rope, padded):
    model = ours(theirs(num_hidden_layers=1, rope_parameters={"rope_theta": 100.0, **ROPES[rope]}))
    with compiled(model) as fast:
        for length in (9, 20):  # the second makes the length a symbol
            tokens, mask = ids(length=length), torch.ones(2, length, dtype=torch.long)
            mask[0, :2] = 0
            inputs = {"input_ids": tokens, **({"attention_mask": mask} if padded else {})}
            assert_close(logits_of(fast, **inputs), logits_of(model, **inputs))
