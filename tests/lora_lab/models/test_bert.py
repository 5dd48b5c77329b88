"""Our BERT and RoBERTa against transformers': outputs, losses and every gradient, of the encoder, the classifiers and the masked LMs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bert_tools import CLASSES, LABELS, SMALL, VOCABULARY, assert_same, batch, labels_for, main_output, ours, padding, pair, theirs
from llama_tools import compiled, gradients, relative_error, saved_for_backward
from torch.testing import assert_close

import lora_lab
import memory_math
from lora_lab import LoraLabError
from lora_lab.models import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, RobertaConfig, RobertaModel, generate
from lora_lab.models.bert_heads import classification_loss
from lora_lab.models.loading import FAMILIES
from lora_lab.models.recompute import Recomputable

CLASSIFIERS = [name for name in CLASSES if name.endswith("ForSequenceClassification")]
MASKED = [name for name in CLASSES if name.endswith("ForMaskedLM")]
ENCODERS = ["BertModel", "RobertaModel"]


def given_for(name: str, **changes: Any) -> dict[str, Any]:
    given = batch(name)
    return {**given, **labels_for(name, given), **changes}


def output(model: Any, **inputs: Any) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        out = model(**inputs)
    return main_output(out, torch.ones(1) if mask is None else mask) if mask is not None else getattr(out, "last_hidden_state", None)


# Against transformers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_loss_and_gradients_are_transformers(name):
    mine, reference = pair(name)
    assert type(mine) is FAMILIES[name]
    assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in reference.named_parameters()}
    assert_same(mine, reference, given_for(name))


@pytest.mark.parametrize("name", CLASSES)
def test_dropout_falls_where_transformers_lets_it_fall(name):
    """The same seed gives the same masks only where every dropout has the same place, shape and share."""
    changes = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    mine, reference = pair(name, **changes, **({"classifier_dropout": 0.4} if name in CLASSIFIERS else {}))
    assert_same(mine, reference, given_for(name))


@pytest.mark.parametrize("name", CLASSES)
def test_a_padding_token_in_the_text_learns_nothing_as_in_transformers(name):
    """Its row, and of RoBERTa its position's, are nn.Embedding's padding_idx; a masked LM's head learns the word all the same."""
    mine, reference = pair(name)
    given = given_for(name)
    given["input_ids"][:, 3] = padding(name)
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    assert_same(mine, reference, given)


OPTIONS: dict[str, dict[str, Any]] = {
    "gelu_new": {"hidden_act": "gelu_new"}, "relu": {"hidden_act": "relu"}, "silu": {"hidden_act": "silu"}, "eps": {"layer_norm_eps": 1e-1},
    "gelu_fast": {"hidden_act": "gelu_fast"}, "quick_gelu": {"hidden_act": "quick_gelu"}, "three types": {"type_vocab_size": 3},
    "one type": {"type_vocab_size": 1}, "one head": {"num_attention_heads": 1}, "untied": {"tie_word_embeddings": False},
    "padding elsewhere": {"pad_token_id": 5},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MASKED)
def test_every_option_of_the_config_is_transformers(name, option):
    mine, reference = pair(name, **OPTIONS[option])
    given = given_for(name)
    if option == "padding elsewhere":
        given["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == 5, 6).masked_fill(given["attention_mask"] == 0, 5)
    assert_same(mine, reference, given)


def test_a_bert_without_a_padding_token_is_transformers():
    mine, reference = pair("BertForMaskedLM", pad_token_id=None)
    assert_same(mine, reference, given_for("BertForMaskedLM"))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_without_pooler_is_transformers(name):
    mine, reference = pair(name, add_pooling_layer=False)
    assert mine.pooler is None
    assert_same(mine, reference, given_for(name))


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "RobertaModel"])
def test_token_types_and_positions_may_be_given(name):
    mine, reference = pair(name, type_vocab_size=2)
    given = given_for(name)
    shape = given["input_ids"].shape
    more = {"token_type_ids": torch.randint(0, 2, shape), "position_ids": torch.randint(2, SMALL["max_position_embeddings"], shape)}
    assert_same(mine, reference, {**given, **more})
    plain = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    for one in more:
        assert relative_error(output(mine, **plain, **{one: more[one]}), output(mine, **plain)) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_may_be_given_instead_of_ids(name):
    mine, reference = pair(name)
    embeddings = torch.randn(2, 9, SMALL["hidden_size"])
    assert relative_error(*(output(model, inputs_embeds=embeddings) for model in (mine, reference))) < 1e-4
    ids = torch.randint(3, VOCABULARY, (2, 9))
    assert_close(output(mine, inputs_embeds=mine.get_input_embeddings()(ids)), output(mine, input_ids=ids))


