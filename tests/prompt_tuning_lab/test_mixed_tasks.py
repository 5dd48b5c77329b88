"""Many tasks on one frozen model: rows of different tasks in one batch, and several tasks asked about every row.

Trap numbers are those of the project's reference on prompt tuning.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from prefix_tools import both, model
from prompt_tools import EXACT, ROUNDED, ROWS, alone, padded, randomised, with_tasks
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab.errors import LoraLabError
from prompt_tuning_lab import eject, ensemble, inject, per_sample, remove, use

on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
words, mask = padded(ROWS, "right")


def every_method(base: Any) -> Any:
    """Tasks of all methods and of different lengths, random, all of them trainable."""
    prompted = base
    for task, method, length in (("rows", "prompt", 3), ("keys", "prefix", 4), ("mlp", "p-tuning", 2), ("residual", "residual", 5),
                                 ("few", "prefix", 1)):  # fmt: skip
        prompted = inject(prompted, length, method=method, init="random", task=task)
    randomised(prompted).tasks.requires_grad_(True)
    return prompted


# Rows of different tasks --------------------------------------------------------------------------------------------------------


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "BertModel"])
@pytest.mark.parametrize("training", [False, True])
def test_every_method_in_one_batch_equals_rows_run_alone(side: str, name: str, training: bool) -> None:
    """T17, T18: PEFT ignores adapter_names for prompts. Values and gradients, of 5, 4, 3, 2, 1 and no virtual tokens."""
    prompted = every_method(both(name)[side]).train(training)
    tasks, rows = ["keys", "rows", None, "residual", "few", "mlp"], [*ROWS, *ROWS]
    ids, given = padded(rows, "right")
    target = torch.tensor([[7, 8, 1]]).expand(6, -1)
    tolerance = ROUNDED if name in ("llama", "t5") and side == "theirs" else EXACT

    def answers(ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        out = prompted(input_ids=ids, attention_mask=given, **({"decoder_input_ids": target[: len(ids)]} if name == "t5" else {}))
        return out.last_hidden_state if name == "BertModel" else out.logits

    def loss(found: torch.Tensor) -> torch.Tensor:
        return (found * torch.linspace(-1, 1, found.shape[-1])).sum()

    with per_sample(prompted, tasks):
        together = answers(ids, given)
    lengths = [3 if name == "t5" else len(row) for row in rows]
    kept = [found[:length] for found, length in zip(together, lengths, strict=True)]
    slopes = gradients(prompted, sum(loss(each) for each in kept))
    apart = []
    for task, row in zip(tasks, rows, strict=True):
        use(prompted, task)
        apart.append(answers(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)))
    for found, expected in zip(kept, apart, strict=True):
        assert_close(found, expected[0], **tolerance)
    for task, slope in gradients(prompted, sum(loss(each) for each in apart)).items():
        assert_close(slopes[task], slope, rtol=1e-6, atol=1e-6 if tolerance is EXACT else 1e-3)
    assert len(slopes) == len(list(prompted.tasks.parameters()))


def gradients(prompted: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    prompted.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in prompted.tasks.named_parameters() if p.grad is not None}


@on_both_sides
def test_the_loss_of_a_mixed_batch_is_the_mean_over_its_labels(side: str) -> None:
    """Labels of a row without a prompt are as many as alone, its first token's not among them; a prompt's rows have one more."""
    prompted = with_tasks(model(side, "llama"))
    labels = words.masked_fill(mask == 0, -100)
    with torch.no_grad(), per_sample(prompted, ["a", None, "c"]):
        loss = prompted(input_ids=words, attention_mask=mask, labels=labels).loss
    total = count = 0.0
    for task, row in zip(["a", None, "c"], ROWS, strict=True):
        with torch.no_grad():
            out = use(prompted, task)(input_ids=torch.tensor([row]), labels=torch.tensor([row]))
        total, count = total + float(out.loss) * (len(row) - (task is None)), count + len(row) - (task is None)
    assert float(loss) == pytest.approx(total / count, rel=1e-6)


@on_both_sides
def test_k_rows_to_a_name_are_successive(side: str) -> None:
    prompted = with_tasks(model(side, "llama"))
    with torch.no_grad(), per_sample(prompted, ["a", None]):
        doubled = prompted(input_ids=torch.tensor([ROWS[0]] * 4)).logits
    for index, task in enumerate(["a", "a", None, None]):
        assert_close(doubled[index], alone(prompted, task, ROWS[0]), **(EXACT if side == "ours" else ROUNDED))


def test_a_block_inside_a_block_and_an_error_leave_the_selection_as_it_was() -> None:
    prompted = with_tasks(model("ours", "llama"))
    with pytest.raises(RuntimeError, match="inside"), per_sample(prompted, ["a"]):
        with per_sample(prompted, ["b", None]):
            assert prompted.rows == ("b", None) and prompted.virtual_tokens == 2
        assert prompted.rows == ("a",)
        raise RuntimeError("inside")
    assert prompted.rows is None and prompted.active == "c"
    assert use(prompted, "a") is prompted and [name for name, p in prompted.named_parameters() if p.requires_grad] == ["tasks.c.weight"]


def test_gradients_may_be_asked_for_after_the_block() -> None:
    """What is inserted is decided when the forward pass begins: a recompute outside the block sees the same."""
    prompted = with_tasks(model("ours", "llama")).train()
    prompted.tasks.requires_grad_(True)
    slopes = []
    for checkpointing in (False, True):
        prompted.base.gradient_checkpointing_enable(checkpointing)
        with per_sample(prompted, ["a", None, "c"]):
            loss = prompted(input_ids=words, attention_mask=mask, labels=words).loss
        use(prompted, None)
        slopes.append(gradients(prompted, loss))
    assert slopes[0].keys() == {"a.weight", "c.weight"} == slopes[1].keys()
    for name, slope in slopes[0].items():
        assert_close(slopes[1][name], slope, **EXACT)


# Ensembles ----------------------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_one_batch_and_the_mean_or_vote_of_its_members() -> None:
    """Lester et al. 2021, section 6: five prompts and one copy of the model, by majority vote."""
    prompted = with_tasks(both("BertForSequenceClassification")["ours"], dict.fromkeys("abcde", 3))
    calls = []
    handle = prompted.register_forward_pre_hook(lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    mean = ensemble(prompted, list("abcde"), input_ids=words, attention_mask=mask)
    vote = ensemble(prompted, list("abcde"), combine="vote", input_ids=words, attention_mask=mask)
    handle.remove()
    assert calls == [15, 15] and prompted.rows is None
    with torch.no_grad():
        own = torch.stack([use(prompted, task)(input_ids=words, attention_mask=mask).logits for task in "abcde"])
    assert_close(mean.members, own, **EXACT)
    assert_close(mean.logits, own.log_softmax(-1).mean(0), **EXACT)
    assert torch.equal(mean.predictions, mean.logits.argmax(-1))
    votes = own.argmax(-1).T.tolist()
    assert vote.logits.tolist() == [[row.count(label) for label in range(3)] for row in votes]
    assert all(row.count(label) == max(map(row.count, row)) for row, label in zip(votes, vote.predictions.tolist(), strict=True))


def test_of_equally_many_votes_the_mean_decides() -> None:
    class Told(nn.Module):
        """A model whose logits are its embeddings."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 3)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embed

        def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
            return type("Output", (), {"logits": inputs_embeds[:, 0]})()

    prompted: Any = Told()
    for task, logits in (("a", [2.0, 0.0, 1.9]), ("b", [0.0, 9.0, 0.0])):
        prompted = inject(prompted, 1, init=torch.tensor([logits]), task=task)
    found = ensemble(prompted, ["a", "b"], combine="vote", input_ids=torch.tensor([[1]]))
    assert found.logits.tolist() == [[1.0, 1.0, 0.0]] and found.predictions.tolist() == [1]


