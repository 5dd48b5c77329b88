"""Folders of BERT and RoBERTa to and from transformers, as old and as odd as the hub's; and one checkpoint loaded for another task."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from bert_tools import CLASSES, LABELS, SMALL, batch, main_output, ours, pair, theirs
from safetensors.torch import load_file, save_file
from small_models import randomise
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, models
from lora_lab.models import BertConfig, BertModel, RobertaConfig
from lora_lab.models.loading import build

# google-bert/bert-base-uncased and FacebookAI/roberta-base, but for the sizes: written by transformers 2 to 4
OLD_BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 24, "model_type": "bert", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0,
    "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 64,
}  # fmt: skip
OLD_ROBERTA = {
    "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 24, "model_type": "roberta", "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 1,
    "type_vocab_size": 1, "vocab_size": 64,
}  # fmt: skip


def write(folder: Any, source: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(source))
    return folder


def output(model: Any, name: str) -> torch.Tensor:
    torch.manual_seed(11)
    given = batch(name)
    with torch.no_grad():
        return main_output(model(**given), given["attention_mask"])


def saved_as(name: str, folder: Any, **changes: Any) -> Any:
    """transformers' model of this class, and the folder it was saved in."""
    model = theirs(name, **changes)
    model.save_pretrained(folder)
    return model


# Both ways ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_what_either_side_saves_loads_on_both(name, tmp_path, no_warnings):
    reference = saved_as(name, tmp_path / "theirs")
    mine, no_tokenizer = models.load(tmp_path / "theirs")
    assert type(mine).__name__ == name and no_tokenizer is None and not mine.training
    assert_close(output(mine, name), output(reference, name), rtol=1e-4, atol=1e-4)
    models.save(mine, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()
    again, _ = models.load(tmp_path / "ours")
    assert torch.equal(output(again, name), output(mine, name))
    back, report = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(output(back.eval(), name), output(mine, name), rtol=1e-4, atol=1e-4)
    assert again.config.num_labels == back.config.num_labels == LABELS
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_an_untied_head_is_saved_and_loaded_on_both_sides(name, tmp_path):
    reference = saved_as(name, tmp_path / "theirs", tie_word_embeddings=False)
    mine, _ = models.load(tmp_path / "theirs")
    models.save(mine, tmp_path / "ours")
    assert_close(output(models.load(tmp_path / "ours")[0], name), output(reference, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("source", "name"), [(OLD_BERT, "BertForMaskedLM"), (OLD_ROBERTA, "RobertaForMaskedLM")])
def test_configs_of_both_generations_mean_the_same(source, name):
    reference = theirs(name, **{key: value for key, value in source.items() if key not in ("architectures", "model_type", "transformers_version")})
    old = build(source, ((key, tensor.clone()) for key, tensor in reference.state_dict().items()), None, None)
    new = ours(reference)
    assert {**vars(old.config), "source": None, "num_labels": LABELS} == {**vars(new.config), "source": None}
    assert_close(output(old, name), output(reference, name), rtol=1e-4, atol=1e-4)


def test_a_config_made_by_hand_is_written_in_full(tmp_path):
    config = RobertaConfig.from_dict({**SMALL, "num_labels": LABELS, "problem_type": "regression", "classifier_dropout": 0.3})
    by_hand = RobertaConfig(**{**vars(config), "source": {}})
    read = transformers.RobertaConfig.from_dict(by_hand.to_dict())
    assert (read.hidden_size, read.num_labels, read.problem_type, read.classifier_dropout, read.pad_token_id) == (32, LABELS, "regression", 0.3, 1)
    again = RobertaConfig.from_dict(by_hand.to_dict())
    assert {**vars(again), "source": None} == {**vars(config), "source": None}


def test_names_of_classes_are_kept():
    names = {"0": "negative", "1": "neutral", "2": "positive"}
    written = BertConfig.from_dict({**SMALL, "id2label": names, "bos_token_id": 7}).to_dict()
    assert (written["id2label"], written["label2id"], written["bos_token_id"]) == (names, {"negative": 0, "neutral": 1, "positive": 2}, 7)
    assert "num_labels" not in written


# As old and odd as the hub's ------------------------------------------------------------------------------------------------------


def test_bert_base_uncaseds_file_is_read(tmp_path, no_warnings):
    """It was saved by the pre-training model: gamma and beta, a pooler and a next-sentence head beside the masked LM, a repeated decoder."""
    reference = theirs("BertForMaskedLM")
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
               for name, tensor in reference.state_dict().items()}  # fmt: skip
    assert {"cls.predictions.decoder.weight", "bert.embeddings.LayerNorm.gamma"} <= tensors.keys()
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32),
            "cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}  # fmt: skip
    folder = write(tmp_path / "old", OLD_BERT, {**tensors, **more})
    mine, _ = models.load(folder)
    assert_close(output(mine, "BertForMaskedLM"), output(reference, "BertForMaskedLM"), rtol=1e-4, atol=1e-4)
    encoder, _ = models.load(folder, task="feature-extraction")
    assert torch.equal(encoder.pooler.dense.weight, torch.ones(32, 32))


