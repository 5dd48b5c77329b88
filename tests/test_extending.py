"""docs/how-to/extend.md is really done: its code is run, and what it adds keeps the promises that the rest of the library makes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from docs_tools import blocks, run_page
from small_models import randomise
from tiny_workshop import QUIET, forgotten, our_llama, same_bits, token_rows, weights
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, kinds, models, training, variants
from lora_lab.models import loading
from lora_lab.training import optimizers

PAGE = "docs/how-to/extend.md"
TABLES: tuple[Any, ...] = (kinds.KINDS, variants.VARIANTS, loading.FAMILIES, optimizers.OPTIMIZERS)
ROWS = token_rows(8)
EXACT = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[dict[str, Any]]:
    """The names the page's code leaves; the tables are afterwards what they were."""
    before = [copy.copy(table) for table in TABLES]
    yield run_page(PAGE, {})
    for table, content in zip(TABLES, before, strict=True):
        table.clear()
        table.extend(content) if isinstance(table, list) else table.update(content)


def test_each_of_the_four_is_about_thirty_lines() -> None:
    code = [[line for line in block.text.splitlines() if line.strip()] for block in blocks(PAGE) if block.kind == "python"]
    assert len(code) == 5 and max(map(len, code)) <= 31


# A layer type ----------------------------------------------------------------------------------------------------------------------


def upsampler(**inject: Any) -> Any:
    torch.manual_seed(1)
    first, second = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.ConvTranspose2d(6, 3, (2, 3), dilation=2)
    return lora_lab.inject(nn.Sequential(first, nn.ReLU(), second).double(), 3, alpha=6, target_modules=nn.ConvTranspose2d, **inject)


IMAGES = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_new_layer_type_is_the_layer_with_the_dense_update() -> None:
    model = upsampler(init="random")
    plain = lora_lab.eject(copy.deepcopy(model))
    with torch.no_grad():
        for path in ("0", "2"):
            kind, layer = model.get_submodule(path).lora_kind, model.get_submodule(path)
            plain.get_submodule(path).weight += kind.stored(layer.lora_delta("default"), plain.get_submodule(path))
    assert_close(model(IMAGES), plain(IMAGES), **EXACT)
    with lora_lab.disabled(model):
        assert not torch.allclose(model(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("inject", [{}, {"variant": "dora"}, {"lora_bias": True}, {"rslora": True}], ids=str)
def test_a_new_layer_type_begins_as_the_base_learns_merges_and_goes_into_a_file(inject: dict[str, Any], tmp_path: Path) -> None:
    model = upsampler(**inject)
    with lora_lab.disabled(model):
        base = model(IMAGES)
    assert_close(model(IMAGES), base, rtol=0, atol=1e-6 if inject.get("variant") == "dora" else 0.0)
    model(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = randomise(model)(IMAGES)
    assert not torch.allclose(adapted, base)
    lora_lab.save(model, tmp_path / "adapter")
    assert_close(lora_lab.merge(model)(IMAGES), adapted, rtol=0, atol=1e-6)
    again = lora_lab.load(lora_lab.eject(model), tmp_path / "adapter")
    assert_close(again(IMAGES), adapted, rtol=0, atol=1e-6)


def test_rows_of_a_batch_have_adapters_of_a_new_layer_type() -> None:
    model = lora_lab.inject(upsampler(init="random"), 2, target_modules=nn.ConvTranspose2d, adapter="b", init="random")
    with lora_lab.per_sample(model, ["default", "b"]):
        both = model(IMAGES)
    for row, name in enumerate(["default", "b"]):
        assert_close(both[row], lora_lab.use(model, name)(IMAGES[row : row + 1])[0], **EXACT)


# A variant -------------------------------------------------------------------------------------------------------------------------


def small(**inject: Any) -> Any:
    return lora_lab.inject(our_llama(torch.float64), 3, alpha=6, **inject)


IDS = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(2))


def test_a_new_variant_trains_its_own_tensor_and_nothing_else() -> None:
    model = small(variant="lora-xs")
    assert_close(model(input_ids=IDS).logits, our_llama(torch.float64)(input_ids=IDS).logits, rtol=0, atol=0)
    layers = 2 * 7
    assert lora_lab.count_parameters(model).trainable == layers * 3 * 3
    before = weights(model)
    result = training.fit(model, ROWS, {"max_steps": 8, "learning_rate": 0.05, **QUIET})
    assert result.losses[-1] < result.losses[0]
    assert {name for name, values in weights(model).items() if not torch.equal(values, before[name])} == {
        name for name in before if ".lora_R." in name
    }


def test_a_new_variants_gradient_is_that_of_its_dense_update() -> None:
    model = small(variant="lora-xs", target_modules=["q_proj"], layers=[0])
    layer: Any = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_R["default"].normal_()
    model(input_ids=IDS, labels=IDS).loss.backward()
    dense = our_llama(torch.float64)
    q = dense.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q.weight += layer.lora_delta("default")
    dense(input_ids=IDS, labels=IDS).loss.backward()
    expected = 2.0 * layer.lora_B["default"].T @ q.weight.grad @ layer.lora_A["default"].T  # alpha / rank = 2
    assert_close(layer.lora_R["default"].grad, expected, **EXACT)


def test_a_new_variant_merges_is_copied_and_taken_out_and_its_file_is_plain_lora(tmp_path: Path) -> None:
    model = small(variant="lora-xs")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_R" in name:
                parameter.normal_()
    adapted = model(input_ids=IDS).logits
    assert_close(copy.deepcopy(model)(input_ids=IDS).logits, adapted, rtol=0, atol=0)
    lora_lab.save(model, tmp_path / "adapter")
    assert_close(lora_lab.merge(model)(input_ids=IDS).logits, adapted, **EXACT)
    assert_close(lora_lab.unmerge(model)(input_ids=IDS).logits, adapted, rtol=0, atol=0)
    assert not any("lora" in name for name in lora_lab.eject(model).state_dict())
    assert_close(lora_lab.load(model, tmp_path / "adapter")(input_ids=IDS).logits, adapted, **EXACT)
    with pytest.raises(LoraLabError, match="the tensors"):  # whose tensors are others
        lora_lab.load(small(variant="lora-xs"), tmp_path / "adapter", replace=True)


def test_where_a_new_variant_cannot_be_it_is_refused_and_not_replaced_by_another() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    with pytest.raises(LoraLabError, match="variant='lora-xs'.*name the whole layer"):
        lora_lab.inject(model, 2, variant="lora-xs", target_modules=["0.q"], fused={"0": {"q": 4, "k": 8}})
    with pytest.raises(LoraLabError, match="variant='lora-xs'"):
        lora_lab.inject(model, 2, variant="lora-xs", target_modules=[], target_parameters=["0.weight"])


# A model family --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def olmo(tmp_path: Path) -> tuple[Any, Path]:
    """transformers' OLMo, and the folder it is saved in."""
    torch.manual_seed(3)
    config = transformers.OlmoConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=2)  # fmt: skip
    theirs = transformers.OlmoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "olmo")
    return theirs, tmp_path / "olmo"


