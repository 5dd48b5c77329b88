"""A forward and a backward pass that compute nothing but bytes.

`Tape` does what autograd does, with sizes in place of numbers: a tensor here is a size that occupies the `Ledger` for as long as
something refers to it, an operation records a node that keeps what PyTorch's rule for it keeps, `backward` walks the nodes newest first,
lets go of what they kept and hands gradients on. A model written down with the calls of its real forward (see llama_lora_lab.py) therefore
has its activations, temporaries and peak derived, not typed in.

Lifetimes are CPython's: a size is given back when the last reference to it goes, exactly as a tensor is.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

PUBLIC_PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")  # of a footprint
PARTS = (*PUBLIC_PARTS, "temporary")


class Ledger:
    """Bytes alive now, by part; the peak of every phase; and the parts at the highest peak.

    Equal peaks: the first one is kept.
    """

    def __init__(self) -> None:
        self.live = dict.fromkeys(PARTS, 0)
        self.total = 0
        self.phase = "load"
        self.phases: dict[str, int] = {}
        self.peak_total = -1
        self.at_peak = dict(self.live)
        self.peak_phase = "load"

    def book(self, part: str, nbytes: int) -> None:
        """Add `nbytes` (negative: give back) to `part`."""
        self.live[part] += nbytes
        self.total += nbytes
        if nbytes > 0:
            self.look()

    def look(self) -> None:
        """Compare this moment with the peaks so far."""
        if self.total > self.phases.get(self.phase, -1):
            self.phases[self.phase] = self.total
        if self.total > self.peak_total:
            self.peak_total, self.at_peak, self.peak_phase = self.total, dict(self.live), self.phase

    def place(self, nbytes: int) -> object:
        """Where a storage lies; a plain ledger does not care, an allocator (allocator.py) does."""
        return None

    def release(self, block: Any) -> None:
        """The storage placed at `block` is gone."""

    def enter(self, phase: str) -> None:
        """The bytes from here on belong to `phase`."""
        self.phase = phase
        self.look()


class Storage:
    """`nbytes` in the ledger, from now until nothing refers to this object any more. number: its own for good, as an id would not be."""

    __slots__ = ("block", "ledger", "nbytes", "number", "part")
    numbers = itertools.count()

    def __init__(self, ledger: Ledger, nbytes: int, part: str) -> None:
        self.ledger, self.nbytes, self.part, self.number = ledger, nbytes, part, next(self.numbers)
        self.block = ledger.place(nbytes) if nbytes else None
        ledger.book(part, nbytes)

    def __del__(self) -> None:
        self.ledger.book(self.part, -self.nbytes)
        if self.block is not None:
            self.ledger.release(self.block)

    def move(self, part: str) -> None:
        """The same bytes under another name: a temporary that something keeps becomes an activation, for instance."""
        self.ledger.live[self.part] -= self.nbytes
        self.ledger.live[part] += self.nbytes
        self.part = part


class Sized:
    """A tensor's size: `numel` elements of `itemsize` bytes, the storage they lie in and the node that made them (None: no gradient).

    view: of a gradient, whether it is a view of the tensor that was computed. sources: what it can be made from again, if it can be.
    """

    __slots__ = ("itemsize", "node", "numel", "sources", "storage", "view")

    def __init__(self, numel: int, itemsize: int, storage: Storage, node: Node | Leaf | None = None) -> None:
        self.numel, self.itemsize, self.storage, self.node, self.view = numel, itemsize, storage, node, False
        self.sources: list[Sized] = []

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    @property
    def needs_grad(self) -> bool:
        return self.node is not None


class Leaf:
    """The end of the graph at a trained parameter: the first gradient to arrive becomes ``.grad``, later ones are added into it.

    shards: devices among which gradients are divided as they arrive; one part stays. applied: the optimizer uses a gradient the moment it
    arrives (optimizer step in backward), and it is gone; scratch: bytes that this takes meanwhile. bucketed: the gradient goes into a bucket
    that is there all the time.
    """

    __slots__ = ("applied", "bucketed", "grad", "scratch", "shards")

    def __init__(self, shards: int = 1, applied: bool = False) -> None:
        self.shards, self.applied, self.scratch, self.bucketed = shards, applied, 0, False
        self.grad: Storage | None = None

    def accumulate(self, grad: Sized) -> None:
        if self.grad is not None:
            return
        if self.bucketed:
            self.grad = Storage(grad.storage.ledger, 0, "gradients")
        elif self.shards == 1:
            self.grad = grad.storage
            self.grad.move("gradients")
        else:
            self.grad = Storage(grad.storage.ledger, -(-grad.numel // self.shards) * grad.itemsize, "gradients")

    def finish(self, ledger: Ledger) -> None:
        """Every gradient of this pass has arrived."""
        if self.applied:
            Storage(ledger, self.scratch, "workspace")
            self.grad = None


class Node:
    """One recorded operation: what it keeps for backward, and whom its gradients go to.

    passes: the gradient that arrives is handed on as it is, where the dtype agrees (addition, views). scratch: bytes alive while the
    node runs, beside the gradients it returns. The gradient of an input is as large as the input; one of logits is booked as logits.
    reshapes: the operation works on [tokens, columns], and the gradients it returns are views of those.
    """

    __slots__ = ("frame", "gradients", "kept", "name", "order", "passes", "receivers", "reshapes", "scratch", "slot")

    def __init__(self, order: int, name: str, inputs: Sequence[Sized], passes: bool, scratch: int, reshapes: bool = False) -> None:
        self.order, self.name, self.passes, self.scratch, self.reshapes = order, name, passes, scratch, reshapes
        wanted = [tensor for tensor in inputs if tensor.node is not None]
        self.receivers = [tensor.node for tensor in wanted]
        self.gradients = [(t.numel, t.itemsize, "logits" if t.storage.part == "logits" else "temporary") for t in wanted]
        self.kept: list[Storage] = []
        self.frame: Frame | None = None
        self.slot = 0

    def run(self, tape: Tape, grad: Sized) -> list[Sized]:
        """The gradients of the inputs that want one; afterwards nothing is kept any more."""
        if self.frame is not None:
            self.kept = self.frame.unpack(tape, self.slot)
        scratch = Storage(tape.ledger, self.scratch, "workspace")
        result = [grad if self.passes and wanted[1] == grad.itemsize else self._made(tape, wanted) for wanted in self.gradients]
        del scratch
        self.kept, self.frame = [], None
        return result

    def _made(self, tape: Tape, wanted: tuple[int, int, str]) -> Sized:
        grad = tape.new(*wanted)
        grad.view = self.reshapes
        return grad


class Frame:
    """A checkpointed stretch: keeps its inputs, and runs again when backward first asks for something it would have kept.

    Source: torch.utils.checkpoint with use_reentrant=False and early stopping, PyTorch 2.13.
    """

    def __init__(self, function: Callable[..., Sized], inputs: Sequence[Sized]) -> None:
        self.function, self.inputs = function, list(inputs)
        self.kept = [keep(tensor.storage) for tensor in inputs]
        self.away: list[tuple[int, int, Node | Leaf | None]] = []
        self.slots = 0
        self.again: dict[int, list[Storage]] | None = None

    def unpack(self, tape: Tape, slot: int) -> list[Storage]:
        if self.again is None:
            self.again = {}
            self._bring_back(tape)
            tape.run_in(self)
        return self.again.pop(slot)

    def send_away(self, worth_moving: int) -> None:
        """The inputs, if there is one that is worth it, wait in the host's memory until they are needed again."""
        if any(tensor.nbytes >= worth_moving for tensor in self.inputs):
            self.away = [(tensor.numel, tensor.itemsize, tensor.node) for tensor in self.inputs]
            self.inputs, self.kept = [], []

    def _bring_back(self, tape: Tape) -> None:
        if self.away:
            self.inputs = [Sized(numel, itemsize, tape.new(numel, itemsize).storage, node) for numel, itemsize, node in self.away]


