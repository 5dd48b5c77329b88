"""python -m lora_lab generate: write text with a model, with or without an adapter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .shared import generation_of, generation_options, load_model, model_options, precision_of, prompts_of, with_tokenizer


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command)
    command.add_argument("--adapter", type=Path, help="folder of a LoRA adapter, ours or PEFT's")
    command.add_argument("--prompt", required=True, action="append", help="an instruction; may be given several times")
    command.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    generation_options(command)


def run(options: argparse.Namespace) -> None:
    from .. import load, models

    model, tokenizer = load_model(options, precision_of(options))
    with_tokenizer(options, tokenizer)
    if options.adapter is not None:
        load(model, options.adapter)
    streaming = len(options.prompt) == 1
    result = models.generate(
        model, prompts_of(options.prompt, options.raw, model, tokenizer), tokenizer, **generation_of(options),
        on_token=(lambda row, token, text: print(text, end="", flush=True)) if streaming else None,
    )  # fmt: skip
    print() if streaming else print("\n\n".join(f"> {prompt}\n{text}" for prompt, text in zip(options.prompt, result.texts, strict=True)))
    print(f"[{sum(map(len, result.ids))} tokens, {result.tokens_per_second:.0f} per second]", file=sys.stderr)
