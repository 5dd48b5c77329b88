"""python -m lora_lab finetune | generate | inspect | demo

Each command prints its result to stdout and its progress to stderr. A mistake in what was asked for is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import memory_math

from .errors import LoraLabError
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            parsed.run(parsed)
    except (LoraLabError, memory_math.MemoryMathError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lora-lab", description="LoRA by hand: fine-tune a model, use the adapter, look at it.")
    top.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    _finetune(commands.add_parser("finetune", help="train a LoRA adapter on rows of text"))
    _generate(commands.add_parser("generate", help="write text with a model, with or without an adapter"))
    _inspect(commands.add_parser("inspect", help="what LoRA would adapt in a model, or what an adapter holds"))
    _demo(commands.add_parser("demo", help="the whole story on bundled reviews: before, training, after"))
    return top


def _model_options(command: argparse.ArgumentParser, precision: str) -> None:
    command.add_argument("--model", required=True, help="our name, a folder, a .gguf file, or a hub id")
    command.add_argument("--precision", default=precision, help="fp32, bf16, bf16-mixed, fp16-mixed, or auto: the faster of fp32 and bf16 here")
    command.add_argument("--device", default=None, help="cpu, cuda, mps, ...; default: PyTorch's")


def _finetune(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=finetune)
    _model_options(command, "auto")
    command.add_argument("--data", required=True, help="'reviews' (bundled), or a .json/.jsonl file of instruction/input/output or messages rows")
    command.add_argument("--eval-data", help="held-out rows; the bundled data brings its own")
    command.add_argument("--out", required=True, type=Path, help="folder for the adapter and log.jsonl")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--alpha", type=float, help="scaling is alpha / rank; default: rank")
    command.add_argument("--dropout", type=float, default=0.0)
    command.add_argument("--variant", default="lora", help="lora or dora")
    command.add_argument("--init", default="kaiming", help="kaiming, gaussian, orthogonal or pissa")
    command.add_argument("--rslora", action="store_true", help="scaling alpha / sqrt(rank)")
    command.add_argument("--quantize", metavar="KIND", help="train over a base in nf4, nf4-dq or int8 (QLoRA)")
    command.add_argument("--target-modules", nargs="+", default=["all-linear"], help="all-linear, attention, names, or one regular expression")
    for name, kind in (("max-steps", int), ("epochs", float), ("micro-batch-size", int), ("grad-accum-steps", int), ("learning-rate", float),
                       ("schedule", str), ("warmup-steps", int), ("weight-decay", float), ("max-length", int), ("seed", int)):  # fmt: skip
        command.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    command.add_argument("--gradient-checkpointing", action="store_true", default=argparse.SUPPRESS)


def _generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=generate)
    _model_options(command, "auto")
    command.add_argument("--adapter", type=Path, help="folder of a LoRA adapter, ours or PEFT's")
    command.add_argument("--prompt", required=True, action="append", help="an instruction; may be given several times")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    command.add_argument("--max-new-tokens", type=int, default=128)
    command.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--top-p", type=float, default=0.9)
    command.add_argument("--repetition-penalty", type=float, default=1.1)
    command.add_argument("--seed", type=int)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=inspect)
    _model_options(command, "fp32")
    command.add_argument("--adapter", type=Path, help="show this adapter instead of a plan")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--target-modules", nargs="+", default=["all-linear"])


def _demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=demo)
    command.add_argument("--quick", action="store_true", help="a shorter training")
    command.add_argument("--out", type=Path, default=Path("adapters/demo"))
    command.add_argument("--precision", default="auto")


# The commands ---------------------------------------------------------------------------------------------------------------


def finetune(options: argparse.Namespace) -> None:
    import torch

    from . import count_parameters, data, inject, quantization_report, quantize, save
    from .files import check_writable
    from .training import TrainConfig, fit

    precision = _precision(options)
    given = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__ if hasattr(options, name)}
    config = TrainConfig(**{**given, "precision": precision, "output_dir": options.out})
    rows, held_out = data.load(options.data)
    if options.eval_data:
        held_out = data.load(options.eval_data)[0]
    model, tokenizer = _load(options, precision)
    torch.manual_seed(config.seed)  # of the adapter's first values; `fit` starts from the same seed again
    if options.quantize:
        print(quantization_report(quantize(model, options.quantize)))
    inject(model, options.rank, alpha=options.alpha, dropout=options.dropout, target_modules=_targets(options.target_modules),
           variant=options.variant, init=options.init, rslora=options.rslora)  # fmt: skip
    check_writable(options.out)
    print(count_parameters(model))
    examples = data.Rows(data.encode_rows(rows, tokenizer, config.max_length), rows.source, rows.lines)
    print(_prediction(model, options, config, longest=max(len(example["input_ids"]) for example in examples)))
    result = fit(model, examples, config, tokenizer=tokenizer, eval_data=held_out)
    save(model, options.out)
    if result.eval_losses:
        print(f"held-out loss {result.eval_losses[0]:.3f} -> {result.eval_losses[-1]:.3f}")
    print(f"training loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {result.steps} steps, {result.tokens:,} tokens "
          f"({result.label_tokens:,} with a label), {result.tokens_per_second:.0f} tokens/s, peak {result.peak_bytes / 2**30:.2f} GiB")  # fmt: skip
    print(f"adapter saved to {options.out}")


def generate(options: argparse.Namespace) -> None:
    from . import load, models

    model, tokenizer = _load(options, _precision(options))
    if tokenizer is None:
        raise LoraLabError(f"{options.model} has no tokenizer.json: text cannot be generated without one")
    if options.adapter is not None:
        load(model, options.adapter)
    streaming = len(options.prompt) == 1
    result = models.generate(
        model, [tokenizer.encode(prompt) if options.raw else _as_chat(prompt, tokenizer) for prompt in options.prompt], tokenizer,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        repetition_penalty=options.repetition_penalty, seed=options.seed,
        on_token=(lambda row, token, text: print(text, end="", flush=True)) if streaming else None,
    )  # fmt: skip
    print() if streaming else print("\n\n".join(f"> {prompt}\n{text}" for prompt, text in zip(options.prompt, result.texts, strict=True)))
    print(f"[{sum(map(len, result.ids))} tokens, {result.tokens_per_second:.0f} per second]", file=sys.stderr)


def inspect(options: argparse.Namespace) -> None:
    from . import load, plan, summary

    model, _ = _load(options, _precision(options))
    if options.adapter is not None:
        print(summary(load(model, options.adapter)))
    else:
        print(plan(model, options.rank, target_modules=_targets(options.target_modules)))


def demo(options: argparse.Namespace) -> None:
    from .demo import Settings, run

    run(Settings(quick=options.quick, out=options.out, precision=options.precision))


# What they share ------------------------------------------------------------------------------------------------------------


def _precision(options: argparse.Namespace) -> str:
    from .errors import did_you_mean
    from .training import fastest_precision
    from .training.precision import PRECISIONS

    _check_device(options.device)
    if options.precision == "auto":
        return fastest_precision(options.device)
    if options.precision not in PRECISIONS:
        raise LoraLabError(f"--precision {options.precision}: expected auto, {', '.join(PRECISIONS)}{did_you_mean(options.precision, PRECISIONS)}")
    return str(options.precision)


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise LoraLabError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _load(options: argparse.Namespace, precision: str) -> Any:
    from . import models
    from .training.precision import storage_dtype

    return models.load(options.model, dtype=storage_dtype(precision), device=options.device)


def _targets(names: list[str]) -> str | list[str]:
    """One word may be a keyword or a regular expression; plain names are a list."""
    single = len(names) == 1 and (names[0] in ("all-linear", "attention") or not names[0].replace("_", "").replace(".", "").isalnum())
    return names[0] if single else names


def _prediction(model: Any, options: argparse.Namespace, config: Any, longest: int) -> str:
    """The predicted footprint of a step on the longest rows, where this model and these settings are modelled."""
    method = "dora" if options.variant == "dora" else "qlora" if options.quantize else "lora"
    try:
        footprint = memory_math.predict(
            model, method=method, quantization=options.quantize or "none", precision=config.precision, rank=options.rank,
            target_modules=_targets(options.target_modules), dropout=options.dropout, batch_size=config.micro_batch_size, sequence_length=longest,
            grad_accum_steps=config.grad_accum_steps, gradient_checkpointing=config.gradient_checkpointing, implementation="lora_lab",
            device="cuda" if next(model.parameters()).is_cuda else "cpu",
        )  # fmt: skip
    except memory_math.MemoryMathError as error:
        return f"memory: no prediction ({error})"
    return f"memory: a step on the longest rows ({longest} tokens) is predicted to need {footprint.gib():.2f} GiB of tensors"


def _as_chat(prompt: str, tokenizer: Any) -> str:
    from . import data

    return data.prompt_of({"instruction": prompt}, tokenizer)


if __name__ == "__main__":
    sys.exit(main())
