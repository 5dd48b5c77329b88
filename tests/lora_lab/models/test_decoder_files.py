"""GPT-2, GPT-NeoX and Falcon on disk: configs of every generation, old checkpoints, what is refused; counts, and ALiBi."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from decoder_tools import FALCON, GPT2, NEOX, SHAPES, pair, theirs
from llama_tools import VOCABULARY, ids, logits_of, relative_error
from torch.testing import assert_close
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

import memory_math
from lora_lab import LoraLabError, models
from lora_lab.models import loading
from lora_lab.models.falcon import alibi, places_of
from memory_math.presets import PRESETS

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "falcon": "FalconForCausalLM"}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_saved_loads_on_both_sides(shape: str, tmp_path: Any) -> None:
    mine, reference = pair(shape)
    reference.save_pretrained(tmp_path / "theirs")
    models.save(mine, tmp_path / "ours")
    tokens = ids()
    for folder in ("theirs", "ours"):
        loaded, _ = models.load(tmp_path / folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is type(mine) and type(again) is type(reference)
        assert torch.equal(logits_of(loaded, input_ids=tokens), logits_of(mine, input_ids=tokens))
        assert_close(logits_of(again, input_ids=tokens), logits_of(reference, input_ids=tokens), rtol=1e-4, atol=1e-4)
        assert memory_math.count_parameters(loaded.config.to_dict()).total == sum(parameter.numel() for parameter in mine.parameters())
    names = [{name for name, _ in loading.read_weights([tmp_path / folder / "model.safetensors"])} for folder in ("ours", "theirs")]
    assert names[0] == names[1]  # NeoX's head is embed_out there


# Files of other years -------------------------------------------------------------------------------------------------------------

HUB_GPT2 = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1, "model_type": "gpt2",
            "layer_norm_epsilon": 1e-5, "n_ctx": 48, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 48, "resid_pdrop": 0.1,
            "summary_type": "cls_index", "task_specific_params": {"text-generation": {"max_length": 50}}, "vocab_size": VOCABULARY}  # fmt: skip
HUB_PYTHIA = {**NEOX, "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "layer_norm_eps": 1e-5, "model_type": "gpt_neox",
              "rotary_emb_base": 500, "rotary_pct": 0.5, "tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True,
              "vocab_size": VOCABULARY}  # fmt: skip
HUB_FALCON = {**FALCON, "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"],
              "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "bias": False, "model_type": "falcon", "multi_query": True,
              "new_decoder_architecture": False, "parallel_attn": True, "vocab_size": VOCABULARY}  # fmt: skip
FIRST_FALCON = {"alibi": False, "architectures": ["RWForCausalLM"], "bias": False, "hidden_size": 32, "model_type": "RefinedWebModel",
                "multi_query": True, "n_head": 4, "n_layer": 2, "parallel_attn": True, "vocab_size": VOCABULARY}  # fmt: skip
FIRST_40B = {**FIRST_FALCON, "model_type": "RefinedWeb", "n_head_kv": 2, "multi_query": None}
OLD: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # the file, and the shape of transformers 5 that it means
    "gpt2": (HUB_GPT2, "gpt2", {}),
    "pythia": (HUB_PYTHIA, "neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    "falcon-7b": (HUB_FALCON, "falcon-7b", {}),
    "falcon-7b-2023": (FIRST_FALCON, "falcon-7b", {}),
    "falcon-40b-2023": (FIRST_40B, "falcon-40b", {"tie_word_embeddings": True}),
}


def as_first_written(name: str, reference: Any) -> dict[str, torch.Tensor]:
    """The weights by the names of the first files, with the buffers that they carry."""
    mask, weights = torch.ones(1, 1, 48, 48).tril(), dict(reference.state_dict())
    if name == "gpt2":
        masks = {f"h.{layer}.attn.{kind}": mask for layer in range(2) for kind in ("bias", "masked_bias")}
        return {key.removeprefix("transformer."): tensor for key, tensor in weights.items() if key != "lm_head.weight"} | masks
    if name == "pythia":
        kinds = ("bias", "masked_bias", "rotary_emb.inv_freq")
        masks = {f"gpt_neox.layers.{layer}.attention.{kind}": mask for layer in range(2) for kind in kinds}
        return {key.replace("lm_head", "embed_out"): tensor for key, tensor in weights.items()} | masks
    return weights


@pytest.mark.parametrize("name", OLD)
def test_files_of_other_years_mean_the_same(name: str, tmp_path: Any) -> None:
    source, shape, changes = OLD[name]
    reference = theirs(shape, **changes)
    mine = loading.build(source, as_first_written(name, reference).items(), None, None)
    tokens = ids()
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (mine, reference))) < 1e-4
    models.save(mine, tmp_path)  # what we write, transformers 5 reads
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(*(logits_of(model, input_ids=tokens) for model in (again, reference))) < 1e-4


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"add_cross_attention": True}, "looks at an encoder"),
    ("gpt2", {"n_head": 5}, "5 attention heads cannot share a width of 32"),
    ("gpt2", {"activation_function": "gelu_neww"}, "did you mean 'gelu_new'"),
    ("gpt2", {"resid_pdrop": 1.5}, "expected a probability"),
    ("gpt2", {"scale_attn_weights": "yes"}, "expected true or false"),
    ("gpt2", {"n_layer": 2**31}, "expected a whole number of at least 1, at most 2,147,483,647"),
    ("gpt2", {"n_layer": 0}, "expected a whole number"),
    ("gpt2", {"layer_norm_epsilon": "small"}, "expected a small positive number"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "above 0, 1 at most"),
    ("neox", {"rope_parameters": None, "rotary_pct": 0}, "above 0, 1 at most"),
    ("neox", {"quantization_config": {"bits": 4}}, "quantised weights are not read"),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "side by side"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "2 in the new decoder"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "not a multiple"),
    ("falcon", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotating a part of each head"),
    ("falcon", {"apply_residual_connection_post_layernorm": True}, "not modelled"),
]


@pytest.mark.parametrize("family, change, message", REFUSED)
def test_what_is_not_modelled_is_refused_by_name(family: str, change: dict[str, Any], message: str) -> None:
    source = {**{"gpt2": GPT2, "neox": NEOX, "falcon": FALCON}[family], "vocab_size": 64, **change}
    architecture = {"gpt2": "gpt2", "neox": "gpt_neox", "falcon": "falcon"}[family]
    with pytest.raises(LoraLabError, match=message):
        loading.FAMILIES[ARCHITECTURES[architecture]].config_class.from_dict(source)


def test_positions_beyond_gpt2s_context_are_refused() -> None:
    mine, _ = pair("gpt2")
    assert logits_of(mine, input_ids=ids(1, 48)).isfinite().all()
    with pytest.raises(LoraLabError, match="position 48 is outside the model's context of 48"):
        mine(input_ids=ids(1, 49))


@pytest.mark.parametrize("name", [name for name, fields in PRESETS.items() if fields["model_type"] in ARCHITECTURES])
def test_every_preset_has_memory_maths_count(name: str) -> None:
    """A tied head is counted once."""
    with torch.device("meta"):
        family = loading.FAMILIES[ARCHITECTURES[PRESETS[name]["model_type"]]]
        model = family(family.config_class.from_dict(PRESETS[name]))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == memory_math.count_parameters(name).total == memory_math.count_parameters(model).total


# ALiBi --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 32, 71])
def test_alibi_is_transformers_rounding_and_all(heads: int) -> None:
    padding = torch.ones(3, 300, dtype=torch.long)
    padding[0, :7], padding[1, 250:] = 0, 0
    expected = build_alibi_tensor(padding, heads, torch.float32).view(3, heads, 300)
    bias = alibi(heads, places_of(None, padding, 300, padding.device))
    assert torch.equal(bias[..., 0].float(), expected)
    assert not bias[..., 1:].any()
