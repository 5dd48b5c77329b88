"""The four precisions: each learns, each puts back what it found, and adapters are float32 in all of them."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from safetensors.torch import load_file
from tiny_workshop import QUIET, our_llama, same_bits, their_gpt2, their_llama, token_rows, weights

import lora_lab
from lora_lab.training import TrainConfig, evaluate, fastest_precision, fit
from lora_lab.training.precision import PRECISIONS, Precision

MIXED = ("bf16-mixed", "fp16-mixed")


def state(model):
    """Everything `fit` may switch for a run and has to switch back."""
    return (
        {name: (p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
    )


class Seen:
    """The dtypes of weights and activations during the run, from the inside."""

    def __init__(self, model):
        self.weights, self.outputs, self.model = {}, set(), model
        model.register_forward_pre_hook(lambda *_: self.weights.update({name: p.dtype for name, p in model.named_parameters()}))
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "c_attn")):
                module.register_forward_hook(lambda module, inputs, output: self.outputs.add(output.dtype))

    def dtypes(self, part):
        return {dtype for name, dtype in self.weights.items() if part in name}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [our_llama, their_llama, their_gpt2])
def test_lora_learns_over_a_base_that_stays_bit_for_bit(make, precision):
    model = lora_lab.inject(make(), rank=4)
    before, kept = weights(model), state(model)
    result = fit(model, token_rows(8), {"max_steps": 20, "learning_rate": 0.03, "precision": precision, **QUIET}, eval_data=token_rows(8))
    after = weights(model)
    assert result.eval_losses[-1] < result.eval_losses[0] - 0.3
    assert result.skipped_steps == 0
    for name in before:
        assert torch.equal(after[name], before[name]) == (".lora_" not in name)
    assert state(model) == kept


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_fine_tuning_learns(precision):
    model = our_llama()
    kept = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16: see below
        result = fit(model, token_rows(8), {"max_steps": 25, "learning_rate": 0.02, "precision": precision, **QUIET})
    assert result.losses[-1] < result.losses[0] - 1
    assert state(model) == kept


@pytest.mark.parametrize(
    ("precision", "frozen", "trained", "computed"),
    [("fp32", torch.float32, torch.float32, torch.float32), ("bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
     ("bf16-mixed", torch.bfloat16, torch.float32, torch.bfloat16), ("fp16-mixed", torch.float16, torch.float32, torch.float16)],
)  # fmt: skip
def test_weights_are_stored_and_multiplied_as_the_table_says(precision, frozen, trained, computed):
    model = lora_lab.inject(our_llama(), rank=2)
    for p in model.model.layers[0].mlp.parameters():
        p.requires_grad_(p.ndim == 2 and p.shape != (2, 16))  # some of the base trains, too
    seen = Seen(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, token_rows(2), {"max_steps": 1, "precision": precision, **QUIET})
    assert seen.dtypes(".lora_") == {torch.float32}
    assert seen.dtypes("layers.0.mlp.down_proj.weight") == {trained}
    assert seen.dtypes("embed_tokens") == seen.dtypes("norm") == {frozen}
    assert seen.outputs == {computed}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_made_in_16_bit_train_in_float32_and_come_back_in_theirs(precision):
    model = lora_lab.inject(our_llama(), rank=2, dtype=torch.bfloat16)
    kept, seen = state(model), Seen(model)
    fit(model, token_rows(2), {"max_steps": 1, "precision": precision, **QUIET})
    assert seen.dtypes(".lora_") == {torch.float32}
    assert state(model) == kept and model.model.layers[0].mlp.up_proj.lora_A["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("fails_at", [1, 3])
def test_an_exception_in_the_middle_restores_everything(precision, direction, fails_at):
    model, calls = lora_lab.inject(our_llama(), rank=2, dropout=0.1), []
    model.model.layers[1].train()  # modes need not be all alike
    model.model.norm.weight.grad = torch.ones(16)  # frozen, and somebody else's

    def interrupt(*_):
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyboardInterrupt

    first = model.model.layers[0].self_attn.q_proj.lora_B["default"]  # the last but one to get its gradient
    hook = model.register_forward_pre_hook(interrupt) if direction == "forward" else first.register_hook(interrupt)
    before, kept = weights(model), state(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, token_rows(8), {"max_steps": 5, "precision": precision, "gradient_checkpointing": True, **QUIET})
    hook.remove()
    after = weights(model)
    assert state(model) == kept
    assert same_bits({n: p for n, p in after.items() if ".lora_" not in n}, {n: p for n, p in before.items() if ".lora_" not in n})
    assert same_bits(after, before) == (fails_at == 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_tied_weights_stay_one_parameter(precision, frozen):
    model = our_llama(tie_word_embeddings=True)
    if frozen:
        lora_lab.inject(model, rank=2)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, token_rows(4), {"max_steps": 2, "learning_rate": 0.01, "precision": precision, **QUIET})
    assert model.lm_head.weight is model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before) == frozen


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_base_stored_in_another_dtype_comes_back_in_it(stored, precision):
    model = lora_lab.inject(our_llama(stored), rank=2)
    before, kept = weights(model), state(model)
    fit(model, token_rows(4), {"max_steps": 2, "precision": precision, **QUIET})
    after = weights(model)
    assert state(model) == kept
    assert all(torch.equal(after[name], before[name]) for name in before if ".lora_" not in name)


# Warnings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, precision", [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_weights_in_16_bit_learn_at_small_rates(dtype, precision):
    """AdamW's step is about the learning rate, which is below 1/256 of a weight: rounded to the nearest, nearly nothing would move."""
    model = our_llama(dtype)
    before = weights(model)
    fit(model, token_rows(4), {"max_steps": 10, "precision": precision, "learning_rate": 2e-5, "schedule": "constant", **QUIET})
    moved = torch.cat([(p.detach() - before[name]).float().flatten() for name, p in model.named_parameters() if "proj" in name])
    assert 1e-6 < float(moved.abs().mean()) < 1e-2 and float((moved != 0).float().mean()) > 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lora_does_not_warn(precision, no_warnings):
    fit(lora_lab.inject(our_llama(), rank=2), token_rows(2), {"max_steps": 1, "precision": precision, **QUIET})


