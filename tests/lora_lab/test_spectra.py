"""The measurements of the LoRA paper's section 7, in float64 against the same on the dense matrix."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import transformers
from small_models import build
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, singular_values, spectra
from lora_lab.spectra import amplification, delta_svd, intrinsic_rank, overlap_grid, overlaps, subspace_overlap

SHAPES = {"wide": (3, 7, 5), "tall": (3, 5, 9), "rank above both": (6, 4, 3), "rank 1": (1, 5, 4), "square": (4, 4, 4)}


def pair(rank, fan_in, fan_out, dtype=torch.float64):
    return torch.randn(rank, fan_in, dtype=dtype), torch.randn(fan_out, rank, dtype=dtype)


def dense_directions(matrix, k):
    return torch.linalg.svd(matrix).Vh[:k].T


def dense_phi(first, second, i, j):
    """Equation 4 as printed."""
    return float((dense_directions(first, i).T @ dense_directions(second, j)).norm() ** 2 / min(i, j))


# Singular values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "fan_in", "fan_out"), SHAPES.values(), ids=SHAPES)
def test_the_svd_of_the_factors_is_that_of_the_dense_update(rank, fan_in, fan_out):
    A, B = pair(rank, fan_in, fan_out)
    dense, svd = 1.7 * B @ A, delta_svd(A, B, 1.7)
    count = min(rank, fan_in, fan_out)
    assert svd.U.shape == (fan_out, count) and svd.V.shape == (fan_in, count) and svd.values.shape == (count,)
    assert_close(svd.values, torch.linalg.svdvals(dense)[:count], rtol=0, atol=1e-12)
    assert_close(svd.U @ torch.diag(svd.values) @ svd.V.T, dense, rtol=0, atol=1e-12)
    for basis in (svd.U, svd.V):
        assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_negative_scaling_turns_a_direction_round_and_no_value_negative():
    A, B = pair(2, 5, 4)
    svd = delta_svd(A, B, -3.0)
    assert (svd.values > 0).all()
    assert_close(svd.U @ torch.diag(svd.values) @ svd.V.T, -3.0 * B @ A, rtol=0, atol=1e-12)


def test_16_bit_factors_are_measured_in_float64():
    A, B = (tensor.bfloat16() for tensor in pair(3, 20, 30))
    exact = torch.linalg.svdvals(B.double() @ A.double())[:3]
    assert_close(delta_svd(A, B).values, exact, rtol=0, atol=1e-12)


def test_a_dense_update_is_never_formed():
    """A layer of 100,000 by 100,000 would be 80 GB; the factors are 0.8 MB."""
    A, B = torch.randn(1, 100_000), torch.randn(100_000, 1)
    assert_close(delta_svd(A, B).values, (A.double().norm() * B.double().norm())[None])


def test_what_makes_no_sense_is_refused():
    A, B = pair(2, 5, 4)
    calls = [
        (lambda: delta_svd(A, B[:, :1]), "one r"),
        (lambda: delta_svd(A[0], B), r"\[5\]"),
        (lambda: delta_svd(A * torch.nan, B), "NaN"),
        (lambda: delta_svd(A.to("meta"), B), "meta"),
        (lambda: intrinsic_rank(torch.ones(2), energy=0.0), "energy=0.0"),
        (lambda: intrinsic_rank(torch.ones(2), energy=90), "energy=90"),
        (lambda: amplification(A, B, 1.0, torch.ones(5, 4)), "out, in"),
        (lambda: overlap_grid(A, B), r"\[4, 2\]"),
        (lambda: overlap_grid(A, 0 * A), "second is zero.*trained"),
        (lambda: subspace_overlap(A, A, 3, 1), "i=3"),
        (lambda: subspace_overlap(A, A, 1, -1), "j=-1"),
        (lambda: subspace_overlap(A, A, 0, 1), "i=0"),
    ]
    for call, match in calls:
        with pytest.raises(LoraLabError, match=match):
            call()


# Intrinsic rank ---------------------------------------------------------------------------------------------------------------------


def test_equal_singular_values_count_fully_and_one_counts_one():
    for count in (1, 2, 5):
        rank = intrinsic_rank(torch.full((count,), 0.3, dtype=torch.float64))
        assert (rank.effective, rank.stable, rank.for_energy) == (pytest.approx(count), pytest.approx(count), math.ceil(0.9 * count))
    assert intrinsic_rank(torch.tensor([4.0, 0.0, 0.0])).effective == 1.0


def test_effective_rank_is_the_exponential_of_the_entropy():
    """Roy and Vetterli 2007, equation 4, by hand for 3, 1: p = 3/4, 1/4."""
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    rank = intrinsic_rank(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert rank.effective == pytest.approx(expected, abs=1e-12) and rank.stable == pytest.approx(10 / 9)


@pytest.mark.parametrize(("energy", "count"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.96, 2), (0.97, 3), (1.0, 3)])
def test_values_for_the_energy_are_counted_from_the_largest(energy, count):
    """Squares 16, 3.24, 0.64 of 19.88: shares 80.5 %, 96.8 %, 100 %."""
    assert intrinsic_rank(torch.tensor([1.8, 0.8, 4.0, 0.0], dtype=torch.float64), energy).for_energy == count


def test_an_untrained_update_has_no_rank():
    rank = intrinsic_rank(delta_svd(torch.randn(3, 6), torch.zeros(5, 3)).values)
    assert (rank.effective, rank.stable, rank.for_energy) == (0.0, 0.0, 0)


# Overlap ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_every_phi_of_the_grid_is_equation_4(first, second):
    A, other = torch.randn(first, 9, dtype=torch.float64), torch.randn(second, 9, dtype=torch.float64)
    grid = overlap_grid(A, other)
    assert grid.values.shape == (first, second)
    for i in range(1, first + 1):
        for j in range(1, second + 1):
            assert grid.at(i, j) == pytest.approx(dense_phi(A, other, i, j), abs=1e-12)
            assert subspace_overlap(A, other, i, j) == grid.at(i, j)


def test_phi_is_one_where_a_subspace_lies_in_the_other_and_zero_where_they_are_orthogonal():
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q.T
    inside = torch.randn(2, 4, dtype=torch.float64) @ basis[:4]
    assert subspace_overlap(inside, basis[:4]) == pytest.approx(1.0) == subspace_overlap(basis[:4], inside)
    assert subspace_overlap(basis[:4], basis[4:]) == pytest.approx(0.0, abs=1e-12)


def test_phi_is_symmetric_and_blind_to_how_a_subspace_is_written():
    """A and G A have the same rows' span for any invertible G; B absorbs G's inverse, so the update is the same."""
    A, other, G = torch.randn(3, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    assert subspace_overlap(G @ A, other) == pytest.approx(subspace_overlap(A, other), abs=1e-12)
    assert_close(overlap_grid(A, other).values, overlap_grid(other, A).values.T, rtol=0, atol=1e-12)


def test_random_subspaces_overlap_as_much_as_the_baseline_says():
    """E ||U^T V||^2 = i j / n, so that phi has the mean max(i, j) / n: the baseline of figure 3's right side."""
    size, grids = 40, []
    for _ in range(200):
        grids.append(overlap_grid(torch.randn(2, size, dtype=torch.float64), torch.randn(5, size, dtype=torch.float64)))
    for i, j in ((1, 1), (2, 5), (1, 5)):
        mean = sum(grid.at(i, j) for grid in grids) / len(grids)
        assert mean == pytest.approx(grids[0].random(i, j), rel=0.25)
    assert grids[0].random(2, 5) == 5 / 40


