"""Rows packed into one, packs under a bound of tokens, and what the report says of padding."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import build
from tiny_workshop import chat_tokenizer, our_llama, text_rows, token_rows

from lora_lab import LoraLabError, data
from lora_lab.data.objectives import CausalObjective, PackedObjective, Seq2SeqObjective, packed_objective_of
from lora_lab.data.packing import collate_packed, packs, random_batches
from lora_lab.training import TrainConfig
from lora_lab.training.batches import step_batches

LENGTHS = random.Random(3).choices(range(5, 200), k=500)


# Which rows ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120), st.integers(0, 5))
def test_every_row_is_in_exactly_one_pack_and_no_pack_is_too_full(lengths, max_tokens, seed):
    made = packs(lengths, max_tokens, random.Random(seed))
    assert sorted(index for pack in made for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= max_tokens for pack in made)


def test_packs_are_nearly_full_where_filling_one_after_the_other_leaves_room():
    """Best fit keeps a few packs open; at 256 tokens and rows of 5 to 199 the simplest way wastes a fifth."""
    one_by_one, room = 0, 0
    for index in random.Random(0).sample(range(len(LENGTHS)), len(LENGTHS)):
        if LENGTHS[index] > room:
            one_by_one, room = one_by_one + 1, 256
        room -= LENGTHS[index]
    fewest = sum(LENGTHS) / 256
    assert len(packs(LENGTHS, 256, random.Random(0))) < 1.07 * fewest < 1.2 * fewest < one_by_one


def test_packs_stay_random_and_follow_the_seed():
    first, again, other = (packs(LENGTHS, 512, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert {frozenset(pack) for pack in first}.isdisjoint({frozenset(pack) for pack in other})
    assert all(abs(sum(LENGTHS[i] for i in pack) / len(pack) - 100) < 95 for pack in first)  # no pack of long rows only, none of short ones


def test_a_row_longer_than_a_pack_is_an_error():
    with pytest.raises(LoraLabError, match="row 1: the row has 9 tokens, but max_tokens=8"):
        packs([3, 9], 8, random.Random(0))


@given(st.integers(1, 60), st.integers(1, 9))
def test_random_batches_hold_every_row_once(count, size):
    batches = random_batches(count, size, random.Random(0))
    assert sorted(index for batch in batches for index in batch) == list(range(count)) and len(batches) == math.ceil(count / size)


def test_batches_at_random_need_less_memory_than_buckets():
    """Length buckets put the longest rows together; the largest batch is what memory has to hold."""
    largest = max(sum(LENGTHS[i] for i in batch) for batch in random_batches(len(LENGTHS), 8, random.Random(0)))
    buckets = data.length_buckets(LENGTHS, 8, random.Random(0))
    assert largest < 0.9 * max(len(batch) * max(LENGTHS[i] for i in batch) for batch in buckets)


# The batch ----------------------------------------------------------------------------------------------------------------------


def test_a_packed_batch_is_the_rows_without_padding():
    rows = token_rows(5)
    batch = collate_packed(rows)
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]
    assert batch["document_lengths"] == tuple(len(row["input_ids"]) for row in rows)
    assert {type(length) for length in batch["document_lengths"]} == {int}  # no tensor: the model would have to wait for the device to read it
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_nothing_predicts_the_first_token_of_a_document():
    """The row before would be asked for it: its label is taken away, and the rows themselves stay as they are."""
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    assert collate_packed(rows)["labels"].tolist() == [[-100, 2, -100, 4, 5]]
    assert rows[1]["labels"] == [3, 4, 5]


def test_packed_and_padded_batches_count_the_same():
    rows, packed, padded = token_rows(7), PackedObjective(), CausalObjective()
    ours, theirs = packed.collate(rows, 0), padded.collate(rows, 0)
    assert packed.count(ours) == padded.count(theirs) and packed.tokens(ours) == padded.tokens(theirs)
    assert packed.positions(ours) == packed.tokens(ours) < padded.positions(theirs) == 7 * max(len(row["input_ids"]) for row in rows)


def test_an_encoder_decoder_computes_both_sides():
    batch = Seq2SeqObjective().collate([{"input_ids": [1, 2, 3], "labels": [4]}, {"input_ids": [1], "labels": [4, 5]}], 0)
    assert (Seq2SeqObjective().tokens(batch), Seq2SeqObjective().positions(batch)) == (3 + 1 + 1 + 2, 6 + 4)


def test_a_packed_batch_is_made_on_the_device():
    batch = collate_packed(token_rows(2), device="meta")
    assert batch["input_ids"].device.type == batch["labels"].device.type == "meta"


# Which models -------------------------------------------------------------------------------------------------------------------


def test_our_causal_models_can_be_packed():
    assert isinstance(packed_objective_of(our_llama()), PackedObjective)


@pytest.mark.parametrize("family, way_out", [("llama", r"load the model with lora_lab\.models\.load"), ("t5", "low"), ("bert", "low")])
def test_a_model_that_would_let_documents_see_each_other_is_refused(family, way_out):
    with pytest.raises(LoraLabError, match=rf"does not take document_lengths.*length buckets, the default.*{way_out}"):
        packed_objective_of(build(family))


# The report ---------------------------------------------------------------------------------------------------------------------


def test_the_report_is_arithmetic():
    rows = [{"input_ids": [1] * length} for length in (2, 4, 3, 1)]
    report = data.padding_report(rows, micro_batch_size=4)
    assert (report.rows, report.tokens) == (4, 10)
    for name in ("unsorted", "length buckets"):  # one batch of everything
        cost = report[name]
        assert (cost.positions, cost.largest_batch, cost.attention_pairs) == (16, 16, 64) and cost.padding_share == pytest.approx(6 / 16)
    packed = report["packed"]
    assert (packed.positions, packed.largest_batch, packed.attention_pairs, packed.padding_share) == (10, 10, 4 + 16 + 9 + 1, 0.0)


def test_the_report_is_of_the_batches_that_the_run_makes():
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in LENGTHS]
    report = data.padding_report(rows, 8, max_tokens=300, seed=4)
    for settings, name in (({}, "length buckets"), ({"packing": True, "max_tokens": 300}, "packed")):
        config, batches, seen = TrainConfig(seed=4, micro_batch_size=8, **settings), [], 0
        steps = step_batches(rows, config)
        while seen < len(rows):
            batches += next(steps)
            seen = sum(map(len, batches))
        widths = [sum(LENGTHS[i] for i in b) if name == "packed" else len(b) * max(LENGTHS[i] for i in b) for b in batches]
        assert (report[name].positions, report[name].largest_batch) == (sum(widths), max(widths))


def test_the_report_reads_text_rows_with_a_tokenizer_and_prints_a_table():
    report = data.padding_report(text_rows(), 2, tokenizer=chat_tokenizer())
    assert report.tokens == sum(len(row["input_ids"]) for row in data.encode_rows(text_rows(), chat_tokenizer()))
    lines = str(report).split("\n")
    assert lines[0].startswith("6 rows, ") and [line.split("  ")[0] for line in lines[1:]] == ["unsorted", "length buckets", "packed"]
    assert len({len(line) for line in lines}) == 1
    assert report.sentence(packing=True).startswith("padding: none, packed (in length buckets ")
    assert "packed none, and at most" in report.sentence(packing=False) and "packed" not in report.sentence(packing=False, packable=False)


def test_padding_that_a_row_brings_along_is_not_counted_as_text():
    rows = [{"input_ids": [1, 2, 0], "labels": [1, 2, -100], "attention_mask": [1, 1, 0]}]
    assert data.padding_report(rows).tokens == 2


def test_no_rows_no_report():
    with pytest.raises(LoraLabError, match="no rows"):
        data.padding_report([])
    with pytest.raises(LoraLabError, match="micro_batch_size=0"):
        data.padding_report(token_rows(2), 0)
