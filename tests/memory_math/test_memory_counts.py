"""Parameter counts of every family against the models that transformers builds on the meta device: names, shapes, linear layers."""

from __future__ import annotations

import copy
import json
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from memory_math.architectures import ParameterCount, architecture_of, count_parameters
from memory_math.errors import MemoryMathError
from memory_math.targets import adapted_layers

SMALL = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 176,
}  # fmt: skip
PLAIN = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_BERT = {**PLAIN, "model_type": "bert", "intermediate_size": 80}
SMALL_T5 = {"model_type": "t5", "vocab_size": 1000, "d_model": 64, "d_ff": 80, "d_kv": 12, "num_layers": 2, "num_heads": 4}
CAUSAL = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM", "mixtral": "MixtralForCausalLM", "gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM", "falcon": "FalconForCausalLM", "bert": "BertModel", "roberta": "RobertaModel",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration",
}  # fmt: skip


def build(config: dict[str, Any], class_name: str | None = None, device: str = "meta") -> transformers.PreTrainedModel:
    """The model of `config`, without memory on the meta device; the class is the family's main one where none is named."""
    given = {field: value for field, value in config.items() if field not in ("model_type", "architectures")}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    kind = config["model_type"]
    with torch.device(device):
        built_config = transformers.AutoConfig.for_model(kind, **tokens, **given)
        return getattr(transformers, class_name or CAUSAL[kind])(built_config)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (rows, columns) of every parameter, ties once; a vector is one row, a stack of matrices is their rows."""
    return {name: (p.numel() // p.shape[-1], p.shape[-1]) for name, p in model.named_parameters()}


def linears_of(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    """Path -> (inputs, outputs, bias) of what "all-linear" names in lora_lab: no output embedding, no top-level classifier."""
    head = model.get_output_embeddings()
    found = {
        path: module for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and path.split(".")[0] not in ("score", "classifier")
    }  # fmt: skip
    return {
        path: (*(module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]), module.bias is not None)
        for path, module in found.items()
    }


def assert_same(config: dict[str, Any], class_name: str | None = None) -> None:
    """The same tensors by name and shape, and the same linear layers."""
    model = build(config, class_name)
    ours = architecture_of({**config, **({"architectures": [class_name]} if class_name else {})})
    assert {name: (rows, columns) for name, rows, columns in ours.parameter_tensors()} == shapes_of(model)
    assert {layer.name: (layer.inputs, layer.outputs, layer.bias) for layer in ours.linears()} == linears_of(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(ours.parts().values()) == total == count_parameters(model)
    assert count_parameters(model).parts == {part: count for part, count in ours.parts().items() if count}


def random_config(kind: str, seed: int) -> dict[str, Any]:
    """A config with sizes that no two fields share by design, and every option that shapes the model thrown."""
    dice = random.Random(f"{kind} {seed}")

    def flip() -> bool:
        return dice.random() < 0.5

    heads, hd = dice.choice([4, 6, 8]), dice.choice([8, 12])
    sizes = {"vocab_size": dice.randrange(100, 900), "hidden_size": heads * hd, "num_hidden_layers": dice.randint(1, 3)}
    common = {"model_type": kind, **sizes, "num_attention_heads": heads, "tie_word_embeddings": flip()}
    mlp, kv = {"intermediate_size": dice.randrange(20, 92, 4)}, {"num_key_value_heads": dice.choice([1, 2, heads])}
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral"):
        apart = {"head_dim": dice.choice([6, 10])} if kind != "qwen2" else {}
        flags = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",), "gemma": ("attention_bias",)}.get(kind, ())
        experts = {"num_local_experts": dice.choice([2, 3, 5])} if kind == "mixtral" else {}
        return {**common, **mlp, **kv, **apart, **experts, **{flag: flip() for flag in flags}}
    if kind == "gpt2":
        inner = {"n_inner": dice.randrange(20, 90)} if flip() else {}
        return {"model_type": kind, "vocab_size": sizes["vocab_size"], "n_embd": heads * hd, "n_layer": sizes["num_hidden_layers"],
                "n_head": heads, "n_positions": dice.randrange(10, 99), "tie_word_embeddings": flip(), **inner}  # fmt: skip
    if kind == "opt":
        flags = {name: flip() for name in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm")}
        width = {"word_embed_proj_dim": dice.choice([heads * hd, 24])}
        return {**common, "ffn_dim": dice.randrange(20, 90), "max_position_embeddings": dice.randrange(10, 99), **flags, **width}
    if kind == "gpt_neox":
        return {**common, **mlp, "attention_bias": flip(), "use_parallel_residual": flip()}
    if kind == "falcon":
        flags = {name: flip() for name in ("new_decoder_architecture", "multi_query", "parallel_attn", "bias")}
        more = {"num_kv_heads": dice.choice([1, 2, heads]), "ffn_hidden_size": dice.randrange(20, 90)} if flip() else {}
        return {**common, **flags, **more, **({"num_ln_in_parallel_attn": dice.choice([1, 2])} if flip() else {})}
    if kind in ("bert", "roberta"):
        return {**common, **mlp, "max_position_embeddings": dice.randrange(10, 99), "type_vocab_size": dice.randint(1, 3)}
    forms = ["relu", "gated-gelu", "gated-silu"]
    return {"model_type": kind, "vocab_size": sizes["vocab_size"], "d_model": dice.choice([40, 56]), "d_kv": hd, "num_heads": heads,
            "d_ff": dice.randrange(20, 90), "num_layers": dice.randint(1, 3), "num_decoder_layers": dice.randint(1, 3),
            "feed_forward_proj": dice.choice(forms), "tie_word_embeddings": True, "relative_attention_num_buckets": dice.choice([8, 32])}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", CAUSAL)
def test_every_tensor_and_linear_layer_is_that_of_the_built_model(kind: str, seed: int) -> None:
    assert_same(random_config(kind, seed))


@pytest.mark.parametrize("class_name", [
    "LlamaModel", "LlamaForSequenceClassification", "Qwen2ForSequenceClassification", "MixtralModel", "GPT2Model", "GPT2ForSequenceClassification",
    "OPTModel", "OPTForSequenceClassification", "GPTNeoXModel", "GPTNeoXForSequenceClassification", "FalconModel",
    "FalconForSequenceClassification", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification", "RobertaForMaskedLM",
    "RobertaForSequenceClassification", "RobertaForTokenClassification", "T5Model", "T5EncoderModel", "MT5EncoderModel",
])  # fmt: skip
def test_the_other_classes_of_a_family_have_their_own_paths_and_heads(class_name: str) -> None:
    prefixes = {"Llama": "llama", "Qwen2": "qwen2", "Mixtral": "mixtral", "GPT2": "gpt2", "OPT": "opt", "GPTNeoX": "gpt_neox", "Falcon": "falcon",
                "Bert": "bert", "Roberta": "roberta", "T5": "t5", "MT5": "mt5"}  # fmt: skip
    kind = next(kind for prefix, kind in prefixes.items() if class_name.startswith(prefix))
    config = random_config(kind, 9)
    for tied in (True, False):
        if kind in ("t5", "mt5") and not tied:
            continue  # transformers 5 ties every T5 that it builds from a config
        more = {"num_labels": 5} if "Classification" in class_name else {}
        assert_same({**config, **more, "tie_word_embeddings": tied}, class_name)


@pytest.mark.parametrize("kind", CAUSAL)
def test_linear_layers_come_in_the_order_in_which_forward_calls_them(kind: str) -> None:
    config = random_config(kind, 5)
    model, called = build(config, device="cpu"), []
    paths = [layer.name for layer in architecture_of(config).linears()]
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, **({"decoder_input_ids": ids} if kind in ("t5", "mt5") else {}))
    assert called == paths


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_field_that_is_left_out_means_what_the_class_takes_it_to_be(kind: str) -> None:
    """Only the sizes are given, with heads that every default of key/value heads divides."""
    if kind in ("t5", "mt5"):
        config = {**SMALL_T5, "model_type": kind, "tie_word_embeddings": True}
    elif kind == "gpt2":
        config = {"model_type": "gpt2", "vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4}
    else:
        mlp = {} if kind == "falcon" else {"ffn_dim" if kind == "opt" else "intermediate_size": 80}
        config = {**PLAIN, "model_type": kind, "num_attention_heads": 32, **mlp}
    assert_same(config)


def test_null_is_not_the_same_as_left_out_for_key_value_heads() -> None:
    """transformers: Qwen2Config has 32 by default, and as many as heads for null."""
    config = {**PLAIN, "model_type": "qwen2", "num_attention_heads": 64, "intermediate_size": 80}
    assert architecture_of(config).kv_heads == 32
    assert architecture_of({**config, "num_key_value_heads": None}).kv_heads == 64
    assert_same({**config, "num_key_value_heads": None})


# config.json files as transformers 4 wrote them, with the total that is published
FILES_OF_TRANSFORMERS_4 = [
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
      "vocab_size": 50257, "resid_pdrop": 0.1, "activation_function": "gelu_new"}, 124_439_808),
    ({"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel", "alibi": False, "bias": False, "hidden_size": 4544,
      "multi_query": True, "n_head": 71, "n_layer": 32, "parallel_attn": True, "vocab_size": 65024}, 6_921_720_704),
    ({"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb", "alibi": False, "bias": False, "hidden_size": 8192, "n_head": 128,
      "n_head_kv": 8, "n_layer": 60, "parallel_attn": True, "vocab_size": 65024}, 41_303_293_952),
    ({"architectures": ["T5WithLMHeadModel"], "model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512, "num_heads": 8, "num_layers": 6,
      "vocab_size": 32128, "relative_attention_num_buckets": 32}, 60_506_624),
    ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": 1024, "d_kv": 64, "d_model": 512, "num_heads": 6,
      "num_layers": 8, "num_decoder_layers": 8, "feed_forward_proj": "gated-gelu", "is_gated_act": True, "vocab_size": 32128,
      "tie_word_embeddings": False}, 76_961_152),
    ({"architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
      "num_hidden_layers": 12, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}, 109_514_298),
    ({"architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_size": 1024, "intermediate_size": 4096,
      "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 30522, "id2label": {"0": "NO", "1": "YES"}}, 335_143_938),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
      "num_hidden_layers": 32, "vocab_size": 32000, "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False}, 6_738_415_616),
]  # fmt: skip


@pytest.mark.parametrize(("config", "total"), FILES_OF_TRANSFORMERS_4)
def test_files_of_transformers_4_are_read(config: dict[str, Any], total: int) -> None:
    assert count_parameters(config) == total


def test_an_untied_t5_is_known_by_either_field() -> None:
    """transformers 5 writes tie_word_embeddings=true for every T5; what says that the checkpoint has a head is scale_decoder_outputs."""
    tied = count_parameters(SMALL_T5)
    for fields in ({"tie_word_embeddings": False}, {"tie_word_embeddings": True, "scale_decoder_outputs": False}):
        assert count_parameters({**SMALL_T5, **fields}) - tied == 64_000
    written = transformers.T5Config(tie_word_embeddings=False).to_dict()
    assert written["tie_word_embeddings"] and not architecture_of(written).tied and not architecture_of(written).scaled_head


# Live modules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_a_live_model_is_of_its_own_class_whatever_its_config_says(class_name: str) -> None:
    model = build(SMALL_BERT, class_name)
    model.config.architectures = ["BertForTokenClassification"]
    assert class_name.endswith(architecture_of(model).task)
    assert {name: rows * columns for name, rows, columns in architecture_of(model).parameter_tensors()} == {
        name: parameter.numel() for name, parameter in model.named_parameters()
    }


def test_a_t5_encoder_is_not_a_whole_t5() -> None:
    encoder, whole = build(SMALL_T5, "T5EncoderModel"), build(SMALL_T5)
    assert architecture_of(encoder).decoder_layers == 0
    assert count_parameters(encoder) == sum(parameter.numel() for parameter in encoder.parameters()) < count_parameters(whole)


def test_a_live_model_is_tied_if_it_is() -> None:
    """transformers 5.23 ties a T5 that is built from a config alone, whatever the config says."""
    model = build({**SMALL_T5, "tie_word_embeddings": False})
    assert model.lm_head.weight is model.shared.weight and architecture_of(model).tied
    model.lm_head.weight = nn.Parameter(model.shared.weight.clone())
    assert not architecture_of(model).tied
    assert count_parameters(model).parts["head"] == count_parameters(model).parts["embedding"] == 64_000


def test_a_bare_module_needs_no_config() -> None:
    layer = nn.Linear(30, 20)
    count = count_parameters(nn.Sequential(layer, nn.LayerNorm(20), nn.Linear(20, 30), layer))  # the shared layer counts once
    assert count == 2 * 600 + 50 + 40 and count.name == "Sequential"
    assert count.parts == {"biases": 20 + 20 + 30, "other": 1200 + 20}  # numbers for names say nothing


def test_what_is_added_to_a_model_is_counted_too() -> None:
    model = build(SMALL)
    before = count_parameters(model)
    model.model.layers[0].self_attn.q_proj.lora_A = nn.Parameter(torch.empty(8, 64, device="meta"))
    after = count_parameters(model)
    assert after - before == 512 and after.parts == {**before.parts, "adapters": 512}


@pytest.mark.parametrize("kind", CAUSAL)
def test_names_alone_tell_the_same_parts_but_for_fused_projections(kind: str) -> None:
    """The table of names, used where a config is missing or not understood, against the architecture's own parts."""
    model = build(random_config(kind, 3) | ({"word_embed_proj_dim": None} if kind == "opt" else {}))
    known = {part: count for part, count in architecture_of(model).parts().items() if count}
    if any("qkv" in name or "query_key_value" in name or "c_attn" in name for name, _ in model.named_parameters()):
        known["qkv"] = sum(known.pop(part) for part in "qkv")
    assert count_parameters(SimpleNamespace(named_parameters=model.named_parameters)).parts == known


