"""python -m lora_lab finetune | generate | compare | evaluate | merge | report | inspect | demo

Each command prints its result to stdout and its progress to stderr. A mistake in what was asked for is one line and exit code 2; Ctrl-C is
exit code 130, after the step it came in where the run can be saved. What a command does stands in commands/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .commands import compare, evaluate, finetune, generate, inspection, merge, report
from .commands.shared import exit_code
from .version import __version__

COMMANDS = {
    "finetune": (finetune, "train a LoRA adapter on rows of text, or on a user's table for a --task"),
    "generate": (generate, "write text with a model, with or without an adapter"),
    "compare": (compare, "texts of a model and of its adapters side by side, or --methods to have it do a --task"),
    "evaluate": (evaluate, "perplexity, accuracy or ROUGE, without an adapter and with it; what a --task measures"),
    "merge": (merge, "put an adapter into the weights, as a model folder of its own"),
    "report": (report, "draw the curves of training runs"),
    "inspect": (inspection, "what LoRA would adapt in a model, or what an adapter holds"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lora-lab", description="LoRA by hand: fine-tune a model, use the adapter, look at it.")
    top.add_argument("--version", action="version", version=f"lora-lab {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (module, says) in COMMANDS.items():
        command = commands.add_parser(name, help=says)
        command.set_defaults(run=module.run)
        command.set_defaults(other_methods=_methods_of_prompt_tuning_lab)
        module.add_options(command)
    _demo(commands.add_parser("demo", help="the whole story on bundled reviews: before, training, after"))
    return top


def _methods_of_prompt_tuning_lab() -> dict[str, Any]:
    """For `compare`: this file alone knows both labs."""
    from prompt_tuning_lab.method import METHODS

    return dict(METHODS)


def _demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=demo)
    command.add_argument("--quick", action="store_true", help="a shorter training")
    command.add_argument("--out", type=Path, default=Path("adapters/demo"))
    command.add_argument("--precision", default="auto")


def demo(options: argparse.Namespace) -> None:
    from .demo import Settings, run

    run(Settings(quick=options.quick, out=options.out, precision=options.precision))


if __name__ == "__main__":
    sys.exit(main())
