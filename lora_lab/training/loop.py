"""The training loop: whatever requires grad is trained, in any of the precisions, on labelled rows.

    for each optimizer step:
        for each of its micro-batches:  (loss * its share of the step's labelled tokens).backward()
        clip, step, next learning rate
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.batching import Batch, collate, length_buckets
from ..data.templates import IGNORE, Example, encode_rows
from ..errors import LoraLabError
from ..merging import refuse_merged
from ..models.base import PretrainedModel, in_mode
from ..targets import lora_layers
from .accounting import Log, peak_bytes, reset_peak, save_trainable
from .config import TrainConfig
from .optimizers import OPTIMIZERS, learning_rate_share
from .precision import PRECISIONS, learns_in_16_bit, stored_in

NOTHING_LEARNS = ("the loss depends on no weight that requires grad: is the adapter that trains switched on (lora_lab.use)? "
                  "Reentrant checkpointing over frozen inputs cuts the graph, too (use_reentrant=False)")  # fmt: skip


@dataclass
class FitResult:
    """losses: mean over the labelled tokens of each step.  eval_losses: before the first step, at eval_every, after the last.

    tokens: of the rows, padding not counted.  label_tokens: those that were learned.  seconds: of the steps, evaluation and
    saving left out.  peak_bytes: see `accounting.peak_bytes`.  skipped_steps: float16 overflows.
    """

    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    steps: int = 0
    skipped_steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def fit(model: nn.Module, data: Sequence[dict[str, Any]], config: TrainConfig | dict[str, Any] | None = None, *, tokenizer: Any = None,
        eval_data: Sequence[dict[str, Any]] | None = None) -> FitResult:  # fmt: skip
    """Train what requires grad in `model` on `data`; returns the numbers of the run. The model is changed in place.

    model: takes input_ids, attention_mask and labels [B, T] and returns an object with .loss, the mean over labelled tokens:
        ours, or a causal model of transformers.
    data, eval_data: rows {"input_ids", "labels"}, or instruction/input/output or messages rows with a tokenizer.
    config: a TrainConfig or a dict of its fields.
    The same seed, data, machine and thread count give the same run.  Raises LoraLabError before the first step for rows or
    settings that make no sense, and on a loss that is not a number; dtypes, mode and checkpointing are the caller's own afterwards.
    """
    config = TrainConfig.of(config)
    _refuse_other_tasks(model)
    refuse_merged(model, "fit")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise LoraLabError("nothing in the model requires grad, so there is nothing to train: inject an adapter, or unfreeze weights")
    max_length = _longest_row(model, config)
    examples = encode_rows(data, tokenizer, max_length)
    held_out = encode_rows(eval_data, tokenizer, max_length) if eval_data else []
    precision = PRECISIONS[config.precision]
    if learns_in_16_bit(model, precision):
        warnings.warn("weights are trained in 16 bit: updates smaller than about 1/256 of a weight are rounded away; "
                      "precision='bf16-mixed' keeps float32 masters", stacklevel=2)  # fmt: skip
    with (torch.random.fork_rng(_gpus(trained[0])), _own_gradients(trained), stored_in(precision, model), in_mode(model, training=True),
          _checkpointing(model, config.gradient_checkpointing)):  # fmt: skip
        return _Run(model, trained, config, getattr(tokenizer, "pad_token_id", 0) or 0).train(examples, held_out)


def _gpus(parameter: Tensor) -> list[int]:
    """The GPU whose random numbers the run uses, if any: fork_rng gives them back to the caller as they were."""
    return [parameter.get_device()] if parameter.device.type == "cuda" else []


def _refuse_other_tasks(model: nn.Module) -> None:
    """`fit` predicts the next token; a model with another task would take its labels for something else, without a word."""
    other = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or type(model).__name__.endswith(other):
        raise LoraLabError(f"fit trains causal language models (next-token prediction); a {type(model).__name__} has another task")


class _Run:
    """One call of `fit`: the state its methods share."""

    def __init__(self, model: nn.Module, trained: list[nn.Parameter], config: TrainConfig, pad_id: int) -> None:
        torch.manual_seed(config.seed)
        self.model, self.trained, self.config, self.pad_id = model, trained, config, pad_id
        self.device = trained[0].device
        self.precision = PRECISIONS[config.precision]
        self.scaler = self.precision.scaler(self.device)
        self.optimizer = OPTIMIZERS[config.optimizer](trained, config.learning_rate, config.weight_decay)
        self.result = FitResult()
        self.folder = Path(config.output_dir) if config.output_dir is not None else None
        self.log = Log(self.folder)

    def train(self, examples: list[Example], held_out: list[Example]) -> FitResult:
        config, result = self.config, self.result
        per_epoch = math.ceil(math.ceil(len(examples) / config.micro_batch_size) / config.grad_accum_steps)
        steps = config.max_steps or max(1, math.ceil(round(per_epoch * config.epochs, 6)))  # 1.1 epochs of 100 steps are 110, not 111
        reset_peak(self.device)
        self.evaluate(held_out, step=0)
        with _progress(steps, config.progress) as bar:
            for step, indices in enumerate(itertools.islice(step_batches(examples, config), steps), start=1):
                started = time.perf_counter()
                loss = self.step([[examples[i] for i in batch] for batch in indices], step, steps)
                result.seconds += time.perf_counter() - started
                result.steps = step
                bar.set_postfix_str(f"loss {loss:.3f}, {result.tokens_per_second:.0f} tokens/s", refresh=False)
                bar.update()
                if self.folder is not None and config.save_every and step % config.save_every == 0:
                    save_trainable(self.model, self.folder, step)
                if step == steps or (config.eval_every and step % config.eval_every == 0):
                    self.evaluate(held_out, step)
        result.peak_bytes = peak_bytes(self.device)
        if result.skipped_steps == result.steps:
            warnings.warn(f"all {steps} steps were skipped by float16 overflow, so nothing was learned: train longer or in bf16-mixed", stacklevel=3)
        return result

    def step(self, micro_batches: list[list[Example]], step: int, steps: int) -> float:
        """One optimizer step; returns its mean loss over labelled tokens."""
        batches = [collate(examples, self.pad_id, self.device) for examples in micro_batches]
        labelled = [label_tokens(batch) for batch in batches]
        rate = self.config.learning_rate * learning_rate_share(step - 1, steps, self.config.warmup_steps, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        watch = _WhichLayersRan(self.model) if step == 1 else contextlib.nullcontext()
        with watch:
            loss = sum(self.backward(batch, count / sum(labelled)) for batch, count in zip(batches, labelled, strict=True))
        self.check_finite("loss", loss, step)
        if isinstance(watch, _WhichLayersRan):
            watch.check(self.trained)
        norm, skipped = self.update(step)
        self.result.losses.append(loss)
        self.result.skipped_steps += skipped
        self.result.tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.result.label_tokens += sum(labelled)
        self.log.write(step=step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=self.result.tokens,
                       skipped=skipped, seconds=round(self.result.seconds, 3))  # fmt: skip
        return loss

    def backward(self, batch: Batch, share: float) -> float:
        """Add this micro-batch's part of the step's gradient; returns its part of the step's loss."""
        with self.precision.autocast(self.device):
            loss = getattr(self.model(**batch), "loss", None)
        if not isinstance(loss, Tensor):
            raise LoraLabError(f"a {type(self.model).__name__} returned no .loss for labels: fit needs a causal language model with its head")
        loss = loss * share
        if not loss.requires_grad:
            raise LoraLabError(NOTHING_LEARNS)
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def update(self, step: int) -> tuple[float, bool]:
        """Clip and step; returns the gradient norm before clipping and whether an overflow skipped the step."""
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf))
        self.check_finite("gradient's norm", norm, step)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, self.scaler.get_scale() < scale

    def check_finite(self, what: str, value: float, step: int) -> None:
        """Stop at a loss or gradient that is not a number; under loss scaling an overflow is expected, until no scale is left."""
        if not math.isfinite(value) and not (self.precision.scaled and self.scaler.get_scale() >= 1.0):
            raise LoraLabError(f"the {what} is {value} at step {step}: lower learning_rate ({self.config.learning_rate}), warm up longer, or train "
                               "in fp32; the weights are those before this step")  # fmt: skip

    def evaluate(self, held_out: list[Example], step: int) -> None:
        if held_out:
            loss = evaluate(self.model, held_out, self.config, self.pad_id)
            self.result.eval_losses.append(loss)
            self.log.write(step=step, eval_loss=loss)


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[Example], config: TrainConfig, pad_id: int = 0) -> float:
    """Mean cross-entropy over the labelled tokens of all examples, in the model's present precision."""
    device = next(model.parameters()).device
    lengths = [len(example["input_ids"]) for example in examples]
    total = tokens = 0.0
    with in_mode(model, training=False), PRECISIONS[config.precision].autocast(device):
        if isinstance(model, PretrainedModel):
            model.training = True  # the top module alone: dropout stays off, and only labelled positions get logits
        for indices in tqdm(length_buckets(lengths, config.micro_batch_size), "evaluate", disable=not config.progress, leave=False):
            batch = collate([examples[i] for i in indices], pad_id, device)
            count = label_tokens(batch)
            total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return total / tokens


