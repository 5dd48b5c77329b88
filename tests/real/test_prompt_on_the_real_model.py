"""A soft prompt before the real model: a few steps teach it, its file brings it back bit for bit, and it writes."""

from __future__ import annotations

import pytest
import torch
from real_models import had_or_skipped

import prompt_tuning_lab
from lora_lab import data, models
from lora_lab.training import fit
from prompt_tuning_lab.__main__ import main
from prompt_tuning_lab.tuning import training_config

pytestmark = pytest.mark.real
NAME, TOKENS, TEMPLATE = "smollm2-135m-instruct-q4", 20, "Review: {text}\nSentiment:"
ANSWERS = [" negative", " neutral", " positive"]
QUIET = {"max_steps": 8, "micro_batch_size": 4, "progress": False}


def sentiments(rows, count):
    """The shortest reviews, each with the place of its sentiment among the answers."""
    shortest = sorted(rows, key=lambda row: len(row["output"]))[:count]
    return [{"text": row["output"], "label": ANSWERS.index(f" {row['sentiment']}")} for row in shortest]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(prompted, tokenizer, result, its folder, the base's weights before)"""
    with had_or_skipped():
        base, tokenizer = models.load(NAME)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    reviews = zip(data.load("reviews"), (32, 8), strict=True)
    train, held_out = (data.verbalize(sentiments(rows, count), tokenizer, TEMPLATE, ANSWERS) for rows, count in reviews)
    prompted = prompt_tuning_lab.inject(base, TOKENS, init="text", text="Is this review negative, neutral or positive?", tokenizer=tokenizer, seed=0)
    result = fit(prompted, train, training_config(prompted, train, **QUIET), tokenizer=tokenizer, eval_data=held_out)
    folder = tmp_path_factory.mktemp("real") / "prompt"
    prompt_tuning_lab.save(prompted, folder)
    return prompted, tokenizer, result, folder, before


def test_a_few_steps_lower_the_held_out_loss_and_change_no_weight(tuned):
    prompted, _, result, _, before = tuned
    assert result.eval_losses[-1] < result.eval_losses[0] - 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in prompted.base.state_dict().items())


def test_the_derived_rate_is_a_tenth_of_a_words_size(tuned):
    """The embedding's rms is 0.136: the project's reference on prompt tuning, T19."""
    assert training_config(tuned[0], [{}], max_steps=1).learning_rate == pytest.approx(0.0136, abs=1e-4)


def test_the_file_is_a_few_kilobytes_and_brings_the_prompt_back_bit_for_bit(tuned):
    prompted, tokenizer, _, folder, _ = tuned
    ids = torch.tensor([tokenizer.encode("Review: It broke on the second day.\nSentiment:")])
    fresh = prompt_tuning_lab.load(models.load(NAME)[0], folder)
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, prompted(input_ids=ids).logits)
        assert not torch.equal(fresh(input_ids=ids).logits, fresh.base(input_ids=ids).logits)
    numbers = TOKENS * prompted.config.hidden_size * 4
    assert numbers == 46_080 <= (folder / "adapter_model.safetensors").stat().st_size < numbers + 2_000


def test_it_writes_what_it_was_taught(tuned, capsys):
    """An answer, and then the end: both were learned."""
    words = ["generate", "--model", NAME, "--precision", "fp32", "--prompt-folder", str(tuned[3]), "--raw", "--temperature", "0"]
    question = "Review: Love it. Fits well, looks great.\nSentiment:"
    assert main([*words, "--prompt", question, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.rstrip("\n") in ANSWERS


def test_the_words_it_began_as_are_still_the_nearest(tuned, capsys):
    prompted, tokenizer, _, folder, _ = tuned
    began = tokenizer.encode("Is this review negative, neutral or positive?", add_special_tokens=False)
    nearest = [first.id for first, *_ in prompt_tuning_lab.nearest_tokens(prompted, tokenizer, 1)]
    assert nearest[: len(began)] == began
    assert main(["inspect", str(folder)]) == 0
    assert f"{len(began)} from text" in capsys.readouterr().out
