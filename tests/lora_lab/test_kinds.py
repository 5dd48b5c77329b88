"""Embeddings and convolutions, DoRA, PiSSA and the rest: against the dense weight they stand for, and against PEFT, both ways."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from small_models import randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.targets import lora_layers


def words() -> torch.Tensor:
    return torch.randint(0, 40, (3, 7))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    embed_scale = 4.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


LAYERS: dict[str, tuple[Any, Any]] = {  # name -> (layer, an input for it)
    "linear": (lambda: nn.Linear(12, 10), lambda: numbers(3, 5, 12)),
    "no bias": (lambda: nn.Linear(12, 10, bias=False), lambda: numbers(3, 12)),
    "embedding": (lambda: nn.Embedding(40, 12), words),
    "padded embedding": (lambda: nn.Embedding(40, 12, padding_idx=3), words),
    "scaled embedding": (lambda: Scaled(40, 12), words),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), lambda: numbers(3, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), lambda: numbers(3, 4, 9, 9)),
    "dilated conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), dilation=2, stride=(2, 1)), lambda: numbers(3, 4, 9, 9)),
    "reflected conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="reflect"), lambda: numbers(3, 4, 9, 9)),
    "same conv1d": (lambda: nn.Conv1d(6, 8, 3, padding="same", padding_mode="circular", bias=False), lambda: numbers(3, 6, 11)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), lambda: numbers(2, 2, 4, 4, 4)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"variant": "dora"}, "rslora": {"rslora": True, "alpha": 3}, "lora_bias": {"lora_bias": True},
}  # fmt: skip


def adapted(kind: str, **request: Any) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    make, example = LAYERS[kind]
    model = nn.Sequential(make()).double()
    model = lora_lab.inject(model, rank=4, target_modules=["0"], **request)
    randomise(model)
    return model, example()


def dense(model: nn.Sequential) -> nn.Sequential:
    """The same model with the update in its weight and no adapter."""
    layer = model[0]
    delta = layer.lora_kind.stored(layer.lora_delta("default"), layer)
    bias = layer.lora_scaling["default"] * layer.lora_B_bias["default"] if "lora_B_bias" in layer._modules else None
    plain = lora_lab.eject(copy.deepcopy(model))
    with torch.no_grad():
        plain[0].weight.add_(delta)
        if bias is not None:
            plain[0].bias.add_(bias)
    return plain


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapted_layer_is_the_layer_with_the_dense_update(kind: str, variant: str) -> None:
    """Hu et al. 2021, equation 3, with every stride, padding, dilation and scale of the layer; Liu et al. 2024, equation 5, for DoRA."""
    if variant == "lora_bias" and ("embedding" in kind or kind in ("no bias", "same conv1d")):
        pytest.skip("an adapter's bias needs a layer with a bias here")
    model, x = adapted(kind, **VARIANTS[variant])
    assert_close(model(x), expected_with_padding(model, x), rtol=0, atol=1e-12)
    with lora_lab.disabled(model):
        assert not torch.allclose(model(x), expected_with_padding(model, x))


def expected_with_padding(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    plain = dense(model)
    if isinstance(plain[0], nn.Embedding):
        plain[0].padding_idx = None  # the row of the padding word has an update like any other
    return plain(x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_has_changed_right_after_inject(kind: str, variant: str) -> None:
    torch.manual_seed(0)
    make, example = LAYERS[kind]
    model, x = nn.Sequential(make()).double(), example()
    before = model(x)
    assert_close(lora_lab.inject(model, rank=4, target_modules=["0"], variant=variant)(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "padded" not in kind])
def test_gradients_are_those_of_the_dense_update(kind: str) -> None:
    model, x = adapted(kind)
    layer = model[0]
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A["default"], layer.lora_B["default"]))
    y = model(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    delta = layer.lora_kind.stored(B.flatten(1) @ A.flatten(1), layer)
    plain = lora_lab.eject(copy.deepcopy(model))
    total = (torch.func.functional_call(plain, {"0.weight": plain[0].weight.detach() + delta}, (x,)) * weight).sum()
    wanted = torch.autograd.grad(total, (A, B))
    assert_close(layer.lora_B["default"].grad, wanted[1], rtol=0, atol=1e-9)
    assert_close(layer.lora_A["default"].grad, wanted[0], rtol=0, atol=1e-9)


def test_the_padding_word_gets_no_gradient() -> None:
    model, _ = adapted("padded embedding")
    model(torch.tensor([[3, 3, 5]])).sum().backward()
    gradient = model[0].lora_A["default"].grad
    assert gradient[:, 3].abs().max() == 0 and gradient[:, 5].abs().max() > 0


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_a_layer_of_any_kind_pickles_copies_and_ejects(kind: str) -> None:
    model, x = adapted(kind, variant="dora")
    y = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    keys = set(model.state_dict())
    assert "0.lora_magnitude_vector.default" in keys
    plain = lora_lab.eject(model)
    assert type(plain[0]) is type(LAYERS[kind][0]()) and not any("lora" in key for key in plain.state_dict())


# DoRA ----------------------------------------------------------------------------------------------------------------------


def test_doras_norm_needs_no_matrix_of_the_weights_size() -> None:
    """The norm of every row from A, B and W A^T; W itself is read in blocks. Checked on a weight larger than one block."""
    from lora_lab.delta import ELEMENTS_AT_ONCE, weight_norm

    W, A, B = torch.randn(3000, 2048), torch.randn(4, 2048), torch.randn(3000, 4)
    assert W.numel() > ELEMENTS_AT_ONCE
    assert_close(weight_norm(W, A, B, 0.3), (W + 0.3 * B @ A).norm(dim=1), rtol=1e-5, atol=1e-4)
    assert_close(weight_norm(W, A, torch.zeros_like(B), 3e38), W.norm(dim=1), rtol=1e-5, atol=1e-4)  # the largest scaling, at step 0


def test_doras_magnitude_is_learned_in_16_bits_although_m_over_norm_is_close_to_1() -> None:
    """m / norm = 1.001 is 1 in bfloat16; (m / norm - 1) is cast instead, after the subtraction."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    model = lora_lab.inject(nn.Sequential(layer), rank=2, variant="dora")
    x = torch.randn(16, 64).bfloat16()
    before = model(x)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].mul_(1.002)
    update = layer.lora_variant["default"].update(layer, "default", x, before)
    assert_close(update.float(), 0.002 * before.float(), rtol=0.02, atol=1e-4)


