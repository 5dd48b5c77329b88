"""Every way to train gives the gradient: within a bound that its number format sets, of one computed in float64 from the definition.

The definition is transformers' Llama in float64, row by row and without padding, with ``W + scaling * B A`` (and so on) written into its weights.
Ours goes through `fit`: its precisions, its checkpointing, its batches and their accumulation. What is compared is what the optimizer is given:
all gradients as one vector, ``|g - g64| / |g64|``. The bounds stand in docs/explanation/precision.md.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lora_lab
import prompt_tuning_lab
from lora_lab.models.llama import LlamaConfig, LlamaForCausalLM
from lora_lab.training import fit

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip
BOUNDS = {"fp32": 1e-6, "fp16-mixed": 2e-3, "bf16-mixed": 1.6e-2, "bf16": 1.6e-2}  # of |g - g64| / |g64|: 16, 4, 4 and 4 units of rounding
BATCHES = {"one batch": {"micro_batch_size": 6}, "accumulated": {"micro_batch_size": 2, "grad_accum_steps": 3},
           "packed": {"micro_batch_size": 3, "grad_accum_steps": 2, "packing": True}}  # fmt: skip
AGAIN = (False, True, "attention")
Gradients = dict[str, Tensor]


def rows() -> list[dict[str, list[int]]]:
    """Six rows of 4 to 14 tokens, of which the first third have no label."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in (4, 14, 7, 9, 12, 5)]
    return [{"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :]} for ids in texts]


def base() -> LlamaForCausalLM:
    """With weights that every one of the formats holds exactly: where they are stored in 16 bit, nothing is lost."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict({**SHAPE, "model_type": "llama"}))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.requires_grad_(False)


# Ways to train, each with the weights it stands for ---------------------------------------------------------------------------------


def full(model: Any) -> Any:
    return model.requires_grad_(True)


def lora(model: Any, **options: Any) -> Any:
    """With updates that are small beside the weights, as training makes them."""
    lora_lab.inject(model, 4, alpha=8, init="random", **options)
    for layer in lora_lab.targets.lora_layers(model).values():
        layer.lora_B["default"].data *= 0.05
    return model


def dora(model: Any) -> Any:
    for layer in lora_lab.targets.lora_layers(lora(model, variant="dora")).values():
        changed = layer.weight + 2 * layer.lora_B["default"] @ layer.lora_A["default"]
        layer.lora_magnitude_vector["default"].data = changed.norm(dim=1) * torch.linspace(0.9, 1.1, len(changed))
    return model


def qlora(model: Any) -> Any:
    return lora(lora_lab.quantize(model, "nf4"))


def prompt(model: Any) -> Any:
    return prompt_tuning_lab.inject(model, 5, init="random", seed=1)


METHODS: dict[str, Callable[[Any], Any]] = {"full": full, "lora": lora, "dora": dora, "qlora": qlora, "prompt": prompt}


def merged(weight: Tensor, layer: str, trained: Gradients) -> Tensor:
    """``W + scaling B A``; DoRA's is ``m V / |V|`` of that V, the norm a constant (Liu et al. 2024, arXiv:2402.09353, section 4.3)."""
    A, B = (trained.get(f"{layer}.lora_{part}.default") for part in "AB")
    if A is None or B is None:
        return weight
    changed, magnitude = weight + 2 * B @ A, trained.get(f"{layer}.lora_magnitude_vector.default")
    return changed if magnitude is None else magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True).detach()


def reference(weights: Gradients, trained: Gradients, data: list[dict[str, list[int]]]) -> Gradients:
    """Of the mean loss over all labelled tokens. weights: of the base; trained: of the method, by name; both float64."""
    oracle = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attn_implementation="eager")).double()
    trained = {name: value.clone().requires_grad_() for name, value in trained.items()}
    changed = {name: trained.get(name, merged(value, name.removesuffix(".weight"), trained)) for name, value in weights.items()}
    before = next((value for name, value in trained.items() if value.ndim == 2 and name.startswith("tasks.")), torch.empty(0, 32).double())
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in data:
        words = F.embedding(torch.tensor(row["input_ids"]), changed["model.embed_tokens.weight"])
        inputs = {"inputs_embeds": torch.cat((before, words))[None], "use_cache": False}
        logits = torch.func.functional_call(oracle, changed, (), inputs).logits[0, len(before) :]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="sum")
        count += sum(label != -100 for label in row["labels"][1:])
    return dict(zip(trained, torch.autograd.grad(total / count, [*trained.values()]), strict=True))


def given_to_the_optimizer(model: nn.Module, config: dict[str, Any]) -> Gradients:
    """By name, in the first step of `fit`."""
    names, found = {id(p): name for name, p in model.named_parameters()}, {}

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        found.update({names[id(p)]: p.grad.double() for p in parameters if id(p) in names})

    handle = register_optimizer_step_pre_hook(look)
    try:
        fit(model, rows(), {"max_steps": 1, "learning_rate": 1e-3, "optimizer": "sgd", "max_grad_norm": None, "progress": False, **config})
    finally:
        handle.remove()
    return found


def distance(found: Gradients, wanted: Gradients) -> float:
    """``|g - g64| / |g64|``, all of them as one vector."""
    assert found.keys() == wanted.keys() and found
    ours, theirs = (torch.cat([gradients[name].flatten() for name in sorted(wanted)]) for gradients in (found, wanted))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> tuple[str, Any, Gradients]:
    """Name, a model that is ready to train, and the gradients in float64."""
    model = METHODS[request.param](base())
    frozen = lora_lab.dequantize(lora_lab.quantize(base(), "nf4")) if request.param == "qlora" else base()
    trained = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: p.detach().double() for name, p in frozen.named_parameters()}
    return request.param, model, reference(weights, trained, rows())


@pytest.mark.parametrize(("precision", "batches", "again"), itertools.product(BOUNDS, BATCHES, AGAIN))
def test_the_gradient_is_that_of_float64(method: tuple[str, Any, Gradients], precision: str, batches: str, again: bool | str) -> None:
    name, model, wanted = method
    if name == "prompt" and batches == "packed":
        pytest.skip("prompts are not packed: `fit` says so")
    found = given_to_the_optimizer(copy.deepcopy(model), {"precision": precision, "gradient_checkpointing": again, **BATCHES[batches]})
    assert distance(found, wanted) < BOUNDS[precision]


def test_the_bounds_are_not_wider_than_they_must_be(method: tuple[str, Any, Gradients]) -> None:
    """One label too many in 34 is outside all of them: they would notice a token that is counted twice."""
    _, model, wanted = method
    found = given_to_the_optimizer(copy.deepcopy(model), {"precision": "fp32", "micro_batch_size": 6})
    assert distance({name: gradient * 34 / 35 for name, gradient in found.items()}, wanted) > max(BOUNDS.values())


def test_the_page_on_precision_shows_these_bounds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "precision.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w-]+)` \| [\de.-]+ \| ([\de.-]+) \|", page, re.MULTILINE)
    assert {precision: float(bound) for precision, bound in shown} == BOUNDS
