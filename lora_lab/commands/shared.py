"""Options and steps that several commands have in common, those of prompt_tuning_lab among them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import memory_math

from ..errors import LoraLabError, did_you_mean


def exit_code(parsed: argparse.Namespace) -> int:
    """Run the command that was parsed. A mistake in what was asked for is one line on stderr and 2, Ctrl-C is 130, the rest 0."""
    if sys.stdout.encoding and "utf" not in sys.stdout.encoding.lower() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a pipe of Windows, which has no letters for what models write
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            parsed.run(parsed)
    except (LoraLabError, memory_math.MemoryMathError) as error:
        print(f"error: {_as_an_option(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # training says where it stopped
        print(_as_an_option(stop) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
    return 0


def _as_an_option(message: object) -> str:
    """The way out, as it is called here."""
    return str(message).replace("resume=True", "the same command with --resume")


def model_options(command: argparse.ArgumentParser, precision: str = "auto") -> None:
    command.add_argument("--model", required=True, help="our name, a folder, a .gguf file, or a hub id")
    command.add_argument("--precision", default=precision, help="fp32, bf16, bf16-mixed, fp16-mixed, or auto: bf16-mixed "
                         " where this device multiplies bfloat16 faster than float32, else fp32")  # fmt: skip
    command.add_argument("--device", default=None, help="cpu, cuda, mps, ...; default: PyTorch's, the "
                         " CPU unless you changed it, also where there is a GPU")  # fmt: skip


def generation_options(command: argparse.ArgumentParser, max_new_tokens: int = 128, temperature: float = 0.7, repetition_penalty: float = 1.1,
                       seed: int | None = None, seed_says: str | None = None) -> None:  # fmt: skip
    command.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    command.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--top-p", type=float, default=0.9)
    command.add_argument("--repetition-penalty", type=float, default=repetition_penalty)
    command.add_argument("--seed", type=int, default=seed, help=seed_says)


def generation_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")}


def precision_of(options: argparse.Namespace, resumed: Path | None = None) -> str:
    """resumed: the folder of a run that goes on, whose precision "auto" is then, whatever is faster at the moment."""
    from ..training import fastest_precision
    from ..training.precision import PRECISIONS

    _check_device(options.device)
    if options.precision == "auto":
        return _precision_in(resumed) or fastest_precision(options.device)
    if options.precision not in PRECISIONS:
        raise LoraLabError(f"--precision {options.precision}: expected auto, {', '.join(PRECISIONS)}{did_you_mean(options.precision, PRECISIONS)}")
    return str(options.precision)


def _precision_in(folder: Path | None) -> str | None:
    """Of the run whose snapshots are there."""
    from ..training import snapshots
    from ..training.precision import PRECISIONS

    found = None if folder is None else snapshots.settings_said(folder).get("precision")
    return found if found in [*PRECISIONS] else None


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise LoraLabError(f"--device {device}: {str(error).splitlines()[0]}") from None


def load_model(options: argparse.Namespace, precision: str, device: str | None = None) -> Any:
    """(model, tokenizer), the weights stored as the precision stores frozen ones; on --device where no other is given."""
    from .. import models
    from ..training.precision import storage_dtype

    return models.load(options.model, dtype=storage_dtype(precision), device=device or options.device)


def with_tokenizer(options: argparse.Namespace, tokenizer: Any) -> Any:
    if tokenizer is None:
        raise LoraLabError(f"{options.model} has no tokenizer.json: text cannot be generated without one")
    return tokenizer


def prompts_of(texts: Sequence[str], raw: bool, model: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of each instruction as the model was taught to read it; raw: of the text itself."""
    from .. import data
    from ..models.base import is_encoder_decoder

    as_it_is = raw or is_encoder_decoder(model)  # T5 was taught in plain words
    chat = [] if as_it_is else [data.prompt_of({"instruction": text}, tokenizer) for text in texts]
    return [tokenizer.encode(text) for text in texts] if as_it_is else [tokenizer.encode(text, add_special_tokens=False) for text in chat]


def targets_of(names: list[str]) -> str | list[str]:
    """One word may be a keyword or a regular expression; plain names are a list."""
    single = len(names) == 1 and (names[0] in ("all-linear", "attention") or not names[0].replace("_", "").replace(".", "").isalnum())
    return names[0] if single else names


def check_new_folder(folder: Path) -> None:
    """Raise LoraLabError where something would be written over, or nothing could be."""
    from ..files import check_writable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraLabError(f"--out {folder} is there and not empty: choose a new folder (nothing is overwritten)")
    check_writable(folder)


def check_file(path: Path) -> None:
    """Raise LoraLabError where this file could not be written, or gone on with."""
    from ..files import check_writable, saving

    check_writable(path.parent)
    if path.exists():
        with saving("anything", path), path.open("ab"):
            pass


def check_adapter(folder: Path | None) -> None:
    """Raise LoraLabError for a folder without an adapter in it, before anything else is done."""
    from ..peft_files.config import TENSORS, what_is_missing

    if folder is not None and not (folder / TENSORS).is_file():
        raise LoraLabError(what_is_missing(folder))


def check_can_begin(folder: Path, resume: bool) -> None:
    """Raise LoraLabError where another process trains in this folder, or a run was stopped there that a new one would throw away."""
    from ..files import IN_USE, in_use
    from ..training import snapshots, state

    if (folder / IN_USE).is_dir():
        with in_use(folder, "trains"):
            pass
    if not resume and snapshots.any_in(folder):
        state.refuse_unfinished(folder)


def story_of(result: Any) -> str:
    """What a run of training gave, in a few lines."""
    lines = []
    if result.eval_losses:
        lines.append(f"held-out loss {result.eval_losses[0]:.3f} -> {result.eval_losses[-1]:.3f}")
    if result.best_step is not None:
        lines.append(f"the weights are those after step {result.best_step}, whose held-out loss was the lowest, {min(result.eval_losses):.3f}")
    ended = ", stopped early" if result.stopped_early else ""
    lines.append(f"training loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {result.steps} steps{ended}, {result.tokens:,} tokens "
                 f"({result.label_tokens:,} with a label), {result.tokens_per_second:.0f} tokens/s, "
                 f"peak {result.peak_bytes / 2**30:.2f} GiB")  # fmt: skip
    return "\n".join(lines)