def test_doras_norm_is_a_constant_in_backward() -> None:
    """Section 4.3: the gradient does not go through the norm, so that memory is saved; it is that of m B A / constant."""
    model, x = adapted("linear", variant="dora")
    layer = model[0]
    model(x).sum().backward()
    ratio = layer.lora_variant["default"].ratio(layer, "default").detach()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A["default"], layer.lora_B["default"]))
    (ratio * F.linear(F.linear(x, A), B)).sum().backward()
    assert_close(layer.lora_B["default"].grad, B.grad, rtol=0, atol=1e-10)


def test_doras_bias_is_left_alone() -> None:
    """torchtune scales (W x + b); the merged weight does not: W' x + b."""
    model, x = adapted("linear", variant="dora")
    weight = model[0].weight + model[0].lora_delta("default")
    assert_close(model(x), F.linear(x, weight, model[0].bias), rtol=0, atol=1e-12)


def test_dora_and_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    for request in ({"variant": "dora"}, {"init": "pissa"}, {"rank": 3}):
        with pytest.raises(LoraLabError, match="convolution with 2 groups"):
            lora_lab.inject(model, **{"rank": 4, "target_modules": ["0"], **request})
    assert type(model[0]) is nn.Conv2d
    lora_lab.inject(model, rank=4, target_modules=["0"], init="random")
    assert model(torch.randn(1, 4, 5, 5)).shape == (1, 8, 3, 3)


# PiSSA, orthogonal, LoRA-FA ------------------------------------------------------------------------------------------------


