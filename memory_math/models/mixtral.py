"""What transformers' Mixtral keeps, call by call: `modeling_mixtral.py` and `integrations/moe.py` of transformers 5.23 on the tape.

Llama's blocks, with a router and experts in place of the MLP. The experts run as one grouped product ("grouped_mm", which is what a model
takes unless it is told otherwise): every token is copied once for each of its experts and the copies are sorted by expert, so that the bytes
do not depend on whom the router chooses. S = tokens * experts_per_token. The grouped product knows no autocast and computes in its weights'
dtype.

In transformers 4 an expert is three linear layers, which are quantised and adapted like others, and runs by itself on the tokens that chose it;
that every expert is chosen as often as every other is taken for granted there.

PEFT 0.21's "all-linear" adapts router and experts, too (ParamWrapper in peft/tuners/lora/layer.py): W + s B A is written out, for the whole
stack of experts, and kept for backward. target_modules="attention" leaves them alone.
"""

from __future__ import annotations

from .. import operations as ops
from ..errors import MemoryMathError
from ..families.llama import Mixtral
from ..request import Request
from ..tape import Ledger, Sized
from .activations import activate
from .base import Adapter
from .blocks import split
from .llama import Block, TransformersLlama
from .peft_layers import linear

OFFSET_BYTES = 4  # where each expert's rows end, int32
STACKS = (".experts.gate_up_proj", ".experts.down_proj")


class TransformersMixtral(TransformersLlama):
    """MixtralForCausalLM with labels, without the router's own loss."""

    arch: Mixtral

    def __init__(self, request: Request, ledger: Ledger) -> None:
        if (request.method == "dora" or request.dropout) and any(path.endswith(STACKS) for path in request.adapted):
            raise MemoryMathError(
                f"method={request.method!r} with dropout={request.dropout} on the experts of {request.architecture.name}: PEFT adapts stacks of "
                'weights by plain LoRA without dropout only; use target_modules="attention"'
            )
        super().__init__(request, ledger)

    def _adapter(self, path: str, inputs: int, outputs: int) -> Adapter:
        """For a stack, a pair for every expert, side by side; gate and up together have twice the rank."""
        stacks = {"gate_up_proj": 2 * self.arch.experts, "down_proj": self.arch.experts}
        if (name := path.rpartition(".")[2]) not in stacks:
            return super()._adapter(path, inputs, outputs)
        rank = stacks[name] * self.request.rank
        return Adapter(self.trainable(f"{path}.lora_A", rank, inputs), self.trainable(f"{path}.lora_B", outputs, rank))

    @property
    def block(self) -> type[Block]:
        return MixtralBlock


