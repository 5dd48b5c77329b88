"""python -m lora_lab merge: an adapter's update in the weights, as a model folder that needs no adapter."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import LoraLabError
from .shared import check_new_folder

DTYPES = ("float32", "bfloat16", "float16")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="a folder (merged a few rows at a time, so of any size), our name, a .gguf file, or a hub id")
    command.add_argument("--adapter", required=True, type=Path, help="folder of a LoRA adapter, ours or PEFT's")
    command.add_argument("--out", required=True, type=Path, help="a new folder, which lora_lab and transformers read")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights written; default: the model's")
    command.add_argument("--untie", action="store_true", help="where embedding and head are one tensor and the adapter changes one: write both")


def run(options: argparse.Namespace) -> None:
    import torch

    from .. import merge_checkpoint

    dtype = getattr(torch, options.dtype) if options.dtype else None
    if Path(options.model).is_dir():
        print(merge_checkpoint(options.model, options.adapter, options.out, dtype=dtype, untie=options.untie))
    else:
        _in_memory(options, dtype)


def _in_memory(options: argparse.Namespace, dtype: Any) -> None:
    """Load, merge, save: for models that are no folder yet."""
    from .. import eject, load, merge, merge_report, models

    check_new_folder(options.out)
    model, tokenizer = models.load(options.model, dtype=dtype)
    load(model, options.adapter)
    merge(model, restorable=False, untie=options.untie)
    report = merge_report(model)
    _config_of_an_untied_head(model)
    models.save(eject(model), options.out, tokenizer)
    print(f"{report}; written to {options.out}")


def _config_of_an_untied_head(model: Any) -> None:
    """A head that has got a weight of its own must be in the file, and in its config."""
    apart = [second for second, first in model.tied.items() if model.get_parameter(second) is not model.get_parameter(first)]
    if not apart:
        return
    if getattr(model.config, "is_encoder_decoder", False):
        raise LoraLabError(f"{apart[0]!r} has got a weight of its own, which the files of an encoder-decoder have no place for: merge it in memory")
    model.config = replace(model.config, tie_word_embeddings=False)
