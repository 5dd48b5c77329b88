"""The training loop against loops written by hand, and what it must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_workshop import (
    QUIET,
    CutOff,
    chat_tokenizer,
    exact_model,
    our_llama,
    same_bits,
    text_rows,
    their_gpt2,
    their_llama,
    token_rows,
    weights,
)

import lora_lab
from lora_lab import LoraLabError
from lora_lab.data import collate
from lora_lab.data.objectives import label_tokens
from lora_lab.training import TrainConfig, evaluate, fit, snapshots
from lora_lab.training.batches import step_batches


def summed_loss(model, batch):
    """Cross-entropy summed over the labelled tokens, the textbook way: all logits, shifted."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")


def largest_difference(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


# The step is the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulated_micro_batches_equal_one_big_batch(optimizer):
    """Each micro-batch counts by its labelled tokens; an average of averages would not be the big batch's mean."""
    rows, start = token_rows(8), exact_model()
    config = {"max_steps": 1, "learning_rate": 0.1, "optimizer": optimizer, **QUIET}
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    at_once = fit(whole, rows, {**config, "micro_batch_size": 8}).losses
    in_parts = fit(parts, rows, {**config, "micro_batch_size": 3, "grad_accum_steps": 3}).losses
    assert at_once == pytest.approx(in_parts, rel=1e-13)
    assert largest_difference(weights(whole), weights(parts)) < 1e-12
    assert largest_difference(weights(whole), weights(start)) > 1e-3  # the step moved something


def test_an_average_of_averages_would_differ():
    """That the test above can fail: the naive loop's gradient is another one, because label counts are uneven."""
    rows, model = token_rows(8), exact_model()
    batches = [collate(rows[i : i + 2], 0) for i in range(0, 8, 2)]
    counts = [label_tokens(batch) for batch in batches]
    assert len(set(counts)) > 1
    trained = [p for p in model.parameters() if p.requires_grad]
    naive = torch.autograd.grad(sum(summed_loss(model, batch) / count / 4 for batch, count in zip(batches, counts, strict=True)), trained)
    right = torch.autograd.grad(sum(summed_loss(model, batch) for batch in batches) / sum(counts), trained)
    assert max(float((n - r).abs().max()) for n, r in zip(naive, right, strict=True)) > 1e-2


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_three_steps_equal_a_loop_written_by_hand(schedule):
    """Clipping, warm-up, schedule, weight decay and accumulation against torch's own parts, in float64."""
    rows, config = token_rows(11), TrainConfig(max_steps=3, micro_batch_size=2, grad_accum_steps=2, learning_rate=0.03, schedule=schedule,
                                               warmup_steps=1, weight_decay=0.1, max_grad_norm=0.5, progress=False)  # fmt: skip
    ours, reference = exact_model(), exact_model()
    result = fit(ours, rows, config)

    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1, fused=False)
    rates = {"linear": [0.03, 0.03, 0.015], "cosine": [0.03, 0.03, 0.015]}[schedule]
    norms, losses = [], []
    for rate, micro_batches in zip(rates, step_batches(rows, config), strict=False):
        batches = [collate([rows[i] for i in indices], 0) for indices in micro_batches]
        loss = sum(summed_loss(reference, batch) for batch in batches) / sum(label_tokens(batch) for batch in batches)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 0.5)))
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > 0.5  # clipping had something to do
    assert result.losses == pytest.approx(losses, rel=1e-12)
    assert largest_difference(weights(ours), weights(reference)) < 2e-12


def test_without_max_grad_norm_gradients_are_left_as_they_are():
    """SGD moves by rate times gradient; clipped to 1e-3, by rate times 1e-3."""
    moved = []
    for max_grad_norm in (None, 1e-3):
        model = exact_model()
        before = weights(model)
        fit(model, token_rows(4), {"max_steps": 1, "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": max_grad_norm, **QUIET})
        moved.append(sum((p - before[name]).square().sum() for name, p in weights(model).items()).sqrt().item())
    assert moved[1] == pytest.approx(1e-3, rel=1e-3)  # torch divides by norm + 1e-6
    assert moved[0] > 0.1


def test_a_gradient_left_by_an_earlier_backward_is_not_part_of_the_step():
    rows, clean, stained = token_rows(4), exact_model(), exact_model()
    (summed_loss(stained, collate(rows, 0)) * 100).backward()
    for model in (clean, stained):
        fit(model, rows, {"max_steps": 1, "optimizer": "sgd", "max_grad_norm": None, **QUIET})
    assert same_bits(weights(clean), weights(stained))


