"""A run in memory_math's words, and what is said where memory runs out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_lab
import memory_math
from lora_lab import LoraLabError
from lora_lab.models import LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from lora_lab.training import TrainConfig, fit
from lora_lab.training.memory_request import request_of

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


ROWS = [{"input_ids": [3] * 24, "labels": [3] * 24}, {"input_ids": [3] * 9, "labels": [3] * 9}]


def llama() -> Any:
    return LlamaForCausalLM(LlamaForCausalLM.config_class.from_dict(LLAMA))


@pytest.mark.parametrize(("variant", "kind", "method"), [
    ("lora", None, "lora"), ("dora", None, "dora"), ("lora", "nf4-dq", "qlora"), ("dora", "int8", "dora"),
])  # fmt: skip
def test_adapters_and_the_base_they_stand_on_are_told_apart(variant: str, kind: str | None, method: str) -> None:
    """The same prediction as of a request that is written out."""
    model = lora_lab.inject(lora_lab.quantize(llama(), kind) if kind else llama(), rank=4, variant=variant, dropout=0.1)
    request = request_of(model, TrainConfig(micro_batch_size=3, precision="fp32"), ROWS)
    written = {"method": method, "quantization": kind or "none", "rank": 4, "dropout": 0.1, "batch_size": 3, "sequence_length": 24}
    assert memory_math.predict(model, **request).total == memory_math.predict(model, device="cpu", **written).total
    assert "target_length" not in request


def test_without_adapters_everything_trains() -> None:
    assert request_of(llama(), TrainConfig(), ROWS)["method"] == "full"
    switched_off = lora_lab.inject(llama(), rank=4)
    lora_lab.use(switched_off, None)
    assert request_of(switched_off, TrainConfig(), ROWS)["method"] == "full"


def test_the_prediction_is_for_the_layers_that_are_adapted_and_the_rows_that_lie_together() -> None:
    model = lora_lab.inject(llama(), rank=4, target_modules=["q_proj", "v_proj"])
    request = request_of(model, TrainConfig(packing=True, max_tokens=100, precision="fp32"), ROWS)
    assert (request["target_modules"], request["batch_size"]) == (["q_proj", "v_proj"], 4)
    written = {"method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"], "batch_size": 4, "sequence_length": 24}
    assert memory_math.predict(model, **request).total == memory_math.predict(model, device="cpu", **written).total


@pytest.mark.parametrize("options", [{"target_modules": ["qkv.q", "qkv.v"], "fused": {"qkv": {"q": 8, "k": 8, "v": 8}}},
                                     {"target_modules": [], "target_parameters": ["stack"]}], ids=["parts", "stack"])  # fmt: skip
def test_the_rank_is_that_of_one_pair(options: dict[str, Any]) -> None:
    """Of a stack of three matrices, and of a part of a fused layer."""

    class Owner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.stack = torch.nn.Linear(8, 24), torch.nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.qkv(x @ self.stack)

    assert request_of(lora_lab.inject(Owner(), rank=2, **options), TrainConfig(), ROWS)["rank"] == 2


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_encoder_decoders_answers_are_as_long_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 9 tokens, answers of up to 5: the prediction is for these."""
    model, asked = T5ForConditionalGeneration(T5Config.from_dict(T5)), []
    rows = [{"input_ids": [3] * 9, "labels": [4] * (3 + index % 3)} for index in range(6)]
    monkeypatch.setattr(T5ForConditionalGeneration, "forward", out_of_memory)
    predict = memory_math.predict
    monkeypatch.setattr(memory_math, "predict", lambda source, **request: asked.append(request) or predict(source, **request))
    with pytest.raises(LoraLabError, match=r"rows of up to 9 tokens\. Predicted were 0\.00 GiB of tensors; what would lower that most: \w+"):
        fit(model, rows, {"max_steps": 1, "progress": False})
    assert [(request["sequence_length"], request["target_length"]) for request in asked] == [(9, 5)]
