"""How much memory a training step or a prompt needs, part by part.

    predict("llama-2-7b", method="lora", precision="bf16-mixed", batch_size=4, sequence_length=1024).table()

`predict` checks the request (request.py), plays one step of the model's forward, loss, backward and optimizer on sizes (simulate.py), and
returns a `Footprint`: the parts that are alive at the peak, the peak of every phase, and what a GPU's allocator and driver add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import hardware
from .allocator import CachingAllocator
from .architectures import architecture_of
from .errors import MemoryMathError
from .report import footprint_table
from .request import Request, check
from .simulate import Simulation, simulate
from .tape import Ledger

GIB = 2**30
PUBLIC_PARTS = ("weights", "gradients", "optimizer_states", "activations", "logits", "workspace", "other")


@dataclass(frozen=True)
class Interval:
    """An estimate in bytes, the range it is expected in, and why there is a range."""

    estimate: int
    low: int
    high: int
    why: str


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the peak of a step, by part; the parts sum to `total`, also called `allocated` (what torch's allocator would report).

    weights: of the model and its adapters. gradients, optimizer_states: of what trains. activations: what autograd keeps for backward
    (keys and values in inference). logits: logits, what the loss makes of them, and their gradients. workspace: temporaries, gradients on
    their way, 16-bit copies of 32-bit weights, cuBLAS. other: token ids, labels, rotary tables.
    phases: the peak of each phase, in bytes. peak_phase: where the highest is. saved_bytes: all that autograd keeps of one forward pass
    (what `measure.saved_bytes` reads). saved: the same by operation, summed over the blocks.
    reserved, nvidia_smi: what torch reserves from the GPU, and what nvidia-smi shows for the process; None on a CPU.
    parameters, trained: elements of the base model, and elements that train.
    """

    name: str
    request: dict[str, Any]
    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    logits: int
    workspace: int
    other: int
    phases: dict[str, int]
    peak_phase: str
    saved: dict[str, int]
    parameters: int
    trained: int
    reserved: Interval | None
    nvidia_smi: Interval | None
    how: dict[str, str]
    validated: str

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PUBLIC_PARTS)

    @property
    def allocated(self) -> int:
        return self.total

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())

    def gib(self, part: str = "total") -> float:
        """A part, "total", "reserved" or "nvidia_smi" (their estimates) in GiB, 2**30 bytes."""
        known = (*PUBLIC_PARTS, "total", "allocated", "saved_bytes", "reserved", "nvidia_smi")
        if part not in known:
            raise MemoryMathError(f"part={part!r}: expected one of {', '.join(known)}")
        value = getattr(self, part)
        if value is None:
            raise MemoryMathError(f"{part} is a figure of a GPU, and this prediction is for device='cpu'")
        return (value.estimate if isinstance(value, Interval) else value) / GIB

    def table(self) -> str:
        """The parts with their size, share and origin, the phases and the totals, as fixed-width text."""
        return footprint_table(self)

    def __str__(self) -> str:
        return self.table()

    def fits(self, gpu: str) -> bool:
        """Whether `total` is within the usable bytes of one GPU (its memory less the CUDA context)."""
        return self.total <= hardware.gpu_of(gpu).usable_bytes

    def gpus_needed(self, gpu: str) -> int:
        """GPUs of this kind if the total divided evenly among them: ceil(total / nominal bytes)."""
        return -(-self.total // hardware.gpu_of(gpu).nominal_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the totals, as plain numbers and strings (for JSON)."""
        return {**asdict(self), "total": self.total, "saved_bytes": self.saved_bytes}


def predict(
    source: object,
    *,
    method: str = "full",
    precision: str = "fp32",
    quantization: str = "none",
    optimizer: str = "adamw",
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    loss: str | None = None,
    rank: int = 8,
    target_modules: str | Sequence[str] = "all-linear",
    num_virtual_tokens: int = 20,
    dropout: float = 0.0,
    adapter_dtype: str | None = None,
    grad_accum_steps: int = 1,
    zero_stage: int = 0,
    world_size: int = 1,
    tensor_parallel: int = 1,
    compile: bool = False,
    versions: object = None,
    implementation: str = "transformers",
    device: str = "cuda",
    optimizer_implementation: str | None = None,
    label_tokens: int | None = None,
) -> Footprint:
    """The memory of one step.

    source: a preset name, a config dict, a path to a folder or config.json, or a model with a .config.
    method: "full", "lora", or "inference" (a prompt of sequence_length for each of batch_size rows, logits of the last position).
    precision: "fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"; see precision.py. optimizer: "sgd", "momentum", "adam", "adamw".
    batch_size, sequence_length: of one micro-batch; rows of one length, no padding. grad_accum_steps: micro-batches per step.
    gradient_checkpointing: keep each block's input and run the block again in backward. attention: "eager", "sdpa", "flash".
    loss: None takes the implementation's own: "cross_entropy" in transformers, "chunked" in lora_lab.
    rank, target_modules, dropout: of LoRA; used by method="lora" only.
    implementation: whose model code it is, "transformers" (5.23, with PEFT's LoRA) or "lora_lab" (this project's).
    device: "cuda" (16-bit attention by FlashAttention 2), or "cpu", where what one operator allocates for itself is left out, as no tensor
    shows it. optimizer_implementation: "fused", "foreach", "for-loop"; None is lora_lab's fused, else torch's own choice.
    label_tokens: positions with a label (lora_lab computes the loss of no others); None is every position that has a next one.
    The other keywords are refused at anything but their default: they belong to methods that are not modelled yet.
    Raises MemoryMathError for a value or a combination that is not modelled.

    >>> predict("smollm2-135m", method="lora", precision="bf16-mixed", batch_size=4, sequence_length=256).weights
    278798976
    """
    architecture = architecture_of(source)
    request = check(architecture, **{name: value for name, value in locals().items() if name not in ("source", "architecture")})
    ledger = CachingAllocator() if request.device == "cuda" else Ledger()
    return _footprint(request, simulate(request, ledger), ledger)


def _footprint(request: Request, run: Simulation, ledger: Ledger) -> Footprint:
    parts = {part: run.ledger.at_peak[part] for part in PUBLIC_PARTS}
    parts["workspace"] += run.ledger.at_peak["temporary"]
    reserved, nvidia_smi = _gpu_totals(ledger) if isinstance(ledger, CachingAllocator) else (None, None)
    return Footprint(
        name=request.architecture.name, request=_asked(request), **parts, phases=dict(ledger.phases), peak_phase=ledger.peak_phase,
        saved=run.kept_by_name, parameters=run.parameters, trained=run.trained, reserved=reserved, nvidia_smi=nvidia_smi,
        how=_how(request, run), validated=_validated(request),
    )  # fmt: skip


def _gpu_totals(ledger: CachingAllocator) -> tuple[Interval, Interval]:
    """What the caching allocator holds, and what the process holds with the CUDA context on top."""
    low, estimate = ledger.peak_total, ledger.peak_reserved
    high = max(estimate, ledger.peak_total * 5 // 4)
    why = (
        "low: no fragmentation; estimate: this step's requests played through the allocator's rules; "
        "high: 1.25 x allocated, the widest published ratio being 1.24"
    )
    smallest, usual, largest = hardware.CONTEXT_BYTES
    context = "CUDA context: 0.47 GiB with lazily loaded kernels, 0.92 GiB with all of them (A100, PyTorch 2.1)"
    return Interval(estimate, low, high, why), Interval(estimate + usual, low + smallest, high + largest, f"{why}. {context}")


def _asked(request: Request) -> dict[str, Any]:
    plain = {name: value for name, value in vars(request).items() if name not in ("architecture", "adapted", "precision")}
    return {**plain, "precision": request.precision.name, "adapted_layers": len(request.adapted)}


def _how(request: Request, run: Simulation) -> dict[str, str]:
    """One line per part: the product that it is."""
    precision, full = request.precision, request.method == "full"
    adapters = f" + {run.trained:,} adapter parameters x 4 B" if request.method == "lora" else ""
    each = precision.trained if full else 4
    kept = "block inputs, and one block run again" if request.gradient_checkpointing else f"{request.architecture.layers} blocks"
    stored, tokens, words = (precision.trained if full else precision.frozen), request.tokens, request.architecture.vocabulary
    return {
        "weights": f"{run.parameters:,} parameters x {stored} B{adapters}",
        "gradients": f"of {run.trained:,} trained parameters x {each} B, those alive at the peak" if request.trains else "none",
        "optimizer_states": f"{request.optimizer}: {run.trained:,} parameters" if request.trains else "none",
        "activations": f"kept for backward: {kept} x {tokens:,} tokens" if request.trains else f"keys and values of {tokens:,} tokens",
        "logits": f"loss {request.loss!r} over {words:,} words" if request.trains else "last position of each row",
        "workspace": "gradients on their way, temporaries" + (", 16-bit weight copies" if precision.mixed and full else ""),
        "other": "token ids, labels, rotary tables",
    }


def _validated(request: Request) -> str:
    """What a prediction like this one has been held against, and what it takes for granted."""
    where = f"within 1 %, on small {request.implementation} Llamas."
    text = f"saved bytes equal saved_tensors_hooks, and the peak is a measured CPU step's {where}"
    if request.method == "inference":
        text = f"the peak of a prompt is a measured CPU pass's {where}"
    if request.device == "cuda":
        text += " CUDA's kernels and allocator by their rules: not yet measured on a GPU."
        if request.attention == "sdpa" and request.precision.compute == 4:
            text += " Attention in float32 is taken to be a fused kernel, too."
    return text