def step_batches(examples: list[Example], config: TrainConfig) -> Iterator[list[list[int]]]:
    """Endlessly, epoch after epoch: the micro-batches (row indices) of each optimizer step."""
    lengths = [len(example["input_ids"]) for example in examples]
    for epoch in itertools.count():
        batches = length_buckets(lengths, config.micro_batch_size, random.Random(f"{config.seed}-{epoch}"))
        for start in range(0, len(batches), config.grad_accum_steps):
            yield batches[start : start + config.grad_accum_steps]


def label_tokens(batch: Batch) -> int:
    """Positions with a label, as a causal model counts them: the first has nothing before it to be predicted from."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


class _WhichLayersRan:
    """During the first step, notes which LoRA layers were called; then each of those must have received a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.layers, self.ran, self.hooks = lora_layers(model), set[str](), list[Any]()

    def __enter__(self) -> None:
        for path, layer in self.layers.items():
            assert isinstance(layer, nn.Module)
            self.hooks.append(layer.register_forward_hook(lambda *_, path=path: self.ran.add(path)))

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def check(self, trained: list[nn.Parameter]) -> None:
        if all(p.grad is None for p in trained):
            raise LoraLabError(NOTHING_LEARNS)
        for path in sorted(self.ran):
            layer = self.layers[path]
            for adapter in layer.lora_active:
                if layer.lora_B[adapter].requires_grad and layer.lora_B[adapter].grad is None:
                    raise LoraLabError(f"layer {path!r} ran, but its lora_B got no gradient: something between it and the loss cuts the graph "
                                       "(reentrant checkpointing? use use_reentrant=False)")  # fmt: skip


