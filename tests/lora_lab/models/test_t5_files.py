"""T5's folders, configs, tokenizers and adapters on both sides; its sizes; what it is in 16 and 8 bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import randomise
from t5_tools import SHAPES, ids, logits_of, pair, randomised, stored, theirs
from torch.testing import assert_close

import lora_lab
import memory_math
from lora_lab import LoraLabError, models
from lora_lab.models import T5Config, T5ForConditionalGeneration, Tokenizer
from lora_lab.models.loading import FAMILIES, build
from memory_math.presets import PRESETS

SOURCE, TARGET = torch.arange(2, 15)[None], torch.arange(20, 26)[None]


def answer(model: Any) -> torch.Tensor:
    return logits_of(model, input_ids=SOURCE, decoder_input_ids=TARGET)


# Folders ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_loads_on_both_sides(shape: str, tmp_path: Any) -> None:
    mine, reference = pair(shape)
    reference.save_pretrained(tmp_path / "theirs")
    models.save(mine, tmp_path / "ours")
    expected = answer(mine)
    for folder in ("theirs", "ours"):
        loaded, _ = models.load(tmp_path / folder)
        again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(mine) and type(again) is type(reference)
        assert torch.equal(answer(loaded), expected)
        assert_close(answer(again), expected, rtol=1e-4, atol=1e-4)
        for model in (loaded, again):
            assert (model.lm_head.weight is model.shared.weight) == (mine.lm_head.weight is mine.shared.weight)
            assert model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight is model.shared.weight
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()


def test_state_dicts_have_the_same_keys_and_carry_over() -> None:
    mine, reference = pair("1.1")
    assert [*mine.state_dict()] == [*reference.state_dict()]
    other = theirs("1.1")
    randomised(other, std=0.2)
    mine.load_state_dict(other.state_dict())
    assert_close(answer(mine), answer(other), rtol=1e-4, atol=1e-4)


def test_a_file_that_repeats_the_embedding_is_read_and_one_that_contradicts_itself_refused(tmp_path: Any) -> None:
    """Old files hold the embedding under all of its names, and a bias between decoder and encoder that nothing uses."""
    mine, reference = pair("1.0")
    config = {**reference.config.to_dict(), "architectures": ["T5ForConditionalGeneration"]}
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 3)}
    everything = {name: tensor.clone() for name, tensor in {**reference.state_dict(), **unused}.items()}
    assert "lm_head.weight" in everything and "encoder.embed_tokens.weight" in everything
    assert_close(answer(build(config, everything.items(), None, None)), answer(mine))
    everything["encoder.embed_tokens.weight"][3] += 1
    with pytest.raises(LoraLabError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        build(config, everything.items(), None, None)


def test_a_1_1_without_its_head_is_refused() -> None:
    """Only where transformers 5 wrote the config can the head be the embedding; in a config of transformers 4 the file is incomplete."""
    reference = theirs("1.1")
    tensors = {name: tensor for name, tensor in stored(reference).items() if name != "lm_head.weight"}
    config = {**reference.config.to_dict(), "architectures": ["T5ForConditionalGeneration"]}
    assert build(config, tensors.items(), None, None).config.tie_word_embeddings
    with pytest.raises(LoraLabError, match=r"lack 1 tensors of a T5ForConditionalGeneration, 'lm_head\.weight'"):
        build({**config, "tie_word_embeddings": False}, tensors.items(), None, None)


# Configs ----------------------------------------------------------------------------------------------------------------------

T5_SMALL = {"architectures": ["T5ForConditionalGeneration"], "d_ff": 44, "d_kv": 7, "d_model": 30, "decoder_start_token_id": 0, "dropout_rate": 0.1,
            "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
            "n_positions": 512, "num_heads": 3, "num_layers": 2, "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32,
            "task_specific_params": {"summarization": {"num_beams": 4}}, "vocab_size": 67}  # fmt: skip
FLAN_T5 = {**T5_SMALL, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "dense_act_fn": "gelu_new", "is_gated_act": True,
           "relative_attention_max_distance": 128, "tie_word_embeddings": False, "transformers_version": "4.23.1", "use_cache": True}  # fmt: skip


@pytest.mark.parametrize(("source", "tied", "scaled"), [
    (T5_SMALL, True, True),
    (FLAN_T5, False, False),
    ({**T5_SMALL, "tie_word_embeddings": True, "scale_decoder_outputs": True}, True, True),
    ({**FLAN_T5, "tie_word_embeddings": True, "scale_decoder_outputs": False}, False, False),
    ({**FLAN_T5, "tie_word_embeddings": False, "scale_decoder_outputs": True}, False, True),
])  # fmt: skip
def test_configs_of_both_generations_mean_what_transformers_takes_them_for(source: dict[str, Any], tied: bool, scaled: bool, tmp_path: Any) -> None:
    """The fields are those of the hub's t5-small and flan-t5 folders; transformers 5 calls every T5 tied and says scale_decoder_outputs."""
    reference = randomised(transformers.T5ForConditionalGeneration(transformers.T5Config.from_dict(dict(source))).eval())
    if not tied:
        reference.lm_head.weight = torch.nn.Parameter(torch.randn_like(reference.lm_head.weight))
    save_file(stored_in_full(reference), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(source))
    mine, _ = models.load(tmp_path)
    assert (mine.config.tie_word_embeddings, mine.config.scale_decoder_outputs) == (tied, scaled)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert_close(answer(mine), answer(again), rtol=1e-4, atol=1e-4)
    kept = {name: value for name, value in source.items() if name not in ("tie_word_embeddings", "scale_decoder_outputs")}
    assert mine.config.to_dict().items() >= kept.items()
    assert mine.config.num_decoder_layers == source.get("num_decoder_layers", 2)


