"""Prefixes before causal models, ours and transformers'. Trap numbers are those of the project's reference on prompt tuning."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from prefix_tools import CAUSAL, WINDOW, Prefixed, both, generated, model, random_states, run
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lora_lab.errors import LoraLabError
from lora_lab.models.cache import KVCache
from lora_lab.models.generation import generate
from prompt_tuning_lab.prefix import Prefix, from_rows, keys_and_values, to_rows
from prompt_tuning_lab.prefix_cache import prefix_shape
from prompt_tuning_lab.prefix_insertion import cache_asked_for, insert_prefixes

SIDES = ["ours", "theirs"]
EXACT = {"rtol": 0, "atol": 1e-10}
ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
each_model = pytest.mark.parametrize(("side", "name"), [(side, name) for side in SIDES for name in CAUSAL])
on_both_sides = pytest.mark.parametrize("side", SIDES)


def padded(side: str) -> torch.Tensor:
    """Rows of 7, 5 and 4 words."""
    mask = torch.ones_like(ids)
    for row, missing in ((1, 2), (2, 3)):
        mask[row, slice(0, missing) if side == "left" else slice(7 - missing, None)] = 0
    return mask


def loss_of(out: Any, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# What a prefix is ---------------------------------------------------------------------------------------------------------------


@each_model
def test_the_prefix_of_a_text_is_the_text_in_front(side: str, name: str) -> None:
    """Li & Liang, section 7.4: a prefix of real keys and values; PEFT, initialize_kv_prefix_from_text. A window of 4 slides over both alike."""
    base, front = model(side, name), torch.tensor([5, 9, 3, 40, 22])
    with torch.no_grad():
        expected = base(input_ids=torch.cat((front.expand(3, -1), ids), 1)).logits[:, 5:]
        actual = run(base, [keys_and_values(base, front)], [0, 0, 0], input_ids=ids).logits
    assert_close(actual, expected, **EXACT)
    assert not torch.allclose(actual, base(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mistral"])
def test_logits_loss_and_gradients_are_pefts(name: str, dtype: torch.dtype) -> None:
    """The same numbers before the same model, so that files mean the same; of a prefix for 2 key heads under 4 queries, too (T25).

    The gradients are of a loss that is made here: transformers' is float32 whatever the model, and so are the norms of its Llamas, which ours
    are then compared with as in float32.
    """
    rounded = {"rtol": 1e-5, "atol": 1e-5}
    models, mask = both(name, dtype), padded("right")
    labels = ids.masked_fill(mask == 0, -100)
    theirs = peft.get_peft_model(models["theirs"], peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).to(dtype)
    rows = theirs.prompt_encoder["default"].embedding.weight
    rows.data.mul_(0.5)
    reference = theirs(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    loss_of(reference, labels).backward()
    for side, base in (("ours", models["ours"]), ("theirs", theirs.get_base_model())):
        tolerance = rounded if dtype == torch.float32 or (side == "ours" and name != "gpt2") else EXACT
        states = from_rows(rows.detach(), prefix_shape(base)).clone().requires_grad_()
        out = run(base, [states], [0, 0, 0], input_ids=ids, attention_mask=mask, labels=labels)
        assert_close(out.logits[mask.bool()], reference.logits[mask.bool()], **tolerance)
        loss_of(out, labels).backward()
        assert_close(out.loss.float(), reference.loss.float(), **rounded)
        assert_close(to_rows(states.grad), rows.grad, **tolerance)


@each_model
def test_zeros_are_not_nothing(side: str, name: str) -> None:
    """T25: a key of zeros gets its share of the softmax, so a prefix of zeros takes from the text."""
    base = model(side, name)
    empty = torch.zeros_like(random_states(base, 4))
    with torch.no_grad():
        assert not torch.allclose(run(base, [empty], [0, 0, 0], input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-3)


@on_both_sides
def test_a_window_leaves_the_prefix_behind_as_it_leaves_text(side: str) -> None:
    """Two layers that look 4 back see 6 back: from the seventh position on there is no prefix. PEFT's is the same (above)."""
    base = model(side, "mistral")
    long = torch.randint(3, 60, (1, 12))
    with torch.no_grad():
        some, others = (run(base, [random_states(base, 3, seed)], [0], input_ids=long).logits[0] for seed in (1, 2))
    changed = (some - others).abs().amax(-1) > 1e-9
    assert changed.tolist() == [index < 2 * (WINDOW - 1) for index in range(12)]


