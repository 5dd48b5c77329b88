"""Prompts and prefixes before lora_lab's models: what autograd keeps is predicted to the byte, and the peak of steps and whole runs within 2 %."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_memory_own_models import LARGER, MODELS, autocast, bare, batch_of, config_of, training_step

import lora_lab
from lora_lab.training import TrainConfig, fit
from lora_lab.training.precision import PRECISIONS, store_in
from memory_math import MemoryMathError, compare, count_parameters, measure, predict, saved_bytes
from prompt_tuning_lab import inject

BATCH, LENGTH, TARGET, VIRTUAL = 2, 48, 20, 6
SMALL = {"batch_size": BATCH, "sequence_length": LENGTH, "target_length": TARGET}
WORDS, AGAIN = ("fp32", "bf16", "bf16-mixed"), (False, True, 2, "attention")
POINTS = [(name, *point) for name, point in itertools.product(MODELS, itertools.product(("prompt", "prefix"), WORDS))]
CASES = [(*point, AGAIN[(number + number // 4 + number // 6) % 4]) for number, point in enumerate(POINTS)]


pytestmark = pytest.mark.usefixtures("aside")


def built(name: str, method: str, precision: str = "fp32", checkpointing: bool | int | str = False, tokens: int = VIRTUAL) -> Any:
    """A prompted model with random weights, stored as the words say."""
    model = bare(name)
    prompted = inject(model, tokens, method=method, init="random")
    store_in(PRECISIONS[precision], prompted)
    model.gradient_checkpointing_enable(checkpointing)
    return prompted.train()


def kept(name: str, prompted: Any, precision: str, **shape: int) -> int:
    batch = batch_of(name, **{**SMALL, **shape})

    def forward() -> Any:
        with autocast(precision):
            return prompted(**batch).loss

    return saved_bytes(forward)


def predicted(name: str, method: str, **request: Any) -> Any:
    asked = {**SMALL, "num_virtual_tokens": VIRTUAL, "device": "cpu", "implementation": "lora_lab", **request}
    return predict(config_of(name), method=method, **asked)


@pytest.mark.parametrize(("name", "method", "precision", "checkpointing"), CASES)
def test_what_autograd_keeps_is_predicted_to_the_byte(name: str, method: str, precision: str, checkpointing: bool | int | str) -> None:
    """torch.autograd.graph.saved_tensors_hooks sees every tensor that a node of the graph saves."""
    prompted = built(name, method, precision, checkpointing)
    footprint = predicted(name, method, precision=precision, gradient_checkpointing=checkpointing)
    assert kept(name, prompted, precision) == footprint.saved_bytes
    assert footprint.trained == sum(parameter.numel() for parameter in prompted.parameters() if parameter.requires_grad)
    assert footprint.weights == sum(parameter.nbytes for parameter in prompted.parameters())


# Peaks --------------------------------------------------------------------------------------------------------------------------------


PEAKS = [(name, method, WORDS[(number + shift) % 3], AGAIN[(number + number // 2 + shift) % 4])
         for shift, method in enumerate(("prompt", "prefix"))
         for number, name in enumerate(("llama", "mistral", "qwen3", "gpt2", "pythia", "falcon-7b", "falcon-40b", "falcon-rw", "bert",
                                        "bert, words", "roberta, words, dropout", "t5", "mt5, dropout"))]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "precision", "checkpointing"), PEAKS)
def test_the_peak_of_a_step(elsewhere: int, name: str, method: str, precision: str, checkpointing: bool | int | str) -> None:
    """The second step, when the optimizer has its states, which are the prompt's alone."""
    step = training_step(name, built(name, method, precision, checkpointing), precision)
    step()
    real = measure(step)
    footprint = predicted(name, method, precision=precision, gradient_checkpointing=checkpointing, **LARGER)
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)
    assert footprint.phases["load"] == pytest.approx(real.start_bytes - elsewhere, rel=0.01)
    assert footprint.optimizer_states == 8 * footprint.trained + 4


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-rw", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_of_a_long_prefix_wait_for_each_other(elsewhere: int, name: str, checkpointing: bool) -> None:
    """Those of all blocks' keys and values lie there until the last has come, checkpointed or not: a prefix is one tensor."""
    shape = {"batch_size": 4, "sequence_length": 40, "target_length": 40}
    step = training_step(name, built(name, "prefix", "fp32", checkpointing, tokens=100), "fp32", **shape)
    step()
    real = measure(step)
    footprint = predicted(name, "prefix", gradient_checkpointing=checkpointing, num_virtual_tokens=100, **shape)
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "pythia", "falcon-40b", "falcon-rw", "bert", "bert, words", "t5"])
def test_the_peak_without_gradients(elsewhere: int, name: str, method: str) -> None:
    """A text behind a prompt, whose keys and values stay, the prompt's among them."""
    prompted, more = built(name, method, "bf16").eval(), {"use_cache": True, "logits_to_keep": 1}
    if name == "t5":
        more = {"use_cache": True, "decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)}
    if name.startswith("bert"):
        more = {}

    def run() -> None:
        with torch.no_grad():
            prompted(input_ids=torch.randint(2, 1000, (4, 100)), **more)

    run()
    real = measure(run)
    footprint = predict(prompted, method="inference", precision="bf16", batch_size=4, sequence_length=100, device="cpu")
    assert (footprint.request["prompt"], footprint.request["num_virtual_tokens"]) == (method, VIRTUAL)  # as the model says
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)


