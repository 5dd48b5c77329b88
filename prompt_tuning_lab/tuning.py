"""Training prompts: `lora_lab.training.fit` does it; here is at what learning rate, and which of several settings does best.

    config = training_config(prompted, rows, epochs=3)                     the rate derived, warm-up, no weight decay, clipped at 1
    fit(prompted, rows, config, tokenizer=tokenizer)

Adam moves each number by about the learning rate in a step, so a rate is a distance, and what is far depends on the model: the numbers of
SmolLM2's embedding have a root mean square of 0.136, MiniLM's of 0.056. (The 0.3 of Lester et al. 2021 is for T5 and Adafactor; for SmolLM2 it
would be twice a word's size in each step.) So the rate is told as a share:

    learning rate = share * scale / gain

scale is the root mean square of the embedding's numbers; of a prefix, of the keys' and values' own.  gain is how far what is inserted moves where
each parameter moves by 1: exactly 1 of plain rows, tens or a hundred of a network, whose weights all rows share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_lab.checks import is_number
from lora_lab.errors import LoraLabError
from lora_lab.training import Sweep, TrainConfig, Trial, grid
from lora_lab.training import sweep as sweep_settings
from lora_lab.training.batches import count_steps
from lora_lab.training.sweeps import Settings, check_candidates, with_settings

from .embeddings import embedding_rms, rms
from .prompted_model import PromptedModel, check_prompted
from .soft_prompt import Prompt

SHARE, PREFIX_SHARE, SHARES = 0.1, 0.02, (0.01, 0.03, 0.1, 0.3)  # a prefix speaks to all layers at once
WARMUP = 0.05  # of the steps
TINY = 1e-6  # far from rounding in float64, and from a ReLU's other side
Rows = Sequence[dict[str, Any]]


def learning_rate(prompted: PromptedModel, share: float | None = None, task: str | None = None) -> float:
    """The rate at which a step moves each number that a task inserts by about `share` of the scale of its kind.

    share: None is the usual one, 0.1, of a prefix 0.02.  task: None is the active one.
    Raises LoraLabError for an unknown task, and a share that is no number above 0.

    >>> from lora_lab.models import GPT2Config, GPT2LMHeadModel
    >>> from prompt_tuning_lab import inject
    >>> model = GPT2LMHeadModel(GPT2Config.from_dict({"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}))
    >>> model.get_input_embeddings().weight.data.fill_(0.2)[0, 0].item()
    0.20000000298023224
    >>> round(learning_rate(inject(model, 4, method="prompt"), share=0.1), 6)
    0.02
    """
    check_prompted(prompted, "learning_rate")
    prompt = prompted.prompt(task)
    return usual_share(prompt, share) * scale(prompted, prompt) / gain(prompt)


def usual_share(prompt: Prompt, share: float | None = None) -> float:
    """The share that is given, or the one for prompts of this kind. Raises LoraLabError for one that is no number above 0."""
    if share is None:
        return PREFIX_SHARE if prompt.method == "prefix" else SHARE
    check_share(share)
    return share


def check_share(share: Any) -> None:
    if not is_number(share) or share <= 0:
        raise LoraLabError(f"share={share!r}: expected a number above 0, how far a step goes as a part of a word's size ({SHARE} is usual)")


def scale(prompted: PromptedModel, prompt: Prompt) -> float:
    """Root mean square of what numbers of this kind are usually: words; of a prefix the median over its layers' keys, and values, zeros left out."""
    if prompt.method != "prefix":
        return embedding_rms(prompted.base)
    states: Tensor = prompt.initial.detach().cpu().double()  # type: ignore[operator]
    sizes = states.square().mean((2, 3, 4)).sqrt()
    if not sizes.any():
        raise LoraLabError("the prefix began as zeros, which have no size to take a share of: give learning_rate= itself (1e-2 is a start)")
    return float(sizes[sizes > 0].median())


def gain(prompt: Prompt) -> float:
    """How far the inserted numbers move, as a root mean square, where each parameter moves by 1 in the direction a loss would have it.

    The first step of Adam moves by the sign of the gradient. So for a random gradient r of what is inserted, J its Jacobian: rms(J sign(J' r)), by a
    small step in float64.
    """
    values = {name: parameter.detach().cpu().double().requires_grad_() for name, parameter in prompt.named_parameters()}
    now = torch.func.functional_call(prompt, values, ())
    wanted = torch.randn(now.shape, generator=torch.Generator().manual_seed(0)).to(now)
    gradients = torch.autograd.grad((now * wanted).sum(), list(values.values()))
    moved = {name: value + TINY * gradient.sign() for (name, value), gradient in zip(values.items(), gradients, strict=True)}
    return rms(torch.func.functional_call(prompt, moved, ()) - now) / TINY


def training_config(prompted: PromptedModel, rows: Rows, share: float | None = None, **settings: Any) -> TrainConfig:
    """How to train the active task on these rows: the rate derived, the first 5 % of the steps to warm up, no weight decay, clipped at 1.

    settings: fields of TrainConfig, which go before.
    """
    derived = {} if "learning_rate" in settings else {"learning_rate": learning_rate(prompted, share)}
    config = TrainConfig.of({**derived, **settings})
    return config if "warmup_steps" in settings else replace(config, warmup_steps=warmup_steps(config, rows))


def warmup_steps(config: TrainConfig, rows: Rows) -> int:
    return math.ceil(WARMUP * (config.max_steps or count_steps(list(rows), config)))


def sweep(make: Callable[..., PromptedModel], train_rows: Rows, validation_rows: Rows, candidates: Sequence[Settings] | None = None,
          config: TrainConfig | Settings | None = None, *, on_trial: Callable[[Trial], None] | None = None, **options: Any) -> Sweep:  # fmt: skip
    """`lora_lab.training.sweep` of prompts: a candidate may have a `share` in place of a learning rate, and all warm up for 5 % of their steps.

    make: called with a candidate's other settings; returns a prompted model, begun anew. One frozen base may serve all.
    candidates: None tries the shares 0.01, 0.03, 0.1 and 0.3; one with neither share nor rate has the usual share, or the rate of config where that
        is a TrainConfig or names one.  options: its tokenizer, metric, higher_is_better.

        sweep(lambda **settings: inject(base, tokenizer=tokenizer, **settings), train_rows, validation_rows,
              grid(share=[0.03, 0.1], num_virtual_tokens=[8, 20]), {"max_steps": 300}, tokenizer=tokenizer)
    """
    given, common = grid(share=SHARES) if candidates is None else check_candidates(candidates), TrainConfig.of(config)
    chosen = isinstance(config, TrainConfig) or "learning_rate" in (config or {})
    remaining = iter(given)

    def tell(trial: Trial) -> None:
        told = _with_share(trial, next(remaining))
        trials.append(told)
        if on_trial is not None:
            on_trial(told)

    trials: list[Trial] = []
    resolved = [_resolved(each, common, train_rows, chosen) for each in given]
    return replace(sweep_settings(make, train_rows, validation_rows, resolved, common, on_trial=tell, **options), trials=trials)


def _resolved(candidate: Settings, common: TrainConfig, rows: Rows, chosen: bool) -> Settings:
    """The candidate in words of TrainConfig and of make: the share as a function of the model, the warm-up in steps. chosen: config has a rate."""
    settings, share = {name: value for name, value in candidate.items() if name != "share"}, candidate.get("share")
    if "share" in candidate and "learning_rate" in candidate:
        raise LoraLabError(f"candidate {candidate}: share and learning_rate say the same in two ways; give one")
    if share is not None:
        check_share(share)
    if "share" in candidate or not (chosen or "learning_rate" in candidate):
        settings["learning_rate"] = lambda prompted: learning_rate(prompted, share)
    if "warmup_steps" not in candidate and not common.warmup_steps:
        settings["warmup_steps"] = warmup_steps(with_settings(common, settings), rows)
    return settings


def _with_share(trial: Trial, candidate: Settings) -> Trial:
    return replace(trial, settings={**({"share": candidate["share"]} if "share" in candidate else {}), **trial.settings})
