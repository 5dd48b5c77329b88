"""Prompt files that are not read, and prompts that are not written: each error names what is wrong, and nothing is changed."""

from __future__ import annotations

import json
import os
import sys

import decoder_tools
import llama_tools
import peft
import pytest
import torch
from prompt_file_tools import (
    CONFIG,
    METHODS,
    TASKS,
    TENSORS,
    TOKENS,
    assert_untouched,
    edited,
    peft_folder,
    prompted,
    state_of,
    theirs,
    written,
)
from safetensors.torch import save_file

import lora_lab
from lora_lab import LoraLabError
from prompt_tuning_lab.checkpoint import load, save
from prompt_tuning_lab.injection import inject
from prompt_tuning_lab.prompted_model import PromptedModel

ROWS = "prompt_embeddings"


def refused(folder, match, model=None, **how):
    """Loading into a model with a task of its own raises, and leaves it, its tasks and its base as they were."""
    model = inject(theirs("gpt2"), 2, task="before", init="random") if model is None else model
    before = state_of(model)
    with pytest.raises(LoraLabError, match=match) as caught:
        load(model, folder, **how)
    assert_untouched(model, before)
    if isinstance(model, PromptedModel):
        assert list(model.tasks) == ["before"] and model.active == "before"
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    peft_folder(tmp_path)
    return tmp_path


# Other models ---------------------------------------------------------------------------------------------------------------------


def test_another_width_is_named_with_both_numbers(folder):
    refused(folder, "token_dim=32, this model has 48: a prompt for another model", decoder_tools.theirs("neox-odd-angles"))
    edited(folder, drop=["token_dim"])
    refused(folder, "have 32 numbers, this model's embedding has 48: a prompt for another model", decoder_tools.theirs("neox-odd-angles"))


@pytest.mark.parametrize(("key", "value"), [("num_layers", 3), ("num_attention_heads", 8)])
def test_another_number_of_layers_or_heads_is_another_model(folder, key, value):
    refused(edited(folder, {key: value}), f"{key}={value}, this model has .*another model")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "head_dim": 4}])
def test_a_prefix_of_other_layers_or_heads_is_refused(change, tmp_path):
    """The last has rows of the same width: twice the key/value heads, half as wide."""
    peft_folder(tmp_path, "llama", "prefix")
    refused(tmp_path, "another model", llama_tools.theirs(**change))
    edited(tmp_path, drop=["num_layers", "token_dim", "num_attention_heads"])
    if "head_dim" not in change:
        refused(tmp_path, "have 64 numbers, a prefix of this model, .* has .*another model", llama_tools.theirs(**change))


@pytest.mark.parametrize(("family", "other"), [("t5", "gpt2"), ("gpt2", "t5")])
def test_one_stack_and_two_are_told_apart(family, other, tmp_path):
    peft_folder(tmp_path, family)
    refused(tmp_path, "encoder-decoder", theirs(other))


def test_our_prefix_of_an_encoder_decoder_is_of_no_other_model(tmp_path):
    save(prompted("t5", "prefix"), tmp_path)
    refused(tmp_path, "are of an encoder-decoder, this model is a model with one stack")


def test_pefts_prefix_of_an_encoder_decoder_is_refused_with_the_reason(tmp_path):
    """T14: half of its parameters never had a gradient, and the others are shared out wrongly."""
    peft_folder(tmp_path, "t5", "prefix")
    refused(tmp_path, "slots 4j mod 2L and half of what was saved never had a gradient", theirs("t5"))


# Other methods --------------------------------------------------------------------------------------------------------------------


def test_a_lora_folder_is_lora_labs(tmp_path):
    lora_lab.save(lora_lab.inject(theirs("gpt2"), rank=2), tmp_path)
    refused(tmp_path, r"peft_type is 'LORA'.*lora_lab\.load")


