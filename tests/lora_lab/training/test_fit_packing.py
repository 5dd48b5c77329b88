"""Packed batches train what padded ones train: the same loss, the same gradients, the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import decoder_tools
import llama_tools
import pytest
import torch
from small_models import build
from tiny_workshop import QUIET, exact_model, forgotten, our_llama, same_bits, token_rows, weights

import lora_lab
from lora_lab import LoraLabError, data, training
from lora_lab.data.packing import collate_packed
from lora_lab.training import TrainConfig, fit
from lora_lab.training.batches import count_steps, step_batches
from lora_lab.training.loop import Run
from lora_lab.training.memory_request import request_of

ROWS = token_rows(12)
WHOLE = {"micro_batch_size": 12, "max_steps": 3, "learning_rate": 0.03, **QUIET}  # each step is on all rows, in whatever order


def gradients(model: Any, batch: data.Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_packed_is_padded(model: Any, rows: list[data.Example], tolerance: float = 1e-11) -> None:
    (loss, packed), (expected, padded) = gradients(model, collate_packed(rows)), gradients(model, data.collate(rows, 0))
    assert loss == pytest.approx(expected, rel=tolerance) and packed.keys() == padded.keys()
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()))
    assert max(float(gradient.abs().max()) for gradient in padded.values()) > 1e-3


def small(rows: list[data.Example], vocabulary: int) -> list[data.Example]:
    return [{name: [token if token < 0 else token % vocabulary for token in values] for name, values in row.items()} for row in rows]


# The gradient is the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gpt2", "neox", "falcon-7b", "falcon-40b", "falcon-rw-1b"])
def test_a_packed_batch_has_the_gradients_of_the_padded_one_in_the_other_families(shape: str) -> None:
    model = decoder_tools.ours(decoder_tools.theirs(shape)).double()
    assert_packed_is_padded(model, small(ROWS, llama_tools.VOCABULARY))


@pytest.mark.parametrize("changes", [{}, {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4}])
@pytest.mark.parametrize("method", ["full", "lora", "dora", "head"])
def test_a_packed_batch_has_the_gradients_of_the_padded_one(changes: dict[str, Any], method: str) -> None:
    """mistral: a window shorter than the rows, and each document has its own. head: an adapter on the head changes how the loss is computed."""
    torch.manual_seed(0)
    model = models_of(changes)
    if method != "full":
        targets = ["q_proj", "lm_head"] if method == "head" else "all-linear"
        lora_lab.inject(model, rank=3, init="random", target_modules=targets, variant="dora" if method == "dora" else "lora")
    assert_packed_is_padded(model, ROWS)


def models_of(changes: dict[str, Any]) -> Any:
    if not changes:
        return our_llama(torch.float64)
    from lora_lab.models.llama import MistralConfig, MistralForCausalLM

    plain = our_llama(torch.float64)
    model = MistralForCausalLM(MistralConfig.from_dict({**plain.config.source, **changes})).double()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("mode", [True, 2, "attention"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_recomputing_changes_no_gradient_of_a_packed_batch(mode: Any, variant: str) -> None:
    torch.manual_seed(0)
    model = lora_lab.inject(our_llama(torch.float64), rank=3, init="random", variant=variant)
    loss, plain = gradients(model, collate_packed(ROWS))
    model.gradient_checkpointing_enable(mode)
    again, recomputed = gradients(model, collate_packed(ROWS))
    assert model.is_gradient_checkpointing and loss == again
    torch.testing.assert_close(recomputed, plain, rtol=1e-13, atol=1e-15)  # sums in another order
    assert_packed_is_padded(model, ROWS)


def test_without_document_lengths_the_documents_would_see_each_other() -> None:
    """That the tests above can fail."""
    model, batch = exact_model(), collate_packed(ROWS)
    mixed = {name: value for name, value in batch.items() if name != "document_lengths"}
    with torch.no_grad():
        assert abs(float(model(**batch).loss) - float(model(**mixed).loss)) > 1e-2


def test_a_first_token_with_a_label_is_predicted_by_no_document_before_it() -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    assert_packed_is_padded(exact_model(), rows)


# The run is the run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 4, "grad_accum_steps": 3}, {"max_tokens": 40, "grad_accum_steps": 12},
                                      {"gradient_checkpointing": True}, {"optimizer_in_backward": True, "max_grad_norm": None}])  # fmt: skip
def test_three_packed_steps_are_three_padded_steps(settings: dict[str, Any]) -> None:
    """The rows of a step are the same, its micro-batches are not: the loss counts by token."""
    start = exact_model()
    padded, packed = copy.deepcopy(start), copy.deepcopy(start)
    plain = {name: value for name, value in settings.items() if name in ("optimizer_in_backward", "max_grad_norm")}
    expected = fit(padded, ROWS, {**WHOLE, **plain}, eval_data=ROWS[:5])
    result = fit(packed, ROWS, {**WHOLE, **settings, "packing": True}, eval_data=ROWS[:5])
    assert result.losses == pytest.approx(expected.losses, rel=1e-11) and result.eval_losses == pytest.approx(expected.eval_losses, rel=1e-11)
    now, then = weights(packed), weights(padded)
    assert max(float((now[name] - then[name]).abs().max()) for name in now) < 1e-10
    assert not same_bits(weights(start), now)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-2), ("bf16-mixed", 2e-2), ("fp16-mixed", 1e-2)])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_precision_can_be_packed(precision: str, tolerance: float, variant: str) -> None:
    losses = []
    for packing in (False, True):
        torch.manual_seed(0)
        model = lora_lab.inject(our_llama(), rank=3, init="random", variant=variant)
        losses.append(fit(model, ROWS, {**WHOLE, "precision": precision, "packing": packing}).losses)
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_the_same_seed_is_the_same_packed_run_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        model = exact_model()
        runs.append((fit(model, ROWS, {"epochs": 2, "packing": True, "max_tokens": 40, **QUIET}).losses, weights(model)))
    assert runs[0][0] == runs[1][0] and same_bits(runs[0][1], runs[1][1])


def test_nothing_is_padding() -> None:
    """Every token has a label here: the first of a document counts no more than the first of a padded row."""
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    tokens = sum(len(row["input_ids"]) for row in rows)
    for settings in ({"micro_batch_size": 5}, {"max_tokens": 30}):
        result = fit(exact_model(), rows, {"epochs": 2, "packing": True, **settings, **QUIET})
        assert (result.tokens, result.computed_tokens, result.padding_share) == (2 * tokens, 2 * tokens, 0.0)
    padded = fit(exact_model(), rows, {"epochs": 2, "micro_batch_size": 5, **QUIET})
    assert padded.tokens == 2 * tokens and padded.label_tokens == result.label_tokens and padded.padding_share > 0.0


def test_an_encoder_decoder_has_no_more_text_than_positions() -> None:
    result = fit(build("t5", torch.float32), small(ROWS, 64), {"max_steps": 2, "micro_batch_size": 6, **QUIET})
    assert 0.0 < result.padding_share < 0.7


@pytest.mark.parametrize("epochs", [1, 2, 2.5])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_an_epoch_under_max_tokens_is_a_pass_over_the_data(epochs: float, accumulated: int) -> None:
    """Packs are made anew in each, and may be one more or less."""
    rows = token_rows(60)
    config = TrainConfig(epochs=epochs, packing=True, max_tokens=40, grad_accum_steps=accumulated)
    steps, taken = step_batches(rows, config), count_steps(rows, config)
    seen = [index for _ in range(taken) for batch in next(steps) for index in batch]
    assert all(sorted(seen[at : at + 60]) == list(range(60)) for at in range(0, int(epochs) * 60, 60))
    assert len(seen) == 60 * epochs if epochs == int(epochs) else 120 < len(seen) < 180


def test_packed_rows_are_drawn_anew_in_every_epoch() -> None:
    for settings in ({"micro_batch_size": 4}, {"max_tokens": 40}):
        config = TrainConfig(packing=True, **settings)  # type: ignore[arg-type]
        steps = step_batches(ROWS, config)
        epochs = [[tuple(next(steps)[0]) for _ in range(count_steps(ROWS, config))] for _ in range(2)]
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"max_tokens": 30}])
def test_a_packed_run_that_was_stopped_goes_on_bit_for_bit(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"max_steps": 7, "packing": True, "grad_accum_steps": 2, "save_every": 2, **settings, **QUIET}
    whole, stopped, resumed = with_dropout(), with_dropout(), forgotten(with_dropout())
    expected = fit(whole, ROWS, {**config, "output_dir": tmp_path / "whole"})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Run, "backward", stopping_at(5, Run.backward))
        fit(stopped, ROWS, {**config, "output_dir": tmp_path / "parts"})
    with pytest.raises(LoraLabError, match="packing=False: the run began with True"):
        fit(with_dropout(), ROWS, {**config, "packing": False, "max_tokens": None, "output_dir": tmp_path / "parts", "resume": True})
    result = fit(resumed, ROWS, {**config, "output_dir": tmp_path / "parts", "resume": True})
    assert result.losses == expected.losses and same_bits(weights(resumed), weights(whole))


def with_dropout() -> Any:
    torch.manual_seed(1)
    return lora_lab.inject(our_llama(), rank=2, dropout=0.1, init="random")


def stopping_at(step: int, backward: Callable[..., float]) -> Callable[..., float]:
    return lambda run, *args: backward(run, *args) if run.result.steps < step else 1 / 0


# Mistakes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_a_model_that_cannot_be_packed_is_refused_and_left_alone(family: str) -> None:
    """transformers' causal models, too: most would mix the documents up, some under a mask of the whole row squared."""
    model = build(family, torch.float32)
    before = weights(model)
    for call in (fit, training.evaluate):
        with pytest.raises(LoraLabError, match="packing=True: a .* does not take document_lengths.*leave packing out"):
            call(model, ROWS, TrainConfig(packing=True, progress=False))
    assert same_bits(weights(model), before)


