"""python -m prompt_tuning_lab tune | generate | nearest | inspect

Each command prints its result to stdout and its progress to stderr. A mistake in what was asked for is one line and exit code 2; Ctrl-C is
exit code 130, after the step it came in where the run can be saved. What a command does stands in commands/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lora_lab.commands.shared import exit_code
from lora_lab.version import __version__

from .commands import generate, inspection, nearest, tune

COMMANDS = {
    "tune": (tune, "train a prompt on rows of text, before a model that stays as it is"),
    "generate": (generate, "write text with a prompt, or with several side by side in one batch"),
    "nearest": (nearest, "the words that a trained prompt is nearest to"),
    "inspect": (inspection, "what a prompt's folder holds, and whether PEFT reads it"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="prompt-tuning-lab", description="Soft prompts by hand: train one, use it, look at it.")
    top.add_argument("--version", action="version", version=f"prompt-tuning-lab {__version__}")
    commands = top.add_subparsers(required=True, metavar="command")
    for name, (module, says) in COMMANDS.items():
        command = commands.add_parser(name, help=says)
        command.set_defaults(run=module.run)
        module.add_options(command)
    return top


if __name__ == "__main__":
    sys.exit(main())
