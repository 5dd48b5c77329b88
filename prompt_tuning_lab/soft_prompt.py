"""A task as a few trained vectors: what a prompt of words would be, if words could be anything.

    model([prompt; embed(text)])        prompt: [P, H], trained; the model and its embedding stay as they are

`Prompt` is what every method has in common; `SoftPrompt` is the plain one.
Source: Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError


class Prompt(nn.Module):
    """A task beside a frozen model: a module whose call gives what is inserted for it. P virtual tokens.

    What is inserted is made anew in each forward pass, so a method with a network of its own (prefix.py, reparameterization.py) is
    a Prompt whose forward runs it. Parameters stay float32, or float64, when the model goes to 16 bit: that rounds small updates away.
    placement: where rows go, see insertion.py.  initialization: the record of how it began (initialization.py), where `inject` made it.
    hidden_size: of the network that makes it; None of a plain one.
    """

    method: ClassVar[str]
    num_virtual_tokens: int
    placement: str = "front"
    hidden_size: int | None = None
    initialization: Any = None

    @property
    def began_with(self) -> list[str]:
        """Names of what a resumed run puts back beside the weights of a prompt that trains: see lora_lab.training.state."""
        trains = any(parameter.requires_grad for parameter in self.parameters())
        return ["initial"] if trains and isinstance(getattr(self, "initial", None), Tensor) else []

    def forward(self) -> Tensor:
        """What is inserted: [P, H] rows before the text, or of a prefix [L, 2, P, N, D] keys and values."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prompt:
        """What .to(), .cuda(), .half() and .bfloat16() call."""

        def never_narrower(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < torch.float32.itemsize else moved

        return super()._apply(never_narrower, recurse)


class SoftPrompt(Prompt):
    """P rows of the model's embedding width H, trained as they are.

    weight: [P, H]; its values are copied into a float32 Parameter.  `initial` keeps them, to tell later how far the prompt has gone.
    Raises LoraLabError for a weight that is no matrix of finite numbers.

    >>> prompt = SoftPrompt(torch.ones(20, 512))
    >>> prompt.num_virtual_tokens, prompt().shape, sum(parameter.numel() for parameter in prompt.parameters())
    (20, torch.Size([20, 512]), 10240)
    """

    method: ClassVar[str] = "prompt"
    initial: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        check_rows(weight, "weight")
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.register_buffer("initial", self.weight.detach().clone(), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:  # type: ignore[override]
        return len(self.weight)

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, hidden_size={self.weight.shape[1]}"


def check_rows(weight: Tensor, name: str) -> None:
    """Raise LoraLabError for what cannot be a prompt: [P, H] of finite numbers, P at least 1."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        given = list(weight.shape) if isinstance(weight, Tensor) else weight
        raise LoraLabError(f"{name} is {given!r:.80}, expected a tensor of numbers [num_virtual_tokens, hidden_size]")
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise LoraLabError(f"{name} holds a NaN or an infinity: a prompt of it would make every output NaN")