# What changes and what does not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [our_llama, their_llama, their_gpt2])
def test_only_what_requires_grad_changes(make):
    model = lora_lab.inject(make(), rank=2)
    before = weights(model)
    result = fit(model, token_rows(8), {"max_steps": 12, "learning_rate": 0.03, **QUIET})
    changed = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad} == {name for name in before if ".lora_" in name}
    assert all(p.grad is None for p in model.parameters())
    assert result.losses[-1] < result.losses[0]


def test_any_parameter_can_be_what_trains():
    """`fit` knows no method: here the norms train, and no adapter is anywhere."""
    model = our_llama().requires_grad_(False)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    for name in norms:
        model.get_parameter(name).requires_grad_()
    before = weights(model)
    fit(model, token_rows(4), {"max_steps": 2, **QUIET})
    assert {name for name, p in weights(model).items() if not torch.equal(p, before[name])} == norms


def test_padding_changes_no_gradient():
    """One row alone, and beside a longer one whose tokens have no weight in the comparison: the same loss on the same tokens."""
    short, long = token_rows(2, shortest=5, longest=5)[0], token_rows(1, seed=5, shortest=14, longest=14)[0]
    model = exact_model()
    alone, both = collate([short], 0), collate([short, long], 7)
    both["labels"][1] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for a, b in zip(*(torch.autograd.grad(model(**batch).loss, trained) for batch in (alone, both)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Determinism ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_the_same_seed_is_the_same_run_bit_for_bit_and_another_seed_is_another(precision):
    start = lora_lab.inject(our_llama(), rank=2, dropout=0.2)
    runs = {}
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        torch.rand(len(runs) + 1)  # whatever happened before must not matter
        model = copy.deepcopy(start)
        losses = fit(model, token_rows(10), {"max_steps": 4, "micro_batch_size": 3, "seed": seed, "precision": precision, **QUIET}).losses
        runs[name] = losses, weights(model)
    assert runs["first"][0] == runs["second"][0] and same_bits(runs["first"][1], runs["second"][1])
    assert runs["first"][0] != runs["other"][0] and not same_bits(runs["first"][1], runs["other"][1])


def test_evaluation_leaves_no_trace():
    """Neither in the weights nor in the random numbers that dropout draws."""
    rows, held_out, runs = token_rows(8), token_rows(5, seed=9), []
    for extra in ({}, {"eval_every": 1}):
        torch.manual_seed(0)
        model = lora_lab.inject(our_llama(), rank=2, dropout=0.3, init="random")
        result = fit(model, rows, {"max_steps": 3, "micro_batch_size": 2, **extra, **QUIET}, eval_data=held_out if extra else None)
        runs.append((result.losses, weights(model)))
        assert len(result.eval_losses) == (4 if extra else 0)
    assert runs[0][0] == runs[1][0] and same_bits(runs[0][1], runs[1][1])


@pytest.mark.parametrize(("make", "rounding"), [(our_llama, 1e-12), (their_gpt2, 1e-6)])  # theirs computes every loss in float32
def test_evaluation_is_the_mean_over_all_labelled_tokens_with_dropout_off(make, rounding):
    held_out = token_rows(7, seed=9)
    model = lora_lab.inject(make(torch.float64), rank=2, dropout=0.5, init="random").train()
    expected_model = copy.deepcopy(model).eval()
    batches = [collate([row], 0) for row in held_out]
    with torch.no_grad():
        expected = sum(float(summed_loss(expected_model, batch)) for batch in batches) / sum(label_tokens(batch) for batch in batches)
    modes = [module.training for module in model.modules()]
    losses = [evaluate(model, held_out, TrainConfig(micro_batch_size=size, progress=False)) for size in (1, 3, 7)]
    assert losses == pytest.approx([expected] * 3, rel=rounding)
    assert [module.training for module in model.modules()] == modes


# Steps, epochs, rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size", "accumulated", "epochs", "steps"),
    [(8, 2, 1, 1, 4), (8, 2, 2, 1, 2), (9, 2, 2, 1, 3), (9, 2, 2, 2, 6), (8, 2, 1, 0.5, 2), (8, 2, 1, 1.5, 6), (8, 2, 1, 0.01, 1), (3, 8, 1, 1, 1),
     (100, 1, 1, 1.1, 110)],
)  # fmt: skip
def test_epochs_are_passes_over_the_data(rows, size, accumulated, epochs, steps):
    model = torch.nn.Embedding(300, 2)  # counts steps quickly
    model.forward = lambda input_ids, attention_mask, labels: type("Out", (), {"loss": model.weight[input_ids].square().mean()})
    config = {"micro_batch_size": size, "grad_accum_steps": accumulated, "epochs": epochs, **QUIET}
    assert fit(model, token_rows(rows), config).steps == steps


def test_every_epoch_holds_every_row_once_in_another_order():
    rows, config = token_rows(10), TrainConfig(micro_batch_size=3, grad_accum_steps=2)
    steps = step_batches(rows, config)
    epochs = [[index for _ in range(2) for batch in next(steps) for index in batch] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_may_go_beyond_an_epoch_and_rows_may_be_fewer_than_the_batch():
    rows = token_rows(3)
    result = fit(exact_model(), rows, {"max_steps": 5, "micro_batch_size": 8, **QUIET})
    assert result.steps == len(result.losses) == 5
    assert result.tokens == 5 * sum(len(row["input_ids"]) for row in rows)


def test_token_counts_are_exact():
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9]}]
    result = fit(exact_model(), rows, {"epochs": 2, "micro_batch_size": 2, **QUIET})
    assert result.tokens == 2 * (4 + 2 + 3)
    assert result.label_tokens == 2 * (2 + 1 + 2)  # the first token of a row has nothing before it
    assert (result.steps, len(result.losses), result.skipped_steps) == (4, 4, 0)


