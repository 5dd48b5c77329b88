"""The small networks that make prompts while they train, call by call: prompt_tuning_lab/reparameterization.py on the tape.

    p-tuning    W3 relu(W2 relu(W1 e))            e: [P, H]
    residual    x + Wup relu(Wdown norm(x))       x: [P, H]
    mlp         W2 tanh(W1 e), of a prefix        e: [P, N D], keys and values of all blocks come out

All that a network is trains: its weights, and what goes into it. They are float32, whatever the base is; autocast multiplies them in 16 bit.
"""

from __future__ import annotations

import itertools

from .. import operations as ops
from ..operations import Weight
from ..tape import Sized
from .activations import keeps_result
from .base import Model

RESIDUAL_HIDDEN = 128  # prompt_tuning_lab.ResidualPrompt's usual hidden_size, held equal by a test


class Network:
    """One of the networks. inputs: what goes in, a row for each virtual token.  layers: (weight, bias or None) of its linear layers.

    norm: weight and bias of the residual network's LayerNorm; none of the others.
    """

    def __init__(self, model: Model, kind: str, width: int, outputs: int) -> None:
        """kind: as above.  width: of a row that goes in.  outputs: numbers that come out for a virtual token."""
        request = model.request
        self.model, self.kind = model, kind
        hidden = request.encoder_hidden_size or (RESIDUAL_HIDDEN if kind == "residual" else width)
        sizes = [width, hidden, hidden, outputs] if kind == "p-tuning" else [width, hidden, outputs]
        self.inputs = model.trainable("prompt.inputs", request.num_virtual_tokens, width)
        self.norm = [model.trainable("prompt.norm", 1, width) for _ in ("weight", "bias") if kind == "residual"]
        self.layers = [self._linear(*each) for each in itertools.pairwise(sizes)]

    def _linear(self, inputs: int, outputs: int) -> tuple[Weight, Weight | None]:
        weight = self.model.trainable("prompt.network", outputs, inputs)
        return weight, None if self.kind == "residual" else self.model.trainable("prompt.network.bias", 1, outputs)

    @property
    def weights(self) -> list[Weight]:
        return [self.inputs, *self.norm, *(weight for layer in self.layers for weight in layer if weight is not None)]

    def forward(self) -> Sized:
        """[P, outputs], in the dtype of products; the residual network's in float32."""
        tape, inputs = self.model.tape, self.inputs
        if self.kind != "residual":
            return self._through(inputs if self.model.autocast is None else ops.weight_copy(tape, inputs, self.model.autocast))
        return ops.add(tape, "prompt.network", inputs, self._through(self._normalised()))

    def _through(self, x: Sized) -> Sized:
        *inner, last = self.layers
        for layer in inner:
            x = keeps_result(self.model.tape, self._times(x, layer))
        return self._times(x, last)

    def _times(self, x: Sized, layer: tuple[Weight, Weight | None]) -> Sized:
        return ops.linear(self.model.tape, x, *layer, self.model.autocast)

    def _normalised(self) -> Sized:
        """LayerNorm, in float32: a mean and a deviation for each virtual token."""
        tape, x = self.model.tape, self.inputs
        return tape.record("prompt.norm", [x, *self.norm], lambda: tape.new(x.numel, x.itemsize), keeps_after=lambda _: [tape.new(2 * x.rows, 4)])
