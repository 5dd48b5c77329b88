"""Two ways to need less memory on a GPU: activations wait in main memory, and each weight steps as soon as its gradient is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from ..rematerialize import keeping_inputs

WORTH_MOVING = 2**20  # bytes: smaller tensors cost more in waiting than they save


@contextlib.contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Inside the block what autograd keeps for backward goes to main memory, and comes back when backward asks.

    Weights stay where they are, and so do tensors below a MiB. Raises LoraLabError on a CPU, whose memory that is already.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        raise LoraLabError("activation_offload=True on a CPU: activations are in main memory already; leave it out")
    with torch.autograd.graph.saved_tensors_hooks(*_hooks(model)), keeping_inputs():
        yield


def _hooks(model: nn.Module) -> tuple[Callable[[Tensor], tuple[torch.device, Tensor]], Callable[[tuple[torch.device, Tensor]], Tensor]]:
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        stays = tensor.nbytes < WORTH_MOVING or tensor.untyped_storage().data_ptr() in weights
        return tensor.device, tensor if stays else _to_main_memory(tensor)

    return pack, lambda packed: packed[1].to(packed[0], non_blocking=True)


def _to_main_memory(tensor: Tensor) -> Tensor:
    """In pinned pages, from which a GPU can read by itself."""
    waiting = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return waiting.copy_(tensor, non_blocking=tensor.device.type == "cuda")


class StepsInBackward:
    """An optimizer for each weight, which steps in backward, as soon as the gradient is complete, and frees it.

    At no time are there gradients of more than a few weights. Source: Lv et al. 2023 (LOMO, arXiv:2306.09782), section 3.1; PyTorch's tutorial
    "How to save memory by fusing the optimizer step into the backward pass".
    """

    def __init__(self, optimizers: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.squares: list[Tensor] = []
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._step) for parameter in optimizers]

    def _step(self, parameter: nn.Parameter) -> None:  # called by autograd
        assert parameter.grad is not None
        self.squares.append(parameter.grad.detach().float().square().sum())
        self.optimizers[parameter].step()
        parameter.grad = None

    def norm(self) -> float:
        """Of the gradients of the last backward pass, all together."""
        squares, self.squares = self.squares, []
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