def test_directions_that_a_matrix_does_not_have_are_left_out():
    """Two equal rows are one direction; a second, made of rounding, would overlap with anything."""
    row, other = torch.randn(1, 9), torch.randn(2, 9)
    assert overlap_grid(torch.cat([row, row, 2 * row]), other).values.shape == (1, 2)


# Amplification ------------------------------------------------------------------------------------------------------------------------


def test_amplification_is_that_of_the_dense_matrices(monkeypatch):
    """Section 7.3: ||U^T W V|| with the update's own singular directions, and with W's."""
    monkeypatch.setattr(singular_values, "ELEMENTS_AT_ONCE", 14)  # two rows at a time
    A, B = pair(3, 7, 5)
    W, delta = torch.randn(5, 7, dtype=torch.float64), 0.5 * B @ A
    U, _, Vh = torch.linalg.svd(delta)
    found = amplification(A, B, 0.5, W, own=True)
    assert found.delta_norm == pytest.approx(float(delta.norm()), abs=1e-12) and found.weight_norm == pytest.approx(float(W.norm()), abs=1e-12)
    assert found.projected_norm == pytest.approx(float((U[:, :3].T @ W @ Vh[:3].T).norm()), abs=1e-12)
    own_U, _, own_Vh = torch.linalg.svd(W)
    assert found.own_norm == pytest.approx(float((own_U[:, :3].T @ W @ own_Vh[:3].T).norm()), abs=1e-12)
    assert found.factor == pytest.approx(found.delta_norm / found.projected_norm)
    assert found.ratio == pytest.approx(found.delta_norm / found.weight_norm)
    assert amplification(A, B, 0.5, W).own_norm is None