def test_roberta_bases_file_is_read(tmp_path, no_warnings):
    """position_ids saved as a tensor, the decoder and its bias not."""
    reference = theirs("RobertaForMaskedLM", type_vocab_size=1, layer_norm_eps=1e-5)
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if ".decoder." not in name}
    folder = write(tmp_path / "old", OLD_ROBERTA, {**tensors, "roberta.embeddings.position_ids": torch.arange(24)[None]})
    mine, _ = models.load(folder)
    assert_close(output(mine, "RobertaForMaskedLM"), output(reference, "RobertaForMaskedLM"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_repeated_head_that_differs_is_an_error(which, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in theirs("BertForMaskedLM").state_dict().items()}
    tensors[f"cls.predictions.decoder.{which}"] += 1
    with pytest.raises(LoraLabError, match=f"cls.predictions.decoder.{which} differs from .*tie_word_embeddings"):
        models.load(write(tmp_path / "odd", OLD_BERT, tensors))


def test_an_encoder_saved_without_a_pooler_is_loaded_without_one(tmp_path, no_warnings):
    reference = saved_as("BertModel", tmp_path, add_pooling_layer=False)
    mine, _ = models.load(tmp_path)
    assert mine.pooler is None
    assert mine(**batch("BertModel")).pooler_output is None
    assert_close(output(mine, "BertModel"), output(reference, "BertModel"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lost", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.LayerNorm.weight"])
def test_a_damaged_checkpoint_is_not_filled_with_random_numbers(lost, tmp_path):
    """What a file is said to hold it must hold: only a task that was asked for may begin anew."""
    saved_as("BertForSequenceClassification", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for asked in ({}, {"task": "sequence-classification"}):
        with pytest.raises(LoraLabError, match=f"lack 1 tensors.*{lost}"):
            models.load(tmp_path, **asked)


def test_a_tensor_that_is_nobodys_is_an_error(tmp_path):
    saved_as("BertModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "encoder.layer.0.crossattention.self.query.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraLabError, match="unexpected tensor 'encoder.layer.0.crossattention"):
        models.load(tmp_path)


# Another task -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "new"),
    [("BertModel", ["classifier"]), ("BertForMaskedLM", ["bert.pooler.dense", "classifier"]),
     ("RobertaModel", ["classifier.dense", "classifier.out_proj"]), ("RobertaForMaskedLM", ["classifier.dense", "classifier.out_proj"])],
)  # fmt: skip
def test_a_classifier_begins_on_any_encoder_with_a_warning_that_its_head_is_new(saved, new, tmp_path):
    reference = saved_as(saved, tmp_path)
    with pytest.warns(UserWarning, match=f"the checkpoint has no {', '.join(new)}: they begin at random"):
        mine, _ = models.load(tmp_path, task="sequence-classification", num_labels=5)
    family = saved.removesuffix("Model").removesuffix("ForMaskedLM")
    assert type(mine).__name__ == f"{family}ForSequenceClassification"
    assert mine.config.num_labels == 5 and mine(**batch(saved)).logits.shape == (3, 5)
    encoder, theirs_ = mine.get_submodule(family.lower()), reference if saved.endswith("Model") else reference.get_submodule(family.lower())
    assert all(torch.equal(p, theirs_.get_parameter(n)) for n, p in encoder.named_parameters() if n in dict(theirs_.named_parameters()))
    models.save(mine, tmp_path / "again")
    back = getattr(transformers, f"{family}ForSequenceClassification").from_pretrained(tmp_path / "again").eval()
    assert_close(output(back, saved), output(mine, saved), rtol=1e-4, atol=1e-4)


def test_a_new_head_begins_as_transformers_begins_it(tmp_path):
    """Normal weights of initializer_range, biases 0; in the dtype of the rest."""
    reference = theirs("BertForMaskedLM", hidden_size=128, initializer_range=0.05)
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="begin at random"):
        mine, _ = models.load(tmp_path, task="sequence-classification", num_labels=100)
    for part in (mine.bert.pooler.dense, mine.classifier):
        assert part.weight.float().std().item() == pytest.approx(0.05, rel=0.1)
        assert part.bias.abs().max() == 0
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}


