"""Prompts that a network makes while they train: its parameters, what autograd keeps of it, and the peaks of steps and whole runs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from test_memory_own_models import MODELS, bare, batch_of, config_of, training_step
from test_memory_own_prompts import kept

from lora_lab.training import TrainConfig, fit
from lora_lab.training.precision import PRECISIONS, store_in
from memory_math import MemoryMathError, compare, count_parameters, measure, predict
from memory_math.models import prompt_networks
from memory_math.time_and_cost import training_flops
from prompt_tuning_lab import ResidualPrompt, inject

VIRTUAL = 6
NETWORKS: dict[str, dict[str, Any]] = {
    "p-tuning": {"method": "p-tuning", "encoder_hidden_size": 40},
    "residual": {"method": "residual"},  # 128 hidden units
    "mlp": {"method": "prefix", "prefix_projection": True, "encoder_hidden_size": 20},
}
WIDE = {"p-tuning": 400, "residual": 600, "mlp": 200}  # hidden units of networks that outweigh the model
SMALL, SHORT = {"batch_size": 2, "sequence_length": 48, "target_length": 20}, {"batch_size": 2, "sequence_length": 16, "target_length": 12}
WORDS, AGAIN = ("fp32", "bf16", "bf16-mixed", "fp16-mixed"), (False, True, 2, "attention")
NAMES = ("llama", "qwen3", "gpt2", "pythia", "falcon-40b", "falcon-rw", "bert", "roberta, words, dropout", "t5", "mt5, dropout")
POINTS = itertools.product(NAMES, NETWORKS)
CASES = [(name, kind, WORDS[(number + number // 4) % 4], AGAIN[(number + number // 3) % 4]) for number, (name, kind) in enumerate(POINTS)]

pytestmark = pytest.mark.usefixtures("aside")


def built(name: str, kind: str, precision: str = "fp32", checkpointing: bool | int | str = False, tokens: int = VIRTUAL, **sizes: int) -> Any:
    """A prompted model with random weights, stored as the words say."""
    model = bare(name)
    prompted = inject(model, tokens, init="random", **{**NETWORKS[kind], **sizes})
    store_in(PRECISIONS[precision], prompted)
    model.gradient_checkpointing_enable(checkpointing)
    return prompted.train()


def predicted(name: str, kind: str, **request: Any) -> Any:
    asked = {**SMALL, "num_virtual_tokens": VIRTUAL, "device": "cpu", "implementation": "lora_lab", **NETWORKS[kind], **request}
    return predict(config_of(name), **asked)


@pytest.mark.parametrize(("name", "kind", "precision", "checkpointing"), CASES)
def test_what_autograd_keeps_is_predicted_to_the_byte(name: str, kind: str, precision: str, checkpointing: bool | int | str) -> None:
    """torch.autograd.graph.saved_tensors_hooks; the network's weights and what goes into it are parameters, and count as weights."""
    prompted = built(name, kind, precision, checkpointing)
    footprint = predicted(name, kind, precision=precision, gradient_checkpointing=checkpointing)
    assert kept(name, prompted, precision) == footprint.saved_bytes
    assert footprint.trained == sum(parameter.numel() for parameter in prompted.parameters() if parameter.requires_grad)
    assert footprint.weights == sum(parameter.nbytes for parameter in prompted.parameters())
    assert count_parameters(prompted).parts["adapters"] == footprint.trained


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("name", "precision", "checkpointing"), [
    ("llama", "bf16-mixed", True), ("gpt2", "fp32", False), ("bert", "bf16", False), ("t5", "bf16-mixed", False),
])  # fmt: skip
def test_the_peak_of_a_step_with_a_network_that_outweighs_the_model(
    elsewhere: int, name: str, kind: str, precision: str, checkpointing: bool
) -> None:
    """The second step: values, gradients and states of the network, what backward needs of it, and how the prompt began."""
    sizes = {"encoder_hidden_size": WIDE[kind]}
    step = training_step(name, built(name, kind, precision, checkpointing, tokens=60, **sizes), precision, **SHORT)
    step()
    real = measure(step)
    footprint = predicted(name, kind, precision=precision, gradient_checkpointing=checkpointing, num_virtual_tokens=60, **sizes, **SHORT)
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.01), compare(footprint, real)
    assert footprint.phases["load"] == pytest.approx(real.start_bytes - elsewhere, rel=0.01)
    assert footprint.optimizer_states > 8 * footprint.trained


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("name", "optimizer"), [("llama", "adamw"), ("bert", "lion"), ("t5", "adafactor")])
def test_the_peak_of_a_run_of_fit(elsewhere: int, name: str, kind: str, optimizer: str) -> None:
    """Asked with what a prompted model says of itself, its network's size among it."""
    prompted, batch = built(name, kind, "bf16-mixed", tokens=40, encoder_hidden_size=WIDE[kind]), batch_of(name, **SHORT)
    word = "label" if "Sequence" in MODELS[name][0] else "labels"
    rows = [{"input_ids": ids, word: labels} for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]
    asked = {"precision": "bf16-mixed", "optimizer": optimizer}
    real = measure(lambda: fit(prompted, rows, TrainConfig(max_steps=2, micro_batch_size=2, progress=False, **asked)))
    footprint = predict(prompted, device="cpu", **prompted.memory_request, **asked, **SHORT)
    assert (footprint.request["method"], footprint.request["encoder_hidden_size"]) == (NETWORKS[kind]["method"], WIDE[kind])
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.01), compare(footprint, real)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_the_peak_without_gradients(elsewhere: int, name: str, kind: str) -> None:
    """The network is there, and runs in each pass; `folded()` is what does without."""
    prompted, more = built(name, kind, "bf16", tokens=60, encoder_hidden_size=WIDE[kind]).eval(), {"use_cache": True, "logits_to_keep": 1}
    if name == "t5":
        more = {"use_cache": True, "decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)}

    def run() -> None:
        with torch.no_grad():
            prompted(input_ids=torch.randint(2, 1000, (4, 100)), **more)

    run()
    real = measure(run)
    asked = {"precision": "bf16", "batch_size": 4, "sequence_length": 100, "device": "cpu"}
    footprint, word = predict(prompted, method="inference", **asked), NETWORKS[kind]["method"]
    assert (footprint.request["prompt"], footprint.request["encoder_hidden_size"]) == (word, WIDE[kind])  # as the model says
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.01), compare(footprint, real)
    prompted.tasks["default"] = prompted.prompt().folded()
    plain = predict(prompted, method="inference", **asked)
    assert plain.weights == sum(parameter.nbytes for parameter in prompted.parameters()) < footprint.weights


