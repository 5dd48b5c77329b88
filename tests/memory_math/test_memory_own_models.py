"""Every family of lora_lab.models: what autograd keeps is predicted to the byte, and the peak of a step and of whole runs within 2 %."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from stamps import stamp_bytes

import lora_lab
from lora_lab.models import activations, falcon
from lora_lab.models.loading import FAMILIES
from lora_lab.training import TrainConfig, fit, memory_saving, optimizers
from lora_lab.training.precision import PRECISIONS, store_in
from memory_math import MemoryMathError, compare, measure, predict, saved_bytes, savings
from memory_math.models import base, falcon_lora_lab, layers_lora_lab
from memory_math.request import OWN_OPTIMIZERS

BATCH, LENGTH, TARGET, RANK = 2, 48, 20, 4
LARGER = {"batch_size": 4, "sequence_length": 128, "target_length": 64}
LLAMA = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176,
}  # fmt: skip
SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
FALCON_RW = {**SIZES, "parallel_attn": False, "bias": True, "alibi": True}
BERT = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176,
    "max_position_embeddings": 160, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 1000, "d_model": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 24, "d_ff": 176, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BERT_DROPS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
DROPS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", LLAMA),
    "mistral": ("MistralForCausalLM", "mistral", {**LLAMA, "sliding_window": 16}),
    "mistral, long window": ("MistralForCausalLM", "mistral", {**LLAMA, "sliding_window": 64}),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {**LLAMA, "head_dim": 24}),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "gpt2, dropout": ("GPT2LMHeadModel", "gpt2", {**GPT2, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}),
    "pythia": ("GPTNeoXForCausalLM", "gpt_neox", {**SIZES, "intermediate_size": 256}),
    "neox, dropout": ("GPTNeoXForCausalLM", "gpt_neox", {
        **SIZES, **DROPS, "intermediate_size": 256, "use_parallel_residual": False, "hidden_act": "quick_gelu", "rotary_pct": 1.0,
    }),
    "falcon-7b": ("FalconForCausalLM", "falcon", SIZES),
    "falcon-40b": ("FalconForCausalLM", "falcon", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b, dropout": ("FalconForCausalLM", "falcon", {
        **SIZES, **DROPS, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True,
    }),
    "falcon-rw": ("FalconForCausalLM", "falcon", {**FALCON_RW, "multi_query": False}),
    "falcon-rw, one key, dropout": ("FalconForCausalLM", "falcon", {**FALCON_RW, **DROPS}),
    "bert": ("BertForSequenceClassification", "bert", BERT),
    "bert, dropout": ("BertForSequenceClassification", "bert", {**BERT, **BERT_DROPS}),
    "bert, words": ("BertForMaskedLM", "bert", BERT),
    "roberta": ("RobertaForSequenceClassification", "roberta", BERT),
    "roberta, words, dropout": ("RobertaForMaskedLM", "roberta", {**BERT, **BERT_DROPS, "tie_word_embeddings": False}),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "t5, dropout": ("T5ForConditionalGeneration", "t5", {**T5, "dropout_rate": 0.1}),
    "flan-t5": ("T5ForConditionalGeneration", "t5", {**T5, **GATED}),
    "mt5, dropout": ("MT5ForConditionalGeneration", "mt5", {**T5, "dropout_rate": 0.1, "tie_word_embeddings": False}),
}  # fmt: skip
METHODS, WORDS, AGAIN = ("full", "frozen", "lora", "dora"), ("fp32", "bf16", "bf16-mixed"), (False, True, 2, "attention")
POINTS = [(name, *point) for name, point in itertools.product(MODELS, itertools.product(METHODS, WORDS))]
CASES = [(*point, AGAIN[(number + number // 4) % 4]) for number, point in enumerate(POINTS)]  # each point once, each way to run again with each


pytestmark = pytest.mark.usefixtures("aside")


def config_of(name: str, **change: Any) -> dict[str, Any]:
    class_name, kind, fields = MODELS[name]
    return {"model_type": kind, "architectures": [class_name], **fields, **change}


def bare(name: str) -> Any:
    """The model with random weights."""
    family = FAMILIES[MODELS[name][0]]
    return family(family.config_class.from_dict(config_of(name)))


def built(name: str, method: str = "full", precision: str = "fp32", checkpointing: bool | int | str = False, **adapter: Any) -> Any:
    """The model, stored as the words say, and adapters; "frozen" has embeddings that want a gradient."""
    model = bare(name)
    model.requires_grad_(method == "full")
    if method == "frozen":
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    store_in(PRECISIONS[precision], model)
    if method in ("lora", "dora"):
        lora_lab.inject(model, rank=RANK, variant=method, **adapter)
    model.gradient_checkpointing_enable(checkpointing)
    return model.train()


def autocast(precision: str) -> Any:
    dtype = PRECISIONS[precision].compute
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def batch_of(name: str, batch_size: int = BATCH, sequence_length: int = LENGTH, target_length: int = TARGET) -> dict[str, torch.Tensor]:
    ids, targets = (torch.randint(2, 1000, (batch_size, length)) for length in (sequence_length, target_length))
    classes = torch.randint(0, 2, (batch_size,))
    return {"input_ids": ids, "labels": classes if "Sequence" in MODELS[name][0] else targets if "T5" in MODELS[name][0] else ids.clone()}


def kept(name: str, model: Any, precision: str, **shape: int) -> int:
    """What autograd keeps, but for the stamps that watching makes LoRA layers keep."""
    batch = batch_of(name, **shape)

    def forward() -> Any:
        with autocast(precision):
            return model(**batch).loss

    return saved_bytes(forward) - stamp_bytes(forward)


def predicted(name: str, **request: Any) -> Any:
    shape = {"batch_size": BATCH, "sequence_length": LENGTH, "target_length": TARGET}
    return predict(config_of(name), **{**shape, "rank": RANK, "device": "cpu", "implementation": "lora_lab", **request})


@pytest.mark.parametrize(("name", "method", "precision", "checkpointing"), CASES)
def test_what_autograd_keeps_is_predicted_to_the_byte(name: str, method: str, precision: str, checkpointing: bool | int | str) -> None:
    """torch.autograd.graph.saved_tensors_hooks sees every tensor that a node of the graph saves."""
    model = built(name, method, precision, checkpointing)
    footprint = predicted(name, method=method, precision=precision, gradient_checkpointing=checkpointing)
    assert kept(name, model, precision) == footprint.saved_bytes
    assert footprint.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert footprint.weights == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_one_row_and_the_adapters_dropout_are_predicted_to_the_byte(name: str) -> None:
    """Of one row the heads are views as the batched product wants them, of several they are copied; a bit of mask for each adapted input."""
    assert kept(name, built(name), "fp32", batch_size=1) == predicted(name, batch_size=1).saved_bytes
    dropping = built(name, "lora", "bf16", True, dropout=0.1, target_modules="attention")
    asked = {"method": "lora", "precision": "bf16", "gradient_checkpointing": True, "dropout": 0.1, "target_modules": "attention"}
    assert kept(name, dropping, "bf16") == predicted(name, **asked).saved_bytes


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "falcon-40b", "bert", "t5"])
def test_all_sixteen_bit_is_the_same_inside_autocast_and_outside_on_the_cpu(name: str) -> None:
    """lora_lab.training runs bf16 under autocast, somebody's own loop may not; of LayerNorm CUDA's autocast would make float32."""
    for method in ("full", "dora"):
        model = built(name, method, "bf16")
        assert kept(name, model, "bf16") == kept(name, model, "fp32") == predicted(name, method=method, precision="bf16").saved_bytes


@pytest.mark.parametrize(("name", "method", "checkpointing"), [
    ("t5", "full", False), ("t5, dropout", "lora", "attention"), ("flan-t5", "dora", True),
])  # fmt: skip
def test_the_last_matrix_of_t5s_mlp_is_float32_among_float16(name: str, method: str, checkpointing: bool | str) -> None:
    """float32_instead_of_float16 in lora_lab/models/t5.py: it is stored and multiplied in float32, and what is before it is clamped."""
    model = built(name, method, "fp16-mixed", checkpointing)
    footprint = predicted(name, method=method, precision="fp16-mixed", gradient_checkpointing=checkpointing)
    assert kept(name, model, "fp16-mixed") == footprint.saved_bytes
    assert footprint.weights == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "bert", "t5"])
def test_a_quantised_base_keeps_and_weighs_what_is_predicted(name: str, kind: str) -> None:
    """lora_lab.quantize leaves head, classifier and T5's wo as they are."""
    model = built(name, "full", "bf16")
    lora_lab.inject(lora_lab.quantize(model, kind), rank=RANK)
    footprint = predicted(name, method="qlora", quantization=kind, precision="bf16")
    weighed = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert footprint.weights == sum(weighed.values())
    assert kept(name, model, "bf16") == footprint.saved_bytes