class MixtralBlock(Block):
    """MixtralDecoderLayer."""

    model: TransformersMixtral

    def mlp(self, x: Sized) -> Sized:
        """MixtralSparseMoeBlock."""
        if self.model.arch.linear_experts:
            return self.expert_by_expert(x, f"{self.path}.block_sparse_moe")
        path = f"{self.path}.mlp"
        logits, weights, indices = self.router(x, f"{path}.gate")
        y = self.experts(x, weights, f"{path}.experts")
        del logits, indices
        return y

    def expert_by_expert(self, x: Sized, path: str) -> Sized:
        """transformers 4: one expert after another, and what each makes of its tokens added into the sum."""
        tape, E = self.tape, self.model.arch.experts
        logits, shares, chosen = self.router(x, f"{path}.gate")
        shares = ops.cast(tape, shares, x.itemsize)
        summed, mask = tape.new(x.numel, x.itemsize), self.model.ids(chosen.numel * E)
        for number in range(E):
            rows = chosen.numel // E + (number < chosen.numel % E)
            summed = self.add_expert(summed, x, shares, rows, f"{path}.experts.{number}")
        del logits, mask
        return summed

    def add_expert(self, summed: Sized, x: Sized, shares: Sized, rows: int, path: str) -> Sized:
        """MixtralBlockSparseTop2MLP on its rows, weighted; index_add_ works in place, and keeps what it adds, and the numbers of the rows."""
        tape, model = self.tape, self.model
        where, which = model.ids(rows), model.ids(rows)
        y = self.gather(x, where, rows * model.arch.hidden)
        gate = activate(tape, model.arch.activation, linear(model, y, f"{path}.w1"), model.autocast)
        y = linear(model, ops.multiply(tape, "silu(gate) * up", gate, linear(model, y, f"{path}.w3")), f"{path}.w2")
        del gate
        share = tape.record("expert rows", [shares], lambda: tape.new(rows, shares.itemsize), keeps=[where, which])
        y = ops.cast(tape, ops.multiply(tape, "expert shares", y, share), x.itemsize)
        return tape.record("experts", [summed, y], lambda: Sized(summed.numel, summed.itemsize, summed.storage), keeps=[where, y], passes=True)

    def router(self, x: Sized, path: str) -> tuple[Sized, Sized, Sized]:
        """MixtralTopKRouter: its logits [T, E], and for the chosen experts their shares and their numbers, [T, k]."""
        tape, arch = self.tape, self.model.arch
        logits = linear(self.model, x, path) if arch.linear_experts else self.router_logits(x, path)
        tokens = logits.numel // arch.experts
        shares = ops.softmax(tape, "router", ops.cast(tape, logits, 4))
        indices = self.model.ids(tokens * arch.experts_per_token)
        top = tape.record("router", [shares], lambda: tape.new(indices.numel, 4), keeps=[indices])
        total = tape.record("router", [top], lambda: tape.new(tokens, 4))
        before = [tape.new(top.numel, 4)] if top.needs_grad else []  # divided in place: what it was is kept as a copy
        top = tape.record("router", [top, total], lambda: Sized(top.numel, 4, top.storage), keeps=[*before, total])
        return logits, top, indices

    def router_logits(self, x: Sized, path: str) -> Sized:
        tape, model, weight = self.tape, self.model, self.model.weights[path]
        if path not in model.adapters:
            return ops.linear(tape, x, weight, autocast=model.autocast)
        adapter = model.adapters[path]
        update = ops.matmul(tape, f"{path}.lora", adapter.B, adapter.A, weight.numel, model.autocast)
        update = ops.cast(tape, ops.elementwise(tape, f"{path}.lora", update), weight.itemsize)
        updated = ops.add(tape, f"{path}.lora", weight, update)
        return self.product(x, updated, x.numel // weight.columns * weight.rows, model.autocast)

    def experts(self, x: Sized, weights: Sized, path: str) -> Sized:
        """grouped_mm_experts_forward."""
        tape, model, S = self.tape, self.model, weights.numel
        by_expert, order, rows = (model.ids(S) for _ in range(3))
        selected = self.gather(x, rows, S * model.arch.hidden)
        shares = self.gather(weights, order, S)
        counted, offsets = tape.new(S, 4), tape.new(model.arch.experts, OFFSET_BYTES)
        both, first = self.grouped(selected, f"{path}.gate_up_proj", offsets)  # the stacks are cached until the experts are done
        gate, up = split(tape, both, both.numel // 2, both.numel // 2)
        y = ops.multiply(tape, "silu(gate) * up", activate(tape, model.arch.activation, gate), up)
        del both, gate, up
        y, second = self.grouped(y, f"{path}.down_proj", offsets)
        weighted = ops.multiply(tape, "expert shares", y, shares)
        weighted = self.gather(weighted, model.ids(S), weighted.numel)
        summed = tape.record("experts", [weighted], lambda: tape.new(x.numel, weighted.itemsize))
        del by_expert, counted, y, selected, first, second
        return ops.cast(tape, summed, x.itemsize)

    def gather(self, x: Sized, rows: Sized, numel: int) -> Sized:
        """x[rows]: the numbers of the rows are kept."""
        return self.tape.record("expert rows", [x], lambda: self.tape.new(numel, x.itemsize), keeps=[rows])

    def grouped(self, x: Sized, path: str, offsets: Sized) -> tuple[Sized, Sized]:
        """Each row of x times the matrix of its expert; a stack of matrices [E * outputs, inputs]. Returns the stack, too."""
        weight = self.model.weights[path]
        stack, numel = self.updated(path), x.numel // weight.columns * (weight.rows // self.model.arch.experts)
        return self.product(ops.cast(self.tape, x, weight.itemsize), stack, numel, None, offsets), stack

    def updated(self, path: str) -> Sized:
        """W + s B A of every expert, from factors in W's dtype, which are kept."""
        tape, weight, adapter = self.tape, self.model.weights[path], self.model.adapters.get(path)
        if adapter is None:
            return weight
        B, A = ops.cast(tape, adapter.B, weight.itemsize), ops.cast(tape, adapter.A, weight.itemsize)
        return tape.record(f"{path}.lora", [B, A], lambda: tape.new(weight.numel, weight.itemsize), keeps=[B, A])

    def product(self, x: Sized, weight: Sized, numel: int, autocast: int | None, *also: Sized) -> Sized:
        """x times a weight that is computed: what the other's gradient takes is kept."""
        if autocast is not None:
            x, weight = ops.cast(self.tape, x, autocast), ops.cast(self.tape, weight, autocast)
        keeps = [x] * weight.needs_grad + [weight] * x.needs_grad + list(also)
        return self.tape.record("experts", [x, weight], lambda: self.tape.new(numel, x.itemsize), keeps=keeps)
