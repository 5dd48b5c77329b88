"""Text from a prompted model: cached, uncached, step by step by hand and by transformers' own generate, all the same.

Trap numbers are those of the project's reference on prompt tuning.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from prefix_tools import both, model
from prompt_tools import ROWS, joined, padded, randomised, rows_of, with_tasks

from lora_lab.errors import LoraLabError
from lora_lab.models import generate
from prompt_tuning_lab import PromptedModel, inject, per_sample, use

NEW = 8
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def by_hand(prompted: PromptedModel, task: str | None, row: list[int], after: int = 0, new: int = NEW) -> list[int]:
    """The likeliest token, again and again, of the whole of prompt and text each time."""
    found: list[int] = []
    for _ in range(new):
        logits = prompted.base(inputs_embeds=joined(prompted, task, [*row, *found], after)).logits
        found.append(int(logits[0, -1].argmax()))
    return found


@torch.no_grad()
def answered_by_hand(prompted: PromptedModel, task: str | None, row: list[int], new: int = NEW) -> list[int]:
    """The same of an encoder-decoder, whose encoder reads the prompt."""
    written = [prompted.config.decoder_start_token_id]
    for _ in range(new):
        logits = prompted.base(inputs_embeds=joined(prompted, task, row), decoder_input_ids=torch.tensor([written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written[1:]


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "neox", "falcon-rw-1b", "llama", "mistral"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_cached_uncached_and_step_by_step_are_the_same(side: str, name: str, use_cache: bool) -> None:
    """T3, T5, T6: the prompt goes in once, with an empty cache too, and the mask is longer in every step; rows padded on the left, tasks mixed."""
    prompted, tasks = with_tasks(model(side, name)), ["a", None, "c"]
    expected = [by_hand(prompted, task, row) for task, row in zip(tasks, ROWS, strict=True)]
    with per_sample(prompted, tasks):
        assert generate(prompted, ROWS, max_new_tokens=NEW, use_cache=use_cache).ids == expected
        if side == "ours":
            assert prompted.generate(ROWS, max_new_tokens=NEW, use_cache=use_cache).ids == expected
            return
        ids, mask = padded(ROWS, "left")
        found = prompted.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **GREEDY)
    assert found[:, ids.shape[1] :].tolist() == expected
    assert torch.equal(found[:, : ids.shape[1]], ids)  # T8: the caller's ids are in the result, as without a prompt
    assert name == "mistral" or expected != [by_hand(prompted, None, row) for row in ROWS]  # whose window leaves the prompt behind


@on_both_sides
@pytest.mark.parametrize("settings", [{"method": "p-tuning"}, {"method": "prefix", "prefix_projection": True}], ids=["rows", "prefix"])
def test_a_network_makes_its_prompt_once_for_a_text(side: str, settings: dict[str, Any]) -> None:
    """The steps behind the first find it in the cache; of a large prefix's network each would be 10^9 weights."""
    prompted = randomised(inject(model(side, "llama"), 4, init="random", encoder_hidden_size=8, **settings), std=0.2)
    makes = prompted.prompt()
    calls: list[int] = []
    handle = makes.register_forward_hook(lambda *_: calls.append(1))
    found = generate(prompted, ROWS[:1], max_new_tokens=NEW).ids
    handle.remove()
    assert len(calls) == 1
    assert found == generate(prompted, ROWS[:1], max_new_tokens=NEW, use_cache=False).ids


@pytest.mark.parametrize(("settings", "most"), [({"method": "p-tuning"}, 1), ({"method": "prefix", "prefix_projection": True}, 2)],
                         ids=["rows", "prefix"])  # fmt: skip
def test_an_encoder_decoders_network_makes_its_prompt_for_each_half_at_most(settings: dict[str, Any], most: int) -> None:
    prompted = randomised(inject(model("ours", "t5"), 4, init="random", encoder_hidden_size=8, **settings), std=0.2)
    calls: list[int] = []
    handle = prompted.prompt().register_forward_hook(lambda *_: calls.append(1))
    found = generate(prompted, ROWS[:1], max_new_tokens=NEW, stop_ids=[]).ids
    handle.remove()
    assert len(calls) <= most and len(found[0]) == NEW
    assert found == generate(prompted, ROWS[:1], max_new_tokens=NEW, stop_ids=[], use_cache=False).ids


