"""Put a prompt before a model: the model is frozen, the prompt is all that trains.

    prompted = inject(model, 20, init="text", text="Is this review positive or negative?", tokenizer=tokenizer)
    lora_lab.training.fit(prompted, rows, config)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError, did_you_mean
from lora_lab.targets import ADAPTER_NAME, lora_layers
from lora_lab.wrapping import refuse_sharded, refuse_wrapped

from .base_model import base_kind, context_length, refuse_meta, refuse_words_in_layers
from .embeddings import embedding_rms, rms
from .initialization import Initialization, Start, check_count, check_seed, check_words, first_rows, first_words, rows_there
from .layout import check_placement
from .prefix import Prefix, from_rows, keys_and_values, random_prefix, to_rows
from .prefix_cache import prefix_shape
from .prompted_model import PromptedModel, check_module, check_prompted
from .reparameterization import PrefixMLP, PTuning, ResidualPrompt
from .soft_prompt import Prompt, SoftPrompt

METHODS = ("prompt", "prefix", "p-tuning", "residual")
NETWORKS = {"p-tuning": PTuning, "residual": ResidualPrompt}


def inject(model: nn.Module, num_virtual_tokens: int = 20, *, method: str = "prompt", init: Any = "vocab", text: str | None = None,
           labels: Sequence[str] | None = None, tokenizer: Any = None, placement: str = "front", task: str = "default", top_n: int = 5000,
           seed: int | None = None, encoder_hidden_size: int | None = None, prefix_projection: bool = False) -> PromptedModel:  # fmt: skip
    """A model that reads `num_virtual_tokens` trained vectors before each text; the model itself is frozen, in place, and in eval mode.

    model: ours or transformers': causal, encoder-decoder, encoder, with a head or without. A prompted one gets one more task, which is
        then the only active and trainable one; earlier ones keep their values. LoRA adapters in it are frozen with it: inject them afterwards
        (lora_lab.inject takes a prompted model) to train both.
    method: "prompt": rows of the embedding's width (Lester et al. 2021).  "prefix": keys and values in every layer (Li & Liang 2021).
        "p-tuning", "residual": rows that a small network makes (Liu et al. 2021, Razdaibiedina et al. 2023).
    init: "vocab" | "random" | "labels" | "text" | a path of a .npy file or a saved prompt | a task of this model | a tensor; a prefix begins as
        the keys and values that the model makes of the words. See initialization.py; the record is `prompted.prompt().initialization`.
    text, labels: of the inits of these names.  tokenizer: for both; without one, special tokens can be among the words that are drawn.
    top_n: words are drawn from those with the lowest ids, the most frequent.  seed: of the draw; None goes on with PyTorch's own.
    placement: "front" | "after-bos", behind each text's first token.  task: its name.
    encoder_hidden_size: of the network of "p-tuning", "residual", or a prefix with prefix_projection=True (its own is an MLP, too).
    Raises LoraLabError, the model untouched, for settings that make no sense, and more virtual tokens than the model's context has room for.
    """
    check_module(model, "inject")
    refuse_wrapped(model, "inject")
    refuse_sharded(model, "inject")
    tasks = model.tasks if isinstance(model, PromptedModel) else nn.ModuleDict()
    base = model.base if isinstance(model, PromptedModel) else model
    check_task_name(task)
    if task in tasks:
        raise LoraLabError(f"task={task!r} is already in this model (it has {sorted(tasks)}): choose another name")
    _check(base, num_virtual_tokens, method, placement, encoder_hidden_size, prefix_projection)
    check_seed(seed)
    start = Start(_rows_of(init, tasks), text, labels, tokenizer, top_n, seed)
    prompt = new_prompt(base, num_virtual_tokens, method, start, encoder_hidden_size, prefix_projection)
    prompt.placement = placement
    prompted = model if isinstance(model, PromptedModel) else PromptedModel(model)
    prompted.add(task, prompt)
    return prompted


def remove(prompted: PromptedModel, task: str) -> PromptedModel:
    """Take a task out; the others stay. Where it was the active one, none is. Returns the same model.

    Raises LoraLabError for a task the model does not have, and inside `per_sample`, whose rows may be its.
    """
    check_prompted(prompted, "remove")
    prompted.check_tasks([task], f"remove({task!r})")
    if prompted.rows is not None:
        raise LoraLabError(f"remove({task!r}) inside per_sample({list(prompted.rows)!r:.60}): leave the block first")
    del prompted.tasks[task]
    prompted.active = None if prompted.active == task else prompted.active
    return prompted


def eject(prompted: PromptedModel) -> nn.Module:
    """The base as it was before the first `inject`: trainable where it was trainable, in training mode if it was. Its tasks are with `prompted`.

    Raises LoraLabError, nothing changed, where the base has LoRA layers, which remember it frozen: eject those first (lora_lab.eject).
    """
    check_prompted(prompted, "eject")
    if lora_layers(prompted.base):
        raise LoraLabError("eject: the base has LoRA layers, too, which would be left on a base that trains: call lora_lab.eject(prompted) first")
    training, trained = prompted.base_began
    for name, parameter in prompted.base.named_parameters():
        parameter.requires_grad_(name in trained)
    return prompted.base.train(training)


def new_prompt(base: nn.Module, num_virtual_tokens: int, method: str, start: Start, hidden_size: int | None = None,
               projected: bool = False) -> Prompt:  # fmt: skip
    """The module of a method, begun; on the CPU."""
    make: Any = NETWORKS.get(method, SoftPrompt)
    if method == "prefix":
        make = PrefixMLP if projected else Prefix
    weight, record = (first_prefix if method == "prefix" else first_rows)(base, num_virtual_tokens, start)
    sizes = {} if hidden_size is None else {"hidden_size": hidden_size}
    with contextlib.nullcontext() if start.seed is None else torch.random.fork_rng(devices=[]):
        if start.seed is not None:
            torch.default_generator.manual_seed(start.seed)  # the CPU's alone: a GPU's goes on where it was
        prompt: Prompt = make(weight, **sizes)
    prompt.initialization = record
    return prompt


def first_prefix(base: nn.Module, num_virtual_tokens: int, start: Start) -> tuple[Tensor, Initialization]:
    """[L, 2, P, N, D], the keys and values of words or small random numbers, and the record of them."""
    check_words(start)
    shape, scale = prefix_shape(base), embedding_rms(base)
    if not start.is_known:
        given = to_rows(start.init) if isinstance(start.init, Tensor) and start.init.ndim == 5 else start.init
        weight = from_rows(rows_there(base, given, [num_virtual_tokens, shape.per_token]), shape)
        return weight, Initialization("rows that were there", num_virtual_tokens, 0, 0, rms(weight), scale)
    if start.init == "random":
        weight = random_prefix(shape, num_virtual_tokens, generator=start.generator())
        return weight, Initialization("random numbers", num_virtual_tokens, 0, 0, rms(weight), scale)
    ids, given_count = first_words(base, num_virtual_tokens, start)
    weight = keys_and_values(base, torch.tensor(ids)).cpu()
    return weight, Initialization(start.init, given_count, num_virtual_tokens - given_count, 0, rms(weight), scale)


def check_task_name(task: Any) -> str:
    if not isinstance(task, str) or not ADAPTER_NAME.fullmatch(task):
        raise LoraLabError(f"task={task!r}: expected 1 to 64 letters, digits, '-' or '_'")
    return task


def _rows_of(init: Any, tasks: Any) -> Any:
    """The present rows where init is a task of this model or a Prompt; else as it is."""
    prompt = tasks[init] if isinstance(init, str) and init in tasks else init
    return prompt().detach() if isinstance(prompt, Prompt) else init


def _check(base: nn.Module, num_virtual_tokens: int, method: str, placement: str, hidden_size: int | None, projected: bool) -> None:
    check_count(num_virtual_tokens)
    check_placement(placement)
    kind = base_kind(base)
    refuse_meta(base)
    if method not in METHODS:
        raise LoraLabError(f"method={method!r}: expected one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if method != "prefix":
        refuse_words_in_layers(base)
    if method == "prefix" and placement != "front":
        raise LoraLabError(f"placement={placement!r} with method='prefix': keys and values stand before all of the text, only rows among it")
    if projected and method != "prefix":
        raise LoraLabError(f"prefix_projection=True with method={method!r}: it is the network of method='prefix'")
    if hidden_size is not None and (method == "prompt" or (method == "prefix" and not projected)):
        raise LoraLabError(f"encoder_hidden_size={hidden_size!r} with method={method!r}: no network (a prefix has one with prefix_projection=True)")
    context = context_length(base.get_submodule(kind.backbone), kind)
    if context is not None and num_virtual_tokens >= context:
        raise LoraLabError(f"num_virtual_tokens={num_virtual_tokens}: the model's context is {context}, which leaves no room for text")
