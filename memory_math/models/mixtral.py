"""What transformers' Mixtral keeps, call by call: `modeling_mixtral.py` and `integrations/moe.py` of transformers 5.23 on the tape.

Llama's blocks, with a router and experts in place of the MLP. The experts run as one grouped product ("grouped_mm", which is what a model
takes unless it is told otherwise): every token is copied once for each of its experts and the copies are sorted by expert, so that the bytes
do not depend on whom the router chooses. S = tokens * experts_per_token. The grouped product knows no autocast and computes in its weights'
dtype. PEFT's "all-linear" leaves router and experts alone, which are no linear layers.
"""

from __future__ import annotations

from .. import operations as ops
from ..families.llama import Mixtral
from ..operations import Weight
from ..tape import Sized
from .activations import activate
from .blocks import split
from .llama import Block, TransformersLlama
from .peft_layers import linear

OFFSET_BYTES = 4  # where each expert's rows end, int32


class TransformersMixtral(TransformersLlama):
    """MixtralForCausalLM with labels, without the router's own loss."""

    arch: Mixtral

    @property
    def block(self) -> type[Block]:
        return MixtralBlock


class MixtralBlock(Block):
    """MixtralDecoderLayer."""

    model: TransformersMixtral

    def mlp(self, x: Sized) -> Sized:
        """MixtralSparseMoeBlock."""
        path = f"{self.path}.mlp"
        logits, weights, indices = self.router(x, f"{path}.gate")
        y = self.experts(x, weights, f"{path}.experts")
        del logits, indices
        return y

    def router(self, x: Sized, path: str) -> tuple[Sized, Sized, Sized]:
        """MixtralTopKRouter: its logits [T, E], and for the chosen experts their shares and their numbers, [T, k]."""
        tape, arch = self.tape, self.model.arch
        logits = linear(self.model, x, path)
        tokens = logits.numel // arch.experts
        shares = ops.softmax(tape, "router", ops.cast(tape, logits, 4))
        indices = self.model.ids(tokens * arch.experts_per_token)
        top = tape.record("router", [shares], lambda: tape.new(indices.numel, 4), keeps=[indices])
        total = tape.record("router", [top], lambda: tape.new(tokens, 4))
        before = [tape.new(top.numel, 4)] if top.needs_grad else []  # divided in place: what it was is kept as a copy
        top = tape.record("router", [top, total], lambda: Sized(top.numel, 4, top.storage), keeps=[*before, total])
        return logits, top, indices

    def experts(self, x: Sized, weights: Sized, path: str) -> Sized:
        """grouped_mm_experts_forward."""
        tape, model, S = self.tape, self.model, weights.numel
        by_expert, order, rows = (model.ids(S) for _ in range(3))
        selected = self.gather(x, rows, S * model.arch.hidden)
        shares = self.gather(weights, order, S)
        counted, offsets = tape.new(S, 4), tape.new(model.arch.experts, OFFSET_BYTES)
        both = self.grouped(selected, model.weights[f"{path}.gate_up_proj"], offsets)
        gate, up = split(tape, both, both.numel // 2, both.numel // 2)
        y = ops.multiply(tape, "silu(gate) * up", activate(tape, model.arch.activation, gate), up)
        del both, gate, up
        y = self.grouped(y, model.weights[f"{path}.down_proj"], offsets)
        weighted = ops.multiply(tape, "expert shares", y, shares)
        placed = self.gather(weighted, model.ids(S), weighted.numel)
        summed = tape.record("experts", [placed], lambda: tape.new(x.numel, placed.itemsize))
        del by_expert, counted, y, weighted, placed, selected
        return ops.cast(tape, summed, x.itemsize)

    def gather(self, x: Sized, rows: Sized, numel: int) -> Sized:
        """x[rows]: the numbers of the rows are kept."""
        return self.tape.record("expert rows", [x], lambda: self.tape.new(numel, x.itemsize), keeps=[rows])

    def grouped(self, x: Sized, weight: Weight, offsets: Sized) -> Sized:
        """Each row of x times the matrix of its expert; a stack of matrices [E * outputs, inputs]."""
        x = ops.cast(self.tape, x, weight.itemsize)
        numel = x.numel // weight.columns * (weight.rows // self.model.arch.experts)
        keeps = [x] * weight.needs_grad + [weight] * x.needs_grad + [offsets]
        return self.tape.record(weight.name, [x, weight], lambda: self.tape.new(numel, x.itemsize), keeps=keeps)
