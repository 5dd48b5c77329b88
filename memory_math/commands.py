"""What each command of `python -m memory_math` asks for, and the text it answers with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import hardware
from .architectures import count_parameters
from .errors import MemoryMathError
from .footprint import predict
from .in_context import in_context
from .knobs import predict_defaults
from .ledger import claims
from .limits import verdict
from .number_formats import number_formats
from .optimizers import OPTIMIZERS
from .precision import PRECISIONS
from .quantization import QUANTIZATIONS
from .questions import explain_oom, largest, models_that_fit, savings
from .report import size_text
from .request import METHODS, VIRTUAL, one_of
from .scaling_laws import chinchilla, hoffmann_text, plot
from .tables import compare_requests, table
from .time_and_cost import training_flops, training_time

WHOLE = ("batch_size", "sequence_length", "target_length", "rank", "num_virtual_tokens", "grad_accum_steps", "zero_stage", "world_size",
         "tensor_parallel", "label_tokens", "encoder_hidden_size")  # fmt: skip
FLAGS = ("prefix_projection", "compile", "offload_optimizer", "offload_activations", "optimizer_in_backward")
WORDS = ("method", "prompt", "precision", "quantization", "optimizer", "attention", "loss", "adapter_dtype", "optimizer_implementation",
         "implementation", "device")  # fmt: skip
HELP = {
    "method": ", ".join(METHODS), "prompt": f"what stands before the text in inference: {', '.join(VIRTUAL)} (lora_lab)",
    "precision": ", ".join(PRECISIONS), "quantization": f"of frozen linear layers: {', '.join(QUANTIZATIONS)}",
    "optimizer": ", ".join(OPTIMIZERS), "attention": "eager, sdpa, flash", "adapter_dtype": "of adapters and prompts; float32 if not given",
    "loss": "cross_entropy, chunked, hf_legacy, mean, none; if not given, the implementation's own",
    "optimizer_implementation": "fused, foreach, for-loop, rounded; if not given, the code's own",
    "implementation": "transformers (with PEFT; the default) or lora_lab", "device": "cuda or cpu",
    "batch_size": "rows of one micro-batch", "sequence_length": "tokens of a row",
    "target_length": "tokens of the decoder of an encoder-decoder", "rank": "of LoRA", "num_virtual_tokens": "of prompt and prefix tuning",
    "grad_accum_steps": "micro-batches of a step", "zero_stage": "0, 1, 2, 3: what data-parallel devices divide",
    "world_size": "data-parallel devices", "tensor_parallel": "devices to a model", "label_tokens": "positions with a label (lora_lab)",
    "prefix_projection": "a network makes the prefix", "encoder_hidden_size": "of the network that makes a prompt or prefix (lora_lab)",
    "compile": "as torch.compile runs it", "offload_optimizer": "states in the host's memory",
    "offload_activations": "what backward needs waits in the host's memory", "optimizer_in_backward": "every gradient is used as it arrives",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """options: adds a command's arguments to its parser. run: its answer, as text."""

    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a preset such as llama-3-8b, or a folder with a config.json")


def _request(parser: argparse.ArgumentParser, *without: str) -> None:
    """Every keyword of `predict`, with its default; those in `without` are what the command goes through itself."""
    defaults = predict_defaults()
    for kind, names in ((int, WHOLE), (str, WORDS)):
        for name in (name for name in names if name not in without):
            told = "" if defaults[name] is None else f"; default {defaults[name]}"
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name], help=HELP[name] + told)
    for name in FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=defaults[name], help=HELP[name])
    parser.add_argument("--dropout", type=float, default=defaults["dropout"], help="of the adapters; default 0")
    parser.add_argument("--gradient-checkpointing", nargs="?", const=True, default=False, type=_checkpointing, metavar="n | attention")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="all-linear, attention, or names like q_proj")
    parser.add_argument("--versions", nargs="+", default=None, metavar="library=version", help="such as transformers=4.28 torch=2.0")


