"""LoRA layers, written by hand: ``y = W x + scaling * B A x`` (Hu et al. 2021, arXiv:2106.09685, equation 3).

        x ──┬────────── W [out, in], frozen ─────────────┬─(+)── y
            └── A [r, in] ── r numbers ── B [out, r] ────┘

A LoRA layer *is* the layer it adapts: `adapt` switches ``module.__class__`` to a class made of the mixin `LoRA` in front of
the module's own class. Identity, hooks, state-dict keys, ``isinstance`` and tied weights stay as they were. `LoRALinear` is
the same mixin as an ordinary class, to construct and to read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import LoraLabError, did_you_mean


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The dense update a LoRA pair stands for: ``scaling * B @ A``.

    lora_A: [r, in].  lora_B: [out, r].  Returns [out, in], in lora_A's dtype.
    Raises LoraLabError where the two disagree on r; both shapes are in the message.
    Source: Hu et al. 2021, section 4.1, equation 3.

    >>> lora_delta(torch.ones(2, 3), torch.ones(4, 2), scaling=0.5)[0, 0].item()
    1.0
    """
    if lora_A.shape[0] != lora_B.shape[1]:
        raise LoraLabError(f"lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}: expected A [r, in] and B [out, r] with one r")
    return scaling * lora_B @ lora_A


class AdapterParameters(nn.Module):
    """Parameters by adapter name, so that a state dict has ``<module>.lora_A.<adapter>``.

    Unlike nn.ParameterDict it takes any name ("keys" and "training" included): parameters are not attributes here.
    """

    always_float32 = True  # `fit` leaves these in float32 whatever the precision of the base

    def __init__(self) -> None:
        super().__init__()
        # nn.TransformerEncoderLayer's eval fast path reads linear1.weight without calling linear1; a hook anywhere inside turns it off
        self.register_forward_pre_hook(_never_called)

    def __getitem__(self, adapter: str) -> nn.Parameter:
        parameter = self._parameters[adapter]
        assert parameter is not None
        return parameter

    def __setitem__(self, adapter: str, parameter: nn.Parameter) -> None:
        self._parameters[adapter] = parameter

    def __delitem__(self, adapter: str) -> None:
        del self._parameters[adapter]

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {list(p.shape)}" for name, p in self._parameters.items() if p is not None)


def _never_called(module: nn.Module, inputs: Any) -> None:
    """AdapterParameters has no forward, so this never runs; that it is there is enough."""


class LoRA:
    """What every LoRA layer has, in front of the class it adapts.

    lora_A[name]: [r, in].  lora_B[name]: [out, r].  lora_scaling[name]: float.  lora_dropout[name]: float.
    lora_active: the adapters whose updates are added, in order; empty means the layer computes what it did before.
    """

    lora_base_class: type[nn.Module]
    lora_A: AdapterParameters
    lora_B: AdapterParameters
    lora_scaling: dict[str, float]
    lora_dropout: dict[str, float]
    lora_active: tuple[str, ...]
    training: bool

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input: [..., in].  Returns [..., out] in the base layer's dtype."""
        x = remember_selection(input, self.lora_active)
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        for adapter in self.lora_active:
            y = y + self.lora_update(adapter, x).to(y.dtype)
        return y

    def lora_update(self, adapter: str, x: Tensor) -> Tensor:
        """``scaling * B A x``: [..., in] -> [..., out]. Casts the small A and B to x's dtype, never x to theirs."""
        A, B = self.lora_A[adapter].to(x.dtype), self.lora_B[adapter].to(x.dtype)
        x = F.dropout(x, self.lora_dropout[adapter], self.training)
        return F.linear(self.lora_scaling[adapter] * F.linear(x, A), B)

    def lora_delta(self, adapter: str) -> Tensor:
        """``scaling * B @ A``: [out, in], whatever the orientation of the base weight."""
        return lora_delta(self.lora_A[adapter], self.lora_B[adapter], self.lora_scaling[adapter])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy: the class is made on the fly, so it travels as its base class."""
        base = type(self).lora_base_class
        if type(self) is not cast(type, lora_class(base)):  # somebody's own subclass of LoRALinear
            return super().__reduce_ex__(protocol)
        return _rebuild, (base,), dict(self.__dict__)


class LoRALinear(LoRA, nn.Linear):
    """An nn.Linear with one LoRA adapter called "default"; the rest of the layer is frozen.

    in_features, out_features: of the base.  rank: r >= 1.  alpha: the scaling is alpha / rank (None: alpha = rank).
    Raises LoraLabError for a rank below 1.

    >>> layer = LoRALinear(512, 64, rank=8)
    >>> layer.weight.numel(), layer.lora_A["default"].numel() + layer.lora_B["default"].numel()
    (32768, 4608)
    """

    lora_base_class = nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int = 8, *, alpha: float | None = None, dropout: float = 0.0,
                 bias: bool = True, init: str = "kaiming", device: Any = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        check_numbers(rank, alpha, dropout, init)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.requires_grad_(False)
        attach(self, "default", new_pair(self, rank, init), (rank if alpha is None else alpha) / rank, dropout)
        self.lora_active = ("default",)


# Which layers can be adapted, and how ---------------------------------------------------------------------------------------


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2's linear layer, weight stored [in, out]), recognised without importing it."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(module).__mro__)


def is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an adaptable layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_conv1d(module):
        return weight.shape[0], weight.shape[1]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


_CLASSES: dict[type, type[nn.Module]] = {nn.Linear: LoRALinear}


def lora_class(base: type) -> type[nn.Module]:
    """The class `base` with `LoRA` in front of it; one per base class, so that isinstance and pickle agree."""
    if base not in _CLASSES:
        _CLASSES[base] = _new_class(base)
    return _CLASSES[base]


def _new_class(base: type) -> type[nn.Module]:
    return type(f"LoRA{base.__name__}", (LoRA, base), {"lora_base_class": base, "__module__": __name__, "__doc__": base.__doc__})


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = lora_class(base)
    return cls.__new__(cls)


def adapt(module: Any) -> None:
    """Switch a layer to its LoRA class, with no adapter yet: it computes exactly what it did."""
    if not isinstance(module, LoRA):
        module.__class__ = lora_class(type(module))
    if "lora_A" not in module._modules:
        module.lora_A, module.lora_B = AdapterParameters(), AdapterParameters()
        module.lora_scaling, module.lora_dropout, module.lora_active = {}, {}, ()


def restore(module: Any) -> None:
    """Undo `adapt`: the class the layer had, and no trace of its adapters."""
    del module.lora_A, module.lora_B, module.lora_scaling, module.lora_dropout, module.lora_active
    module.__class__ = type(module).lora_base_class


def new_pair(module: nn.Module, rank: int, init: str = "kaiming", dtype: torch.dtype | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """A [rank, in] and B [out, rank] for a layer, on its device; dtype None: see `adapter_dtype`."""
    (fan_in, fan_out), weight = layer_shape(module), module.weight
    assert isinstance(weight, Tensor)
    dtype = dtype or adapter_dtype(weight.dtype)
    A = torch.empty(check_rank(rank), fan_in, device=weight.device, dtype=dtype)
    B = torch.empty(fan_out, rank, device=weight.device, dtype=dtype)
    INITIALISATIONS[init](A, B)
    return nn.Parameter(A), nn.Parameter(B)


def attach(module: nn.Module, adapter: str, pair: tuple[nn.Parameter, nn.Parameter], scaling: float, dropout: float = 0.0) -> None:
    """Give a layer one more adapter, not yet active."""
    adapt(module)
    assert isinstance(module, LoRA)
    module.lora_A[adapter], module.lora_B[adapter] = pair
    module.lora_scaling[adapter], module.lora_dropout[adapter] = scaling, dropout


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """float32 on a 16-bit or quantised base (small updates vanish in 16 bit), else the base's own."""
    return base if base in (torch.float32, torch.float64) else torch.float32