def test_the_papers_table_7_follows_from_its_norms():
    """GPT-3's layer 48: ||W_q|| = 61.95; at r=4 ||dW|| = 6.91 and ||U^T W V|| = 0.32: "21.5 ~ 6.91 / 0.32"; random directions give 0.02, 0.33."""
    size = (12288, 12288)
    four = spectra.Amplification(6.91, 61.95, 0.32, 21.67, 4, size)
    sixty_four = spectra.Amplification(3.57, 61.95, 1.90, 37.71, 64, size)
    assert four.factor == pytest.approx(21.5, rel=0.01) and sixty_four.factor == pytest.approx(1.9, rel=0.02)
    assert four.random_norm == pytest.approx(0.02, abs=0.005) and sixty_four.random_norm == pytest.approx(0.33, abs=0.01)


def test_random_directions_give_the_random_norm():
    W = torch.randn(30, 20, dtype=torch.float64)
    found = [amplification(*pair(2, 20, 30), 1.0, W) for _ in range(300)]
    mean_square = sum(one.projected_norm**2 for one in found) / len(found)
    assert math.sqrt(mean_square) == pytest.approx(found[0].random_norm, rel=0.1)


def test_an_update_along_the_weight_is_not_amplified_and_one_beside_it_is_without_end():
    W = torch.zeros(4, 4, dtype=torch.float64)
    W[0, 0] = 2.0
    first, second = torch.eye(4, dtype=torch.float64)[:1], torch.eye(4, dtype=torch.float64)[1:2]
    assert amplification(first, first.T, 2.0, W).factor == pytest.approx(1.0)
    assert amplification(second, second.T, 2.0, W).factor == math.inf
    untrained = amplification(first, 0 * first.T, 1.0, W)
    assert (untrained.factor, untrained.ratio, untrained.random_norm) == (0.0, 0.0, 0.0)


# A model --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    """Two adapters of different ranks; "b" is active."""
    model = lora_lab.inject(build("llama"), rank=3, alpha=6, init="random", adapter="a")
    return lora_lab.inject(model, rank=5, target_modules=["q_proj", "down_proj"], init="random", adapter="b")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_layer_is_measured_against_its_own_weight_in_the_right_orientation(family):
    """Conv1D stores [in, out]: its square projections would give a wrong amplification without a word."""
    model = lora_lab.inject(build(family), rank=3, alpha=6, init="random", target_modules="attention")
    report = spectra.spectra(model, own=True)
    assert len(report.layers) == len(lora_lab.plan(build(family), target_modules="attention").layers)
    for layer in report.layers:
        module = model.get_submodule(layer.path)
        transposed = any(base is transformers.pytorch_utils.Conv1D for base in type(module).__mro__)
        W = module.weight.detach().T if transposed else module.weight.detach()
        delta = 2 * module.lora_B["default"].detach() @ module.lora_A["default"].detach()
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        assert layer.rank == 3 and list(layer.values) == pytest.approx(S[:3].tolist(), abs=1e-12)
        assert layer.amplification.projected_norm == pytest.approx(float((U[:, :3].T @ W @ Vh[:3].T).norm()), abs=1e-12)
        assert layer.amplification.own_norm == pytest.approx(float(torch.linalg.svdvals(W)[:3].norm()), abs=1e-12)
        assert layer.intrinsic.effective == pytest.approx(intrinsic_rank(S[:3]).effective)


def test_the_report_is_of_the_active_adapter_or_of_the_named_one_and_changes_nothing(llama):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    assert spectra.spectra(llama).adapter == "b" and {layer.rank for layer in spectra.spectra(llama).layers} == {5}
    assert {layer.rank for layer in spectra.spectra(llama, "a").layers} == {3}
    overlaps(llama, "a", "b")
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    lora_lab.use(llama, ["a", "b"])
    with pytest.raises(LoraLabError, match="which adapter"):
        spectra.spectra(llama)
    with pytest.raises(LoraLabError, match="'aa'.*did you mean 'a'"):
        spectra.spectra(llama, "aa")
    with pytest.raises(LoraLabError, match="no adapters|none"):
        spectra.spectra(build("llama"))