def test_a_window_costs_a_mask_where_rows_are_longer() -> None:
    """Of numbers, one for each pair of positions, in every block that has it; and under checkpointing one of true and false for all blocks."""
    asked = {"precision": "bf16-mixed", "method": "lora"}
    wide, narrow = (predicted(name, **asked) for name in ("mistral, long window", "mistral"))
    assert narrow.saved_bytes - wide.saved_bytes == 3 * 2 * LENGTH**2
    wide, narrow = (predicted(name, **asked, gradient_checkpointing=True) for name in ("mistral, long window", "mistral"))
    assert narrow.saved_bytes - wide.saved_bytes == LENGTH**2
    on_a_gpu = [predicted(name, **asked, device="cuda", sequence_length=2048).saved_bytes for name in ("mistral", "qwen3")]
    assert on_a_gpu[0] > on_a_gpu[1] + 3 * 4 * BATCH * 4 * 2048**2  # the scores: with grouped queries no fused kernel of CUDA's takes a mask


@pytest.mark.parametrize("name", ["gpt2", "pythia", "falcon-7b", "bert", "t5"])
def test_the_wrong_number_of_blocks_does_not_match(name: str) -> None:
    """Were the comparison blind to the blocks, one more would go unseen."""
    field = {"gpt2": "n_layer", "t5": "num_layers"}.get(name, "num_hidden_layers")
    asked = {"batch_size": BATCH, "sequence_length": LENGTH, "target_length": TARGET, "device": "cpu", "implementation": "lora_lab"}
    assert predict(config_of(name, **{field: 4}), **asked).saved_bytes > 1.1 * kept(name, built(name), "fp32")


