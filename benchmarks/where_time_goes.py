"""python benchmarks/where_time_goes.py: what a training step and a token of generation spend their time on, and what the floor is.

The LoRA step of step.py and the token of generate.py (batch 1, merged), in bfloat16 and float32, under PyTorch's profiler; operators are
told apart by name and shape. The floor is measured, not guessed: the products with the frozen weights alone (forward and, in training, the gradient
of the input), of the same shapes, nothing in between. The last line is JSON.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import setting
from torch.profiler import ProfilerActivity, profile

import lora_lab
from lora_lab import few_rows

MODEL, ROWS, LENGTH, RANK, NEW = "smollm2-135m-instruct-q4", 4, 256, 8, 24
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmv_", "aten::mv", "aten::bmm")


def part_of(name: str, shapes: list[list[int]], vocabulary: int) -> str:
    """What an operator of this name with inputs of these shapes belongs to."""
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape}
    if "adam" in name.lower():
        return "optimizer"
    if vocabulary in sizes:
        return "head and loss"
    if name in PRODUCTS:
        return "LoRA's small products" if RANK in sizes else "products with the frozen weights"
    if "scaled_dot_product" in name or "flash" in name:
        return "attention"
    if name in ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous"):
        return "casts and copies"
    return "norms, gates, rotary positions, sums" if name.startswith("aten::") else "Python functions, autograd"


def shares(run: Callable[[], Any], vocabulary: int) -> dict[str, float]:
    """Part -> its share of the operators' own time."""
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run()
    times: Counter[str] = Counter()
    for event in recorded.key_averages(group_by_input_shape=True):
        times[part_of(event.key, event.input_shapes, vocabulary)] += event.self_cpu_time_total
    return {part: microseconds / times.total() for part, microseconds in times.most_common()}


def median_seconds(run: Callable[[], Any], rounds: int = 7) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[rounds // 2]


def a_step(model: Any) -> Callable[[], Any]:
    lora_lab.inject(model, rank=RANK).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def products_of_a_step(model: Any) -> Callable[[], Any]:
    """Forward and the gradient of the input, for the blocks' weights; the head for the rows that have a label."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name and "lora" not in name]
    head, labelled = model.get_output_embeddings().weight, ROWS * LENGTH // 2
    inputs = [(weight.detach(), ROWS * LENGTH) for weight in blocks] + [(head.detach(), labelled)]

    @torch.no_grad()
    def run() -> None:
        for weight, rows in inputs:
            y = F.linear(weight.new_ones(rows, weight.shape[1]), weight)
            y @ weight

    return run


def tokens(model: Any) -> Callable[[], Any]:
    ids = torch.randint(100, 40_000, (1, 32))
    return lambda: lora_lab.models.generate(model, ids, max_new_tokens=NEW, stop_ids=[])


def products_of_tokens(model: Any) -> Callable[[], Any]:
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    weights = [p.detach() for p in (*blocks, model.get_output_embeddings().weight)]

    @torch.no_grad()
    def run() -> None:
        for _ in range(NEW):
            for weight in weights:
                few_rows.product(weight.new_ones(1, weight.shape[1]), weight, None)

    return run


def main() -> None:
    result: dict[str, Any] = {"benchmark": "where_time_goes", **setting()}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for what, runs, floor in (("token", tokens, products_of_tokens), ("step", a_step, products_of_a_step)):
            torch.manual_seed(0)
            model, _ = lora_lab.models.load(MODEL, dtype=dtype)
            bare, run = median_seconds(floor(model)), runs(model)
            whole, parts, count = median_seconds(run), shares(run, model.config.vocab_size), NEW if what == "token" else 1
            result[f"{precision}, {what}"] = {"milliseconds": whole * 1e3 / count, "floor_milliseconds": bare * 1e3 / count, "shares": parts}
            print(f"{precision}, a {what}: {whole * 1e3 / count:.1f} ms; the weights' products alone {bare * 1e3 / count:.1f} ms")
            for part, share in parts.items():
                print(f"    {share:6.1%}  {part}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