def test_text_rows_with_a_tokenizer_are_the_encoded_rows():
    tokenizer, model = chat_tokenizer(), exact_model()
    encoded = lora_lab.data.encode_rows(text_rows(), tokenizer)
    config = {"max_steps": 2, "micro_batch_size": 4, **QUIET}
    with_text = fit(copy.deepcopy(model), text_rows(), config, tokenizer=tokenizer, eval_data=text_rows(2))
    assert with_text.losses == fit(model, encoded, config).losses
    assert len(with_text.eval_losses) == 2


def test_the_loss_is_evaluated_before_at_each_interval_and_after():
    rows, held_out = token_rows(6), token_rows(3, seed=4)
    for every, count in ((None, 2), (2, 1 + 2 + 1), (5, 2)):
        result = fit(exact_model(), rows, {"max_steps": 5, "eval_every": every, **QUIET}, eval_data=held_out)
        assert len(result.eval_losses) == count
    untouched = exact_model()
    assert result.eval_losses[0] == pytest.approx(evaluate(untouched, held_out, TrainConfig(progress=False)))
    assert result.eval_losses[0] != result.eval_losses[-1]


# Mistakes -------------------------------------------------------------------------------------------------------------------


def test_a_model_in_which_nothing_requires_grad_is_refused():
    with pytest.raises(LoraLabError, match="nothing in the model requires grad"):
        fit(our_llama().requires_grad_(False), token_rows(2), QUIET)


def test_a_rate_for_b_is_refused_where_no_b_trains():
    with pytest.raises(LoraLabError, match=r"lora_plus_ratio=16.0: no B of LoRA trains in this"):
        fit(our_llama(), token_rows(2), {"lora_plus_ratio": 16.0, **QUIET})


@pytest.mark.parametrize("max_length", [None, 1_000])
def test_a_row_longer_than_the_models_context_is_refused_whatever_max_length_says(max_length):
    rows = [*token_rows(2), *token_rows(1, shortest=65, longest=65)]
    with pytest.raises(LoraLabError, match="row 2: the row has 65 tokens, .* is 64"):
        fit(exact_model(), rows, {"max_length": max_length, **QUIET})
    with pytest.raises(LoraLabError, match="row 2: the row has 65 tokens, .* is 64"):
        fit(exact_model(), rows[:2], {"max_length": max_length, **QUIET}, eval_data=rows)


def test_max_length_refuses_rows_the_model_would_take():
    with pytest.raises(LoraLabError, match=r"the row has 12 tokens, .* is 11"):
        fit(exact_model(), token_rows(1, shortest=12, longest=12), {"max_length": 11, **QUIET})


