"""What `fit` does before and after the loop: whatever requires grad is trained, in any of the precisions, on labelled rows.

    for each optimizer step:
        for each of its micro-batches:  (loss * its share of the step's labelled tokens).backward()
        clip, step, next learning rate

What a step is stands in loop.py; here is what has to be true before the first and after the last.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.formats import Placed
from ..data.objectives import Objective, objective_of, packed_objective_of
from ..data.packing import check_fits
from ..data.templates import IGNORE
from ..errors import LoraLabError
from ..learning_rates import learns_fast
from ..merging import refuse_merged
from ..models.base import in_mode, longest_row, pad_id_of
from ..models.causal import refuse_per_sample
from .batches import Examples, epoch_batches
from .config import TrainConfig
from .distributed import START, TORCHRUN, World, world
from .guards import checkpointing, out_of_memory_explained, own_gradients
from .loop import Run, mean_loss
from .memory_request import request_of
from .precision import PRECISIONS, dtypes_under, stored_in
from .result import FitResult
from .sharding import is_sharded, let_go, shard
from .state import only_run_in


def fit(model: nn.Module, data: Sequence[dict[str, Any]], config: TrainConfig | dict[str, Any] | None = None, *, tokenizer: Any = None,
        eval_data: Sequence[dict[str, Any]] | None = None) -> FitResult:  # fmt: skip
    """Train what requires grad in `model` on `data`; returns the numbers of the run. The model is changed in place.

    model: takes input_ids, attention_mask and labels [B, T] and returns an object with .loss, the mean over labelled tokens:
        ours, or a causal or encoder-decoder model of transformers; or a sequence classifier of either, whose loss is the mean over rows.
    data, eval_data: rows {"input_ids", "labels"}, or instruction/input/output or messages rows with a tokenizer (an encoder-decoder's
        labels are the answer alone, data/seq2seq.py); of a classifier
        {"input_ids", "label"} or {"text", "label"} (data/classification.py).
    config: a TrainConfig or a dict of its fields.
    The same seed, data, machine and thread count give the same run, stopped and resumed or not (see snapshots.py).  Raises LoraLabError
    before the first step for rows or settings that make no sense, on a loss that is not a number, and where memory runs out; dtypes, mode
    and checkpointing are the caller's own afterwards.
    Under torchrun every process calls it alike, and they train one model together (distributed.py); with distributed="fsdp" it stays divided.
    """
    config = TrainConfig.of(config)
    everyone = _everyone(model, config)
    objective = _objective(model, config)
    refuse_merged(model, "fit")
    if not any(p.requires_grad for p in model.parameters()):
        raise LoraLabError("nothing in the model requires grad, so there is nothing to train: inject an adapter, or unfreeze weights")
    max_length = longest_row(model, config.max_length)
    examples = objective.encode(data, tokenizer, max_length)
    held_out = objective.encode(eval_data, tokenizer, max_length) if eval_data else []
    _check_settings(model, config, held_out)
    _check_model(model, itertools.chain(examples, held_out))
    _check_packs(config, data, examples)
    request = request_of(model, config, examples, everyone.size)
    _check_shares(examples, config, everyone)
    with everyone.together(), only_run_in(config.output_dir, everyone):
        if everyone.size > 1 and config.distributed == "fsdp" and not is_sharded(model):
            shard(model, config.precision)
        with _lent(model, config) as learning, out_of_memory_explained(model, request):
            return Run(model, objective, config, examples, held_out, pad_id_of(tokenizer), everyone, learning).train()


def evaluate(model: nn.Module, examples: Examples, config: TrainConfig, pad_id: int = 0) -> float:
    """Mean loss over encoded examples: of a language model over labelled tokens, of a classifier over rows. Raises LoraLabError for none."""
    if not examples:
        raise LoraLabError("no examples to evaluate on: expected at least one encoded row")
    return mean_loss(model, _objective(model, config), examples, config, pad_id)


@contextlib.contextmanager
def _lent(model: nn.Module, config: TrainConfig) -> Iterator[Callable[[], None]]:
    """Random numbers, gradients, dtypes, mode and checkpointing are the run's inside, and the caller's own again afterwards.

    The block gets what it has to call before the first step: see `stored_in`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    with (torch.random.fork_rng(_gpus(trained[0])), own_gradients(trained), stored_in(PRECISIONS[config.precision], model) as learning,
          in_mode(model, training=True), checkpointing(model, config.gradient_checkpointing)):  # fmt: skip
        try:
            yield learning
        finally:
            let_go(model)


