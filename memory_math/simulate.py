"""One training step, or one prompt, on the ledger: weights, forward, loss, backward, optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from .models.llama_lora_lab import LoraLabLlama
from .models.llama import TransformersLlama
from .models.base import Model
from .optimizers import state_bytes, step_bytes
from .request import Request
from .tape import Ledger, Storage

MODELS: dict[str, type[Model]] = {"transformers": TransformersLlama, "lora_lab": LoraLabLlama}
CUBLAS_WORKSPACE_BYTES = 8_519_680  # Ampere and older; PyTorch takes 32 MiB on Hopper


@dataclass(frozen=True)
class Simulation:
    """The ledger after the step, with what is known beside it: kept_by_name as in `Tape`, and the model's counts."""

    ledger: Ledger
    kept_by_name: dict[str, int]
    parameters: int
    trained: int


def simulate(request: Request, ledger: Ledger | None = None) -> Simulation:
    """Run `request` on a fresh ledger. Training is in its steady state: the second step, when the optimizer has its states."""
    ledger = ledger or Ledger()
    model = MODELS[request.implementation](request, ledger)
    tensors = [(weight.numel, weight.itemsize) for weight in model.trained]
    states = Storage(ledger, state_bytes(request.optimizer, tensors), "optimizer_states")
    ledger.enter("forward")
    workspace = Storage(ledger, CUBLAS_WORKSPACE_BYTES if request.device == "cuda" else 0, "workspace")
    if request.trains:
        _train(request, model, tensors)
    else:
        model.generation_pass()
    elements = sum(weight.numel for weight in model.weights.values())
    result = Simulation(ledger, model.tape.kept_by_name, elements, sum(numel for numel, _ in tensors))
    del states, workspace
    return result


def _train(request: Request, model: Model, tensors: list[tuple[int, int]]) -> None:
    """From the second micro-batch on the gradients of the first are there during forward, so two are enough to see the peak."""
    for _ in range(min(request.grad_accum_steps, 2)):
        model.ledger.enter("forward")
        loss = model.training_pass()
        model.ledger.enter("backward")
        model.tape.backward(loss)
        del loss
    model.ledger.enter("optimizer step")
    Storage(model.ledger, step_bytes(request.optimizer, request.optimizer_implementation, tensors), "workspace")
