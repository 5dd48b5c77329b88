"""merge_checkpoint against PEFT: the merged folder, loaded by transformers, computes what the base with the adapter computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, logits
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.streaming import merge as streaming
from lora_lab.streaming import shards
from lora_lab.streaming.merge import merge_checkpoint

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, image_size=8,
                                                                         num_attention_heads=4, patch_size=4, num_labels=3))  # fmt: skip


def tied_llama():
    return FAMILIES["llama"](tie_word_embeddings=True)


MAKERS = {**FAMILIES, "vit": vit, "tied_llama": tied_llama}


def make(family, dtype=torch.float64):
    torch.manual_seed(1)
    model = MAKERS[family]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)  # norms and biases, too: a bias that is lost has to show
    return model


@torch.no_grad()
def outputs(model, family):
    if family == "vit":
        return model(torch.linspace(-1, 1, 2 * 3 * 64, dtype=model.dtype).reshape(2, 3, 8, 8)).logits
    return logits(model, family)


def adapted(folder, family="llama", dtype=torch.float64, shard="20KB", adapter="default", embeddings="auto", change=None, **config):
    """(folder with base and adapter in it, what PEFT computes with both, and what the base alone computes)."""
    base = make(family, dtype)
    before = outputs(base, family)
    base.save_pretrained(folder / "base", max_shard_size=shard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **config}
        model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=adapter).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora" not in name or "magnitude" in name):  # biases, modules_to_save, magnitudes: as if trained
                    parameter += 0.2 * torch.rand_like(parameter)
        model.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    expected = outputs(model, family)
    assert not torch.allclose(expected, before, atol=1e-3)  # the adapter does something
    return folder, expected


def merge(folder, **options):
    return merge_checkpoint(folder / "base", folder / "adapter", folder / "out", progress=False, **options)


def reload(folder, family="llama", dtype=torch.float64):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return type(MAKERS[family]()).from_pretrained(folder / "out", dtype=dtype).eval()


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def reconfigure(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "delete"}))


def as_bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The function -----------------------------------------------------------------------------------------------------------------

CASES = {
    "llama": ("llama", {"target_modules": "all-linear"}),
    "llama, head and embedding": ("llama", {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2, position embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "opt": ("opt", {"target_modules": "all-linear"}),
    "neox": ("neox", {"target_modules": "all-linear"}),
    "neox, head": ("neox", {"target_modules": ["lm_head", "query_key_value"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "bert": ("bert", {"target_modules": ["query", "dense", "word_embeddings"]}),
    "vit, convolution": ("vit", {"target_modules": ["projection"]}),
    "tied": ("tied_llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True}),
    "dora, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "dora, embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "dora, convolution": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": ("llama", {"target_modules": "all-linear", "rank_pattern": {r".*\.0\..*": 2, "down_proj": 1}, "alpha_pattern": {"q_proj": 11}}),
    "trained biases of the layers": ("opt", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "all biases": ("opt", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "lora_bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "lora_bias on a trained bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "lora_only"}),
    "modules_to_save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "modules_to_save, head and norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "whole embeddings in the file": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "embeddings": True}),
    "whole tied embeddings in the file": ("tied_llama", {"target_modules": ["q_proj"], "embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "config"), CASES.values(), ids=CASES)
def test_the_merged_folder_computes_what_peft_computes(tmp_path, family, config):
    folder, expected = adapted(tmp_path, family, **config)
    merge(folder)
    assert_close(outputs(reload(folder, family), family), expected, rtol=0, atol=1e-11)


def test_dora_leaves_rows_of_zeros_what_they_are(tmp_path):
    """The rows of words that pad a vocabulary: they have no direction, and a magnitude of 0."""
    base = make("llama")
    with torch.no_grad():
        base.lm_head.weight[-3:] = 0
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = lora_lab.inject(base, 3, target_modules=["lm_head"], variant="dora", init="random")
    with torch.no_grad():
        model.lm_head.lora_B["default"][-3:] = 0
    lora_lab.save(model, tmp_path / "adapter")
    merge(tmp_path)
    assert not reload(tmp_path).lm_head.weight[-3:].any()
    assert_close(outputs(reload(tmp_path), "llama"), outputs(model, "llama"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_the_tensors_are_those_of_merge_and_unload(tmp_path, family):
    """Tensor by tensor: a wrong orientation of a square matrix would show here even where the logits hid it."""
    targets = {"llama": "all-linear", "gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "dense"], "vit": ["projection"]}[family]
    folder, _ = adapted(tmp_path, family, target_modules=targets)
    merge(folder)
    oracle = peft.PeftModel.from_pretrained(make(family), folder / "adapter").merge_and_unload().state_dict()
    merged = reload(folder, family).state_dict()
    assert merged.keys() == oracle.keys()
    for name, tensor in oracle.items():
        assert_close(merged[name], tensor, rtol=0, atol=1e-13)


def test_our_own_adapter_files_merge_too(tmp_path):
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    lora_lab.inject(model, rank=4, alpha=6, init="random")
    lora_lab.save(model, tmp_path / "adapter")
    merge(tmp_path)
    assert_close(outputs(reload(tmp_path), "llama"), outputs(model, "llama"), rtol=0, atol=1e-11)


def test_our_own_models_load_the_merged_folder(tmp_path):
    folder, _ = adapted(tmp_path, target_modules="all-linear")
    merge(folder)
    base, _ = lora_lab.models.load(folder / "base")
    merged, _ = lora_lab.models.load(folder / "out")
    assert_close(logits(merged, "llama"), logits(lora_lab.load(base, folder / "adapter"), "llama"), rtol=0, atol=1e-11)


def test_blocks_of_one_row_give_the_same_as_whole_tensors(tmp_path, monkeypatch):
    """Row blocks, and DoRA's norms summed over blocks, must not depend on the size of a block."""
    cases = [(True, "gpt2", ["c_attn", "c_proj"]), (True, "llama", ["q_proj", "embed_tokens"]), (False, "gpt2", ["c_fc", "wpe"])]
    for use_dora, family, names in cases:
        folder, expected = adapted(tmp_path / f"{family}{use_dora}", family, target_modules=names, use_dora=use_dora)
        monkeypatch.setattr(shards, "BLOCK_NUMBERS", 1)
        merge(folder)
        assert_close(outputs(reload(folder, family), family), expected, rtol=0, atol=1e-11)


