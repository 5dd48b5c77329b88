"""python -m prompt_tuning_lab inspect: what a prompt's folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="of a trained prompt, ours or PEFT's; no model is needed")


def run(options: argparse.Namespace) -> None:
    from ..peft_files.description import describe

    print(describe(options.folder))