# Whole runs, live models --------------------------------------------------------------------------------------------------------------


def rows_of(name: str) -> list[dict[str, Any]]:
    batch = batch_of(name, **LARGER)
    word = "label" if "Sequence" in MODELS[name][0] else "labels"
    return [{"input_ids": ids, word: labels} for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]


@pytest.mark.parametrize(("name", "method", "optimizer", "checkpointing"), [
    ("llama", "prompt", "adafactor", False), ("falcon-7b", "prefix", "adafactor", False), ("gpt2", "prefix", "lion", True),
    ("t5", "prompt", "adamw", True), ("bert", "prefix", "sgd", False),
])  # fmt: skip
def test_the_peak_of_a_run_of_fit(elsewhere: int, name: str, method: str, optimizer: str, checkpointing: bool) -> None:
    """Asked with what a prompted model says of itself: its method and tokens; sequence_length is the text's."""
    prompted, rows = built(name, method, "bf16-mixed"), rows_of(name)
    asked = {"precision": "bf16-mixed", "optimizer": optimizer, "gradient_checkpointing": checkpointing}
    real = measure(lambda: fit(prompted, rows, TrainConfig(max_steps=2, micro_batch_size=4, progress=False, **asked)))
    footprint = predict(prompted, device="cpu", **prompted.memory_request, **asked, **LARGER)
    assert footprint.request["implementation"] == "lora_lab" and footprint.request["num_virtual_tokens"] == VIRTUAL
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)


def test_a_factored_step_keeps_rows_and_columns_of_each_matrix_of_a_prefix(elsewhere: int) -> None:
    """torch.optim.Adafactor on [L, 2, P, N, D]: sums over the last two dimensions, of N and of D numbers for each of L * 2 * P matrices."""
    prompted = built("llama", "prefix")
    optimizer = torch.optim.Adafactor(prompted.tasks.parameters())
    prompted(**batch_of("llama", **SMALL)).loss.backward()
    optimizer.step()
    states = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert predicted("llama", "prefix", optimizer="adafactor").optimizer_states == states


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "falcon-rw", "bert", "t5"])
def test_one_row_and_a_quantised_base_are_predicted_to_the_byte(name: str, method: str) -> None:
    assert kept(name, built(name, method), "fp32", batch_size=1) == predicted(name, method, batch_size=1).saved_bytes
    prompted = built(name, method, "bf16")
    lora_lab.quantize(prompted, "nf4")
    footprint = predicted(name, method, precision="bf16", quantization="nf4")
    assert kept(name, prompted, "bf16") == footprint.saved_bytes
    buffers = sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in prompted.state_dict().values()}.values())
    assert footprint.weights == buffers