def _checkpointing(text: str) -> int | str:
    if text.isdecimal() or text == "attention":
        return int(text) if text.isdecimal() else text
    raise argparse.ArgumentTypeError(f"{text!r}: expected nothing, n or 'attention'; the model's name goes before the options")


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `predict` among the arguments."""
    known = predict_defaults()
    request = {name: value for name, value in vars(arguments).items() if name in known}
    targets = request["target_modules"]
    request["target_modules"] = targets[0] if targets in (["all-linear"], ["attention"]) else targets
    request["versions"] = _versions(request["versions"])
    return request


def _versions(pairs: list[str] | None) -> Mapping[str, str] | None:
    if pairs is None:
        return None
    for pair in pairs:
        if "=" not in pair:
            raise MemoryMathError(f"--versions {pair}: expected library=version, such as transformers=4.28")
    return dict(pair.split("=", 1) for pair in pairs)


def _changed(request: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults: the questions vary the rest."""
    defaults = predict_defaults()
    return {name: value for name, value in request.items() if value != defaults[name]}


def _predict_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _request(parser)
    parser.add_argument("--gpu", help="also say whether it fits this GPU, such as T4 or A100-80GB")
    parser.add_argument("--json", action="store_true", help="everything as JSON, bytes as whole numbers")
    parser.add_argument("--svg", metavar="FILE", help="write the parts and the phases as a picture, too")


def _predict(arguments: argparse.Namespace) -> str:
    """The memory of one training step, or of a prompt, part by part."""
    footprint = predict(arguments.model, **_asked(arguments))
    fits = verdict(footprint, arguments.gpu) if arguments.gpu else None
    if arguments.svg:
        _write(arguments.svg, footprint.svg(arguments.gpu))
    if arguments.json:
        asked = {"gpu": arguments.gpu, "fits": footprint.fits(arguments.gpu), "verdict": fits} if arguments.gpu else {}
        return json.dumps({**footprint.as_dict(), **asked}, indent=2)
    if arguments.gpu is None:
        return footprint.table()
    gpu = hardware.gpu_of(arguments.gpu)
    texts = {
        "yes": "fits", "no": f"does not fit; {footprint.gpus_needed(gpu.name)} if it divided evenly",
        "tight": "tight: what is allocated fits, what torch is expected to reserve for it does not",
    }  # fmt: skip
    return f"{footprint.table()}\n{gpu.name} ({size_text(gpu.usable_bytes)} usable): {texts[str(fits)]}{_sixteen_bit(gpu, arguments.precision)}"


def _sixteen_bit(gpu: hardware.GPU, precision: str) -> str:
    """A note where a GPU's 16 bit is not the precision's."""
    slow = gpu.sixteen_bit == "fp16" and precision.startswith("bf16")
    return f"\n{gpu.name} is fast in fp16 and has no bf16: use fp16-mixed" if slow else ""


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as problem:
        raise MemoryMathError(f"{path}: cannot be written ({problem.strerror})") from problem


def _table_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _request(parser, "precision", "optimizer")
    parser.add_argument("--markdown", action="store_true")


def _table(arguments: argparse.Namespace) -> str:
    """Every precision with every optimizer."""
    request = {name: value for name, value in _changed(_asked(arguments)).items() if name not in ("precision", "optimizer")}
    found = table(arguments.model, **request)
    return found.markdown() if arguments.markdown else str(found)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _request(parser, "method")
    parser.add_argument("--methods", nargs="+", default=["full", "lora", "qlora", "prompt"])
    parser.add_argument("--gpu", help="also say which fit this GPU")
    parser.add_argument("--markdown", action="store_true")


def _compare(arguments: argparse.Namespace) -> str:
    """Several methods beside each other."""
    for method in arguments.methods:
        one_of("--methods", method, METHODS)
    found = compare_requests(arguments.model, arguments.methods, gpu=arguments.gpu, **_changed(_asked(arguments)))
    return found.markdown() if arguments.markdown else str(found)


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a preset or a folder; without one, the largest presets that fit")
    _request(parser)
    parser.add_argument("--gpu", required=True, help="such as T4, RTX-4090, A100-80GB")


