"""A run as a snapshot and back, so exactly that the run goes on bit for bit; and what must not differ for that."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base_parameters import tensor_of
from ..errors import LoraLabError
from ..files import in_use
from ..layers import LoRA
from ..targets import lora_layers
from . import snapshots
from .distributed import World
from .dtensors import divided_like, for_file, joined_like, piece, some_numbers
from .result import FitResult
from .sharding import is_sharded
from .snapshots import Snapshot, optimizer_states, optimizer_tensors

if TYPE_CHECKING:
    from .loop import Run

# Settings that do not change what is computed.
FREE = {"resume", "progress", "output_dir", "save_every", "keep_snapshots", "eval_every", "distributed"}


def capture(run: Run, step: int) -> Snapshot:
    """All that the rest of the run depends on: in process 0, every tensor whole, for all processes."""
    optimizer, numbers = optimizer_tensors(_states(run))
    tensors: dict[str, Tensor] = {f"weights/{name}": parameter for name, parameter in run.trained.items()}
    tensors |= {f"best/{name}": joined_like(run.trained[name], values) for name, values in run.best.items()}
    tensors |= {f"buffers/{name}": buffer for name, buffer in statistics(run.model).items()}
    tensors |= {f"began/{name}": tensor for name, tensor in beginnings(run.model).items()}
    tensors = {name: for_file(tensor, run.world.first) for name, tensor in {**tensors, **optimizer}.items()}
    for rank, states in enumerate(run.world.gather(_random_states(run.device))):
        tensors |= {f"random/{rank}/{name}": values for name, values in states.items()}
    state = {"step": step, "steps": run.steps, "finished": step == run.steps or run.result.stopped_early, "result": dataclasses.asdict(run.result),
             "scaler": run.scaler.state_dict(), "log_bytes": run.log.size(), "optimizer": numbers, **run.circumstances}  # fmt: skip
    return Snapshot(tensors, state)


@torch.no_grad()
def restore(run: Run, snapshot: Snapshot) -> None:
    """Put a run where a snapshot was taken. Raises LoraLabError, nothing changed, where it was another run."""
    try:
        _check(run, snapshot)
        _check_whole(run, snapshot)
    except LoraLabError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LoraLabError(f"the snapshot of step {snapshot.state.get('step')!r:.20} was changed since it was written ({error!r:.80}): "
                           "delete it, and the one before is used") from None  # fmt: skip
    run.learning()
    for name, parameter in run.trained.items():
        parameter.copy_(divided_like(parameter, snapshot.tensors[f"weights/{name}"]))
    best = {name: snapshot.tensors.get(f"best/{name}") for name in run.trained}
    run.best = {name: piece(divided_like(run.trained[name], values)).cpu() for name, values in best.items() if values is not None}
    for name, buffer in statistics(run.model).items():
        buffer.copy_(snapshot.tensors[f"buffers/{name}"])
    for name, tensor in beginnings(run.model).items():
        tensor.copy_(divided_like(tensor, snapshot.tensors[f"began/{name}"]))
    _put_states(run, optimizer_states(snapshot))
    if run.precision.scaled:
        run.scaler.load_state_dict(snapshot.state["scaler"])
    run.result = FitResult(**snapshot.state["result"])
    run.open_log(keep_bytes=snapshot.state["log_bytes"])
    if snapshot.state["processes"] == run.world.size:
        own = f"random/{run.world.rank}/"
        _set_random_states({name.removeprefix(own): values for name, values in snapshot.tensors.items() if name.startswith(own)})
    else:
        torch.manual_seed(run.world.seed(run.config.seed) + snapshot.step)


@contextlib.contextmanager
def only_run_in(output_dir: str | Path | None, everyone: World) -> Iterator[None]:
    """Two runs at a time in one folder would write into each other's log and snapshots. Raises LoraLabError in the second, in all its processes."""
    with contextlib.ExitStack() as until_the_end:
        if output_dir is not None:
            everyone.first_does(lambda: until_the_end.enter_context(in_use(Path(output_dir), "trains")))
        yield


def begin_anew(output_dir: Path) -> None:
    """Remove the snapshots of a run that is over. Raises LoraLabError where it is not."""
    refuse_unfinished(output_dir)
    snapshots.remove_all(output_dir)