# Padding and mixed rows ---------------------------------------------------------------------------------------------------------


@each_model
def test_padding_on_either_side_changes_nothing(side: str, name: str) -> None:
    """T3: positions count text. Our windows, too, take padding between prefix and text for nothing; transformers' count columns."""
    base, which = model(side, name), [0, 0, 0]
    states = random_states(base, 4)
    for where in ["right"] if (side, name) == ("theirs", "mistral") else ["left", "right"]:
        mask = padded(where)
        with torch.no_grad():
            together = run(base, [states], which, input_ids=ids, attention_mask=mask).logits
            for row in range(3):
                keep = mask[row].bool()
                assert_close(together[row, keep], run(base, [states], [0], input_ids=ids[row : row + 1, keep]).logits[0], **EXACT)


@each_model
def test_rows_with_different_prefixes_and_none_are_as_if_alone(side: str, name: str) -> None:
    """T18: the shorter prefix is padded on the left and masked. Logits, and the gradients of each prefix."""
    base, mask = model(side, name).requires_grad_(False), padded("right")
    prefixes = [random_states(base, length, length).requires_grad_() for length in (2, 5)]
    weights = torch.randn(3, 7, base.get_input_embeddings().num_embeddings, dtype=torch.float64) * mask[:, :, None]
    which = [1, -1, 0]
    together = run(base, prefixes, torch.tensor(which), input_ids=ids, attention_mask=mask).logits
    (together * weights).sum().backward()
    gradients = [prefix.grad.clone() for prefix in prefixes]
    for prefix in prefixes:
        prefix.grad = None
    for row, index in enumerate(which):
        keep = mask[row].bool()
        alone = run(base, prefixes, [index], input_ids=ids[row : row + 1, keep]).logits
        assert_close(together[row, keep], alone[0], **EXACT)
        if index >= 0:
            (alone[0] * weights[row, keep]).sum().backward()
            assert_close(gradients[index], prefixes[index].grad, **EXACT)


@on_both_sides
def test_position_ids_are_the_texts_and_move_by_each_rows_own_length(side: str) -> None:
    base, mask = model(side, "gpt2"), padded("left")
    prefixes, which = [random_states(base, 2), random_states(base, 5)], [1, -1, 0]
    given = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        told = run(base, prefixes, which, input_ids=ids, attention_mask=mask, position_ids=given).logits
        counted = run(base, prefixes, which, input_ids=ids, attention_mask=mask).logits
    assert_close(told[mask.bool()], counted[mask.bool()], **EXACT)


def test_padding_before_the_text_under_transformers_window_is_refused() -> None:
    base = model("theirs", "mistral")
    with pytest.raises(LoraLabError, match=r"window of 4 positions in columns.*Pad on the right"):
        run(base, [random_states(base, 2)], [0, 0, 0], input_ids=ids, attention_mask=padded("left"))


# Training -----------------------------------------------------------------------------------------------------------------------


