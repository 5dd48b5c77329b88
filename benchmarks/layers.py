"""python benchmarks/layers.py: adapted layers, ours against PEFT, in one process and in turns.

q, k and v of one attention (hidden 2,048, rank 8) over one bfloat16 input of 4 x 256 tokens: time of forward and backward, and what autograd keeps,
in copies of the input; with dropout, too. Four adapters over eight rows against one for all. The time to inject q and v into a model of
Llama-2-70B's shape on the meta device. The last line is JSON. To be held: at most 0.85x PEFT's time and 1.2
copies, half its bytes with dropout, 1.2x for mixed rows, PEFT's time to inject.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn

import lora_lab

HIDDEN, TOKENS, RANK, ROUNDS = 2048, (4, 256), 8, 15
NAMES = ["q", "k", "v"]


class Projections(nn.Module):
    """Three matrices that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def contestants(dropout: float) -> dict[str, nn.Module]:
    base = Projections().bfloat16()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules=NAMES)
    return {
        "ours": lora_lab.inject(copy.deepcopy(base), rank=RANK, dropout=dropout, target_modules=NAMES).train(),
        "PEFT": peft.get_peft_model(copy.deepcopy(base), config).train(),
    }


def in_turns(steps: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, taking turns after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def kept_copies(model: nn.Module, x: torch.Tensor) -> float:
    """What autograd keeps of a forward pass, in copies of x."""
    import memory_math

    return memory_math.saved_bytes(lambda: model(x)) / (x.numel() * x.element_size())


def training(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    return step


def one_contest(dropout: float) -> dict[str, Any]:
    models, x = contestants(dropout), torch.randn(*TOKENS, HIDDEN).bfloat16().requires_grad_()
    seconds = in_turns({name: training(model, x) for name, model in models.items()})
    copies = {name: round(kept_copies(model, x), 2) for name, model in models.items()}
    ratio = round(seconds["ours"] / seconds["PEFT"], 3)
    print(f"q, k, v, dropout {dropout}: {seconds['ours'] * 1e3:.1f} ms against {seconds['PEFT'] * 1e3:.1f} ms ({ratio}x), "
          f"kept {copies['ours']} against {copies['PEFT']} copies of the input")  # fmt: skip
    return {"time_ratio": ratio, "copies": copies["ours"], "copies_peft": copies["PEFT"]}


def mixed_rows() -> float:
    """Eight rows, each with one of four adapters, against one adapter for all."""
    model, x = Projections().bfloat16(), torch.randn(8, 128, HIDDEN).bfloat16()
    for name in "abcd":
        lora_lab.inject(model, rank=RANK, target_modules=NAMES, init="random", adapter=name)
    lora_lab.use(model, "a")

    def mixed() -> None:
        with lora_lab.per_sample(model, list("abcdabcd")):
            model(x)

    with torch.no_grad():
        seconds = in_turns({"one": lambda: model(x), "four": mixed})
    ratio = seconds["four"] / seconds["one"]
    print(f"four adapters over eight rows: {seconds['four'] * 1e3:.1f} ms, one: {seconds['one'] * 1e3:.1f} ms ({ratio:.2f}x)")
    return round(ratio, 3)


def injecting() -> dict[str, float]:
    """q and v of Llama-2-70B's shape, without its weights."""
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                                      intermediate_size=28672)  # fmt: skip
    with torch.device("meta"):
        models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    start = time.perf_counter()
    lora_lab.inject(models[0], rank=RANK, target_modules=["q_proj", "v_proj"])
    middle = time.perf_counter()
    with torch.device("meta"):
        peft.get_peft_model(models[1], peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    seconds = {"ours": round(middle - start, 3), "PEFT": round(time.perf_counter() - middle, 3)}
    print(f"injecting q, v into a 70B on meta: {seconds['ours']} s against {seconds['PEFT']} s")
    return seconds


def main() -> None:
    torch.manual_seed(0)
    result = {"plain": one_contest(0.0), "dropout": one_contest(0.1), "mixed_rows": mixed_rows(), "inject_70b_seconds": injecting()}
    print(json.dumps({**result, "torch": torch.__version__, "peft": peft.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
