"""What an adapter folder says of one model: the result of reading it, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..plans import AdapterConfig, Plan, PlannedLayer
from ..token_rows.targets import PlannedRows
from .base_parameters import OwnTensors

Named = dict[str, Tensor]  # name in a file -> tensor
Layers = dict[str, Named]  # path -> the tensors of the layer


@dataclass(frozen=True)
class Contents:
    """planned, layers: the adapted layers and their tensors.  own: values for tensors of the model itself.  tokens, rows: token rows, by path.

    dtype: of the file.  base_sha256: of the base it was trained on, where that is known.
    """

    config: AdapterConfig
    planned: tuple[PlannedLayer, ...]
    layers: Layers
    own: OwnTensors
    tokens: tuple[PlannedRows, ...]
    rows: Named
    dtype: torch.dtype
    base_sha256: str | None = None

    def changed(self, config: AdapterConfig, planned: tuple[PlannedLayer, ...], layers: Layers, own: OwnTensors) -> Contents:
        return replace(self, config=config, planned=planned, layers=layers, own=own)

    @property
    def plan(self) -> Plan:
        return Plan(self.config, self.planned, tuple(self.own.values), tokens=self.tokens)
