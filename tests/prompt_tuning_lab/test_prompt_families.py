"""Models of transformers that lora_lab has none of: windows, ALiBi, offsets of positions, and other encoders.

Trap numbers are those of the project's reference on prompt tuning.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from prompt_tools import ROUNDED, ROWS, joined, padded, rows_of, with_tasks
from torch.testing import assert_close

from lora_lab import LoraLabError
from prompt_tuning_lab import inject, load, per_sample, save, use
from prompt_tuning_lab.prefix import keys_and_values

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 48, "pad_token_id": 0}  # fmt: skip
WINDOWED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bloom": ("ForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("ForCausalLM", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Qwen3": ("ForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "Gemma2": ("ForCausalLM", WINDOWED),
    "DistilBert": ("Model", {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 48}),
    "XLMRoberta": ("Model", {**SMALL, "pad_token_id": 1}),
    "ModernBert": ("Model", {**SMALL, "local_attention": 6}),
    "DebertaV2": ("Model", SMALL),
    "Roberta": ("ForCausalLM", {**SMALL, "pad_token_id": 1, "is_decoder": True}),
    "BigBird": ("ForSequenceClassification", {**SMALL, "attention_type": "original_full"}),
    "XLNet": ("LMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    "GPTNeo": ("ForCausalLM", {**SMALL, "num_layers": 2, "num_heads": 4, "window_size": 6, "attention_types": [[["global", "local"], 1]]}),
    "Mpt": ("ForCausalLM", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 48}),
}  # fmt: skip
OF_POSITIONS = [name for name in FAMILIES if name != "BigBird"]
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 48, "pad_token_id": 0, "decoder_start_token_id": 2}  # fmt: skip


def family(name: str) -> Any:
    ending, config = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name + ending)(getattr(transformers, f"{name}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def text_of(out: Any) -> torch.Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", OF_POSITIONS)
@torch.no_grad()
def test_a_mixed_batch_equals_rows_run_alone(name: str, padding: str) -> None:
    """T3, T4, T18: whatever a model tells places by."""
    prompted, tasks = with_tasks(family(name)), ["a", None, "c"]
    ids, mask = padded(ROWS, padding)
    with per_sample(prompted, tasks):
        found = text_of(prompted(input_ids=ids, attention_mask=mask))
    for index, (task, row) in enumerate(zip(tasks, ROWS, strict=True)):
        expected = text_of(prompted.base(inputs_embeds=joined(prompted, task, row)))[0, len(rows_of(prompted, task)) :]
        assert_close(found[index][mask[index].bool()], expected, **ROUNDED)
        assert task is None or not torch.allclose(expected, text_of(prompted.base(input_ids=torch.tensor([row])))[0], atol=1e-4)


@torch.no_grad()
def test_bart_reads_prompts_in_its_encoder_and_answers() -> None:
    """T12: positions are columns here, so text is padded on the right, as it is without a prompt."""
    torch.manual_seed(0)
    prompted = with_tasks(transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval())
    ids, mask = padded(ROWS, "right")
    written, greedy = torch.tensor([[2, 5, 9]]), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    with per_sample(prompted, ["a", None, "c"]):
        logits = prompted(input_ids=ids, attention_mask=mask, decoder_input_ids=written.expand(3, -1)).logits
        answers = prompted.generate(input_ids=ids, attention_mask=mask, **greedy)
    for index, (task, row) in enumerate(zip(["a", None, "c"], ROWS, strict=True)):
        embeds = joined(prompted, task, row)
        assert_close(logits[index], prompted.base(inputs_embeds=embeds, decoder_input_ids=written).logits[0], **ROUNDED)
        alone = prompted.base.generate(inputs_embeds=embeds, **greedy)
        assert torch.equal(answers[index], alone[0])


# What a prefix stands before ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefixed_alone(prompted: Any, task: str | None, row: list[int]) -> torch.Tensor:
    return use(prompted, task)(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_robertas_words_behind_a_prefix_have_positions_behind_its_paddings(padding: str) -> None:
    """T3: in a decoder, too, where rows with another prefix, and none, make them be counted here."""
    prompted, tasks = with_tasks(family("Roberta"), method="prefix"), ["a", None, "c"]
    ids, mask = padded(ROWS, padding)
    with per_sample(prompted, tasks):
        found = prompted(input_ids=ids, attention_mask=mask).logits
    for index, (task, row) in enumerate(zip(tasks, ROWS, strict=True)):
        assert_close(found[index][mask[index].bool()], prefixed_alone(prompted, task, row), **ROUNDED)


@pytest.mark.parametrize(("name", "measure"), [("GPTNeo", "its window of 6 positions"), ("Mpt", "its relative positions"), ("Gemma2", "its window")])
@torch.no_grad()
def test_padding_that_would_be_distance_from_a_prefix_is_refused(name: str, measure: str) -> None:
    """T3: these measure in columns, so padding between prefix and text would be off by as much; on the right it is nothing."""
    prompted, tasks = with_tasks(family(name), method="prefix"), ["a", None, "c"]
    ids, mask = padded(ROWS, "right")
    with per_sample(prompted, tasks):
        found = prompted(input_ids=ids, attention_mask=mask).logits
        with pytest.raises(LoraLabError, match=f"padded on the left: {name}ForCausalLM measures {measure}"):
            prompted(input_ids=ids.flip(1), attention_mask=mask.flip(1))
    for index, (task, row) in enumerate(zip(tasks, ROWS, strict=True)):
        assert_close(found[index][: len(row)], prefixed_alone(prompted, task, row), **ROUNDED)


# Heads --------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pooler_in_two_parts_reads_the_texts_first_position() -> None:
    """T15: BigBird has a linear layer and an activation beside it, as ALBERT has under another name."""
    prompted = with_tasks(family("BigBird"))
    found = prompted(input_ids=torch.tensor([ROWS[0]])).logits
    hidden = prompted.base.bert(inputs_embeds=joined(prompted, "c", ROWS[0])).last_hidden_state[:, len(rows_of(prompted, "c")) :]
    assert_close(found, prompted.base.classifier(hidden), **ROUNDED)


@torch.no_grad()
def test_a_bart_with_a_head_is_told_what_to_write() -> None:
    """It makes decoder_input_ids of input_ids, and a prompt has none; given, they are what it makes of the text alone."""
    torch.manual_seed(0)
    base = transformers.BartForSequenceClassification(transformers.BartConfig(**BART, eos_token_id=3)).eval()
    prompted, ids = with_tasks(base), torch.tensor([[5, 9, 22, 3], [7, 30, 41, 3]])
    with pytest.raises(LoraLabError, match="decoder_input_ids are missing: a BartForSequenceClassification cannot make them of a prompt"):
        prompted(input_ids=ids, labels=torch.tensor([0, 1]))
    shifted = torch.cat((torch.tensor([[2], [2]]), ids[:, :-1]), 1)
    assert_close(use(prompted, None)(input_ids=ids, decoder_input_ids=shifted).logits, base(input_ids=ids).logits, **ROUNDED)
    embeds = torch.cat([joined(prompted, "a", row) for row in ids.tolist()])
    hidden = base.model(inputs_embeds=embeds, decoder_input_ids=shifted).last_hidden_state
    assert_close(use(prompted, "a")(input_ids=ids, decoder_input_ids=shifted).logits, base.classification_head(hidden[:, -1]), **ROUNDED)


def test_numbers_for_positions_that_nobody_knows_of_virtual_tokens_are_refused() -> None:
    """Longformer's classifier gives its backbone a second mask of the text."""
    torch.manual_seed(0)
    config = transformers.LongformerConfig(**{**SMALL, "pad_token_id": 1, "attention_window": 8})
    prompted = with_tasks(transformers.LongformerForSequenceClassification(config).eval())
    with pytest.raises(LoraLabError, match=r"global_attention_mask is \[1, 7\], numbers for the text's positions"):
        prompted(input_ids=torch.tensor([ROWS[0]]))