# Peaks --------------------------------------------------------------------------------------------------------------------------------


def training_step(name: str, model: Any, precision: str, **shape: int) -> Any:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        batch = batch_of(name, **{**LARGER, **shape})
        with autocast(precision):
            loss = model(**batch).loss
        loss.backward()
        del loss, batch
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize(("name", "method", "precision", "checkpointing"), [
    ("mistral", "full", "fp32", "attention"), ("qwen3", "lora", "bf16", False), ("gpt2, dropout", "full", "fp32", False),
    ("gpt2", "lora", "fp32", True), ("pythia", "dora", "bf16", False), ("falcon-7b", "lora", "bf16-mixed", True),
    ("falcon-rw, one key, dropout", "full", "bf16-mixed", True), ("bert", "lora", "fp32", True), ("bert", "full", "bf16-mixed", False),
    ("roberta, words, dropout", "full", "fp32", False), ("t5, dropout", "full", "bf16-mixed", True), ("flan-t5", "lora", "fp32", 2),
])  # fmt: skip
def test_the_peak_of_a_step(elsewhere: int, name: str, method: str, precision: str, checkpointing: bool | int | str) -> None:
    """The second step, when the optimizer has its states; two gradients of what two linear layers read are added into a third tensor."""
    step = training_step(name, built(name, method, precision, checkpointing), precision)
    step()
    real = measure(step)
    footprint = predicted(name, method=method, precision=precision, gradient_checkpointing=checkpointing, **LARGER)
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)
    assert footprint.phases["load"] == pytest.approx(real.start_bytes - elsewhere, rel=0.01)


