"""Inputs that are no text, texts that fill the context, caches from elsewhere, and what is given in place of a prompted model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from bert_tools import theirs
from prefix_tools import both, model
from prompt_tools import ROUNDED, randomised, rows_of, with_tasks
from torch.testing import assert_close

from lora_lab import LoraLabError
from lora_lab.models import generate
from lora_lab.models.base import context_of
from prompt_tuning_lab import drift, ensemble, inject, learning_rate, load, nearest_tokens, per_sample, save, similarity, use

words = torch.arange(3, 15).view(2, 6)
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
methods = pytest.mark.parametrize("method", ["prompt", "prefix"])

NO_TEXTS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "nothing": (lambda base: {}, "give either input_ids"),
    "both": (lambda base: {"input_ids": words, "inputs_embeds": base.get_input_embeddings()(words)}, "give either input_ids"),
    "a row": (lambda base: {"input_ids": words[0]}, r"input_ids is torch.int64 \[6\], expected \[B, T\] of whole numbers"),
    "rows of rows": (lambda base: {"input_ids": words[None]}, r"input_ids is torch.int64 \[1, 2, 6\]"),
    "a list": (lambda base: {"input_ids": words.tolist()}, "input_ids is a list, expected a tensor"),
    "fractions": (lambda base: {"input_ids": words.float()}, r"input_ids is torch.float32 \[2, 6\]"),
    "truth": (lambda base: {"input_ids": words > 4}, r"input_ids is torch.bool \[2, 6\]"),
    "another width": (lambda base: {"inputs_embeds": torch.randn(2, 6, 7)}, r"inputs_embeds is torch.float32 \[2, 6, 7\], expected \[B, T, 3\d\]"),
    "no rows": (lambda base: {"input_ids": words[:0]}, r"input_ids is \[0, 6\], a batch without rows"),
}


@on_both_sides
@methods
@pytest.mark.parametrize("name", ["gpt2", "t5", "BertForSequenceClassification"])
def test_what_is_no_batch_of_texts_is_told(side: str, name: str, method: str) -> None:
    """Before anything runs, and in place of what a torch.cat in the middle would say."""
    base = both(name, torch.float32)[side]
    prompted, more = inject(base, 3, method=method, init="random"), {"decoder_input_ids": words} if name == "t5" else {}
    for make, message in NO_TEXTS.values():
        with pytest.raises(LoraLabError, match=message):
            prompted(**make(base), **more)
    if name != "t5":
        with pytest.raises(LoraLabError, match=r"input_ids is \[2, 0\], a batch without tokens: give each row at least one"):
            prompted(input_ids=words[:, :0])


def test_an_encoder_decoder_can_read_a_prompt_alone() -> None:
    prompted = with_tasks(model("ours", "t5"), {"a": 5})
    expected = prompted.base(inputs_embeds=rows_of(prompted, "a")[None].expand(2, -1, -1), decoder_input_ids=words).logits
    assert_close(prompted(input_ids=words[:, :0], decoder_input_ids=words).logits, expected, **ROUNDED)


@on_both_sides
@methods
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_row_that_is_done_does_not_stop_the_others_at_the_end_of_the_context(side: str, name: str, method: str, use_cache: bool) -> None:
    """T28: a long text has room for 3 tokens, a short one beside it for many; each gets what it would get alone."""
    prompted = randomised(inject(model(side, name, torch.float32), 5, method=method, init="random"))
    room: Any = context_of(prompted)  # of text
    rows = [[3 + place % 50 for place in range(room - 3)], [8, 9, 4]]
    found = generate(prompted, rows, max_new_tokens=100, stop_ids=[], use_cache=use_cache).ids
    assert [len(ids) for ids in found] == [3, room - 3]
    assert found == [generate(prompted, [row], max_new_tokens=100, stop_ids=[], use_cache=use_cache).ids[0] for row in rows]


@on_both_sides
@methods
def test_what_is_no_cache_is_told(side: str, method: str) -> None:
    prompted = inject(model(side, "llama", torch.float32), 3, method=method, init="random")
    with pytest.raises(LoraLabError, match="past_key_values is a int: expected a cache that this model gave back, or None"):
        prompted(input_ids=words, past_key_values=3)


def test_a_model_without_logits_has_no_ensemble() -> None:
    for name, settings in (("BertForQuestionAnswering", {"num_labels": 2}), ("BertModel", {})):
        prompted = inject(theirs(name, **settings), 3, init="random")
        with pytest.raises(LoraLabError, match=f"a {name} gives no logits of classes or words to put together"):
            ensemble(prompted, ["default"], input_ids=words)


def test_what_is_no_prompted_model_is_told(tmp_path: Any) -> None:
    base = model("ours", "llama", torch.float32)
    for verb in (lambda: save(base, tmp_path), lambda: use(base, "a"), lambda: per_sample(base, ["a"]).__enter__(), lambda: learning_rate(base),
                 lambda: ensemble(base, ["a"], input_ids=words), lambda: drift(base), lambda: similarity(base, ["a"]),
                 lambda: nearest_tokens(base, None)):  # fmt: skip
        with pytest.raises(LoraLabError, match="expected a prompted model, from inject or load, not a LlamaForCausalLM"):
            verb()
    for verb in (lambda: inject("gpt2", 3), lambda: load(None, tmp_path), lambda: save("gpt2", tmp_path)):  # type: ignore[arg-type]
        with pytest.raises(LoraLabError, match=r"expected a model, not ('gpt2'|None); lora_lab.models.load\(name\) loads one"):
            verb()
    assert not list(tmp_path.iterdir())


def test_more_that_makes_no_sense_leaves_the_model_as_it_was() -> None:
    base: Any = model("ours", "llama", torch.float32)
    with pytest.raises(LoraLabError, match="seed='a': expected a whole number, or None"):
        inject(base, 3, seed="a")  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(LoraLabError, match="similarity of no tasks"):
        similarity(inject(base, 3), [])
    with torch.device("meta"):
        hollow = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20))
    for method in ("prompt", "prefix"):
        with pytest.raises(LoraLabError, match="on the meta device, which holds shapes and no numbers: load the weights first"):
            inject(hollow, 3, method=method, init="random")
