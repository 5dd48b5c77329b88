"""Several tasks that write one text, in one batch."""

from __future__ import annotations

import pytest
import torch
from prefix_tools import model
from prompt_tools import ROWS, randomised, with_tasks

from lora_lab import LoraLabError
from lora_lab.models import generate
from prompt_tuning_lab import ensemble, inject, use
from prompt_tuning_lab.ensembling import Ensembled

on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])


def several(side, name):
    """Rows of two lengths and, where the model has one, a prefix."""
    prompted = with_tasks(model(side, name, torch.float32), {"a": 5, "b": 2})
    return randomised(inject(prompted, 3, method="prefix", init="random", task="c"))


def by_hand(prompted, tasks, row, steps):
    """One row, uncached: `ensemble` over everything there is so far, and its likeliest word."""
    ids = torch.tensor([row])
    for _ in range(steps):
        ids = torch.cat((ids, ensemble(prompted, tasks, input_ids=ids).predictions[:, -1:]), 1)
    return ids[0, len(row) :].tolist()


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_word_is_the_likeliest_of_the_mean(side, name):
    """Cached and padded, the same as one row at a time without either."""
    prompted, tasks = several(side, name), ["a", "b", "c"]
    written = generate(Ensembled(prompted, tasks), ROWS, max_new_tokens=6, stop_ids=[]).ids
    assert written == [by_hand(prompted, tasks, row, 6) for row in ROWS]
    alone = [generate(use(prompted, task), ROWS, max_new_tokens=6, stop_ids=[]).ids for task in tasks]
    assert written not in alone  # together they say something else than each of them


@on_both_sides
def test_an_encoder_decoder_reads_each_text_once_for_each_task(side):
    prompted = several(side, "t5")
    written = generate(Ensembled(prompted, ["a", "b", "c"]), ROWS, max_new_tokens=5, stop_ids=[])
    uncached = generate(Ensembled(prompted, ["a", "b", "c"]), ROWS, max_new_tokens=5, stop_ids=[], use_cache=False)
    assert written.ids == uncached.ids
    start = prompted.config.decoder_start_token_id
    for row, ids in zip(ROWS, written.ids, strict=True):
        for step in range(len(ids)):
            both = {"input_ids": torch.tensor([row]), "decoder_input_ids": torch.tensor([[start, *ids[:step]]])}
            assert int(ensemble(prompted, ["a", "b", "c"], **both).predictions[0, -1]) == ids[step]


def test_of_one_task_it_is_that_task():
    prompted = several("ours", "llama")
    texts = generate(Ensembled(prompted, ["b"]), ROWS, max_new_tokens=6, stop_ids=[]).ids
    assert texts == generate(use(prompted, "b"), ROWS, max_new_tokens=6, stop_ids=[]).ids


def test_the_longest_member_takes_its_part_of_the_context():
    """T28."""
    prompted = several("ours", "gpt2")
    room = prompted.config.max_position_embeddings - 5
    with pytest.raises(LoraLabError, match=f"context is {room}"):
        generate(Ensembled(prompted, ["b", "a"]), [[3] * room], max_new_tokens=1)


@torch.no_grad()
def test_votes_are_counted():
    prompted, ids = several("ours", "gpt2"), torch.tensor(ROWS[:1])
    found = ensemble(prompted, ["a", "b", "c"], "vote", input_ids=ids)
    said = found.members.argmax(-1)  # [3, 1, T]
    expected = sum(torch.nn.functional.one_hot(each, found.members.shape[-1]) for each in said)
    assert torch.equal(found.logits, expected.to(found.logits)) and (found.logits.sum(-1) == 3).all()


def test_an_unknown_task_is_refused():
    with pytest.raises(LoraLabError, match="has the tasks"):
        Ensembled(several("ours", "gpt2"), ["a", "d"])


@pytest.mark.parametrize("tasks", [[], "a", None])
def test_no_list_of_tasks_is_refused_when_it_is_made(tasks):
    with pytest.raises(LoraLabError, match="Ensembled.*: expected a list of at least one task"):
        Ensembled(several("ours", "gpt2"), tasks)


def test_a_tensor_without_rows_is_for_all_rows():
    """Among them the number of positions that have logits, which no prompted model takes as a tensor."""
    together, ids = Ensembled(several("theirs", "llama"), ["a", "b"]), torch.tensor(ROWS[:1])
    places = {"cache_position": torch.arange(ids.shape[1])}
    assert torch.equal(together(input_ids=ids, **places).logits, together(input_ids=ids).logits)
    with pytest.raises(LoraLabError, match="logits_to_keep is a tensor"):
        together(input_ids=ids, logits_to_keep=torch.tensor(1))
