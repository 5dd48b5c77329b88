"""What is asked of `predict`, checked: everything that is not modelled is refused here, by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .architectures import Architecture, LinearLayer
from .errors import MemoryMathError
from .optimizers import IMPLEMENTATIONS, optimizer_of
from .precision import Precision, precision_of

METHODS = ("full", "lora", "inference")
ATTENTIONS = {"transformers": ("eager", "sdpa", "flash"), "lora_lab": ("sdpa",)}
LOSSES = {"transformers": ("cross_entropy",), "lora_lab": ("chunked",)}
DEVICES = ("cuda", "cpu")
NOT_YET = {  # keyword -> the one value that is modelled today
    "quantization": "none",
    "num_virtual_tokens": 20,
    "adapter_dtype": None,
    "zero_stage": 0,
    "world_size": 1,
    "tensor_parallel": 1,
    "compile": False,
    "versions": None,
}


@dataclass(frozen=True)
class Request:
    """A checked request; `adapted` maps the path of every linear layer with an adapter to its shape."""

    architecture: Architecture
    method: str
    precision: Precision
    optimizer: str
    optimizer_implementation: str
    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    attention: str
    loss: str
    rank: int
    dropout: float
    grad_accum_steps: int
    implementation: str
    device: str
    label_tokens: int
    adapted: dict[str, LinearLayer] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """T: positions in one micro-batch."""
        return self.batch_size * self.sequence_length

    @property
    def trains(self) -> bool:
        return self.method != "inference"


def check(architecture: Architecture, **asked: Any) -> Request:
    """The request, or MemoryMathError with the value, what is supported and what to do."""
    for name, modelled in NOT_YET.items():
        if (value := asked.pop(name)) != modelled:
            raise MemoryMathError(f"{name}={value!r} is not modelled yet: leave it at {modelled!r}")
    asked["implementation"] = implementation = one_of("implementation", asked["implementation"], ATTENTIONS)
    asked["device"] = one_of("device", asked["device"], DEVICES)
    asked["method"] = one_of("method", asked["method"], METHODS)
    asked["precision"] = precision_of(asked["precision"])
    asked["optimizer_implementation"] = _step_kind(asked["optimizer_implementation"], implementation, asked["device"])
    asked["attention"] = one_of("attention", asked["attention"], ATTENTIONS[implementation], implementation)
    asked["loss"] = one_of("loss", asked["loss"] or LOSSES[implementation][0], LOSSES[implementation], implementation)
    for name in ("batch_size", "sequence_length", "rank", "grad_accum_steps"):
        asked[name] = whole(name, asked[name])
    asked["gradient_checkpointing"] = _flag("gradient_checkpointing", asked["gradient_checkpointing"])
    asked["dropout"] = _share(asked["dropout"])
    asked["label_tokens"] = _labels(asked["label_tokens"], asked["batch_size"], asked["sequence_length"])
    targets = asked.pop("target_modules")
    adapted = adapted_layers(architecture, targets) if asked["method"] == "lora" else {}
    request = Request(architecture=architecture, adapted=adapted, **asked)
    _check_together(request)
    return request


def _check_together(request: Request) -> None:
    """Combinations that would do nothing, or that no kernel exists for."""
    optimizer_of(request.optimizer)
    precision, method = request.precision.name, request.method
    if precision == "fp16" and method == "full":
        raise MemoryMathError("precision='fp16' with method='full': weights do not train in pure fp16; use 'fp16-mixed' (or 'bf16')")
    if request.attention == "flash" and request.precision.compute != 2:
        raise MemoryMathError(f"attention='flash' with precision={precision!r}: the kernel takes 16-bit inputs only; use 'sdpa'")
    if request.attention == "flash" and request.device == "cpu":
        raise MemoryMathError("attention='flash' with device='cpu': the kernel runs on CUDA only; use 'sdpa'")
    if request.dropout and method != "lora":
        raise MemoryMathError(f"dropout={request.dropout} is LoRA's dropout and does nothing with method={method!r}: leave it at 0")
    if request.label_tokens != request.batch_size * (request.sequence_length - 1) and request.implementation != "lora_lab":
        raise MemoryMathError("label_tokens is for implementation='lora_lab': transformers computes the logits of every position")
    if method == "inference":
        _check_inference(request)


def _check_inference(request: Request) -> None:
    labelled = request.batch_size * (request.sequence_length - 1)
    for name, idle in (("gradient_checkpointing", False), ("grad_accum_steps", 1), ("label_tokens", labelled)):
        if (value := getattr(request, name)) != idle:
            raise MemoryMathError(f"{name}={value!r} does nothing with method='inference', which has no backward pass: leave it out")


def adapted_layers(architecture: Architecture, targets: object) -> dict[str, LinearLayer]:
    """Path -> layer for every layer that `targets` names: "all-linear", "attention", or a list of names matched at dots from the right."""
    linears = architecture.linears()
    if targets == "all-linear":
        chosen = list(linears)
    elif targets == "attention":
        chosen = [linear for linear in linears if linear.name.startswith("self_attn.")]
    elif isinstance(targets, Sequence) and not isinstance(targets, str):
        chosen = _named(linears, list(targets))
    else:
        raise MemoryMathError(f"target_modules={targets!r}: expected 'all-linear', 'attention', or a list like ['q_proj', 'v_proj']")
    return {f"model.layers.{layer}.{linear.name}": linear for layer in range(architecture.layers) for linear in chosen}


def _named(linears: Sequence[LinearLayer], names: list[str]) -> list[LinearLayer]:
    short = [linear.name.rpartition(".")[2] for linear in linears]
    here = f"\n  Linear layers of a block here: {', '.join(short)}"
    for name in names:
        if not any(_matches(name, linear.name) for linear in linears):
            raise MemoryMathError(f"target_modules={names!r}: {name!r} matches nothing.{here}{_near(name, short)}")
    if not names:
        raise MemoryMathError(f"target_modules=[] names no layer.{here}")
    return [linear for linear in linears if any(_matches(name, linear.name) for name in names)]


def _matches(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _near(value: object, choices: Collection[str]) -> str:
    near = get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def one_of(name: str, value: Any, choices: Collection[str], implementation: str | None = None) -> str:
    """`value` where it is among `choices`, which may be those of one implementation."""
    if value not in list(choices):
        whose = f" with implementation={implementation!r}" if implementation else ""
        raise MemoryMathError(f"{name}={value!r} is not modelled{whose}; modelled now: {', '.join(choices)}{_near(value, choices)}")
    return str(value)


def whole(name: str, value: Any) -> int:
    """`value` where it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MemoryMathError(f"{name}={value!r}: expected a whole number of at least 1")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MemoryMathError(f"{name}={value!r}: expected True or False")
    return value


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise MemoryMathError(f"dropout={value!r}: expected a number with 0 <= dropout < 1")
    return float(value)


def _labels(value: Any, batch: Any, sequence: Any) -> int:
    """None: every position that has a next one."""
    most = whole("batch_size", batch) * (whole("sequence_length", sequence) - 1)
    if value is None:
        return most
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise MemoryMathError(f"label_tokens={value!r}: expected a whole number from 0 to {most}, batch_size * (sequence_length - 1)")
    return value


def _step_kind(value: Any, implementation: str, device: str) -> str:
    """None: what the loop takes; lora_lab asks for fused, torch.optim left alone takes foreach on CUDA and the plain loop on the CPU."""
    if value is None:
        return "fused" if implementation == "lora_lab" else "foreach" if device == "cuda" else "for-loop"
    return one_of("optimizer_implementation", value, IMPLEMENTATIONS)
