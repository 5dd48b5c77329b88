"""A frozen model with the prompts of any number of tasks beside it; called like the model, it answers like the model.

    prompted = inject(model, 20, init="vocab")         prompted.base is the model, prompted.tasks["default"] all that trains
    out = prompted(input_ids=ids, labels=labels)       the model's own output, with the text's logits only

A forward pass is a composition of functions from inputs to inputs: `insert_prompts` for the tasks that are rows, `insert_prefixes` for those
that are keys and values, each for its rows of the batch; then the base; then the text's part of what it answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lab.errors import LoraLabError, did_you_mean

from .base_model import base_kind, cache_length, check_text, context_length, has_read, rows_of
from .frozen_base import learning_through
from .generating import generate
from .heads import inserted_before, pooled
from .insertion import Inserted, insert_prompts
from .prefix_cache import prefix_shape
from .prefix_insertion import cache_asked_for, insert_prefixes, without_cache
from .soft_prompt import Prompt


class Tasks(nn.ModuleDict):
    """Name -> Prompt. Any name of letters, digits, '-' and '_' will do, also one that a module has for something else ("train")."""

    def __setitem__(self, name: str, prompt: nn.Module) -> None:
        self._modules[name] = prompt


class PromptedModel(nn.Module):
    """base: the model, the same object, frozen and in eval mode whatever .train() says.  tasks: name -> Prompt.

    active: the task of all rows, or None for the model as it was.  rows: inside `per_sample`, the task of each row instead.
    Only prompts train, in float32 (or float64); only the active task does after `inject`. What a forward pass inserts is decided when it
    begins, so a checkpointed recompute sees what its forward saw.
    """

    base: nn.Module
    tasks: nn.ModuleDict

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.kind = base_kind(base)
        self.base, self.tasks = base, Tasks()
        self.active: str | None = None
        self.rows: tuple[str | None, ...] | None = None
        self.inner_kind = base_kind(self.backbone) if self.kind.backbone else self.kind
        self.base_began = base.training, frozenset(name for name, parameter in base.named_parameters() if parameter.requires_grad)  # for `eject`
        base.requires_grad_(False)
        self.train(base.training)

    # The base's own ---------------------------------------------------------------------------------------------------------

    @property
    def lora_base(self) -> nn.Module:
        """What the verbs of lora_lab work on."""
        return self.base

    @property
    def backbone(self) -> nn.Module:
        """The part of the base that reads text: under a head the encoder or decoder, else all of it."""
        return self.base.get_submodule(self.kind.backbone)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()  # type: ignore[operator]

    def train(self, mode: bool = True) -> PromptedModel:
        super().train(mode)
        self.base.eval()
        return self

    # Tasks ------------------------------------------------------------------------------------------------------------------

    def prompt(self, task: str | None = None) -> Prompt:
        """The prompt of a task; None is the active one. Raises LoraLabError where there is none of that name, or none active."""
        if task is None and (task := self.active) is None:
            raise LoraLabError(f"no task is active: name one of {sorted(self.tasks)}, or choose it with use(prompted, name)")
        self.check_tasks([task], f"task={task!r}")
        return self.tasks[task]  # type: ignore[return-value]

    def check_tasks(self, names: Iterable[Any], where: str) -> None:
        for name in names:
            if not isinstance(name, str) or name not in self.tasks:
                raise LoraLabError(f"{where}: this model has the tasks {sorted(self.tasks)}{did_you_mean(name, self.tasks)}")

    def add(self, task: str, prompt: Prompt) -> None:
        """A task more, and the only active and trainable one; the others keep their values, frozen."""
        for module in prompt.modules():
            module.always_float32 = True  # type: ignore[assignment]  # whatever precision fit stores weights in
        self.tasks.requires_grad_(False)
        self.tasks[task] = prompt.to(self.device).train(self.training)
        prompt.requires_grad_(True)
        self.active = task

    @property
    def virtual_tokens(self) -> int:
        """Of the longest prompt that is chosen; a row of text may have so much fewer tokens."""
        names = [self.active] if self.rows is None else self.rows
        return 0 if self.kind.encodes else max((self.prompt(name).num_virtual_tokens for name in names if name is not None), default=0)

    def generate(self, *args: Any, **options: Any) -> Any:
        """The base's own generation, see generating.py."""
        return generate(self, *args, **options)

    @property
    def memory_request(self) -> dict[str, Any]:
        """What trains, in memory_math's words."""
        trained = [prompt for prompt in self.tasks.values() if any(p.requires_grad for p in prompt.parameters())]
        if not trained:
            return {}
        prompt: Any = max(trained, key=lambda each: each.num_virtual_tokens)  # type: ignore[arg-type, return-value]
        made = {} if prompt.hidden_size is None else {"encoder_hidden_size": prompt.hidden_size, "prefix_projection": prompt.method == "prefix"}
        return {"method": prompt.method, "num_virtual_tokens": prompt.num_virtual_tokens, **made}

    # Forward ----------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **given: Any) -> Any:
        """The base's arguments; its output, with the logits, hidden states and rows of attention of the text's positions only.

        attention_mask, position_ids, token_type_ids and labels are the text's. The loss is the base's of [prompt; text], so the last virtual token
        predicts the text's first token where that has a label. A cache that comes back has the prompt in it, and so have an
        encoder-decoder's encoder_last_hidden_state and cross-attentions: given back, they go on.
        Raises LoraLabError, before anything runs, for a text that with its prompt is beyond the context, and for a number of rows that is no
        multiple of per_sample's names.
        """
        inputs = self.arguments(args, given)
        wanted = inputs.pop("return_dict", None)
        tuples = getattr(getattr(self.base, "config", None), "return_dict", True) is False
        if tuples:
            inputs["return_dict"] = True  # an output with names, to take the prompt out of
        inserting = any(name is not None for name in ([self.active] if self.rows is None else self.rows))
        with learning_through(self.base) if self.training else contextlib.nullcontext():
            out = self._prompted(inputs) if inserting else self.base(**inputs)
        return out.to_tuple() if wanted is False or (tuples and wanted is None) else out

    def arguments(self, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
        inputs = {**dict(zip(self.kind.arguments, args, strict=False)), **given}
        if inputs.get("document_lengths") is not None:
            raise LoraLabError("document_lengths: the documents of a packed row would share one prompt; give padded rows with an attention_mask")
        if self.training and "use_cache" in self.kind.arguments and inputs.get("use_cache") is None:
            inputs["use_cache"] = False  # transformers' models fill one by default, also in training
        return inputs

    def _prompted(self, inputs: dict[str, Any]) -> Any:
        if not self.kind.backbone:
            inserted = self._insert_to_answer(inputs)
            return self.text_only(self.base(**inserted.inputs), inserted)
        with inserted_before(self.backbone, self.inner_kind.arguments, self._insert_to_answer, self.text_only):
            return self.base(**inputs)

    def _insert_to_answer(self, inputs: dict[str, Any]) -> Inserted:
        """Some encoder-decoders write what they have read where nothing else is given, and find its ids gone: a prompt has none."""
        written = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        if self.inner_kind.encodes and written[0] in self.inner_kind.arguments and all(inputs.get(name) is None for name in written):
            raise LoraLabError(f"decoder_input_ids are missing: a {type(self.base).__name__} cannot make them of a prompt and a text, as a prompt "
                               "has no ids. Give decoder_input_ids, or labels where the model shifts them")  # fmt: skip
        return self.insert(inputs)

    def insert(self, inputs: dict[str, Any]) -> Inserted:
        """From what the base, or the backbone under a head, was to be called with to what it is called with."""
        check_text(inputs, self.get_input_embeddings().embedding_dim, self.inner_kind.encodes)
        chosen, which = self.chosen(rows_of(inputs))
        prefixes = [prompt.method == "prefix" for prompt in chosen]
        rows = [index if index >= 0 and not prefixes[index] else -1 for index in which]
        states = [index if index >= 0 and prefixes[index] else -1 for index in which]
        self._check_context(inputs, chosen, which)
        made, placements = self._made(chosen, inputs), [prompt.placement for prompt in chosen]
        longest = max([0, *(chosen[index].num_virtual_tokens for index in states if index >= 0)])
        inserted = insert_prompts(self.backbone, made, rows, inputs, placements, self.inner_kind, longest)
        if not any(prefixes):
            return inserted
        whole = insert_prefixes(self.backbone, made, states, inserted.inputs)
        return replace(inserted, inputs=whole, drop_cache=not cache_asked_for(inputs))

    def _made(self, chosen: list[Prompt], inputs: dict[str, Any]) -> list[Tensor]:
        """What each inserts. Where a cache has it already only its shape is asked for, and no network makes it anew for every word."""
        return [self._shape_alone(prompt) if prompt.hidden_size is not None and self._has_read(prompt, inputs) else prompt() for prompt in chosen]

    def _has_read(self, prompt: Prompt, inputs: dict[str, Any]) -> bool:
        """An encoder-decoder has rows in its encoder_outputs; a prefix is in the decoder's cache as well."""
        begun = has_read(inputs) or cache_length(inputs.get("past_key_values")) > 0
        if not self.inner_kind.encodes:
            return begun
        return inputs.get("encoder_outputs") is not None and (begun or prompt.method != "prefix")

    def _shape_alone(self, prompt: Prompt) -> Tensor:
        """Zeros that take no memory, [P, H] or of a prefix [L, 2, P, N, D]."""
        shape = [prompt.num_virtual_tokens, self.get_input_embeddings().embedding_dim]
        if prompt.method == "prefix":
            layers, heads, head_dim = prefix_shape(self.backbone)
            shape = [layers, 2, prompt.num_virtual_tokens, heads, head_dim]
        return torch.zeros(1, device=self.device).expand(shape)

    def chosen(self, rows: int) -> tuple[list[Prompt], list[int]]:
        """The prompts of a batch of so many rows, and for each row the index of its own, or -1. k rows to a name are successive (beams)."""
        names = (self.active,) if self.rows is None else self.rows
        if rows == 0 or rows % len(names):
            raise LoraLabError(f"per_sample with {len(names)} names, but the batch has {rows} rows: expected a name (or None) for each row")
        used = [name for name in dict.fromkeys(names) if name is not None]
        which = [used.index(name) if name is not None else -1 for name in names for _ in range(rows // len(names))]
        return [self.prompt(name) for name in used], which

    def text_only(self, out: Any, inserted: Inserted) -> Any:
        """The output without what belongs to virtual tokens. It was made for this call, and is changed in place.

        Of attention, the text's rows: what each word looks at, virtual tokens among it.
        """
        if inserted.drop_cache:
            out = without_cache(out)  # that the prefix was put into
        if inserted.length == 0 or self.inner_kind.encodes:
            return out
        if getattr(out, "logits", None) is not None and self.kind.causal:
            out.logits = inserted.text_of(out.logits)[:, -inserted.keep :]
        if getattr(out, "last_hidden_state", None) is not None:
            out.last_hidden_state = inserted.text_of(out.last_hidden_state)
        if getattr(out, "pooler_output", None) is not None:
            out.pooler_output = pooled(self.backbone, out.last_hidden_state, out.pooler_output)
        for name, dim in (("hidden_states", 1), ("attentions", 2)):
            if (layers := getattr(out, name, None)) is not None:
                setattr(out, name, tuple(inserted.text_of(layer, dim) for layer in layers))
        return out

    def _check_context(self, inputs: dict[str, Any], chosen: list[Prompt], which: list[int]) -> None:
        """Raise LoraLabError where prompt and text are more than the model has positions for (trap T28)."""
        context = context_length(self.backbone, self.inner_kind)
        given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if context is None or given is None or torch.compiler.is_compiling():
            return
        virtual, positions = [chosen[index].num_virtual_tokens if index >= 0 else 0 for index in which], inputs.get("position_ids")
        mask, past = inputs.get("attention_mask"), 0 if self.inner_kind.encodes else cache_length(inputs.get("past_key_values"))
        text = mask.shape[-1] if isinstance(mask, Tensor) else given.shape[1]  # without one, what is cached is as long in all rows, or too long
        if max(virtual) + text <= context and past + given.shape[1] <= context:
            return
        if isinstance(positions, Tensor) and int((positions.amax(-1) + torch.tensor(virtual, device=positions.device)).max()) < context:
            return  # the caller counts, and rows that are done need not go on
        counted = "position_ids" in self.inner_kind.arguments
        if counted and isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == len(virtual):  # padding takes no position
            text = int(mask.sum(1).max())
            if int((mask.sum(1) + torch.tensor(virtual, device=mask.device)).max()) <= context:
                return
        text = max(text, past + given.shape[1] - max(virtual)) if mask is None else text
        room = context - max(virtual)
        raise LoraLabError(f"{max(virtual)} virtual tokens and a text of {text} are {max(virtual) + text} positions, the model's context is "
                           f"{context}: shorten the text to {room} tokens")  # fmt: skip


def check_prompted(model: Any, verb: str) -> None:
    """Raise LoraLabError for a model that has no prompts."""
    if not isinstance(model, PromptedModel):
        raise LoraLabError(f"{verb}: expected a prompted model, from inject or load, not a {type(model).__name__}")


def check_module(model: Any, verb: str) -> None:
    """Raise LoraLabError for what is no model at all, such as its name."""
    if not isinstance(model, nn.Module):
        raise LoraLabError(f"{verb}: expected a model, not {model!r:.60}; lora_lab.models.load(name) loads one")