def test_robertas_positions_begin_after_the_paddings_and_count_text_only():
    """transformers' create_position_ids_from_input_ids: padding keeps the padding's position, wherever it stands."""
    mine, reference = pair("RobertaModel")
    ids = torch.tensor([[1, 1, 7, 8, 9], [7, 8, 1, 9, 1]])
    expected = reference.embeddings.create_position_ids_from_input_ids(ids, 1)
    assert expected.tolist() == [[1, 1, 2, 3, 4], [2, 3, 1, 4, 1]]
    assert torch.equal(mine.embeddings.positions(ids, torch.zeros(2, 5, 32)), expected)
    assert relative_error(output(mine, input_ids=ids), output(reference, input_ids=ids)) < 1e-4


# What attention must not do -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_does_not_change_a_row_but_text_does_in_both_directions(name):
    mine, _ = pair(name)
    alone = torch.randint(3, VOCABULARY, (1, 5))
    padded = F.pad(alone, (0, 3), value=padding(name))
    mask = F.pad(torch.ones_like(alone), (0, 3))
    assert_close(output(mine, input_ids=padded, attention_mask=mask), output(mine, input_ids=alone)[0])
    other = alone.clone()
    other[0, -1] = 3 if alone[0, -1] != 3 else 4
    assert (output(mine, input_ids=other) - output(mine, input_ids=alone))[0, 0].abs().max() > 1e-3


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone():
    mine, _ = pair("BertModel")
    ids, mask = torch.randint(3, VOCABULARY, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    with torch.no_grad():
        hidden = mine(input_ids=ids, attention_mask=mask).last_hidden_state
    assert hidden.isfinite().all()
    assert_close(hidden[:1], output(mine, input_ids=ids[:1]))


# Losses -------------------------------------------------------------------------------------------------------------------------

PROBLEMS: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "one class": ({}, torch.tensor([0, 2, 1])),
    "one class, as a column": ({}, torch.tensor([[0], [2], [1]])),
    "one class, some without": ({}, torch.tensor([0, -100, 1])),
    "several classes": ({}, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])),
    "a number": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "a number, as a column": ({"num_labels": 1}, torch.tensor([[0.5], [-1.0], [2.0]])),
    "three numbers": ({"problem_type": "regression"}, torch.randn(3, 3, generator=torch.Generator().manual_seed(0))),
    "said to be several classes": ({"problem_type": "multi_label_classification"}, torch.tensor([[1.0, 0.0, 1.0]] * 3)),
    "said to be one class": ({"problem_type": "single_label_classification"}, torch.tensor([2, 2, 0])),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_the_labels_mean_is_decided_as_in_transformers(name, problem):
    changes, labels = PROBLEMS[problem]
    mine, reference = pair(name, **changes)
    assert_same(mine, reference, {**batch(name), "labels": labels})
    assert mine.config.problem_type == changes.get("problem_type")  # deciding once does not decide for the next labels


def test_two_classes_told_from_one_number_by_the_head():
    """transformers decides by num_labels first: one output is a regression, whatever the labels."""
    logits = torch.tensor([[0.5], [1.5]])
    assert_close(classification_loss(logits, torch.tensor([1, 0])), torch.tensor((0.25 + 2.25) / 2))


@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [(torch.tensor([0, 3]), None, "class 3, the model has 3"), (torch.tensor([0, -1]), None, "class -1"),
     (torch.tensor([[0, 1], [1, 0]]), None, r"labels is \[2, 2\], expected \[2\] for single_label"),
     (torch.tensor([0.0, 1.0]), None, r"labels is \[2\], expected \[2, 3\] for multi_label"),
     (torch.tensor([0.0, 1.0]), "single_label_classification", "torch.float32, expected whole numbers"),
     (torch.tensor([0.0, 1.0]), "regression", r"labels is \[2\], expected \[2, 3\] for regression")],
)  # fmt: skip
def test_labels_that_do_not_fit_are_errors_that_name_them(labels, problem, message):
    with pytest.raises(LoraLabError, match=message):
        classification_loss(torch.zeros(2, 3), labels, problem)


def test_a_loss_without_labelled_rows_is_zero_and_a_16_bit_one_is_float32():
    logits = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = classification_loss(logits, torch.tensor([-100, -100]))
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", MASKED)
def test_masked_words_are_predicted_where_they_stand(name):
    """No shift: the textbook cross-entropy of the full logits with the labels as they are."""
    mine, _ = pair(name)
    given = given_for(name)
    out = mine(**given)
    expected = F.cross_entropy(out.logits.flatten(0, 1), given["labels"].flatten())
    assert_close(out.loss, expected)
    trained = mine.train()(**given)
    assert trained.logits is None
    assert_close(trained.loss, expected)