@pytest.mark.parametrize("precision", ["fp32", *MIXED])
def test_full_fine_tuning_with_float32_masters_does_not_warn(precision, no_warnings):
    fit(our_llama(), token_rows(2), {"max_steps": 1, "precision": precision, **QUIET})


# Loss scaling ---------------------------------------------------------------------------------------------------------------


def scaled_from(monkeypatch, scale):
    monkeypatch.setattr(Precision, "scaler", lambda self, device, _: torch.amp.GradScaler(device.type, init_scale=scale, enabled=self.scaled))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_overflow_skips_the_step_and_changes_no_weight(optimizer, monkeypatch):
    """Micikevicius et al. 2018, section 3.2: a step whose scaled gradients overflow is left out, and the scale halved."""
    scaled_from(monkeypatch, 2.0**60)
    model = lora_lab.inject(our_llama(), rank=2, init="random")
    before = weights(model)
    config = {"max_steps": 2, "precision": "fp16-mixed", "optimizer": optimizer, "learning_rate": 0.1, "weight_decay": 0.5, **QUIET}
    with pytest.warns(UserWarning, match="all 2 steps were skipped"):
        result = fit(model, token_rows(4), config)
    assert (result.skipped_steps, result.steps, len(result.losses)) == (2, 2, 2)
    assert same_bits(weights(model), before)
    scaled_from(monkeypatch, 2.0**10)
    assert fit(model, token_rows(4), config).skipped_steps == 0
    assert not same_bits(weights(model), before)


def test_training_goes_on_after_the_skipped_steps(monkeypatch):
    scaled_from(monkeypatch, 2.0**30)
    model = lora_lab.inject(our_llama(), rank=2, init="random")
    result = fit(model, token_rows(8), {"max_steps": 40, "precision": "fp16-mixed", "learning_rate": 0.03, **QUIET})
    assert 0 < result.skipped_steps < 25
    assert result.losses[-1] < result.losses[0] - 0.3


