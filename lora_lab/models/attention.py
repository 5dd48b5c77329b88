"""Attention as the families share it: who may look at whom, the product itself, and the rotary grouped-query kind.

Shapes: B batch, T positions of this call, S positions including the cache, N heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraLabError
from .blocks import IGNORE, RMSNorm, project, project_all, rotate
from .cache import LayerCache
from .recompute import RecomputableCore, recomputed


class Documents(tuple[int, ...]):
    """Lengths of the documents that lie one after another in a single row: a mask under which each sees itself only."""

    def positions(self, device: Any = None) -> Tensor:
        """0, 1, ... of every document anew: [1, T], made on the device, so that nothing waits for it."""
        return torch.cat([torch.arange(length, device=device) for length in self])[None]


Mask = Tensor | Documents | None  # bool [B or 1, 1, T, S], True where a query may look, or numbers to add to the scores; None: see `causal`


def attend(module: RecomputableCore, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, *, causal: bool = True, scale: float | None = None,
           dropout: float = 0.0, window: int | None = None) -> Tensor:  # fmt: skip
    """``softmax(q k^T * scale + mask) v``, [B, T, N * D]. q: [B, N, T, D], k and v: [B, N or fewer, S, D].

    causal: without a mask a position sees itself and those before; else all. scale: None is 1 / sqrt(D). dropout: on the weights, in training.
    window: of `Documents`, the positions each sees, its own included.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; grouped queries: Ainslie et al. 2023 (arXiv:2305.13245).
    """
    share = dropout if module.training else 0.0

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if isinstance(mask, Documents):
            return _by_document(q, k, v, mask, scale, share, window)
        return _product(q, k, v, mask, causal and mask is None, scale, share)

    again = module.recompute_core and (module.training or module.recompute_in_eval) and torch.is_grad_enabled()
    y: Tensor = recomputed(module, core, q, k, v) if again else core(q, k, v)
    return y.transpose(1, 2).flatten(2)


def _product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float) -> Tensor:
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _by_document(q: Tensor, k: Tensor, v: Tensor, lengths: Documents, scale: float | None, dropout: float, window: int | None) -> Tensor:
    """Each document attends to itself: no work for pairs of positions of different documents.

    A call for each: putting documents of one length into one call gains nothing on text, where few are of one length.
    """
    parts = zip(*(tensor.split(list(lengths), dim=2) for tensor in (q, k, v)), strict=True)
    return torch.cat([_within(part[0], part[1], part[2], scale, dropout, window) for part in parts], dim=2)


def _within(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float, window: int | None) -> Tensor:
    mask = attention_mask(None, 1, q.shape[2], 0, q.device, window)
    return _product(q, k, v, mask, mask is None, scale, dropout)


def _cut(length: int, window: int | None) -> bool:
    return window is not None and length > window


def attention_mask(padding: Tensor | None, batch: int, length: int, past: int, device: torch.device, window: int | None = None) -> Tensor | None:
    """Who may look at whom under causality: [B or 1, 1, T, S], or None where plain causality says it all.

    padding: [B, S], 1 for text and 0 for padding, on either side; None for no padding.  A padded position looks at itself at
    least, so that no row of the softmax is empty (an empty one is NaN, and NaN spreads).  window: the last so many positions of text
    only, a position's own included (Mistral: Jiang et al. 2023, arXiv:2310.06825, section 2).
    """
    total = past + length
    if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
        padding = None
    if padding is None and (past == 0 or length == 1) and not _cut(total, window):
        return None
    query, key = torch.arange(past, total, device=device)[:, None], torch.arange(total, device=device)[None, :]
    causal = (key <= query)[None, None]
    if window is not None:
        causal = causal & _near(query, key, padding, window)
    return causal if padding is None else (causal & padding.bool()[:, None, None, :]) | (key == query)[None, None]


def _near(query: Tensor, key: Tensor, padding: Tensor | None, window: int) -> Tensor:
    """Whether a key is within a query's window, [B or 1, 1, T, S]. Padding is no text and takes no room, not even inside a row."""
    if padding is None:
        return (key > query - window)[None, None]
    place = padding.long().cumsum(1)
    return (place[:, None, :] > place[:, query[:, 0], None] - window)[:, None]


def padding_mask(padding: Tensor | None) -> Tensor | None:
    """Of an encoder, where every position sees all text: [B, 1, 1, S]; None where there is no padding. padding: [B, S].

    A row of nothing but padding sees everything: its result is never used, and NaN would spread.
    """
    if padding is None or (not torch.compiler.is_compiling() and bool(padding.all())):
        return None
    text = padding.bool()
    return (text | ~text.any(1, keepdim=True))[:, None, None, :]


def padding_cannot_matter(padding: Tensor | None, labels: Tensor) -> bool:
    """True where padding stands on the right and has no labels: causal attention keeps text from seeing it, so no mask is needed.

    padding, labels: [B, T]. A mask would cost a [B, 1, T, T] tensor and, on most devices, the fastest attention kernel.
    """
    if padding is None or padding.shape != labels.shape or torch.compiler.is_compiling():
        return False
    on_the_right = (padding[:, 1:] <= padding[:, :-1]).all()
    return bool(on_the_right & (labels[padding == 0] == IGNORE).all())


def documents_of(lengths: Sequence[int], batch: int, length: int) -> Documents:
    """Raises LoraLabError where the lengths are not those of one packed row."""
    if batch != 1 or sum(lengths) != length or min(lengths, default=0) < 1:
        raise LoraLabError(f"document_lengths={list(lengths)!r} with input_ids [{batch}, {length}]: expected one row, [1, {sum(lengths)}]")
    return Documents(lengths)


class Attention(RecomputableCore):
    """Causal attention with grouped queries and rotary positions: Llama's, Mistral's, Qwen's.

    x: [B, T, H].  rotary: (cos, sin), each [B or 1, T, 1, D/2].  mask: see `Mask`.
    bias: of q, k and v.  out_bias: of o.  qk_norm: the epsilon of an RMSNorm over each head of q and k (Qwen3); None for none.
    window: see `attention_mask`, which the caller has made the mask with.  dropout: on the attention weights, in training.
    """

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, bias: bool, *, out_bias: bool | None = None,
                 qk_norm: float | None = None, window: int | None = None, dropout: float = 0.0, **factory: Any) -> None:  # fmt: skip
        super().__init__()
        self.head_dim, self.window, self.dropout = head_dim, window, dropout
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias, **factory)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias if out_bias is None else out_bias, **factory)
        if qk_norm is not None:
            self.q_norm, self.k_norm = RMSNorm(head_dim, qk_norm, **factory), RMSNorm(head_dim, qk_norm, **factory)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, layer_cache: LayerCache | None) -> Tensor:
        split = (*x.shape[:-1], -1, self.head_dim)  # [B, T, N, D]
        q, k, v = (part.view(split) for part in project_all(x, self.q_proj, self.k_proj, self.v_proj))
        if "q_norm" in self._modules:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (angle.to(q.dtype) for angle in rotary)
        q, k, v = (heads.transpose(1, 2) for heads in (rotate(q, cos, sin), rotate(k, cos, sin), v))  # [B, N, T, D], nothing moved
        causal = layer_cache is None or layer_cache.length == 0  # else there is a mask, or one token that may look at all
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)
        return project(self.o_proj, attend(self, q, k, v, mask, causal=causal, window=self.window, dropout=self.dropout))
