"""What a footprint says of itself: the request in plain values, the product that each part is, what it was checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .request import ADAPTED, USUAL_TOKENS, Request, step_kind, usual_loss

if TYPE_CHECKING:
    from .simulate import Simulation

FAMILIES_ON_GPUS = ("llama", "bert")  # of which there are published figures that are met, in benchmarks/memory_accuracy.py
METHODS_ON_GPUS = ("full", "lora", "qlora", "dora", "prompt", "prefix")


def asked_of(request: Request) -> dict[str, Any]:
    """The request as keywords of `predict`, defaults filled in."""
    special = ("architecture", "adapted", "adapter_itemsize", "precision", "parallel", "versions")
    plain = {name: value for name, value in vars(request).items() if name not in special}
    return {**plain, **vars(request.parallel), "precision": request.precision.name, "versions": dict(request.versions.asked)}


def idle_keywords(request: Request) -> tuple[str, ...]:
    """Keywords that were given another value than their default and change nothing with this method."""
    adapters, virtual, several = request.method in ADAPTED, request.virtual is not None, request.parallel.world_size > 1
    trained, whole = request.trains and request.method != "frozen", request.parallel.zero_stage < 3  # whole: each device has all weights
    settings = {
        "rank": (request.rank != 8, adapters), "target_modules": (request.target_modules != "all-linear", adapters),
        "num_virtual_tokens": (request.num_virtual_tokens != USUAL_TOKENS, virtual),
        "prefix_projection": (request.prefix_projection, request.virtual == "prefix"),
        "encoder_hidden_size": (request.encoder_hidden_size is not None, request.network is not None),
        "adapter_dtype": (request.adapter_dtype is not None, adapters or virtual),
        "optimizer": (request.optimizer != "adamw", trained), "offload_optimizer": (request.offload_optimizer, trained),
        "optimizer_implementation": (request.optimizer_implementation != step_kind({**vars(request), "optimizer_implementation": None}), trained),
        "optimizer_in_backward": (request.optimizer_in_backward, trained), "grad_accum_steps": (request.grad_accum_steps != 1, trained),
        "zero_stage": (request.parallel.zero_stage != 0, request.divided_masters or (several and (trained or not whole))),
        "world_size": (several, trained or not whole), "compile": (request.compile, request.trains),
        "loss": (request.loss != usual_loss(request.implementation, request.versions), request.trains),
        "target_length": (request.target_length != request.sequence_length, request.trains and request.architecture.family == "t5"),
    }  # fmt: skip
    return tuple(name for name, (given, used) in settings.items() if given and not used)


def how(request: Request, run: Simulation) -> dict[str, str]:
    """One line per part: the product that it is."""
    tokens, words = request.tokens, request.architecture.vocabulary
    blocks = f"{request.architecture.layers} blocks"
    kept = {True: "block inputs, and one block run again", False: blocks, "attention": f"{blocks}, attention run again"}
    every = kept.get(request.gradient_checkpointing, f"{blocks}, one in {request.gradient_checkpointing} run again")
    copies = request.autocast is not None and request.method == "full"
    return {
        "weights": _weights_text(request, run),
        "gradients": f"of {run.trained:,} trained parameters x {_trained_itemsize(request)} B, those alive at the peak" if request.trains else "none",
        "optimizer_states": _states_text(request, run),
        "activations": f"kept for backward: {every} x {tokens:,} tokens" if request.trains else f"keys and values of {tokens:,} tokens",
        "logits": f"loss {request.loss!r} over {words:,} words" if request.trains else "last position of each row",
        "workspace": "gradients on their way, temporaries" + (", 16-bit weight copies" if copies else ""),
        "other": "token ids, labels, rotary tables" + (", how the prompt began" if request.virtual and request.implementation == "lora_lab" else ""),
    }


def _trained_itemsize(request: Request) -> int:
    return request.weight_itemsize if request.method == "full" else request.adapter_itemsize


def _weights_text(request: Request, run: Simulation) -> str:
    stored = f"{run.parameters:,} parameters x {request.weight_itemsize} B"
    if request.quantization != "none":
        stacked = any(".experts." in layer.name for layer in request.architecture.beside_linears())
        rest = "stacks of experts, which bitsandbytes leaves alone, and the rest" if stacked else "the rest"
        stored = f"{run.parameters:,} parameters, linear layers in {request.quantization}, {rest} x {request.weight_itemsize} B"
    extra = f" + {run.trained:,} trained x {request.adapter_itemsize} B" if run.trained and request.method != "full" else ""
    shards = request.parallel.weight_shards
    return stored + extra + (f", / {shards}" if shards > 1 else "")


def _states_text(request: Request, run: Simulation) -> str:
    if not request.trains:
        return "none"
    masters = ", with float32 masters" if request.divided_masters else ""
    shards = request.parallel.state_shards
    where = " in the host's memory" if request.offload_optimizer else f", / {shards}" if shards > 1 else ""
    return f"{request.optimizer}: {run.trained:,} parameters{masters}{where}"


def checked_text(request: Request) -> str:
    """What a prediction like this one has been held against, and what it takes for granted."""
    whose = f"{request.implementation} models of this family"
    text = f"saved bytes equal saved_tensors_hooks, and the peak is a measured CPU step's within 2 %, on small {whose}."
    if request.method == "inference":
        text = f"the peak of a prompt is a measured CPU pass's within 2 %, on small {whose}."
    if request.device == "cuda":
        text += " CUDA's kernels and allocator by their rules, held against published figures; not yet measured on a GPU here."
        if request.attention == "sdpa" and request.precision.compute == 4:
            text += " Attention in float32 is taken to be a fused kernel, too."
    return text


def unchecked(request: Request) -> tuple[str, ...]:
    """What of this request has been held against no measurement, neither here nor published: the rules are those of its source alone."""
    parallel, cuda, own = request.parallel, request.device == "cuda", request.implementation == "lora_lab"
    optimizers = ("adamw8bit",) if own else ("adamw8bit", "lion", "adafactor")
    features = {
        "several devices": parallel.world_size > 1 or parallel.tensor_parallel > 1,
        "offload": request.offload_optimizer or request.offload_activations,
        "optimizer step in backward": request.optimizer_in_backward and not own,
        "compile": request.compile,
        f"the loss {request.loss!r}": request.loss == "chunked" and not own,
        f"{request.quantization} weights": request.quantization == "int8",
        f"the optimizer {request.optimizer!r}": request.trains and request.optimizer in optimizers,
        f"{request.architecture.family} on a GPU": cuda and request.architecture.family not in FAMILIES_ON_GPUS,
        f"method {request.method!r} on a GPU": cuda and request.method not in METHODS_ON_GPUS,
        f"{request.implementation} on a GPU": cuda and own,
    }
    return tuple(name for name, asked in features.items() if asked)
