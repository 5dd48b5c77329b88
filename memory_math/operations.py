"""PyTorch's operations on the tape: for each, what its result weighs and what its backward rule keeps.

Source of the rules: tools/autograd/derivatives.yaml and torch/nn/functional.py of PyTorch 2.13; the tests hold every sum that comes of
them to what saved_tensors_hooks sees. Letters: T tokens (batch * sequence), h hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from .precision import INDEX_BYTES, LOGSUMEXP_BYTES
from .tape import Leaf, Ledger, Sized, Storage, Tape


class Weight(Sized):
    """A weight matrix [rows, columns] (a vector has one row), or so many in one tensor. `leaf` is where its gradient arrives; None: it is frozen.

    shards: devices that hold a part of it each; one part is in the ledger.
    """

    __slots__ = ("columns", "leaf", "matrices", "name", "rows")

    def __init__(
        self, ledger: Ledger, name: str, rows: int, columns: int, itemsize: int, leaf: Leaf | None, shards: int = 1, matrices: int = 1
    ) -> None:  # fmt: skip
        self.name, self.rows, self.columns, self.leaf, self.matrices = name, rows, columns, leaf, matrices
        stored = -(-matrices * rows * columns // shards) * itemsize
        super().__init__(matrices * rows * columns, itemsize, Storage(ledger, stored, "weights"), leaf)


class QuantizedWeight(Weight):
    """A frozen matrix stored in `packed` bytes, and computed with as a matrix of `itemsize` that exists for one product at a time.

    dequantized: bytes of that matrix and of what making it takes. keeps_input: the product keeps its input, although nothing needs it.
    """

    __slots__ = ("dequantized", "keeps_input")

    def __init__(self, ledger: Ledger, name: str, shape: tuple[int, int], itemsize: int, packed: int, dequantized: int, keeps_input: bool) -> None:
        self.name, self.leaf, self.dequantized, self.keeps_input = name, None, dequantized, keeps_input
        self.rows, self.columns = shape
        self.matrices = 1
        Sized.__init__(self, self.rows * self.columns, itemsize, Storage(ledger, packed, "weights"))


def weight_copy(tape: Tape, weight: Weight, itemsize: int) -> Sized:
    """The 16-bit copy of a weight that autocast computes with, booked as workspace; of a trained one it is made once for a forward pass.

    Source: torch/csrc/autocast_mode.cpp (cached_cast), which caches copies of leaves that require grad and of nothing else.
    """
    if weight.itemsize == itemsize or not weight.needs_grad:
        return cast(tape, weight, itemsize, part="workspace")
    if id(weight) not in tape.weight_copies:
        tape.weight_copies[id(weight)] = cast(tape, weight, itemsize, part="workspace")
    return tape.weight_copies[id(weight)]


def cast(tape: Tape, x: Sized, itemsize: int, part: str = "temporary") -> Sized:
    """``x.to(dtype)``: nothing where x has that dtype already; otherwise a copy, of which backward needs nothing."""
    if x.itemsize == itemsize:
        return x
    return tape.record("cast", [x], lambda: tape.new(x.numel, itemsize, part))


def elementwise(tape: Tape, name: str, x: Sized, *, keeps: Sequence[Sized] = (), busy: int = 0, scratch: int = 0) -> Sized:
    """A new tensor like x that remembers nothing of x unless `keeps` says so (scaling, masking, silu, pow)."""
    return tape.record(name, [x], lambda: tape.new(x.numel, x.itemsize), keeps=keeps, busy=busy, scratch=scratch)


def copy(tape: Tape, name: str, x: Sized, numel: int | None = None) -> Sized:
    """``x.contiguous()`` that really copies, or an expand that is written out: [numel] elements."""
    return tape.record(name, [x], lambda: tape.new(numel or x.numel, x.itemsize))


def add(tape: Tape, name: str, a: Sized, b: Sized) -> Sized:
    """a + b of one shape. Backward hands its gradient on to both (cast for one of another dtype); nothing is kept."""
    itemsize = max(a.itemsize, b.itemsize)
    return tape.record(name, [a, b], lambda: tape.new(a.numel, itemsize), passes=True)


def multiply(tape: Tape, name: str, a: Sized, b: Sized) -> Sized:
    """a * b, broadcast: each is kept if the other needs a gradient.

    The gradient of a broadcast factor is as large as the product before it is summed up.
    """
    numel, itemsize = max(a.numel, b.numel), max(a.itemsize, b.itemsize)
    keeps = [a] * b.needs_grad + [b] * a.needs_grad
    smaller = min((a, b), key=lambda tensor: tensor.numel)
    scratch = numel * itemsize if smaller.needs_grad and smaller.numel < numel else 0
    return tape.record(name, [a, b], lambda: tape.new(numel, itemsize), keeps=keeps, scratch=scratch)


def linear(
    tape: Tape, x: Sized, weight: Weight, bias: Weight | None = None, autocast: int | None = None, *, copy: Sized | None = None,
    part: str = "temporary",
) -> Sized:  # fmt: skip
    """``F.linear``: [B, T, columns] -> [B, T, rows]. x is kept if the weight trains, the weight if x needs a gradient; of the bias nothing.

    autocast: bytes per element that all three are cast to first; None where autocast is off. copy: a cast of the weight to compute with.
    """
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(tape, x, weight, part)
    matrix: Sized = copy or weight
    rest: list[Sized] = [] if bias is None else [bias]
    if autocast is not None:
        x, matrix = cast(tape, x, autocast), copy or weight_copy(tape, weight, autocast)
        rest = [] if bias is None else [weight_copy(tape, bias, autocast)]
    numel = x.numel // weight.columns * weight.rows
    keeps = [x] * matrix.needs_grad + [matrix] * x.needs_grad
    return tape.record(weight.name, [x, matrix, *rest], lambda: tape.new(numel, x.itemsize, part), keeps=keeps, reshapes=True)


def quantized_linear(tape: Tape, x: Sized, weight: QuantizedWeight, part: str = "temporary") -> Sized:
    """A product with a quantised weight, which is dequantised for it, and again for its backward."""
    x, numel = cast(tape, x, weight.itemsize), x.numel // weight.columns * weight.rows
    keeps, busy = [x] * weight.keeps_input, weight.dequantized
    return tape.record(weight.name, [x], lambda: tape.new(numel, x.itemsize, part), keeps=keeps, busy=busy, scratch=busy)


def embedding(tape: Tape, ids: Sized, table: Weight) -> Sized:
    """Rows of `table`; the ids are kept if the table trains, and its gradient is dense."""
    return tape.record(table.name, [table], lambda: tape.new(ids.numel * table.columns, table.itemsize), keeps=[ids])


def scaled_dot_product_attention(
    tape: Tape, q: Sized, k: Sized, v: Sized, head_rows: int, autocast: int | None = None, mask: Sized | None = None
) -> Sized:
    """The fused kernels: q, k, v, a mask and the output are kept, and one float32 logsumexp for each of `head_rows` (tokens * heads).

    k and v keep their own width under grouped queries. On CUDA FlashAttention 2 also keeps two random-number words; its backward sums
    q's gradient in float32, needs a float32 per row, and under grouped queries makes the gradients of k and v at q's width first
    (csrc/flash_attn/flash_api.cpp, mha_bwd).
    """
    if autocast is not None:
        q, k, v = (cast(tape, tensor, autocast) for tensor in (q, k, v))
    kept = head_rows * LOGSUMEXP_BYTES + tape.inside_kernel(2 * INDEX_BYTES)
    expanded = 2 * q.nbytes if k.numel < q.numel else 0
    scratch = tape.inside_kernel(4 * q.numel + head_rows * LOGSUMEXP_BYTES + expanded)

    def keeps(y: Sized) -> list[Sized]:
        return [q, k, v, y, tape.new(kept, 1), *([] if mask is None else [mask])]

    return tape.record("attention", [q, k, v], lambda: tape.new(q.numel, q.itemsize), keeps_after=keeps, scratch=scratch)


def matmul(tape: Tape, name: str, a: Sized, b: Sized, numel: int, autocast: int | None = None) -> Sized:
    """A product of two computed tensors: each is kept for the other's gradient."""
    if autocast is not None:
        a, b = cast(tape, a, autocast), cast(tape, b, autocast)
    return tape.record(name, [a, b], lambda: tape.new(numel, a.itemsize), keeps=[a] * b.needs_grad + [b] * a.needs_grad)


