"""Heads that pool, point or label see the text alone. Trap numbers are those of the project's reference on prompt tuning."""

from __future__ import annotations

import copy
import threading
from typing import Any

import bert_tools
import peft
import pytest
import torch
import transformers
from prefix_tools import both
from prompt_tools import EXACT, ROUNDED, ROWS, joined, padded, randomised, rows_of, with_tasks
from torch import Tensor
from torch.testing import assert_close

from lora_lab.training import predict_classes
from prompt_tuning_lab import inject, per_sample, use
from prompt_tuning_lab.base_model import base_kind

TASKS = ["a", None, "b"]
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
words, mask = padded(ROWS, "right")


def theirs(name: str, **changes: Any) -> Any:
    return bert_tools.theirs(name, **changes).double()


def decoder(family: str, task: str) -> Any:
    """A small model of transformers with a head, in float64."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3,
             "pad_token_id": 0, "max_position_embeddings": 48}  # fmt: skip
    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "num_labels": 3, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**(gpt2 if family == "GPT2" else sizes))
    model = getattr(transformers, f"{family}For{task}")(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def hidden_of(prompted: Any, task: str | None, row: list[int]) -> Tensor:
    """By hand: what the backbone makes of the text behind its prompt, [1, T, H]."""
    out = prompted.backbone(inputs_embeds=joined(prompted, task, row))
    return out.last_hidden_state[:, len(rows_of(prompted, task)) :]


# Classes of a text --------------------------------------------------------------------------------------------------------------


@on_both_sides
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_classifier_reads_the_texts_own_first_position(side: str, name: str) -> None:
    """T15: PEFT's pools a virtual token; P-tuning v2 had the same bug. Rows of different prompts, and none, in one batch."""
    prompted = with_tasks(both(name)[side], {"a": 5, "b": 2})
    base, labels = prompted.base, torch.tensor([2, 0, 1])
    with torch.no_grad():
        with per_sample(prompted, TASKS):
            out = prompted(input_ids=words, attention_mask=mask, labels=labels)
        for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
            hidden = hidden_of(prompted, task, row)
            expected = base.classifier(base.bert.pooler(hidden)) if name.startswith("Bert") else base.classifier(hidden)
            assert_close(out.logits[index], expected[0], **EXACT)
            assert out.logits[index].shape == (3,)
        assert_close(out.loss.double(), torch.nn.functional.cross_entropy(out.logits, labels), **ROUNDED)
        assert (use(prompted, None)(input_ids=words, attention_mask=mask).logits - out.logits)[[0, 2]].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_decoder_s_classifier_finds_the_last_word(family: str, padding: str) -> None:
    """T15: with inputs_embeds transformers takes the last position, whatever the padding: logits were off by 0.28."""
    prompted = with_tasks(decoder(family, "SequenceClassification"), {"a": 5, "b": 2})
    ids, given = padded(ROWS, padding)
    with torch.no_grad():
        with per_sample(prompted, TASKS):
            logits = prompted(input_ids=ids, attention_mask=given).logits
        for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
            assert_close(logits[index], prompted.base.score(hidden_of(prompted, task, row))[0, -1], **(EXACT if family == "GPT2" else ROUNDED))


def test_a_classifier_learns_and_predicts_through_its_prompt() -> None:
    from lora_lab.training import fit

    prompted = inject(both("BertForSequenceClassification", torch.float32)["ours"], 6, seed=0)
    rows = [{"input_ids": row, "label": label} for row, label in zip(ROWS, (1, 0, 2), strict=True)]
    fit(prompted, rows, {"max_steps": 40, "micro_batch_size": 3, "learning_rate": 0.1, "progress": False})
    assert predict_classes(prompted, rows, progress=False) == [1, 0, 2]
    assert predict_classes(use(prompted, None), rows, progress=False) != [1, 0, 2]


# Tokens, answers, words under masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Bert", "GPT2"])
def test_labels_of_tokens_are_the_texts(family: str) -> None:
    """T15b: PEFT's TOKEN_CLS with a prompt and labels crashes, P positions against none."""
    base = theirs("BertForTokenClassification") if family == "Bert" else decoder("GPT2", "TokenClassification")
    prompted = with_tasks(base, {"a": 5, "b": 2})
    labels = (words % 3).masked_fill(mask == 0, -100)
    with torch.no_grad():
        with per_sample(prompted, TASKS):
            out = prompted(input_ids=words, attention_mask=mask, labels=labels)
        for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
            hidden = hidden_of(prompted, task, row)
            assert_close(out.logits[index, : len(row)], getattr(base, "classifier", getattr(base, "score", None))(hidden)[0], **EXACT)
        expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_close(out.loss, expected, **ROUNDED)


