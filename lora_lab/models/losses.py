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

from ..adapters import checkpoint_contexts, under_selection
from ..layers import LoRALinear
from ..selection import RowSelection
from ..together import is_called_plainly
from ..token_rows.rows import TokenRows
from .blocks import IGNORE, compute_dtype, is_plain

CHUNK_BYTES = 32 * 2**20


def next_token_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Mean cross-entropy of predicting labels[:, t + 1] from hidden[:, t]; a float32 scalar (float64 for float64).

    hidden: [B, T, H].  labels: [B, T], -100 where there is none.  head: the output layer, [.., H] -> [.., V].
    A batch without labels gives 0 with zero gradients.
    """
    return labelled_loss(hidden[:, :-1], labels[:, 1:], head)


def labelled_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """The same of predicting labels[:, t] from hidden[:, t], as a decoder does that is given its target moved one place to the right."""
    chosen = labels != IGNORE
    if isinstance(selected := getattr(head, "lora_active", None), RowSelection):
        return _summed_by_adapter(hidden, labels, chosen, head, selected) / max(int(chosen.sum()), 1)
    hidden, labels = hidden[chosen], labels[chosen]
    return summed_cross_entropy(hidden, labels, head) / max(len(labels), 1)


def _summed_by_adapter(hidden: Tensor, labels: Tensor, chosen: Tensor, head: Any, selected: RowSelection) -> Tensor:
    """Under per_sample: the head is called for each adapter's rows of the batch, as among the labelled positions rows are no longer told apart."""
    losses = []
    for name, rows in selected.groups(hidden).items():
        own = chosen[rows]
        with under_selection([(head, () if name is None else (name,))]):
            losses.append(summed_cross_entropy(hidden[rows][own], labels[rows][own], head))
    return torch.stack(losses).sum()


def summed_cross_entropy(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """hidden: [L, H].  labels: [L].  A plain linear head takes the fast path, also with token rows; any other is called as it is, chunk by chunk."""
    rows, ids = token_rows_of(head)
    if is_plain(head) or rows is not None:
        inputs: list[Any] = [hidden, head.weight, head.bias, rows]
        if not torch.is_grad_enabled():  # no_grad does not reach ctx.needs_input_grad, and gradients would be made for nothing
            inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
        return LinearCrossEntropy.apply(*inputs, ids, labels, compute_dtype(hidden))
    contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": lambda: checkpoint_contexts(head)}
    losses = [checkpoint(_called_loss, h, y, head, use_reentrant=False, **contexts) for h, y in _chunks(hidden, labels, _rows(head))]
    return torch.stack(losses).sum() if losses else hidden.sum() * 0.0


def token_rows_of(head: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(rows [n, H], ids [n]) of a head that is plain but for trained token rows; (None, None) of any other."""
    active = head.lora_active if type(head) is LoRALinear and is_called_plainly(head) else ()
    variant = head.lora_variant[active[0]] if len(active) == 1 else None
    return variant.rows_alone(head, active[0]) if isinstance(variant, TokenRows) else (None, None)


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
    rows [n, H] stand in the place of the rows ids [n] of weight, of which no copy is made; both None: none do.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, ids: Tensor | None, labels: Tensor,
                dtype: torch.dtype) -> Tensor:  # fmt: skip
        needs_hidden, needs_weight, needs_bias, needs_rows = ctx.needs_input_grad[:4]
        exact = torch.promote_types(dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        grad_rows = torch.zeros_like(rows) if needs_rows and rows is not None else None
        operand, start, offset = weight.to(dtype), 0, None if bias is None else bias.to(dtype)
        own = None if rows is None else rows.to(dtype)
        for h, y in _chunks(hidden.to(dtype), labels, _chunk_rows(len(weight))):
            loss, slope = _loss_and_slope(_logits(h, operand, offset, own, ids), y)
            total += loss
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            of_rows = None if own is None else slope[:, ids]
            if of_rows is not None:
                slope[:, ids] = 0.0  # the weight's own rows had no part in it
            if grad_hidden is not None:
                grad_hidden[start : start + len(y)] = slope @ operand
            if grad_weight is not None:
                grad_weight += slope.T @ h
            if own is not None and of_rows is not None and grad_hidden is not None:
                grad_hidden[start : start + len(y)] += of_rows @ own
            if grad_rows is not None and of_rows is not None:
                grad_rows += of_rows.T @ h
            start += len(y)
            del slope  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_rows)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *scaled, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, ids: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if rows is not None and ids is not None:
        logits[:, ids] = F.linear(hidden, rows, None if bias is None else bias[ids])
    return logits


def _loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy and its gradient, softmax - onehot, in the logits' dtype; in float32 at least, and in place there."""
    dtype, labels = logits.dtype, labels[:, None]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, labels)
    total = logits.exp_().sum(-1, keepdim=True)
    slope = logits.div_(total).scatter_add_(1, labels, -torch.ones_like(total))
    return (total.log() - chosen).sum(), slope.to(dtype)