@pytest.mark.parametrize("name", MASKED)
def test_the_head_is_the_embedding_and_its_bias_stands_beside_it(name):
    mine, _ = pair(name)
    head = mine.get_output_embeddings()
    assert head.weight is mine.get_input_embeddings().weight
    assert [n for n, p in mine.named_parameters() if p is head.bias] == [mine.head_path.removesuffix("decoder") + "bias"]
    untied, _ = pair(name, tie_word_embeddings=False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


def test_no_word_under_a_mask_is_a_loss_of_zero():
    mine, _ = pair("BertForMaskedLM")
    given = batch("BertForMaskedLM")
    loss = mine.train()(**given, labels=torch.full_like(given["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad.abs().max() == 0 for p in mine.parameters())


# Memory -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, 2, "attention"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForMaskedLM"])
def test_every_mode_of_checkpointing_gives_the_same_gradients_under_dropout(name, mode):
    mine = ours(theirs(name, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    given, kept, slopes = given_for(name), [], []
    for each in (False, mode):
        mine.gradient_checkpointing_enable(each)
        torch.manual_seed(3)
        with saved_for_backward() as saved:
            loss = mine(**given).loss
        kept.append(sum(saved.values()))
        slopes.append(gradients(mine, loss))
    assert mine.is_gradient_checkpointing
    assert kept[1] < kept[0]
    assert_close(slopes[1], slopes[0])
    mine.gradient_checkpointing_disable()
    assert not mine.is_gradient_checkpointing


def test_every_layer_is_a_block_that_can_be_recomputed():
    mine, _ = pair("BertModel", num_hidden_layers=3)
    blocks = [module for module in mine.modules() if isinstance(module, Recomputable)]
    assert len(blocks) == 3
    mine.gradient_checkpointing_enable(2)
    assert [block.recompute for block in blocks] == [True, False, True]


@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("name", ENCODERS)
def test_16_bit_is_close_to_float32(name, how):
    mine, _ = pair(name)
    given = batch(name)
    expected = output(mine, **given)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        actual = output(mine if how == "autocast" else mine.to(torch.bfloat16), **given)
    assert float((actual.float() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaModel"])
def test_a_compiled_model_computes_the_same(name):
    mine, _ = pair(name)
    given = batch(name)
    with compiled(lambda **inputs: main_output(mine(**inputs), given["attention_mask"])) as run, torch.no_grad():
        assert_close(run(**given), output(mine, **given))


# Counts -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in memory_math.presets.PRESETS if "bert" in name or "minilm" in name])
def test_every_preset_has_the_count_that_memory_math_has(preset):
    """Exactly, on the meta device: bert-base-uncased's 109,482,240, roberta-base's 124,645,632."""
    source = memory_math.presets.PRESETS[preset]
    family = FAMILIES[source["architectures"][0]]
    with torch.device("meta"):
        model = family(family.config_class.from_dict(source))
    assert sum(p.numel() for p in model.parameters()) == memory_math.count_parameters(preset).total


# LoRA ---------------------------------------------------------------------------------------------------------------------------


def test_loras_published_count_on_roberta_base():
    """Hu et al. 2021 (arXiv:2106.09685), table 2: 0.3M on RoBERTa-base, rank 8 on query and value."""
    with torch.device("meta"):
        model = RobertaModel(RobertaConfig.from_dict(memory_math.presets.PRESETS["roberta-base"]))
    assert lora_lab.plan(model, rank=8, target_modules=["query", "value"]).parameters == 294_912


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_all_linear_leaves_the_classifier_alone(name):
    """As PEFT does for TaskType.SEQ_CLS: what is new trains whole, or not at all."""
    mine, _ = pair(name)
    adapted = {layer.path for layer in lora_lab.plan(mine).layers}
    linear = {path for path, module in mine.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear - adapted == {path for path in linear if path.startswith("classifier")}


def test_all_linear_leaves_the_masked_words_head_alone():
    mine, _ = pair("BertForMaskedLM")
    paths = {layer.path for layer in lora_lab.plan(mine).layers}
    assert "cls.predictions.transform.dense" in paths and "cls.predictions.decoder" not in paths


@pytest.mark.parametrize("name", MASKED)
def test_rows_may_have_adapters_of_their_own_in_training(name):
    """The head's own layers are adapted too, and see whole rows, so that each row can have its adapter."""
    mine, _ = pair(name)
    for adapter in ("a", "b"):
        lora_lab.inject(mine, rank=2, adapter=adapter, init="random")
    given = given_for(name)
    mine.train()
    with lora_lab.per_sample(mine, ["a", None, "b"]):
        together = mine(**given).loss
    summed, count = 0.0, int((given["labels"] != -100).sum())
    for index, adapter in enumerate(["a", None, "b"]):
        lora_lab.use(mine, adapter)
        row = {key: value[index : index + 1] for key, value in given.items()}
        summed = summed + mine(**row).loss * int((row["labels"] != -100).sum())
    assert_close(together, summed / count, rtol=1e-5, atol=1e-5)


def test_an_encoder_writes_no_text():
    with pytest.raises(LoraLabError, match="a BertForMaskedLM reads text and writes none"):
        generate(pair("BertForMaskedLM")[0], [[5, 6]])


# Bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "either input_ids.*or inputs_embeds"),
     ({"input_ids": torch.ones(2, 4).long(), "inputs_embeds": torch.zeros(2, 4, 32)}, "not both"),
     ({"input_ids": torch.ones(4).long()}, r"\[4\], expected \[B, T\]"),
     ({"inputs_embeds": torch.zeros(2, 4, 31)}, r"\[2, 4, 31\], expected \[B, T, 32\]"),
     ({"input_ids": torch.full((1, 2), 64)}, "input_ids has the id 64.*ends at 63"),
     ({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 3)}, r"attention_mask is \[2, 3\], expected \[2, 4\]"),
     ({"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(1, 4)}, r"attention_mask is \[1, 4\]"),
     ({"input_ids": torch.ones(2, 4).long(), "token_type_ids": torch.full((2, 4), 2)}, "token_type_ids has 2, the model knows 0 to 1"),
     ({"input_ids": torch.ones(2, 4).long(), "position_ids": torch.full((2, 4), 24)}, "position_ids has 24, the model knows 0 to 23"),
     ({"input_ids": torch.ones(1, 25).long()}, "25 positions, the model's context 24")],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_errors_that_name_both(inputs, message):
    with pytest.raises(LoraLabError, match=message):
        BertModel(BertConfig.from_dict(SMALL))(**inputs)


def test_robertas_context_is_what_its_positions_leave_for_text():
    """roberta-base: 514 positions, of which two are never text's."""
    model = RobertaModel(RobertaConfig.from_dict(SMALL)).eval()
    assert model.config.context_length == 22
    assert model(input_ids=torch.full((1, 22), 5)).last_hidden_state.isfinite().all()
    with pytest.raises(LoraLabError, match="23 positions, the model's context 22"):
        model(input_ids=torch.full((1, 23), 5))


def test_masked_labels_of_another_shape_are_an_error():
    model = BertForMaskedLM(BertConfig.from_dict(SMALL))
    with pytest.raises(LoraLabError, match=r"labels is \[1, 3\], expected \[1, 4\]"):
        model(input_ids=torch.ones(1, 4).long(), labels=torch.ones(1, 3).long())
    with pytest.raises(LoraLabError, match="labels has the id 64"):
        model(input_ids=torch.ones(1, 4).long(), labels=torch.full((1, 4), 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": None}, "lacks hidden_size"), ({"hidden_act": "gleu"}, "hidden_act='gleu'.*did you mean 'gelu'"),
     ({"num_attention_heads": 5}, "5 attention heads"), ({"is_decoder": True}, "is_decoder=True"),
     ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'.*'absolute'"),
     ({"problem_type": "ranking"}, "problem_type='ranking'"), ({"pad_token_id": 64}, "pad_token_id=64.*0 to 63"),
     ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5"), ({"classifier_dropout": "0.1"}, "classifier_dropout='0.1'"),
     ({"initializer_range": "x"}, "initializer_range='x'"), ({"layer_norm_eps": "x"}, "layer_norm_eps='x'"),
     ({"type_vocab_size": 0}, "type_vocab_size=0"), ({"id2label": ["a"]}, "id2label="), ({"num_labels": 0}, "num_labels=0")],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_bert_is_an_error_that_names_the_value(change, message):
    source = {name: value for name, value in {**SMALL, **change}.items() if value is not None}
    with pytest.raises(LoraLabError, match=message):
        BertConfig.from_dict(source)


def test_a_roberta_needs_a_padding_token_which_is_1_where_nothing_else_is_said():
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    assert RobertaConfig(**sizes).pad_token_id == RobertaConfig.from_dict(sizes).pad_token_id == 1
    with pytest.raises(LoraLabError, match="pad_token_id=None.*positions begin after it"):
        RobertaConfig.from_dict({**SMALL, "pad_token_id": None})


def test_a_new_model_begins_as_bert_began():
    """The released code: normal weights of initializer_range, biases 0, padding's row 0."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig.from_dict({**SMALL, "initializer_range": 0.05, "hidden_size": 256, "num_labels": LABELS}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
    assert model.get_input_embeddings().weight[0].abs().max() == 0
    assert model.get_output_embeddings() is None