def stored_in_full(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored(model).items() if "embed_tokens" not in name}


def test_a_config_made_by_hand_is_written_in_full() -> None:
    made = T5Config.from_dict({**FLAN_T5, "relative_attention_num_buckets": 8, "dropout_rate": 0.3})
    by_hand = dataclasses.replace(made, source={})
    assert dataclasses.replace(T5Config.from_dict(by_hand.to_dict()), source={}) == by_hand
    read = transformers.T5Config.from_dict(by_hand.to_dict())
    assert (read.is_gated_act, read.dense_act_fn, read.num_decoder_layers, read.scale_decoder_outputs) == (True, "gelu_new", 3, False)
    assert read.is_encoder_decoder and read.relative_attention_num_buckets == 8


@pytest.mark.parametrize(("change", "message"), [
    ({"d_model": None}, "d_model"), ({"num_heads": "4"}, "num_heads='4'"), ({"d_kv": 0}, "d_kv=0"),
    ({"feed_forward_proj": "gated-gelo"}, "'gated-gelo'.*did you mean 'gated-gelu'"),
    ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets=3"),
    ({"relative_attention_max_distance": 16}, "relative_attention_max_distance=16"),
    ({"dropout_rate": 1.5}, "dropout_rate=1.5"), ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"), ({"decoder_start_token_id": 67}, "decoder_start_token_id=67.*0 to 66"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
], ids=str)  # fmt: skip
def test_a_config_that_makes_no_t5_is_an_error_that_names_the_value(change: dict[str, Any], message: str) -> None:
    source = {name: value for name, value in {**T5_SMALL, **change}.items() if value is not None}
    with pytest.raises(LoraLabError, match=message):
        T5Config.from_dict(source)