def test_one_overflow_in_the_middle_skips_that_step_alone(tmp_path):
    model, backwards = lora_lab.inject(our_llama(), rank=2, init="random"), []

    def overflow_in_the_third(gradient):
        backwards.append(1)
        return gradient * float("inf") if len(backwards) == 3 else gradient

    next(p for p in model.parameters() if p.requires_grad).register_hook(overflow_in_the_third)
    config = {"max_steps": 5, "precision": "fp16-mixed", "save_every": 1, "keep_snapshots": 9, "output_dir": tmp_path, "schedule": "constant",
              **QUIET}  # fmt: skip
    assert fit(model, token_rows(4), config).skipped_steps == 1
    saved = [load_file(tmp_path / "snapshots" / f"step-{step:06d}" / "tensors.safetensors") for step in range(1, 6)]
    saved = [{name: tensor for name, tensor in tensors.items() if name.startswith("weights/")} for tensors in saved]
    equal = [same_bits(left, right) for left, right in itertools.pairwise(saved)]
    assert equal == [False, True, False, False]


def test_a_gradient_no_scale_helps_is_an_error_in_the_end(monkeypatch):
    """Otherwise every step is skipped to the end of the run, without a word."""
    scaled_from(monkeypatch, 4.0)
    model = lora_lab.inject(our_llama(), rank=2, init="random")
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(lora_lab.LoraLabError, match="gradient's norm is nan at step 4"):
        fit(model, token_rows(4), {"max_steps": 50, "precision": "fp16-mixed", **QUIET})


def test_gradients_are_unscaled_before_they_are_clipped(monkeypatch):
    """SGD at rate 1 then moves by the clipped norm itself, whatever the scale."""
    for scale in (2.0**6, 2.0**10):
        scaled_from(monkeypatch, scale)
        torch.manual_seed(0)
        model = lora_lab.inject(our_llama(), rank=2, init="random")
        before = weights(model)
        config = {"max_steps": 1, "precision": "fp16-mixed", "optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1, **QUIET}
        fit(model, token_rows(4), config)
        moved = sum((p.double() - before[name].double()).square().sum() for name, p in weights(model).items()).sqrt().item()
        assert moved == pytest.approx(0.1, rel=1e-3)


# Evaluation and choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluation_alone_changes_nothing(precision):
    model = lora_lab.inject(our_llama(), rank=2, init="random")
    before, kept = weights(model), state(model)
    losses = [evaluate(model, token_rows(5), TrainConfig(precision=p, progress=False)) for p in ("fp32", precision)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert same_bits(weights(model), before) and state(model) == kept


def test_16_bit_losses_are_close_to_the_float32_ones():
    """A sanity check against a base cast twice or a loss in 16 bit: within 2 %, yet not the same numbers."""
    start, losses = lora_lab.inject(our_llama(), rank=2, init="random"), {}
    for precision in PRECISIONS:
        losses[precision] = fit(copy.deepcopy(start), token_rows(8), {"max_steps": 3, "precision": precision, **QUIET}).losses
    for precision in ("bf16", *MIXED):
        assert losses[precision] == pytest.approx(losses["fp32"], rel=0.02)
        assert losses[precision] != losses["fp32"]


def test_the_fastest_precision_is_one_of_the_two_it_says():
    assert fastest_precision() in ("fp32", "bf16-mixed")


@pytest.mark.parametrize(("float32", "expected"), [(1.05, "fp32"), (1.2, "bf16-mixed"), (0.9, "fp32")])
def test_near_a_tie_the_faster_precision_is_always_the_same(monkeypatch, float32, expected):
    """Seconds of bfloat16 are 1: a hair's breadth does not decide, or the same command is another one now and then."""
    clock = iter([0.0, 1.0, 0.0, float32])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found = fastest_precision("cpu")
    monkeypatch.undo()
    assert found == expected
