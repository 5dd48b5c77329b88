"""Models too large for one device: FSDP2 divides each weight, its gradient and its optimizer states among the processes.

    model = lora_lab.inject(model)                                  # first: adapters are divided as well
    model = lora_lab.training.shard(model, "bf16-mixed", device="cuda")
    lora_lab.training.fit(model, rows, {"precision": "bf16-mixed"})
    lora_lab.save(model, "adapter")                                 # in every process; the file is a whole adapter

Before a block runs, forward and again backward, its weights are gathered, and let go afterwards; gradients are summed and divided at once.
The dtypes may differ from weight to weight: a 16-bit base and float32 adapters, frozen and trained, go together.

A divided model stays divided, in the dtypes of the run. Putting it together again would need in each process the memory it was divided to save.
Source: Zhao et al. 2023 (arXiv:2304.11277); torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import LoraLabError, did_you_mean
from ..merging import refuse_merged
from ..models.recompute import Recomputable
from ..quantization import quantized_layers
from ..wrapping import refuse_sharded, refuse_wrapped
from .distributed import START, agree_on_weights, own_device, world
from .precision import PRECISIONS, Precision, dtypes_under, store_in

Model = TypeVar("Model", bound=nn.Module)


def shard(model: Model, precision: str = "fp32", *, device: Any = None) -> Model:
    """Divide a model's weights among the processes of torchrun, in place, block by block; returns the same model. All processes have to call it.

    precision: of the run it is for; the weights get its dtypes, for good.  device: where the pieces go ("cuda": each process's own GPU); None is
        where the model is. Load and inject on the CPU and no GPU ever holds more than its pieces and one block.
    Blocks are those that gradient checkpointing knows, or a transformers model's `_no_split_modules`. What trains becomes process 0's.
    Raises LoraLabError, the model untouched, where this process is alone, the model is divided already, merged or wrapped, the processes hold
    different weights, or weights of two dtypes would train.
    """
    if precision not in PRECISIONS:
        raise LoraLabError(f"precision={precision!r}: expected one of {', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}")
    refuse_merged(model, "shard")
    refuse_wrapped(model, "shard")
    refuse_sharded(model, "shard")
    place = torch.device(own_device(None if device is None else str(device)) or next(model.parameters()).device)
    everyone = world(place)
    if everyone.size == 1:
        raise LoraLabError(f"shard: this process is alone, and there is nobody to divide a model with: {START}")
    _check_dtypes(model, PRECISIONS[precision])
    _warn_of_codes(model)
    agree_on_weights(model, everyone)
    _divide(model, PRECISIONS[precision], place, everyone.size)
    return model


def _divide(model: nn.Module, precision: Precision, device: torch.device, processes: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for block in [*_blocks(model), model]:
        store_in(precision, block)
        fully_shard(block, mesh=mesh)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time; those inside others first, as fully_shard wants them.

    An embedding inside a block is one of its own: T5's table of distances lies in the first block, and is read before that runs.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if isinstance(module, Recomputable) or type(module).__name__ in names]
    tables = [module for block in blocks for module in block.modules() if isinstance(module, nn.Embedding)]
    return [module for module in [*dict.fromkeys(tables), *reversed(blocks)] if module is not model]


def _check_dtypes(model: nn.Module, precision: Precision) -> None:
    targets = dtypes_under(precision, model)
    trained = {targets.get(id(p), p.dtype): name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in trained.items())
        raise LoraLabError(f"shard: what trains would be {found}, but FSDP2 sums gradients of one dtype: use a mixed precision, where all is float32")


def _warn_of_codes(model: nn.Module) -> None:
    if layers := quantized_layers(model):
        warnings.warn(f"shard: the codes of {len(layers)} quantised layers are not divided, each process holds all of them: distributed='ddp' "
                      "does the same with less traffic", stacklevel=3)  # fmt: skip


# What is divided, and its pieces ------------------------------------------------------------------------------------------------


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard divided this module's weights; known by name, as importing it costs more than this whole package."""
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in type(module).__mro__)


def sharded_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if is_sharded(module))


def let_go(model: nn.Module) -> None:
    """Free what was gathered: after a forward pass without backward the outermost weights are there whole, and would go stale."""
    for module in sharded_modules(model):
        module.reshard()
