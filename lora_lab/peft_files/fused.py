"""Adapters for parts of fused layers in PEFT's files, where they are plain ones: A stacked, B zero outside each part's block.

Read back as plain adapters they would begin to train those zeros. So the metadata of the tensors say, for each layer, which parts they are of:

    lora_lab_fused   {path: {"rank": r, "scaling": s, "blocks": n, "block_rows": rows, "parts": [["q", [[0, 64]]], ["v", [[128, 192]]]]}}

A file without that, PEFT's own, is a plain adapter.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LoraLabError
from ..files import json_object
from ..fused.parts import Layout, parts_in
from ..layers import LoRA
from ..plans import AdapterConfig, Plan, PlannedLayer

FUSED = "lora_lab_fused"
Named = dict[str, Tensor]  # name in a file -> tensor


def parts_for_file(layers: dict[str, LoRA], adapter: str) -> dict[str, str]:
    """The metadata of an adapter: empty where it has no parts."""
    described = {path: _described(layer, adapter, layout) for path, layer in layers.items() if (layout := parts_in(layer, adapter)) is not None}
    return {FUSED: json.dumps(described)} if described else {}


def _described(layer: LoRA, adapter: str, layout: Layout) -> dict[str, Any]:
    return {"rank": layer.lora_B[adapter].shape[1], "scaling": layer.lora_scaling[adapter], "blocks": layout.blocks,
            "block_rows": layout.block_rows, "parts": layout.parts}  # fmt: skip


def parts_from_file(plan: Plan, tensors: dict[str, Named], metadata: dict[str, str], folder: Path) -> tuple[Plan, dict[str, Named]]:
    """Plan and tensors of an adapter that was saved with parts, with the parts; others as they are.

    Raises LoraLabError for parts that do not fit their layer, and for a B that is not zero outside them.
    """
    if FUSED not in metadata:
        return plan, tensors
    described = json_object(metadata[FUSED], folder)
    planned = tuple(_with_parts(layer, plan.config, described.pop(layer.path, None), folder) for layer in plan.layers)
    if described:
        raise LoraLabError(f"{folder}: its metadata describe parts of {next(iter(described))!r}, of which it has no tensors")
    own = {layer.path: _own(layer, tensors[layer.path], folder) if layer.parts else tensors[layer.path] for layer in planned}
    return replace(plan, layers=planned), own


def _with_parts(planned: PlannedLayer, config: AdapterConfig, described: Any, folder: Path) -> PlannedLayer:
    if described is None:
        return planned
    try:
        rank, scaling, layout = int(described["rank"]), float(described["scaling"]), _layout(described)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise LoraLabError(f"{folder}: its metadata describe the parts of {planned.path!r} as {described!r}, which is damaged") from None
    fits = layout.out == planned.fan_out and math.isclose(scaling, planned.scaling, rel_tol=1e-9)
    if not fits or not 1 <= rank <= planned.rank // len(layout.parts):
        raise LoraLabError(f"{folder}: its metadata describe {', '.join(layout.names)} of {layout.out} outputs with rank {rank} and scaling "
                           f"{scaling:g}, but {planned.path!r} has {planned.fan_out}, {planned.rank} and {planned.scaling:g}")  # fmt: skip
    more = sum(layout.sizes) if planned.more else 0
    alpha = config.alpha_for(scaling, rank, planned.alpha)
    return replace(planned, rank=rank, alpha=alpha, scaling=scaling, more=more, parts=layout)


def _layout(described: dict[str, Any]) -> Layout:
    """Raises ValueError where runs overlap or lie outside."""
    blocks, rows = int(described["blocks"]), int(described["block_rows"])
    parts = tuple((str(name), tuple((int(start), int(stop)) for start, stop in runs)) for name, runs in described["parts"])
    runs = sorted(run for _, runs in parts for run in runs)
    edges = [edge for run in runs for edge in run]
    if blocks < 1 or not all(runs for _, runs in parts) or not all(start < stop for start, stop in runs):
        raise ValueError
    if not edges or edges != sorted(edges) or edges[0] < 0 or edges[-1] > rows:
        raise ValueError
    return Layout(blocks, rows, parts)


def _own(planned: PlannedLayer, named: Named, folder: Path) -> Named:
    """The tensors of the parts: B without its zeros (a rank may have been filled up with more of them), the magnitude of the parts' outputs."""
    layout, rank, own = planned.parts, planned.pairs * planned.rank, dict(named)
    assert layout is not None
    B = named["lora_B.weight"]
    try:
        if B[:, rank:].any():
            raise LoraLabError(f"B {list(B.shape)} is not zero from column {rank} on")
        own["lora_A.weight"], own["lora_B.weight"] = named["lora_A.weight"][:rank], layout.take(B[:, :rank])
    except LoraLabError as error:
        raise LoraLabError(f"{folder}: {planned.path!r} was saved for parts, but {error}: the tensors were changed since") from None
    if "lora_magnitude_vector" in named:
        own["lora_magnitude_vector"] = layout.own(named["lora_magnitude_vector"])
    return own
