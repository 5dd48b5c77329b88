"""Next-token cross-entropy on the positions that have a label, a chunk of logits at a time.

With 49,152 words in the vocabulary, the logits of 1,024 positions in float32 are 192 MiB, and the usual loss keeps several
copies. Here no logits are made for positions without a label, and no more than `CHUNK_BYTES` of them at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters import checkpoint_contexts
from .blocks import IGNORE, compute_dtype

CHUNK_BYTES = 32 * 2**20


def next_token_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Mean cross-entropy of predicting labels[:, t + 1] from hidden[:, t]; a float32 scalar (float64 for float64).

    hidden: [B, T, H].  labels: [B, T], -100 where there is none.  head: the output layer, [.., H] -> [.., V].
    A batch without labels gives 0 with zero gradients.
    """
    labels = labels[:, 1:]
    chosen = labels != IGNORE
    hidden, labels = hidden[:, :-1][chosen], labels[chosen]
    return summed_cross_entropy(hidden, labels, head) / max(len(labels), 1)


def summed_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """hidden: [L, H].  labels: [L].  A plain linear head takes the fast path; any other is called as it is, chunk by chunk."""
    if is_plain(head):
        inputs: list[Any] = [hidden, head.weight, head.bias]
        if not torch.is_grad_enabled():  # no_grad does not reach ctx.needs_input_grad, and gradients would be made for nothing
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        return LinearCrossEntropy.apply(*inputs, labels, compute_dtype(hidden))
    contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": lambda: checkpoint_contexts(head)}
    losses = [checkpoint(_called_loss, h, y, head, use_reentrant=False, **contexts) for h, y in _chunks(hidden, labels, _rows(head))]
    return torch.stack(losses).sum() if losses else hidden.sum() * 0.0


def is_plain(head: nn.Module) -> bool:
    """True where `head(x)` is x @ weight.T + bias and nothing else: no subclass, no hook, no forward put on the instance."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is nn.Linear and not any(hooks) and "forward" not in vars(head)


def _called_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def _rows(head: nn.Module) -> int:
    return _chunk_rows(getattr(head, "out_features", 50_000))


def _chunk_rows(vocabulary: int) -> int:
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _chunks(hidden: Tensor, labels: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(hidden.split(rows), labels.split(rows), strict=True)) if len(labels) else []


class LinearCrossEntropy(torch.autograd.Function):
    """``cross_entropy(hidden @ weight.T + bias, labels, reduction="sum")``, gradients computed while the logits are there.

    The gradient of a sum of cross-entropies with respect to the logits is softmax - onehot, known as soon as the logits are: so
    forward makes it chunk by chunk and keeps d loss / d hidden [L, H] (and d loss / d weight [V, H] where the head trains).
    Backward only multiplies. Compared with recomputing the logits in backward this saves one of four passes over the head.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        operand, start = weight.to(dtype), 0
        for h, y in _chunks(hidden.to(dtype), labels, _chunk_rows(len(weight))):
            loss, slope = _loss_and_slope(F.linear(h, operand, None if bias is None else bias.to(dtype)), y)
            total += loss
            if grad_hidden is not None:
                grad_hidden[start : start + len(y)] = slope @ operand
            if grad_weight is not None:
                grad_weight += slope.T @ h
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            start += len(y)
            del slope  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *scaled, None, None


def _loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and its gradient, softmax - onehot, in the logits' dtype; in float32 at least, and in place there."""
    dtype, labels = logits.dtype, labels[:, None]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, labels)
    total = logits.exp_().sum(-1, keepdim=True)
    slope = logits.div_(total).scatter_add_(1, labels, -torch.ones_like(total))
    return (total.log() - chosen).sum(), slope.to(dtype)
