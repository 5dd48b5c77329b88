"""Calling an autograd Function without what it costs where it does not matter: a step of a small model calls hundreds of them."""

from __future__ import annotations

from typing import Any

import torch

from .autocast import is_eager


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` of a Function whose inputs are all given by place.

    Without gradients the forward alone, which spares a token of generation a sixth of its time. In eager mode past `Function.apply` of
    torch.autograd, which reads forward's signature at every call, to fill in defaults.
    """
    if not torch.is_grad_enabled():
        return function.forward(*inputs)
    if is_eager():
        return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]
    return function.apply(*inputs)
