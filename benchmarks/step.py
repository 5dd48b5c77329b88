"""python benchmarks/step.py: one LoRA training step of SmolLM2-135M, ours against transformers + PEFT.

Rank 8 on all linear layers, 4 rows of 256 tokens, the first half of each row without a label, AdamW, no checkpointing; in float32 and
with a bfloat16 base and float32 adapters, where PEFT also runs under autocast, as transformers' Trainer does with bf16=True; the ratios are against
the faster of the two. What LoRA adds is the step beside the frozen model's own forward pass and the gradient of its input. Each contestant runs in
its own process and they take turns. Memory is the largest resident set of a process that does the same steps and gives back what it frees; speed is
measured in one that does not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from interleaved import GIVES_MEMORY_BACK, Worker, serve, setting, take_turns

MODEL, ROWS, LENGTH, RANK = "smollm2-135m-instruct-q4", 4, 256, 8
CONTESTS = {"bf16": ("ours", "frozen", "PEFT", "PEFT, autocast"), "fp32": ("ours", "frozen", "PEFT")}


def ours(dtype: Any, frozen: bool) -> Any:
    import lora_lab

    model, _ = lora_lab.models.load(MODEL, dtype=dtype)
    return model.requires_grad_(False).train() if frozen else lora_lab.inject(model, rank=RANK).train()


def theirs(dtype: Any) -> Any:
    import peft
    import transformers

    from lora_lab.models.catalogue import fetch

    model = transformers.AutoModelForCausalLM.from_pretrained(fetch(MODEL), dtype=dtype)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def worker(side: str, precision: str, rounds_of: int, compiled: bool) -> None:
    import torch

    from lora_lab.training.accounting import peak_bytes

    torch.manual_seed(0)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = theirs(dtype) if side.startswith("PEFT") else ours(dtype, side == "frozen")
    model = torch.compile(model) if compiled else model
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=side == "PEFT, autocast")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.zeros(1, requires_grad=True)], lr=1e-3, fused=True)
    ids = torch.randint(0, 49_152, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    mask = torch.ones_like(ids)

    def inputs() -> dict[str, Any]:
        return {"input_ids": ids} if trained else {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_()}

    def one_round() -> dict[str, Any]:
        started = time.perf_counter()
        for _ in range(rounds_of):
            with autocast:
                loss = model(**inputs(), attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = (time.perf_counter() - started) / rounds_of
        return {"tokens_per_second": ROWS * LENGTH / seconds, "loss": float(loss), "peak_rss_mib": peak_bytes(torch.device("cpu")) / 2**20}

    serve(one_round)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "PRECISION", "STEPS", "COMPILED"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1, help="steps in a round")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    arguments = parser.parse_args()
    if arguments.worker:
        side, precision, steps, compiled = arguments.worker
        worker(side, precision, int(steps), compiled == "True")
        return
    result: dict[str, Any] = {"benchmark": "step", **setting()}
    print(f"{'':22} {'tokens/s':>9} {'peak MiB':>9}   ours, against the faster")
    for precision, sides in CONTESTS.items():
        words = precision, str(arguments.steps), str(arguments.compile)
        workers = [Worker(__file__, side, *words) for side in sides]
        take_turns(workers, arguments.rounds)
        figures = {side: each.summary() for side, each in zip(sides, workers, strict=True)}
        for side in sides:
            frugal = Worker(__file__, side, *words, environment=GIVES_MEMORY_BACK)
            take_turns([frugal], rounds=2)
            figures[side]["peak_rss_mib_as_it_is"] = figures[side]["peak_rss_mib"]
            figures[side]["peak_rss_mib"] = frugal.summary()["peak_rss_mib"]
        best = max((figures[side] for side in sides if side.startswith("PEFT")), key=lambda figure: figure["tokens_per_second"])
        added = figures["frozen"]["tokens_per_second"] / figures["ours"]["tokens_per_second"] - 1
        ratios = {key: figures["ours"][key] / best[key] for key in ("tokens_per_second", "peak_rss_mib")}
        result[precision] = {"figures": figures, "speed_ratio": ratios["tokens_per_second"], "memory_ratio": ratios["peak_rss_mib"],
                             "added_by_lora": added}  # fmt: skip
        for side in sides:
            note = f"   LoRA adds {added:.0%} to it" if side == "frozen" else ""
            note = f"   {ratios['tokens_per_second']:.2f}x speed, {ratios['peak_rss_mib']:.2f}x memory" if side == "ours" else note
            print(f"{precision:5} {side:16} {figures[side]['tokens_per_second']:9.0f} {figures[side]['peak_rss_mib']:9.0f}{note}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
