"""nn.MultiheadAttention reads its weights itself: what an adapter there has to do all the same, on every path PyTorch takes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from small_models import randomise
from torch import nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError

TENSORS = "adapter_model.safetensors"
TARGETS = {"both": ["self_attn"], "out_proj": ["out_proj"], "everything": ["self_attn", "linear1", "linear2"]}


def encoder(batch_first: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)).double()


def adapted(targets: Any = ("self_attn",), **request: Any) -> nn.Sequential:
    model = lora_lab.inject(encoder(), rank=4, target_modules=list(targets), **request)
    randomise(model, by=0.3)
    return model


def inputs() -> torch.Tensor:
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(model: nn.Module) -> nn.Module:
    """The update in the weights, no adapter left."""
    return lora_lab.eject(lora_lab.merge(copy.deepcopy(model), restorable=False))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("training", [True, False])
def test_the_attention_computes_with_the_dense_update_in_training_and_on_the_fast_path(targets: str, variant: str, training: bool) -> None:
    """In eval mode without gradients PyTorch takes a path of its own, on which PEFT's adapters on linear1 and linear2 do nothing."""
    model, x = adapted(TARGETS[targets], variant=variant).train(training), inputs()
    plain = dense(model)
    assert not torch.allclose(plain(x), encoder().train(training)(x))
    with torch.set_grad_enabled(training):
        assert_close(model(x), plain(x), rtol=0, atol=1e-12)