def test_a_base_without_its_leading_name_gets_the_adapter_too(tmp_path):
    """The hub's gpt2 calls its tensors "h.0...", an adapter of GPT2LMHeadModel "transformer.h.0...": transformers loads both."""
    folder, expected = adapted(tmp_path, "gpt2", target_modules=["c_attn"], shard="1GB")
    path = folder / "base" / "model.safetensors"
    save_file({key.removeprefix("transformer."): value for key, value in load_file(path).items()}, path, {"format": "pt"})
    merge(folder)
    assert "h.0.attn.c_attn.weight" in load_file(folder / "out" / "model.safetensors")
    assert_close(outputs(reload(folder, "gpt2"), "gpt2"), expected, rtol=0, atol=1e-11)


def test_a_base_with_a_leading_name_gets_the_adapter_of_the_bare_model(tmp_path):
    make("gpt2").save_pretrained(tmp_path / "base")
    bare = peft.get_peft_model(make("gpt2").transformer, peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    bare.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    hidden = reload(tmp_path, "gpt2").transformer(torch.arange(3, 9)[None]).last_hidden_state
    assert_close(hidden, bare.eval()(torch.arange(3, 9)[None]).last_hidden_state, rtol=0, atol=1e-11)


def test_an_adapter_that_fits_two_parts_of_the_base_is_refused(tmp_path):
    """Of a model with two towers, the adapter of one tower alone does not say which."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    save_file({"text.layer.weight": torch.zeros(4, 4), "image.layer.weight": torch.zeros(4, 4)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    pair = {"base_model.model.layer.lora_A.weight": torch.ones(2, 4), "base_model.model.layer.lora_B.weight": torch.ones(4, 2)}
    save_file(pair, tmp_path / "adapter" / TENSORS)
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    refused(tmp_path, "layer.weight.*not in the base")


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_square_conv1d_is_known_by_its_model_not_by_the_config(tmp_path, fan_in_fan_out):
    """PEFT writes fan_in_fan_out for the last layer it adapted: false for GPT-2 where that was the head."""
    folder, expected = adapted(tmp_path, "gpt2", target_modules=["c_proj"])
    reconfigure(folder / "adapter" / CONFIG, fan_in_fan_out=fan_in_fan_out)
    merge(folder)
    assert_close(outputs(reload(folder, "gpt2"), "gpt2"), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
def test_orientation_of_an_unknown_models_layer_is_read_from_shapes_else_from_the_config(tmp_path, shape):
    """peft writes fan_in_fan_out for Conv1D; a square matrix fits both ways and only this tells."""
    inside, out = shape
    W, A, B = torch.randn(inside, out), torch.randn(2, inside), torch.randn(out, 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    save_file({"layer.weight": W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mine", "architectures": ["MineModel"]}')
    save_file({"base_model.model.layer.lora_A.weight": A, "base_model.model.layer.lora_B.weight": B}, tmp_path / "adapter" / TENSORS)
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": true}')
    merge(tmp_path)
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["layer.weight"], W + 2 * (B @ A).T)


# The folder -------------------------------------------------------------------------------------------------------------------


def test_shards_keep_their_names_and_the_index_is_right(tmp_path):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    merge(folder)
    base, out = folder / "base", folder / "out"
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    assert len(list(out.glob("model-*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = 0
    for key, name in index["weight_map"].items():
        with safe_open(out / name, "pt") as file:
            sizes += file.get_tensor(key).nbytes
    assert index["metadata"]["total_size"] == sizes
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]


def test_tensors_without_an_adapter_are_copied_bit_by_bit(tmp_path):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    extra = {"step": torch.tensor(7), "mask": torch.tensor([True, False, True]), "empty": torch.zeros(0, 4), "inf": torch.tensor([-torch.inf, 1.0]),
             "small": torch.randn(3).to(torch.float8_e4m3fn), "half": torch.randn(5).bfloat16()}  # fmt: skip
    shard = sorted((folder / "base").glob("*.safetensors"))[0]
    rewrite(shard, lambda tensors: tensors.update(extra))
    merge(folder)
    for path in (folder / "base").glob("*.safetensors"):
        old, new = load_file(path), load_file(folder / "out" / path.name)
        assert old.keys() == new.keys()
        different = {key for key in old if old[key].dtype != new[key].dtype or not torch.equal(as_bytes(old[key]), as_bytes(new[key]))}
        assert different == {key for key in old if "q_proj" in key}


def test_the_written_files_are_safetensors_own_byte_for_byte(tmp_path):
    """Header length, JSON, padding, order and alignment: what save_file writes for the same tensors."""
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.randn(5), "é": torch.arange(3), "flag": torch.tensor([True])}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    stored = shards.read_shard(tmp_path / "theirs")
    new = {key: shards.NewTensor(t.dtype, t.shape, lambda t=t: (rows for _, rows in t.blocks())) for key, t in stored.tensors.items()}
    shards.write_shard(tmp_path / "ours", new, stored.metadata)
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    length = int.from_bytes(theirs[:8], "little")
    assert int.from_bytes(ours[:8], "little") % 8 == 0
    assert ours[8 + int.from_bytes(ours[:8], "little") :] == theirs[8 + length :]  # their JSON may escape or order otherwise; the data may not
    back = load_file(tmp_path / "ours")
    assert all(torch.equal(back[key], tensors[key]) for key in tensors) and back.keys() == tensors.keys()


def test_configuration_and_tokenizer_are_copied_but_no_other_weights(tmp_path):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    base = folder / "base"
    copied = ("tokenizer.json", "chat_template.jinja", "modeling_mine.py", "LICENSE", "vocab.txt")
    for name in (*copied, "pytorch_model.bin", "model.gguf", "README.md", ".hidden", CONFIG, "lora_lab.json", "consolidated.00.pth"):
        (base / name).write_text(name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    (base / "original").mkdir()
    merge(folder)
    names = {path.name for path in (folder / "out").iterdir() if "safetensors" not in path.name}
    assert names == {*copied, "config.json", "generation_config.json", "additional_chat_templates"}
    assert (folder / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (folder / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_a_symbolic_link_is_copied_as_the_file_it_names(tmp_path):
    """A hub snapshot is a folder of links into blobs that may be deleted."""
    folder, expected = adapted(tmp_path, target_modules=["q_proj"])
    (folder / "blobs").mkdir()
    for path in list((folder / "base").iterdir()):
        shutil.move(path, folder / "blobs" / path.name)
        path.symlink_to(folder / "blobs" / path.name)
    merge(folder)
    assert not any(path.is_symlink() for path in (folder / "out").iterdir())
    assert_close(outputs(reload(folder), "llama"), expected, rtol=0, atol=1e-11)


def test_an_empty_out_folder_is_fine_and_a_full_one_is_left_alone(tmp_path):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    (folder / "out").mkdir()
    merge(folder)
    before = everything(folder)
    for out in ("out", "base", "base/config.json"):
        with pytest.raises(LoraLabError, match="not empty"):
            merge_checkpoint(folder / "base", folder / "adapter", folder / out, progress=False)
    assert everything(folder) == before


def test_a_folder_that_somebody_filled_meanwhile_stays(tmp_path, monkeypatch):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    original = streaming._write_config

    def slow(*arguments):
        (folder / "out").mkdir()
        (folder / "out" / "theirs").write_text("x")
        original(*arguments)

    monkeypatch.setattr(streaming, "_write_config", slow)
    with pytest.raises(LoraLabError, match="not empty"):
        merge(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "out"]
    assert everything(folder / "out") == {"theirs": b"x"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("on purpose")], ids=repr)
def test_an_interrupted_merge_leaves_nothing(tmp_path, monkeypatch, failure):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    before = everything(folder)

    def fail(_):
        raise failure

    monkeypatch.setattr(shards.os, "fsync", fail)  # after the first shard's last byte
    with pytest.raises(LoraLabError if isinstance(failure, OSError) else type(failure)):
        merge(folder)
    assert everything(folder) == before and sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


# 16 bit -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_accumulated_in_float32_and_rounded_once(tmp_path, monkeypatch, dtype):
    """PEFT multiplies B @ A and adds in 16 bit where the adapter is (trap 7); the right answer is round(W + s B A)."""
    monkeypatch.setattr(shards, "BLOCK_NUMBERS", 100)  # norms and errors are over all blocks
    folder, _ = adapted(tmp_path, dtype=dtype, target_modules=["q_proj", "down_proj"])
    report = merge(folder)
    old, new, adapter = (load_all(folder / name) for name in ("base", "out", "adapter"))
    for key in (key for key in old if "q_proj" in key or "down_proj" in key):
        A, B = (adapter[f"base_model.model.{key.removesuffix('weight')}lora_{part}.weight"].double() for part in "AB")
        exact = old[key].double() + 5 / 3 * B @ A
        neighbour = torch.nextafter(new[key].float().abs(), torch.tensor(torch.inf)).double()  # float32 noise at a rounding boundary
        assert new[key].dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((new[key].double() - exact).abs() <= half_ulp + 1e-6 * neighbour).all()
        line = next(line for line in report.merged if line.name == key)
        assert line.rounding_error == pytest.approx(float((new[key].double() - exact).abs().max()), rel=1e-3)
        assert line.delta_norm == pytest.approx(float((5 / 3 * B @ A).norm()), rel=1e-5)
        assert line.weight_norm == pytest.approx(float(old[key].double().norm()), rel=1e-5)
    assert report.largest_rounding_error == max(line.rounding_error for line in report.merged) > 0


def load_all(folder):
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def test_dtype_is_the_outputs_and_float32_keeps_what_16_bit_would_round_away(tmp_path):
    folder, expected = adapted(tmp_path, dtype=torch.bfloat16, target_modules=["q_proj"])
    report = merge(folder, dtype=torch.float32)
    assert report.largest_rounding_error == 0.0
    assert {tensor.dtype for tensor in load_all(folder / "out").values()} == {torch.float32}
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "float32"
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_all(folder / "out").values())
    oracle = peft.PeftModel.from_pretrained(make("llama", torch.bfloat16).float(), folder / "adapter").eval()
    assert_close(outputs(reload(folder, dtype=torch.float32), "llama"), outputs(oracle, "llama"), rtol=1e-4, atol=1e-4)
    del expected


def test_a_smaller_dtype_that_overflows_is_refused(tmp_path):
    folder, _ = adapted(tmp_path, dtype=torch.float32, target_modules=["q_proj"])
    for layer in ("q_proj", "k_proj"):
        shutil.rmtree(folder / "base")
        make("llama", torch.float32).save_pretrained(folder / "base")

        def overflow(tensors, layer=layer):
            tensors[f"model.layers.0.self_attn.{layer}.weight"][0, 0] = 1e5

        rewrite(folder / "base" / "model.safetensors", overflow)
        with pytest.raises(LoraLabError, match=rf"{layer}.*float16"):
            merge(folder, dtype=torch.float16)
        assert not (folder / "out").exists()
    with pytest.raises(LoraLabError, match="dtype=torch.int8"):
        merge(folder, dtype=torch.int8)


def test_the_report_says_what_was_done(tmp_path):
    folder, _ = adapted(tmp_path, "bert", target_modules=["query"], modules_to_save=["classifier"])
    report = merge(folder)
    assert {line.name for line in report.merged} == {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert set(report.replaced) == {"classifier.weight", "classifier.bias"}
    assert report.copied == len(load_all(folder / "base")) - 4 and report.folder == folder / "out" and not report.untied
    assert "2 tensors merged, 2 replaced" in str(report) and report.table().count("query.weight") == 2


def test_the_progress_bar_counts_tensors_and_can_be_off(tmp_path, capfd):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"])
    merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    assert f"/{len(load_all(folder / 'base'))}" in capfd.readouterr().err
    merge_checkpoint(folder / "base", folder / "adapter", folder / "again", progress=False)
    assert capfd.readouterr() == ("", "")


# Tied embeddings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_change_of_one_of_two_tied_tensors_is_refused_and_untie_writes_both(tmp_path, layer):
    """Trap 1: PEFT merges into the one tensor, so the other changes with it, and the config still says tied."""
    folder, expected = adapted(tmp_path, "tied_llama", target_modules=[layer, "q_proj"])
    before = everything(folder)
    with pytest.raises(LoraLabError, match="one tensor.*untie=True"):
        merge(folder)
    assert everything(folder) == before
    report = merge(folder, untie=True)
    assert report.untied and json.loads((folder / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in load_all(folder / "out").values())
    model = reload(folder, "tied_llama")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_close(outputs(model, "llama"), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_untying_works_for_models_whose_config_says_nothing(tmp_path, family):
    """Older configs of GPT-2 lack tie_word_embeddings: no head in the file is what says that it is tied."""
    folder, expected = adapted(tmp_path, family, target_modules=["lm_head", "wte", "embed_tokens"])
    reconfigure(folder / "base" / "config.json", tie_word_embeddings="delete")
    with pytest.raises(LoraLabError, match="one tensor"):
        merge(folder)
    merge(folder, untie=True)
    assert_close(outputs(reload(folder, family), family), expected, rtol=0, atol=1e-11)


def test_untie_changes_nothing_where_nothing_has_to_be_untied(tmp_path):
    for family in ("tied_llama", "llama"):
        folder, _ = adapted(tmp_path / family, family, target_modules=["q_proj"])
        assert not merge(folder, untie=True).untied
        assert (folder / "out" / "config.json").read_bytes() == (folder / "base" / "config.json").read_bytes()


def test_a_replaced_embedding_of_a_tied_model_is_refused_too(tmp_path):
    """modules_to_save makes a copy of one of the two (trap 2)."""
    folder, expected = adapted(tmp_path, "tied_llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(LoraLabError, match="embed_tokens.*one tensor"):
        merge(folder)
    merge(folder, untie=True)
    assert_close(outputs(reload(folder, "tied_llama"), "llama"), expected, rtol=0, atol=1e-11)


def test_embedding_and_head_replaced_by_one_tensor_stay_tied(tmp_path):
    """PEFT's ensure_weight_tying writes both copies, the same."""
    folder, expected = adapted(tmp_path, "tied_llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= load_file(folder / "adapter" / TENSORS).keys()
    assert not merge(folder).untied
    assert "lm_head.weight" not in load_all(folder / "out")
    assert_close(outputs(reload(folder, "tied_llama"), "llama"), expected, rtol=0, atol=1e-11)
    shutil.rmtree(folder / "out")
    shard = next(path for path in (folder / "base").glob("*.safetensors") if "model.embed_tokens.weight" in load_file(path))
    rewrite(shard, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    merge(folder)
    merged = load_all(folder / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert_close(outputs(reload(folder, "tied_llama"), "llama"), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["tied_llama", "t5"])
def test_whole_embeddings_that_are_the_bases_own_are_no_change(tmp_path, family):
    """PEFT writes them beside the adapter (save_embedding_layers); a tied model must not be refused for that."""
    folder, _ = adapted(tmp_path, family, target_modules=["q_proj", "q"], embeddings=True)
    assert sum("lora" not in key for key in load_file(folder / "adapter" / TENSORS)) >= 1
    assert merge(folder).replaced == ()


def test_what_encoder_and_decoder_share_is_refused(tmp_path):
    """T5's tie_word_embeddings also scales the decoder's output, so that False would compute something else."""
    folder, _ = adapted(tmp_path, "t5", target_modules=["lm_head", "q"])
    for untie in (False, True):
        with pytest.raises(LoraLabError, match="one tensor|cannot be given"):
            merge(folder, untie=untie)
    shutil.rmtree(folder / "adapter")
    model = peft.get_peft_model(make("t5"), peft.LoraConfig(target_modules=["shared", "q"], init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    with pytest.raises(LoraLabError, match="encoder and decoder share"):
        merge(folder, untie=True)


# Refused, with nothing written ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return adapted(tmp_path_factory.mktemp("plain"), target_modules=["q_proj", "v_proj"], shard="1GB")[0]


@pytest.fixture
def folder(plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refused(folder, match):
    before = everything(folder)
    with pytest.raises(LoraLabError, match=match):
        merge(folder)
    assert everything(folder) == before


Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED_TENSORS = {
    "NaN": (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "q_proj.lora_A.weight.*NaN"),
    "infinity": (lambda t: t[f"{Q}.lora_B.weight"].view(-1)[-1:].fill_(float("inf")), "q_proj.lora_B.weight.*infinity"),
    "another model": (lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in list(t)}), r"layers\.7.*not in the base"),
    "half a pair": (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.*incomplete"),
    "a wrong rank": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32), f"{Q}.lora_B.weight": torch.zeros(32, 4)}), "rank is 3"),
    "a wrong width": (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 31)}), r"\[3, 31\].*do not fit.*\[32, 32\]"),
    "no prefix": (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "unexpected tensor 'model.norm.weight'"),
    "an unknown kind": (lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(3, 3)}), "unexpected tensor.*lora_C"),
    "rows of no known words": (lambda t: t.update({"base_model.model.wte.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}), "do not belong"),
    "whole numbers": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32, dtype=torch.long)}), "unexpected tensor"),
    "a resized vocabulary": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(70, 32)}), r"\[70, 32\].*\[64, 32\].*vocabulary"),
    "a part the base lacks": (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)}), "score.weight.*not in the base"),
    "a bias the base lacks": (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(32)}), "q_proj.bias.*not in the base"),
    "magnitudes without DoRA": (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "use_dora=False"),
    "nothing": (lambda t: t.clear(), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), SPOILED_TENSORS.values(), ids=SPOILED_TENSORS)