def test_pissa_starts_at_the_principal_part_and_leaves_the_weight_alone() -> None:
    """Meng et al. 2024, equations 2 to 4: s B A is the best approximation of W of rank r; the function has not changed."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), numbers(4, 12)
    weight, before = model[0].weight.clone(), model(x)
    lora_lab.inject(model, rank=3, alpha=6, init="pissa")
    layer = model[0]
    assert torch.equal(layer.weight, weight)
    assert_close(model(x), before, rtol=0, atol=1e-12)
    left, values, right = torch.linalg.svd(weight)
    principal = left[:, :3] * values[:3] @ right[:3]
    assert_close(2 * layer.lora_B["default"] @ layer.lora_A["default"], principal, rtol=0, atol=1e-12)
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == ["0.lora_A.default", "0.lora_B.default"]


def test_pissa_is_the_papers_function() -> None:
    """(W - s B0 A0) x + s B A x, and a file of it is a plain adapter of rank 2r that PEFT reads."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), numbers(4, 12)
    lora_lab.inject(model, rank=3, init="pissa")
    layer = model[0]
    start = layer.lora_B["default"].detach() @ layer.lora_A["default"].detach()
    randomise(model)
    residual = F.linear(x, layer.weight - start, layer.bias)
    assert_close(model(x), residual + F.linear(F.linear(x, layer.lora_A["default"]), layer.lora_B["default"]), rtol=0, atol=1e-12)
    with lora_lab.disabled(model):
        assert_close(model(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)


@pytest.mark.parametrize(("request_", "alpha"), [({"alpha": 6}, 12), ({"alpha": 6, "rslora": True}, 6 * 2**0.5)])
def test_a_pissa_file_is_a_plain_adapter_of_twice_the_rank(tmp_path, request_: dict[str, Any], alpha: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), numbers(4, 12)
    base = copy.deepcopy(model)
    lora_lab.inject(model, rank=3, init="pissa", **request_)
    randomise(model)
    lora_lab.save(model, tmp_path)
    again = lora_lab.load(copy.deepcopy(base), tmp_path)
    assert again[0].lora_A["default"].shape == (6, 12)
    assert_close(again(x), model(x), rtol=0, atol=1e-12)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert theirs.peft_config["default"].r == 6 and theirs.peft_config["default"].lora_alpha == pytest.approx(alpha)
    assert_close(theirs(x), model(x), rtol=0, atol=1e-6)


def test_pissa_of_more_than_full_rank_is_refused() -> None:
    with pytest.raises(LoraLabError, match=r"init='pissa' with rank 11"):
        lora_lab.inject(nn.Sequential(nn.Linear(12, 10)), rank=11, init="pissa")
    with pytest.raises(LoraLabError, match="use one of the two"):
        lora_lab.inject(nn.Sequential(nn.Linear(12, 10)), init="pissa", variant="dora")


def test_orthogonal_starts_with_a_zero_update_of_two_matrices_that_are_not_zero() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), numbers(4, 12)
    before = model(x)
    lora_lab.inject(model, rank=4, init="orthogonal")
    layer = model[0]
    assert_close(model(x), before, rtol=0, atol=1e-6)  # the basis is made in float32
    assert layer.lora_A["default"].abs().min() > 0 and layer.lora_B["default"].norm() > 0.1
    with pytest.raises(LoraLabError, match="choose an even rank"):
        lora_lab.inject(nn.Sequential(nn.Linear(12, 10)), rank=3, init="orthogonal")


def test_with_freeze_A_only_B_trains() -> None:
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): half the trained parameters, and no input is kept for A."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(12, 10)), rank=4, freeze_A=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_B.default"]
    lora_lab.inject(model, rank=2, adapter="second")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A.second", "0.lora_B.second"]


def test_an_embedding_has_no_adapter_bias() -> None:
    with pytest.raises(LoraLabError, match="lora_bias=True, but '0' is an embedding"):
        lora_lab.inject(nn.Sequential(nn.Embedding(8, 4)), target_modules=["0"], lora_bias=True)


@pytest.mark.parametrize(("name", "value"), [("variant", "dorra"), ("freeze_A", 1), ("lora_bias", "yes"), ("init", "svd")])
def test_what_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(LoraLabError, match=f"{name}={value!r}"):
        lora_lab.inject(model, **{name: value})
    assert type(model[0]) is nn.Linear


# Targets ---------------------------------------------------------------------------------------------------------------------