class _Recomputed(Exception):
    """Everything that was wanted has been computed again; the rest of the stretch need not run."""


def keep(storage: Storage) -> Storage:
    """What autograd keeps of the forward pass is an activation."""
    if storage.part == "temporary":
        storage.move("activations")
    return storage


class Tape:
    """Records operations on sizes and plays them backwards.

    device: "cpu" or "cuda", where an operation's rule depends on it. offload: what is kept for backward and has at least so many bytes waits
    in the host's memory, and comes back for the operation that needs it; None: nothing does. keeps_input: operations that keep their input
    although today's PyTorch does not. weight_copies: autocast's cache of cast weights. within: what the checkpointed stretch that is running
    holds until it has run.
    kept_by_name: bytes by the first operation that kept them; their sum is what saved_tensors_hooks sees of one forward pass.
    """

    def __init__(self, ledger: Ledger, device: str = "cuda", offload: int | None = None, keeps_input: frozenset[str] = frozenset()) -> None:
        self.ledger, self.device, self.offload, self.keeps_input = ledger, device, offload, keeps_input
        self.weight_copies: dict[int, Sized] = {}
        self.within: list[Sized] = []
        self.kept_by_name: dict[str, int] = {}
        self._seen: set[int] = set()
        self._to_come: dict[Leaf, int] = {}
        self._order = 0
        self._frame: Frame | None = None

    @property
    def inside_checkpoint(self) -> bool:
        """Whether a checkpointed stretch is running."""
        return self._frame is not None

    def new(self, numel: int, itemsize: int, part: str = "temporary") -> Sized:
        """A fresh tensor."""
        return Sized(numel, itemsize, Storage(self.ledger, numel * itemsize, part))

    def inside_kernel(self, nbytes: int) -> int:
        """Bytes that one operator allocates for itself: CUDA's allocator counts them, on the CPU nobody who follows tensors sees them."""
        return nbytes if self.device == "cuda" else 0

    def record(
        self, name: str, inputs: Sequence[Sized], output: Callable[[], Sized], *, keeps: Sequence[Sized] = (),
        keeps_after: Callable[[Sized], Sequence[Sized]] | None = None, passes: bool = False, busy: int = 0, scratch: int = 0,
        reshapes: bool = False,
    ) -> Sized:  # fmt: skip
        """One operation; wired to a node where an input needs a gradient, otherwise nothing is kept.

        output: makes the result. keeps: inputs kept, put away before the result is made where nothing is kept after. keeps_after: given the
        result, what is kept once it is there (results that backward uses; everything an autograd.Function saves). busy: bytes alive beside
        the result while it is made. passes, scratch, reshapes: see `Node`.
        """
        if not any(tensor.needs_grad for tensor in inputs):
            return self._make(output, busy)
        self._order += 1
        node = Node(self._order, name, inputs, passes, scratch, reshapes)
        self._expect_gradients(node)
        if keeps and keeps_after is None:
            self._put_away(node, [tensor.storage for tensor in keeps])
        result = self._make(output, busy)
        if keeps_after is not None:
            self._put_away(node, [tensor.storage for tensor in (*keeps, *keeps_after(result))])
        return Sized(result.numel, result.itemsize, result.storage, node)

    def _expect_gradients(self, node: Node) -> None:
        """A trained parameter gets one for each use; what runs again is no use of its own."""
        if self._frame is None or self._frame.again is None:
            for leaf in (receiver for receiver in node.receivers if isinstance(receiver, Leaf)):
                self._to_come[leaf] = self._to_come.get(leaf, 0) + 1

    def _make(self, output: Callable[[], Sized], busy: int) -> Sized:
        temporaries = Storage(self.ledger, busy, "workspace")
        result = output()
        del temporaries
        return result

    def _put_away(self, node: Node, kept: list[Storage]) -> None:
        frame = self._frame
        if frame is None:
            node.kept, elsewhere = self._stored(kept)
            node.scratch += elsewhere
            self._count(node.name, kept)
        elif frame.again is None:  # the first run only learns that there will be something to ask for
            node.frame, node.slot = frame, frame.slots
            frame.slots += 1
        else:
            frame.again[len(frame.again)] = [keep(storage) for storage in kept]
            if len(frame.again) == frame.slots:
                raise _Recomputed

    def _stored(self, kept: list[Storage]) -> tuple[list[Storage], int]:
        """What stays on the device, and the bytes that have moved to the host."""
        if self.offload is None:
            return [keep(storage) for storage in kept], 0
        moved = {storage.number: storage.nbytes for storage in kept if storage.part != "weights" and storage.nbytes >= self.offload}
        return [keep(storage) for storage in kept if storage.number not in moved], sum(moved.values())

    def _count(self, name: str, kept: list[Storage]) -> None:
        for storage in kept:
            if storage.number not in self._seen and storage.part != "weights":
                self._seen.add(storage.number)
                self.kept_by_name[name] = self.kept_by_name.get(name, 0) + storage.nbytes

    def run_in(self, frame: Frame) -> Sized | None:
        """Run a checkpointed stretch, the first time or again; again means under an autocast of its own, whose copies end with it."""
        copies = self.weight_copies
        self._frame, self.weight_copies = frame, copies if frame.again is None else {}
        try:
            return frame.function(*frame.inputs)
        except _Recomputed:
            return None
        finally:
            self._frame, self.weight_copies, self.within = None, copies, []

    def checkpoint(self, function: Callable[..., Sized], *inputs: Sized) -> Sized:
        """Run `function` and keep only its inputs, where there will be something to ask for; backward runs it again."""
        frame = Frame(function, inputs)
        result = self.run_in(frame)
        if frame.slots:
            self._count("checkpoint", frame.kept)
        assert result is not None
        if self.offload is not None:
            frame.send_away(self.offload)
        return result

    def backward(self, loss: Sized) -> None:
        """Newest node first, as autograd's engine does."""
        assert isinstance(loss.node, Node)
        waiting: dict[Node, Sized] = {loss.node: self.new(loss.numel, loss.itemsize)}
        queue = [(-loss.node.order, 0, loss.node)]
        while queue:
            node = heapq.heappop(queue)[2]
            grads = node.run(self, waiting.pop(node))
            for receiver in node.receivers:
                self._deliver(grads, receiver, waiting, queue)

    def _deliver(self, grads: list[Sized], receiver: Node | Leaf | None, waiting: dict[Node, Sized], queue: list[tuple[int, int, Node]]) -> None:
        """The first of `grads`. A second gradient for a node is added into its first, or where that is a view into a third tensor.

        Source: torch/csrc/autograd/input_buffer.cpp (can_accumulate_inplace), where a view is not the only one that holds its storage.
        """
        grad = grads.pop(0)
        if isinstance(receiver, Node) and receiver not in waiting:
            waiting[receiver] = grad
            heapq.heappush(queue, (-receiver.order, id(receiver), receiver))
        elif isinstance(receiver, Node) and waiting[receiver].view:
            waiting[receiver] = self.new(grad.numel, grad.itemsize)
        elif isinstance(receiver, Leaf):
            receiver.accumulate(grad)
            del grad
            self._to_come[receiver] -= 1
            if not self._to_come[receiver]:
                receiver.finish(self.ledger)
