"""BERT, RoBERTa, T5 and Mixtral: what autograd keeps is predicted to the byte, and the peak of a step within 2 %, on small real models."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import peft
import pytest
import torch
import transformers

from memory_math import compare, measure, predict, saved_bytes
from memory_math.architectures import architecture_of, count_parameters
from memory_math.errors import MemoryMathError

BERT = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 176,
    "max_position_embeddings": 80, "pad_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 1000, "d_model": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 24, "d_ff": 176,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 80, "num_local_experts": 4,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BATCH, LENGTH, TARGET, RANK, VIRTUAL = 2, 48, 20, 4, 6

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("BertForSequenceClassification", {}),
    ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
    ("BertForTokenClassification", {}),
    ("RobertaForSequenceClassification", {}),
    ("RobertaForMaskedLM", {}),
    ("T5ForConditionalGeneration", {}),
    ("T5ForConditionalGeneration", GATED),
    ("MixtralForCausalLM", {}),
]
TASK_TYPES = {"BertForSequenceClassification": "SEQ_CLS", "RobertaForSequenceClassification": "SEQ_CLS"}
TASK_TYPES |= {"T5ForConditionalGeneration": "SEQ_2_SEQ_LM", "MixtralForCausalLM": "CAUSAL_LM"}
SQUARE = {"num_decoder_layers": 3, "d_kv": 16}  # what PEFT's prefixes fit: stacks of one height, heads together as wide as d_model
PREFIXED = [("BertForSequenceClassification", {}), ("BertForTokenClassification", {}), ("RobertaForSequenceClassification", {}),
            ("T5ForConditionalGeneration", SQUARE), ("T5ForConditionalGeneration", {**SQUARE, **GATED})]  # fmt: skip
METHODS = ("full", "frozen", "lora", "dora", "prompt")
PRECISIONS = ("fp32", "bf16", "bf16-mixed")
SETTINGS = list(itertools.product((False, True), ("sdpa", "eager"), (True, False)))  # checkpointing, attention, dropout

POINTS = [
    (name, change, method, precision)
    for (name, change), method, precision in itertools.product(CLASSES, METHODS, PRECISIONS)
    if method != "prompt" or name in TASK_TYPES
]
CASES = [(*point, *SETTINGS[number % len(SETTINGS)]) for number, point in enumerate(POINTS)]  # every point once, every setting over again


def config_of(name: str, change: dict[str, Any], dropout: bool = True) -> dict[str, Any]:
    """The fields of a small model of class `name`."""
    shape = {"Bert": BERT, "Robe": BERT, "T5Fo": T5, "Mixt": MIXTRAL}[name[:4]]
    none = {"Bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "Robe": ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    fields = none.get(name[:4], ("dropout_rate",)) if name[:4] != "Mixt" else ()
    return {**shape, **change, **({} if dropout else dict.fromkeys(fields, 0.0))}


def built(name: str, config: dict[str, Any], attention: str = "sdpa") -> Any:
    """The model with random weights. An untied T5 is what loading such a checkpoint makes of it: the config cannot say it."""
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config, attn_implementation=attention))
    if config.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def prepared(model: Any, method: str, precision: str, checkpointing: bool, **adapter: Any) -> Any:
    """The dtypes and adapters that the words stand for."""
    name = type(model).__name__
    if precision == "bf16" or (precision == "bf16-mixed" and method != "full"):
        model = model.bfloat16()
    if method == "frozen":
        model.requires_grad_(False)
    if method == "frozen" or (checkpointing and method in ("lora", "dora")):
        model.enable_input_require_grads()
    if method in ("lora", "dora"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, use_dora=method == "dora", **{"target_modules": "all-linear", **adapter}))
    if method in ("prompt", "prefix"):
        kind = peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig
        model = peft.get_peft_model(model, kind(task_type=TASK_TYPES.get(name, "TOKEN_CLS"), num_virtual_tokens=VIRTUAL))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def forward_of(model: Any, precision: str, batch: int = BATCH, length: int = LENGTH, target: int = TARGET) -> Any:
    """A function that runs the model on random rows and returns the loss."""
    base = getattr(model, "get_base_model", lambda: model)()
    name = type(base).__name__
    labels = {"S": (batch,), "T": (batch, length)}.get(name.partition("For")[2][:1], (batch, length))
    labels = (batch, target) if name.startswith("T5") else labels
    ids, targets = torch.randint(2, 1000, (batch, length)), torch.randint(0, 2, labels)
    extra = {"use_cache": False} if name.startswith("Mixtral") else {}

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
            return model(input_ids=ids, labels=targets, **extra).loss

    return forward


def asked(name: str, config: dict[str, Any]) -> dict[str, Any]:
    kinds = {"Bert": "bert", "Robe": "roberta", "T5Fo": "t5", "Mixt": "mixtral"}
    return {"model_type": kinds[name[:4]], "architectures": [name], **config}


def predicted(name: str, config: dict[str, Any], **request: Any) -> Any:
    defaults = {"batch_size": BATCH, "sequence_length": LENGTH, "target_length": TARGET, "rank": RANK, "num_virtual_tokens": VIRTUAL, "device": "cpu"}
    return predict(asked(name, config), **{**defaults, **request})


@pytest.mark.parametrize(("name", "change", "method", "precision", "checkpointing", "attention", "dropout"), CASES)
def test_what_autograd_keeps_is_predicted_to_the_byte(
    name: str, change: dict[str, Any], method: str, precision: str, checkpointing: bool, attention: str, dropout: bool
) -> None:
    """saved_tensors_hooks on transformers 5.23 and PEFT 0.21, with dropout as the models come or without."""
    config, request = config_of(name, change, dropout), {"method": method, "precision": precision}
    adapter = {}
    if name == "MixtralForCausalLM" and method == "dora":  # PEFT refuses it on stacks of experts
        adapter, request["target_modules"] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "attention"
    model = prepared(built(name, config, attention), method, precision, checkpointing, **adapter)
    footprint = predicted(name, config, gradient_checkpointing=checkpointing, attention=attention, **request)
    assert saved_bytes(forward_of(model, precision)) == footprint.saved_bytes
    assert footprint.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("attention", "dropout", "rows"), [("sdpa", True, 2), ("sdpa", False, 1), ("eager", True, 1), ("eager", False, 2)])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "change"), PREFIXED)
def test_a_prefix_keeps_exactly_what_is_predicted(
    name: str, change: dict[str, Any], precision: str, attention: str, dropout: bool, rows: int
) -> None:
    """Keys and values in front of those of BERT's blocks, and of the self-attention of T5's decoder (peft_model.py, get_prompt)."""
    config = config_of(name, change, dropout)
    model = prepared(built(name, config, attention), "prefix", precision, False)
    footprint = predicted(name, config, method="prefix", precision=precision, attention=attention, batch_size=rows)
    assert saved_bytes(forward_of(model, precision, batch=rows)) == footprint.saved_bytes
    assert footprint.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_dropout_one_row_and_lora_dropout_each_change_what_is_kept() -> None:
    """The comparison above would not see a rule that is the same for all of them."""
    kept = [
        predicted("BertForMaskedLM", config_of("BertForMaskedLM", {}, dropout), method="lora", precision="bf16", batch_size=batch, dropout=share)
        for dropout, batch, share in ((True, 2, 0.0), (False, 2, 0.0), (True, 1, 0.0), (True, 2, 0.1))
    ]
    assert len({footprint.saved_bytes for footprint in kept}) == 4


@pytest.mark.parametrize(("method", "precision", "targets", "kept", "trained"), [
    ("full", "fp32", "all-linear", 1_762_612, 276_288), ("full", "bf16-mixed", "all-linear", 1_774_900, 276_288),
    ("frozen", "bf16", "all-linear", 907_060, 0), ("lora", "fp32", "all-linear", 1_623_220, 17_952),
    ("lora", "bf16-mixed", "all-linear", 1_215_988, 17_952), ("lora", "bf16", "attention", 1_090_996, 3_584),
])  # fmt: skip
def test_experts_of_transformers_4_are_linear_layers(method: str, precision: str, targets: str, kept: int, trained: int) -> None:
    """What saved_tensors_hooks saw of transformers 4.45.2 and PEFT 0.13.2, whose router sends its tokens unevenly: a little less."""
    config, old = {**MIXTRAL, "tie_word_embeddings": False}, {"versions": {"transformers": "4.45"}}
    footprint = predicted("MixtralForCausalLM", config, method=method, precision=precision, target_modules=targets, **old)
    assert footprint.saved_bytes == pytest.approx(kept, rel=0.006)
    assert footprint.trained == trained and footprint.parameters == count_parameters(asked("MixtralForCausalLM", config))
    if method == "lora":  # and dropout, which PEFT refuses on stacks, is dropout like any other
        assert predicted("MixtralForCausalLM", config, method=method, target_modules=targets, dropout=0.1, **old).saved_bytes > footprint.saved_bytes


def test_bitsandbytes_quantises_linear_layers_and_no_stacks_of_experts() -> None:
    """Published for QLoRA over Mixtral-8x7B on transformers 4.45: 36.2 GB for 4 x 4,096 tokens (fms-acceleration, a100_80gb.csv)."""
    request = {"method": "qlora", "quantization": "nf4-dq", "precision": "bf16", "sequence_length": 64, "target_modules": "attention"}
    old, new = (predict("mixtral-8x7b", versions={"transformers": version}, **request) for version in ("4.57", "5.23"))
    assert old.weights / old.parameters == pytest.approx(4.127 / 8, rel=0.02)  # and embeddings, head and adapters
    assert new.weights / new.parameters == pytest.approx(2, rel=0.06)
    assert "stacks of experts" in new.how["weights"] and "stacks" not in old.how["weights"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration"])
def test_a_single_row_is_predicted_to_the_byte_as_well(name: str, attention: str) -> None:
    """Of one row the heads are views as the batched product wants them, of several they are copied."""
    config = config_of(name, {})
    model = prepared(built(name, config, attention), "full", "fp32", False)
    footprint = predicted(name, config, attention=attention, batch_size=1)
    assert saved_bytes(forward_of(model, "fp32", batch=1)) == footprint.saved_bytes


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dropout_of_the_adapters_is_predicted_to_the_byte(method: str, precision: str) -> None:
    """With dropout DoRA computes the frozen layer once more, from the dropped input (peft/tuners/lora/dora.py)."""
    name, config = "BertForSequenceClassification", config_of("BertForSequenceClassification", {})
    model = prepared(built(name, config), method, precision, False, lora_dropout=0.1)
    assert saved_bytes(forward_of(model, precision)) == predicted(name, config, method=method, precision=precision, dropout=0.1).saved_bytes


def step_of(model: Any, optimizer: Any, precision: str, **shape: Any) -> Any:
    forward = forward_of(model, precision, **shape)

    def step() -> None:
        loss = forward()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize(
    ("name", "method", "precision", "checkpointing", "attention", "dropout"),
    [
        ("BertForSequenceClassification", "full", "bf16-mixed", False, "sdpa", True),
        ("RobertaForMaskedLM", "lora", "bf16", True, "eager", True),
        ("T5ForConditionalGeneration", "full", "bf16", False, "sdpa", True),
        ("T5ForConditionalGeneration", "lora", "bf16", True, "sdpa", False),
        ("BertForTokenClassification", "prefix", "bf16", False, "eager", True),
        ("T5ForConditionalGeneration", "prefix", "bf16", False, "sdpa", False),
        ("MixtralForCausalLM", "full", "fp32", False, "sdpa", False),
        ("MixtralForCausalLM", "lora", "bf16", False, "eager", False),
    ],
)
def test_peak_of_a_training_step(elsewhere: int, name: str, method: str, precision: str, checkpointing: bool, attention: str, dropout: bool) -> None:
    """Forward, loss, backward and AdamW: the most that is alive at once."""
    change, shape = {"max_position_embeddings": 160} if name[0] in "BR" else {}, {"batch": 4, "length": 128, "target": 64}
    change |= SQUARE if name[0] == "T" and method == "prefix" else {}
    config = config_of(name, change, dropout)
    model = prepared(built(name, config, attention), method, precision, checkpointing)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, foreach=False)
    step = step_of(model, optimizer, precision, **shape)
    step()  # makes the optimizer's states
    real = measure(step)
    footprint = predicted(
        name, config, method=method, precision=precision, gradient_checkpointing=checkpointing, attention=attention,
        batch_size=4, sequence_length=128, target_length=64,
    )  # fmt: skip
    assert footprint.total == pytest.approx(real.peak_bytes - elsewhere, rel=0.02), compare(footprint, real)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "T5ForConditionalGeneration", "MixtralForCausalLM"])
def test_peak_without_gradients(elsewhere: int, name: str, precision: str) -> None:
    """An encoder's pass; an encoder and the first token of its decoder; the prompt of a decoder. T5's in bf16 are its buckets of positions."""
    config = config_of(name if name != "BertModel" else "BertForMaskedLM", {})
    model = built(name, config).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval()
    extra = {"T": {"decoder_input_ids": torch.zeros(BATCH, 1, dtype=torch.long)}, "M": {"logits_to_keep": 1}}.get(name[0], {})

    def run() -> None:
        with torch.no_grad():
            model(input_ids=torch.randint(2, 1000, (BATCH, LENGTH)), **extra)

    run()
    footprint = predicted(name, config, method="inference", precision=precision)
    assert footprint.total == pytest.approx(measure(run).peak_bytes - elsewhere, rel=0.01)


def test_a_bare_encoder_is_trained_with_a_classifier_of_two_labels() -> None:
    """bert-large-uncased has 335,141,888 parameters; BertForSequenceClassification 2 * 1024 + 2 more."""
    assert predict("bert-large-uncased", sequence_length=128).parameters == 335_141_888 + 2_050
    assert predict("bert-large-uncased", method="inference", sequence_length=128).parameters == count_parameters("bert-large-uncased")


def test_a_quarter_of_t5_is_kept_in_float32_when_it_is_loaded_in_float16() -> None:
    """_keep_in_fp32_modules = ["wo"] (modeling_t5.py), which from_pretrained heeds for float16 and not for bfloat16."""
    half, brain = (predict("t5-base", method="inference", precision=precision, sequence_length=64) for precision in ("fp16", "bf16"))
    last = sum(tensor.numel for tensor in architecture_of("t5-base").tensors() if tensor.path.endswith(".wo.weight"))
    assert half.weights - brain.weights == 2 * last == 2 * 24 * 3072 * 768


def test_float32_wo_is_what_from_pretrained_leaves(tmp_path: Any) -> None:
    built("T5ForConditionalGeneration", T5).save_pretrained(tmp_path)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == expected


def test_attention_in_parts_is_the_cpus_alone() -> None:
    """PyTorch's kernels for CUDA drop out inside: no scores are kept, and a mask of dropout is a byte per element."""
    name = "BertForSequenceClassification"
    cpu, cuda = (predicted(name, config_of(name, {}), precision="bf16", device=device) for device in ("cpu", "cuda"))
    assert "attention softmax" in cpu.saved and "attention softmax" not in cuda.saved
    elements = cuda.saved["dropout"]  # embeddings, two per block, and the pooled token
    assert elements == BATCH * LENGTH * 64 * (1 + 2 * 2) + BATCH * 64


@pytest.mark.parametrize(
    ("name", "request_", "said"),
    [
        ("BertForMaskedLM", {"method": "prompt"}, "for ForSequenceClassification only"),
        ("RobertaForMaskedLM", {"method": "prefix"}, "ForSequenceClassification or ForTokenClassification only"),
        ("T5ForConditionalGeneration", {"method": "prefix"}, "here 3 and 2 blocks, .* here 96 and 64"),
        ("T5ForConditionalGeneration", {"attention": "flash", "precision": "bf16", "device": "cuda"}, "position bias"),
        ("T5ForConditionalGeneration", {"loss": "chunked"}, "chunked"),
        ("MixtralForCausalLM", {"method": "dora"}, 'target_modules="attention"'),
        ("BertForSequenceClassification", {"compile": True}, "compile"),
    ],
)
def test_what_is_not_modelled_is_refused_with_what_to_do(name: str, request_: dict[str, Any], said: str) -> None:
    with pytest.raises(MemoryMathError, match=said):
        predicted(name, config_of(name, {}), **request_)