def refuse_unfinished(output_dir: Path) -> None:
    """A new run does not throw away one that could go on."""
    try:
        state = snapshots.newest_state(output_dir)
    except snapshots.Damaged:
        return
    if not state.get("finished"):
        raise LoraLabError(f"{output_dir} holds a run that was stopped after step {state.get('step')} of {state.get('steps')}: resume=True goes on "
                           f"with it; to start anew choose another output_dir, or delete {output_dir / snapshots.FOLDER}")  # fmt: skip


# Parts of the state -------------------------------------------------------------------------------------------------------------


def _states(run: Run) -> dict[str, dict[str, Any]]:
    """The optimizer's state of each weight, by its name."""
    states = {id(p): state for optimizer in run.optimizers for p, state in optimizer.state.items()}
    return {name: states[id(p)] for name, p in run.trained.items() if id(p) in states}


def _put_states(run: Run, states: dict[str, dict[str, Any]]) -> None:
    owner = {id(p): optimizer for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, state in states.items():
        parameter = run.trained[name]
        optimizer = owner[id(parameter)]
        optimizer.state[parameter] = {key: _like_new(value, parameter, optimizer) for key, value in state.items()}


def _like_new(value: Any, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """A part of a state where the optimizer keeps it: as its weight is, but a count on the CPU unless one kernel does the whole step."""
    if isinstance(value, Tensor) and value.ndim:
        return divided_like(parameter, value)
    return value.to(parameter.device) if isinstance(value, Tensor) and optimizer.defaults.get("fused") else value


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training changes: running means and variances."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
    return {f"{path}.{name}": buffer for path, norm in norms.items() for name, buffer in norm.named_buffers()}


def beginnings(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that belong to what trains and stay as they began: LoRA-FA's A, PiSSA's start, what a soft prompt was at first. They are drawn or
    computed anew with the model, so a run brings its own."""
    names = [f"{path}.{name}".strip(".") for path, module in model.named_modules() for name in getattr(module, "began_with", ())]
    names += [f"{path}.{name}".strip(".") for path, layer in lora_layers(model).items() for name in _still(layer)]
    return {name: tensor_of(model, name) for name in names}


def _still(layer: LoRA) -> list[str]:
    """What does not train, of a layer's adapters of which something does."""
    own = {adapter: layer.lora_parameters(adapter) for adapter in layer.lora_variant}
    training = {adapter: parts for adapter, parts in own.items() if any(part.requires_grad for part in parts.values())}
    return [f"{name}.{adapter}" for adapter, parts in training.items() for name, part in parts.items() if not part.requires_grad]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"device": torch.get_device_module(device).get_rng_state(device)} if device.type != "cpu" else {})


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "device" in states:
        torch.get_device_module().set_rng_state(states["device"])


def _check_whole(run: Run, snapshot: Snapshot) -> None:
    """Raise an error where a part is missing that `restore` takes, or is of another kind."""
    tensors, state = snapshot.tensors, snapshot.state
    shapes = {f"weights/{name}": p.shape for name, p in run.trained.items()}
    shapes |= {f"buffers/{name}": buffer.shape for name, buffer in statistics(run.model).items()}
    shapes |= {f"began/{name}": tensor.shape for name, tensor in beginnings(run.model).items()}
    shapes |= {name: run.trained[name.removeprefix("best/")].shape for name in tensors if name.startswith("best/")}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, expected {list(shape)}")
    for weight, values in optimizer_states(snapshot).items():
        if weight not in run.trained or not all(value is None or isinstance(value, (Tensor, int, float)) for value in values.values()):
            raise ValueError(f"the optimizer's state of {weight}")
    if state["processes"] == run.world.size:
        now, then = torch.get_rng_state(), tensors[f"random/{run.world.rank}/cpu"]
        if (then.dtype, then.shape) != (now.dtype, now.shape):
            raise ValueError("the random numbers' state")
    result, numbers = FitResult(**state["result"]), [state["step"], state["log_bytes"]]
    counts = [value for name, value in vars(result).items() if not isinstance(value, list) and name != "best_step"]
    lists = [*result.losses, *result.eval_losses]
    if not all(isinstance(value, (int, float)) and value >= 0 for value in counts) or not all(isinstance(value, (int, float)) for value in lists):
        raise ValueError("the numbers of the run")
    if not all(type(number) is int and number >= 0 for number in numbers) or not result.steps == state["step"] <= run.steps:
        raise ValueError("step or log_bytes")


# Circumstances ------------------------------------------------------------------------------------------------------------------


def circumstances(run: Run) -> dict[str, Any]:
    """What the run was started with: the first three have to be the same for it to go on, the last three to go on bit for bit."""
    settings = {name: value for name, value in dataclasses.asdict(run.config).items() if name not in FREE}
    settings["grad_accum_steps * processes"] = settings.pop("grad_accum_steps") * run.world.size  # half as many processes may do twice as much each
    frozen = _frozen(run, beginnings(run.model))
    return {"settings": settings, "data": fingerprint(run.examples), "eval_data": fingerprint(run.held_out), "frozen": frozen,
            "adapters": _adapters(run.model), "weights": {name: list(p.shape) for name, p in run.trained.items()},
            "processes": run.world.size, "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


def _frozen(run: Run, beginnings: Iterable[str]) -> str | None:
    """SHA-256 over some numbers of every tensor that does not train; None where processes hold pieces of them."""
    if is_sharded(run.model):
        return None
    digest, changing = hashlib.sha256(), {*run.trained, *statistics(run.model), *beginnings}
    for name, tensor in (*run.model.named_parameters(), *run.model.named_buffers()):
        if name not in changing:
            digest.update(f"{name} {some_numbers(tensor)}".encode())
    return digest.hexdigest()


def _adapters(model: nn.Module) -> dict[str, list[str]]:
    """What each adapted layer does with its tensors: scaling, dropout, variant."""
    return {path: [f"{name}: {layer.lora_scaling.get(name)}, {layer.lora_dropout.get(name)}, {type(layer.lora_variant[name]).__name__}"
                   for name in layer.lora_active] for path, layer in lora_layers(model).items()}  # fmt: skip


def given(run: Run) -> dict[str, Any]:
    """What every process of a run has to be given alike."""
    settings = {f"the setting {name}": str(value) for name, value in dataclasses.asdict(run.config).items() if name != "progress"}
    return {**settings, "the SHA-256 of the rows": fingerprint(run.examples), "the SHA-256 of eval_data": fingerprint(run.held_out)}


def fingerprint(examples: Iterable[Any]) -> str:
    """SHA-256 of the encoded rows."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True).encode())
    return digest.hexdigest()


def _first_difference(now: Any, then: Any) -> str:
    """Of two dicts the first entry that differs, in words."""
    if not isinstance(now, dict) or not isinstance(then, dict):
        return ""
    name = next(name for name in (*now, *then) if now.get(name) != then.get(name))
    return f": {name!r} is {now.get(name)}, it was {then.get(name)}"


def _check(run: Run, snapshot: Snapshot) -> None:
    now, then = run.circumstances, snapshot.state
    for name, value in now["settings"].items():
        if name in then["settings"] and then["settings"][name] != value:
            began = then["settings"][name]
            raise LoraLabError(f"resume=True with {name}={value!r}: the run began with {began!r}; give the same, or start anew in another output_dir")
    if now["data"] != then["data"]:
        raise LoraLabError(f"resume=True with other data: these {len(run.examples)} rows are not those the run began with")
    for name, what in (("eval_data", "other eval_data"), ("frozen", "another base: its frozen weights differ"), ("adapters", "other adapters")):
        if now[name] != then.get(name) and None not in (now[name], then.get(name)):
            raise LoraLabError(f"resume=True with {what} than the run began with{_first_difference(now[name], then[name])}")
    if now["weights"] != then["weights"]:
        odd = sorted({*map(str, now["weights"].items())} ^ {*map(str, then["weights"].items())})[0]
        raise LoraLabError(f"resume=True with another model, or other weights that train: {odd} is on one side only")
    for name in ("processes", "threads", "torch"):
        if now[name] != then[name]:
            warnings.warn(f"the run began with {name} {then[name]}, this is {now[name]}: it goes on, but not bit for bit", stacklevel=5)