def test_a_factored_step_keeps_rows_and_columns_of_each_matrix() -> None:
    """torch.optim.Adafactor: biases and the norm are vectors, of which it keeps each number."""
    for kind in NETWORKS:
        prompted = built("llama", kind)
        optimizer = torch.optim.Adafactor(prompted.tasks.parameters())
        prompted(**batch_of("llama", **SMALL)).loss.backward()
        optimizer.step()
        states = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
        assert predicted("llama", kind, optimizer="adafactor").optimizer_states == states


# What goes with it ----------------------------------------------------------------------------------------------------------------------


def test_sizes_that_are_left_out_are_those_of_inject() -> None:
    assert inspect.signature(ResidualPrompt).parameters["hidden_size"].default == prompt_networks.RESIDUAL_HIDDEN
    for method in ({"method": "p-tuning"}, {"method": "residual"}, {"method": "prefix", "prefix_projection": True}):
        trained = sum(parameter.numel() for parameter in inject(bare("llama"), VIRTUAL, **method).tasks.parameters())
        asked: dict[str, Any] = {**SMALL, **method, "num_virtual_tokens": VIRTUAL, "implementation": "lora_lab"}
        assert predict(config_of("llama"), **asked).trained == trained


def test_a_prompted_model_says_what_its_network_is_and_numbers_that_are_given_win() -> None:
    prompted, asked = built("bert", "mlp"), {"batch_size": 2, "sequence_length": 24, "device": "cpu"}
    own = predict(prompted, method="prefix", **asked)
    assert own.total == predicted("bert", "mlp", **asked).total and own.trained > 5000
    assert predict(prompted, method="prefix", prefix_projection=False, **asked).trained == VIRTUAL * 2 * 2 * 64
    assert predict(prompted, method="prefix", encoder_hidden_size=21, **asked).trained == own.trained + 64 + 1 + 256
    assert predict(prompted, method="prompt", **asked).trained == VIRTUAL * 64  # another kind, which its network does not make
    assert predict(prompted, method="p-tuning", **asked).request["encoder_hidden_size"] is None


def test_a_prompt_that_a_network_makes_gives_the_first_token_a_label_like_any_other() -> None:
    assert predicted("llama", "p-tuning").request["label_tokens"] == predicted("llama", "residual").request["label_tokens"] == 2 * 48
    assert predicted("llama", "mlp").request["label_tokens"] == 2 * 47


def test_operations_are_those_of_the_frozen_model() -> None:
    found = {training_flops(1e9, 1e6, method=method).model for method in ("prompt", "prefix", "p-tuning", "residual")}
    assert found == {4e15}


@pytest.mark.parametrize(("request_", "text"), [
    ({"implementation": "transformers"}, r"a prompt that a network makes \(p-tuning\) is modelled with implementation='lora_lab' only; "
                                         "what it makes is a plain one, method='prompt'"),
    ({"encoder_hidden_size": 0}, "encoder_hidden_size=0: expected a whole number of at least 1"),
    ({"method": "prefix", "prefix_projection": 1}, "prefix_projection=1: expected True or False"),
    ({"method": "residuals"}, "method='residuals' is not modelled.*residual"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(request_: dict[str, Any], text: str) -> None:
    with pytest.raises(MemoryMathError, match=text):
        predicted("gpt2", "p-tuning", **request_)


def test_sizes_of_a_network_that_is_not_there_are_told() -> None:
    def idle(kind: str, **request: Any) -> tuple[str, ...]:
        return predicted("gpt2", kind, target_length=None, **request).idle

    assert idle("p-tuning", method="prompt") == ("encoder_hidden_size",)
    assert idle("mlp", method="residual") == ("prefix_projection",)
    assert idle("mlp") == idle("residual") == ()