def test_a_new_family_computes_what_transformers_does_and_folders_go_both_ways(olmo: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = olmo
    ours, _ = models.load(folder)
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    assert type(ours).__name__ == "OlmoForCausalLM"
    mine, reference = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    assert_close(ours(input_ids=ids, labels=ids).loss, theirs(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-5)
    models.save(ours, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again).__name__ == "OlmoForCausalLM"
    assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=0)


def test_a_new_family_is_adapted_trained_and_generated_with(olmo: tuple[Any, Path]) -> None:
    theirs, folder = olmo
    model = lora_lab.inject(models.load(folder)[0], 2)
    rows = [{"input_ids": [3, 5, 7, 9 + row], "labels": [-100, 5, 7, 9 + row]} for row in range(4)]
    settings = {"max_steps": 6, "learning_rate": 0.02, "gradient_checkpointing": True, **QUIET}
    result = training.fit(model, rows, settings)
    assert result.losses[-1] < result.losses[0]
    with lora_lab.disabled(model):
        written = models.generate(model, [[5, 9, 4]], max_new_tokens=6, stop_ids=[]).ids[0]
    expected = theirs.generate(torch.tensor([[5, 9, 4]]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    assert written == expected


def test_a_new_familys_config_says_what_it_cannot_read(olmo: tuple[Any, Path]) -> None:
    folder = olmo[1]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"clip_qkv": null', '"clip_qkv": 8.0'))
    with pytest.raises(LoraLabError, match="clip_qkv=8.0"):
        models.load(folder)


# An optimizer ----------------------------------------------------------------------------------------------------------------------


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"max_steps": 6, "learning_rate": 0.01, "micro_batch_size": 4, "save_every": 3, "output_dir": folder, **QUIET, **changes}


def adapted() -> Any:
    torch.manual_seed(1)
    return lora_lab.inject(our_llama(), 2)


@pytest.mark.parametrize("name", ["signum", "radam"])
def test_a_new_optimizer_learns_and_its_run_resumes_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = adapted(), forgotten(adapted())
    expected = training.fit(whole, ROWS, settings_of(tmp_path, optimizer=name))
    assert expected.losses[-1] < expected.losses[0]
    newest = tmp_path / "snapshots" / "step-000006"
    newest.rename(tmp_path / "aside")  # as if the run had been stopped after step 3
    training.fit(resumed, ROWS, settings_of(tmp_path, optimizer=name, resume=True))
    assert same_bits(weights(resumed), weights(whole))


def test_a_new_optimizer_rounds_16_bit_weights_by_chance_and_steps_in_backward() -> None:
    model = our_llama(torch.bfloat16)
    before = weights(model)
    training.fit(model, ROWS, {"max_steps": 2, "learning_rate": 1e-4, "optimizer": "signum", "precision": "bf16", **QUIET})
    matrices = {name: values for name, values in weights(model).items() if values.ndim > 1}
    assert all(not torch.equal(values, before[name]) for name, values in matrices.items())  # to the nearest, 1e-4 of 0.3 is nothing
    one, other = our_llama(), our_llama()
    usual = {"max_steps": 2, "learning_rate": 1e-3, "optimizer": "signum", "max_grad_norm": None, **QUIET}
    training.fit(one, ROWS, usual)
    training.fit(other, ROWS, {**usual, "optimizer_in_backward": True})
    assert same_bits(weights(one), weights(other))
