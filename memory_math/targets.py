"""Which linear layers an adapter request names: the same words as lora_lab.inject and PEFT."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from .architectures import Architecture, LinearLayer
from .errors import MemoryMathError


def adapted_layers(architecture: Architecture, targets: object) -> dict[str, LinearLayer]:
    """Path -> layer for every layer that `targets` names: "all-linear", "attention", or a list of names matched at dots from the right."""
    if targets == "all-linear":
        chosen = architecture.linears()
    elif targets == "attention":
        chosen = tuple(tensor.linear for tensor in architecture.tensors() if tensor.linear is not None and tensor.in_attention)
    elif isinstance(targets, Sequence) and not isinstance(targets, str):
        chosen = _named(architecture.linears(), list(targets))
    else:
        raise MemoryMathError(f"target_modules={targets!r}: expected 'all-linear', 'attention', or a list like ['q_proj', 'v_proj']")
    return {linear.name: linear for linear in chosen}


def _named(linears: Sequence[LinearLayer], names: list[str]) -> tuple[LinearLayer, ...]:
    short = list(dict.fromkeys(linear.name.rpartition(".")[2] for linear in linears))
    here = f"\n  Linear layers here: {', '.join(short)}"
    for name in names:
        if not any(_matches(name, linear.name) for linear in linears):
            raise MemoryMathError(f"target_modules={names!r}: {name!r} matches nothing.{here}{near(name, short)}")
    if not names:
        raise MemoryMathError(f"target_modules=[] names no layer.{here}")
    return tuple(linear for linear in linears if any(_matches(name, linear.name) for name in names))


def _matches(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def near(value: object, choices: Collection[str]) -> str:
    """" (did you mean ...?)", or nothing."""
    found = get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
