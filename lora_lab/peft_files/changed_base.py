"""Adapters that PEFT trained on a base it had changed: PiSSA and OLoRA begin with a part of W, ``s B0 A0``, and freeze what is left of it.

PEFT finds B0 A0 again at every load and takes it out of W. Here W stays as it is, and the file becomes a plain adapter of rank 2r:

    (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

    pissa   B0 A0 from the r largest singular values of W (Meng et al. 2024, arXiv:2404.02948, equations 2 to 4)
    olora   B0 = Q[:, :r], A0 = R[:r] of W = Q R (Büyükakyüz 2024, arXiv:2406.01775, section 3)

Where W is the embedding's, too (tie_word_embeddings), PEFT changes that with it. There the adapter stays [B, A], and what is left of W is in the
place of both while it is active, as a value of the adapter's own.

PEFT writes what is left of an adapted head into the file (save_embedding_layers); it says whether this is the base that was trained on.

Signs, and the order of equal singular values among the first r, cancel in the product. What W does not determine, nobody can find again, and
is refused: equal singular values on both sides of the cut, dependent columns, the randomised SVD of "pissa_niter_...".
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base_parameters import base_in_place, names_of_each
from ..errors import LoraLabError
from ..kinds import dense, is_conv1d, is_linear
from ..plans import AdapterConfig, PlannedLayer
from ..targets import is_attention_output
from .config import compact
from .contents import Contents, Named

FOUND_AGAIN = ("pissa", "olora")
# float32 finds singular values to about 1e-6 of the largest; a gap ten times as wide fixes what is on either side to a few per cent of it
NARROWEST_GAP = 1e-5
FARTHEST = 1e-3  # of a weight's norm, between two computations of the same; bases that were trained apart are farther

Start = tuple[Tensor, Tensor]  # B0, A0


def on_the_base_itself(model: nn.Module, init: str, contents: Contents, folder: Path) -> Contents:
    """The same adapter as one on the unchanged base, rank 2r and the same scaling. init: one of FOUND_AGAIN. Changes nothing.

    Raises LoraLabError for a layer whose start cannot be found again: quantised, not linear, or with a weight that does not determine it; and
    where the file has what was left of another base.
    """
    if stacked := [p.path for p in contents.planned if p.stack]:
        raise LoraLabError(f"{folder}: init_lora_weights={init!r} at {stacked[0]!r}, a parameter that is no layer: only linear layers' starts are "
                           "found again; convert the adapter with PEFT")  # fmt: skip
    layers, own, ranks = dict(contents.layers), contents.own, {p.path: p.rank for p in contents.planned}
    every, seen = names_of_each(model), set[int]()
    with base_in_place(model):
        for p in contents.planned:
            module: Any = model.get_submodule(p.path)
            if isinstance(module, nn.Embedding):  # PEFT gives it an ordinary start
                continue
            where = f"{folder}: init_lora_weights={init!r} at {p.path!r}"
            start, left = _start_and_rest(module, init, p, where)
            names = every.get(id(module.weight), [f"{p.path}.weight"])
            name = next((name for name in names if name in own.values), names[0])
            _check_left(own.values.get(name, dense(module) if name in own.unchanged else left), left, dense(module), where)
            if len(names) == 1:
                layers[p.path], ranks[p.path], own = _plain_pair(layers[p.path], start), 2 * p.rank, own.without(name)
            else:
                _check_once(id(module.weight), seen, where)
                own = own.with_still(name, own.values.get(name, left))
    return contents.changed(*_with_ranks(contents, ranks), layers, own)


def _with_ranks(contents: Contents, ranks: dict[str, int]) -> tuple[AdapterConfig, tuple[PlannedLayer, ...]]:
    config, planned = contents.config, contents.planned
    alphas = {p.path: config.alpha_for(p.scaling, ranks[p.path], p.alpha) for p in planned}
    rank, rank_pattern = compact(ranks, config.rank, {})
    alpha, alpha_pattern = compact(alphas, config.alpha, {})
    config = replace(config, rank=rank, rank_pattern=rank_pattern, alpha=alpha, alpha_pattern=alpha_pattern)
    return config, tuple(replace(p, rank=ranks[p.path], alpha=alphas[p.path]) for p in planned)


def _plain_pair(named: Named, start: Start) -> Named:
    """[A; A0] and [B, -B0]."""
    (start_B, start_A), A, B = start, named["lora_A.weight"], named["lora_B.weight"]
    wide = torch.promote_types(A.dtype, torch.float32)
    both_A = torch.cat((A.to(wide), start_A.to(A.device, wide)))
    both_B = torch.cat((B.to(wide), -start_B.to(B.device, wide)), dim=1)
    return {**named, "lora_A.weight": both_A, "lora_B.weight": both_B}


def _start_and_rest(module: Any, init: str, planned: PlannedLayer, where: str) -> tuple[Start, Tensor]:
    """(B0 and A0, W - s B0 A0 as PEFT rounds and stores it)."""
    _check_layer(module, where)
    B, A = START[init](module, planned.rank, planned.scaling, where)
    delta = planned.scaling * B @ A
    return (B, A), (_as_peft_has_it(module) - (delta.T if is_conv1d(module) else delta)).to(module.weight.dtype)


def _check_left(in_file: Tensor, left: Tensor, weight: Tensor, where: str) -> None:
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (in_file, weight))
    apart = float((in_file.to(left.device).float() - left.float()).norm() / weight.float().norm())
    if apart > max(FARTHEST, rounding):
        raise LoraLabError(f"{where}: the file has what PEFT left of the weight it trained on, and this model's weight would leave something else "
                           f"({apart:.1%} of its norm apart): it was trained on another base")  # fmt: skip


def _check_once(weight: int, seen: set[int], where: str) -> None:
    if weight in seen:
        raise LoraLabError(f"{where}: it shares its weight with another adapted layer, and PEFT takes two starts out of it, one after the other; "
                           "convert the adapter with PEFT")  # fmt: skip
    seen.add(weight)


def _check_layer(module: Any, where: str) -> None:
    if not is_linear(module) or is_attention_output(module):
        raise LoraLabError(f"{where}, a {type(module).__name__}: PEFT takes this start out of linear layers only; the base it trained on is unknown")
    if hasattr(module, "quantization") or not module.weight.is_floating_point():
        raise LoraLabError(f"{where}: PEFT quantises again what is left of the base, and what that gave is not in the file; load the adapter on the "
                           "16-bit base, save it, and load that here")  # fmt: skip


# The two starts -----------------------------------------------------------------------------------------------------------------


def _pissa(module: Any, rank: int, scaling: float, where: str) -> Start:
    """(B0 [out, r], A0 [r, in]) in float32, as PEFT computes them: the singular values over the scaling, half in each."""
    if scaling <= 0:
        raise LoraLabError(f"{where}: the scaling is {scaling}, by whose root the start is divided: expected a number above 0")
    weight = _as_peft_has_it(module)
    left, values, right = torch.linalg.svd(weight.T if is_conv1d(module) else weight, full_matrices=False)
    gap = NARROWEST_GAP * float(values[0])
    if rank < len(values) and float(values[rank - 1]) > gap >= float(values[rank - 1] - values[rank]):
        raise LoraLabError(f"{where}: singular values {rank} and {rank + 1} of the weight are equal ({values[rank - 1]:.6g}, {values[rank]:.6g}), so "
                           "that the weight does not determine which part was trained; convert the adapter with PEFT")  # fmt: skip
    root = (values[:rank] / scaling).sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _olora(module: Any, rank: int, scaling: float, where: str) -> Start:
    """(B0 [out, r], A0 [r, in]) in float32; of a Conv1D PEFT factors the weight as it is stored, [in, out]."""
    Q, R = torch.linalg.qr(_as_peft_has_it(module))
    diagonal = R.diagonal().abs()
    if rank < len(diagonal) and float(diagonal[:rank].min()) <= NARROWEST_GAP * float(diagonal.max()):
        raise LoraLabError(f"{where}: the first {rank} columns of the weight depend on each other, so that the weight does not determine which part "
                           "was trained; convert the adapter with PEFT")  # fmt: skip
    return (R[:rank].T, Q[:, :rank].T) if is_conv1d(module) else (Q[:, :rank], R[:rank])


def _as_peft_has_it(module: Any) -> Tensor:
    return dense(module).to(torch.float32)


START = {"pissa": _pissa, "olora": _olora}
