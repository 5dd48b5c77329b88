"""What is asked of `predict`, checked: everything that is not modelled, or that cannot go together, is refused here, by name."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .architectures import Architecture, LinearLayer
from .errors import MemoryMathError
from .optimizers import IMPLEMENTATIONS, optimizer_of
from .parallel import Parallel, check_parallel
from .precision import ADAPTER_BYTES, Precision, itemsize_of, precision_of
from .quantization import QUANTIZATIONS
from .tape import Leaf
from .targets import adapted_layers, near
from .versions import Versions, versions_of

METHODS = ("full", "frozen", "lora", "dora", "qlora", "prompt", "prefix", "p-tuning", "residual", "inference")
ADAPTED = ("lora", "dora", "qlora")
VIRTUAL = ("prompt", "prefix", "p-tuning", "residual")
ATTENTIONS = {"transformers": ("eager", "sdpa", "flash"), "lora_lab": ("sdpa",)}
LOSSES = {"transformers": ("cross_entropy", "chunked", "hf_legacy", "mean", "none"), "lora_lab": ("chunked",)}
MOST_ASKED = 2**40  # of a batch, a length, a rank: their products stay numbers that a float can show
DEVICES = ("cuda", "cpu")
OWN_OPTIMIZERS = ("adamw", "adam", "sgd", "momentum", "adafactor", "lion")  # lora_lab.training.optimizers.OPTIMIZERS
IDLE_IN_INFERENCE = {"gradient_checkpointing": False, "grad_accum_steps": 1, "offload_activations": False, "optimizer_in_backward": False}


class Usual(int):
    """A number that nobody has asked for, and that a model with fewer positions, or another prompt, need not have."""


USUAL_LENGTH, USUAL_TOKENS = Usual(2048), Usual(20)


@dataclass(frozen=True)
class Request:
    """A checked request; `adapted` maps the path of every linear layer with an adapter to its shape. `method` is what trains."""

    architecture: Architecture
    method: str
    precision: Precision
    quantization: str
    optimizer: str
    optimizer_implementation: str
    batch_size: int
    sequence_length: int
    target_length: int
    gradient_checkpointing: bool | int | str
    attention: str
    loss: str
    rank: int
    num_virtual_tokens: int
    prompt: str | None
    dropout: float
    adapter_itemsize: int
    grad_accum_steps: int
    parallel: Parallel
    offload_optimizer: bool
    offload_activations: bool
    optimizer_in_backward: bool
    compile: bool
    versions: Versions
    implementation: str
    device: str
    label_tokens: int
    prefix_projection: bool
    encoder_hidden_size: int | None
    target_modules: Any
    adapter_dtype: Any
    adapted: dict[str, LinearLayer] = field(default_factory=dict)

    @property
    def virtual(self) -> str | None:
        """What stands before the text: "prompt" or "prefix", whether it trains or is there for inference; or nothing."""
        word = _before_text(vars(self))
        return word if word in (None, "prefix") else "prompt"

    @property
    def network(self) -> str | None:
        """What makes it: "p-tuning", "residual", or of a prefix an "mlp"; None where it is the numbers themselves."""
        word = _before_text(vars(self))
        if word == "prefix":
            return "mlp" if self.prefix_projection else None
        return None if word == "prompt" else word

    @property
    def positions(self) -> int:
        """Positions in one row, the virtual tokens of a prompt included."""
        return self.sequence_length + (self.num_virtual_tokens if self.virtual == "prompt" else 0)

    @property
    def prefix(self) -> int:
        """Virtual keys and values in front of every block's own."""
        return self.num_virtual_tokens if self.virtual == "prefix" else 0

    @property
    def tokens(self) -> int:
        """T: positions in one micro-batch."""
        return self.batch_size * self.positions

    @property
    def trains(self) -> bool:
        return self.method != "inference"

    @property
    def drops(self) -> bool:
        """Whether the base's dropout is at work: prompt_tuning_lab keeps it in eval mode under a prompt that trains."""
        return self.trains and not (self.implementation == "lora_lab" and self.method in VIRTUAL)

    @property
    def divided_masters(self) -> bool:
        """ZeRO's mixed precision: 16-bit weights and gradients, and the float32 masters among the divided optimizer states."""
        return self.parallel.sharded and self.precision.mixed and self.method == "full"

    @property
    def weight_itemsize(self) -> int:
        """Bytes per stored element of the model's own weights."""
        if self.method == "full" and not self.divided_masters:
            return self.precision.trained
        return self.precision.compute if self.method == "full" else self.precision.frozen

    @property
    def most_label_tokens(self) -> int:
        """Positions that can have a label."""
        return _most_labels(self.architecture, vars(self))[0]

    @property
    def autocast(self) -> int | None:
        """Bytes per element that matrix products are cast to; None where they run in what they are given. lora_lab's bf16 runs under it, too."""
        mixed = self.precision.mixed or (self.implementation == "lora_lab" and self.precision.compute == 2)
        return self.precision.compute if mixed and self.trains and not self.divided_masters else None

    @property
    def keeps_quantized_input(self) -> bool:
        """bitsandbytes keeps the input of an 8-bit product, and kept that of a 4-bit one before 0.43.2 (CHANGELOG, "QLoRA mem bug")."""
        if self.implementation == "lora_lab":
            return False
        return self.quantization == "int8" or (self.quantization != "none" and self.versions.before("bitsandbytes", "0.43.2"))

    def leaf(self) -> Leaf:
        """Where the gradient of one trained tensor arrives."""
        return Leaf(self.parallel.gradient_shards, self.optimizer_in_backward)

    def checkpoints(self, block: int) -> bool:
        """Whether this block keeps its input only, and runs again in backward."""
        every = self.gradient_checkpointing
        return every is True or (isinstance(every, int) and every > 0 and block % every == 0)