@on_both_sides
def test_an_encoder_decoder_answers_with_its_prompt(side: str) -> None:
    """T12: the decoder sees P positions more; T5: transformers encodes apart from the forward that the prompt goes into."""
    prompted, tasks = with_tasks(both("t5-deep-encoder")[side]), ["a", None, "c"]
    expected = [answered_by_hand(prompted, task, row) for task, row in zip(tasks, ROWS, strict=True)]
    ids, mask = padded(ROWS, "right")
    with per_sample(prompted, tasks):
        for use_cache in (True, False):
            assert generate(prompted, ROWS, max_new_tokens=NEW, use_cache=use_cache, stop_ids=[]).ids == expected
        if side == "theirs":
            for masks in ({"attention_mask": mask}, {}):  # transformers finds padding by its id
                found = prompted.generate(input_ids=ids, **masks, **GREEDY)
                assert found[:, 1:].tolist() == expected
    assert expected != [answered_by_hand(prompted, None, row) for row in ROWS]


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-deep-encoder"])
def test_tasks_of_every_method_generate_in_one_batch(side: str, name: str) -> None:
    """T7, T9, T17, T18, T25: rows of a prompt, a prefix, none, an MLP's and a residual one, of different lengths, equal to each alone."""
    base = both(name)[side]
    prompted: Any = inject(base, 3, init="random", task="prompt")
    for task, method, length in (("prefix", "prefix", 4), ("mlp", "p-tuning", 2), ("residual", "residual", 5), ("other", "prefix", 1)):
        inject(prompted, length, method=method, init="random", task=task)
    randomised(prompted)
    tasks, rows = ["prefix", "mlp", None, "prompt", "residual", "other"], [*ROWS, *ROWS]
    single = []
    for task, row in zip(tasks, rows, strict=True):
        single += generate(use(prompted, task), [row], max_new_tokens=NEW, stop_ids=[]).ids
    for use_cache in (True, False):
        with per_sample(prompted, tasks):
            assert generate(prompted, rows, max_new_tokens=NEW, use_cache=use_cache, stop_ids=[]).ids == single
    for task in ("mlp", "residual", "prompt"):
        at = tasks.index(task)
        assert single[at] == (answered_by_hand if name.startswith("t5") else by_hand)(prompted, task, rows[at])
    ids, mask = padded(rows, "right" if name.startswith("t5") else "left")
    if side == "theirs":
        with per_sample(prompted, tasks):
            found = prompted.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert found[:, -NEW:].tolist() == single
    assert len({tuple(each) for each in single}) == 6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_greedy_text_is_pefts_where_peft_is_right(name: str) -> None:
    """Without padding: its left-padded batches differ from rows run alone (T3)."""
    base = both(name)["theirs"]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    prompted = inject(base, 5, init=theirs.prompt_encoder["default"].embedding.weight.detach())
    prompted.tasks.double()
    ids = torch.tensor([ROWS[0]])
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(prompted.generate(input_ids=ids, **GREEDY), expected)
    left, mask = padded(ROWS, "left")
    alone = [by_hand(prompted, "default", row) for row in ROWS]
    assert prompted.generate(input_ids=left, attention_mask=mask, **GREEDY)[:, 7:].tolist() == alone
    assert theirs.generate(input_ids=left, attention_mask=mask, **GREEDY)[:, 7:].tolist() != alone