def test_targets_by_class_and_by_function() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    assert set(lora_layers(lora_lab.inject(build(), target_modules=nn.Embedding))) == {"0"}
    assert set(lora_layers(lora_lab.inject(build(), target_modules=(nn.Embedding, nn.Linear)))) == {"0", "1", "2"}
    assert set(lora_layers(lora_lab.inject(build(), target_modules=lambda path, module: path == "2"))) == {"2"}
    assert set(lora_layers(lora_lab.inject(build()))) == {"1", "2"}  # "all-linear" is linear
    with pytest.raises(LoraLabError, match="matches no layer"):
        lora_lab.inject(build(), target_modules=nn.Conv2d)


def test_the_plan_counts_magnitudes_biases_and_grouped_kernels() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Conv2d(4, 8, 3, groups=2))
    for request in ({"target_modules": ["0"], "variant": "dora"}, {"target_modules": ["0"], "lora_bias": True}, {"target_modules": ["1"]}):
        planned = lora_lab.plan(model, rank=4, **request)
        injected = lora_lab.inject(copy.deepcopy(model), rank=4, **request)
        assert planned.parameters == lora_lab.count_parameters(injected).trainable
    assert "(rank 4 * (12 in + 10 out) + 10)" in str(lora_lab.plan(model, rank=4, target_modules=["0"], variant="dora"))


# PEFT, both ways -----------------------------------------------------------------------------------------------------------------

WITH_PEFT = [
    (kind, variant)
    for kind in LAYERS
    for variant in VARIANTS
    if kind not in ("dilated conv2d", "reflected conv2d", "same conv1d", "scaled embedding")  # PEFT drops dilation and padding_mode (its issue 3697)
    and not (variant == "lora_bias" and ("embedding" in kind or kind == "no bias"))
]


@pytest.mark.parametrize(("kind", "variant"), WITH_PEFT)
def test_peft_reads_what_we_write(tmp_path, kind: str, variant: str) -> None:
    model, x = adapted(kind, **VARIANTS[variant])
    base = lora_lab.eject(copy.deepcopy(model))
    lora_lab.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(theirs(x), model(x), rtol=0, atol=1e-9 if theirs(x).dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("kind", "variant"), WITH_PEFT)
def test_we_read_what_peft_writes(tmp_path, kind: str, variant: str) -> None:
    torch.manual_seed(0)
    make, example = LAYERS[kind]
    base, x, request = nn.Sequential(make()).double(), example(), VARIANTS[variant]
    settings = {"use_dora": variant == "dora", "use_rslora": variant == "rslora", "lora_bias": variant == "lora_bias"}
    settings["lora_alpha"] = request.get("alpha", 4)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"], **settings)).double().eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_lab.load(copy.deepcopy(base), tmp_path)
    with lora_lab.disabled(ours):
        assert not torch.allclose(ours(x), theirs(x))
    assert_close(ours(x), theirs(x), rtol=0, atol=1e-9)


def test_a_row_of_zeros_has_no_direction_and_dora_leaves_it_alone() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 6)
    nn.init.zeros_(model[0].weight)
    before = model(x)
    assert torch.equal(lora_lab.inject(model, rank=2, variant="dora")(x), before)


def test_a_pattern_written_for_a_path_means_that_path_alone(tmp_path) -> None:
    """"fc" without an anchor is "block.fc", too."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(6, 6), nn.Sequential()
            self.block.add_module("fc", nn.Linear(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.fc(x))

    torch.manual_seed(0)
    base, x = Two().double(), numbers(2, 6)
    model = lora_lab.inject(copy.deepcopy(base), rank=2, init="pissa", alpha_pattern={"^fc": 32})
    randomise(model)
    lora_lab.save(model, tmp_path)
    assert_close(lora_lab.load(copy.deepcopy(base), tmp_path)(x), model(x), rtol=0, atol=1e-9)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(theirs(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("request_", "message"), [
    ({"variant": "dora", "lora_bias": True}, "variant='dora' with lora_bias=True"), ({"init": "pissa", "alpha": -1}, "alpha=-1 with init='pissa'"),
])  # fmt: skip
def test_what_would_compute_nonsense_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraLabError, match=message):
        lora_lab.inject(nn.Sequential(nn.Linear(4, 4)), **request_)
