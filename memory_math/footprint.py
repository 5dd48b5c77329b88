"""How much memory a training step or a prompt needs, part by part.

    predict("llama-2-7b", method="lora", precision="bf16-mixed", batch_size=4, sequence_length=1024).table()

`predict` checks the request (request.py), plays one step of the model's forward, loss, backward and optimizer on sizes (simulate.py), and
returns a `Footprint`: the parts that are alive at the peak, the peak of every phase, and what a GPU's allocator and driver add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import hardware
from .allocator import CachingAllocator
from .architectures import architecture_of, base_of
from .describe import asked_of, checked_text, how, idle_keywords, unchecked
from .errors import MemoryMathError
from .limits import limit_of
from .prompted import with_prompt_of
from .report import footprint_html, footprint_json, footprint_svg, footprint_table
from .request import USUAL_LENGTH, USUAL_TOKENS, Request, check
from .simulate import Simulation, simulate
from .tape import PUBLIC_PARTS, Ledger

GIB = 2**30


class Interval(int):
    """An estimate in bytes, which is what it is as an int, with the range it is expected in, low to high, and why there is a range.

    >>> total = Interval(5, low=4, high=7, why="an example")
    >>> total, total.low <= 6 <= total.high
    (5, True)
    """

    low: int
    high: int
    why: str

    def __new__(cls, estimate: int, low: int, high: int, why: str) -> Interval:
        interval = super().__new__(cls, estimate)
        interval.low, interval.high, interval.why = low, high, why
        return interval

    def __getnewargs__(self) -> tuple[int, int, int, str]:  # type: ignore[override]
        return int(self), self.low, self.high, self.why

    @property
    def estimate(self) -> int:
        return int(self)

    def as_dict(self) -> dict[str, Any]:
        return {"estimate": int(self), "low": self.low, "high": self.high, "why": self.why}


@dataclass(frozen=True)
class Footprint:
    """Bytes alive at the peak of a step, by part; the parts sum to `total`, also called `allocated` (what torch's allocator would report).

    weights: of the model and its adapters. gradients, optimizer_states: of what trains. activations: what autograd keeps for backward
    (keys and values in inference). logits: logits, what the loss makes of them, and their gradients. workspace: temporaries, gradients on
    their way, 16-bit copies of 32-bit weights, cuBLAS. other: token ids, labels, rotary tables.
    phases: the peak of each phase, in bytes. peak_phase: where the highest is. saved_bytes: all that autograd keeps of one forward pass
    (what `measure.saved_bytes` reads). saved: the same by operation, summed over the blocks.
    reserved, nvidia_smi: what torch reserves from the GPU, and what nvidia-smi shows for the process, each an `Interval`; None on a CPU.
    parameters, trained: elements of the base model, and elements that train. how: the product that each part is. validated: what predictions of
    this kind have been held against. outside: what of this request has been held against nothing. idle: keywords that were given and change
    nothing here. adapted_layers: linear layers with an adapter. request: keywords with which `predict` gives the same again.
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
    outside: tuple[str, ...]
    idle: tuple[str, ...]
    adapted_layers: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PUBLIC_PARTS)

    @property
    def allocated(self) -> Interval:
        low, high, why = allocated_range(self.request["device"], self.outside)
        return Interval(self.total, int(low * self.total), int(high * self.total), why)

    @property
    def intervals(self) -> dict[str, Interval]:
        """The totals that are told apart, each with its range and the reason for it: allocated, and on a GPU reserved and nvidia_smi."""
        found = {"allocated": self.allocated, "reserved": self.reserved, "nvidia_smi": self.nvidia_smi}
        return {name: interval for name, interval in found.items() if interval is not None}

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
        return float(value / GIB)

    def table(self) -> str:
        """The parts with their size, share and origin, the phases and the totals, as fixed-width text."""
        return footprint_table(self)

    def __str__(self) -> str:
        return self.table()

    def svg(self, gpu: str | int | None = None) -> str:
        """The parts as a stacked bar, with the usable bytes of `gpu` (or a limit in bytes) marked, above the peaks of the phases."""
        return footprint_svg(self, gpu)

    def _repr_html_(self) -> str:
        return footprint_html(self)

    def to_json(self, indent: int | None = 2) -> str:
        """`as_dict` as JSON, bytes as whole numbers."""
        return footprint_json(self, indent)

    def fits(self, gpu: str | int) -> bool:
        """Whether `total` is within the usable bytes of one GPU (its memory less the CUDA context), or within a number of bytes.

        What torch reserves is more: see `limits.reserved_fits`, and the verdicts that the command line prints.
        """
        return self.total <= limit_of(gpu)[1]

    def gpus_needed(self, gpu: str) -> int:
        """GPUs of this kind if the total divided evenly among them: ceil(total / nominal bytes)."""
        return -(-self.total // hardware.gpu_of(gpu).nominal_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Everything, with the totals, as plain numbers and strings (for JSON)."""
        intervals = {name: interval.as_dict() for name, interval in self.intervals.items()}
        own = {name: intervals.get(name, value) for name, value in asdict(self).items()}
        return {**own, "total": self.total, "saved_bytes": self.saved_bytes, "intervals": intervals}


def predict(
    source: object,
    *,
    method: str = "full",
    precision: str = "fp32",
    quantization: str = "none",
    optimizer: str = "adamw",
    batch_size: int = 1,
    sequence_length: int = USUAL_LENGTH,
    gradient_checkpointing: bool | int | str = False,
    attention: str = "sdpa",
    loss: str | None = None,
    rank: int = 8,
    target_modules: str | Sequence[str] = "all-linear",
    num_virtual_tokens: int = USUAL_TOKENS,
    prompt: str | None = None,
    prefix_projection: bool | None = None,
    encoder_hidden_size: int | None = None,
    dropout: float = 0.0,
    adapter_dtype: object = None,
    grad_accum_steps: int = 1,
    zero_stage: int = 0,
    world_size: int = 1,
    tensor_parallel: int = 1,
    compile: bool = False,
    versions: Mapping[str, str] | None = None,
    target_length: int | None = None,
    offload_optimizer: bool = False,
    offload_activations: bool = False,
    optimizer_in_backward: bool = False,
    optimizer_implementation: str | None = None,
    implementation: str | None = None,
    device: str = "cuda",
    label_tokens: int | None = None,
) -> Footprint:
    """The memory of one step, on one device.

    source: a preset name, a config or its dict, a path to a folder or config.json, or a model with a .config.
    method: what trains: "full" everything; "lora", "dora", "qlora" adapters on a frozen, under "qlora" quantised, model; "prompt", "prefix"
    `num_virtual_tokens` vectors before the text or keys and values in every block; "p-tuning", "residual" vectors that a small network makes;
    "frozen" nothing, but gradients reach the embeddings; or "inference": a prompt of sequence_length for each of batch_size rows, keys and values
    kept, logits of the last position.
    num_virtual_tokens, prompt: how many there are, beside the text's sequence_length; and what they are in inference, "prompt", "prefix",
    "p-tuning" or "residual". prefix_projection: a network makes the prefix, too. encoder_hidden_size: of the network, None is prompt_tuning_lab's
    own. Left out, all four are those of the active task where source is a prompted model; else 20, nothing, False and None.
    precision: "fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"; see precision.py. quantization: of the frozen linear layers, "none", "nf4",
    "nf4-dq", "int8"; see quantization.py; embeddings, norms and head stay in the precision's 16 bit, PEFT's prepare_model_for_kbit_training,
    which makes them 32 bit, is not called. adapter_dtype: of adapters and prompts, None is float32.
    optimizer: "sgd", "momentum", "adam", "adamw", "adamw8bit", "adafactor", "lion"; see optimizers.py. optimizer_implementation: "fused",
    "foreach", "for-loop", "rounded"; None is lora_lab's own (of 16-bit weights the step that is rounded by chance, else fused), or torch's choice.
    optimizer_in_backward: every gradient is used as it arrives.
    batch_size, sequence_length: of one micro-batch; rows of one length, no padding; a length that is left out is 2048, or what there is of learned
    positions. target_length: of an encoder-decoder's decoder, None is sequence_length. grad_accum_steps: micro-batches per step.
    gradient_checkpointing: True keeps each block's input and runs the block again in backward, n does so for every n-th block, "attention" for
    the core of every attention. attention: "eager", "sdpa", "flash". loss: see models/losses.py; None takes the implementation's own,
    "cross_entropy" in transformers ("hf_legacy" before 4.45), "chunked" in lora_lab.
    rank, target_modules, dropout: of the adapters. compile: as torch.compile runs it, elementwise work computed again in backward.
    zero_stage, world_size, tensor_parallel: see parallel.py. offload_optimizer, offload_activations: to the host's memory.
    versions: libraries whose behaviour changed, {"transformers": "4.28"}; see versions.py.
    implementation: whose model code it is, "transformers" (5.23, with PEFT 0.21) or "lora_lab" (this project's); None is that of a model given as
    source, else transformers. device: "cuda" (16-bit attention by FlashAttention 2), or "cpu", where what one operator allocates for itself is
    left out, as no tensor shows it.
    label_tokens: positions with a label (lora_lab computes the loss of no others); None is every position that can have one.
    Raises MemoryMathError for a value or a combination that is not modelled.

    >>> predict("smollm2-135m", method="lora", precision="bf16-mixed", batch_size=4, sequence_length=256).weights
    278798976
    """
    asked = {name: value for name, value in locals().items() if name != "source"}
    asked["implementation"] = implementation_of(source) if implementation is None else implementation
    request = check(architecture_of(source), **with_prompt_of(source, asked))
    ledger = CachingAllocator() if request.device == "cuda" else Ledger()
    return _footprint(request, simulate(request, ledger), ledger)


def implementation_of(source: object) -> str:
    """Whose code a live model is; of one around another, that one's."""
    return "lora_lab" if type(base_of(source)).__module__.startswith("lora_lab.") else "transformers"


def _footprint(request: Request, run: Simulation, ledger: Ledger) -> Footprint:
    parts = {part: run.ledger.at_peak[part] for part in PUBLIC_PARTS}
    parts["workspace"] += run.ledger.at_peak["temporary"]
    outside = unchecked(request)
    reserved, nvidia_smi = _gpu_totals(ledger, outside) if isinstance(ledger, CachingAllocator) else (None, None)
    return Footprint(
        name=request.architecture.name, request=asked_of(request), **parts, phases=dict(ledger.phases), peak_phase=ledger.peak_phase,
        saved=run.kept_by_name, parameters=run.parameters, trained=run.trained, reserved=reserved, nvidia_smi=nvidia_smi,
        how=how(request, run), validated=checked_text(request), outside=outside, idle=idle_keywords(request),
        adapted_layers=len(request.adapted),
    )  # fmt: skip


def allocated_range(device: str, outside: tuple[str, ...]) -> tuple[float, float, str]:
    """The total's range as shares of it, and the reason."""
    if outside:
        return 0.8, 1.2, f"not held against a measurement: {', '.join(outside)}"
    if device == "cpu":
        return 0.98, 1.02, "measured training steps on the CPU"
    return 0.94, 1.06, "published figures of GPUs whose library versions are known (benchmarks/memory_accuracy.py)"


def _gpu_totals(ledger: CachingAllocator, outside: tuple[str, ...]) -> tuple[Interval, Interval]:
    """What the caching allocator holds, and what the process holds with the CUDA context on top."""
    below, above, _ = allocated_range("cuda", outside)
    estimate, low = ledger.peak_reserved, int(below * ledger.peak_total)
    high = max(estimate, int(above * 1.25 * ledger.peak_total))
    why = (
        "low: the least allocated, without fragmentation; estimate: this step's requests played through the allocator's rules; "
        "high: 1.25 x the most allocated, the widest published ratio being 1.24"
    )
    smallest, usual, largest = hardware.CONTEXT_BYTES
    context = "CUDA context: 0.47 GiB with lazily loaded kernels, 0.92 GiB with all of them (A100, PyTorch 2.1)"
    return Interval(estimate, low, high, why), Interval(estimate + usual, low + smallest, high + largest, f"{why}. {context}")
