"""Our Llama against transformers': logits, loss and every gradient, for every option of its config."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from llama_tools import assert_same, config, gradients, ids, logits_of, pair, relative_error, saved_for_backward
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.models import KVCache, LlamaConfig, LlamaForCausalLM

SHAPES = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "every head its key": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 12},
    "narrow heads": {"head_dim": 6, "num_key_value_heads": 1, "attention_bias": True},
    "another base and eps": {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_transformers(shape):
    mine, reference = pair(**SHAPES[shape])
    assert_same(mine, reference, input_ids=ids())


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_is_transformers(side):
    mine, reference = pair()
    mask = torch.ones(3, 9, dtype=torch.long)
    if side in ("left", "both"):
        mask[0, :3] = 0
    if side in ("right", "both"):
        mask[1, -4:] = 0
    tokens = ids(3)
    follows_text = torch.cat((mask[:, :1], mask[:, 1:] & mask[:, :-1]), 1)  # what comes after padding would be predicted from padding
    assert_same(mine, reference, input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(follows_text == 0, -100))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(side):
    model, _ = pair()
    alone = ids(1, 5)
    padded, mask = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)
    where = slice(3, None) if side == "left" else slice(0, 5)
    padded[:, where], mask[:, where] = alone, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = logits_of(model, input_ids=padded, attention_mask=mask, position_ids=positions)[:, where]
    assert_close(logits, logits_of(model, input_ids=alone))


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone():
    model, _ = pair()
    tokens, mask = ids(2), torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    logits = logits_of(model, input_ids=tokens, attention_mask=mask)
    assert logits.isfinite().all()
    assert_close(logits[:1], logits_of(model, input_ids=tokens[:1]))


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_may_be_given(rows):
    mine, reference = pair()
    positions = torch.randint(0, 60, (rows, 9))
    tokens = ids()
    logits = logits_of(mine, input_ids=tokens, position_ids=positions)
    assert relative_error(logits, logits_of(reference, input_ids=tokens, position_ids=positions.expand(2, -1))) < 1e-4
    assert relative_error(logits, logits_of(mine, input_ids=tokens)) > 1e-3


def test_embeddings_may_be_given_instead_of_ids():
    mine, reference = pair()
    embeddings = torch.randn(2, 9, 32)
    assert relative_error(*(logits_of(model, inputs_embeds=embeddings) for model in (mine, reference))) < 1e-4
    tokens = ids()
    assert_close(logits_of(mine, inputs_embeds=mine.get_input_embeddings()(tokens)), logits_of(mine, input_ids=tokens))


@pytest.mark.parametrize("steps", [[5, 1, 1, 1, 1], [1] * 9, [4, 5], [2, 3, 4]])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_changes_nothing(steps, padded):
    model, _ = pair()
    tokens, mask = ids(), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    whole = logits_of(model, input_ids=tokens, attention_mask=mask)
    cache, parts, done = None, [], 0
    for length in steps:
        now = slice(done, done + length)
        with torch.no_grad():
            out = model(input_ids=tokens[:, now], attention_mask=mask[:, : now.stop], past_key_values=cache, use_cache=True)
        cache, done = out.past_key_values, now.stop
        parts.append(out.logits)
    assert cache.length == 9
    assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


def test_a_past_may_be_pairs_of_tensors_or_transformers_cache_and_gets_gradients():
    mine, reference = pair()
    with torch.no_grad():
        past = reference(input_ids=ids(2, 4), use_cache=True).past_key_values
    tokens, mask = ids(2, 5), torch.ones(2, 9, dtype=torch.long)
    pairs = [(keys.clone().requires_grad_(), values.clone().requires_grad_()) for keys, values, *_ in past]
    logits = mine(input_ids=tokens, attention_mask=mask, past_key_values=pairs).logits
    assert_close(logits, mine(input_ids=tokens, attention_mask=mask, past_key_values=past).logits)
    with torch.no_grad():
        assert relative_error(logits, reference(input_ids=tokens, attention_mask=mask, past_key_values=copy.deepcopy(past)).logits) < 1e-4
    logits.sum().backward()
    assert all(tensor.grad.abs().max() > 0 for pair_ in pairs for tensor in pair_)


def test_with_labels_logits_are_computed_in_eval_mode_only():
    model, _ = pair()
    tokens = ids()
    assert model.train()(input_ids=tokens, labels=tokens).logits is None
    out = model.eval()(input_ids=tokens, labels=tokens)
    assert out.logits.shape == (2, 9, 64)
    assert out.loss is not None
    assert model.train()(input_ids=tokens).logits is not None
    assert out.past_key_values is None


@pytest.mark.parametrize("keep", [1, 3, 0])
def test_logits_to_keep_are_the_last(keep):
    model, _ = pair()
    tokens = ids()
    assert_close(logits_of(model, input_ids=tokens, logits_to_keep=keep), logits_of(model, input_ids=tokens)[:, -keep:])


# Gradient checkpointing ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less():
    model, _ = pair(num_hidden_layers=3)
    model.train()
    tokens, kept, slopes = ids(2, 16), [], []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        with saved_for_backward() as saved:
            loss = model(input_ids=tokens, labels=tokens).loss
        kept.append(sum(saved.values()))
        slopes.append(gradients(model, loss))
    assert model.is_gradient_checkpointing
    assert_close(slopes[1], slopes[0])
    assert kept[1] < kept[0] / 2


def test_gradient_checkpointing_rests_in_eval_mode_and_without_gradients():
    model, _ = pair()
    model.gradient_checkpointing_enable()
    with saved_for_backward() as saved:
        model.train()
        logits_of(model, input_ids=ids())
    assert not saved
    assert model.eval()(input_ids=ids(), use_cache=True).past_key_values.length == 9


def test_a_trained_prefix_gets_the_same_gradients_under_checkpointing():
    """The recompute has to find the cache as the forward pass found it."""
    model, _ = pair()
    model.train()
    tokens, mask = ids(2, 5), torch.ones(2, 8, dtype=torch.long)
    prefix = [tuple(torch.randn(2, 2, 3, 8, requires_grad=True) for _ in range(2)) for _ in range(2)]
    leaves = [tensor for layer in prefix for tensor in layer]
    slopes = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        loss = model(input_ids=tokens, attention_mask=mask, past_key_values=KVCache(prefix), labels=tokens).loss
        slopes.append(torch.autograd.grad(loss, [*leaves, *model.parameters()]))
    assert_close(slopes[1], slopes[0])
    assert all(slope.abs().max() > 0 for slope in slopes[0])
    with pytest.raises(LoraLabError, match="use_cache=True under gradient checkpointing"):
        model(input_ids=tokens, use_cache=True)


def test_the_recompute_sees_the_adapters_of_its_forward_pass():
    model, _ = pair()
    lora_lab.inject(model, init="random").train()
    model.gradient_checkpointing_enable()
    tokens = ids()
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with lora_lab.disabled(model):
        loss = model(inputs_embeds=embeddings, labels=tokens).loss
    late = torch.autograd.grad(loss, embeddings)[0]
    with lora_lab.disabled(model):
        model.gradient_checkpointing_disable()
        expected = torch.autograd.grad(model(inputs_embeds=embeddings, labels=tokens).loss, embeddings)[0]
    assert_close(late, expected)


# Precision and compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
def test_16_bit_is_close_to_float32(how):
    model, _ = pair()
    tokens = ids(2, 16)
    expected = logits_of(model, input_ids=tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = logits_of(model if how == "autocast" else model.to(torch.bfloat16), input_ids=tokens)
    assert actual.dtype == torch.bfloat16
    assert float((actual.float() - expected).norm() / expected.norm()) < 0.05


def test_copies_keep_tied_weights_tied():
    model, _ = pair(tie_word_embeddings=True)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight is not model.lm_head.weight
    assert twin.get_output_embeddings() is twin.lm_head


# Configs and errors ------------------------------------------------------------------------------------------------------------


def test_a_config_made_by_hand_is_written_in_full():
    linear = {"rope_type": "linear", "factor": 3.0}
    made = LlamaConfig.from_dict(config(rope_theta=77.0, rope_scaling=linear, tie_word_embeddings=True, mlp_bias=True))
    by_hand = LlamaConfig(**{**vars(made), "source": {}})
    assert by_hand.to_dict().items() <= made.to_dict().items()
    assert vars(LlamaConfig.from_dict(by_hand.to_dict())) == {**vars(made), "source": by_hand.to_dict()}
    read = transformers.LlamaConfig.from_dict(by_hand.to_dict())
    assert (read.hidden_size, read.mlp_bias, read.tie_word_embeddings, read.rope_parameters["factor"]) == (32, True, True, 3.0)


def test_what_a_config_says_beyond_our_fields_is_kept():
    extra = {"bos_token_id": 7, "initializer_range": 0.5}
    assert LlamaConfig.from_dict(config(**extra)).to_dict().items() >= extra.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": None}, "hidden_size"), ({"hidden_act": "gelu"}, "hidden_act='gelu'"), ({"num_key_value_heads": 3}, "=4.*=3"),
     ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "'yarm'.*did you mean 'yarn'"),
     ({"rope_scaling": {"type": "linear"}}, "'linear'.*'factor'"),
     ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'")],
)  # fmt: skip
def test_a_config_that_makes_no_llama_is_an_error_that_names_the_value(changes, message):
    source = {name: value for name, value in config(**changes).items() if value is not None}
    with pytest.raises(LoraLabError, match=message):
        LlamaForCausalLM(LlamaConfig.from_dict(source))(input_ids=ids())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "either input_ids.*or inputs_embeds"),
     ({"input_ids": ids(), "inputs_embeds": torch.zeros(2, 9, 32)}, "not both"),
     ({"input_ids": ids(1, 9)[0]}, r"\[9, 32\], expected \[B, T, 32\]"),
     ({"inputs_embeds": torch.zeros(2, 9, 31)}, r"\[2, 9, 31\], expected \[B, T, 32\]"),
     ({"input_ids": torch.full((1, 2), 64)}, "input_ids has the id 64.*ends at 63"),
     ({"input_ids": torch.full((1, 2), -1)}, "the id -1"),
     ({"input_ids": ids(), "attention_mask": torch.ones(2, 8)}, r"attention_mask is \[2, 8\], expected \[2, 9\]"),
     ({"input_ids": ids(), "attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask is \[2, 1, 9, 9\]"),
     ({"input_ids": ids(), "labels": ids(2, 8)}, r"labels is \[2, 8\], expected \[2, 9\]"),
     ({"input_ids": ids(), "position_ids": torch.arange(9)}, r"position_ids is \[9\], expected \[2, 9\]"),
     ({"input_ids": ids(), "past_key_values": [(torch.zeros(2, 2, 1, 8),) * 2]}, "1 layers, the model has 2")],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_errors_that_name_both_shapes(inputs, message):
    with pytest.raises(LoraLabError, match=message):
        LlamaForCausalLM(LlamaConfig.from_dict(config()))(**inputs)


def test_a_mask_covers_the_cache_too():
    model, _ = pair()
    past = model(input_ids=ids(2, 4), use_cache=True).past_key_values
    with pytest.raises(LoraLabError, match=r"attention_mask is \[2, 1\], expected \[2, 5\].*cache 4"):
        model(input_ids=ids(2, 1), attention_mask=torch.ones(2, 1), past_key_values=past)


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": "4"}, {"hidden_size": 32.0}, {"vocab_size": -1}, {"num_key_value_heads": 0}, {"head_dim": True},
     {"rms_norm_eps": "1e-5"},
     {"rope_theta": "x"}, {"rope_theta": -1.0}, {"rope_scaling": 5}, {"rope_scaling": {"rope_type": ["x"]}}, {"partial_rotary_factor": 0.5},
     {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, {"quantization_config": {"bits": 4}}],
    ids=str,
)  # fmt: skip
def test_a_config_field_of_the_wrong_kind_is_an_error_that_names_it(change):
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaConfig.from_dict(config)
    name = "partial_rotary_factor" if "partial" in str(change) else "rope_type" if "rope_type" in str(change) else next(iter(change))
    with pytest.raises(LoraLabError, match=name):
        LlamaConfig.from_dict(config | change)
