"""fp32, bf16, bf16-mixed, fp16-mixed: which numbers are stored and which are multiplied.

    word          frozen weights   trained weights and their states   adapters   products
    fp32          as they are      as they are                        float32    as stored
    bf16          bfloat16         bfloat16, rounded by chance        float32    bfloat16
    bf16-mixed    bfloat16         float32 (masters)                  float32    bfloat16
    fp16-mixed    float16          float32 (masters)                  float32    float16, loss scaled

Frozen weights are stored in 16 bit in the mixed modes: autocast over a frozen float32 base would cast each weight in every step
and keep the cast for backward. The caller's own dtypes come back when training ends, frozen weights bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """frozen, trained: the dtype weights are stored in (None: as they are).  compute: autocast's dtype (None: off)."""

    frozen: torch.dtype | None = None
    trained: torch.dtype | None = None
    compute: torch.dtype | None = None
    scaled: bool = False

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=self.compute) if self.compute else contextlib.nullcontext()

    def scaler(self, device: torch.device, processes: int = 1) -> torch.amp.GradScaler:
        """Scales the loss so that float16 gradients do not vanish (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

        processes: by so many times less, as each process's loss is so many times its share of the step's (loop.py)."""
        return torch.amp.GradScaler(device.type, init_scale=2.0**16 / processes, enabled=self.scaled)


PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(frozen=torch.bfloat16, trained=torch.bfloat16, compute=torch.bfloat16),
    "bf16-mixed": Precision(frozen=torch.bfloat16, trained=torch.float32, compute=torch.bfloat16),
    "fp16-mixed": Precision(frozen=torch.float16, trained=torch.float32, compute=torch.float16, scaled=True),
}


def storage_dtype(precision: str) -> torch.dtype:
    """What to load a frozen base in, so that it need not be cast for training: 16 bit in all but fp32."""
    return PRECISIONS[precision].frozen or torch.float32


@contextlib.contextmanager
def stored_in(precision: Precision, model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside the block the model's weights are stored as `precision` says; afterwards in their own dtypes again.

    Frozen weights come back bit for bit (a copy waits on the CPU), trained ones with what they learned: from the moment on at which the block
    calls the function that it gets, before its first step. Adapters stay float32.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []

    def learning() -> None:
        """Trained weights need only their dtypes back from here on."""
        originals[:] = [(parameter, bits.new_empty(0) if parameter.requires_grad else bits) for parameter, bits in originals]

    try:
        for parameter, target in _casts(model, precision):
            originals.append((parameter, parameter.data.cpu()))
            parameter.data = parameter.data.to(target)
        yield learning
    finally:
        for parameter, original in originals:
            back = parameter.data if original.numel() != parameter.numel() else original
            parameter.data = back.to(parameter.device, original.dtype)


def store_in(precision: Precision, model: nn.Module) -> None:
    """Store the model's weights as `precision` says, for good."""
    for parameter, target in _casts(model, precision):
        parameter.data = parameter.data.to(target)


def dtypes_under(precision: Precision, model: nn.Module) -> dict[int, torch.dtype]:
    """By id, the weights that would be stored in another dtype than they are."""
    return {id(parameter): target for parameter, target in _casts(model, precision)}


def _casts(model: nn.Module, precision: Precision) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            target = precision.trained if parameter.requires_grad else precision.frozen
            if target == torch.float16 and getattr(module, "float32_instead_of_float16", False):
                target = torch.float32
            if getattr(module, "always_float32", False):
                target = torch.float32 if precision.compute or parameter.dtype.itemsize < 4 else None
            if target is not None and parameter.dtype != target:
                yield parameter, target


CLEARLY = 1.1  # times as fast


def fastest_precision(device: Any = None) -> str:
    """ "bf16-mixed" where this device multiplies bfloat16 clearly faster than float32, else "fp32": found out by trying, in under a second.

    Clearly is by a tenth: where both take as long, the same command would otherwise be another one now and then.
    """
    import time

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 1024, dtype=dtype, device=device)
        _wait(a @ a.T)
        started = time.perf_counter()
        for _ in range(10):
            _wait(a @ a.T)
        return time.perf_counter() - started

    return "bf16-mixed" if CLEARLY * seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


def _wait(result: Tensor) -> None:
    """GPUs answer before they are done; reading one number waits for them."""
    result[0, 0].item()
