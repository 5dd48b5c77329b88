"""Llama's kin against transformers': Mistral's window, Qwen2's biases, Qwen3's norms of q and k; packed rows; the modes of checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from decoder_tools import loss_and_gradients, ours
from llama_tools import assert_same, config, ids, logits_of, randomised
from torch.testing import assert_close

import lora_lab
import memory_math
from lora_lab import LoraLabError, models
from lora_lab.models.loading import FAMILIES, build
from lora_lab.models.recompute import Recomputable

DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 3}),
    "mistral-without-window": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-biased-window": ("Qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}  # fmt: skip


def theirs(dialect: str) -> Any:
    name, change = DIALECTS[dialect]
    source = {key: value for key, value in config(**change).items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    return randomised(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**source)).eval())


def pair(dialect: str) -> tuple[Any, Any]:
    model = theirs(dialect)
    return ours(model), model


@pytest.mark.parametrize("dialect", DIALECTS)
def test_logits_loss_and_gradients_are_transformers(dialect: str) -> None:
    mine, reference = pair(dialect)
    assert type(mine) is FAMILIES[type(reference).__name__]
    assert_same(mine, reference, input_ids=ids())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_padding_on_the_left_is_transformers(dialect: str) -> None:
    mine, reference = pair(dialect)
    mask, tokens = torch.ones(2, 9, dtype=torch.long), ids(2)
    mask[0, :3] = 0
    labels = tokens.masked_fill(torch.cat((mask[:, :1], mask[:, 1:] & mask[:, :-1]), 1) == 0, -100)
    assert_same(mine, reference, input_ids=tokens, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_saved_loads_on_both_sides(dialect: str, tmp_path: Any) -> None:
    mine, reference = pair(dialect)
    reference.save_pretrained(tmp_path / "theirs")
    models.save(mine, tmp_path / "ours")
    tokens = ids()
    for folder in ("theirs", "ours"):
        loaded, _ = models.load(tmp_path / folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(mine) and type(again) is type(reference)
        assert torch.equal(logits_of(loaded, input_ids=tokens), logits_of(mine, input_ids=tokens))
        assert_close(logits_of(again, input_ids=tokens), logits_of(mine, input_ids=tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_config_of_transformers_4_means_the_same(dialect: str) -> None:
    """rope_theta at the top, no layer_types: Qwen's windows follow from max_window_layers, Mistral's are everywhere."""
    model = theirs(dialect)
    source = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    rope = source.pop("rope_parameters")
    source.pop("layer_types", None)
    old = {**source, "rope_theta": rope["rope_theta"], "rope_scaling": None, **DIALECTS[dialect][1]}
    mine = build(old, model.state_dict().items(), None, None)
    assert mine.config.windows == ours(model).config.windows
    tokens = ids()
    assert_close(logits_of(mine, input_ids=tokens), logits_of(model, input_ids=tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_cached_steps_equal_one_pass_beyond_the_window(dialect: str) -> None:
    mine, _ = pair(dialect)
    tokens = ids(2)
    whole = logits_of(mine, input_ids=tokens)
    out, steps = mine(input_ids=tokens[:, :4], use_cache=True), []
    for at in range(4, 9):
        steps.append(out.logits[:, -1])
        out = mine(input_ids=tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    assert_close(torch.stack([*steps, out.logits[:, -1]], 1), whole[:, 3:], rtol=1e-4, atol=1e-4)


KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.mark.parametrize("name", [name for name, fields in memory_math.presets.PRESETS.items() if fields["model_type"] in KINDS])
def test_every_preset_has_memory_maths_count(name: str) -> None:
    fields = memory_math.presets.PRESETS[name]
    with torch.device("meta"):
        family = FAMILIES[KINDS[fields["model_type"]]]
        model = family(family.config_class.from_dict(fields))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == memory_math.count_parameters(name).total == fields.parameters


@pytest.mark.parametrize("dialect", ["mistral", "qwen2", "qwen3"])
def test_dropout_on_the_attention_weights_is_transformers(dialect: str) -> None:
    """The same random numbers, so the same loss; without it two passes would be equal."""
    reference = theirs(dialect)
    reference.config.attention_dropout = 0.4
    for layer in reference.model.layers:
        layer.self_attn.attention_dropout = 0.4
    mine, tokens = ours(reference).train(), ids(2)
    losses = []
    for model in (mine, mine, reference.train()):
        torch.manual_seed(7)
        losses.append(model(input_ids=tokens, labels=tokens).loss.detach())
    torch.manual_seed(8)
    assert_close(losses[0], losses[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], mine(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize("change, message", [
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'.*expected true or false"),
    ({"attention_dropout": "x"}, "attention_dropout='x'.*expected a probability"),
    ({"layer_types": ["sliding_attention"], "use_sliding_window": True}, "expected 'full_attention' or 'sliding_attention' for each of 2 layers"),
])  # fmt: skip
def test_a_field_that_makes_no_sense_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraLabError, match=message):
        FAMILIES["Qwen2ForCausalLM"].config_class.from_dict(config(**change))


# Packed rows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
def test_documents_in_one_row_do_not_see_each_other(dialect: str) -> None:
    mine, _ = pair(dialect)
    tokens, lengths = ids(1, 12), [5, 1, 6]
    alone = torch.cat([logits_of(mine, input_ids=part) for part in tokens.split(lengths, 1)], 1)
    assert_close(logits_of(mine, input_ids=tokens, document_lengths=lengths), alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits_of(mine, input_ids=tokens), alone, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_packed_row_is_that_of_its_documents() -> None:
    """A document's first token has nothing before it: the document before must not be asked to predict it."""
    mine, _ = pair("mistral")
    tokens, lengths = ids(1, 12), [5, 1, 6]
    parts = [part for part in tokens.split(lengths, 1) if part.shape[1] > 1]
    expected = sum(mine(input_ids=part, labels=part).loss * (part.shape[1] - 1) for part in parts) / sum(part.shape[1] - 1 for part in parts)
    assert_close(mine.train()(input_ids=tokens, labels=tokens, document_lengths=lengths).loss, expected)