def test_a_spoiled_adapter_is_refused_before_anything_is_written(folder, spoil, match):
    rewrite(folder / "adapter" / TENSORS, spoil)
    refused(folder, match)


SPOILED_CONFIGS = {
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*convert"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "raw parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "token rows lost": ({"trainable_token_indices": [1]}, "trainable_token_indices.*incomplete"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "a feature of tomorrow": ({"use_newlora": True}, "use_newlora=True"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is null"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "alpha=nan"),
    "rank zero": ({"r": 0}, "rank=0"),
    "a wrong rank": ({"r": 4}, "rank is 4"),
    "a pattern's rank": ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\]=1.5"),
    "DoRA without magnitudes": ({"use_dora": True}, "use_dora=True"),
    "modules_to_save lost": ({"modules_to_save": ["lm_head"]}, "modules_to_save.*incomplete"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "match"), SPOILED_CONFIGS.values(), ids=SPOILED_CONFIGS)
def test_a_feature_that_is_not_read_is_refused_by_name(folder, change, match):
    reconfigure(folder / "adapter" / CONFIG, **change)
    refused(folder, match)


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


BASE_Q = "model.layers.0.self_attn.q_proj.weight"


def to_8_bit(tensors):
    tensors[BASE_Q] = tensors[BASE_Q].to(torch.float8_e4m3fn)


def truncate(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 10)


SPOILED_FOLDERS = {
    "a pickled base": (rename("base/model.safetensors", "base/pytorch_model.bin"), "pickled.*save_pretrained"),
    "a pickled adapter": (rename(f"adapter/{TENSORS}", "adapter/adapter_model.bin"), "pickled.*save_pretrained"),
    "no weights": (rename("base/model.safetensors", "weights.safetensors"), "neither model.safetensors nor"),
    "no config": (rename("base/config.json", "config.json"), "config.json is missing"),
    "no adapter config": (rename(f"adapter/{CONFIG}", "x.json"), "holds alpha"),
    "no adapter": (rename("adapter", "elsewhere"), "does not exist"),
    "no base": (rename("base", "elsewhere"), "does not exist"),
    "a truncated base": (truncate("base/model.safetensors"), "truncated"),
    "a truncated adapter": (truncate(f"adapter/{TENSORS}"), "truncated"),
    "broken JSON": (lambda folder: (folder / "base/config.json").write_text("{"), "not JSON"),
    "a quantised base": (lambda folder: reconfigure(folder / "base/config.json", quantization_config={"bits": 4}), "quantised"),
    "an 8-bit float": (lambda folder: rewrite(folder / "base/model.safetensors", to_8_bit), "F8_E4M3"),
    "NaN in the base": (lambda folder: rewrite(folder / "base/model.safetensors", lambda t: t[BASE_Q].fill_(torch.nan)), "q_proj.*NaN"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "match"), SPOILED_FOLDERS.values(), ids=SPOILED_FOLDERS)
def test_a_folder_that_is_not_what_it_should_be_is_refused(folder, spoil, match):
    spoil(folder)
    refused(folder, match)


NO_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("Cannot allocate memory (os error 12)"),
             RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
             RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12")]  # fmt: skip


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_good_file_is_not_called_damaged_where_memory_runs_out(error, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "good")
    with pytest.raises(type(error)) as caught, shards.opened(tmp_path / "good"):
        raise error
    assert caught.value is error


def test_a_file_that_cannot_be_read_or_is_missing_is_not_called_damaged(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "good")
    with pytest.raises(LoraLabError, match="gone is missing: copy it again"), shards.opened(tmp_path / "gone", "copy it again"):
        pass
    for error in (OSError(5, "Input/output error"), FileNotFoundError("No such file or directory"), RuntimeError("unable to open file <x>")):
        with pytest.raises(LoraLabError, match=f"good cannot be read: {error.args[-1]}"), shards.opened(tmp_path / "good"):
            raise error


def test_an_adapter_in_a_folder_of_its_own_below_is_pointed_at(tmp_path):
    folder, _ = adapted(tmp_path, target_modules=["q_proj"], adapter="french")
    refused(folder, "french")


@pytest.mark.parametrize(
    ("index", "match"),
    [({"weight_map": {"a": "model-00009-of-00009.safetensors"}}, "not in the folder"),
     ({"weight_map": {"a": "../adapter/" + TENSORS}}, "not in the folder"),
     ({"weight_map": {}}, "weight_map"), ({"weight_map": {"a": 3}}, "weight_map"), ([], "expected an object"),
     ({"weight_map": {"nowhere": "one.safetensors"}}, "'nowhere'.*is not")],
)  # fmt: skip
def test_an_index_that_lies_is_refused(folder, index, match):
    (folder / "base" / "model.safetensors").rename(folder / "base" / "one.safetensors")
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, match)