def softmax(tape: Tape, name: str, x: Sized, part: str = "temporary") -> Sized:
    """softmax or log_softmax: only the result is kept; in old versions (see versions.py) the input, too."""
    keeps = [x] * ("softmax" in tape.keeps_input)
    return tape.record(name, [x], lambda: tape.new(x.numel, x.itemsize, part), keeps=keeps, keeps_after=lambda y: [y])


def mean(tape: Tape, name: str, x: Sized, numel: int) -> Sized:
    """The mean over one dimension, [numel]; nothing is kept, in old versions (see versions.py) the input."""
    return tape.record(name, [x], lambda: tape.new(numel, x.itemsize), keeps=[x] * ("mean" in tape.keeps_input))


def dropout(tape: Tape, x: Sized) -> Sized:
    """The mask is kept: a byte per element on CUDA; on the CPU a tensor of x's dtype."""
    mask = 1 if tape.device == "cuda" else x.itemsize
    return tape.record("dropout", [x], lambda: tape.new(x.numel, x.itemsize), keeps_after=lambda y: [tape.new(x.numel, mask)])


def cross_entropy(tape: Tape, logits: Sized, labels: Sized) -> Sized:
    """log_softmax, whose result is kept, and the negative log-likelihood, which keeps that, the labels and one number.

    Backward makes two more tensors as large as the logits, the first of which dies with the second.
    """
    scores = softmax(tape, "log_softmax", logits, part="logits")
    return tape.record("loss", [scores], lambda: tape.new(1, scores.itemsize), keeps_after=lambda y: [scores, labels, tape.new(1, scores.itemsize)])