@pytest.mark.parametrize("inputs, message", [
    ({"document_lengths": [5, 6]}, r"expected one row, \[1, 11\]"),
    ({"document_lengths": [0, 12]}, "expected one row"),
    ({"document_lengths": [12], "attention_mask": torch.ones(1, 12)}, "together with an attention_mask"),
    ({"document_lengths": [12], "use_cache": True}, "together with a cache"),
])  # fmt: skip
def test_a_packed_row_that_does_not_add_up_is_refused(inputs: dict[str, Any], message: str) -> None:
    mine, _ = pair("qwen2")
    with pytest.raises(LoraLabError, match=message):
        mine(input_ids=ids(1, 12), **inputs)


# Checkpointing ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, 1, 2, "attention"])
@pytest.mark.parametrize("dialect", ["mistral", "qwen3"])
def test_every_mode_of_checkpointing_gives_the_same_gradients(dialect: str, mode: Any) -> None:
    mine = lora_lab.inject(ours(theirs(dialect)), rank=2, dropout=0.2, init="random")
    plain, again = loss_and_gradients(mine, False), loss_and_gradients(mine, mode)
    assert mine.is_gradient_checkpointing
    assert_close(again, plain)


def test_the_modes_recompute_what_they_say() -> None:
    mine, _ = pair("qwen2")
    blocks = [module for module in mine.modules() if isinstance(module, Recomputable)]
    for mode, expected in ((True, [True, True]), (2, [True, False]), ("attention", [False, False]), (False, [False, False])):
        mine.gradient_checkpointing_enable(mode)
        assert [block.recompute for block in blocks] == expected
        assert all(block.self_attn.recompute_core == (mode == "attention") for block in blocks)


@pytest.mark.parametrize("mode", [-1, "attn", None, 1.5])
def test_an_unknown_mode_of_checkpointing_is_refused(mode: Any) -> None:
    with pytest.raises(LoraLabError, match="expected True, False, a number n"):
        pair("qwen2")[0].gradient_checkpointing_enable(mode)