@on_both_sides
def test_a_language_model_s_ensemble_has_the_texts_positions(side: str) -> None:
    prompted = every_method(model(side, "llama"))
    found = ensemble(prompted, ["keys", "rows", "mlp"], input_ids=words, attention_mask=mask)
    assert found.logits.shape == (3, 7, 64) and found.members.shape == (3, 3, 7, 64) and found.predictions.shape == (3, 7)
    assert_close(found.members[1, 2, :4], alone(prompted, "rows", ROWS[2]).detach(), **(EXACT if side == "ours" else ROUNDED))


# Bad input ----------------------------------------------------------------------------------------------------------------------


def test_bad_requests_are_told_before_anything_runs() -> None:
    prompted = with_tasks(model("ours", "llama"))
    cases: list[tuple[Any, str]] = [
        (lambda: use(prompted, "d"), r"use\('d'\): this model has the tasks \['a', 'b', 'c'\]"),
        (lambda: per_sample(prompted, ["a", "bb"]).__enter__(), r"this model has the tasks .* \(did you mean 'b'\?\)"),
        (lambda: per_sample(prompted, "a").__enter__(), r"per_sample\('a'\): expected a list"),
        (lambda: per_sample(prompted, []).__enter__(), "expected a list"),
        (lambda: use(prompted.base, "a"), "use: expected a prompted model, from inject or load, not a LlamaForCausalLM"),
        (lambda: ensemble(prompted, [], input_ids=words), "at least one task"),
        (lambda: ensemble(prompted, ["a"], combine="max", input_ids=words), "combine='max': expected one of mean, vote"),
        (lambda: ensemble(prompted, ["a"], input_ids=words, labels=words), "ensemble with labels"),
        (lambda: ensemble(prompted, ["a"], input_ids=words, past_key_values=()), "ensemble with past_key_values: .*ensembling.Ensembled"),
        (lambda: ensemble(prompted, ["a"], encoder_outputs=(words,)), "ensemble with encoder_outputs: .*give input_ids"),
        (lambda: ensemble(prompted, ["a"]), "expected tensors with the batch first"),
    ]
    for ask, message in cases:
        with pytest.raises(LoraLabError, match=message):
            ask()
    with per_sample(prompted, ["a", "b"]), pytest.raises(LoraLabError, match="per_sample with 2 names, but the batch has 3 rows"):
        prompted(input_ids=words)