def _longest_row(model: nn.Module, config: TrainConfig) -> int | None:
    """Tokens a row may have: no more than max_length, and no more than the model's context."""
    limits = config.max_length, getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min((limit for limit in limits if limit is not None), default=None)


@contextlib.contextmanager
def _own_gradients(trained: list[nn.Parameter]) -> Iterator[None]:
    """No gradient of an earlier backward() gets into the run, and none of the run stays behind."""
    _drop_gradients(trained)
    try:
        yield
    finally:
        _drop_gradients(trained)


def _drop_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextlib.contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing for the run, where the model does not use it already."""
    if not wanted or _member(model, "is_{}_checkpointing"):
        yield
        return
    enable, disable = _member(model, "{}_checkpointing_enable"), _member(model, "{}_checkpointing_disable")
    if enable is None or disable is None:
        raise LoraLabError(f"gradient_checkpointing=True: a {type(model).__name__} has no gradient_checkpointing_enable() to switch it on")
    _switch_on(model, enable)
    try:
        yield
    finally:
        disable()


def _switch_on(model: nn.Module, enable: Any) -> None:
    if isinstance(model, PretrainedModel):
        enable()
        return
    try:
        enable({"use_reentrant": False})  # transformers': its reentrant kind gives frozen inputs a gradient that nobody needs
    except ValueError as error:
        raise LoraLabError(f"gradient_checkpointing=True: {error}") from None
    with contextlib.suppress(AttributeError):  # some versions of transformers have no such hook to remove, or fail without one
        model.disable_input_require_grads()  # type: ignore[operator]


def _member(model: nn.Module, name: str) -> Any:
    """transformers calls it activation checkpointing since 5.23, and warns of the older name."""
    newer = name.format("activation")
    return getattr(model, newer if hasattr(model, newer) else name.format("gradient"), None)


def _progress(steps: int, shown: bool) -> Any:
    return tqdm(total=steps, desc="train", unit="step", disable=not shown)