def _fit(arguments: argparse.Namespace) -> str:
    """Does it fit, what is the largest that does, and what would save how much."""
    request = _changed(_asked(arguments))
    if arguments.model is None:
        return str(models_that_fit(arguments.gpu, **request))
    answers = [str(explain_oom(arguments.model, arguments.gpu, **request))]
    for what in ("batch_size", "sequence_length"):
        rest = {name: value for name, value in request.items() if name != what}
        answers.append(str(largest(arguments.model, arguments.gpu, what, **rest)))
    note = _sixteen_bit(hardware.gpu_of(arguments.gpu), arguments.precision)
    return "\n".join([*answers, "", str(savings(arguments.model, **request))]) + note


def _params(arguments: argparse.Namespace) -> str:
    """The exact number of parameters, part by part."""
    return str(count_parameters(arguments.model))


def _formats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("value", type=float)
    parser.add_argument("--scale", type=float, help="of nf4: the largest absolute value of the block")
    parser.add_argument("--svg", metavar="FILE", help="write the picture of the bits, too")


def _formats(arguments: argparse.Namespace) -> str:
    """One number in every format: nearest value, error, bits."""
    found = number_formats(arguments.value, scale=arguments.scale)
    if arguments.svg:
        _write(arguments.svg, found.svg())
    return found.table()


def _time_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a preset, a folder, or a number of parameters such as 70e9")
    parser.add_argument("--tokens", type=float, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens-per-gpu-second", type=float)
    parser.add_argument("--gpu")
    parser.add_argument("--mfu", type=float, help="share of the GPU's peak, such as 0.4")
    parser.add_argument("--price", type=float, help="dollars per GPU-hour")
    parser.add_argument("--method", default="full", help="full; lora, qlora, dora, prompt, prefix: a frozen base; inference")
    parser.add_argument("--sequence-length", type=int, help="counts the products of attention, too")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="tells what the hardware executes, each forward pass twice")


def _time(arguments: argparse.Namespace) -> str:
    """Days, GPU-hours and dollars of a training."""
    asked = {name: value for name, value in vars(arguments).items() if name not in ("command", "model")}
    model, tokens, again = _size(arguments.model), asked.pop("tokens"), asked.pop("gradient_checkpointing")
    shared = {"method": asked["method"], "sequence_length": asked["sequence_length"]}
    flops = training_flops(model, tokens, gradient_checkpointing=again, causal=False, **shared)
    executed = f", {flops.hardware:.4g} executed" if again else ""
    return f"{training_time(model, tokens, **asked)}\n{'operations':<18}{flops.model:.4g} of the model{executed}"


def _size(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _scaling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flops", type=float, nargs="?", default=5.76e23, help="training operations, 6 x parameters x tokens")
    parser.add_argument("--svg", metavar="FILE", help="write the curves of optimal sizes, too")


def _scaling(arguments: argparse.Namespace) -> str:
    """The compute-optimal model and data for a budget, by rule, as published, as corrected."""
    if arguments.svg:
        _write(arguments.svg, plot())
    return f"{chinchilla(arguments.flops).table()}\n\n{hoffmann_text()}"


def _context_options(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    for name in ("shots", "tokens-per-shot", "question-tokens", "answer-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--context-window", type=int)
    parser.add_argument("--gpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--price", type=float)
    parser.add_argument("--tuning-tokens", type=float)


def _context(arguments: argparse.Namespace) -> str:
    """Examples in every prompt against a tuned model: window, cache, time, money."""
    asked = {name: value for name, value in vars(arguments).items() if name not in ("command", "model")}
    return str(in_context(arguments.model, **asked))


def _claims_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true")


def _claims(arguments: argparse.Namespace) -> str:
    """Every number of the lectures and the papers, recomputed, with a verdict."""
    found = claims()
    return found.markdown() if arguments.markdown else str(found)


def _gpus(arguments: argparse.Namespace) -> str:
    """The GPUs known here: memory, speed, price with date and source."""
    return hardware.table()


COMMANDS = {
    "predict": Command(_predict_options, _predict),
    "table": Command(_table_options, _table),
    "compare": Command(_compare_options, _compare),
    "fit": Command(_fit_options, _fit),
    "params": Command(_model, _params),
    "formats": Command(_formats_options, _formats),
    "time": Command(_time_options, _time),
    "scaling": Command(_scaling_options, _scaling),
    "context": Command(_context_options, _context),
    "claims": Command(_claims_options, _claims),
    "gpus": Command(lambda parser: None, _gpus),
}