# Out again ----------------------------------------------------------------------------------------------------------------------


@on_both_sides
def test_one_task_is_taken_out_and_the_others_answer_as_before(side: str) -> None:
    prompted = with_tasks(model(side, "llama", torch.float32))
    use(prompted, "a")
    before = prompted(input_ids=words, attention_mask=mask).logits
    assert remove(prompted, "b") is prompted and sorted(prompted.tasks) == ["a", "c"]
    assert torch.equal(prompted(input_ids=words, attention_mask=mask).logits, before)
    remove(prompted, "a")
    assert prompted.active is None
    assert torch.equal(prompted(input_ids=words, attention_mask=mask).logits, prompted.base(input_ids=words, attention_mask=mask).logits)
    with pytest.raises(LoraLabError, match=r"remove\('a'\): this model has the tasks \['c'\]"):
        remove(prompted, "a")
    with per_sample(prompted, ["c", None, "c"]), pytest.raises(LoraLabError, match=r"remove\('c'\) inside per_sample"):
        remove(prompted, "c")


@on_both_sides
def test_the_base_comes_back_as_it_was(side: str) -> None:
    """Trainable where it was trainable, in training if it was in training."""
    base = model(side, "llama", torch.float32).train()
    frozen = base.get_input_embeddings().weight.requires_grad_(False)
    prompted = inject(inject(base, 3), 2, task="more")
    assert not base.training and not any(parameter.requires_grad for parameter in base.parameters())
    lora_lab.inject(prompted, 2)
    with pytest.raises(LoraLabError, match="LoRA layers, too.*lora_lab.eject"):
        eject(prompted)
    lora_lab.eject(prompted)
    assert eject(prompted) is base and base.training
    assert [parameter for parameter in base.parameters() if not parameter.requires_grad] == [frozen]


def test_nothing_of_the_base_is_held_that_the_base_has_given_up() -> None:
    """quantize takes the weights out, fully_shard divides them: a list of them would keep them all in memory."""
    prompted = inject(model("ours", "llama", torch.float32), 3)
    weights = [weakref.ref(parameter) for name, parameter in prompted.base.named_parameters() if name.endswith("_proj.weight")]
    lora_lab.quantize(prompted, "nf4")
    gc.collect()
    assert weights and not any(weight() is not None for weight in weights)


def test_what_was_frozen_at_first_is_frozen_again() -> None:
    base = model("ours", "llama", torch.float32).requires_grad_(False)
    prompted = inject(base, 3)
    base.get_input_embeddings().weight.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in eject(prompted).parameters())