def test_start_and_end_of_an_answer_are_positions_of_the_text() -> None:
    """T15b: PEFT's QUESTION_ANS does not shift them by P, and its loss is that of other words."""
    prompted = with_tasks(theirs("BertForQuestionAnswering", num_labels=2), {"a": 5, "b": 2})
    starts, ends = torch.tensor([1, 2, 0]), torch.tensor([3, 4, 2])
    with torch.no_grad():
        with per_sample(prompted, TASKS):
            out = prompted(input_ids=words, attention_mask=mask, start_positions=starts, end_positions=ends)
        for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
            expected = prompted.base.qa_outputs(hidden_of(prompted, task, row))[0]
            assert_close(torch.stack((out.start_logits[index], out.end_logits[index]), -1)[: len(row)], expected, **EXACT)
        losses = [torch.nn.functional.cross_entropy(each, at) for each, at in ((out.start_logits, starts), (out.end_logits, ends))]
    assert out.start_logits.shape == words.shape
    assert_close(out.loss, sum(losses) / 2, **ROUNDED)


@on_both_sides
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_words_under_masks_are_the_texts(side: str, name: str) -> None:
    """Labels have the text's shape, and in training mode our model makes no logits."""
    prompted = with_tasks(both(name)[side], {"a": 5})
    labels = words.masked_fill((mask == 0) | (words % 2 == 0), -100)
    out = prompted(input_ids=words, attention_mask=mask, labels=labels)
    for index, row in enumerate(ROWS):
        hidden = hidden_of(prompted, "a", row)
        head = prompted.base.cls if name.startswith("Bert") else prompted.base.lm_head
        assert_close(out.logits[index, : len(row)], head.predictions(hidden)[0] if name.startswith("Bert") else head(hidden)[0], **EXACT)
    expected = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_close(out.loss.double(), expected, **ROUNDED)
    out.loss.backward()
    assert (prompted.prompt().weight.grad.abs().amax(1) > 0).all()
    trained = prompted.train()(input_ids=words, attention_mask=mask, labels=labels)
    assert_close(trained.loss, out.loss, **EXACT)
    assert (trained.logits is None) == (side == "ours")


# Encoders without a head --------------------------------------------------------------------------------------------------------


@on_both_sides
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_hidden_states_and_the_pooler_are_the_texts(side: str, name: str, padding: str) -> None:
    """T3, T15: absolute positions count the prompt, then the text; RoBERTa's begin behind its padding's; a row without prompt is as if alone."""
    prompted = with_tasks(both(name)[side], {"a": 5, "b": 2})
    ids, given = padded(ROWS, padding)
    with torch.no_grad(), per_sample(prompted, TASKS):
        out = prompted(input_ids=ids, attention_mask=given)
    with torch.no_grad():
        for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
            hidden = hidden_of(prompted, task, row)
            assert_close(out.last_hidden_state[index][given[index].bool()], hidden[0], **EXACT)
            if padding == "right":
                assert_close(out.pooler_output[index], prompted.backbone.pooler(hidden)[0], **EXACT)
        alone = prompted.base(input_ids=torch.tensor([ROWS[1]])).last_hidden_state[0]
    assert_close(out.last_hidden_state[1][given[1].bool()], alone, **EXACT)


@on_both_sides
def test_hidden_states_are_pefts(side: str) -> None:
    """Its FEATURE_EXTRACTION gives P positions more; the text's are the same, without padding and pooling."""
    models = both("BertModel")
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5)
    reference = peft.get_peft_model(copy.deepcopy(models["theirs"]), config).double()
    prompted = inject(models[side], 5, init=reference.prompt_encoder["default"].embedding.weight.detach())
    prompted.tasks.double()
    with torch.no_grad():
        expected = reference(input_ids=words, attention_mask=mask).last_hidden_state[:, 5:]
        found = prompted(input_ids=words, attention_mask=mask).last_hidden_state
    assert_close(found[mask.bool()], expected[mask.bool()], **ROUNDED)