@pytest.mark.parametrize(("inputs", "message"), [
    ({"decoder_input_ids": ids()}, r"give either input_ids \[B, T\] or inputs_embeds \[B, T, H\] \(or encoder_outputs\)"),
    ({"input_ids": ids(), "inputs_embeds": torch.zeros(3, 13, 30), "labels": ids()}, "not both"),
    ({"input_ids": ids()}, r"decoder_input_ids \[B, T\] or decoder_inputs_embeds \[B, T, H\] \(or labels\)"),
    ({"input_ids": ids()[0], "labels": ids()}, r"the encoder's input is \[13, 30\]"),
    ({"inputs_embeds": torch.zeros(3, 13, 31), "labels": ids()}, r"\[3, 13, 31\] as embeddings, expected \[B, T, 30\]"),
    ({"input_ids": ids(2), "labels": ids(3)}, "the encoder has 2 rows, the decoder 3"),
    ({"input_ids": torch.full((1, 2), 67), "labels": ids(1)}, "input_ids has the id 67.*ends at 66"),
    ({"input_ids": ids(1), "decoder_input_ids": torch.full((1, 2), -1)}, "decoder_input_ids has the id -1"),
    ({"input_ids": ids(1), "labels": torch.full((1, 2), 99)}, "the id 99"),
    ({"input_ids": ids(), "labels": ids(), "attention_mask": torch.ones(3, 12)}, r"attention_mask is \[3, 12\], expected \[3, 13\]"),
    ({"input_ids": ids(), "labels": ids(), "decoder_input_ids": ids(3, 12)}, r"labels is \[3, 13\], expected \[3, 12\]"),
    ({"input_ids": ids(), "labels": ids(), "decoder_attention_mask": torch.ones(3, 1)}, r"decoder_attention_mask is \[3, 1\]"),
    ({"input_ids": ids(), "labels": ids(), "past_key_values": [(torch.zeros(3, 3, 1, 7),) * 2]}, "1 layers, the decoder has 3"),
    ({"encoder_outputs": {"hidden": 1}, "labels": ids()}, "encoder_outputs is a dict"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_errors_that_name_the_shapes(inputs: dict[str, Any], message: str) -> None:
    mine = T5ForConditionalGeneration(T5Config.from_dict({**T5_SMALL, "num_decoder_layers": 3}))
    with pytest.raises(LoraLabError, match=message):
        mine(**inputs)


# Sizes and adapters -----------------------------------------------------------------------------------------------------------

T5_PRESETS = [name for name, preset in PRESETS.items() if dict(preset).get("model_type") in ("t5", "mt5")]


def on_meta(preset: str) -> Any:
    source = dict(PRESETS[preset])
    family = FAMILIES[f"{source['model_type'].upper()}ForConditionalGeneration"]
    with torch.device("meta"):
        return family(family.config_class.from_dict(source))


@pytest.mark.parametrize("preset", T5_PRESETS)
def test_every_preset_has_exactly_the_parameters_memory_math_counts(preset: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(preset).parameters()) == memory_math.count_parameters(preset)


def test_there_are_presets_of_every_kind() -> None:
    assert {"t5-small", "t5-11b", "t5-v1_1-xxl", "flan-t5-xxl", "mt5-base"} <= {*T5_PRESETS}


@pytest.mark.parametrize(("preset", "rank", "published"), [("t5-base", 8, 884_736), ("flan-t5-large", 16, 4_718_592), ("flan-t5-small", 8, 344_064)])
def test_adapters_have_the_published_number_of_parameters(preset: str, rank: int, published: int) -> None:
    """LoRA of q and v: PEFT's docstring of T5, its int8 notebooks, its docs (troubleshooting)."""
    model = lora_lab.inject(on_meta(preset), rank=rank, target_modules=["q", "v"])
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == published


@pytest.mark.parametrize("target", [["q", "v"], ["wi_0", "wi_1", "wo", "o"], "all-linear"], ids=str)
def test_our_adapters_work_in_peft(target: Any, tmp_path: Any) -> None:
    mine, reference = pair("1.1")
    randomise(lora_lab.inject(mine, rank=3, alpha=5, target_modules=target))
    lora_lab.save(mine, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path)
    assert_close(answer(wrapped), answer(mine), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(mine), answer(pair("1.1")[0]), rtol=1e-2)
    assert lora_lab.count_parameters(mine).trainable == sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("target", [["q", "v"], "all-linear"], ids=str)
def test_peft_adapters_work_on_ours(target: Any, tmp_path: Any) -> None:
    mine, reference = pair("1.0")
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=target, task_type="SEQ_2_SEQ_LM")
    wrapped = randomise(peft.get_peft_model(reference, settings).eval())
    wrapped.save_pretrained(tmp_path)
    before = answer(mine)
    lora_lab.load(mine, tmp_path)
    assert_close(answer(mine), answer(wrapped), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answer(mine), before, rtol=1e-2)


def test_adapters_merge() -> None:
    mine, _ = pair("1.1")
    randomise(lora_lab.inject(mine.double(), rank=2))
    expected = answer(mine)
    assert_close(answer(lora_lab.merge(mine)), expected, rtol=0, atol=1e-9)


# The tokenizer ----------------------------------------------------------------------------------------------------------------


def unigram() -> tokenizers.Tokenizer:
    """As T5's: pieces with their log-probabilities, spaces as part of them, `</s>` behind every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), ("▁the", -3.0), ("▁cat", -5.0), ("▁sat", -5.5), ("s", -4.0)]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrtuvwxyz."]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    return backend


def test_a_folder_of_t5s_tokenizer_is_read_as_it_is(tmp_path: Any) -> None:
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram(), eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
                                                     additional_special_tokens=["<extra_id_0>"])  # fmt: skip
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(T5_SMALL))
    mine = Tokenizer.from_folder(tmp_path)
    assert mine is not None
    assert (mine.eos_token_id, mine.bos_token_id, mine.pad_token_id, mine.end_ids) == (1, None, 0, {1})
    for text in ("the cat sat.", "the <extra_id_0> sat", "cats  and Ω", ""):
        assert mine.encode(text) == reference.encode(text)
        assert mine.encode(text)[-1] == 1 and 1 not in mine.encode(text, add_special_tokens=False)
        assert mine.decode(mine.encode(text)) == reference.decode(reference.encode(text), skip_special_tokens=True)
    (tmp_path / "again").mkdir()
    mine.save(tmp_path / "again")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert again.encode("the cat sat.") == mine.encode("the cat sat.") and again.eos_token_id == 1


def test_prompts_as_text_are_read_with_the_end_token_and_answers_end_at_it() -> None:
    tokenizer = Tokenizer(unigram(), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    mine, _ = pair("1.1")
    prompts = ["the cat sat.", "cats"]
    result = models.generate(mine, prompts, tokenizer, max_new_tokens=5)
    assert result.ids == models.generate(mine, [tokenizer.encode(prompt) for prompt in prompts], tokenizer, max_new_tokens=5).ids
    assert result.texts == [tokenizer.decode(row) for row in result.ids]
    other = models.generate(mine, [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts], tokenizer, max_new_tokens=5)
    assert result.ids != other.ids


# Precision --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
def test_16_bit_is_close_to_float32(how: str) -> None:
    mine = randomised(pair("1.1")[0], std=0.1)
    source, target = ids(2), ids(2, 6)
    expected = logits_of(mine, input_ids=source, decoder_input_ids=target)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = logits_of(mine if how == "autocast" else mine.to(torch.bfloat16), input_ids=source, decoder_input_ids=target)
    assert actual.dtype == torch.bfloat16
    assert float((actual.float() - expected).norm() / expected.norm()) < 0.06


def overflowing(tmp_path: Any) -> tuple[Any, Any]:
    """(in float32, the folder) of a T5 whose `wo` adds more than float16 holds, as the released ones' does."""
    reference = randomised(theirs("1.1"), std=0.1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.mul_(100_000.0 if name.endswith("wo.weight") else 4.0 if name.endswith("wi_1.weight") else 1.0)
    reference.save_pretrained(tmp_path)
    return models.load(tmp_path)[0], tmp_path


def test_hidden_states_beyond_float16_are_not_lost_when_the_rest_is_float16(tmp_path: Any) -> None:
    mine, folder = overflowing(tmp_path)
    source, target = ids(2), ids(2, 6)
    added: list[float] = []
    watch = mine.encoder.block[0].layer[1].DenseReluDense.register_forward_hook(lambda *given: added.append(float(given[2].detach().abs().max())))
    expected = logits_of(mine, input_ids=source, decoder_input_ids=target)
    watch.remove()
    assert added[0] > 65504
    half, _ = models.load(folder, dtype=torch.float16)
    assert {p.dtype for name, p in half.named_parameters() if name.endswith("wo.weight")} == {torch.float32}
    assert {p.dtype for name, p in half.named_parameters() if not name.endswith("wo.weight")} == {torch.float16}
    with torch.autocast("cpu", torch.float16):
        mixed = logits_of(mine, input_ids=source, decoder_input_ids=target)
    for actual in (logits_of(half, input_ids=source, decoder_input_ids=target), mixed):
        assert actual.dtype == torch.float16
        assert float((actual.float() - expected).norm() / expected.norm()) < 0.02
    everything = copy.deepcopy(half).half()  # by hand, wo too: infinities are clamped, as in transformers
    assert logits_of(everything, input_ids=source, decoder_input_ids=target).isfinite().all()


def test_bfloat16_needs_no_exception(tmp_path: Any) -> None:
    theirs("1.1").save_pretrained(tmp_path)
    mine, _ = models.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}


def test_a_quantised_t5_keeps_wo_as_it_was() -> None:
    mine = randomised(pair("1.1")[0], std=0.1)
    source, target = ids(2), ids(2, 6)
    expected = logits_of(mine, input_ids=source, decoder_input_ids=target)
    lora_lab.quantize(mine, "int8")
    linear = {name for name, module in mine.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linear if hasattr(mine.get_submodule(name), "weight")}
    assert kept == {"lm_head", *(name for name in linear if name.endswith(".wo"))}
    actual = logits_of(mine, input_ids=source, decoder_input_ids=target)
    assert 0 < float((actual - expected).norm() / expected.norm()) < 0.1
