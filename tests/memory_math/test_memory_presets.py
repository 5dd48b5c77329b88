"""Every preset's total: the published integer, and what transformers builds of the same config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from memory_math.architectures import architecture_of, count_parameters
from memory_math.presets import PRESETS, SAME_SHAPE

ORIGINALS = [name for name in PRESETS if name not in {alias for aliases in SAME_SHAPE.values() for alias in aliases}]
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
# Published totals (model cards, papers, hub files) in which every tensor counts once, a tied head not at all
PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192, "llama-2-70b-chat": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248, "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.1": 7_241_732_096, "mixtral-8x7b": 46_702_792_704,
    "tinyllama-1.1b": 1_100_048_384, "smollm2-135m": 134_515_008, "smollm2-135m-instruct-q4": 134_515_008, "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328, "falcon-7b": 6_921_720_704, "falcon-40b-instruct": 41_303_293_952, "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "bert-base-uncased": 109_482_240,
    "bert-large-uncased": 335_141_888, "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856, "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352, "t5-v1_1-xxl": 11_135_332_352,
}  # fmt: skip


@pytest.mark.parametrize(("preset", "total"), PUBLISHED.items())
def test_preset_has_exactly_the_published_number_of_parameters(preset: str, total: int) -> None:
    assert count_parameters(preset) == PRESETS[preset].parameters == total
    assert sum(rows * columns for _, rows, columns in architecture_of(preset).parameter_tensors()) == total


@pytest.mark.parametrize("preset", ORIGINALS)
def test_preset_has_as_many_parameters_as_the_model_that_transformers_builds(preset: str) -> None:
    """On the meta device, with one layer and with two: blocks are alike, so the difference is what each further one adds."""
    config = dict(PRESETS[preset])
    one, two = (built_parameters(config, layers) for layers in (1, 2))
    total = one + (architecture_of(preset).layers - 1) * (two - one)
    if config.get("tie_word_embeddings") is False and config["model_type"] in ("t5", "mt5"):
        total += config["vocab_size"] * config["d_model"]  # transformers 5 ties what it builds from a config; the checkpoints have a head
    assert count_parameters(preset) == PRESETS[preset].parameters == total


def built_parameters(config: dict[str, Any], layers: int) -> int:
    fields = {**config, **{field: layers for field in LAYERS if field in config}}
    kind, classes = fields.pop("model_type"), fields.pop("architectures", None)
    auto = transformers.AutoModelForSeq2SeqLM if kind in ("t5", "mt5") else transformers.AutoModel if classes else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers.AutoConfig.for_model(kind, **fields))
    return sum(parameter.numel() for parameter in model.parameters())


def test_presets_are_lower_case_and_say_what_they_are_of() -> None:
    assert len(ORIGINALS) >= 60
    for name, preset in PRESETS.items():
        assert name == name.lower() and preset.source
        assert count_parameters(name).name == name and count_parameters(name) == preset.parameters


def test_an_alias_has_the_shape_of_its_original() -> None:
    for original, aliases in SAME_SHAPE.items():
        assert all(count_parameters(alias).parts == count_parameters(original).parts for alias in aliases)
