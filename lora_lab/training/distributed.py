"""Several processes train one model: each takes its micro-batches of every step, and the gradients are averaged among them.

    torchrun --nproc-per-node 4 train.py        # train.py calls `fit`, as it would alone

    ddp     every process holds the whole model; DistributedDataParallel averages gradients while backward makes them
    fsdp    every process holds a part of each weight, gradient and optimizer state (sharding.py)

A step has micro_batch_size * grad_accum_steps * processes rows, those that one process would take with so many times the grad_accum_steps: the
loss curve is the same. Sources: Li et al. 2020 (arXiv:2006.15704) for DDP, Zhao et al. 2023 (arXiv:2304.11277) for FSDP.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base_parameters import of_an_adapter
from ..errors import LoraLabError
from .dtensors import some_numbers

T = TypeVar("T")
KINDS = ("ddp", "fsdp")
START = "start the program with torchrun --nproc-per-node N"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it puts into each process's environment
SEEDS_APART = 1_000_003  # between the seeds of two processes


@dataclass(frozen=True)
class World:
    """The processes of a run, this one among them; alone, each method answers at once and nobody is asked.

    rank: 0 to size - 1.  control: the device whose tensors carry single numbers from process to process.
    """

    rank: int = 0
    size: int = 1
    control: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Random numbers differ by process, or all would drop the same activations."""
        return seed + SEEDS_APART * self.rank

    def mine(self, batches: Sequence[T]) -> list[tuple[T, bool]]:
        """This process's part of some batches, and whether each counts. Every process gets as many, as all have to take part in a backward pass:
        where they do not divide, some compute one that does not count.

        >>> [World(rank, 2).mine(["a", "b", "c"]) for rank in (0, 1)]
        [[('a', True), ('c', True)], [('b', True), ('a', False)]]
        """
        own = [(batch, True) for batch in batches[self.rank :: self.size]]
        return own + [(batches[0], False)] * (math.ceil(len(batches) / self.size) - len(own))

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes; whole numbers stay whole."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.control)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        return self.sum(flag)[0] > 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value, in the order of ranks."""
        everyone: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Put process 0's values into everyone's tensors."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, src=0)
            with torch.no_grad():
                tensor.copy_(values)

    def first_does(self, work: Callable[[], object]) -> None:
        """Process 0 does it while the others wait; where it fails, it has failed for all."""
        if self.size == 1:
            work()
            return
        failure = [""]
        if self.first:
            try:
                work()
            except LoraLabError as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0)
        if failure[0]:
            raise LoraLabError(failure[0])

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raise LoraLabError, in every process, where one was given something else than process 0."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for what in {**everyone[0], **theirs}:
                ours, its = everyone[0].get(what, "not there"), theirs.get(what, "not there")
                if ours != its:
                    raise LoraLabError(f"{what} is {its} in process {rank}, and {ours} in process 0: give every process the same")

    def leave(self) -> None:
        """End the process group, when all have come here: a process that hangs up earlier takes its neighbours' last messages with it."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What ends one process ends all: one that was left waiting raises what the first to fail said."""
        if self.size == 1:
            yield
            return
        key = f"lora_lab/{self.gather(uuid.uuid4().hex)[0]}"
        try:
            yield
        except BaseException as error:
            rank, said = self._first_failure(key, error)
            if rank != self.rank and isinstance(error, RuntimeError):  # what a broken connection raises
                raise LoraLabError(f"process {rank} stopped: {said}") from error
            raise

    def _first_failure(self, key: str, error: BaseException) -> tuple[int, str]:
        """(rank, message), kept where all processes look: the store they met at."""
        mine = (self.rank, str(error) or type(error).__name__)
        with contextlib.suppress(RuntimeError, ValueError):  # the store's own process may be the one that has gone
            rank, said = json.loads(dist.distributed_c10d._get_default_store().compare_set(key, "", json.dumps(mine)))
            return rank, said
        return mine


ALONE = World()