def check(architecture: Architecture, **asked: Any) -> Request:
    """The request, or MemoryMathError with the value, what is supported and what to do."""
    asked["implementation"] = implementation = one_of("implementation", asked["implementation"], ATTENTIONS)
    asked["device"] = one_of("device", asked["device"], DEVICES)
    asked["method"] = method = one_of("method", asked["method"], METHODS)
    asked["precision"] = precision_of(asked["precision"])
    asked["quantization"] = one_of("quantization", asked["quantization"], QUANTIZATIONS)
    if method == "qlora" and asked["quantization"] == "none":
        asked["quantization"] = "nf4"
    asked["prompt"] = None if asked["prompt"] is None else one_of("prompt", asked["prompt"], VIRTUAL)
    asked["versions"] = versions_of(asked["versions"])
    if asked["versions"].before("transformers", "5"):
        architecture = architecture.of_transformers_4()
    for name in ("batch_size", "rank", "grad_accum_steps", "num_virtual_tokens", "world_size", "tensor_parallel"):
        asked[name] = whole(name, asked[name])
    asked["sequence_length"] = _length(architecture, asked)
    asked["parallel"] = check_parallel(asked.pop("zero_stage"), asked.pop("world_size"), asked.pop("tensor_parallel"))
    asked["optimizer_implementation"] = step_kind(asked)
    asked["attention"] = one_of("attention", asked["attention"], ATTENTIONS[implementation], implementation)
    loss = usual_loss(implementation, asked["versions"]) if asked["loss"] is None else asked["loss"]
    asked["loss"] = one_of("loss", loss, LOSSES[implementation], implementation)
    asked["gradient_checkpointing"] = _checkpointing(asked["gradient_checkpointing"])
    for name in ("compile", "offload_optimizer", "offload_activations", "optimizer_in_backward"):
        asked[name] = _flag(name, asked[name])
    asked["prefix_projection"] = _flag("prefix_projection", False if asked["prefix_projection"] is None else asked["prefix_projection"])
    if asked["encoder_hidden_size"] is not None:
        asked["encoder_hidden_size"] = whole("encoder_hidden_size", asked["encoder_hidden_size"])
    asked["dropout"] = _share(asked["dropout"])
    asked["adapter_itemsize"] = _adapter_bytes(asked["adapter_dtype"])
    asked["target_length"] = whole("target_length", asked["sequence_length"] if asked["target_length"] is None else asked["target_length"])
    architecture = architecture if method == "inference" else architecture.with_loss()
    asked["label_tokens"] = _labels(asked["label_tokens"], _most_labels(architecture, asked))
    adapted = _adapted(architecture, asked) if method in ADAPTED else {}
    architecture = architecture.shard(asked["parallel"].tensor_parallel)
    adapted = _adapted(architecture, asked) if adapted else {}
    request = Request(architecture=architecture, adapted=adapted, **asked)
    _check_together(request)
    return request