def test_multitask_prompts_are_refused_with_what_to_multiply(tmp_path):
    config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, num_tasks=2)
    peft.get_peft_model(theirs("gpt2"), config).save_pretrained(tmp_path)
    refused(tmp_path, r"prefix_task_cols\[task\] @ prefix_task_rows\[task\]")


@pytest.mark.parametrize("kind", ["CPT", "CARTRIDGE", "ADAPTION_PROMPT", None])
def test_other_methods_are_refused_by_name(folder, kind):
    message = refused(edited(folder, {"peft_type": kind}), "peft_type is")
    assert repr(kind) in message and (kind in ("CPT", "CARTRIDGE") or "PREFIX_TUNING" in message)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"new_feature": 3}, "new_feature=3 is a feature that is not read here"), ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
     ({"num_virtual_tokens": "4"}, "num_virtual_tokens='4'"), ({"num_virtual_tokens": True}, "num_virtual_tokens=True"),
     ({"num_virtual_tokens": None}, "num_virtual_tokens is missing"), ({"num_virtual_tokens": 5}, r"\[4, 32\].*has to be \[5, 32\]"),
     ({"num_transformer_submodules": 2}, "an encoder-decoder, this model is a model with one stack"), ({"num_layers": 2.0}, "num_layers=2.0"),
     ({"placement": "fron"}, "did you mean 'front'"), ({"modules_to_save": "classifier"}, "expected a list of names"),
     ({"peft_type": "P_TUNING", "encoder_reparameterization_type": "GRU"}, "'GRU': expected 'MLP' or 'LSTM'")],
)  # fmt: skip
def test_settings_that_are_not_read_or_make_no_sense(folder, change, says):
    refused(edited(folder, change), says)


# Damaged folders ------------------------------------------------------------------------------------------------------------------


def test_missing_folders_and_files_are_named(folder):
    refused(folder / "nowhere", "does not exist")
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG} is missing: it says what kind of prompt")
    (folder / CONFIG).write_text("[1]")
    refused(folder, "expected an object")
    (folder / TENSORS).unlink()
    refused(folder, f"holds no {TENSORS}")


def test_a_pickle_is_refused_with_the_way_out(folder):
    """Reading one can run code; PEFT writes adapter_model.bin with safe_serialization=False."""
    (folder / TENSORS).unlink()
    torch.save({ROWS: torch.randn(TOKENS, 32)}, folder / "adapter_model.bin")
    refused(folder, "pickled adapter_model.bin.*call save_pretrained, which writes safetensors")


def test_a_truncated_file_is_no_file(folder):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-9])
    refused(folder, "truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [({ROWS: None, "other": torch.ones(2)}, "and no 'prompt_embeddings'"), ({ROWS: torch.ones(TOKENS, 32, dtype=torch.int64)}, "I64"),
     ({ROWS: torch.ones(TOKENS * 32)}, r"is \[128\]"), ({ROWS: torch.ones(1, TOKENS, 32)}, r"is \[1, 4, 32\]"),
     ({ROWS: torch.full((TOKENS, 32), float("nan"))}, "NaN or infinity"), ({ROWS: torch.full((TOKENS, 32), float("inf"))}, "NaN or infinity"),
     ({"more": torch.ones(2)}, r"unexpected tensor 'more' \[2\]"), ({"base_model.transformer.wte.weight": torch.ones(2, 3)}, r"expected \[\d+, 32\]"),
     ({"base_model.transformer.wpe.weigt": torch.ones(2)}, "did you mean 'transformer.wpe.weight'")],
)  # fmt: skip
def test_tensors_that_are_missing_unexpected_or_no_numbers(folder, tensors, says):
    refused(edited(folder, tensors=tensors), says)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [({"base_model.classifier.bias": None}, "base_model.classifier.bias is not in the file"),
     ({"base_model.classifier.bias": torch.ones(7)}, r"expected \[3\] finite numbers: a head for another number of classes"),
     ({"base_model.classifier.bias": torch.full((3,), float("nan"))}, "finite numbers"),
     ({"base_model.classifier.bias": torch.ones(3)}, r"classifier.bias.*head=True")],
)  # fmt: skip
def test_heads_that_do_not_fit_or_are_not_the_bases(tensors, says, tmp_path):
    peft_folder(tmp_path, "classifier", "prefix")
    refused(edited(tmp_path, tensors=tensors), says, theirs("classifier"))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"initial": None}, "with its first layer and 'initial'"), ({"down.weight": torch.ones(3, 31)}, "expected"),
     ({"up.weight": torch.full((32, 6), float("nan"))}, "'up.weight'.*expected finite numbers"), ({"more": torch.ones(2)}, "'more'")],
)  # fmt: skip
def test_a_damaged_network_is_refused(change, says, tmp_path):
    save(prompted("gpt2", "residual"), tmp_path)
    path = next(tmp_path.glob("trainable-*"))
    tensors = {key: value for key, value in {**_tensors(path), **change}.items() if value is not None}
    save_file(tensors, path, {"format": "pt", "lora_lab_method": "residual"})
    refused(tmp_path, says, trainable=True)
    save_file(_tensors(path), path, {"format": "pt", "lora_lab_method": "magic"})
    refused(tmp_path, "method 'magic'|finite", trainable=True)
    load(theirs("gpt2"), tmp_path)  # the prompt itself is whole