@pytest.mark.parametrize("name", ["mistral", "gpt2", "pythia", "falcon-40b", "falcon-rw", "bert", "bert, words", "t5"])
def test_the_peak_without_gradients(elsewhere: int, name: str) -> None:
    """A prompt, whose keys and values stay; an encoder's pass; an encoder and the first token of its decoder."""
    model, more = built(name, precision="bf16").eval(), {"use_cache": True, "logits_to_keep": 1}
    if name == "t5":
        more = {"use_cache": True, "decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)}
    if name.startswith("bert"):
        more = {}

    def run() -> None:
        with torch.no_grad():
            model(input_ids=torch.randint(2, 1000, (4, 128)), **more)

    run()
    footprint = predicted(name, method="inference", precision="bf16", batch_size=4, sequence_length=128)
    assert footprint.total == pytest.approx(measure(run).peak_bytes - elsewhere, rel=0.02)


def rows_of(name: str) -> list[dict[str, Any]]:
    batch = batch_of(name, **LARGER)
    word = "label" if "Sequence" in MODELS[name][0] else "labels"
    return [{"input_ids": ids, word: labels} for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]


@pytest.mark.parametrize(("name", "optimizer", "precision", "in_backward"), [
    ("gpt2", "adamw", "bf16", False), ("t5", "sgd", "bf16", False), ("llama", "momentum", "bf16", False), ("bert", "adafactor", "bf16", False),
    ("pythia", "lion", "bf16", False), ("gpt2", "adamw", "bf16", True), ("t5", "adamw", "fp32", True), ("falcon-40b", "lion", "fp32", False),
])  # fmt: skip
def test_the_peak_of_a_run_of_fit(elsewhere: int, name: str, optimizer: str, precision: str, in_backward: bool) -> None:
    """All of it: 16-bit weights step in float32 and are rounded by chance, one at a time; or each weight steps when its last gradient is there."""
    norm = None if in_backward else 1.0
    config = TrainConfig(max_steps=2, micro_batch_size=4, precision=precision, optimizer=optimizer, optimizer_in_backward=in_backward,
                         max_grad_norm=norm, progress=False)  # fmt: skip
    model, rows = built(name, precision=precision), rows_of(name)
    real = measure(lambda: fit(model, rows, config))
    footprint = predict(model, precision=precision, optimizer=optimizer, optimizer_in_backward=in_backward, device="cpu", **LARGER)
    assert footprint.request["implementation"] == "lora_lab"  # as the model says
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)