def test_a_prompted_model_says_what_it_is() -> None:
    """Its class, its base's shape, and in inference what stands before the text; numbers that are given win."""
    prompted = built("bert", "prefix")
    asked = {"batch_size": 2, "sequence_length": 24, "device": "cpu"}
    assert predict(prompted, method="prefix", **asked).total == predicted("bert", "prefix", **asked).total
    assert predict(prompted, method="prefix", num_virtual_tokens=9, **asked).trained == 9 * 2 * 2 * 64
    assert predict(prompted, method="inference", **asked).request["prompt"] == "prefix"
    prompted.active = None
    assert predict(prompted, method="inference", **asked).total == predict(prompted.base, method="inference", **asked).total
    counted, alone = count_parameters(prompted), count_parameters(prompted.base)
    assert counted.parts == {**alone.parts, "adapters": VIRTUAL * 2 * 2 * 64}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_memory_that_runs_out_is_explained(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompted = built(name, method)
    assert predict(prompted.base, device="cpu", **prompted.memory_request, **LARGER).request["method"] == method

    def out_of_memory(*args: Any, **given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prompted, "forward", out_of_memory)
    with pytest.raises(lora_lab.LoraLabError, match=r"rows of up to 128 tokens\. Predicted were 0\.\d\d GiB.*would lower that most: batch of one"):
        fit(prompted, rows_of(name), TrainConfig(max_steps=1, micro_batch_size=4, progress=False))


# What goes with it ----------------------------------------------------------------------------------------------------------------------


def test_a_prompts_last_virtual_token_predicts_the_texts_first() -> None:
    """Of T tokens all have a label behind a prompt, and all but the first behind a prefix or nothing."""
    assert predicted("llama", "prompt").request["label_tokens"] == BATCH * LENGTH
    assert predicted("llama", "prefix").request["label_tokens"] == predicted("llama", "full").request["label_tokens"] == BATCH * (LENGTH - 1)


def test_the_base_of_a_prompt_drops_nothing_out() -> None:
    """It is in eval mode: a model that could drop costs what one that cannot does."""
    for method in ("prompt", "prefix"):
        assert predicted("gpt2, dropout", method).saved_bytes == predicted("gpt2", method).saved_bytes
    assert predicted("gpt2, dropout", "lora").saved_bytes > predicted("gpt2", "lora").saved_bytes


def test_checkpointing_leaves_a_prefix_its_waiting_gradients() -> None:
    """They grow with the text: a key's and a value's of each position and block, whatever is computed again."""
    peaks = [predicted("llama", "prefix", gradient_checkpointing=True, batch_size=8, sequence_length=length).phases["backward"]
             for length in (1000, 2000)]  # fmt: skip
    assert peaks[1] - peaks[0] > 3 * 2 * 8 * 1000 * 32 * 4
    with pytest.raises(MemoryMathError, match="turns off in transformers; with implementation='lora_lab' it stays on"):
        predicted("llama", "prefix", gradient_checkpointing=True, implementation="transformers")


@pytest.mark.parametrize(("request_", "text"), [
    ({"method": "lora", "prompt": "prefix"}, "prompt='prefix' is what stands before the text in inference, and method='lora' trains"),
    ({"method": "inference", "prompt": "rows"}, "prompt='rows' is not modelled; modelled now: prompt, prefix"),
    ({"method": "inference", "prompt": "prompt", "implementation": "transformers"}, "is modelled with implementation='lora_lab' only"),
    ({"method": "prompt", "sequence_length": 155}, "sequence_length=155: config has 160 learned positions, the virtual tokens included"),
    ({"method": "inference", "prompt": "prefix", "sequence_length": 155}, "160 learned positions, the virtual tokens included"),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused(request_: dict[str, Any], text: str) -> None:
    with pytest.raises(MemoryMathError, match=text):
        predicted("gpt2", **request_)


def test_on_a_gpu_a_prefix_takes_grouped_queries_out_of_the_fused_kernels() -> None:
    """It needs a mask, and no kernel of CUDA's takes one with grouped queries: T x (P + T) scores are kept, in float32. A prompt needs none."""
    asked = {"device": "cuda", "precision": "bf16", "batch_size": BATCH, "sequence_length": 1024, "implementation": "lora_lab"}
    shapes = [config_of("llama", num_key_value_heads=heads) for heads in (2, 4)]
    grouped, alone = (predict(shape, method="prefix", num_virtual_tokens=VIRTUAL, **asked).saved_bytes for shape in shapes)
    behind = predict(shapes[0], method="prompt", num_virtual_tokens=VIRTUAL, **asked).saved_bytes
    scores = 3 * 4 * BATCH * 4 * 1024 * (1024 + VIRTUAL)
    assert grouped > behind + scores and grouped > alone + scores / 2
