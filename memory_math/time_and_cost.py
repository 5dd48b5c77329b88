"""How long training takes and what it costs: operations, the share of the peak that is reached, tokens per second, hours, dollars.

    training_time("llama-2-70b", 2e12, gpus=2048, tokens_per_gpu_second=400, price=2.5).table()

With N parameters and D tokens the forward pass takes 2ND operations (a product and a sum for each weight and token) and the backward
pass twice that, half of it for the gradients of the weights and half for those of the activations: 6ND. A frozen base (LoRA, QLoRA,
prompt tuning) has no gradients of weights: 4ND. Running every block again in backward (gradient checkpointing) adds 2ND that the
hardware executes and the model did not ask for. Attention's products of queries with keys and of weights with values are not in N: they
add 12 * L * h * s operations per token (4 forward, 8 backward; L layers, h = heads * head_dim, s tokens), half of it where a kernel skips
what the causal mask hides.

MFU, model FLOPs utilisation: the operations that the model needs, over the hardware's peak. HFU: those executed, over the same.
Sources: Kaplan et al. (arXiv:2001.08361), section 2.1; Chowdhery et al. (PaLM, arXiv:2204.02311), appendix B; Korthikanti et al.
(arXiv:2205.05198), section 6 and appendix A. N is all parameters here, as in PaLM and in what most libraries print; Kaplan leaves the
embedding out.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from .amounts import positive, share
from .architectures import architecture_of, count_parameters
from .errors import MemoryMathError
from .hardware import GPU, Price, gpu_of
from .request import ADAPTED, VIRTUAL, one_of, whole

# method -> operations per parameter and token, forward and backward
METHODS = {"full": (2, 4), **dict.fromkeys((*ADAPTED, *VIRTUAL), (2, 2)), "inference": (2, 0)}
# lowest and highest MFU to expect where nothing was measured. torchtune's 3B on one A100 has reached 0.57 packed and compiled, and 0.13 with
# padded rows, whose padding counts as nothing
TYPICAL_MFU = {"pretraining on many GPUs": (0.38, 0.45), "fine-tuning on one GPU": (0.25, 0.40)}


@dataclass(frozen=True)
class TrainingFlops:
    """Operations for all tokens. model: what the method needs. hardware: with what checkpointing runs again. attention: of `model`, the
    part in the products of attention (0 where no sequence length was given)."""

    model: float
    hardware: float
    attention: float


def training_flops(
    params: object,
    tokens: float,
    *,
    method: str = "full",
    gradient_checkpointing: bool = False,
    layers: int | None = None,
    hidden: int | None = None,
    sequence_length: int | None = None,
    causal: bool = True,
) -> TrainingFlops:
    """Operations to train on `tokens`, of the model and of the hardware.

    params: a number of parameters, or anything count_parameters takes (a preset, a config, a path, a model). Of a mixture of experts
    those count that one token goes through. Every token is taken to go through the whole model, which in an encoder-decoder it does
    not: there the tokens of each half belong to about half of N.
    method: "full"; "lora", "dora", "qlora", "prompt", "prefix", "p-tuning", "residual", where the base is frozen (the adapter's own products, below
    1 % at usual ranks, are left out); "inference", the forward pass alone. gradient_checkpointing: each block runs forward again in backward.
    sequence_length: counts attention, too; layers and hidden are then the model's own, or must be given with a number of parameters.
    causal: attention's kernels skip the masked half (FlashAttention does). Published MFUs count it in full: causal=False.
    Raises MemoryMathError for unknown methods, for sizes that are not given together, and for checkpointing without a backward pass.

    >>> training_flops(70e9, 1.4e12).model                      # Chinchilla's budget, 6ND
    5.88e+23
    >>> training_flops(70e9, 1e9, method="lora", gradient_checkpointing=True).hardware / training_flops(70e9, 1e9, method="lora").model
    1.5
    """
    forward, backward = METHODS[one_of("method", method, METHODS)]
    if gradient_checkpointing and not backward:
        raise MemoryMathError("gradient_checkpointing=True does nothing with method='inference', which has no backward pass: leave it out")
    count, amount = active_parameters_of(params), positive("tokens", tokens)
    per_token = _attention_per_token(params, layers, hidden, sequence_length) * (0.5 if causal else 1.0)
    # through attention both factors of every product are activations, so its backward is twice its forward whatever is frozen
    attention = per_token * (4 + (8 if backward else 0)) * amount
    again = (2.0 * count + 4 * per_token) * amount if gradient_checkpointing else 0.0
    model = (forward + backward) * count * amount + attention
    return TrainingFlops(float(model), float(model + again), float(attention))


def parameters_of(params: object) -> int:
    """The number itself, or the exact count of a preset, config, path or model."""
    if isinstance(params, bool) or not isinstance(params, Real):
        return count_parameters(params).total
    if not (count := round(positive("params", params))):
        raise MemoryMathError(f"params={params!r}: expected at least one parameter")
    return count


def active_parameters_of(params: object) -> int:
    """The parameters that one token goes through: all of them, but of a mixture's experts only those that the router picks.

    >>> round(active_parameters_of("mixtral-8x7b") / 1e9, 1)           # of 46.7 billion
    12.9
    """
    total = parameters_of(params)
    experts = 0 if isinstance(params, (int, float)) else count_parameters(params).parts.get("experts", 0)
    if not experts:
        return total
    architecture = architecture_of(params)
    return total - experts + experts * getattr(architecture, "experts_per_token", 1) // getattr(architecture, "experts", 1)


def _attention_per_token(params: object, layers: int | None, hidden: int | None, sequence_length: int | None) -> float:
    """L * h * s, or 0 where attention is not to be counted."""
    if sequence_length is None:
        if layers is not None or hidden is not None:
            raise MemoryMathError(f"layers={layers}, hidden={hidden} without sequence_length: attention's share needs all three")
        return 0.0
    if layers is None and hidden is None and not isinstance(params, (int, float)):
        architecture = architecture_of(params)
        if getattr(architecture, "task", "") == "ForConditionalGeneration":
            raise MemoryMathError(f"{architecture.name}: the attention of an encoder-decoder is not counted here; leave out sequence_length")
        layers, hidden = architecture.layers, architecture.heads * architecture.head_dim
    if layers is None or hidden is None:
        raise MemoryMathError(f"sequence_length={sequence_length} with layers={layers}, hidden={hidden}: give both, or a model for params")
    return float(whole("layers", layers) * whole("hidden", hidden) * whole("sequence_length", sequence_length))


def mfu(
    params: object,
    *,
    tokens_per_gpu_second: float,
    gpu: str | GPU,
    method: str = "full",
    layers: int | None = None,
    hidden: int | None = None,
    sequence_length: int | None = None,
    causal: bool = False,
) -> float:
    """Model FLOPs utilisation of a measured speed: the model's operations per second over the GPU's dense 16-bit peak.

    causal=False counts attention in full, as PaLM, Korthikanti, llm-foundry and torchtitan do. Without sequence_length it is 6N alone.

    >>> round(mfu("llama-2-70b", tokens_per_gpu_second=323, gpu="A100-80GB"), 3)      # Llama 2's GPU-hours
    0.428
    """
    needed = training_flops(params, 1, method=method, layers=layers, hidden=hidden, sequence_length=sequence_length, causal=causal)
    return needed.model * positive("tokens_per_gpu_second", tokens_per_gpu_second) / gpu_of(gpu).flops_per_second


def hfu(
    params: object,
    *,
    tokens_per_gpu_second: float,
    gpu: str | GPU,
    gradient_checkpointing: bool,
    method: str = "full",
    layers: int | None = None,
    hidden: int | None = None,
    sequence_length: int | None = None,
    causal: bool = False,
) -> float:
    """Hardware FLOPs utilisation: as mfu, with the operations that checkpointing executes a second time."""
    executed = training_flops(
        params, 1, method=method, gradient_checkpointing=gradient_checkpointing,
        layers=layers, hidden=hidden, sequence_length=sequence_length, causal=causal,
    )  # fmt: skip
    return executed.hardware * positive("tokens_per_gpu_second", tokens_per_gpu_second) / gpu_of(gpu).flops_per_second


def tokens_per_gpu_second_of(
    params: object,
    *,
    gpu: str | GPU,
    mfu: float,
    method: str = "full",
    layers: int | None = None,
    hidden: int | None = None,
    sequence_length: int | None = None,
    causal: bool = False,
) -> float:
    """The speed that a utilisation stands for: the inverse of the function mfu.

    >>> round(tokens_per_gpu_second_of("llama-2-70b", gpu="A100-80GB", mfu=0.428))
    323
    """
    needed = training_flops(params, 1, method=method, layers=layers, hidden=hidden, sequence_length=sequence_length, causal=causal)
    return share("mfu", mfu) * gpu_of(gpu).flops_per_second / needed.model


@dataclass(frozen=True)
class TrainingTime:
    """One run. mfu: None without a GPU to compare with. dollars: None without a price. price: dollars per GPU and hour."""

    parameters: int
    tokens: float
    gpus: int
    gpu: str | None
    tokens_per_gpu_second: float
    mfu: float | None
    price: float | None

    @property
    def seconds(self) -> float:
        return self.tokens / (self.gpus * self.tokens_per_gpu_second)

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def days(self) -> float:
        return self.hours / 24

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs together: it does not depend on how many there are (in truth it grows, as more of them wait for each other)."""
        return self.hours * self.gpus

    @property
    def dollars(self) -> float | None:
        return None if self.price is None else self.gpu_hours * self.price

    def table(self) -> str:
        """The numbers, one a line, as fixed-width text."""
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("tokens", f"{self.tokens:,.0f}"),
            ("GPUs", f"{self.gpus:,}" + (f" x {self.gpu}" if self.gpu else "")),
            ("tokens/s per GPU", f"{self.tokens_per_gpu_second:,.1f}"),
            ("MFU", "-" if self.mfu is None else f"{self.mfu:.1%}"),
            ("time", _duration(self.seconds)),
            ("GPU-hours", f"{self.gpu_hours:,.1f}"),
            ("dollars", "-" if self.dollars is None else f"{self.dollars:,.2f} at {self.price:g} per GPU-hour"),
        ]
        return "\n".join(f"{name:<18}{value}" for name, value in rows)

    def __str__(self) -> str:
        return self.table()


