"""python benchmarks/qlora.py [--steps 60]: what four bits cost a model, and what adapters over them win back.

SmolLM2-135M on the bundled reviews, bfloat16, rank 8 on all linear layers: held-out loss of the base, of the base in nf4 with double
quantisation, and of both while adapters train over them. The gap of quantisation is closed by half where the curve over codes is below
the middle of the two bases. A table of the curves; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import torch

import lora_lab
from lora_lab import data, models
from lora_lab.training import TrainConfig, fit

MODEL, EVERY = "smollm2-135m-instruct-q4", 20


def curve(kind: str | None, steps: int) -> list[float]:
    """Held-out loss before training and after every EVERY steps."""
    model, tokenizer = models.load(MODEL, dtype=torch.bfloat16)
    rows, held_out = data.load("reviews")
    if kind is not None:
        lora_lab.quantize(model, kind)
    torch.manual_seed(0)
    lora_lab.inject(model, rank=8)
    config = TrainConfig(max_steps=steps, eval_every=EVERY, precision="bf16-mixed", micro_batch_size=8, learning_rate=1e-3, progress=False)
    return fit(model, rows, config, tokenizer=tokenizer, eval_data=held_out).eval_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    curves = {name: curve(kind, steps) for name, kind in (("LoRA, 16 bit", None), ("QLoRA, nf4-dq", "nf4-dq"))}
    plain, coded = curves["LoRA, 16 bit"], curves["QLoRA, nf4-dq"]
    print(f"{'held-out loss at step':<24}" + "".join(f"{step * EVERY:>8}" for step in range(len(plain))))
    for name, losses in {"base, 16 bit": plain[:1], "base, nf4-dq": coded[:1], **curves}.items():
        print(f"{name:<24}" + "".join(f"{loss:>8.3f}" for loss in losses))
    gap, closed = coded[0] - plain[0], (coded[0] - min(coded)) / (coded[0] - plain[0])
    print(f"the gap of quantisation is {gap:.3f}; adapters over the codes win back {closed:.1f} times as much")
    print(json.dumps({"gap": round(gap, 4), "gap_closed": round(closed, 2), "curves": curves}))


if __name__ == "__main__":
    main()