def test_a_class_that_is_not_modelled_is_counted_but_has_no_architecture() -> None:
    model = build(SMALL_BERT, "BertForQuestionAnswering")
    assert count_parameters(model) == sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(MemoryMathError, match=r"'BertForQuestionAnswering' is not modelled; modelled of this family: BertModel, BertForMaskedLM"):
        architecture_of(model)


def test_packed_weights_are_not_counted_as_if_they_were_parameters() -> None:
    packed = nn.Linear(8, 8)
    packed.weight = nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MemoryMathError, match=r"weight holds torch.uint8: packed weights"):
        count_parameters(packed)
    quantised = build(SMALL)
    quantised.config.quantization_config = {"bits": 4}
    with pytest.raises(MemoryMathError, match=r"LlamaForCausalLM: quantization_config is set"):
        count_parameters(quantised)


# The result ------------------------------------------------------------------------------------------------------------------


def test_a_count_is_an_int_with_parts() -> None:
    count = count_parameters("llama-2-7b")
    assert count == 6_738_415_616 == count.total == sum(count.parts.values())
    assert f"{count:,}" == "6,738,415,616" and json.dumps(count) == "6738415616" and count / 2 == 3_369_207_808
    assert str(count) == count.table() and count.table().splitlines()[-1].split() == ["total", "6,738,415,616"]
    for again in (copy.deepcopy(count), pickle.loads(pickle.dumps(count))):
        assert isinstance(again, ParameterCount) and again == count and again.parts == count.parts and again.name == "llama-2-7b"