@each_model
def test_only_the_prefix_gets_gradients_and_every_number_of_it(side: str, name: str) -> None:
    base = model(side, name).requires_grad_(False)
    prefix = Prefix(random_states(base, 3)).double()
    run(base, [prefix()], [0, 0, 0], input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert (prefix.weight.grad != 0).all()


@pytest.mark.parametrize("mode", [True, 2, "attention"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "falcon-7b", "falcon-rw-1b", "llama", "mistral"])
def test_checkpointing_of_our_models_keeps_the_prefix(name: str, mode: bool | int | str) -> None:
    """T10: the recompute sees the cache as its forward saw it. PEFT refuses prefixes under checkpointing."""
    base = model("ours", name).requires_grad_(False).train()
    gradients = []
    for each in (False, mode):
        base.gradient_checkpointing_enable(each)
        prefixes = [random_states(base, length, length).requires_grad_() for length in (2, 5)]
        run(base, prefixes, [1, 0, -1], input_ids=ids, labels=ids).loss.backward()
        gradients.append([prefix.grad for prefix in prefixes])
    assert_close(*gradients, **EXACT)


def test_checkpointing_of_transformers_is_refused_with_the_way_out() -> None:
    """T10: its layers would run without the cache, and so without the prefix. Without gradients there is nothing to recompute."""
    base = model("theirs", "llama")
    base.gradient_checkpointing_enable()
    states = random_states(base, 2)
    with pytest.raises(LoraLabError, match=r"gradient_checkpointing_disable\(\).*lora_lab.models.load"):
        run(base, [states], [0, 0, 0], input_ids=ids)
    with torch.no_grad():
        run(base, [states], [0, 0, 0], input_ids=ids)


@on_both_sides
def test_a_float32_prefix_trains_before_a_16_bit_model(side: str) -> None:
    """T23: one cast, on the way in; the gradient comes back in float32."""
    base = model(side, "llama", torch.bfloat16).requires_grad_(False)
    prefix = Prefix(random_states(base, 3))
    run(base, [prefix()], [0, 0, 0], input_ids=ids, labels=ids).loss.backward()
    assert prefix.weight.dtype == prefix.weight.grad.dtype == torch.float32
    assert (prefix.weight.grad != 0).any()


@on_both_sides
def test_under_autocast_keys_and_values_are_16_bit_as_the_models_own(side: str) -> None:
    base = model(side, "llama", torch.float32).requires_grad_(False)
    prefix = Prefix(random_states(base, 3))
    with torch.autocast("cpu", torch.bfloat16):
        inserted = insert_prefixes(base, [prefix()], [0, 0, 0], {"input_ids": ids, "labels": ids})
        keys, _, *_ = next(iter(inserted["past_key_values"]))
        loss = base(**inserted).loss
    loss.backward()
    assert keys.dtype == torch.bfloat16 and prefix.weight.grad.dtype == torch.float32 and (prefix.weight.grad != 0).any()


@on_both_sides
def test_nothing_that_was_given_is_changed_and_no_cache_comes_back_unasked(side: str) -> None:
    base = model(side, "gpt2")
    states, mask = random_states(base, 3), padded("right")
    given = {"input_ids": ids.clone(), "attention_mask": mask.clone()}
    first = base(**insert_prefixes(base, [states], [0, 0, 0], given))
    assert first.past_key_values is None  # where the base gives one back all the same, `without_cache` takes it away
    assert [*given] == ["input_ids", "attention_mask"] and torch.equal(given["attention_mask"], mask) and torch.equal(given["input_ids"], ids)
    assert_close(run(base, [states], [0, 0, 0], **given).logits, first.logits, rtol=0, atol=0)
    assert run(base, [states], [0, 0, 0], **given, use_cache=True).past_key_values is not None


@on_both_sides
def test_without_any_prefix_the_inputs_are_the_same(side: str) -> None:
    base = model(side, "llama")
    given = {"input_ids": ids, "use_cache": True}
    assert insert_prefixes(base, [], [-1, -1, -1], given) == given


# Caches -------------------------------------------------------------------------------------------------------------------------


def empty_cache(side: str, base: torch.nn.Module) -> object:
    import transformers

    return KVCache(2) if side == "ours" else transformers.DynamicCache(config=base.config)


@each_model
def test_an_empty_cache_gets_the_prefix_and_grows_behind_it(side: str, name: str) -> None:
    """T5, T6: generate begins with an empty cache rather than none. The mask grows by P at every step, the prefix goes in once."""
    base, mask = model(side, name), padded("right")
    mask[:, :4] = 1
    prefixes, which = [random_states(base, 2), random_states(base, 5)], [1, -1, 0]
    with torch.no_grad():
        whole = run(base, prefixes, which, input_ids=ids, attention_mask=mask).logits
        first = run(base, prefixes, which, input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=empty_cache(side, base), use_cache=True)
        second = run(base, prefixes, which, input_ids=ids[:, 3:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat((first.logits, second.logits), 1)[mask.bool()], whole[mask.bool()], **EXACT)


def test_a_cache_that_was_made_without_the_prefix_is_refused() -> None:
    base = model("ours", "llama")
    cache = base(input_ids=ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(LoraLabError, match=r"past_key_values has 2 positions, the prefix alone 5"):
        run(base, [random_states(base, 5)], [0, 0, 0], input_ids=ids[:, 2:], past_key_values=cache)


@each_model
def test_generation_cached_is_generation_uncached_is_a_loop_by_hand(side: str, name: str) -> None:
    """T6, T9: the prefix stays at every step; rows of different lengths, padded on the left, with different prefixes."""
    base, rows = model(side, name), [ids[0].tolist(), ids[1, :5].tolist(), ids[2, :4].tolist()]
    if (side, name) == ("theirs", "mistral"):
        rows = [row[:4] for row in rows]  # no padding under its window
    prefixes, which = [random_states(base, 2, std=2.0), random_states(base, 5, std=2.0)], [1, -1, 0]
    prefixed = Prefixed(base, prefixes, which)
    cached, uncached = (generate(prefixed, rows, max_new_tokens=6, use_cache=use, stop_ids=[]).ids for use in (True, False))
    by_hand = []
    for row, index in zip(rows, which, strict=True):
        text = list(row)
        for _ in range(6):
            with torch.no_grad():
                text.append(int(run(base, prefixes, [index], input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        by_hand.append(text[len(row) :])
    assert cached == uncached == by_hand
    assert cached != generate(Prefixed(base, prefixes, [-1] * 3), rows, max_new_tokens=6, stop_ids=[]).ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mistral", "falcon-rw-1b"])
def test_transformers_generate_finds_the_prefix(name: str, options: dict[str, object]) -> None:
    """T5, T7: with and without a cache, which PEFT cannot before a Llama, and for every beam. Rows padded on the left are as if alone."""
    base = model("theirs", name)
    text, mask = (ids[:, :4], padded("left")[:, 3:].clone()) if name != "mistral" else (ids[:, :4], torch.ones(3, 4, dtype=torch.long))
    prefixes, which = [random_states(base, 2, std=2.0), random_states(base, 5, std=2.0)], [1, -1, 0]
    together = generated(base, prefixes, which, text, mask, **options)
    for row, index in enumerate(which):
        keep = mask[row].bool()
        alone = generated(base, prefixes, [index], text[row : row + 1, keep], mask[row : row + 1, keep], **options)
        assert together[row].tolist() == alone[0].tolist()
    if not options:
        ours = both(name)["ours"]
        if name != "falcon-rw-1b":
            rows = [text[row, mask[row].bool()].tolist() for row in range(3)]
            assert generate(Prefixed(ours, prefixes, which), rows, max_new_tokens=6, stop_ids=[]).ids == together.tolist()


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({"use_cache": True}, True), ({"past_key_values": 1}, True),
                                                 ({"past_key_values": 1, "use_cache": False}, False)])  # fmt: skip
def test_a_cache_is_asked_for_by_word_or_by_bringing_one(given: dict[str, object], expected: bool) -> None:
    assert cache_asked_for(given) is expected
