"""The room from the command line; `python -m memory_math predict --help` lists what a request can say.

python -m memory_math predict llama-2-70b --method lora --precision bf16 --batch-size 1 --sequence-length 4096 --gpu A100-80GB
python -m memory_math table smollm2-135m --batch-size 4 --sequence-length 256
python -m memory_math compare llama-3-8b --methods full lora qlora --precision bf16-mixed --gpu RTX-4090
python -m memory_math fit llama-3-8b --gpu RTX-4090 --method lora --precision bf16
python -m memory_math params llama-3-8b
python -m memory_math formats 3.14159265
python -m memory_math time llama-2-70b --tokens 2e12 --gpus 2048 --tokens-per-gpu-second 400 --price 2.5
python -m memory_math scaling 5.76e23
python -m memory_math context llama-2-70b --shots 5 --tokens-per-shot 300 --question-tokens 200 --answer-tokens 100 --gpu A100-80GB --mfu 0.4
python -m memory_math claims [--markdown]
python -m memory_math gpus
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from . import commands
from .errors import MemoryMathError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"memory_math: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m memory_math", description="Where the bytes of a training step go, and its time and money.")
    kinds = parser.add_subparsers(dest="command", required=True)
    for name, command in commands.COMMANDS.items():
        summary = (command.run.__doc__ or "").splitlines()[0]
        command.options(kinds.add_parser(name, help=summary, description=summary))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 for a request that is refused."""
    asked = _parser().parse_args(arguments)
    if sys.stdout.encoding and "utf" not in sys.stdout.encoding.lower() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the bars of a table, where the terminal has no such letters
    try:
        print(commands.COMMANDS[asked.command].run(asked))
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
    except MemoryMathError as refusal:
        print(f"memory_math: {' '.join(str(refusal).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
