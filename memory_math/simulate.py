"""One training step, or one prompt, on the ledger: weights, forward, loss, backward, optimizer step."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import MemoryMathError
from .hardware import CUBLAS_BYTES
from .models import MODELS
from .models.base import Model
from .operations import Weight
from .optimizers import Shape, state_sizes, step_sizes
from .parallel import communication_bytes
from .request import Request
from .tape import Ledger, Storage


@dataclass(frozen=True)
class Simulation:
    """The ledger after the step, with what is known beside it: kept_by_name as in `Tape`, and the model's counts."""

    ledger: Ledger
    kept_by_name: dict[str, int]
    parameters: int
    trained: int


def model_of(request: Request, ledger: Ledger) -> Model:
    """The model of the request's family, as the implementation asked for writes it."""
    family, implementation = request.architecture.family, request.implementation
    if (implementation, family) not in MODELS:
        known = ", ".join(sorted(name for owner, name in MODELS if owner == implementation))
        raise MemoryMathError(f"{request.architecture.name}: {family!r} is not modelled with implementation={implementation!r}, only {known}")
    _check_shape(request)
    return MODELS[implementation, family](request, ledger)


def _check_shape(request: Request) -> None:
    """What a model of this shape cannot be asked for, or what is not written down for it."""
    arch, longest = request.architecture, request.architecture.learned_positions
    if arch.family in ("llama", "mixtral") and arch.task != "ForCausalLM":
        raise MemoryMathError(f"{arch.name} as {arch.task} is not modelled: of {arch.family}, only ForCausalLM is")
    if arch.family in ("llama", "mixtral") and arch.attention_dropout and request.trains:
        raise MemoryMathError(f"{arch.name}: attention_dropout={arch.attention_dropout} is not modelled for {arch.family}: set it to 0")
    if longest is not None and request.prefix + request.positions > longest:
        virtual = ", the virtual tokens included" if request.virtual else ""
        raise MemoryMathError(f"sequence_length={request.sequence_length}: {arch.name} has {longest} learned positions{virtual}")


def simulate(request: Request, ledger: Ledger | None = None) -> Simulation:
    """Run `request` on a fresh ledger. Training is in its steady state: the second step, when the optimizer has its states."""
    ledger = ledger or Ledger()
    model = model_of(request, ledger)
    _steps_in_backward(request, model)
    tensors = [_shape(weight) for weight in model.trained]
    trained = sum(tensor.numel for tensor in tensors)
    standing = [
        *(Storage(ledger, size, "optimizer_states") for size in _states(request, tensors)),
        Storage(ledger, _cublas_bytes(request), "workspace"),
        Storage(ledger, _exchange(request, model, trained), "gradients" if _into_buckets(request, model) else "workspace"),
    ]
    ledger.enter("forward")
    if request.trains:
        _train(request, model, tensors)
    else:
        model.generation_pass()
    elements = sum(weight.numel for weight in model.weights.values())
    result = Simulation(ledger, model.tape.kept_by_name, elements, trained)
    del standing
    return result


def _shape(weight: Weight) -> Shape:
    return Shape(weight.rows, weight.columns, weight.itemsize, weight.matrices)


def _states(request: Request, tensors: list[Shape]) -> list[int]:
    if request.offload_optimizer or not request.trains:
        return []
    shards = request.parallel.state_shards
    return [-(-size // shards) for size in state_sizes(request.optimizer, tensors, request.divided_masters)]


def _cublas_bytes(request: Request) -> int:
    """One workspace for each thread that multiplies matrices: Python's, and autograd's in training (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    return CUBLAS_BYTES * (1 + request.trains) if request.device == "cuda" else 0


def _exchange(request: Request, model: Model, trained: int) -> int:
    """Buckets and gathered blocks of data-parallel training. A bucket's numbers are those of the parameters that train."""
    if not request.parallel.sharded:
        return sum(weight.numel * weight.itemsize for weight in model.trained) if request.parallel.world_size > 1 else 0
    blocks = _blocks(model)
    rest = sum(weight.numel for weight in model.weights.values()) - sum(blocks)
    return communication_bytes(request.parallel, blocks, rest, trained, request.precision.compute)


def _into_buckets(request: Request, model: Model) -> bool:
    """lora_lab's DistributedDataParallel: gradients are views of its buckets (gradient_as_bucket_view=True), which stay from step to step."""
    if request.implementation != "lora_lab" or request.parallel.world_size == 1 or request.parallel.sharded:
        return False
    for weight in model.trained:
        assert weight.leaf is not None
        weight.leaf.bucketed = True
    return True


def _blocks(model: Model) -> list[int]:
    """Weights of each block: tensors whose paths agree up to the first number."""
    sizes: dict[str, int] = {}
    for path, weight in model.weights.items():
        if block := re.match(r"[^0-9]*\.\d+\.", path):
            sizes[block.group()] = sizes.get(block.group(), 0) + weight.numel
    return list(sizes.values())


def _train(request: Request, model: Model, tensors: list[Shape]) -> None:
    """Where gradients of an earlier pass are there during forward, two passes are enough to see the peak.

    They are from the second micro-batch of a step on, and in PyTorch before 2.0, whose zero_grad filled gradients with zeros.
    """
    stay = request.grad_accum_steps > 1 or request.versions.before("torch", "2.0")
    for _ in range(2 if stay else 1):
        model.ledger.enter("forward")
        loss = model.training_pass()
        model.ledger.enter("backward")
        model.tape.backward(loss)
        del loss
    model.ledger.enter("optimizer step")
    temporaries = [Storage(model.ledger, size, "workspace") for size in _temporaries(request, tensors)]
    del temporaries


def _steps_in_backward(request: Request, model: Model) -> None:
    """lora_lab's StepsInBackward: the square of a gradient in float32, for the norm of all of them, and then the step of this weight alone."""
    if request.implementation != "lora_lab" or not request.optimizer_in_backward:
        return
    for weight in model.trained:
        assert weight.leaf is not None
        squared = 4 * weight.numel * (1 if weight.itemsize == 4 else 2)
        step = step_sizes(request.optimizer, request.optimizer_implementation, [_shape(weight)])
        weight.leaf.scratch = max(squared, 0 if request.offload_optimizer else sum(step))


def _temporaries(request: Request, tensors: list[Shape]) -> list[int]:
    """With the step in backward one tensor at a time is stepped; with offloaded states the host steps."""
    if request.offload_optimizer or (request.optimizer_in_backward and request.implementation == "lora_lab"):
        return []
    kind, shards = request.optimizer_implementation, request.parallel.state_shards
    kind = "for-loop" if request.optimizer_in_backward and kind == "foreach" else kind
    if request.divided_masters:  # the masters are stepped, in float32
        tensors = [replace(tensor, itemsize=4) for tensor in tensors]
    return [-(-size // shards) for size in step_sizes(request.optimizer, kind, tensors)]