def _length(architecture: Architecture, asked: dict[str, Any]) -> int:
    """As asked; where it is left to us, at most what the learned positions leave beside virtual tokens."""
    length, longest = whole("sequence_length", asked["sequence_length"]), architecture.learned_positions
    if longest is None or not isinstance(asked["sequence_length"], Usual):
        return int(length)
    virtual = asked["num_virtual_tokens"] if asked["prompt"] or asked["method"] in VIRTUAL else 0
    return max(min(int(length), longest - virtual), 1)


def _adapted(architecture: Architecture, asked: dict[str, Any]) -> dict[str, LinearLayer]:
    """By path; PEFT's "all-linear" may go beyond the linear layers, lora_lab's does not."""
    targets = asked["target_modules"]
    more = architecture.beside_linears() if targets == "all-linear" and asked["implementation"] == "transformers" else ()
    return adapted_layers(architecture, targets) | {layer.name: layer for layer in more}


def _check_together(request: Request) -> None:
    """Combinations that would do nothing, that no kernel exists for, or that do not work."""
    optimizer_of(request.optimizer)
    method = request.method
    if request.quantization != "none" and method == "full":
        raise MemoryMathError(
            f"quantization={request.quantization!r} with method='full': integer codes have no gradient; "
            "use method='qlora' (adapters over the frozen codes) or quantization='none'"
        )
    _check_attention(request)
    if request.dropout and method not in ADAPTED:
        raise MemoryMathError(f"dropout={request.dropout} is LoRA's dropout and does nothing with method={method!r}: leave it at 0")
    if request.label_tokens != request.most_label_tokens and request.implementation != "lora_lab":
        raise MemoryMathError("label_tokens is for implementation='lora_lab': transformers computes the logits of every position")
    if request.optimizer_in_backward and request.grad_accum_steps > 1:
        raise MemoryMathError("optimizer_in_backward=True with grad_accum_steps > 1: a gradient that is used at once cannot be accumulated")
    _check_virtual(request)
    if method == "inference":
        _check_inference(request)
    if request.compile and request.implementation == "lora_lab":
        raise MemoryMathError("compile=True is not modelled with implementation='lora_lab': leave it at False")


def _check_attention(request: Request) -> None:
    if request.attention == "flash" and request.precision.compute != 2:
        precision = request.precision.name
        raise MemoryMathError(f"attention='flash' with precision={precision!r}: the kernel takes 16-bit inputs only; use 'sdpa'")
    if request.attention == "flash" and request.device == "cpu":
        raise MemoryMathError("attention='flash' with device='cpu': the kernel runs on CUDA only; use 'sdpa'")


def _check_inference(request: Request) -> None:
    for name, idle in {**IDLE_IN_INFERENCE, "label_tokens": request.most_label_tokens}.items():
        if (value := getattr(request, name)) != idle:
            raise MemoryMathError(f"{name}={value!r} does nothing with method='inference', which has no backward pass: leave it out")


def _check_virtual(request: Request) -> None:
    """What stands before the text, and what goes with it."""
    theirs = request.implementation != "lora_lab"
    if theirs and request.method == "prefix" and request.gradient_checkpointing:
        raise MemoryMathError("gradient_checkpointing with method='prefix': the prefix is in the key/value cache, which checkpointing turns off in "
                              "transformers; with implementation='lora_lab' it stays on")  # fmt: skip
    if theirs and request.trains and request.network is not None:
        raise MemoryMathError(f"a prompt that a network makes ({request.network}) is modelled with implementation='lora_lab' only; "
                              f"what it makes is a plain one, method={request.virtual!r}")  # fmt: skip
    if request.prompt is None:
        return
    if request.trains:
        raise MemoryMathError(f"prompt={request.prompt!r} is what stands before the text in inference, and method={request.method!r} trains: use "
                              f"method={request.prompt!r}, or method='inference'")  # fmt: skip
    if theirs:
        raise MemoryMathError(f"prompt={request.prompt!r} with method='inference' is modelled with implementation='lora_lab' only")