def training_time(
    params: object,
    tokens: float,
    *,
    gpus: int,
    tokens_per_gpu_second: float | None = None,
    gpu: str | GPU | None = None,
    mfu: float | None = None,
    price: float | Price | None = None,
    method: str = "full",
    sequence_length: int | None = None,
) -> TrainingTime:
    """Seconds, GPU-hours and dollars to train on `tokens`.

    The speed comes from tokens_per_gpu_second (measured; with a gpu, its MFU is told), or from a gpu and the mfu expected of it.
    params: a number, or anything count_parameters takes. price: dollars per GPU-hour, or a Price of a GPU's prices.
    sequence_length: counts attention in the MFU, as mfu() does; params must then be a model.
    Raises MemoryMathError unless there is exactly one way to the speed.

    >>> lecture = training_time(70e9, 2e12, gpus=11, tokens_per_gpu_second=400)
    >>> round(lecture.days, 1)
    5260.9
    >>> round(training_time("llama-2-7b", 2e12, gpus=1, gpu="A100-80GB", mfu=0.39).gpu_hours, -3)     # Llama 2 states 184,320
    185000.0
    """
    count, amount = parameters_of(params), positive("tokens", tokens)
    device = None if gpu is None else gpu_of(gpu)
    per_token = training_flops(params, 1, method=method, sequence_length=sequence_length, causal=False).model
    if tokens_per_gpu_second is not None and mfu is None:
        speed = positive("tokens_per_gpu_second", tokens_per_gpu_second)
        reached = None if device is None else speed * per_token / device.flops_per_second
    elif tokens_per_gpu_second is None and mfu is not None and device is not None:
        reached = share("mfu", mfu)
        speed = reached * device.flops_per_second / per_token
    else:
        raise MemoryMathError(_no_speed(tokens_per_gpu_second, device, mfu))
    dollars = price.dollars_per_hour if isinstance(price, Price) else None if price is None else positive("price", price)
    return TrainingTime(count, amount, whole("gpus", gpus), device.name if device else None, speed, reached, dollars)


def _no_speed(tokens_per_gpu_second: float | None, gpu: GPU | None, mfu: float | None) -> str:
    typical = "; ".join(f"{what} {low} to {high}" for what, (low, high) in TYPICAL_MFU.items())
    given = f"tokens_per_gpu_second={tokens_per_gpu_second}, gpu={gpu.name if gpu else None}, mfu={mfu}"
    return f"{given}: give the speed one way, tokens_per_gpu_second, or gpu and mfu (typical MFUs: {typical})"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.2f} seconds"