def world(device: Any = None) -> World:
    """The processes that torchrun started, or that share a process group made before; `ALONE` where there is only this one.

    device: that the model trains on (None: PyTorch's default).  The first call makes the process group: gloo for a CPU, for a GPU its own
    backend, NCCL for CUDA. It stays; torch.distributed.destroy_process_group() ends it.
    """
    if not dist.is_available() or not (dist.is_initialized() or _torchrun_started_several()):
        return ALONE
    place = torch.device(device or torch.get_default_device())
    if place.type != "cpu" and place.index is not None:
        torch.get_device_module(place).set_device(place)
    if not dist.is_initialized():
        dist.init_process_group(_backend(place.type))
    control = "cpu" if "gloo" in str(dist.get_backend_config()) else place.type
    return World(dist.get_rank(), dist.get_world_size(), control) if dist.get_world_size() > 1 else ALONE


def _torchrun_started_several() -> bool:
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def _backend(kind: str) -> str:
    """Tensors on a GPU go by its own backend; what processes agree on is a number on the CPU, which keeps no GPU waiting."""
    return "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def own_device(name: str | None) -> str | None:
    """A device by name; under torchrun "cuda" is this process's own GPU. Raises LoraLabError where all processes would take the same."""
    processes, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("LOCAL_RANK")
    if name is None or local_rank is None or processes == 1 or name == "cpu":
        return name
    if ":" in name:
        raise LoraLabError(f"device {name!r} for each of {processes} processes: give {name.partition(':')[0]!r}, and each takes its own")
    return f"{name}:{local_rank}"


# One weight, one value ----------------------------------------------------------------------------------------------------------


def agree_on_weights(model: nn.Module, everyone: World) -> None:
    """What trains, and adapters, become process 0's in every process; all else has to be the same already: some numbers of each are compared.

    Raises LoraLabError in every process where they are not.
    """
    drawn = {name: p for name, p in model.named_parameters() if p.requires_grad or of_an_adapter(name)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    everyone.check_alike({f"the weight {name!r}": _described(tensor, values=name not in drawn) for name, tensor in tensors.items()})
    everyone.share(drawn.values())


def _described(tensor: Tensor, values: bool) -> str:
    shape = f"{list(tensor.shape)} {tensor.dtype}"
    return f"{shape} with numbers like {hashlib.sha256(repr(some_numbers(tensor)).encode()).hexdigest()[:8]}" if values else shape


@contextlib.contextmanager
def same_random_numbers(everyone: World, seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block every process draws the same, for what has to come out alike in all of them."""
    if everyone.size == 1:
        yield
        return
    gpu = device.type != "cpu"
    with torch.random.fork_rng([device.index or 0] if gpu else [], device_type=device.type if gpu else "cuda"):
        torch.manual_seed(seed)
        yield


# DistributedDataParallel ----------------------------------------------------------------------------------------------------------


def data_parallel(model: nn.Module, everyone: World, probe: Callable[[], Any]) -> nn.Module:
    """The model in DistributedDataParallel, to be called in its place; gradients are the mean over processes.

    probe: gives the loss of a forward pass. A weight it does not depend on gets no gradient, and DDP has to be told to look for such; where there
    are none, looking would take time in every step.
    Buffers stay each process's own: codes of a quantised base would be sent in every step.
    """
    unused = everyone.any(not _reaches_all(probe(), [p for p in model.parameters() if p.requires_grad]))
    wrapper: Any = nn.parallel.DistributedDataParallel
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(wrapper).parameters else "broadcast_buffers"
    wrapped: nn.Module = wrapper(model, init_sync=False, gradient_as_bucket_view=True, find_unused_parameters=unused, **{buffers: False})
    return wrapped


def _reaches_all(loss: Any, parameters: list[nn.Parameter]) -> bool:
    """Whether each of them has a part in a loss."""
    waiting, seen = [getattr(loss, "grad_fn", None)], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return all(id(parameter) in reached for parameter in parameters)


def accumulating(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Under DDP only the last micro-batch of a step sends gradients, those of the earlier ones with its own."""
    waits = not last and isinstance(module, nn.parallel.DistributedDataParallel)
    return module.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]