def test_beams_sampling_and_penalties_are_those_of_prompt_and_text() -> None:
    """Each name stands for the beams of its row; what generate knows of the text it knows as without a prompt."""
    prompted = with_tasks(model("theirs", "llama"), {"a": 5, "b": 3})
    rows, tasks = [ROWS[0], ROWS[2]], ["a", "b"]
    ids, mask = padded(rows, "left")
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}):
        settings = {**GREEDY, **options}
        with per_sample(prompted, tasks):
            together = prompted.generate(input_ids=ids, attention_mask=mask, **settings)[:, 7:]
        own_row = [use(prompted, task).generate(input_ids=torch.tensor([row]), **settings) for task, row in zip(tasks, rows, strict=True)]
        apart = [found[:, len(row) :] for found, row in zip(own_row, rows, strict=True)]
        assert torch.equal(together, torch.cat(apart)), options
        if "num_beams" in options:  # the same search over embeddings by hand
            own = prompted.base.generate(inputs_embeds=joined(prompted, "a", rows[0]), **settings)
            assert torch.equal(apart[0], own)
    assert len(set(together[0].tolist())) == NEW and not set(together[0].tolist()) & set(rows[0])
    torch.manual_seed(0)
    sampled = use(prompted, "a").generate(input_ids=ids[:1], **{**GREEDY, "do_sample": True, "top_k": 5})
    torch.manual_seed(0)
    own = prompted.base.generate(inputs_embeds=joined(prompted, "a", rows[0]), **{**GREEDY, "do_sample": True, "top_k": 5})
    assert torch.equal(sampled[:, 7:], own)


@on_both_sides
def test_tokens_stream_as_they_come(side: str) -> None:
    prompted = with_tasks(model(side, "llama"), {"a": 5})
    expected, seen = by_hand(prompted, "a", ROWS[0]), []
    generate(prompted, [ROWS[0]], max_new_tokens=NEW, on_token=lambda row, token, text: seen.append(token))
    assert seen == expected
    if side == "theirs":

        class Streamer(transformers.generation.streamers.BaseStreamer):
            def put(self, value: torch.Tensor) -> None:
                streamed.extend(value.flatten().tolist())

            def end(self) -> None:
                streamed.append("end")

        streamed: list[Any] = []
        prompted.generate(input_ids=torch.tensor([ROWS[0]]), streamer=Streamer(), **GREEDY)
        assert streamed == [*ROWS[0], *expected, "end"]


@on_both_sides
def test_a_cache_that_comes_back_has_the_prompt_in_it(side: str) -> None:
    """T8: a second turn goes on from it, with masks and positions of the text alone, or none."""
    prompted = with_tasks(model(side, "llama"))
    first, second = torch.tensor([ROWS[0], ROWS[0]]), torch.tensor([[4, 9], [30, 5]])
    for tasks, masked in ((["a", "a"], False), (["a", None], False), (["a", "c"], True)):
        masks = [{"attention_mask": torch.ones(2, length, dtype=torch.long)} for length in (7, 9)] if masked else [{}, {}]
        with torch.no_grad(), per_sample(prompted, tasks):
            whole = prompted(input_ids=torch.cat((first, second), 1)).logits[:, 7:]
            cache = prompted(input_ids=first, use_cache=True, **masks[0]).past_key_values
            again = prompted(input_ids=second, past_key_values=cache, use_cache=True, **masks[1]).logits
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), pytest.raises(LoraLabError, match="past_key_values has 1 positions, the prompt alone 7"):
        cache = use(prompted, None)(input_ids=first[:, :1], use_cache=True).past_key_values
        use(prompted, "c")(input_ids=second, past_key_values=cache)


@on_both_sides
def test_the_prompt_behind_the_first_token_generates_the_same(side: str) -> None:
    prompted = with_tasks(with_tasks(model(side, "llama"), {"a": 5}, placement="after-bos"), {"c": 7})
    tasks = ["a", "c", None]
    expected = [by_hand(prompted, task, row, after=1 if task == "a" else 0) for task, row in zip(tasks, ROWS, strict=True)]
    with per_sample(prompted, tasks):
        assert generate(prompted, ROWS, max_new_tokens=NEW).ids == expected


def test_generation_leaves_modes_and_hooks_as_they_were() -> None:
    prompted = with_tasks(model("theirs", "gpt2"), {"a": 5}).train()
    prompted.generate(input_ids=torch.tensor([ROWS[0]]), **GREEDY)
    generate(prompted, [ROWS[0]], max_new_tokens=2)
    assert prompted.training and not prompted.base.training
    assert not prompted.base._forward_hooks and not prompted.base._forward_pre_hooks
    plain = [each.generate(input_ids=torch.tensor([ROWS[0]]), **GREEDY) for each in (use(prompted, None), prompted.base)]
    assert torch.equal(*plain)