def check_rank(rank: Any) -> int:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise LoraLabError(f"rank={rank!r}: expected a whole number of at least 1 (8 is a good start)")
    return rank


def check_alpha(alpha: Any, name: str = "alpha") -> None:
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha)):
        raise LoraLabError(f"{name}={alpha!r}: expected a finite number (alpha = rank gives a scaling of 1)")


def check_numbers(rank: Any, alpha: Any, dropout: Any, init: Any) -> None:
    """Raise LoraLabError for the first of an adapter's numbers that makes no sense."""
    check_rank(rank)
    check_alpha(alpha)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise LoraLabError(f"dropout={dropout!r}: expected 0 <= dropout < 1")
    if init not in INITIALISATIONS:
        raise LoraLabError(f"init={init!r}: expected one of {', '.join(INITIALISATIONS)}{did_you_mean(str(init), INITIALISATIONS)}")


# Initialisations: all but "random" start from a zero update (Hu et al. 2021, section 4.1) ------------------------------------


def _kaiming(A: Tensor, B: Tensor) -> None:
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # what nn.Linear does, and loralib and PEFT after it
    nn.init.zeros_(B)


def _gaussian(A: Tensor, B: Tensor) -> None:
    nn.init.normal_(A, std=1 / A.shape[0])
    nn.init.zeros_(B)


def _random(A: Tensor, B: Tensor) -> None:
    """Both non-zero, so that a test sees what the adapter does."""
    nn.init.normal_(A, std=1 / math.sqrt(A.shape[1]))
    nn.init.normal_(B, std=1 / math.sqrt(A.shape[0]))


INITIALISATIONS = {"kaiming": _kaiming, "gaussian": _gaussian, "random": _random}


# The selection of adapters belongs to the forward pass -----------------------------------------------------------------------


def remember_selection(x: Tensor, active: tuple[str, ...]) -> Tensor:
    """Under (non-reentrant) checkpointing, make backward fail where the recompute ran with other adapters than the forward.

    Otherwise ``with disabled(model): loss = model(x).sum()`` followed by ``loss.backward()`` gives wrong gradients without a
    word. lora_lab's own models restore the selection for the recompute; a foreign model cannot, so it gets an error.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad and _saved_tensor_hooks_are_set()):
        return x
    return _SelectionCheck.apply(x, torch.tensor(hash(active)), active)


def _saved_tensor_hooks_are_set() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _SelectionCheck(torch.autograd.Function):
    """Identity. What it saves as a tensor is recomputed by checkpointing, what it keeps on ctx is not: backward compares."""

    @staticmethod
    def forward(x: Tensor, stamp: Tensor, active: tuple[str, ...]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, stamp, ctx.active = inputs
        ctx.save_for_backward(stamp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if int(ctx.saved_tensors[0]) != hash(ctx.active):
            raise LoraLabError(
                f"gradient checkpointing recomputed a layer with other adapters than its forward pass had ({list(ctx.active)}): "
                "call backward() inside the same disabled(...) or use(...) as the forward pass"
            )
        return grads[0], None, None