@pytest.mark.parametrize("side", ["A", "B"])
def test_overlaps_are_those_of_the_layers_both_adapters_change(llama, side):
    report = overlaps(llama, "a", "b", side)
    assert len(report.layers) == 4 and (report.first, report.second, report.side) == ("a", "b", side)
    for path, grid in report.layers:
        module = llama.get_submodule(path)
        first, second = ((module.lora_A[name] if side == "A" else module.lora_B[name].T).detach() for name in "ab")
        assert grid.values.shape == (3, 5)
        assert grid.at(2, 4) == pytest.approx(dense_phi(first, second, 2, 4), abs=1e-12)
    assert report.mean(2, 4) == pytest.approx(sum(grid.at(2, 4) for _, grid in report.layers) / 4)


def test_overlaps_say_what_is_wrong(llama):
    lora_lab.inject(llama, rank=2, target_modules=["q_proj"], adapter="new")
    lora_lab.inject(llama, rank=2, target_modules=["k_proj"], adapter="other")
    for arguments, match in [(("a", "b", "C"), "side='C'"), (("a", "z"), "'z'"), (("new", "other"), "no layer in common"),
                             (("a", "new", "B"), "q_proj.*zero.*trained")]:  # fmt: skip
        with pytest.raises(LoraLabError, match=match):
            overlaps(llama, *arguments)
    assert len(overlaps(llama, "a", "new").layers) == 2  # the A's are compared before training, too


def test_convolutions_and_embeddings_are_matrices_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 5)).double()
    lora_lab.inject(model, rank=2, target_modules=["0"], init="random")
    layer = spectra.spectra(model).layers[0]
    delta = model[0].lora_B["default"].flatten(1) @ model[0].lora_A["default"].flatten(1)
    assert list(layer.values) == pytest.approx(torch.linalg.svdvals(delta)[:2].tolist(), abs=1e-12) and layer.amplification.size == (4, 12)
    words = lora_lab.inject(nn.Sequential(nn.Embedding(9, 4)).double(), rank=2, target_modules=["0"], init="random")
    assert spectra.spectra(words).layers[0].amplification.size == (4, 9)


def test_weights_without_values_are_refused():
    model = lora_lab.inject(nn.Sequential(nn.Linear(4, 4, device="meta")), rank=2)
    with pytest.raises(LoraLabError, match="meta device"):
        spectra.spectra(model)


def test_tables_have_a_line_for_each_layer(llama):
    lines = spectra.spectra(llama, energy=0.8).table().splitlines()
    assert len(lines) == 5 and "80%" in lines[0] and len({len(line) for line in lines}) == 1 and "model.layers.0.self_attn.q_proj" in lines[1]
    lines = overlaps(llama, "a", "b").table(2, 2).splitlines()
    assert len(lines) == 5 and "phi(2, 2)" in lines[0] and "phi(all)" in lines[0]
    with pytest.raises(LoraLabError, match="i=4"):
        overlaps(llama, "a", "b").table(4, 1)


# Pictures -------------------------------------------------------------------------------------------------------------------------------


def test_without_matplotlib_a_plot_says_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(LoraLabError, match="pip install matplotlib"):
        spectra.plot_singular_values(spectra.spectra(llama))
    with pytest.raises(LoraLabError, match="pip install matplotlib"):
        spectra.plot_overlap(overlap_grid(torch.eye(2), torch.eye(2)))


def test_plots_show_the_numbers(llama):
    import matplotlib

    matplotlib.use("agg")
    report = spectra.spectra(llama)
    axes = spectra.plot_singular_values(report)
    assert [list(line.get_ydata()) for line in axes.lines] == [list(layer.values) for layer in report.layers]
    one = spectra.plot_singular_values(report, paths=[report.layers[1].path])
    assert len(one.lines) == 1 and one.lines[0].get_label() == report.layers[1].path
    grid = overlaps(llama, "a", "b").layers[0][1]
    image = spectra.plot_overlap(grid, axes=matplotlib.pyplot.subplots()[1]).images[0]
    assert image.get_array().tolist() == grid.values.tolist() and image.get_clim() == (0.0, 1.0)
    matplotlib.pyplot.close("all")