def test_out_proj_alone_trains() -> None:
    """PEFT accepts the target and trains nothing: its pull request 1324."""
    model, x = adapted(["out_proj"]), inputs()
    model(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)
    assert {name.rpartition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {"0.self_attn.out_proj"}


def test_gradients_are_those_of_the_dense_update() -> None:
    model, x = adapted(), inputs()
    weight = torch.randn_like(x)
    (model(x) * weight).sum().backward()
    attention = model[0].self_attn
    A, B = (p.detach().clone().requires_grad_() for p in (attention.lora_A["default"], attention.lora_B["default"]))
    plain = dense(model)
    value = encoder()[0].self_attn.in_proj_weight.detach() + B @ A
    out = torch.func.functional_call(plain, {"0.self_attn.in_proj_weight": value}, (x,))
    wanted = torch.autograd.grad((out * weight).sum(), (A, B))
    assert_close(attention.lora_A["default"].grad, wanted[0], rtol=0, atol=1e-10)
    assert_close(attention.lora_B["default"].grad, wanted[1], rtol=0, atol=1e-10)


def test_eject_disabled_and_unmerge_give_the_attention_back() -> None:
    base, x = encoder(), inputs()
    model = adapted()
    y = model(x)
    with lora_lab.disabled(model):
        assert_close(model(x), base(x), rtol=0, atol=1e-12)  # without gradients PyTorch takes another path
    lora_lab.unmerge(lora_lab.merge(model))
    assert torch.equal(model(x), y)
    lora_lab.eject(model)
    assert type(model[0].self_attn) is nn.MultiheadAttention and torch.equal(model(x), base(x))
    assert list(model.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_with_different_adapters_equal_the_rows_run_alone(batch_first: bool) -> None:
    model = encoder(batch_first)
    for name in ("a", "b"):
        lora_lab.inject(model, rank=2, target_modules=["self_attn", "linear1"], adapter=name)
    randomise(model, by=0.3)
    x, rows, dim = inputs(), ["b", None, "a"], 0 if batch_first else 1
    x = x if batch_first else x.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    alone = []
    for row, name in enumerate(rows):
        lora_lab.use(model, name)
        alone.append(model[0](x.narrow(dim, row, 1), src_key_padding_mask=padding[row : row + 1]))
    with lora_lab.per_sample(model, rows):
        assert_close(model[0](x, src_key_padding_mask=padding), torch.cat(alone, dim), rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", ["both", "out_proj"])
def test_peft_reads_what_we_write_and_we_read_it_back(tmp_path, targets: str) -> None:
    """PEFT has no adapter of out_proj that works alone; it gets one of both projections, of which one adds zero. See attention_files.py."""
    model, x = adapted(TARGETS[targets]), inputs()
    lora_lab.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(encoder(), tmp_path).train()
    assert_close(theirs(x), model(x), rtol=0, atol=1e-6)
    assert_close(lora_lab.load(encoder(), tmp_path)(x), model(x), rtol=0, atol=1e-12)


def test_we_read_what_peft_writes(tmp_path) -> None:
    theirs = peft.get_peft_model(encoder(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0.self_attn"])).double()
    randomise(theirs, by=0.3)
    theirs.save_pretrained(tmp_path)
    x = inputs()
    ours = lora_lab.load(encoder(), tmp_path)
    assert_close(ours(x), theirs.train()(x), rtol=0, atol=1e-9)
    assert not torch.allclose(ours(x), encoder()(x))


# What one PEFT file can say of both projections: one rank, one alpha, those of the attention's path -------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "the attention's": {"rank_pattern": {"self_attn": 2}, "alpha_pattern": {"self_attn": 6}},
    "an output projection's": {"rank_pattern": {"out_proj": 2}, "alpha_pattern": {"out_proj": 6}},
    "both": {"rank_pattern": {"self_attn": 2, "out_proj": 3}, "alpha_pattern": {"out_proj": 5}},
}


def written_by_peft(folder: Path, **settings: Any) -> torch.Tensor:
    """What PEFT computes with an adapter that it has trained and saved."""
    theirs = peft.get_peft_model(encoder(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["self_attn", "linear1"], **settings)).double()
    randomise(theirs, by=0.3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    theirs.save_pretrained(folder)
    return theirs.train()(inputs())


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.filterwarnings("ignore:.*pattern")  # PEFT on keys that match nothing
def test_ranks_and_alphas_of_a_peft_file_are_those_of_the_attentions_path(tmp_path: Path, patterns: str) -> None:
    expected = written_by_peft(tmp_path, **PATTERNS[patterns])
    ours = lora_lab.load(encoder(), tmp_path)
    assert_close(ours(inputs()), expected, rtol=0, atol=1e-9)
    ranks = {path: layer.lora_A["default"].shape[0] for path, layer in lora_lab.checkpoint.lora_layers(ours).items()}
    assert ranks["0.self_attn"] == ranks["0.self_attn.out_proj"] == (4 if "an output" in patterns else 2)


@pytest.mark.parametrize("init", ["random", "pissa"])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_projections_of_two_ranks_and_scalings_are_written_as_two_of_one(tmp_path: Path, patterns: str, init: str) -> None:
    """The smaller rank is filled up with zeros, the other scaling goes into B."""
    model = lora_lab.inject(encoder(), rank=4, alpha=8, target_modules=["self_attn", "linear1"], init=init, **PATTERNS[patterns])
    randomise(model, by=0.3)
    x = inputs()
    assert model[0].self_attn.out_proj.lora_scaling["default"] == {"the attention's": 3.0, "an output projection's": 3.0, "both": 5 / 3}[patterns]
    lora_lab.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(encoder(), tmp_path).train()
    assert_close(theirs(x), model(x), rtol=0, atol=1e-6)
    assert_close(lora_lab.load(encoder(), tmp_path)(x), model(x), rtol=0, atol=1e-12)


def test_a_scaling_that_does_not_fit_into_b_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = lora_lab.inject(encoder(), rank=4, target_modules=["self_attn"], alpha_pattern={"out_proj": 4e6}, init="random")
    with pytest.raises(LoraLabError, match=r"scalings of '0.self_attn' and of its out_proj.*save in float32"):
        lora_lab.save(model, tmp_path / "here", dtype=torch.float16)
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_an_attention_travel_both_ways(tmp_path: Path, bias: str) -> None:
    """PEFT trains out_proj's bias and calls it <a>.base_layer.out_proj.base_layer.bias; in_proj_bias does not train there, nor here."""
    expected = written_by_peft(tmp_path / "theirs", bias=bias)
    assert_close(lora_lab.load(encoder(), tmp_path / "theirs")(inputs()), expected, rtol=0, atol=1e-9)
    model = lora_lab.inject(encoder(), rank=4, target_modules=["self_attn", "linear1"], bias=bias, init="random")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    lora_lab.save(model, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / TENSORS).keys() == load_file(tmp_path / "theirs" / TENSORS).keys()
    theirs = peft.PeftModel.from_pretrained(encoder(), tmp_path / "ours").train()
    assert_close(theirs(inputs()), model(inputs()), rtol=0, atol=1e-6)
    assert_close(lora_lab.load(encoder(), tmp_path / "ours")(inputs()), model(inputs()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("request_", [
    {"target_modules": ["out_proj"]}, {"target_modules": ["self_attn"]}, {"target_modules": ["self_attn"], "exclude_modules": ["out_proj"]},
])  # fmt: skip
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_one_projection_alone_comes_back_as_one(tmp_path: Path, request_: dict[str, Any], variant: str) -> None:
    """The pair of zeros beside it, for PEFT, is nobody's adapter."""
    model = randomise(lora_lab.inject(encoder(), rank=2, variant=variant, **request_), by=0.3)
    lora_lab.save(model, tmp_path)
    again = lora_lab.load(encoder(), tmp_path, trainable=True)
    assert_close(again(inputs()), model(inputs()), rtol=0, atol=1e-12)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [name for name, p in model.named_parameters() if p.requires_grad]
    if variant == "lora":
        assert_close(peft.PeftModel.from_pretrained(encoder(), tmp_path).train()(inputs()), model(inputs()), rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="does not support DoRA"):
            peft.PeftModel.from_pretrained(encoder(), tmp_path)


@pytest.mark.parametrize(("request_", "message"), [
    ({"dropout": 0.1}, r"dropout=0.1, but '0.self_attn' is of an nn.MultiheadAttention"), ({"lora_bias": True}, "lora_bias=True"),
])  # fmt: skip
def test_what_a_weight_cannot_have_is_refused(request_: dict[str, Any], message: str) -> None:
    model = encoder()
    with pytest.raises(LoraLabError, match=message):
        lora_lab.inject(model, target_modules=["self_attn"], **request_)
    assert type(model[0].self_attn) is nn.MultiheadAttention


def test_widths_of_their_own_for_keys_and_values_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(LoraLabError, match="no in_proj to adapt"):
        lora_lab.inject(model, target_modules=["0"])
