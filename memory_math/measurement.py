"""Measure what a training step really holds in memory, to hold a prediction against it.

    with measure(saved=True) as m:
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    print(m.against(predict(model, batch_size=1, sequence_length=512)))      # predicted | measured | ratio

On the CPU the live bytes of every tensor storage are followed, operation by operation, from the moment the storage is made until Python
or autograd lets go of it; what a kernel allocates inside itself for the time of one call is not seen. While operations are followed,
autograd adds two gradients of one tensor into a third instead of in place, so the backward phase can read up to one such tensor high.
On CUDA the figures are those of PyTorch's caching allocator and of the driver. Models too big to hold are run by fake_runs.py; only
these two files of the room import torch.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import MemoryMathError
from .footprint import Footprint
from .report import comparison_table

UNDIVIDED = "forward and backward"  # what a GPU's allocator has for the two where nobody says which begins when


class Measurement:
    """The live and the peak bytes of the code inside ``with``; see `measure`.

    start_bytes: live when the block began (weights and whatever else existed). peak_bytes: the most that was live at once.
    end_bytes: live when it ended. by_phase: the peak within each phase; "forward", "backward" and "optimizer step" are told apart
    without help on the CPU, on CUDA only the optimizer's step is, and `phase(name)` names a stretch of one's own.
    saved_bytes: the most that autograd kept when a backward pass began, None where it was not asked for or there was none.
    reserved_bytes, used_bytes: on CUDA the most that torch's allocator had taken from the GPU, and what was in use on the whole GPU at the
    end, as nvidia-smi shows it: CUDA's context and other processes included. None on the CPU. source: where the figures come from.
    """

    def __init__(self, device: str, saved: bool = False) -> None:
        self.device = device
        self.source = "tensor storages alive, followed operation by operation" if device == "cpu" else "CUDA caching allocator"
        self.start_bytes = self.peak_bytes = self.end_bytes = 0
        self.by_phase: dict[str, int] = {}
        self.saved_bytes: int | None = None
        self.reserved_bytes: int | None = None
        self.used_bytes: int | None = None
        self._named: str | None = None
        self._in_steps = 0  # an optimizer may have others inside
        self._hooks: list[Any] = []
        self._watch: _StorageWatch | _CudaWatch = _StorageWatch(self) if device == "cpu" else _CudaWatch(self)
        self._saved = SavedTensors() if saved else None

    def phase(self, name: str | None) -> None:
        """From here on bytes are booked under `name`; None goes back to telling the phases apart automatically."""
        self._end_of_phase()
        self._named = name

    def current_phase(self) -> str:
        """The phase that the bytes of this moment belong to."""
        if self._named is not None:
            return self._named
        if self._in_steps:
            return "optimizer step"
        if self.device != "cpu":
            return UNDIVIDED
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def note(self, live_bytes: int) -> None:
        """Book `live_bytes` as alive now."""
        self.peak_bytes = max(self.peak_bytes, live_bytes)
        phase = self.current_phase()
        self.by_phase[phase] = max(self.by_phase.get(phase, 0), live_bytes)

    def against(self, predicted: Footprint) -> str:
        """The table predicted | measured | ratio; see `compare`."""
        return compare(predicted, self)

    def _stepping(self, inside: bool) -> None:
        self._end_of_phase()
        self._in_steps += 1 if inside else -1

    def _end_of_phase(self) -> None:
        """Book what is alive, or was since the last time; not where operations have done so and, between backward and step, no phase is on."""
        if self.device != "cpu" or self._named is not None or self._in_steps:
            self._watch.settle()

    def __enter__(self) -> Measurement:
        self.start_bytes = self.peak_bytes = self._watch.start()
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *_: self._stepping(True)),
            register_optimizer_step_post_hook(lambda *_: self._stepping(False)),
        ]
        if self._saved is not None:
            self._saved.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._saved is not None:
            self._saved.__exit__()
            self.saved_bytes, self._saved = self._saved.most_bytes, None
        for hook in self._hooks:
            hook.remove()
        self.end_bytes = self._watch.stop()

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.by_phase.items())
        beside = (("saved for backward", self.saved_bytes), ("reserved", self.reserved_bytes), ("used on the GPU", self.used_bytes))
        known = "".join(f", {name} {size / 2**20:.1f}" for name, size in beside if size is not None)
        return f"peak {self.peak_bytes / 2**20:.1f} MiB (start {self.start_bytes / 2**20:.1f}; {phases}{known}) by {self.source}"


class _StorageWatch(TorchDispatchMode):
    """Follows every storage on the CPU: counted when an operation returns it, discounted when it is freed.

    Inside a FakeTensorMode the storages of its tensors are followed instead: they have their size, and no memory.
    """

    def __init__(self, measurement: Measurement) -> None:
        super().__init__()
        self.measurement = measurement
        self.sizes: dict[int, int] = {}
        self.live_bytes = 0

    def start(self) -> int:
        fake = active_fake_mode()
        if fake is not None:
            self.measurement.source = "sizes of fake tensors alive, followed operation by operation"
        for tensor in existing_tensors(fake):
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
    """Reads the caching allocator's own peaks, and the driver; written against their documentation and not yet run on a GPU."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement

    def start(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.measurement.reserved_bytes = torch.cuda.memory_reserved()
        return torch.cuda.memory_allocated()

    def settle(self) -> None:
        self.measurement.note(torch.cuda.max_memory_allocated())
        self.measurement.reserved_bytes = max(self.measurement.reserved_bytes or 0, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> int:
        torch.cuda.synchronize()
        self.settle()
        self.measurement.used_bytes = used_on_gpu()
        return torch.cuda.memory_allocated()


def used_on_gpu() -> int:
    """Bytes in use on the current GPU by whoever, as nvidia-smi shows them; without NVML's Python package, as the CUDA runtime says."""
    try:
        return int(torch.cuda.device_memory_used())
    except (AttributeError, ImportError, RuntimeError):  # an older torch, no NVML package, or no driver that answers it
        free, total = torch.cuda.mem_get_info()
        return int(total - free)


def measure(step: Callable[[], object] | None = None, *, device: str | None = None, saved: bool = False) -> Measurement:
    """Run `step` once and return what it held, or, without `step`, return a context manager for code of one's own.

    device: "cpu" or "cuda"; None takes "cuda" where the process has already used a GPU, else "cpu".
    saved: also find `saved_bytes`, by way of saved_tensors_hooks, which code that asks for such hooks can notice.
    Call the first training step once before: it makes the optimizer's states, and from the second step on they are there from the start.

    >>> import torch
    >>> measure(lambda: torch.zeros(1024).sum()).peak_bytes >= 4096
    True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() and active_fake_mode() is None else "cpu"
    if device not in ("cpu", "cuda"):
        raise MemoryMathError(f'device={device!r}: measure follows "cpu" or "cuda"')
    if device == "cuda" and not torch.cuda.is_available():
        raise MemoryMathError("device='cuda': torch finds no GPU here; use device='cpu'")
    measurement = Measurement(device, saved)
    if step is not None:
        with measurement:
            step()
    return measurement


def saved_bytes(forward: Callable[[], object]) -> int:
    """The bytes autograd keeps for backward once `forward` has run: each storage once, parameters and buffers not counted.

    forward: runs the forward pass and returns something that keeps its graph alive (the loss).
    """
    with SavedTensors() as saved:
        result = forward()
    found = saved.now()
    del result
    return found


class SavedTensors:
    """What autograd keeps of the code inside ``with``: each storage once, parameters and buffers of any module not counted.

    most_bytes: the most there was when a backward pass began; None before the first one.
    Source: torch.autograd.graph.saved_tensors_hooks, which sees every tensor that a node of the graph saves, and takes out.
    """

    def __init__(self) -> None:
        self.most_bytes: int | None = None
        self._owned: dict[int, torch.UntypedStorage] = {}  # held, so that none of them goes and leaves its address to another tensor
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._grown = False
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedTensors:
        storages = (tensor.untyped_storage() for tensor in _parameters_and_buffers())
        self._owned = {storage._cdata: storage for storage in storages}
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def now(self) -> int:
        """The bytes kept at this moment."""
        storages = {packed.tensor.untyped_storage()._cdata: packed.tensor.untyped_storage().nbytes() for packed in self._kept}
        return sum(nbytes for storage, nbytes in storages.items() if storage not in self._owned)

    def _pack(self, tensor: torch.Tensor) -> _Kept:
        packed = _Kept(tensor.detach())  # a result that its own node keeps would otherwise keep the node, alive or not
        self._kept.add(packed)
        self._grown = True
        return packed

    def _unpack(self, packed: _Kept) -> torch.Tensor:
        """The first tensor taken out after others were put in: here a backward pass begins."""
        if self._grown:
            self.most_bytes, self._grown = max(self.most_bytes or 0, self.now()), False
        return packed.tensor


class _Kept:
    """One tensor as autograd keeps it; gone with the node that kept it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def existing_tensors(fake: FakeTensorMode | None = None) -> Iterable[torch.Tensor]:
    """Every tensor Python can reach, with the gradients of the leaves among them; of a FakeTensorMode, the tensors that are its own."""
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and _mode_of(item) is fake:  # torch.compile leaves fake tensors behind
            yield item
            if item.is_leaf and item.grad is not None:
                yield item.grad


def _mode_of(tensor: torch.Tensor) -> FakeTensorMode | None:
    return tensor.fake_mode if issubclass(type(tensor), FakeTensor) else None  # type: ignore[attr-defined]


def _parameters_and_buffers() -> Iterable[torch.Tensor]:
    for item in gc.get_objects():
        if issubclass(type(item), torch.nn.Module):
            yield from item.parameters(recurse=False)
            yield from item.buffers(recurse=False)


def compare(predicted: Footprint, measured: Measurement) -> str:
    """A prediction beside a measured step, with the ratio predicted / measured; the rows are those of `comparison`."""
    return comparison_table(comparison(predicted, measured))


def comparison(predicted: Footprint, measured: Measurement) -> list[tuple[str, int, int]]:
    """(what, predicted bytes, measured bytes): the start, the peak, what autograd keeps, a GPU's totals, then each phase, where known.

    A measurement that was not told where the loss begins books it under "forward"; so does this table then. Of reserved and nvidia-smi
    the prediction is an interval, and its estimate stands here.
    """
    rows = [("start", predicted.phases["load"], measured.start_bytes), ("peak", predicted.total, measured.peak_bytes)]
    if measured.saved_bytes is not None:
        rows.append(("saved for backward", predicted.saved_bytes, measured.saved_bytes))
    if predicted.reserved is not None and measured.reserved_bytes is not None:
        rows.append(("reserved", predicted.reserved.estimate, measured.reserved_bytes))
    if predicted.nvidia_smi is not None and measured.used_bytes is not None:
        rows.append(("nvidia-smi", predicted.nvidia_smi.estimate, measured.used_bytes))
    phases = _phases_as_booked(predicted.phases, measured.by_phase)
    return rows + [(phase, nbytes, measured.by_phase[phase]) for phase, nbytes in phases.items()]


def _phases_as_booked(predicted: dict[str, int], measured: dict[str, int]) -> dict[str, int]:
    """The predicted peaks of the phases that were measured; one that was measured under another's name counts there."""
    others = {"load": (), "optimizer step": (), "backward": (UNDIVIDED,)}
    found: dict[str, int] = {}
    for phase, nbytes in predicted.items():
        names = (phase, *others.get(phase, ("forward", UNDIVIDED)))
        if name := next((name for name in names if name in measured), None):
            found[name] = max(found.get(name, 0), nbytes)
    return found
