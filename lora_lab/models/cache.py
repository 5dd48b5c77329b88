"""The key-value cache: what attention has computed of the positions so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, [B, N, S, D] each, in buffers that double when full (so a token costs no copy of the past)."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values
        self.length = 0 if keys is None else keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions; returns all S so far. With gradients it concatenates, without it writes in place."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys = self._write(self.keys, keys, start)
        self.values = self._write(self.values, values, start)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def _write(self, buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
        if buffer is None:
            return new
        if torch.is_grad_enabled():
            return torch.cat((buffer[:, :, :start], new), dim=2)
        if buffer.shape[2] < self.length:
            grown = new.new_empty(*buffer.shape[:2], max(2 * start, self.length), buffer.shape[3])
            grown[:, :, :start] = buffer[:, :, :start]
            buffer = grown
        buffer.narrow(2, start, new.shape[2]).copy_(new)
        return buffer

    def fork(self) -> LayerCache:
        """Another cache that starts with what is here so far; appending to it leaves this one alone."""
        if self.keys is None or self.values is None:
            return LayerCache()
        return LayerCache(self.keys[:, :, : self.length], self.values[:, :, : self.length])

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (a bool [B] or indices)."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """One `LayerCache` per layer. Iterating gives (keys, values) pairs; such pairs also make one."""

    def __init__(self, layers: int | Any) -> None:
        self.layers = [LayerCache() for _ in range(layers)] if isinstance(layers, int) else [LayerCache(*pair[:2]) for pair in layers]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def keep(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.keep(rows)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            yield layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]


class EncoderDecoderCache(KVCache):
    """Of a decoder that looks at an encoder, too: `cross` has the keys and values of what the encoder read, one `LayerCache` per layer.

    Iterating gives (keys, values, cross keys, cross values); such also make one, pairs, or transformers' cache of this name.
    """

    def __init__(self, layers: int | Any) -> None:
        given = None if isinstance(layers, int) else [tuple(each) for each in layers]
        super().__init__(layers if given is None else given)
        self.cross = [LayerCache() for _ in self.layers] if given is None else [_cross(each) for each in given]

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        for layer in self.cross:
            layer.keep(rows)

    def __iter__(self) -> Iterator[Any]:
        for own, layer in zip(super().__iter__(), self.cross, strict=True):
            yield own if layer.keys is None else (*own, layer.keys, layer.values)


def _cross(layer: tuple[Any, ...]) -> LayerCache:
    """The second half of four, or of the six that transformers has since version 5; two or three are of the decoder alone."""
    return LayerCache(*layer[len(layer) // 2 :][:2]) if len(layer) >= 4 else LayerCache()
