"""Parameter counts against the integers that the built models have (transformers, sum of numel on the meta device)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from memory_math import MemoryMathError, count_parameters
from memory_math.architectures import architecture_of

KNOWN = {
    "smollm2-135m": 134_515_008,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-135m-instruct-q4": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
SMALL = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 176,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "total"), KNOWN.items())
def test_preset_has_exactly_the_published_number_of_parameters(preset: str, total: int) -> None:
    assert count_parameters(preset).total == total
    assert sum(rows * columns for _, rows, columns in architecture_of(preset).parameter_tensors()) == total


@pytest.mark.parametrize("change", [
    {}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 24}, {"num_key_value_heads": 4},
    {"num_key_value_heads": None}, {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 20},
])  # fmt: skip
def test_count_equals_the_built_model_part_by_part(change: dict[str, object]) -> None:
    """transformers builds the same config: every parameter's name and shape, with ties counted once."""
    config = {**SMALL, **change}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert {name: rows * columns for name, rows, columns in architecture_of(config).parameter_tensors()} == built
    assert count_parameters(config).total == sum(built.values())
    assert count_parameters(model).total == sum(built.values())  # read from model.config


def test_the_same_config_from_dict_folder_file_and_object(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    expected = count_parameters(SMALL).parts
    model = SimpleNamespace(config=SimpleNamespace(**SMALL))
    for source in (tmp_path, str(tmp_path / "config.json"), model):
        assert count_parameters(source).parts == expected


def test_a_tied_head_counts_nothing_and_an_untied_one_as_much_as_the_embedding() -> None:
    assert count_parameters({**SMALL, "tie_word_embeddings": True}).parts["head"] == 0
    untied = count_parameters(SMALL).parts
    assert untied["head"] == untied["embedding"] == 64_000


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(MemoryMathError, match=r"llama-3-9b.*did you mean llama-3-8b"):
        count_parameters("llama-3-9b")


@pytest.mark.parametrize(("config", "message"), [
    ({k: v for k, v in SMALL.items() if k != "intermediate_size"}, r"no intermediate_size \(the width of the MLP\)"),
    ({**SMALL, "hidden_size": 0}, r"hidden_size=0 .*at least 1"),
    ({**SMALL, "hidden_size": "64"}, r"hidden_size='64' .*whole number"),
    ({**SMALL, "hidden_size": 66}, r"66 does not divide into 4 heads"),
    ({**SMALL, "num_key_value_heads": 3}, r"4 does not divide into 3 heads"),
    ({**SMALL, "model_type": "gpt2"}, r"model_type='gpt2' is not modelled yet; supported now: llama"),
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
