"""The singular values of every update in a model, and how two adapters of it overlap; the arithmetic is in singular_values.py.

    print(spectra(model).table())                       # intrinsic rank, norms and amplification, layer by layer
    print(overlaps(model, "french", "legal").table())   # do they use the same directions?
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import LoraLabError
from .layers import LoRA
from .merging import refuse_merged
from .parameters.layer import OnParameter, parameter_path
from .singular_values import (
    Amplification,
    IntrinsicRank,
    OverlapGrid,
    SingularValues,
    amplification,
    amplification_of,
    columns_of,
    delta_svd,
    intrinsic_rank,
    overlap_grid,
    subspace_overlap,
)
from .targets import lora_layers, one_adapter
from .wrapping import on_base

__all__ = [
    "Amplification", "IntrinsicRank", "LayerSpectrum", "OverlapGrid", "OverlapReport", "SingularValues", "SpectraReport", "amplification",
    "delta_svd", "intrinsic_rank", "overlap_grid", "overlaps", "plot_overlap", "plot_singular_values", "spectra", "subspace_overlap",
]  # fmt: skip



@dataclass(frozen=True)
class LayerSpectrum:
    """One adapted layer: the update's singular values from the largest, its intrinsic rank, and the update against the weight."""

    path: str
    rank: int
    values: tuple[float, ...]
    intrinsic: IntrinsicRank
    amplification: Amplification


@dataclass(frozen=True)
class SpectraReport:
    """Every layer that an adapter changes."""

    adapter: str
    layers: tuple[LayerSpectrum, ...]

    def table(self) -> str:
        """A line a layer: rank, effective rank, values for the energy, norms of update and weight, their ratio, amplification."""
        energy = f"{self.layers[0].intrinsic.energy:.0%}"
        rows = [["layer", "r", "effective", "stable", energy, "|dW|", "|W|", "|dW|/|W|", "amplified"]]
        for layer in self.layers:
            rank, size = layer.intrinsic, layer.amplification
            rows.append([layer.path, str(layer.rank), f"{rank.effective:.2f}", f"{rank.stable:.2f}", str(rank.for_energy), f"{size.delta_norm:.4g}",
                         f"{size.weight_norm:.4g}", f"{size.ratio:.2%}", f"{size.factor:.3g}"])  # fmt: skip
        return columns_of(rows)


@on_base
def spectra(model: nn.Module, adapter: str | None = None, *, energy: float = 0.9, own: bool = False) -> SpectraReport:
    """Singular values, intrinsic rank and amplification of every layer an adapter changes; of a stack of experts a line for each. Changes nothing.

    adapter: its name; None means the one active adapter.  energy: see `IntrinsicRank`.  own: see `amplification`.
    Of DoRA it is the part ``s B A`` that is looked at, without the magnitudes.
    Raises LoraLabError for an unknown adapter, a merged model, weights without values, and grouped convolutions (whose update is no matrix).
    """
    refuse_merged(model, "spectra")
    adapter = one_adapter(model, adapter)
    if not (layers := list(_layers_with(model, adapter))):
        raise LoraLabError(f"adapter {adapter!r} has no layer with an A and a B, whose product has singular values (token rows have none)")
    return SpectraReport(adapter, tuple(spectrum for path, layer in layers for spectrum in _layer_spectra(path, layer, adapter, energy, own)))


def _layer_spectra(path: str, layer: LoRA, adapter: str, energy: float, own: bool) -> Iterator[LayerSpectrum]:
    for name, A, B, weight in _matrices(path, layer, adapter):
        svd = delta_svd(A, B, layer.lora_scaling[adapter])
        size = amplification_of(svd, weight, own)
        yield LayerSpectrum(name, A.shape[0], tuple(svd.values.tolist()), intrinsic_rank(svd.values, energy), size)


@dataclass(frozen=True)
class OverlapReport:
    """phi(i, j) of two adapters, layer by layer, and what it would be for random directions."""

    first: str
    second: str
    side: str
    layers: tuple[tuple[str, OverlapGrid], ...]

    def mean(self, i: int, j: int) -> float:
        return sum(grid.at(i, j) for _, grid in self.layers) / len(self.layers)

    def table(self, i: int = 1, j: int = 1) -> str:
        """phi(i, j) of every layer, by default of the strongest directions, and phi of all directions."""
        rows = [["layer", f"phi({i}, {j})", "random", "phi(all)", "random"]]
        for path, grid in self.layers:
            full = (grid.values.shape[0], grid.values.shape[1])
            rows.append([path, *(text for at in ((i, j), full) for text in (f"{grid.at(*at):.3f}", f"{grid.random(*at):.3f}"))])
        return columns_of(rows)


