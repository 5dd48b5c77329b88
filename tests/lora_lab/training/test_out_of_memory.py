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
from lora_lab.training.distributed import ALONE
from lora_lab.training.loop import _request

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def llama() -> Any:
    return LlamaForCausalLM(LlamaForCausalLM.config_class.from_dict(LLAMA))


@pytest.mark.parametrize(("variant", "kind", "method"), [
    ("lora", None, "lora"), ("dora", None, "dora"), ("lora", "nf4-dq", "qlora"), ("dora", "int8", "dora"),
])  # fmt: skip
def test_adapters_and_the_base_they_stand_on_are_told_apart(variant: str, kind: str | None, method: str) -> None:
    """The same prediction as of a request that is written out."""
    model = lora_lab.inject(lora_lab.quantize(llama(), kind) if kind else llama(), rank=4, variant=variant, dropout=0.1)
    request = _request(model, TrainConfig(micro_batch_size=3, precision="fp32"), 24, ALONE)
    written = {"method": method, "quantization": kind or "none", "rank": 4, "dropout": 0.1, "batch_size": 3, "sequence_length": 24}
    assert memory_math.predict(model, **request).total == memory_math.predict(model, device="cpu", **written).total
    assert "target_length" not in request


def test_without_adapters_everything_trains() -> None:
    assert _request(llama(), TrainConfig(), 24, ALONE)["method"] == "full"
    switched_off = lora_lab.inject(llama(), rank=4)
    lora_lab.use(switched_off, None)
    assert _request(switched_off, TrainConfig(), 24, ALONE)["method"] == "full"


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
