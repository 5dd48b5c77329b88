"""One run of training: steps, evaluations, snapshots, and the end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.batching import Batch, length_buckets
from ..data.objectives import Objective
from ..errors import LoraLabError
from ..learning_rates import parameter_groups
from ..models.base import PretrainedModel, in_mode
from ..models.progress import watched
from ..wrapping import base_of, gathered
from . import snapshots, state
from .accounting import Log, peak_bytes, reset_peak
from .batches import Examples, count_steps, lengths_of, step_batches
from .config import TrainConfig
from .distributed import ALONE, World, accumulating, agree_on_weights, data_parallel, same_random_numbers
from .dtensors import joined_like, piece
from .guards import NOTHING_LEARNS, Diverged, WhichLayersRan, first_gradient_not_finite, first_not_finite
from .memory_saving import StepsInBackward, offloaded_activations
from .optimizers import learning_rate_share, make_optimizer
from .precision import PRECISIONS
from .result import FitResult
from .sharding import is_sharded, let_go


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after a whole step, and a snapshot is saved: resume=True goes on."""


class Run:
    """One call of `fit`: the state its methods share."""

    def __init__(self, model: nn.Module, objective: Objective, config: TrainConfig, examples: Examples, held_out: Examples, pad_id: int,
                 world: World = ALONE, learning: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        torch.manual_seed(world.seed(config.seed))
        self.world, self.learning = world, learning
        self.model, self.objective, self.config, self.pad_id = model, objective, config, pad_id
        self.examples, self.held_out = examples, held_out
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.trained.values())).device
        self.precision = PRECISIONS[config.precision]
        self.scaler = self.precision.scaler(self.device, world.size)
        self.optimizers = self._make_optimizers()
        self.result = FitResult()
        self.best: dict[str, Tensor] = {}
        self.saved_step: int | None = None
        self.folder = Path(config.output_dir) if config.output_dir is not None else None
        self.steps = config.max_steps or count_steps(examples, config, world.size)
        if config.warmup_steps >= self.steps > 1:
            warnings.warn(f"warmup_steps={config.warmup_steps} of {self.steps} steps: the learning rate rises to the end of the run", stacklevel=4)
        self.call: nn.Module = model

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """One for all, or with optimizer_in_backward one for each weight; each group knows its share of the learning rate."""
        config, ratio = self.config, self.config.lora_plus_ratio
        if ratio is None:
            groups: list[dict[str, Any]] = [{"params": list(self.trained.values())}]
        else:
            groups = parameter_groups(self.model, config.learning_rate, ratio, config.weight_decay)
        for group in groups:
            group["share"] = group.setdefault("lr", config.learning_rate) / config.learning_rate
        if config.optimizer_in_backward:
            groups = [{**group, "params": [parameter]} for group in groups for parameter in group["params"]]
        apart = [[group] for group in groups] if config.optimizer_in_backward else [groups]
        return [make_optimizer(config.optimizer, given, config.learning_rate, config.weight_decay) for given in apart]

    def train(self) -> FitResult:
        config = self.config
        reset_peak(self.device)
        self.meet()
        done = self.begin()
        result, shown = self.result, config.progress and self.world.first
        last = done if result.stopped_early else self.steps
        batches = itertools.islice(step_batches(self.examples, config, self.world.size), done, last)
        with self.stepping(), interruptible(self.saves) as interrupted, _progress(done, self.steps, shown) as bar:
            for step, indices in enumerate(batches, start=done + 1):
                loss = self.step(indices, step)
                result.steps = step
                bar.set_postfix_str(f"loss {loss:.3f}, {result.tokens_per_second:.0f} tokens/s", refresh=False)
                bar.update()
                self.after(step)
                if result.stopped_early:
                    break
                if self.world.any(interrupted.is_set()) and step < self.steps:
                    self.save(step)
                    raise Interrupted(f"interrupted after step {step} of {self.steps}; resume=True goes on from there")
        return self.finish()

    def begin(self) -> int:
        """Steps that are done already: none, or with resume=True those of the newest snapshot."""
        if self.config.resume and snapshots.any_in(self.output_dir):
            state.restore(self, snapshots.newest(self.output_dir))
            return self.result.steps
        if self.config.resume:
            warnings.warn(f"nothing to resume in {self.output_dir}: this is the first step", stacklevel=5)
        if self.saves:
            self.world.first_does(lambda: state.begin_anew(self.output_dir))
        self.open_log()
        self.evaluate(step=0)
        return 0

    @functools.cached_property
    def circumstances(self) -> dict[str, Any]:
        return state.circumstances(self)

    def open_log(self, keep_bytes: int = 0) -> None:
        """Process 0's; the others write nothing."""

        def opened() -> None:
            self.log = Log(self.folder, keep_bytes)

        self.log = Log(None)
        self.world.first_does(opened)

    def after(self, step: int) -> None:
        """What is due after a step: evaluation, then a snapshot that knows of it."""
        every, last = self.config.eval_every, step == self.steps
        if last or (every and step % every == 0):
            self.evaluate(step)
        if self.saves and self.is_due(step, last or self.result.stopped_early):
            self.save(step)

    def is_due(self, step: int, last: bool) -> bool:
        """A snapshot: the last one also where an interruption took one, which would else be all that is known of this run."""
        if last and not self.config.save_every:
            return self.world.any(self.world.first and snapshots.any_in(self.output_dir))
        return self.config.save_every is not None and (last or step % self.config.save_every == 0)

    @property
    def saves(self) -> bool:
        return self.folder is not None

    @property
    def output_dir(self) -> Path:
        assert self.folder is not None
        return self.folder

    def save(self, step: int) -> None:
        if step == self.saved_step:  # Ctrl-C in a step that is saved anyway: writing it again would remove it first
            return
        snapshot = state.capture(self, step)
        self.world.first_does(lambda: snapshots.write(self.output_dir, snapshot, self.config.keep_snapshots))
        self.saved_step = step

    def finish(self) -> FitResult:
        result = self.result
        if self.best:
            with torch.no_grad():
                for name, values in self.best.items():
                    self.trained[name].copy_(joined_like(self.trained[name], values))
        result.peak_bytes = max(result.peak_bytes, *self.world.gather(peak_bytes(self.device)))
        if result.steps and result.skipped_steps == result.steps:
            warnings.warn(f"all {result.steps} steps were skipped by float16 overflow, so nothing was learned: train longer or in bf16-mixed",
                          stacklevel=4)  # fmt: skip
        return result

    def meet(self) -> None:
        """With several processes: all have the same settings, rows and weights, and call the model so that gradients are averaged."""
        if self.world.size == 1:
            return
        self.world.check_alike(state.given(self))
        if not is_sharded(self.model):
            agree_on_weights(self.model, self.world)
            self.call = data_parallel(self.model, self.world, self.probe)

    def probe(self) -> Any:
        """The loss of one row; no random number is used up."""
        with torch.random.fork_rng([self.device.index or 0] if self.device.type == "cuda" else []), self.precision.autocast(self.device):
            return getattr(self.model(**self.objective.collate(self.examples[:1], self.pad_id, self.device)), "loss", None)

    # One step -----------------------------------------------------------------------------------------------------------------

    def step(self, everyones: list[list[int]], step: int) -> float:
        """One optimizer step on the micro-batches of all processes; returns its mean loss over labelled tokens."""
        started = time.perf_counter()
        own = self.world.mine(everyones)
        micro_batches = [rows for rows, _ in own]
        batches = [self.objective.collate([self.examples[i] for i in rows], self.pad_id, self.device) for rows in micro_batches]
        labelled = [self.objective.count(batch) * counts for batch, (_, counts) in zip(batches, own, strict=True)]
        (total,) = self.world.sum(sum(labelled))
        rate = self.set_learning_rate(step)
        watch = WhichLayersRan(self.model) if step == 1 and not self.config.optimizer_in_backward else contextlib.nullcontext()
        loss = 0.0
        with watch:
            for batch, count in zip(batches, labelled, strict=True):
                with accumulating(self.call, last=batch is batches[-1]):
                    loss += self.backward(batch, count / total * self.world.size)  # gradients are averaged over processes, and so is the loss
        loss = self.world.sum(loss)[0] / self.world.size
        self.check_finite("loss", loss, step, micro_batches, batches)
        if isinstance(watch, WhichLayersRan):
            watch.check(list(self.trained.values()))
        norm, skipped = self.update(step, micro_batches, batches)
        self.world.share(state.statistics(self.model).values() if self.world.size > 1 else ())
        self.count(loss, [batch for batch, (_, counts) in zip(batches, own, strict=True) if counts], int(total), skipped)
        self.result.seconds += time.perf_counter() - started
        self.log.write(step=step, loss=loss, learning_rate=rate, grad_norm=norm, tokens=self.result.tokens,
                       skipped=skipped, seconds=round(self.result.seconds, 6), peak_bytes=peak_bytes(self.device))  # fmt: skip
        return loss

    def set_learning_rate(self, step: int) -> float:
        rate = self.config.learning_rate * learning_rate_share(step - 1, self.steps, self.config.warmup_steps, self.config.schedule)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["share"]
        return rate

    def backward(self, batch: Batch, share: float) -> float:
        """Add this micro-batch's part of the step's gradient; returns its part of the step's loss."""
        offload = offloaded_activations(self.model) if self.config.activation_offload else contextlib.nullcontext()
        with self.precision.autocast(self.device), offload:
            loss = getattr(self.call(**batch), "loss", None)
        if not isinstance(loss, Tensor):
            raise LoraLabError(f"a {type(self.model).__name__} returned no .loss for labels: fit needs a model with its head")
        loss = loss * share
        if not loss.requires_grad:
            raise LoraLabError(NOTHING_LEARNS)
        if self.in_backward is not None:  # the weights step in the next line
            self.check_finite("loss", float(loss.detach()), self.result.steps + 1, [[]], [batch])
            self.learning()
        self.scaler.scale(loss).backward()
        return float(loss.detach())

    def update(self, step: int, micro_batches: list[list[int]], batches: list[Batch]) -> tuple[float, bool]:
        """Clip and step; returns the gradient norm before clipping and whether an overflow skipped the step."""
        if self.in_backward is not None:  # every weight has stepped already
            return self.in_backward.norm(), False
        (optimizer,) = self.optimizers
        self.scaler.unscale_(optimizer)
        norm = float(gathered(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.max_grad_norm or math.inf)))
        self.check_finite("gradient's norm", norm, step, micro_batches, batches)
        scale = self.scaler.get_scale()
        self.learning()
        with self.rounding(step):
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm, self.scaler.get_scale() < scale

    def rounding(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Where every process takes the whole step, 16-bit weights are rounded by the same chance in all of them."""
        return same_random_numbers(ALONE if is_sharded(self.model) else self.world, self.config.seed + step, self.device)

    in_backward: StepsInBackward | None = None

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """With optimizer_in_backward, each weight steps as soon as its gradient is there."""
        if not self.config.optimizer_in_backward:
            yield
            return
        self.in_backward = StepsInBackward({optimizer.param_groups[0]["params"][0]: optimizer for optimizer in self.optimizers})
        try:
            yield
        finally:
            self.in_backward.remove()

    def count(self, loss: float, batches: list[Batch], labelled: int, skipped: bool) -> None:
        self.result.losses.append(loss)
        self.result.skipped_steps += skipped
        tokens, computed = self.world.sum(*(sum(map(of, batches)) for of in (self.objective.tokens, self.objective.positions)))
        self.result.tokens += int(tokens)
        self.result.computed_tokens += int(computed)
        self.result.label_tokens += labelled

    def check_finite(self, what: str, value: float, step: int, micro_batches: list[list[int]], batches: list[Batch]) -> None:
        """Stop at a loss or gradient that is not a number; under loss scaling an overflow is expected, until no scale is left."""
        if math.isfinite(value) or (self.precision.scaled and self.scaler.get_scale() >= 1.0):
            return
        with self.precision.autocast(self.device):
            places = [(rows, first_not_finite(self.model, batch)) for rows, batch in zip(micro_batches, batches, strict=True)]
        rows, place = next(((rows, place) for rows, place in places if place != "the loss"), places[0])
        if place == "the loss" and what != "loss":
            place = first_gradient_not_finite(self.model) or place
        rows, place = next((found for found in self.world.gather((rows, place)) if found[1] != "the loss"), (rows, place))
        raise Diverged(f"the {what} is {value} at step {step}: in rows {rows} the first tensor that is not finite is {place}. Lower learning_rate"
                       f" ({self.config.learning_rate}), warm up longer, or train in fp32; the weights are those before this step")  # fmt: skip

    # Evaluation ---------------------------------------------------------------------------------------------------------------

    def evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        loss = mean_loss(self.model, self.objective, self.held_out, self.config, self.pad_id, self.world)
        losses, patience = self.result.eval_losses, self.config.early_stopping
        if self.config.keep_best and loss < min(losses, default=math.inf):
            self.result.best_step = step
            self.best = {name: piece(parameter.detach()).to("cpu", copy=True) for name, parameter in self.trained.items()}
        losses.append(loss)
        self.result.stopped_early = patience is not None and len(losses) - 1 - losses.index(min(losses)) >= patience
        self.log.write(step=step, eval_loss=loss)


@torch.no_grad()
def mean_loss(model: nn.Module, objective: Objective, examples: Examples, config: TrainConfig, pad_id: int = 0, world: World = ALONE) -> float:
    """Mean loss over all examples, in the model's present precision: of a language model over labelled tokens, of a classifier over rows.

    world: the processes that share the work."""
    device = next(model.parameters()).device
    lengths = lengths_of(examples)
    total = tokens = 0.0
    with in_mode(model, training=False), PRECISIONS[config.precision].autocast(device):
        if isinstance(base_of(model), PretrainedModel):
            model.training = True  # the top module alone: dropout stays off, and only labelled positions get logits
        batches, shown = world.mine(length_buckets(lengths, config.micro_batch_size)), config.progress and world.first
        for indices, counts in watched(batches, "evaluate", shown):
            batch = objective.collate([examples[i] for i in indices], pad_id, device)
            loss, count = float(model(**batch).loss), objective.count(batch) * counts
            total, tokens = total + loss * count, tokens + count
    let_go(model)
    total, tokens = world.sum(total, tokens)
    return total / tokens


@contextlib.contextmanager
def interruptible(saves: bool) -> Iterator[threading.Event]:
    """Ctrl-C lets the step end first, where the run can be saved; a second one stops at once."""
    asked = threading.Event()
    if not saves or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handler(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _progress(done: int, steps: int, shown: bool) -> Any:
    return tqdm(total=steps, initial=done, desc="train", unit="step", disable=not shown)