@pytest.mark.parametrize("source, place", [("loss", "is the loss"), ("gradient", "the gradient of 'model.layers.0.self_attn.q_proj.lora_A")])
def test_a_value_that_is_not_a_number_stops_the_run_and_names_the_step(source, place, tmp_path):
    model, calls = lora_lab.inject(our_llama(), rank=2, init="random"), []
    trained = next(p for p in model.parameters() if p.requires_grad)

    def spoil(module, inputs, output):
        calls.append(1)
        if len(calls) == 3 and source == "loss":
            output.loss = output.loss * float("nan")

    model.register_forward_hook(spoil)
    trained.register_hook(lambda gradient: gradient * float("inf") if len(calls) == 3 and source == "gradient" else None)
    with pytest.raises(LoraLabError, match=rf"the {source}.* is (nan|inf) at step 3: in rows \[\d, \d\].*{place}.*learning_rate \(0.001\)"):
        fit(model, token_rows(8), {"max_steps": 5, "micro_batch_size": 2, "learning_rate": 1e-3, "save_every": 1, "output_dir": tmp_path, **QUIET})
    saved = snapshots.newest(tmp_path)
    now = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert saved.step == 2 and all(torch.isfinite(p).all() and torch.equal(p, saved.tensors[f"weights/{name}"]) for name, p in now.items())
    assert all(p.grad is None for p in model.parameters())


def test_a_lora_layer_that_ran_but_got_no_gradient_is_an_error():
    model = lora_lab.inject(CutOff(), rank=2)
    before = weights(model)
    with pytest.raises(LoraLabError, match="layer 'first' ran, but its lora_B got no gradient"):
        fit(model, token_rows(2), QUIET)
    assert same_bits(weights(model), before) and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_training_an_adapter_that_is_switched_off_is_an_error():
    model = exact_model()
    with lora_lab.disabled(model), pytest.raises(LoraLabError, match=r"depends on no weight that requires grad.*lora_lab\.use"):
        fit(model, token_rows(2), QUIET)
    fit(model, token_rows(2), {"max_steps": 1, **QUIET})


# Other tasks, and what is the caller's own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_models_with_another_task_are_refused_rather_than_trained_on_nonsense(family):
    """An encoder-decoder without its head has no answer, a tagger's labels are not the next token."""
    from small_models import build
    from transformers import BertForTokenClassification, T5Model

    model = {"t5": T5Model, "bert": BertForTokenClassification}[family](build(family, torch.float32).config)
    before = weights(model)
    with pytest.raises(LoraLabError, match="fit trains causal language models.*has another task"):
        fit(model, token_rows(), {"max_steps": 1, **QUIET})
    assert same_bits(weights(model), before)


def test_a_model_that_returns_no_loss_is_an_error_that_says_so():
    class Silent(torch.nn.Linear):
        def forward(self, input_ids, attention_mask, labels):
            return None

    with pytest.raises(LoraLabError, match="a Silent returned no .loss"):
        fit(Silent(2, 2), token_rows(), {"max_steps": 1, **QUIET})


def test_the_callers_random_numbers_go_on_as_if_there_had_been_no_training():
    model = lora_lab.inject(our_llama(), rank=2, dropout=0.5)
    state = torch.get_rng_state()
    fit(model, token_rows(), {"max_steps": 2, "seed": 9, **QUIET})
    assert torch.equal(torch.get_rng_state(), state)


def test_an_iterator_without_rows_is_an_error_and_not_an_endless_epoch():
    with pytest.raises(LoraLabError, match="no rows"):
        fit(our_llama(), iter([]), QUIET)


def test_an_id_that_is_no_word_is_found_before_the_first_step():
    """On a GPU it would be an assertion inside a kernel, after some steps."""
    rows = token_rows(8)
    rows[5] = {"input_ids": [5, 6, 600], "labels": [5, 6, 7]}
    model = lora_lab.inject(our_llama(), rank=2)
    before = weights(model)
    with pytest.raises(LoraLabError, match=r"row 5 has the id 600, the model's vocabulary ends at 259"):
        fit(model, rows, QUIET)
    assert same_bits(weights(model), before)


def test_weights_without_numbers_cannot_be_trained():
    with torch.device("meta"):
        model = our_llama()
    with pytest.raises(LoraLabError, match="is on the meta device, which holds shapes and no numbers"):
        fit(model, token_rows(2), QUIET)