def test_a_model_whose_layers_look_words_up_takes_a_prefix_alone(tmp_path: Any) -> None:
    """T25: Gemma 3n's layers have embeddings of their own (peft#3201); given vectors in place of ids it leaves them out without a word."""
    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**SMALL, "num_key_value_heads": 2, "head_dim": 8}, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0], layer_types=["sliding_attention", "full_attention"], altup_num_inputs=2)  # fmt: skip
    base, ids = transformers.Gemma3nForCausalLM(config).eval(), torch.tensor([ROWS[0]])
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.1)
        words = base.get_input_embeddings()(ids)
        assert not torch.allclose(base(input_ids=ids).logits, base(inputs_embeds=words).logits, atol=1e-3)
    for method in ("prompt", "p-tuning", "residual"):
        with pytest.raises(LoraLabError, match="a Gemma3nForCausalLM looks each word up again in its layers"):
            inject(base, 3, method=method, init="random")
    save(inject(family("Qwen3"), 3), tmp_path)
    with pytest.raises(LoraLabError, match="looks each word up again in its layers"):
        load(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())
    front = torch.tensor([7, 9, 30])
    prompted = inject(base, 3, method="prefix", init=keys_and_values(base, front))
    with torch.no_grad():
        assert_close(prompted(input_ids=ids).logits, base(input_ids=torch.cat((front[None], ids), 1)).logits[:, 3:], **ROUNDED)