def one_of(name: str, value: Any, choices: Collection[str], implementation: str | None = None) -> str:
    """`value` where it is among `choices`, which may be those of one implementation."""
    if value not in list(choices):
        whose = f" with implementation={implementation!r}" if implementation else ""
        raise MemoryMathError(f"{name}={value!r} is not modelled{whose}; modelled now: {', '.join(choices)}{near(value, choices)}")
    return str(value)


def whole(name: str, value: Any) -> int:
    """`value`, an integer of whatever type (NumPy's too), where it is at least 1, at most MOST_ASKED."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number <= MOST_ASKED:
        raise MemoryMathError(f"{name}={value!r}: expected a whole number of at least 1, at most {MOST_ASKED:,}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise MemoryMathError(f"{name}={value!r}: expected True or False")
    return value


def _checkpointing(value: Any) -> bool | int | str:
    if isinstance(value, bool) or value == "attention" or (isinstance(value, int) and value >= 1):
        return value
    raise MemoryMathError(f"gradient_checkpointing={value!r}: expected True (every block), False, n (every n-th block) or 'attention'")


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise MemoryMathError(f"dropout={value!r}: expected a number with 0 <= dropout < 1")
    return float(value)


def _adapter_bytes(dtype: object) -> int:
    return ADAPTER_BYTES if dtype is None else itemsize_of("adapter_dtype", dtype)


def usual_loss(implementation: str, versions: Versions) -> str:
    """transformers before 4.45 made float32 logits and a shifted copy of them; see models/losses.py."""
    old = implementation == "transformers" and versions.before("transformers", "4.45")
    return "hf_legacy" if old else LOSSES[implementation][0]


def _before_text(asked: Mapping[str, Any]) -> str | None:
    """The word for what stands before the text, one of VIRTUAL or None."""
    return asked["method"] if asked["method"] in VIRTUAL else asked["prompt"]


def _most_labels(architecture: Architecture, asked: Mapping[str, Any]) -> tuple[int, str]:
    """Positions that can have a label, and how many that is in words: those with a next one, in a decoder behind an encoder all of them; and
    of an encoder all, or one for each row."""
    batch, family = asked["batch_size"], architecture.family
    if family == "t5":
        return batch * asked["target_length"], "batch_size * target_length"
    if family != "bert" and asked["method"] in VIRTUAL and asked["method"] != "prefix":  # the last virtual token predicts the text's first
        return batch * asked["sequence_length"], "batch_size * sequence_length"
    if family != "bert":
        return batch * (asked["sequence_length"] - 1), "batch_size * (sequence_length - 1)"
    if architecture.task == "ForSequenceClassification":
        return batch, "batch_size"
    return batch * asked["sequence_length"], "batch_size * sequence_length"


def _labels(value: Any, most: tuple[int, str]) -> int:
    """None: every position that can have one."""
    if value is None:
        return most[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most[0]:
        raise MemoryMathError(f"label_tokens={value!r}: expected a whole number from 0 to {most[0]}, {most[1]}")
    return value


def step_kind(asked: Mapping[str, Any]) -> str:
    """None: what the loop takes. torch.optim left alone takes foreach on CUDA (since PyTorch 2.0, pull request 92306) and the plain loop elsewhere;
    lora_lab asks for fused where there is such a kernel, and rounds the step of 16-bit weights by chance (lora_lab/training/optimizers.py)."""
    value, own = asked["optimizer_implementation"], asked["implementation"] == "lora_lab"
    narrow = own and asked["method"] == "full" and asked["precision"].trained == 2 and asked["optimizer"] in OWN_OPTIMIZERS
    if value is not None:
        value = one_of("optimizer_implementation", value, IMPLEMENTATIONS)
        if value == "rounded" and not narrow:
            raise MemoryMathError("optimizer_implementation='rounded' is lora_lab's step of 16-bit weights: it needs implementation='lora_lab', "
                                  f"method='full', precision='bf16' and one of {', '.join(OWN_OPTIMIZERS)}")  # fmt: skip
        return value
    if own:
        return "rounded" if narrow else "for-loop" if asked["optimizer"] in ("adafactor", "lion") else "fused"
    return "foreach" if asked["device"] == "cuda" and not asked["versions"].before("torch", "2.0") else "for-loop"
