"""python -m lora_lab inspect: what LoRA would adapt in a model, or what an adapter holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared import load_model, model_options, precision_of, targets_of


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command, "fp32")
    command.add_argument("--adapter", type=Path, help="show this adapter instead of a plan")
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--target-modules", nargs="+", default=["all-linear"])


def run(options: argparse.Namespace) -> None:
    from .. import load, plan, summary

    model, _ = load_model(options, precision_of(options))
    if options.adapter is not None:
        print(summary(load(model, options.adapter)))
    else:
        print(plan(model, options.rank, target_modules=targets_of(options.target_modules)))
