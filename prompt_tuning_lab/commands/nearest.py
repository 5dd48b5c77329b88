"""python -m prompt_tuning_lab nearest: the words of the vocabulary that each virtual token is nearest to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.commands.shared import load_model, model_options, precision_of, with_tokenizer
from lora_lab.errors import LoraLabError


def add_options(command: argparse.ArgumentParser) -> None:
    model_options(command, "fp32")
    command.add_argument("--prompt-folder", type=Path, required=True, metavar="FOLDER", help="of a trained prompt, ours or PEFT's")
    command.add_argument("-k", type=int, default=5, help="words for each virtual token")
    command.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw a map of the virtual tokens and the words nearest to them")


def run(options: argparse.Namespace) -> None:
    from .. import load, nearest_tokens

    if options.picture is not None and options.picture.suffix != ".svg":
        raise LoraLabError(f"--picture {options.picture}: expected a file that ends in .svg")
    model, tokenizer = load_model(options, precision_of(options))
    with_tokenizer(options, tokenizer)
    prompted = load(model, options.prompt_folder)
    print(table(nearest_tokens(prompted, tokenizer, options.k)))
    if options.picture is not None:
        _draw(prompted, tokenizer, options.picture)


def table(positions: Sequence[Sequence[Any]]) -> str:
    """A line for each virtual token: its words, nearest first, with their cosine distances.

    >>> from prompt_tuning_lab.interpretation import Neighbour
    >>> print(table([[Neighbour(" good", 0.0312, 5), Neighbour(" fine", 0.5, 6)], [Neighbour("!", 0.25, 1), Neighbour(" good", 0.75, 5)]]))
    token  nearest words, with 1 - cosine
        0  ' good' 0.031  ' fine' 0.500
        1  '!' 0.250      ' good' 0.750
    """
    cells = [[f"{word.token!r} {word.distance:.3f}" for word in words] for words in positions]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{number:>5}  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for number, row in enumerate(cells)]
    return "\n".join(["token  nearest words, with 1 - cosine", *(line.rstrip() for line in lines)])


def _draw(prompted: Any, tokenizer: Any, path: Path) -> None:
    from lora_lab.files import saving, write_file

    from ..drawing import picture

    drawn = picture(prompted, tokenizer)
    with saving("the picture", path):
        write_file(path, lambda temporary: _put(temporary, drawn))
    print(f"\nmap drawn in {path}")


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
