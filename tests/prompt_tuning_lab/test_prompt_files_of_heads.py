"""Files of models that answer for every position, start and end of an answer or a class for each word: both ways with a live PEFT."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from llama_tools import relative_error
from prompt_file_tools import METHODS, PEFT_METHODS, POINTING, TOKENS, answer, batch, peft_folder, prompted, theirs, written
from torch.testing import assert_close

from lora_lab import LoraLabError
from prompt_tuning_lab.checkpoint import load, save

EXACT = {"rtol": 0, "atol": 1e-10}
HEADS = {"answers": "qa_outputs", "tokens": "classifier"}
TOO_FAR = "counts the start and end of an answer from the first virtual token"
families = pytest.mark.parametrize("family", list(POINTING))


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return relative_error(a, b) > 1e-2


@families
@pytest.mark.parametrize("method", list(PEFT_METHODS))
@pytest.mark.filterwarnings(f"ignore:.*{TOO_FAR}")
def test_what_peft_saves_is_read_with_equal_logits(family, method, tmp_path):
    """Reference, section 2: QUESTION_ANS and TOKEN_CLS, whose head PEFT always writes. Its logits have P positions more."""
    expected = answer(peft_folder(tmp_path, family, method), family)
    assert differ(expected, answer(theirs(family), family))
    assert_close(answer(load(theirs(family), tmp_path), family), expected, **EXACT)


@families
@pytest.mark.parametrize("method", list(METHODS))
def test_what_we_save_is_read_by_peft_and_by_us_with_equal_logits(family, method, tmp_path):
    model = prompted(family, method)
    save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        there = peft.PeftModel.from_pretrained(theirs(family), tmp_path).eval()
        again = load(theirs(family), tmp_path)
    expected = answer(model, family)
    assert differ(expected, answer(theirs(family), family))
    assert_close(answer(there, family), expected, **EXACT)
    assert_close(answer(again, family), expected, **EXACT)


@families
def test_a_trained_head_travels_both_ways(family, tmp_path):
    """All tasks share the base's head: it is never dropped, and never put in place, without a word."""
    head = HEADS[family]
    live = peft_folder(tmp_path / "peft", family, "prefix")
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if f"{head}.modules_to_save" in name:
                parameter.normal_()
    live.save_pretrained(tmp_path / "trained")
    with pytest.raises(LoraLabError, match=rf"{head}\.bias, {head}\.weight.*head=True"):
        load(theirs(family), tmp_path / "trained")
    model = load(theirs(family), tmp_path / "trained", head=True)
    assert_close(answer(model, family), answer(live, family), **EXACT)
    save(model, tmp_path / "ours")
    assert_close(answer(peft.PeftModel.from_pretrained(theirs(family), tmp_path / "ours").eval(), family), answer(live, family), **EXACT)
    assert written(tmp_path / "ours")[0]["modules_to_save"] == [head]


def test_places_that_peft_has_learned_are_too_far_to_the_left_here(tmp_path):
    """T15b: PEFT's QUESTION_ANS takes start_positions of the text for positions of prompt and text. Its file is read with a warning."""
    live, inputs = peft_folder(tmp_path, "answers"), batch("answers")
    places = {"start_positions": torch.tensor([5, 6]), "end_positions": torch.tensor([7, 6])}
    moved = {name: position - TOKENS for name, position in places.items()}
    with pytest.warns(UserWarning, match=TOO_FAR) as caught:
        model = load(theirs("answers"), tmp_path)
    assert caught[0].filename == __file__
    with torch.no_grad():
        starts, ends = live(**inputs).start_logits, live(**inputs).end_logits
        expected = [torch.nn.functional.cross_entropy(*each) for each in ((starts, places["start_positions"]), (ends, places["end_positions"]))]
        assert_close(live(**inputs, **places).loss.double(), sum(expected) / 2, rtol=0, atol=1e-5)
        out = model(**inputs, **moved)
    assert_close(out.start_logits, starts[:, TOKENS:], **EXACT)
    chosen = {name: logits.gather(1, places[name][:, None]) for name, logits in (("start_positions", starts), ("end_positions", ends))}
    assert_close(out.start_logits.gather(1, moved["start_positions"][:, None]), chosen["start_positions"], **EXACT)
    assert_close(out.end_logits.gather(1, moved["end_positions"][:, None]), chosen["end_positions"], **EXACT)