def test_a_row_that_is_longer_than_a_pack_is_named_before_anything_happens(tmp_path: Path) -> None:
    rows, model = data.Rows([*token_rows(3), *token_rows(1, shortest=20, longest=20)], "rows.jsonl", [1, 2, 4, 7]), exact_model()
    before = weights(model)
    with pytest.raises(LoraLabError, match=r"rows\.jsonl, line 7: the row has 20 tokens, but max_tokens=19"):
        fit(model, rows, {"max_steps": 1, "packing": True, "max_tokens": 19, "output_dir": tmp_path / "run", **QUIET})
    assert same_bits(weights(model), before) and not (tmp_path / "run").exists()
    fit(model, rows, {"max_steps": 1, "packing": True, "max_tokens": 20, **QUIET})


@pytest.mark.parametrize("settings, message", [
    ({"packing": 1}, "packing=1: expected True or False"),
    ({"max_tokens": 512}, "max_tokens=512 needs packing=True.*micro_batch_size"),
    ({"packing": True, "max_tokens": 0}, "max_tokens=0: expected a whole number of at least 1 or None"),
    ({"packing": True, "max_tokens": True}, "max_tokens=True"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraLabError, match=message):
        TrainConfig(**settings)


def test_rows_with_adapters_of_their_own_cannot_be_packed() -> None:
    """per_sample chooses by row; documents of one row would all get the first row's adapter, or none."""
    model = lora_lab.inject(exact_model(), rank=2, adapter="other", init="random")
    for names in (["default", "other"], ["other"]):
        with lora_lab.per_sample(model, names):
            with pytest.raises(LoraLabError, match="packing=True inside per_sample: adapters are chosen by row.*several documents.*lora_lab.use"):
                fit(model, ROWS, {"max_steps": 1, "packing": True, **QUIET})
            with pytest.raises(LoraLabError, match="document_lengths inside per_sample"):
                model(**collate_packed(ROWS[: len(names)]))
    assert torch.isfinite(model(**collate_packed(ROWS[:2])).loss)


def test_a_loss_that_is_not_a_number_names_the_packed_rows(tmp_path: Path) -> None:
    model = exact_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(LoraLabError, match=r"loss is nan at step 1: in rows \[\d+, \d+, \d+\].*weight 'model.norm.weight'"):
        fit(model, ROWS, {"max_steps": 2, "packing": True, "micro_batch_size": 3, **QUIET})


def test_memory_is_predicted_for_the_tokens_of_a_pack() -> None:
    """Rows of the longest length that fit: the attention within them is the most there can be."""
    request = request_of(exact_model(), TrainConfig(packing=True, max_tokens=100), [{"input_ids": [1] * 30}])
    assert (request["batch_size"], request["sequence_length"]) == (3, 30)
