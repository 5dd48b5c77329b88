"""Small T5s: transformers' and ours from the same random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from llama_tools import gradients, relative_error
from torch.testing import assert_close

from lora_lab.models.loading import build

transformers.logging.set_verbosity_error()

VOCABULARY = 67
PAD, EOS = 0, 1
PLAIN = {"vocab_size": VOCABULARY, "d_model": 30, "d_kv": 7, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3,
         "decoder_start_token_id": PAD, "dropout_rate": 0.0}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {**GATED, "own_head": True},
    "flan": {**GATED, "own_head": True, "num_layers": 3, "num_decoder_layers": 1, "d_kv": 12, "num_heads": 2, "layer_norm_epsilon": 1e-2},
    "few buckets": {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 5},
    "odd buckets, equal depths": {"relative_attention_num_buckets": 11, "relative_attention_max_distance": 40, "num_decoder_layers": None},
    "gated silu": {"feed_forward_proj": "gated-silu"},
    "1.1 that transformers 5 made": GATED,
    "mt5": {"family": "MT5", "own_head": True},
    "mt5 that transformers 5 made": {"family": "MT5"},
}  # fmt: skip


def theirs(shape: str = "1.0", **changes: Any) -> Any:
    """transformers' model in eval mode, every parameter random; own_head: with a head of its own, as in the checkpoints of 1.1 (transformers 5
    ties whatever it makes from a config)."""
    given = {**PLAIN, **SHAPES[shape], **changes}
    family, own_head = given.pop("family", "T5"), given.pop("own_head", False)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(getattr(transformers, f"{family}Config")(**given)).eval()
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return randomised(model)


@torch.no_grad()
def randomised(model: Any, std: float = 0.3) -> Any:
    for name, parameter in model.named_parameters():
        parameter.normal_(std=std)
        if name.endswith("norm.weight"):
            parameter.add_(1.0)
    return model


def stored(model: Any) -> dict[str, torch.Tensor]:
    """What a file of this model holds: a head only where it is not the embedding."""
    tied = model.lm_head.weight is model.shared.weight
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def ours(model: Any) -> Any:
    """Our model with the weights of transformers' and the config it would save."""
    return build({**model.config.to_dict(), "architectures": [type(model).__name__]}, stored(model).items(), None, None)


def pair(shape: str = "1.0", **changes: Any) -> tuple[Any, Any]:
    model = theirs(shape, **changes)
    return ours(model), model


def ids(batch: int = 3, length: int = 13) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


def logits_of(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def assert_same(mine: Any, reference: Any, labels: torch.Tensor, tolerance: float = 1e-4, **inputs: Any) -> None:
    """Logits, loss and every gradient of two models, each relative to the largest value."""
    both = (mine, reference)
    logits = [logits_of(model, labels=labels, **inputs)[labels != -100] for model in both]
    assert relative_error(*logits) < tolerance
    losses = [model.train()(labels=labels, **inputs).loss for model in both]
    assert_close(*losses, rtol=tolerance, atol=tolerance)
    slopes = [gradients(model, loss) for model, loss in zip(both, losses, strict=True)]
    assert slopes[0].keys() == slopes[1].keys() == dict(mine.named_parameters()).keys()
    for name, slope in slopes[0].items():
        assert relative_error(slope, slopes[1][name]) < tolerance, name
        assert slope.abs().max() > 0, name
    mine.eval(), reference.eval()