@pytest.mark.parametrize("name", OWN_OPTIMIZERS)
def test_the_rounded_step_needs_so_many_bytes_for_its_largest_weight(elsewhere: int, name: str) -> None:
    weights = [torch.nn.Parameter(torch.randn(*shape).bfloat16()) for shape in ((300, 1000), (1000, 1000), (1000,))]
    optimizer = optimizers.make_optimizer(name, weights, 1e-3, 0.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    real = measure(optimizer.step)
    shape = {"vocab_size": 1000, "hidden_size": 1000, "intermediate_size": 1000, "num_attention_heads": 1, "num_hidden_layers": 1}
    asked = {"precision": "bf16", "optimizer": name, "sequence_length": 8, "implementation": "lora_lab", "device": "cpu"}
    footprint = predict({"model_type": "llama", **shape}, **asked)
    grown = footprint.phases["optimizer step"] - footprint.phases["load"] - 2 * footprint.trained  # beside the gradients
    assert grown == pytest.approx(real.peak_bytes - real.start_bytes, rel=0.02)
    assert footprint.request["optimizer_implementation"] == "rounded"


# What goes with it ----------------------------------------------------------------------------------------------------------------------


def test_what_stands_in_both_rooms_is_the_same() -> None:
    assert falcon_lora_lab.COLUMNS == falcon.COLUMNS and base.WORTH_MOVING == memory_saving.WORTH_MOVING
    assert set(layers_lora_lab.ACTIVATIONS) == set(activations.ACTIVATIONS) and set(OWN_OPTIMIZERS) == set(optimizers.OPTIMIZERS)


def test_activations_below_a_mebibyte_stay_on_the_gpu() -> None:
    """offloaded_activations in lora_lab/training/memory_saving.py: smaller tensors cost more in waiting than they save."""
    for length, moves in ((64, False), (4096, True)):
        asked = {"device": "cuda", "precision": "bf16", "batch_size": 2, "sequence_length": length}
        here, there = (predicted("llama", offload_activations=away, **asked).phases["after forward"] for away in (False, True))
        assert (there < here) is moves


def test_a_fused_step_is_no_saving_where_the_step_is_rounded() -> None:
    """It would be another training: what is too small for 16 bit would be lost."""
    asked = {"batch_size": 1, "sequence_length": 8, "device": "cpu", "implementation": "lora_lab"}
    assert all("optimizer_implementation" not in saving.change for saving in savings(config_of("llama"), precision="bf16", **asked))
    assert predicted("llama", precision="bf16", optimizer_implementation="fused").total < predicted("llama", precision="bf16").total


@pytest.mark.parametrize(("config", "asked", "text"), [
    ({"model_type": "opt", **SIZES, "ffn_dim": 64}, {}, "'opt' is not modelled with implementation='lora_lab', only bert, falcon, gpt2"),
    ({"model_type": "gemma", **LLAMA, "head_dim": 16}, {}, "Gemma is not modelled with implementation='lora_lab'"),
    ({"model_type": "llama", **LLAMA, "hidden_act": "gelu"}, {}, "hidden_act='gelu' is not modelled"),
    ({"model_type": "gpt2", **GPT2, "activation_function": "geglu"}, {}, r"activation='geglu' is none of lora_lab's.*did you mean 'gelu'"),
    ({"model_type": "bert", **BERT, "architectures": ["BertForTokenClassification"]}, {}, "as ForTokenClassification is not modelled with impl"),
    ({"model_type": "t5", **T5, "feed_forward_proj": "gelu"}, {}, "activation='gelu' is not modelled with implementation='lora_lab'"),
    ({"model_type": "t5", **T5, "architectures": ["T5EncoderModel"]}, {}, "is an encoder alone, which has no loss"),
    ({"model_type": "t5", **T5}, {"precision": "fp16"}, "precision='fp16' with config is not modelled.*which has 'fp16-mixed'"),
    ({"model_type": "t5", **T5}, {"label_tokens": 99}, "label_tokens=99: expected a whole number from 0 to 16, batch_size \\* target_length"),
    ({"model_type": "bert", **BERT}, {"label_tokens": 3}, "expected a whole number from 0 to 2, batch_size$"),
    ({"model_type": "llama", **LLAMA}, {"optimizer_implementation": "rounded"}, "'rounded' is lora_lab's step of 16-bit weights: it needs"),
])  # fmt: skip
def test_what_is_not_modelled_is_refused(config: dict[str, Any], asked: dict[str, Any], text: str) -> None:
    with pytest.raises(MemoryMathError, match=text):
        predict(config, batch_size=2, sequence_length=8, implementation="lora_lab", **asked)