def test_a_fused_projection_is_counted_as_the_three_that_it_holds() -> None:
    """Falcon-40B: 128 query heads and 8 key/value heads of 64."""
    parts = count_parameters("falcon-40b").parts
    assert parts["q"] == 60 * 8192 * 8192 and parts["k"] == parts["v"] == 60 * 8192 * 8 * 64


def test_the_same_config_from_dict_folder_file_and_object(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    expected = count_parameters(SMALL).parts
    model = SimpleNamespace(config=SimpleNamespace(**SMALL))
    config = transformers.LlamaConfig(**{name: value for name, value in SMALL.items() if name != "model_type"})
    for source in (tmp_path, str(tmp_path / "config.json"), model, config, architecture_of(SMALL)):
        assert count_parameters(source).parts == expected


def test_a_tied_head_counts_nothing_and_an_untied_one_as_much_as_the_embedding() -> None:
    assert count_parameters({**SMALL, "tie_word_embeddings": True}).parts["head"] == 0
    untied = count_parameters(SMALL).parts
    assert untied["head"] == untied["embedding"] == 64_000


# What is built on it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_attention_means_the_projections_of_every_attention(kind: str) -> None:
    """lora_lab's rule: linear layers in a module whose name has "attn" or "attention" in it; T5's cross attention is one, too."""
    architecture = architecture_of(random_config(kind, 1))
    parents = {layer.name: layer.name.rpartition(".")[0].lower() for layer in architecture.linears()}
    expected = {name for name, parent in parents.items() if "attn" in parent or "attention" in parent}
    assert set(adapted_layers(architecture, "attention")) == expected
    assert len(expected) >= 2 * architecture.layers  # one fused projection and the output at least


def test_a_shard_holds_its_share_of_every_matrix_and_whole_norms() -> None:
    """Megatron-LM, section 3: q, k, v, gate, up by columns, o and down by rows, embedding and head by words."""
    for source in ("llama-2-7b", "pythia-1b", "gpt2-medium", "bert-large-uncased"):
        whole, half = count_parameters(source).parts, architecture_of(source).shard(2).parts()
        for part in set(whole) - {"biases", "norms", "positions", "token types", "pooler", "embedding"}:
            assert 2 * half[part] == whole[part], (source, part)
        assert half["norms"] == whole["norms"] and half["embedding"] * 2 - whole["embedding"] in (0, architecture_of(source).hidden)
    assert architecture_of("llama-2-70b").shard(16).kv_heads == 1  # 8 key/value heads, each on two devices
    with pytest.raises(MemoryMathError, match=r"tensor_parallel=3: the 32 heads of llama-2-7b do not divide"):
        architecture_of("llama-2-7b").shard(3)


# Errors ------------------------------------------------------------------------------------------------------------------------


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(MemoryMathError, match=r"llama-3-9b.*did you mean llama-3-8b"):
        count_parameters("llama-3-9b")
    with pytest.raises(MemoryMathError, match=r"'zzz' is neither a preset .* presets, such as llama-3-8b"):
        count_parameters("zzz")


@pytest.mark.parametrize(("config", "message"), [
    ({k: v for k, v in SMALL.items() if k != "intermediate_size"}, r"no intermediate_size \(the width of the MLP\)"),
    ({"model_type": "gpt2", "vocab_size": 9}, r"no n_embd \(the width of the residual stream\); found: model_type, vocab_size"),
    ({**SMALL, "hidden_size": 0}, r"hidden_size=0 .*at least 1"),
    ({**SMALL, "hidden_size": "64"}, r"hidden_size='64' .*whole number"),
    ({**SMALL, "hidden_size": 66}, r"66 does not divide into 4 heads"),
    ({**SMALL, "num_key_value_heads": 3}, r"4 does not divide into 3 heads"),
    ({**SMALL, "tie_word_embeddings": "no"}, r"tie_word_embeddings='no': expected true or false"),
    ({**SMALL, "attention_dropout": 2}, r"attention_dropout=2: expected a number with 0 <="),
    ({**SMALL, "hidden_act": 7}, r"hidden_act=7: expected a name"),
    ({**SMALL, "architectures": "LlamaForCausalLM"}, r"architectures='LlamaForCausalLM': expected a list"),
    ({**SMALL, "architectures": ["LlamaForTokenClassification"]}, r"'LlamaForTokenClassification' is not modelled; modelled of this family: LlamaF"),
    ({**SMALL_BERT, "add_cross_attention": True}, r"add_cross_attention=True is not modelled"),
    ({**SMALL_BERT, "num_attention_heads": 5}, r"64 does not divide into 5 heads"),
    ({**SMALL_T5, "feed_forward_proj": "swi-glu"}, r"feed_forward_proj='swi-glu': expected an activation"),
    ({**SMALL, "model_type": "rwkv"}, r"model_type='rwkv' is not modelled yet; supported now: llama, mistral, qwen2, .*gpt2, .*t5"),
    ({**SMALL, "model_type": None}, r"model_type=None is not modelled"),
    ({**SMALL, "quantization_config": {"bits": 4}}, r"quantization_config is set"),
])  # fmt: skip
def test_a_config_that_cannot_be_counted_says_which_field(config: dict[str, object], message: str) -> None:
    with pytest.raises(MemoryMathError, match=message):
        count_parameters(config)


def test_a_source_without_config_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(MemoryMathError, match="expected a JSON object"):
        count_parameters(tmp_path)
    with pytest.raises(MemoryMathError, match="int has no config to read"):
        count_parameters(7)
