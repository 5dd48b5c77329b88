"""Measure what a training step really holds in memory, to hold a prediction against it.

    with measure() as m:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    print(m.peak_bytes, m.by_phase)

On the CPU the live bytes of every tensor storage are followed, operation by operation, from the moment the storage is made until Python
or autograd lets go of it; what a kernel allocates inside itself for the time of one call is not seen. While operations are followed,
autograd adds two gradients of one tensor into a third instead of in place, so the backward phase can read up to one such tensor high.
On CUDA the figures are those of PyTorch's caching allocator (``max_memory_allocated``). Only this file of the room imports torch.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import MemoryMathError
from .footprint import Footprint
from .report import comparison_table


class Measurement:
    """The live and the peak bytes of the code inside ``with``; see `measure`.

    start_bytes: live when the block began (weights and whatever else existed). peak_bytes: the most that was live at once.
    end_bytes: live when it ended. by_phase: the peak within each phase; "forward", "backward" and "optimizer step" are told apart
    without help, and `phase(name)` names a stretch of one's own. source: where the figures come from.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.source = "tensor storages alive, followed operation by operation" if device == "cpu" else "CUDA caching allocator"
        self.start_bytes = self.peak_bytes = self.end_bytes = 0
        self.by_phase: dict[str, int] = {}
        self._named: str | None = None
        self._in_step = False
        self._hooks: list[Any] = []
        self._watch: _StorageWatch | _CudaWatch = _StorageWatch(self) if device == "cpu" else _CudaWatch(self)

    def phase(self, name: str | None) -> None:
        """From here on bytes are booked under `name`; None goes back to telling the phases apart automatically."""
        self._watch.settle()
        self._named = name

    def current_phase(self) -> str:
        """The phase that the bytes of this moment belong to."""
        if self._named is not None:
            return self._named
        if self._in_step:
            return "optimizer step"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def note(self, live_bytes: int) -> None:
        """Book `live_bytes` as alive now."""
        self.peak_bytes = max(self.peak_bytes, live_bytes)
        phase = self.current_phase()
        self.by_phase[phase] = max(self.by_phase.get(phase, 0), live_bytes)

    def _stepping(self, inside: bool) -> None:
        self._watch.settle()
        self._in_step = inside

    def __enter__(self) -> Measurement:
        self.start_bytes = self.peak_bytes = self._watch.start()
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._stepping(True)),
            register_optimizer_step_post_hook(lambda *_: self._stepping(False)),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.end_bytes = self._watch.stop()

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.by_phase.items())
        return f"peak {self.peak_bytes / 2**20:.1f} MiB (start {self.start_bytes / 2**20:.1f}; {phases}) by {self.source}"


class _StorageWatch(TorchDispatchMode):
    """Follows every storage on the CPU: counted when an operation returns it, discounted when it is freed."""

    def __init__(self, measurement: Measurement) -> None:
        super().__init__()
        self.measurement = measurement
        self.sizes: dict[int, int] = {}
        self.live_bytes = 0

    def start(self) -> int:
        for tensor in existing_tensors():
            self.see(tensor)
        self.__enter__()
        return self.live_bytes

    def stop(self) -> int:
        self.__exit__(None, None, None)
        return self.live_bytes

    def settle(self) -> None:
        self.measurement.note(self.live_bytes)

    def see(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return  # sparse and wrapper tensors own no storage of their own
        key, size = storage._cdata, storage.nbytes()
        known = self.sizes.get(key)
        if known is None:
            weakref.finalize(storage, self.freed, key).atexit = False
        if known != size:
            self.sizes[key] = size
            self.live_bytes += size - (known or 0)

    def freed(self, key: int) -> None:
        self.live_bytes -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            self.see(tensor)
        if tensors:
            self.settle()
        return result


class _CudaWatch:
    """Reads the caching allocator's own peak; written against its documentation and not yet run on a GPU."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement

    def start(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def settle(self) -> None:
        self.measurement.note(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> int:
        torch.cuda.synchronize()
        self.settle()
        return torch.cuda.memory_allocated()


def measure(step: Callable[[], object] | None = None, *, device: str | None = None) -> Measurement:
    """Run `step` once and return what it held, or, without `step`, return a context manager for code of one's own.

    device: "cpu" or "cuda"; None takes "cuda" where the process has already used a GPU, else "cpu".
    Call the first training step once before: it makes the optimizer's states, and from the second step on they are there from the start.

    >>> import torch
    >>> measure(lambda: torch.zeros(1024).sum()).peak_bytes >= 4096
    True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
    if device not in ("cpu", "cuda"):
        raise MemoryMathError(f'device={device!r}: measure follows "cpu" or "cuda"')
    measurement = Measurement(device)
    if step is not None:
        with measurement:
            step()
    return measurement


def saved_bytes(forward: Callable[[], object]) -> int:
    """The bytes autograd keeps for backward once `forward` has run: each storage once, parameters and buffers not counted.

    forward: runs the forward pass and returns something that keeps its graph alive (the loss).
    Source: torch.autograd.graph.saved_tensors_hooks, which sees every tensor that a node of the graph saves.
    """
    owned = {tensor.untyped_storage()._cdata for tensor in _parameters_and_buffers()}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        packed = _Kept(tensor)
        kept.add(packed)
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        result = forward()
    storages = {packed.tensor.untyped_storage()._cdata: packed.tensor.untyped_storage().nbytes() for packed in kept}
    del result
    return sum(nbytes for storage, nbytes in storages.items() if storage not in owned)


class _Kept:
    """One tensor as autograd keeps it; gone with the node that kept it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def existing_tensors() -> Iterable[torch.Tensor]:
    """Every tensor Python can reach, with the gradients of the leaves among them."""
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and not issubclass(type(item), FakeTensor):  # torch.compile leaves some behind
            yield item
            if item.is_leaf and item.grad is not None:
                yield item.grad


def _parameters_and_buffers() -> Iterable[torch.Tensor]:
    for item in gc.get_objects():
        if issubclass(type(item), torch.nn.Module):
            yield from item.parameters(recurse=False)
            yield from item.buffers(recurse=False)


def compare(predicted: Footprint, measured: Measurement) -> str:
    """A prediction beside a measured step: start, peak and each phase, with the ratio predicted / measured.

    A measurement that was not told where the loss begins books it under "forward"; so does this table then.
    """
    phases = dict(predicted.phases)
    rows = [("start", phases.pop("load"), measured.start_bytes), ("peak", predicted.total, measured.peak_bytes)]
    if "loss" in phases and "loss" not in measured.by_phase:
        phases["forward"] = max(phases["forward"], phases.pop("loss"))
    known = [phase for phase in phases if phase in measured.by_phase]
    return comparison_table(rows + [(phase, phases[phase], measured.by_phase[phase]) for phase in known])