def _everyone(model: nn.Module, config: TrainConfig) -> World:
    """The processes of this run. Raises LoraLabError where they cannot train together as asked."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise LoraLabError("fit wraps the model in DistributedDataParallel itself: give it the model inside (.module)")
    divided, everyone = is_sharded(model), world(next((p.device for p in model.parameters()), None))
    if not divided and any(is_sharded(module) for module in model.modules()):
        raise LoraLabError("fully_shard divided parts of this model, but not the model itself: call it for that, too, or use lora_lab.training.shard")
    if everyone.size == 1:
        if config.distributed is not None and not all(name in os.environ for name in TORCHRUN):
            raise LoraLabError(f"distributed={config.distributed!r}, but this process is alone: {START}")
        return everyone
    _check_together(config, "fsdp" if divided else config.distributed or "ddp")
    if divided and dtypes_under(PRECISIONS[config.precision], model):
        raise LoraLabError(f"precision={config.precision!r}: the model was divided with other dtypes; call shard with the precision of the run")
    return everyone


def _check_together(config: TrainConfig, kind: str) -> None:
    """What several processes cannot do."""
    if config.distributed not in (None, kind):
        raise LoraLabError(f"distributed={config.distributed!r}: this model is divided by fully_shard already; give 'fsdp', or a model that is whole")
    if config.optimizer_in_backward:
        raise LoraLabError("optimizer_in_backward=True with several processes: weights would step before the processes have exchanged gradients")
    if kind == "fsdp" and config.activation_offload:
        raise LoraLabError("activation_offload=True with fsdp: weights that were gathered would be moved, too; use gradient_checkpointing")
    if kind == "fsdp" and config.optimizer == "adafactor":
        raise LoraLabError("optimizer='adafactor' with fsdp: a matrix's rows lie in several processes, and its column means with them; use adamw or "
                           "lion, which fsdp divides")  # fmt: skip


def _check_shares(examples: Examples, config: TrainConfig, everyone: World) -> None:
    """Each process needs a micro-batch of its own."""
    batches = len(epoch_batches([len(example["input_ids"]) for example in examples], config, epoch=0)) if everyone.size > 1 else everyone.size
    if batches < everyone.size:
        raise LoraLabError(f"{everyone.size} processes, but {len(examples)} rows make {batches} micro-batches: lower micro_batch_size "
                           f"({config.micro_batch_size}), or start fewer processes")  # fmt: skip


def _gpus(parameter: Tensor) -> list[int]:
    """The GPU whose random numbers the run uses, if any: fork_rng gives them back to the caller as they were."""
    return [parameter.get_device()] if parameter.device.type == "cuda" else []


def _objective(model: nn.Module, config: TrainConfig) -> Objective:
    if not config.packing:
        return objective_of(model)
    refuse_per_sample(model, "packing=True")
    return packed_objective_of(model)


def _check_packs(config: TrainConfig, data: Any, examples: Examples) -> None:
    """A row that is no pack of its own is told before the first step."""
    for index, example in enumerate(examples if config.max_tokens is not None else ()):
        assert config.max_tokens is not None
        check_fits(len(example["input_ids"]), config.max_tokens, data.where(index) if isinstance(data, Placed) else f"row {index}")


def _check_model(model: nn.Module, examples: Iterable[Any]) -> None:
    """Raise LoraLabError for weights that hold no numbers, and for an id that is no word: on a GPU it would end the process, at its turn."""
    if meta := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise LoraLabError(f"{meta[0]!r} is on the meta device, which holds shapes and no numbers: load the weights first")
    embedding = _input_embedding(model)
    for row, example in enumerate(examples if embedding is not None else ()):
        ids = [*example["input_ids"], *(example.get("labels") or ())]
        if outside := [each for each in (min(ids), max(ids)) if each >= embedding.num_embeddings or (each < 0 and each != IGNORE)]:
            raise LoraLabError(f"row {row} has the id {outside[0]}, the model's vocabulary ends at {embedding.num_embeddings - 1}: is this the "
                               "model's tokenizer?")  # fmt: skip


def _input_embedding(model: nn.Module) -> Any:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _check_settings(model: nn.Module, config: TrainConfig, held_out: Examples) -> None:
    for name in ("early_stopping", "keep_best", "eval_every"):
        if getattr(config, name) and not held_out:
            raise LoraLabError(f"{name}={getattr(config, name)!r} needs eval_data to evaluate on")
    if config.early_stopping is not None and config.eval_every is None:
        raise LoraLabError(f"early_stopping={config.early_stopping} needs eval_every: without it the only evaluation of a step is after the last one")
    if config.lora_plus_ratio is not None and not any(p.requires_grad and learns_fast(name) for name, p in model.named_parameters()):
        raise LoraLabError(f"lora_plus_ratio={config.lora_plus_ratio!r}: no B of LoRA trains in this {type(model).__name__}; inject first, or give "
                           "no ratio")  # fmt: skip
