"""Families of transformers that stand apart: they scale words behind their embedding, keep a state in place of a cache, or are named like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from prompt_tools import randomised
from torch import Tensor, nn

from lora_lab import LoraLabError
from prompt_tuning_lab import inject, load, per_sample, save
from prompt_tuning_lab.embeddings import embedding_rms, word_scale
from prompt_tuning_lab.peft_files.config import task_type

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SEQ2SEQ = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "scale_embedding": True, "pad_token_id": 1, "eos_token_id": 2,
    "bos_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
FALCON_H1 = {**SIZES, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_ssm": 16, "mamba_n_heads": 2,
             "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4, "embedding_multiplier": 5.0}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def built(kind: str, settings: dict[str, Any]) -> Any:
    """kind: "Marian MTModel", the family and what its class is called behind it."""
    family, ending = kind.split()
    torch.manual_seed(0)
    return getattr(transformers, family + ending)(getattr(transformers, f"{family}Config")(**settings)).eval()


SCALING = [("Marian MTModel", SEQ2SEQ, 4.0), ("Pegasus ForConditionalGeneration", SEQ2SEQ, 4.0),
           ("BlenderbotSmall ForConditionalGeneration", SEQ2SEQ, 4.0), ("Mvp ForConditionalGeneration", SEQ2SEQ, 4.0),
           ("FalconH1 ForCausalLM", FALCON_H1, 5.0), ("Bart ForConditionalGeneration", SEQ2SEQ, 1.0)]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "factor"), SCALING, ids=[kind for kind, *_ in SCALING])
@torch.no_grad()
def test_words_scaled_behind_the_embedding_are_scaled_beside_a_prompt(kind: str, settings: dict[str, Any], factor: float) -> None:
    """Given vectors these models leave as they are, so the text would be smaller than without a prompt. Bart's embedding scales by itself."""
    base = built(kind, settings)
    bare = float(base.get_input_embeddings().weight.square().mean().sqrt())
    assert word_scale(base) == factor and abs(embedding_rms(base) / bare - (factor if factor > 1 else 4.0)) < 1e-5
    more = {"decoder_input_ids": torch.tensor([[1, 4], [1, 4]])} if "encoder_layers" in settings else {}
    prompted = randomised(inject(base, 3, init="random"))
    alone = base(input_ids=IDS, **more).logits
    with per_sample(prompted, ["default", None]):
        together = prompted(input_ids=IDS, **more).logits
    torch.testing.assert_close(together[1], alone[1])
    assert (together[0] - alone[0]).abs().max() > 1e-4


RECURRENT = [("Mamba ForCausalLM", {**SIZES, "state_size": 4}),
             ("Mamba2 ForCausalLM", {**SIZES, "num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4}),
             ("Rwkv ForCausalLM", {**SIZES, "attention_hidden_size": 16})]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), RECURRENT, ids=[kind for kind, _ in RECURRENT])
@torch.no_grad()
def test_a_recurrent_model_reads_its_prompt_once(kind: str, settings: dict[str, Any]) -> None:
    """Trap T6 where the cache is a state: the steps after the first go on from it."""
    prompted = randomised(inject(built(kind, {**settings, "eos_token_id": None}), 3, init="random"))
    words = prompted.get_input_embeddings()
    expected: Tensor = IDS[:1]
    for _ in range(6):  # anew from the beginning for each word
        read = torch.cat((prompted.prompt()()[None], words(expected)), dim=1)
        expected = torch.cat((expected, prompted.base(inputs_embeds=read).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert prompted.generate(IDS[:1], max_new_tokens=6, do_sample=False).tolist() == expected.tolist()
    assert len({*expected[0, 4:].tolist()}) > 1 or kind != "Mamba2 ForCausalLM"  # not the same word over and over, which a fault could give, too


def gemma3() -> nn.Module:
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "sliding_window": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return built("Gemma3 ForConditionalGeneration", {"text_config": text, "vision_config": vision, "image_token_index": 58, "boi_token_index": 57,
                                                     "eoi_token_index": 56})  # fmt: skip


@torch.no_grad()
def test_conditional_generation_without_an_encoder_is_causal(tmp_path: Any) -> None:
    """Models that see and write are named as T5 is."""
    prompted = randomised(inject(gemma3(), 3, init="random"))
    out = prompted(input_ids=IDS, labels=IDS)
    read = torch.cat((prompted.prompt()().expand(2, -1, -1), prompted.get_input_embeddings()(IDS)), dim=1)
    torch.testing.assert_close(out.logits, prompted.base(inputs_embeds=read).logits[:, 3:])
    assert torch.isfinite(out.loss)
    save(prompted, tmp_path)
    torch.testing.assert_close(load(gemma3(), tmp_path)(input_ids=IDS).logits, out.logits)
    assert task_type(prompted.base) == "CAUSAL_LM"
    prefixed = inject(gemma3(), 3, method="prefix", init="random")
    assert prefixed.prompt()().shape == (2, 2, 3, 1, 8) and prefixed(input_ids=IDS).logits.shape == (2, 4, 60)


def test_a_translators_file_is_of_a_model_that_answers() -> None:
    """Without a task PEFT would leave the prompt out of `generate`."""
    assert task_type(built("Marian MTModel", SEQ2SEQ)) == "SEQ_2_SEQ_LM"


@torch.no_grad()
def test_half_an_encoder_decoder_with_the_config_of_the_whole_is_an_encoder() -> None:
    base = built("UMT5 EncoderModel", {"vocab_size": 60, "d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 32})
    assert inject(base, 3, init="random")(input_ids=IDS).last_hidden_state.shape == (2, 4, 16)


PADDED = [("Bert Model", {**SIZES, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 12}),
          ("GPT2 LMHeadModel", {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "bos_token_id": 0,
                                "eos_token_id": 1})]  # fmt: skip


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(("kind", "settings"), PADDED, ids=["BERT", "GPT-2"])
@torch.no_grad()
def test_padding_to_the_whole_context_takes_no_positions(kind: str, settings: dict[str, Any], method: str) -> None:
    """padding="max_length": each text has room for the prompt, and the batch has not."""
    prompted = randomised(inject(built(kind, settings), 4, method=method, init="random"))
    ids, mask = torch.randint(5, 60, (2, 12)), (torch.arange(12) < 6).long().expand(2, 12)
    padded = prompted(input_ids=ids, attention_mask=mask)[0][:, :6]
    torch.testing.assert_close(padded, prompted(input_ids=ids[:, :6])[0])


def test_where_a_model_counts_its_positions_by_itself_padding_counts() -> None:
    base = built("Bart ForConditionalGeneration", {**SEQ2SEQ, "max_position_embeddings": 12})
    ids, mask = torch.randint(5, 60, (1, 12)), (torch.arange(12) < 6).long()[None]
    with pytest.raises(LoraLabError, match="4 virtual tokens and a text of 12 are 16 positions, the model's context is 12"):
        inject(base, 4, init="random")(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :2])


def test_heads_of_several_sizes_can_have_no_prefix() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}  # fmt: skip
    base = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes))
    with pytest.raises(LoraLabError, match="head_dim has layers without keys and values of one shape"):
        inject(base, 3, method="prefix", init="random")


def test_a_model_divided_among_devices_can_have_no_prefix() -> None:
    base = built("GPT2 LMHeadModel", PADDED[1][1])
    base.hf_device_map = {"transformer.h.0": 0, "transformer.h.1": 1}
    with pytest.raises(LoraLabError, match="divided among devices"):
        inject(base, 3, method="prefix", init="random")
