"""python -m lora_lab report: the curves of a training run, or of several over each other, and their numbers in short."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folders", nargs="+", type=Path, metavar="RUN", help="output folder of a training, or its log.jsonl")
    command.add_argument("--out", type=Path, help="the .html (or .svg) file; default: report.html in the first RUN")


def run(options: argparse.Namespace) -> None:
    from ..training.report import read_run, summary, write

    runs = [read_run(path) for path in options.run_folders]
    first: Path = options.run_folders[0]
    out = options.out or (first if first.is_dir() else first.parent) / "report.html"
    write(runs, out)
    print(summary(runs))
    print(f"\ncurves written to {out}")