def test_an_older_config_beside_newer_tensors_is_not_believed(tmp_path):
    """An interrupted save leaves the new tensors, which carry their own configuration, beside the old file."""
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    lora_lab.inject(model, rank=4, alpha=6, init="random")
    lora_lab.save(model, tmp_path / "adapter")
    reconfigure(tmp_path / "adapter" / CONFIG, lora_alpha=60)
    with pytest.warns(UserWarning, match="tensors' own"):
        merge(tmp_path)
    assert_close(outputs(reload(tmp_path), "llama"), outputs(model, "llama"), rtol=0, atol=1e-11)


def test_another_base_than_the_adapters_is_warned_about(tmp_path, no_warnings):
    """As `load` does; a base whose adapter does not know its SHA-256 is not hashed."""
    model = make("llama")
    model.save_pretrained(tmp_path / "base")
    model, _ = lora_lab.models.load(tmp_path / "base")
    lora_lab.save(lora_lab.inject(model, rank=2, init="random"), tmp_path / "adapter")
    merge(tmp_path)
    shutil.rmtree(tmp_path / "out")
    rewrite(tmp_path / "base" / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.warns(UserWarning, match=f"{tmp_path / 'adapter'} was trained on a base with SHA-256.*weights differ"):
        merge(tmp_path)
    shutil.rmtree(tmp_path / "out")
    rewrite_metadata(tmp_path / "adapter" / TENSORS, base_sha256=None)
    merge(tmp_path)


def rewrite_metadata(path, **changes):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


# Memory -------------------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import torch, safetensors.torch, tqdm
from lora_lab.streaming import merge_checkpoint
def peak_kib():  # not ru_maxrss, which a new process inherits from the one that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
torch.set_num_threads(1)
torch.ones(2, 2) @ torch.ones(2, 2)
before = peak_kib()
merge_checkpoint(*sys.argv[1:], progress=False)
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_tensor_is_ever_held_whole(tmp_path):
    """A 128 MiB matrix in a shard of its own takes less than that to merge, mapped file pages included."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    save_file({"layer.weight": torch.zeros(1 << 14, 1 << 12, dtype=torch.bfloat16)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["MineModel"]}')
    pair = {"base_model.model.layer.lora_A.weight": torch.ones(2, 1 << 12), "base_model.model.layer.lora_B.weight": torch.ones(1 << 14, 2)}
    save_file(pair, tmp_path / "adapter" / TENSORS)
    (tmp_path / "adapter" / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(lora_lab.__file__).parent.parent).stdout)
    assert grown < 120 * 1024, f"{grown / 1024:.0f} MiB"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert (file.get_slice("layer.weight")[-2:] == 2.0).all()
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "out")