def _tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


# Names ----------------------------------------------------------------------------------------------------------------------------


def test_a_task_that_is_there_is_replaced_only_where_that_is_said(folder):
    refused(folder, "'before' is already in this model.*replace=True", task="before")
    refused(folder, r"has the tasks \['before'\], and none called 'befor' \(did you mean 'before'\?\)", task="befor", replace=True)
    message = refused(folder, "differs in its values only", task="before", replace=True)
    assert "[2, 32]" in message and "[4, 32]" in message


@pytest.mark.parametrize("name", ["", "a b", "../a", "x" * 65, None, 3])
def test_names_are_checked(folder, name):
    refused(folder, "expected 1 to 64 letters", task=name)


def test_replacing_by_another_method_is_refused(tmp_path):
    save(prompted("gpt2", "p-tuning"), tmp_path)
    model = inject(theirs("gpt2"), TOKENS, task="before", init="random", **METHODS["residual"])
    refused(tmp_path, "differs in its values only", model, task="before", replace=True, trainable=True)


# Saving ---------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_saved_leaves_the_older_files(tmp_path):
    model = prompted("gpt2", "prompt")
    save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(LoraLabError, match=r"the tasks \['default'\].*did you mean 'default'"):
        save(model, tmp_path, task="defalt")
    with pytest.raises(LoraLabError, match="dtype=torch.int8"):
        save(model, tmp_path, dtype=torch.int8)
    with torch.no_grad():
        model.prompt().weight[1, 2] = 1e6
    with pytest.raises(LoraLabError, match="NaN or infinity in torch.float16"):
        save(model, tmp_path, dtype=torch.float16)
    with torch.no_grad():
        model.prompt().weight[1, 2] = float("nan")
    with pytest.raises(LoraLabError, match="NaN or infinity: nothing was written"):
        save(model, tmp_path)
    model.active = None
    with pytest.raises(LoraLabError, match="no task is active"):
        save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraLabError, match="could not save task 'default'"):
        save(prompted("gpt2", "prompt"), tmp_path / "file")


@pytest.mark.skipif(sys.platform == "win32" or os.name == "nt", reason="umask")
def test_files_have_the_permissions_others_have(tmp_path):
    save(prompted("gpt2", "p-tuning"), tmp_path)
    (tmp_path / "plain").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_every_family_has_a_task_type(tmp_path):
    """PEFT's own wrapper for no task would leave the prompt out without a word."""
    for family, task in TASKS.items():
        save(prompted(family, "prompt"), tmp_path / family)
        assert json.loads((tmp_path / family / CONFIG).read_text())["task_type"] == task == written(tmp_path / family)[0]["task_type"]
