"""The room from the command line.

python -m memory_math predict smollm2-135m --method lora --precision bf16-mixed --batch-size 4 --sequence-length 256 [--gpu T4] [--json]
python -m memory_math params llama-3-8b
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from typing import NoReturn

from .architectures import count_parameters
from .errors import MemoryMathError
from .footprint import predict
from .hardware import gpu_of

OPTIONS: dict[str, type] = {
    "method": str, "precision": str, "optimizer": str, "batch_size": int, "sequence_length": int, "attention": str, "loss": str,
    "rank": int, "dropout": float, "grad_accum_steps": int, "implementation": str, "device": str, "optimizer_implementation": str,
    "label_tokens": int,
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memory_math: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m memory_math", description="Where the bytes of a training step go.")
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = commands.add_parser("predict", help="the memory of one training step, or of a prompt")
    counting = commands.add_parser("params", help="the exact number of parameters, part by part")
    for command in (predicting, counting):
        command.add_argument("model", help="a preset such as llama-3-8b, or a folder with a config.json")
    defaults = inspect.signature(predict).parameters
    for name, kind in OPTIONS.items():
        predicting.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name].default)
    predicting.add_argument("--target-modules", nargs="+", default=["all-linear"], help="all-linear, attention, or names like q_proj")
    predicting.add_argument("--gradient-checkpointing", action="store_true")
    predicting.add_argument("--gpu", help="also say whether it fits this GPU, such as T4 or A100-80GB")
    predicting.add_argument("--json", action="store_true", help="everything as JSON, bytes as whole numbers")
    return parser


def _predict(arguments: argparse.Namespace) -> str:
    targets = arguments.target_modules
    targets = targets[0] if targets in (["all-linear"], ["attention"]) else targets
    options = {name: getattr(arguments, name) for name in (*OPTIONS, "gradient_checkpointing")}
    footprint = predict(arguments.model, target_modules=targets, **options)
    fits = footprint.fits(arguments.gpu) if arguments.gpu else None
    if arguments.json:
        return json.dumps({**footprint.as_dict(), **({"gpu": arguments.gpu, "fits": fits} if arguments.gpu else {})}, indent=2)
    if arguments.gpu is None:
        return footprint.table()
    return f"{footprint.table()}\n{gpu_of(arguments.gpu).name}: {'fits' if fits else 'does not fit'}"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a request that is refused."""
    asked = _parser().parse_args(arguments)
    try:
        print(_predict(asked) if asked.command == "predict" else count_parameters(asked.model))
    except MemoryMathError as refusal:
        print(f"memory_math: {' '.join(str(refusal).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
