"""python benchmarks/generate.py: greedy text with and without an adapter, ours against transformers + PEFT.

SmolLM2-135M with a rank-8 adapter on all linear layers; prompts of 32 tokens, 48 new tokens, at batch 1 and 8, in bfloat16 and float32. Merged
weights against transformers' own `generate` on the same merged weights; the adapter in place against PEFT's. In float32 the same tokens have to
come out on both sides; in 16 bit sums in another order may choose another word. Each contestant runs in its own process and they take turns. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from interleaved import Worker, serve, setting, take_turns

MODEL, RANK, PROMPT, NEW = "smollm2-135m-instruct-q4", 8, 32, 48
CONTESTS = {"merged": ("ours, merged", "transformers"), "with the adapter": ("ours", "PEFT")}


def write_adapter(folder: Path) -> None:
    """An adapter that changes what is written, for both sides to read."""
    import torch

    import lora_lab

    model, _ = lora_lab.models.load(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    lora_lab.inject(model, RANK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    lora_lab.save(model, folder)


def ours(folder: str, merged: bool, dtype: Any) -> Any:
    import lora_lab

    model, _ = lora_lab.models.load(MODEL, dtype=dtype)
    lora_lab.load(model, folder)
    if merged:
        lora_lab.merge(model, restorable=False)
    return lambda ids: lora_lab.models.generate(model, ids, max_new_tokens=NEW, stop_ids=[]).ids


def theirs(folder: str, merged: bool, dtype: Any) -> Any:
    import peft
    import torch
    import transformers

    from lora_lab.models.catalogue import fetch

    base = transformers.AutoModelForCausalLM.from_pretrained(fetch(MODEL), dtype=dtype)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    model = model.merge_and_unload() if merged else model
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}

    @torch.inference_mode()
    def generate(ids: Any) -> list[list[int]]:
        written: list[list[int]] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()
        return written

    return generate


def worker(side: str, batch: int, folder: str, precision: str) -> None:
    import torch

    merged, dtype = side in CONTESTS["merged"], torch.float32 if precision == "fp32" else torch.bfloat16
    generate = (ours if side.startswith("ours") else theirs)(folder, merged, dtype)
    ids = torch.randint(100, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))

    def one_round() -> dict[str, Any]:
        started = time.perf_counter()
        written = generate(ids)
        seconds = time.perf_counter() - started
        return {"tokens_per_second": batch * NEW / seconds, "written": zlib.crc32(str(written).encode())}

    serve(one_round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "BATCH", "FOLDER", "PRECISION"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.worker:
        side, batch, folder, precision = arguments.worker
        worker(side, int(batch), folder, precision)
        return
    result: dict[str, Any] = {"benchmark": "generate", **setting()}
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder))
        for precision, (name, sides), batch in itertools.product(("bf16", "fp32"), CONTESTS.items(), (1, 8)):
            workers = [Worker(__file__, side, str(batch), folder, precision) for side in sides]
            take_turns(workers, arguments.rounds)
            mine, other = (each.summary() for each in workers)
            ratio, same = mine["tokens_per_second"] / other["tokens_per_second"], mine["written"] == other["written"]
            result[f"{precision}, {name}, batch {batch}"] = {"tokens_per_second": [mine["tokens_per_second"], other["tokens_per_second"]],
                                                             "speed_ratio": ratio, "same_tokens": same}  # fmt: skip
            words = "the same tokens" if same else "other tokens" if precision == "bf16" else "OTHER TOKENS"
            print(f"{precision} {name:17} batch {batch}: {mine['tokens_per_second']:6.1f} against {other['tokens_per_second']:6.1f} tokens/s, "
                  f"{ratio:.2f}x; {words}", flush=True)  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
