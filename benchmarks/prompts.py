"""python benchmarks/prompts.py: one training step of a soft prompt before SmolLM2-135M, against what it cannot do without and against PEFT.

20 virtual tokens before 4 rows of 108, which makes 128 positions; the second half of each text has labels; AdamW; in float32 and with a bfloat16
base. The floor is the frozen model's own pass over 128 positions, forward and backward to its input: a prompted step should be within 5 % of it.
PEFT's prompt tuning, which it should not be slower than, also runs under autocast in bfloat16, as transformers' Trainer does with bf16=True.
A mixed batch has a task of its own in each row: it should be within 5 % of a batch with one task; rows whose prompts differ in length stand beside
it. Each contestant runs in its own process and they take turns; ratios are medians over the rounds, within a round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from interleaved import Worker, serve, setting, take_turns

MODEL, ROWS, TEXT, VIRTUAL = "smollm2-135m-instruct-q4", 4, 108, 20
MIXED, LENGTHS = "ours, 4 tasks", "ours, 4 lengths"
SIDES = ("ours", "the model alone", MIXED, LENGTHS, "PEFT")
CONTESTS = {"bf16": (*SIDES, "PEFT, autocast"), "fp32": SIDES}
Step = Callable[[], Any]  # one training step; returns the loss


def our_step(dtype: Any, lengths: dict[str, int]) -> Step:
    """lengths: task -> virtual tokens; one task is that of all rows, four are those of four rows."""
    import contextlib

    import torch

    from lora_lab.models import load
    from prompt_tuning_lab import inject, per_sample

    prompted: Any = load(MODEL, dtype=dtype)[0]
    for task, length in lengths.items():
        prompted = inject(prompted, length, task=task, seed=0)
    prompted.train().tasks.requires_grad_(True)
    optimizer = torch.optim.AdamW(prompted.tasks.parameters(), lr=1e-3, fused=True)
    ids, labels = texts()

    def step() -> Any:
        with per_sample(prompted, [*lengths]) if len(lengths) > 1 else contextlib.nullcontext():
            loss = prompted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        return updated(loss, optimizer)

    return step


def frozen_step(dtype: Any) -> Step:
    """No prompt, no optimizer: the model alone at sequence T + P, with the gradient of its input."""
    import torch

    from lora_lab.models import load

    model = load(MODEL, dtype=dtype)[0].requires_grad_(False)
    model.training = True  # the top module alone: of labelled positions only are there logits
    ids, labels = texts()
    virtual = torch.full((ROWS, VIRTUAL), -100)
    embeds = model.get_input_embeddings()(torch.cat((torch.zeros_like(virtual), ids), 1)).detach().requires_grad_()

    def step() -> Any:
        embeds.grad = None
        loss = model(inputs_embeds=embeds, labels=torch.cat((virtual, labels), 1)).loss
        loss.backward()
        return loss.detach()

    return step


def peft_step(dtype: Any, autocast: bool) -> Step:
    import peft
    import torch
    import transformers

    from lora_lab.models.catalogue import fetch

    base = transformers.AutoModelForCausalLM.from_pretrained(fetch(MODEL), dtype=dtype)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    ids, labels = texts()

    def step() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        return updated(loss, optimizer)

    return step


def texts() -> tuple[Any, Any]:
    """ids and labels, [ROWS, TEXT] each."""
    import torch

    ids = torch.randint(100, 40_000, (ROWS, TEXT), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : TEXT // 2] = -100
    return ids, labels


def updated(loss: Any, optimizer: Any) -> Any:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def step_of(side: str, dtype: Any) -> Step:
    if side.startswith("PEFT"):
        return peft_step(dtype, side.endswith("autocast"))
    if side == "the model alone":
        return frozen_step(dtype)
    names = [f"task{number}" for number in range(1 if side == "ours" else ROWS)]
    return our_step(dtype, {name: VIRTUAL - (5 * number if side == LENGTHS else 0) for number, name in enumerate(names)})


def worker(side: str, precision: str, steps: int) -> None:
    import torch

    from lora_lab.training.accounting import peak_bytes

    torch.manual_seed(0)
    step = step_of(side, torch.float32 if precision == "fp32" else torch.bfloat16)

    def one_round() -> dict[str, Any]:
        started = time.perf_counter()
        for _ in range(steps):
            loss = step()
        seconds = (time.perf_counter() - started) / steps
        return {"seconds": seconds, "loss": float(loss), "peak_rss_mib": peak_bytes(torch.device("cpu")) / 2**20}

    serve(one_round)


def ratio(one: Worker, other: Worker) -> float:
    """How many times the other's time one takes: the median over rounds, each with itself, as a slow minute meets both."""
    return statistics.median(a["seconds"] / b["seconds"] for a, b in zip(one.rounds, other.rounds, strict=True))


def compared(workers: dict[str, Worker]) -> dict[str, float]:
    theirs = [worker for side, worker in workers.items() if side.startswith("PEFT")]
    fastest = min(theirs, key=lambda each: each.summary()["seconds"])
    return {"against_the_model_alone": ratio(workers["ours"], workers["the model alone"]), "against_peft": ratio(workers["ours"], fastest),
            "mixed_against_single": ratio(workers[MIXED], workers["ours"]), "lengths_against_single": ratio(workers[LENGTHS], workers["ours"]),
            "memory_against_peft": workers["ours"].summary()["peak_rss_mib"] / fastest.summary()["peak_rss_mib"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "PRECISION", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--precision", nargs="+", choices=[*CONTESTS], default=[*CONTESTS])
    arguments = parser.parse_args()
    if arguments.worker:
        side, precision, steps = arguments.worker
        worker(side, precision, int(steps))
        return
    result: dict[str, Any] = {"benchmark": "prompts", **setting()}
    print(f"{'':22} {'ms a step':>9} {'peak MiB':>9}   time of one step")
    for precision in arguments.precision:
        workers = {side: Worker(__file__, side, precision, str(arguments.steps)) for side in CONTESTS[precision]}
        take_turns([*workers.values()], arguments.rounds)
        figures, ratios = {side: each.summary() for side, each in workers.items()}, compared(workers)
        result[precision] = {"figures": figures, **ratios}
        notes = {"ours": f"{ratios['against_the_model_alone']:.3f}x the model alone, {ratios['against_peft']:.3f}x PEFT (the faster)",
                 MIXED: f"{ratios['mixed_against_single']:.3f}x one task", LENGTHS: f"{ratios['lengths_against_single']:.3f}x one task"}  # fmt: skip
        for side, figure in figures.items():
            print(f"{precision:5} {side:16} {1000 * figure['seconds']:9.1f} {figure['peak_rss_mib']:9.0f}   {notes.get(side, '')}".rstrip())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