def test_alberts_pooler_in_two_parts_and_token_types_are_known() -> None:
    torch.manual_seed(0)
    config = {"vocab_size": 64, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.AlbertModel(transformers.AlbertConfig(**config, max_position_embeddings=40)).double().eval()
    prompted = randomised(inject(base, 3, init="random"))
    assert prompted.prompt().weight.shape == (3, 16)  # T22: narrower than the hidden states
    with torch.no_grad():
        out = prompted(input_ids=words[:1], token_type_ids=torch.ones_like(words[:1]))
        types = torch.tensor([[0] * 3 + [1] * 7])
        whole = base(inputs_embeds=joined(prompted, "default", ROWS[0]), token_type_ids=types).last_hidden_state[:, 3:]
        assert_close(out.last_hidden_state, whole, **EXACT)
        assert_close(out.pooler_output, base.pooler_activation(base.pooler(whole[:, 0])), **EXACT)


def test_t5s_encoder_alone_reads_prompts_of_different_lengths() -> None:
    from lora_lab.models.loading import build

    t5 = both("t5")["theirs"]
    base = transformers.T5EncoderModel(t5.config).double().eval()
    base.load_state_dict(t5.state_dict(), strict=False)
    mine = build({**base.config.to_dict(), "architectures": ["T5EncoderModel"]}, ((n, p.float()) for n, p in base.state_dict().items()), None, None)
    for each in (base, mine.double()):
        prompted = with_tasks(each, {"a": 5, "b": 2})
        with torch.no_grad(), per_sample(prompted, TASKS):
            out = prompted(input_ids=words, attention_mask=mask)
        with torch.no_grad():
            for index, (task, row) in enumerate(zip(TASKS, ROWS, strict=True)):
                assert_close(out.last_hidden_state[index, : len(row)], hidden_of(prompted, task, row)[0], **ROUNDED)


# The backbone -------------------------------------------------------------------------------------------------------------------


def test_what_a_model_is_is_known_by_its_class() -> None:
    names = ("BertModel", "BertForSequenceClassification", "RobertaForMaskedLM", "BertForQuestionAnswering")
    kinds = {name: base_kind(theirs(name)) for name in names}
    assert [kind.backbone for kind in kinds.values()] == ["", "bert", "roberta", "bert"]
    assert not any(kind.causal or kind.encodes for kind in kinds.values())
    assert base_kind(both("gpt2")["theirs"]).causal and base_kind(both("llama")["ours"]).causal and base_kind(both("t5")["ours"]).encodes
    assert base_kind(decoder("GPT2", "SequenceClassification")).backbone == "transformer"

    class Own(transformers.GPT2LMHeadModel):
        """A subclass does what its class does."""

    assert base_kind(Own(both("gpt2")["theirs"].config)).causal


@on_both_sides
@torch.no_grad()
def test_the_prompt_goes_in_once_while_other_threads_use_the_model(side: str) -> None:
    """The backbone is one for all threads, and so are its hooks."""
    prompted = with_tasks(both("BertForSequenceClassification")[side], {"a": 5})
    alone, bare = prompted(input_ids=words).logits, prompted.base(input_ids=words).logits
    inside, outside, seen = threading.Event(), threading.Event(), {}

    def wait(module: Any, args: Any) -> None:  # in the first thread, between its hooks and its answer
        if threading.current_thread() is threading.main_thread():
            inside.set()
            assert outside.wait(30)

    def other() -> None:
        assert inside.wait(30)
        seen["bare"], seen["prompted"] = prompted.base(input_ids=words).logits, prompted(input_ids=words).logits
        outside.set()

    thread = threading.Thread(target=other)
    thread.start()
    handle = prompted.base.get_input_embeddings().register_forward_pre_hook(wait)
    seen["first"] = prompted(input_ids=words).logits
    handle.remove()
    thread.join()
    assert_close(seen["bare"], bare, **EXACT)
    assert_close(seen["prompted"], alone, **EXACT)
    assert_close(seen["first"], alone, **EXACT)


@on_both_sides
def test_hooks_are_gone_after_the_call_also_when_it_fails(side: str) -> None:
    prompted = with_tasks(both("BertForSequenceClassification")[side], {"a": 5})
    prompted(input_ids=words)
    with pytest.raises(Exception, match=r"20|expected"):
        prompted(input_ids=words, attention_mask=torch.ones(3, 20, dtype=torch.long))
    assert not prompted.backbone._forward_hooks and not prompted.backbone._forward_pre_hooks