def test_a_masked_lm_begins_on_a_bare_encoder(tmp_path):
    saved_as("RobertaModel", tmp_path)
    with pytest.warns(UserWarning, match="has no lm_head, lm_head.dense, lm_head.layer_norm"):
        mine, _ = models.load(tmp_path, task="masked-lm")
    assert mine.lm_head.decoder.weight is mine.get_input_embeddings().weight
    assert torch.equal(mine.lm_head.layer_norm.weight, torch.ones(32))
    assert mine(**batch("RobertaModel")).logits.isfinite().all()


@pytest.mark.parametrize("saved", ["BertForSequenceClassification", "RobertaForMaskedLM", "RobertaForSequenceClassification"])
def test_the_encoder_of_any_checkpoint_can_be_had_alone(saved, tmp_path, no_warnings):
    reference = saved_as(saved, tmp_path)
    mine, _ = models.load(tmp_path, task="feature-extraction")
    family = saved.partition("For")[0]
    assert type(mine).__name__ == f"{family}Model"
    assert (mine.pooler is None) == (saved != "BertForSequenceClassification")
    assert_close(output(mine, family), output(reference.get_submodule(family.lower()), family), rtol=1e-4, atol=1e-4)


def test_the_same_task_asks_for_nothing_new(tmp_path, no_warnings):
    reference = saved_as("BertForSequenceClassification", tmp_path)
    mine, _ = models.load(tmp_path, task="sequence-classification", problem_type="multi_label_classification")
    assert mine.config.problem_type == "multi_label_classification"
    assert_close(output(mine, "Bert"), output(reference, "Bert"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [("BertModel", {"task": "sequence-clasification"}, "task='sequence-clasification'.*did you mean 'sequence-classification'"),
     ("BertModel", {"num_labels": 3}, "num_labels: a BertModel has no classes"),
     ("BertModel", {"task": "sequence-classification", "num_labels": 0}, "num_labels=0"),
     ("BertModel", {"task": "sequence-classification", "problem_type": "ranking"}, "problem_type='ranking'"),
     ("BertForSequenceClassification", {"num_labels": 7}, r"'classifier.*' is \[3.*expected \[7")],
)  # fmt: skip
def test_a_task_that_cannot_be_is_an_error_that_says_so(saved, asked, message, tmp_path):
    saved_as(saved, tmp_path)
    with pytest.raises(LoraLabError, match=message):
        models.load(tmp_path, **asked)


def test_a_family_without_the_task_is_an_error_that_lists_what_there_is(tmp_path):
    from llama_tools import theirs as llama

    llama().save_pretrained(tmp_path)
    with pytest.raises(LoraLabError, match="'LlamaForSequenceClassification' is not one of ours.*BertForSequenceClassification"):
        models.load(tmp_path, task="sequence-classification")


# Adapters -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_an_adapter_with_its_classifier_goes_to_peft_and_back(name, tmp_path):
    mine, reference = (model.double() for model in pair(name))
    base = copy.deepcopy(mine)
    lora_lab.inject(mine, rank=4, modules_to_save=["classifier"])
    trained = {n for n, p in mine.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {n for n, _ in base.named_parameters() if n.startswith("classifier.")}
    randomise(mine)
    with torch.no_grad():
        for parameter in mine.classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    lora_lab.save(mine, tmp_path / "ours")
    theirs_ = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    assert_close(output(theirs_, name), output(mine, name), rtol=0, atol=1e-9)
    assert not torch.allclose(output(mine, name), output(base, name))
    theirs_.save_pretrained(tmp_path / "theirs")
    again = lora_lab.load(base, tmp_path / "theirs")
    assert_close(output(again, name), output(mine, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_peft_means_the_same_layers_by_all_linear(name):
    mine, reference = pair(name)
    theirs_ = peft.get_peft_model(reference, peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    adapted = {n.removeprefix("base_model.model.").partition(".lora_A")[0] for n, _ in theirs_.named_parameters() if ".lora_A." in n}
    assert {layer.path for layer in lora_lab.plan(mine).layers} == adapted


def test_loading_for_a_task_leaves_the_hash_of_the_file(tmp_path):
    saved_as("BertModel", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, _ = models.load(tmp_path, task="sequence-classification")
    assert mine.base_sha256 == models.load(tmp_path)[0].base_sha256
    assert isinstance(models.load(tmp_path)[0], BertModel)
