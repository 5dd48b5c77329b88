"""Answers scored by a language model: equal to a plain loop over whole sequences, however they are batched, cached and shared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import build
from t5_tools import pair as t5_pair
from tiny_workshop import BOS, END, VOCABULARY, chat_tokenizer, exact_model, ids, our_llama, plain_tokenizer

import lora_lab
from lora_lab import LoraLabError
from lora_lab.models.base import is_encoder_decoder
from lora_lab.training.evaluation import accuracy, best_choices, score_choices

PROMPTS = [[5, 9, 3], [7], [4, 4, 4, 8, 30, 6, 2], [11, 12]]
CHOICES = [[3], [3, 9], [10, 11, 12, 13], [3, 9, 3], [3]]  # prefixes of each other, and one twice
QUIET = {"progress": False}
KNOWN: dict[str, Any] = {
    "ours": exact_model,
    "ours, sliding window": lambda: our_llama(torch.float64, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=3),
    "llama": lambda: build("llama"), "gpt2": lambda: build("gpt2"), "neox": lambda: build("neox"), "t5": lambda: build("t5"),
    "our t5": lambda: t5_pair()[0].double(), "bfloat16": lambda: our_llama(torch.bfloat16),
}  # fmt: skip


def by_a_loop(model: Any, prompt: list[int], choice: list[int]) -> float:
    """One sequence at a time, no padding, no cache: log P of each token of the choice, added up."""
    with torch.no_grad():
        if is_encoder_decoder(model):
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *choice[:-1]]])).logits[0]
        else:
            logits = model(input_ids=torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1]
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    return sum(float(row.log_softmax(-1)[token]) for row, token in zip(logits, choice, strict=True))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_scores_are_those_of_whole_sequences_one_at_a_time(name, use_cache):
    model = KNOWN[name]().eval()
    expected = torch.tensor([[by_a_loop(model, prompt, choice) for choice in CHOICES] for prompt in PROMPTS], dtype=torch.float64)
    tolerance = 0.15 if name == "bfloat16" else 1e-9
    for size in (1, 3, 50):
        scores = score_choices(model, PROMPTS, None, CHOICES, batch_size=size, use_cache=use_cache, **QUIET)
        assert scores.dtype == torch.float64 and scores.shape == (4, 5)
        torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    assert (scores[:, :-1].diff(dim=1).abs() > 1e-3).any()


def test_the_prompt_is_read_once():
    """One pass over the prompts; a second for the choices of several tokens, which brings only those tokens."""
    model, seen = exact_model().eval(), []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    score_choices(model, PROMPTS, None, CHOICES, batch_size=50, **QUIET)
    assert seen == [(4, 7), (4 * 3, 3)]
    seen.clear()
    score_choices(model, PROMPTS, None, [[3], [4], [3]], batch_size=50, **QUIET)
    assert seen == [(4, 7)]


def test_the_encoder_reads_once():
    model, seen = t5_pair()[0], []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    score_choices(model, PROMPTS, None, CHOICES, batch_size=50, **QUIET)
    assert len(seen) == 1


def test_the_adapter_takes_part_and_the_model_stays_what_it_was():
    model = exact_model().train()
    with lora_lab.disabled(model):
        base = score_choices(model, PROMPTS, None, CHOICES, **QUIET)
    assert not torch.allclose(base, score_choices(model, PROMPTS, None, CHOICES, **QUIET))
    dropping = lora_lab.inject(our_llama(torch.float64), rank=3, dropout=0.5, init="random").train()
    first, second = (score_choices(dropping, PROMPTS, None, CHOICES, **QUIET) for _ in range(2))
    assert torch.equal(first, second)
    assert model.training and dropping.training and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(base, score_choices(our_llama(torch.float64), PROMPTS, None, CHOICES, **QUIET), rtol=0, atol=1e-12)


def test_choices_may_differ_from_prompt_to_prompt():
    model = exact_model().eval()
    each = [CHOICES[:2], CHOICES[1:4], CHOICES[2:3], CHOICES[:1]]
    scores = score_choices(model, PROMPTS, None, each, **QUIET)
    assert scores.shape == (4, 3)
    for row, choices in enumerate(each):
        assert scores[row, : len(choices)].tolist() == pytest.approx([by_a_loop(model, PROMPTS[row], choice) for choice in choices], abs=1e-9)
        assert (scores[row, len(choices) :] == -math.inf).all()


def test_equal_choices_are_a_tie_and_the_first_of_them_wins():
    model = our_llama(torch.bfloat16)
    scores = score_choices(model, PROMPTS, None, [[9, 9], [3], [9, 9], [3]], batch_size=3, **QUIET)
    assert torch.equal(scores[:, 0], scores[:, 2]) and torch.equal(scores[:, 1], scores[:, 3])
    assert {*best_choices(scores)} <= {0, 1}
    assert best_choices(torch.tensor([[-3.0, -1.0, -1.0], [-1.0, -2.0, -1.0]])) == [1, 0]


def test_texts_are_tokenised_apart_and_rows_become_prompts_without_their_answer():
    model, chat = our_llama(torch.float64, max_position_embeddings=128), chat_tokenizer()
    row = {"instruction": "Is it good?", "input": "ab", "output": "never seen"}
    prompt = chat.encode(lora_lab.data.prompt_of(row, chat), add_special_tokens=False)
    scores = score_choices(model, [row, "ab", ids("ab")], chat, [" yes", "no"], **QUIET)
    for found, given in zip(scores, (prompt, ids("ab"), ids("ab")), strict=True):
        assert found.tolist() == pytest.approx([by_a_loop(model, given, ids(choice)) for choice in (" yes", "no")], abs=1e-9)
    plain = plain_tokenizer()
    assert plain.encode(lora_lab.data.prompt_of(row, plain), add_special_tokens=False)[0] == BOS


def test_with_its_end_a_choice_is_not_the_beginning_of_a_longer_one():
    model, chat = exact_model().eval(), chat_tokenizer()
    open_, closed = (score_choices(model, PROMPTS, chat, ["y", "yes"], end=end, **QUIET) for end in (False, True))
    assert (open_[:, 0] >= open_[:, 1]).all()  # P(y...) is never below P(yes...)
    assert closed[0].tolist() == pytest.approx([by_a_loop(model, PROMPTS[0], [*ids(word), END]) for word in ("y", "yes")], abs=1e-9)
    with pytest.raises(LoraLabError, match="no stop token"):
        score_choices(model, PROMPTS, type("None", (), {"encode": lambda self, text, **_: [1]})(), ["y"], end=True)


def test_scores_per_token_and_per_character():
    model, chat = exact_model().eval(), chat_tokenizer()
    choices = [" a", " abcd", "é"]  # 2, 5 and 2 bytes, which are tokens here; 1, 4 and 1 characters
    plain, tokens, characters = (score_choices(model, PROMPTS, chat, choices, normalise=by, **QUIET) for by in (None, "tokens", "characters"))
    torch.testing.assert_close(plain / torch.tensor([2, 5, 2]), tokens, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain / torch.tensor([1, 4, 1]), characters, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("certain", "expected"), [("b", [1, 1, 1]), ("a", [0, 0, 0])])
def test_the_choice_that_is_certain_is_chosen(certain, expected):
    """End to end, from a head that writes one letter whatever it reads; and accuracy counts in how many rows that was right."""
    model, letter = our_llama(torch.float64), torch.zeros(VOCABULARY, dtype=torch.float64)
    letter[ids(certain)] = 100.0
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + letter)
    chosen = best_choices(score_choices(model, ["x", "yy", "zzz"], chat_tokenizer(), ["a", "b"], **QUIET))
    assert chosen == expected and accuracy(chosen, [*expected[:2], 1 - expected[2]]) == pytest.approx(2 / 3)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown normalisation": ({"normalise": "token"}, r"normalise='token'.*did you mean 'tokens'"),
    "no choices": ({"choices": []}, "expected a list of at least one text"),
    "one text": ({"choices": "yes"}, "choices='yes'"),
    "an empty text": ({"choices": ["a", ""]}, "choice '' of prompt 0 is empty"),
    "ids that are no list": ({"choices": [5, 6]}, "choice 5 of prompt 0"),
    "lists for other prompts": ({"choices": [[[1]], [[2]]]}, "2 lists of choices for 4 prompts"),
    "an empty list": ({"choices": [[[1]], [], [[2]], [[3]]]}, "at least one choice"),
    "an empty prompt": ({"prompts": [[]]}, "prompt 0 is empty"),
    "beyond the context": ({"prompts": [[1] * 62]}, "prompt 0 with its longest choice has 65 tokens, the model's context is 64"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "an unknown precision": ({"precision": "fp8"}, "precision='fp8'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_scored_is_refused(change, message):
    with pytest.raises(LoraLabError, match=message):
        score_choices(our_llama(), **{"prompts": PROMPTS, "tokenizer": chat_tokenizer(), "choices": CHOICES, **QUIET, **change})


def test_up_to_the_context_a_choice_fits():
    assert score_choices(our_llama(), [[1] * 61], None, [[1, 2, 3, 4]], **QUIET).isfinite().all()


def test_probabilities_that_are_none_are_refused_not_ranked():
    model = our_llama()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(LoraLabError, match="the probabilities after prompt 0 are not numbers"):
        score_choices(model, PROMPTS, None, CHOICES, **QUIET)
    with pytest.raises(LoraLabError, match="prompt 0 is text, so a tokenizer is needed"):
        score_choices(model, ["a"], None, [[1]])
    with pytest.raises(LoraLabError, match="choice 'a' is text"):
        score_choices(model, PROMPTS, None, ["a"])