def test_a_prompt_that_leaves_too_little_room_is_told_before_anything_runs() -> None:
    """T28: GPT-2's 48 positions hold prompt, text and what is to come. Our loop gives each row what room it has, as without a prompt."""
    prompted = with_tasks(model("theirs", "gpt2"), {"a": 30})
    assert rows_of(prompted, "a").shape == (30, 32)
    message = r"30 virtual tokens, a text of 7 and max_new_tokens=12 are 49 positions, the model's context is 48: .* by 1"
    with pytest.raises(LoraLabError, match=message):
        prompted.generate(input_ids=torch.tensor([ROWS[0]]), **{**GREEDY, "max_new_tokens": 12})
    assert prompted.generate(input_ids=torch.tensor([ROWS[0]]), **{**GREEDY, "max_new_tokens": 11}).shape == (1, 18)
    assert len(generate(prompted, [ROWS[0]], max_new_tokens=50).ids[0]) == 11
    with pytest.raises(LoraLabError, match="a prompt has 18 tokens, the model's context is 18"):
        generate(prompted, [[5] * 18])


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens with a prompt: it would cut"),
    ({"past_key_values": "filled"}, "past_key_values that are not empty"),
    ({"cache_implementation": "static"}, "cache_implementation='static' with a prompt: it makes room for the text alone; leave it out"),
    ({"generation_config": {"prompt_lookup_num_tokens": 3}}, "prompt_lookup_num_tokens with a prompt: it would cut"),
    ({"generation_config": {"cache_implementation": "static"}}, "cache_implementation='static'"),
    ({"max_new_tokens": None, "max_length": 60}, "5 virtual tokens, a text of 7 and max_new_tokens=53 are 65 positions, the model's context is 64"),
    ({"input_ids": torch.tensor(ROWS[0])}, r"input_ids is torch.int64 \[7\], expected \[B, T\] of whole numbers"),
])  # fmt: skip
def test_ways_that_would_lose_the_prompt_are_refused(options: dict[str, Any], message: str) -> None:
    prompted, ids = with_tasks(model("theirs", "llama"), {"a": 5}), torch.tensor([ROWS[0]])
    if "past_key_values" in options:
        options = {"past_key_values": prompted(input_ids=ids, use_cache=True).past_key_values}
    if "generation_config" in options:
        options = {"generation_config": transformers.GenerationConfig(**options["generation_config"])}
    with pytest.raises(LoraLabError, match=message):
        prompted.generate(**{"input_ids": ids, **GREEDY, **options})


def test_the_models_own_settings_count_like_the_calls() -> None:
    prompted = with_tasks(model("theirs", "llama"), {"a": 5})
    prompted.base.generation_config.cache_implementation = "static"
    with pytest.raises(LoraLabError, match="cache_implementation='static' with a prompt"):
        prompted.generate(input_ids=torch.tensor([ROWS[0]]), **GREEDY)
    assert prompted.generate(input_ids=torch.tensor([ROWS[0]]), **GREEDY, cache_implementation="dynamic").shape == (1, 7 + NEW)


def test_models_that_write_nothing_are_told() -> None:
    for side in ("ours", "theirs"):
        prompted = inject(both("BertForSequenceClassification", torch.float32)[side], 3)
        with pytest.raises(LoraLabError, match="a BertForSequenceClassification reads text and writes none"):
            prompted.generate([[5, 6]])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_an_encoder_decoders_beams_are_the_same_without_a_cache(method: str) -> None:
    """The cache that a prefix comes in is not given back: transformers refuses to reorder it (trap T7)."""
    prompted = inject(model("theirs", "t5-deep-encoder"), 4, method=method, init="random", seed=1)
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([ROWS[0], ROWS[0][::-1]])
    cached, again = (prompted.generate(input_ids=ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached, again)
