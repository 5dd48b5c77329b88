"""What the notebooks share: the small models, checks that never raise, claims, tables and figures."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import matplotlib
import pytest
import torch
from check_tools import JUNK, said

import course
import lora_lab
from course import figures, holds, models, tables
from course.checks import NotYet, check, equal, expect, number, refuse, result, tensor
from lora_lab import data, training

matplotlib.use("Agg")
MODULES = sorted(path.relative_to(Path(course.__file__).parent.parent).with_suffix("") for path in Path(course.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_doctests(path):
    module = importlib.import_module(".".join(path.parts).removesuffix(".__init__"))
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


# The models ---------------------------------------------------------------------------------------------------------------------


def test_the_fast_model_has_about_a_million_weights_and_is_the_same_each_time():
    (first, tokenizer), (second, _) = models.load(), models.load()
    assert 0.5e6 < lora_lab.count_parameters(first).total < 1.5e6
    assert first is not second and all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    first.get_input_embeddings().weight.data.zero_()
    assert models.load()[0].get_input_embeddings().weight.any(), "one call's model is another's"
    text = "Wore it through a whole wet November. Ünïcödé 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_the_fast_model_learns_the_bundled_reviews():
    model, tokenizer = models.load()
    rows, _ = data.load("reviews")
    run = {"max_steps": 10, "micro_batch_size": 4, "learning_rate": 1e-2, "precision": models.precision(), "progress": False}
    losses = training.fit(lora_lab.inject(model, 8), rows[:4], run, tokenizer=tokenizer).losses
    assert losses[-1] < losses[0] - 0.3


def test_the_fast_encoder_takes_a_head_without_a_word_and_embeds(no_warnings):
    model, tokenizer = models.load_encoder(task="sequence-classification", num_labels=2)
    assert 0.5e6 < lora_lab.count_parameters(model).total < 1.5e6
    ids = tokenizer("a fine coat", "and warm")
    assert ids["input_ids"][0] == tokenizer.token_id("cls_token") and set(ids["token_type_ids"]) == {0, 1}
    encoder, _ = models.load_encoder()
    assert lora_lab.models.embed(encoder, tokenizer, ["a fine coat", "a bad one"]).shape == (2, 128)


def test_pick_and_names_follow_the_path(monkeypatch):
    assert models.fast() and models.pick(real=200, quick=3) == 3 and models.precision() == "fp32"
    assert Path(models.name()).is_dir() and Path(models.encoder_name()).is_dir()
    monkeypatch.setenv("LORA_LAB_COURSE", "real")
    assert models.pick(real=200, quick=3) == 200
    assert (models.name(), models.encoder_name()) == ("smollm2-135m-instruct-q4", "all-minilm-l6-v2")


# Claims and checks --------------------------------------------------------------------------------------------------------------


def test_a_claim_that_fails_is_shown_and_does_not_stop_the_lesson(capsys, monkeypatch):
    holds("one", True)
    holds("two", torch.tensor(False))
    holds("three", False, real_only=True)
    assert capsys.readouterr().out == "✓ one\n✗ NOT HERE: two\n– three: seen with the real model only\n"
    monkeypatch.setenv("LORA_LAB_COURSE", "real")
    holds("three", False, real_only=True)
    assert capsys.readouterr().out == "✗ NOT HERE: three\n"


@check
def two(answer):
    """The answer is 2."""
    value = number(result(answer), "your sum")
    refuse(value, {3: "that is one more"})
    expect(value == 2, f"it says {value:g}")
    return "1 + 1 = 2"


def test_a_check_says_yes_or_the_mistake_and_returns_nothing():
    assert said(two, lambda: 2) == "yes: 1 + 1 = 2"
    assert said(two, lambda: 3) == "not yet: that is one more"
    assert said(two, lambda: 4) == "not yet: it says 4"
    assert two.__doc__ == "The answer is 2." and two.is_check


@pytest.mark.parametrize("junk", JUNK, ids=[str(number) for number in range(len(JUNK))])
def test_a_check_never_raises(junk):
    assert said(two, (junk,)).startswith("not yet: ")


def test_a_check_takes_the_wrong_number_of_answers_and_answers_that_fail_anywhere():
    assert said(two, ()).startswith("not yet: ")
    assert said(two, (1, 2)).startswith("not yet: ")
    careless = check(lambda answer: "right" if answer + 1 else "")
    assert said(careless, "text").startswith("not yet: your answer is of a kind that cannot be checked (TypeError")


def test_an_interrupt_is_the_learners_own():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        two(interrupted)


def test_what_result_says_of_an_answer():
    for answer, words in ((None, "no answer yet"), (7, "without calling it: this is 7 (int)"), (lambda: None, "returns nothing yet"),
                          (lambda: ..., "returns nothing yet"), (lambda: {}["key"], "stops with KeyError: 'key', in the line: ")):  # fmt: skip
        with pytest.raises(NotYet, match=None) as refused:
            result(answer)
        assert words in str(refused.value)


def test_numbers_and_tensors_are_told_from_others():
    assert number(torch.tensor(3)) == 3.0
    for value in (None, "3", True, float("nan"), [3], torch.ones(2)):
        with pytest.raises(NotYet):
            number(value)
    assert tensor(torch.nn.Parameter(torch.ones(2, 3)), (2, 3)).requires_grad is False
    for value in (None, [1], torch.ones(3, 2)):
        with pytest.raises(NotYet):
            tensor(value, (2, 3))
    assert equal(1.00001, 1) and not equal(1.1, 1) and not equal("1", 1) and not equal(torch.ones(2), torch.ones(3))


def test_a_check_leaves_the_notebooks_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    said(check(lambda answer: str(torch.rand(9))), 1)
    assert torch.equal(torch.rand(2), expected)


# Tables and figures -------------------------------------------------------------------------------------------------------------


def test_tables_escape_what_they_show_and_align_numbers():
    html = tables.Table(["method", "loss"], [["<b>", 0.123456], ["full", 12]])._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert 'text-align: right">0.1235' in html and 'text-align: left">full' in html


def test_predicted_and_measured_name_the_difference():
    assert "+10.0%" in repr(tables.predicted_measured({"a step": (110 * 2**20, 100 * 2**20)}))


def test_before_and_after_stand_beside_each_other():
    samples = tables.before_after({"Write.": ("old", "new"), "Again.": ("older", "newer")})
    assert samples.columns == {"before": ["old", "older"], "after": ["new", "newer"]}
    assert tables.before_after({"Write.": ("old",)}, ["before"]).columns == {"before": ["old"]}


def test_every_figure_draws_what_it_is_given():
    left, right = figures.panels(2)
    figures.curves({"a": [3, 2, 1], "b": ([1, 2], [3, 4], [0.1, 0.2])}, x="step", log="xy", axes=left)
    figures.bars({"W": 32_768, "A": 4_096}, axes=right)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "b"] and left.get_xscale() == left.get_yscale() == "log"
    assert [text.get_text() for text in right.texts] == ["32,768", "4,096"]
    for draw in (lambda axes: figures.stacked({"full": {"weights": 4, "gradients": 4}, "LoRA": {"weights": 4}}, axes=axes),
                 lambda axes: figures.heatmap([[1, 2], [3, 0.5]], "ab", "cd", best="low", axes=axes)):  # fmt: skip
        (axes,) = figures.panels(1)
        draw(axes)
        axes.figure.canvas.draw()
    figures.matrices({"W": torch.randn(6, 8), "B": torch.randn(6, 2), "A": torch.randn(2, 8)})
    figures.plt.gcf().canvas.draw()
    figures.plt.close("all")