@on_base
def overlaps(model: nn.Module, first: str, second: str, side: str = "A") -> OverlapReport:
    """How much two adapters of one model use the same directions, for every layer both change; their ranks may differ.

    side: "A", the directions of the input that are read (right singular vectors), or "B", those of the output that are written (left).
    Raises LoraLabError for an unknown adapter, no layer in common, and a B of zeros (nothing was learned yet).
    """
    if side not in ("A", "B"):
        raise LoraLabError(f"side={side!r}: expected 'A' (directions read) or 'B' (directions written)")
    first, second = one_adapter(model, first), one_adapter(model, second)
    both = [(path, layer) for path, layer in _layers_with(model, first) if second in layer.lora_A]
    if not both:
        raise LoraLabError(f"adapters {first!r} and {second!r} have no layer in common")
    return OverlapReport(first, second, side, tuple(grid for path, layer in both for grid in _overlaps(path, layer, first, second, side)))


def _overlaps(path: str, layer: LoRA, first: str, second: str, side: str) -> Iterator[tuple[str, OverlapGrid]]:
    for pairs in zip(*(_matrices(path, layer, adapter) for adapter in (first, second)), strict=True):
        try:
            yield pairs[0][0], overlap_grid(*(A if side == "A" else B.T for _, A, B, _ in pairs))
        except LoraLabError as error:
            raise LoraLabError(f"{pairs[0][0]!r}: {error}") from None


def _matrices(path: str, layer: LoRA, adapter: str) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, A, B and weight [out, in] of a layer; of a stack of matrices, of each: "experts.down_proj[3]"."""
    variant = layer.lora_variant[adapter]
    if not isinstance(variant, OnParameter):
        yield path, *_pair(path, layer, adapter), layer.lora_kind.matrix(layer)
        return
    matrices = list(variant.matrices(layer, adapter))
    for n, tensors in enumerate(matrices):
        yield parameter_path(path) + (f"[{n}]" if len(matrices) > 1 else ""), *tensors


def _pair(path: str, layer: LoRA, adapter: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the update, PiSSA's start included; of a convolution in is channels times kernel."""
    A, B = (tensor.flatten(1) for tensor in layer.lora_variant[adapter].pair_for_file(layer, adapter))
    if A.shape[0] != B.shape[1]:
        raise LoraLabError(f"{path!r} is a grouped convolution: its update is no matrix B @ A")
    return A, B


def _layers_with(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoRA]]:
    return ((path, layer) for path, layer in lora_layers(model).items() if adapter in layer.lora_A)


# Pictures -----------------------------------------------------------------------------------------------------------------------


def plot_singular_values(report: SpectraReport, paths: Iterable[str] | None = None, axes: Any = None) -> Any:
    """The singular values of each layer (or of `paths`) on a logarithmic scale. Needs matplotlib; returns the axes."""
    axes = axes or _new_axes()
    wanted = None if paths is None else set(paths)
    for layer in report.layers:
        if wanted is None or layer.path in wanted:
            axes.semilogy(range(1, len(layer.values) + 1), layer.values, marker=".", label=layer.path)
    axes.set(xlabel="number", ylabel="singular value of the update", title=f"adapter {report.adapter!r}")
    if len(axes.lines) <= 12:
        axes.legend(fontsize="small")
    return axes


def plot_overlap(grid: OverlapGrid, axes: Any = None) -> Any:
    """phi for every i (down) and j (across), as in the LoRA paper's figure 3. Needs matplotlib; returns the axes."""
    axes = axes or _new_axes()
    rows, columns = grid.values.shape
    image = axes.imshow(grid.values.numpy(), vmin=0.0, vmax=1.0, origin="upper", aspect="auto", extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
    axes.set(xlabel="j", ylabel="i", title="subspace overlap phi(i, j)")
    axes.figure.colorbar(image, ax=axes)
    return axes


def _new_axes() -> Any:
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise LoraLabError("plots need matplotlib: pip install matplotlib (the numbers and table() do not)") from None
    return pyplot.subplots()[1]
