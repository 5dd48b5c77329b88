"""python benchmarks/job.py: a whole fine-tuning, ours against transformers' Trainer + PEFT.

SmolLM2-135M on the first 240 rows of clothing_reviews, one epoch in batches of 8, learning rate 5e-4 falling to zero, rank 8, alpha 16 on all linear
layers, bfloat16 base; held-out loss on the last 60 rows. Both get the same encoded rows. Trainer pads each batch to its longest row, groups rows
by length where it is asked to (both are run), and multiplies in bfloat16 under autocast; ours is `fit` with length buckets, and packed.
Each contestant runs in a process of its own, alone. The data are looked for in LORA_LAB_DATA, else beside the checkout. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from interleaved import setting
from shared_data import folder_of

MODEL, RATE, RANK, ALPHA, BATCH, ROWS, HELD_OUT = "smollm2-135m-instruct-q4", 5e-4, 8, 16, 8, 240, 60
SIDES = ("ours", "ours, packed", "Trainer", "Trainer, grouped")


def rows() -> list[dict[str, Any]]:
    path = folder_of("clothing_reviews") / "derived_balanced_instruction.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encoded(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    from lora_lab import data

    kept = [{key: row[key] for key in ("instruction", "input", "output")} for row in rows()]
    return data.encode_rows(kept[:ROWS], tokenizer), data.encode_rows(kept[-HELD_OUT:], tokenizer)


def ours(packed: bool) -> dict[str, Any]:
    import torch

    import lora_lab

    model, tokenizer = lora_lab.models.load(MODEL, dtype=torch.bfloat16)
    train, held_out = encoded(tokenizer)
    lora_lab.inject(model, RANK, alpha=ALPHA)
    config = {"epochs": 1, "micro_batch_size": BATCH, "learning_rate": RATE, "precision": "bf16-mixed", "progress": False, "packing": packed}
    started = time.perf_counter()
    result = lora_lab.training.fit(model, train, config, eval_data=held_out)
    return {"seconds": result.seconds, "with_evaluation": time.perf_counter() - started, "loss_before": result.eval_losses[0],
            "loss": result.eval_losses[-1], "steps": result.steps}  # fmt: skip


def theirs(grouped: bool) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    import lora_lab
    from lora_lab.models.catalogue import fetch
    from lora_lab.training import TrainConfig, evaluate

    model = transformers.AutoModelForCausalLM.from_pretrained(fetch(MODEL), dtype=torch.bfloat16)
    train, held_out = encoded(lora_lab.models.Tokenizer.from_folder(fetch(MODEL)))
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = TrainConfig(precision="bf16-mixed", micro_batch_size=BATCH, progress=False)
    before = evaluate(model, held_out, config)
    options = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="linear",
        bf16=True, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        weight_decay=0.0, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=train, data_collator=padded)
    started = time.perf_counter()
    output = trainer.train()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "with_evaluation": seconds, "loss_before": before, "loss": evaluate(model.eval(), held_out, config),
            "steps": output.global_step}  # fmt: skip


def padded(examples: list[Any]) -> Any:
    from lora_lab.data import collate

    return collate(examples, 0)


def worker(side: str) -> None:
    import torch

    from lora_lab.training.accounting import peak_bytes

    torch.manual_seed(0)
    figures = ours("packed" in side) if side.startswith("ours") else theirs("grouped" in side)
    print(json.dumps({**figures, "peak_rss_mib": peak_bytes(torch.device("cpu")) / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", metavar="SIDE", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    rows()
    figures: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for side in SIDES:
            answer = subprocess.run([sys.executable, __file__, "--worker", side], capture_output=True, text=True, check=True).stdout
            found = json.loads(answer.splitlines()[-1])
            figures[side] = min(figures.get(side, found), found, key=lambda each: each["seconds"])
    best = min((figures[side] for side in SIDES[2:]), key=lambda each: each["seconds"])
    print(f"{'':18} {'seconds':>8} {'peak MiB':>9} {'held-out loss':>16}   against the faster Trainer")
    for side, each in figures.items():
        losses = f"{each['loss_before']:.3f} -> {each['loss']:.3f}"
        note = f"{best['seconds'] / each['seconds']:.2f}x the speed, {each['peak_rss_mib'] / best['peak_rss_mib']:.2f}x the memory"
        print(f"{side:18} {each['seconds']:8.1f} {each['peak_rss_mib']:9.0f} {losses:>16}   {note if side.startswith('ours') else ''}")
    ratios = {side: best["seconds"] / figures[side]["seconds"] for side in SIDES[:2]}
    print(json.dumps({"benchmark": "job", **setting(), "figures": figures, "speed_ratio": ratios}))


if __name__ == "__main__":
    main()
