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

from prompt_tuning_lab import per_sample

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
}  # fmt: skip


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
@pytest.mark.parametrize("name", FAMILIES)
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
    config = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
              "max_position_embeddings": 48, "pad_token_id": 0, "decoder_start_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    prompted = with_tasks(transformers.BartForConditionalGeneration(transformers.BartConfig(**config)).eval())
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
