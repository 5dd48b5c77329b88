"""Prefix tuning: P trained keys and values before the text's own, in every attention of a frozen model.

    attention(q, [k; K], [v; V])        k, v: [P, D] for each of L layers and N key-value heads, trained;  K, V: the text's

A soft prompt is read by the first layer and becomes what the model makes of it; a prefix says to each layer itself what it shall find there.
That takes 2 L N D numbers for a virtual token instead of H. The start matters most: `keys_and_values` takes those the model itself leaves of a
text, and then the prefix is, up to rounding, that text in front. Zeros are not nothing: softmax gives a key of zeros its share.

Source: Li & Liang 2021 (arXiv:2101.00190), sections 4 and 7.4 (the start); the layout is PEFT's, whose files carry over.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError
from lora_lab.models.base import in_mode, is_encoder_decoder

from .initialization import check_count
from .prefix_cache import PrefixShape, encode, new_cache, pairs_of, prefix_shape
from .soft_prompt import Prompt


class Prefix(Prompt):
    """Keys and values of P virtual tokens, trained as they are.

    weight: [L, 2, P, N, D], keys and values of each layer (of T5 the encoder's layers, then the decoder's); its values are copied into a
        float32 Parameter.  `initial` keeps them, to tell later how far the prefix has gone.
    Raises LoraLabError for a weight of another form, and for numbers that are not finite.

    >>> prefix = Prefix(torch.randn(30, 2, 20, 3, 64))  # SmolLM2-135M: 30 layers, 3 key-value heads of 64
    >>> prefix.num_virtual_tokens, sum(parameter.numel() for parameter in prefix.parameters())
    (20, 230400)
    """

    method: ClassVar[str] = "prefix"
    initial: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        check_prefix(weight)
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.register_buffer("initial", self.weight.detach().clone(), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:  # type: ignore[override]
        return self.weight.shape[2]

    @property
    def shape(self) -> PrefixShape:
        return shape_of(self.weight)

    def forward(self) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        layers, heads, head_dim = self.shape
        return f"num_virtual_tokens={self.num_virtual_tokens}, layers={layers}, heads={heads}, head_dim={head_dim}"


def check_prefix(weight: Tensor) -> None:
    """Raise LoraLabError for what cannot be a prefix."""
    if not isinstance(weight, Tensor) or weight.ndim != 5 or weight.shape[1] != 2 or not weight.is_floating_point() or 0 in weight.shape:
        given = list(weight.shape) if isinstance(weight, Tensor) else weight
        raise LoraLabError(f"a prefix is {given!r:.80}, expected numbers [layers, 2, num_virtual_tokens, key-value heads, head_dim]")
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise LoraLabError("a prefix holds a NaN or an infinity: every output would be NaN")


def shape_of(weight: Tensor) -> PrefixShape:
    """weight: [L, 2, P, N, D]."""
    return PrefixShape(weight.shape[0], weight.shape[3], weight.shape[4])


# How a prefix begins ------------------------------------------------------------------------------------------------------------


def keys_and_values(base: nn.Module, ids: Tensor) -> Tensor:
    """What the base's layers keep of a text, the prefix that begins as that text: [L, 2, P, N, D], float32 at least. ids: [P].

    For a causal model this prefix is the text in front: equal logits. An encoder that reads both together would let the text change what
    stands before it, so there it is a start only; of T5 the decoder has written the text it has read.
    Raises LoraLabError for ids that are no row of at least one, and for a base that can have no prefix.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 1 or len(ids) == 0:
        given = list(ids.shape) if isinstance(ids, Tensor) else ids
        raise LoraLabError(f"the ids a prefix begins with are {given!r:.60}, expected one row, [P], of at least one token")
    layers, heads, head_dim = prefix_shape(base)
    with in_mode(base, training=False), torch.no_grad():
        pairs = _own_pairs(base, ids[None].to(base.get_input_embeddings().weight.device), layers)  # type: ignore[operator]
    states = torch.stack([torch.cat(pair) for pair in pairs]).transpose(2, 3)
    assert states.shape == (layers, 2, len(ids), heads, head_dim), states.shape
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _own_pairs(base: nn.Module, ids: Tensor, layers: int) -> list[tuple[Tensor, Tensor]]:
    """Through a cache that forgets nothing, whatever the model's windows."""
    if not is_encoder_decoder(base):
        cache = new_cache(base, layers)
        base(input_ids=ids, past_key_values=cache)
        return pairs_of(cache)
    read = new_cache(base, base.config.num_layers)  # type: ignore[union-attr, arg-type]
    encoded = encode(base, {"input_ids": ids}, read, None)
    written = new_cache(base, base.config.num_decoder_layers)  # type: ignore[union-attr, arg-type]
    base(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=written)
    return pairs_of(read) + pairs_of(written)


def random_prefix(shape: PrefixShape, num_virtual_tokens: int, std: float = 0.02, generator: torch.Generator | None = None) -> Tensor:
    """Small normal numbers, [L, 2, P, N, D]: keys that all queries like alike, values that say little. (PEFT's have std 1.)"""
    check_count(num_virtual_tokens)
    return torch.randn(shape.layers, 2, num_virtual_tokens, shape.heads, shape.head_dim, generator=generator) * std


# PEFT's layout ------------------------------------------------------------------------------------------------------------------


def to_rows(weight: Tensor) -> Tensor:
    """A row for each virtual token, as PEFT's files have them: [L, 2, P, N, D] -> [P, L * 2 * N * D], in it layer by layer key, then value.

    >>> weight = torch.randn(3, 2, 5, 2, 4)
    >>> to_rows(weight).shape, torch.equal(from_rows(to_rows(weight), PrefixShape(3, 2, 4)), weight)
    (torch.Size([5, 48]), True)
    """
    return weight.permute(2, 0, 1, 3, 4).flatten(1)


def from_rows(rows: Tensor, shape: PrefixShape) -> Tensor:
    """[P, L * 2 * N * D] -> [L, 2, P, N, D]. Raises LoraLabError for rows of another width."""
    if rows.ndim != 2 or rows.shape[1] != shape.per_token:
        raise LoraLabError(f"the rows of a prefix are {list(rows.shape)}, expected [P, {shape.per_token}] for {shape}: made for another model?")
    return rows.unflatten(1, (shape.layers, 2, shape.heads, shape.head_dim)).permute(1, 2, 0, 3, 4)
