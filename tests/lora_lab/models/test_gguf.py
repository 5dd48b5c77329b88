"""GGUF files: weights and config as transformers would have them, and what can be wrong with a file."""

from __future__ import annotations

import math
import sys

import gguf
import gguf_tools
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from llama_tools import ids, logits_of, relative_error, theirs, tokenizer

from lora_lab import LoraLabError, models
from lora_lab.models.gguf_files import GGUFFile

WIDE = {"intermediate_size": 64}  # rows of whole quantisation blocks


def load(path):
    return models.load(path)[0]


def assert_same_logits(model, reference, length=9):
    tokens = ids(length=length)
    assert relative_error(logits_of(model, input_ids=tokens), logits_of(reference, input_ids=tokens)) < 1e-4


# Weights and config ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_computes_what_its_dequantised_weights_compute_in_transformers(tmp_path, kind, tied):
    reference = theirs(**WIDE, tie_word_embeddings=tied)
    before = reference.lm_head.weight.clone()
    path = gguf_tools.write(tmp_path / "model.gguf", reference, kind)
    assert torch.equal(reference.lm_head.weight, before) == (kind == Kind.F32)  # quantisation changes something
    model = load(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings == tied
    assert_same_logits(model, reference)


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12},
     {"rope_theta": 77.0, "rms_norm_eps": 1e-2}],
)  # fmt: skip
def test_every_shape_of_llama_is_read(tmp_path, changes):
    reference = theirs(**WIDE, **changes)
    assert_same_logits(load(gguf_tools.write(tmp_path / "model.gguf", reference)), reference)


def test_transformers_own_reader_agrees(tmp_path):
    gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), Kind.Q8_0)
    assert_same_logits(load(tmp_path / "model.gguf"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"))


def test_absent_optional_fields_have_llama_cpps_defaults(tmp_path):
    """No head_count_kv: as many as heads; no key_length: the width of a head; no freq_base: 10,000."""
    reference = theirs(**WIDE, num_key_value_heads=4)
    optional = [f"llama.{key}" for key in ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count", "vocab_size")]
    assert_same_logits(load(gguf_tools.write(tmp_path / "model.gguf", reference, without=optional)), reference)


def llama3_factors(dim=8, theta=10_000.0, factor=8.0, low=1.0, high=4.0, trained=16):
    """generate_extra_tensors of LlamaModel in llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def test_llama_3s_frequency_factors_are_llama_3s_rope(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    reference = theirs(**WIDE, rope_parameters={"rope_theta": 10_000.0, **rope})
    factors = torch.tensor(llama3_factors()).numpy()
    assert len(set(factors)) > 1
    model = load(gguf_tools.write(tmp_path / "model.gguf", reference, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)))
    assert_same_logits(model, reference, length=40)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_named_rope_scalings_are_read(tmp_path, kind):
    original = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    reference = theirs(**WIDE, rope_parameters={"rope_theta": 10_000.0, "rope_type": kind, "factor": 4.0, **original})

    def scaling(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(16)

    path = gguf_tools.write(tmp_path / "model.gguf", reference, extra=scaling)
    assert GGUFFile(path).config()["rope_scaling"]["rope_type"] == kind
    assert_same_logits(load(path), reference, length=40)


def test_a_loaded_file_knows_its_source_and_has_no_tokenizer_where_there_is_none(tmp_path):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE))
    model, no_tokenizer = models.load(str(path))
    assert no_tokenizer is None
    assert (model.name_or_path, model.source_folder) == (str(path), path)
    assert len(model.base_sha256) == 64


def test_a_file_saved_as_a_folder_is_read_by_transformers(tmp_path):
    model, _ = models.load(gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE, tie_word_embeddings=True), Kind.Q8_0))
    models.save(model, tmp_path / "folder")
    assert_same_logits(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder"))


# What can be wrong with a file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 3, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_says_so(tmp_path, part):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), tokenizer=tokenizer())
    data = path.read_bytes()
    path.write_bytes(data[: part if isinstance(part, int) else int(part * len(data))])
    with pytest.raises(LoraLabError, match="model.gguf is truncated or not a GGUF file.*again"):
        models.load(path)


def test_another_architecture_is_named(tmp_path):
    with pytest.raises(LoraLabError, match="holds a 'qwen2' model.*reads 'llama'"):
        load(gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), architecture="qwen2"))


@pytest.mark.parametrize("field", ["context_length", "embedding_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_missing_field_is_named(tmp_path, field):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), without=[f"llama.{field}"])
    with pytest.raises(LoraLabError, match=f"lacks the field 'llama.{field}'"):
        load(path)


def test_a_missing_embedding_is_named(tmp_path):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), extra=lambda writer: writer.tensors[0].pop("token_embd.weight"))
    with pytest.raises(LoraLabError, match="lacks the tensor 'token_embd.weight'"):
        load(path)


def test_a_missing_layer_and_a_foreign_tensor_are_named(tmp_path):
    gone = gguf_tools.write(tmp_path / "gone.gguf", theirs(**WIDE), extra=lambda writer: writer.tensors[0].pop("blk.1.ffn_up.weight"))
    with pytest.raises(LoraLabError, match="lack 1 tensors.*'model.layers.1.mlp.up_proj.weight'"):
        load(gone)
    experts = torch.ones(4, 32).numpy()
    extra = gguf_tools.write(tmp_path / "experts.gguf", theirs(**WIDE), extra=lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", experts))
    with pytest.raises(LoraLabError, match="unexpected tensor 'blk.0.ffn_gate_inp.weight'"):
        load(extra)


def test_heads_that_are_rotated_in_part_are_refused(tmp_path):
    def half(writer):
        writer.kv_data[0].pop("llama.rope.dimension_count")
        writer.add_rope_dimension_count(4)

    with pytest.raises(LoraLabError, match="rotates 4 of each head's 8"):
        load(gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), extra=half))


def test_a_quantisation_that_gguf_cannot_undo_is_named(tmp_path, monkeypatch):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE), Kind.Q8_0)

    def unknown(*arguments):
        raise NotImplementedError("no such kind")

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(LoraLabError, match="cannot dequantise.*Q8_0"):
        load(path)


def test_without_the_gguf_package_the_error_is_the_pip_line(tmp_path, monkeypatch):
    path = gguf_tools.write(tmp_path / "model.gguf", theirs(**WIDE))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoraLabError, match=r"pip install 'lora-lab\[gguf\]'"):
        load(path)
