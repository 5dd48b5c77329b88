"""LoRA for some projections of a fused layer: the same function as with a layer for each, in every verb, and in PEFT's files.

Which outputs are whose is asked of the models in test_fused_layouts.py.
"""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import SMALL, randomise
from torch import Tensor, nn
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError
from lora_lab.fused.parts import interleaved, parts_in
from lora_lab.layers import LoRA
from lora_lab.targets import lora_layers

transformers.logging.set_verbosity_error()

SHORT = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {**SHORT, "intermediate_size": 48, "max_position_embeddings": 64}
GPT = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def falcon(**changes: Any) -> Any:
    return transformers.FalconForCausalLM(transformers.FalconConfig(**SHORT, **changes))


# name -> (how to build it, what to adapt)
MODELS: dict[str, tuple[Any, list[str]]] = {
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT)), ["c_attn.q", "c_attn.v"]),
    "bigcode": (lambda: transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**GPT)), ["c_attn.q", "c_attn.v"]),
    "neox": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**LONG)), ["query_key_value.q", "query_key_value.k", "dense"]),
    "bloom": (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4)), ["query_key_value.v"]),
    "falcon-7b": (lambda: falcon(multi_query=True), ["query_key_value.q", "query_key_value.v"]),
    "falcon-40b": (lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), ["query_key_value.q", "query_key_value.v"]),
    "falcon-rw": (lambda: falcon(multi_query=False, alibi=True), ["query_key_value.q", "query_key_value.v"]),
    "phi-3": (lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LONG, num_key_value_heads=2)),
              ["qkv_proj.q", "qkv_proj.v", "gate_up_proj.up", "o_proj"]),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"variant": "dora"}, "rslora": {"rslora": True, "alpha": 7},
    "patterns": {"rank_pattern": {r"0\..*": 3}, "alpha_pattern": {r"1\..*": 5}, "alpha": 3},
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def adapted(name: str = "gpt2", adapter: str = "default", **request: Any) -> Any:
    return randomise(lora_lab.inject(build(name), **{"rank": 4, "target_modules": MODELS[name][1], "adapter": adapter, **request}))


def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 64, (2, 7))).logits


class Attention(nn.Module):
    """One layer for q, k and v, or three; q has twice the width of k and v."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.mixed = nn.Linear(8, 16)
        else:
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(x).split([8, 4, 4], -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        return torch.softmax(q.unflatten(-1, (2, 4)).sum(-2) @ k.mT, -1) @ v + q[..., :4]


SIZES = {"mixed": {"q": 8, "k": 4, "v": 4}}


def pair_of_models(parts: str = "qv", **request: Any) -> tuple[Any, Any]:
    """The same function and the same adapters, fused and separate, in float64."""
    fused, separate = Attention(True).double(), Attention(False).double()
    with torch.no_grad():
        for name, weight, bias in zip("qkv", fused.mixed.weight.split([8, 4, 4]), fused.mixed.bias.split([8, 4, 4]), strict=True):
            getattr(separate, name).weight.copy_(weight)
            getattr(separate, name).bias.copy_(bias)
    lora_lab.inject(fused, 3, target_modules=[f"mixed.{part}" for part in parts], fused=SIZES, **request)
    lora_lab.inject(separate, 3, target_modules=list(parts), **request)
    layer = fused.mixed
    randomise(fused)
    sizes = [SIZES["mixed"][part] for part in parts]
    with torch.no_grad():
        for name in layer.lora_parameters("default"):
            pieces = getattr(layer, name)["default"].split([3] * len(parts) if name == "lora_A" else sizes)
            for part, piece in zip(parts, pieces, strict=True):
                getattr(getattr(separate, part), name)["default"].copy_(piece)
    return fused, separate


# The function -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("parts", ["q", "qv", "kv", "qkv"])
def test_it_is_the_function_of_separate_projections_with_the_same_gradients(parts: str, variant: str) -> None:
    """What loralib's MergedLinear and litgpt's lora_query, lora_key, lora_value promise."""
    fused, separate = pair_of_models(parts, variant=variant, alpha=5)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    results = []
    for model in (fused, separate):
        own = x.clone().requires_grad_()
        y = model(own)
        y.square().sum().backward()
        results.append((y.detach(), own.grad))
    assert not torch.allclose(results[0][0], Attention.forward(copy.deepcopy(lora_lab.eject(copy.deepcopy(fused))), x))
    assert_close(results[0], results[1], rtol=0, atol=1e-10)
    for name, parameter in fused.mixed.lora_parameters("default").items():
        wanted = torch.cat([getattr(getattr(separate, part), name)["default"].grad for part in parts])
        assert_close(parameter.grad, wanted, rtol=0, atol=1e-10)
    assert fused.mixed.weight.grad is None


def test_the_tensors_are_those_of_loralib() -> None:
    """loralib, MergedLinear(enable_lora=[True, False, True]): A x, a convolution of two groups with B, and zeros for k in between."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(6, 12)), 2, target_modules=["0.q", "0.v"], fused={"0": {"q": 4, "k": 4, "v": 4}})
    layer: Any = randomise(model)[0]
    A, B, x = layer.lora_A["default"], layer.lora_B["default"], torch.randn(5, 6)
    assert A.shape == (2 * 2, 6) and B.shape == (4 * 2, 2)
    q, v = F.conv1d((x @ A.T).T[None], B[..., None], groups=2)[0].T.chunk(2, dim=1)
    wanted = torch.cat((q, torch.zeros(5, 4), v), dim=1)
    assert_close(layer(x) - F.linear(x, layer.weight, layer.bias), wanted, rtol=0, atol=1e-5)


def test_dropout_has_one_mask_for_all_parts() -> None:
    fused, _ = pair_of_models(dropout=0.5)
    layer, x = fused.mixed.train(), torch.randn(64, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_A["default"][3:] = layer.lora_A["default"][:3]
        layer.lora_B["default"][8:] = layer.lora_B["default"][:4]
    update = layer(x) - F.linear(x, layer.weight, layer.bias)
    assert_close(update[:, :4], update[:, 12:], rtol=0, atol=1e-12)
    assert not torch.allclose(update, layer(x) - F.linear(x, layer.weight, layer.bias))
    assert not update[:, 8:12].any()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_every_part_begins_with_a_zero_update_of_its_own(init: str) -> None:
    """Orthogonal pairs are zero together, and only with their own partner; gaussian has the deviation 1 / r of one part."""
    model = lora_lab.inject(nn.Sequential(nn.Linear(4096, 12)), 4, target_modules=["0.q", "0.k"], init=init, fused={"0": {"q": 6, "k": 4, "v": 2}})
    layer: Any = model[0]
    assert layer.lora_delta("default").abs().max() < 1e-6
    if init == "gaussian":
        assert abs(float(layer.lora_A["default"].detach().std()) - 1 / 4) < 0.01
    if init == "orthogonal":
        assert layer.lora_B["default"].abs().min(0).values.max() > 0


def test_a_frozen_A_stays_while_B_trains() -> None:
    fused, _ = pair_of_models(freeze_A=True)
    fused(torch.randn(2, 5, 8, dtype=torch.float64)).sum().backward()
    assert fused.mixed.lora_A["default"].grad is None and fused.mixed.lora_B["default"].grad.abs().min() > 0


@pytest.mark.parametrize("value", [
    {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}, {"q": torch.tensor([0, 1, 4, 5]), "k": range(2, 7, 4), "v": (3, 7)},
    interleaved(2, {"q": 2, "k": 1, "v": 1}),
])  # fmt: skip
def test_outputs_that_lie_between_others_can_be_given_by_number(value: Any) -> None:
    model = randomise(lora_lab.inject(nn.Sequential(nn.Linear(6, 8)), 2, target_modules=["0.q"], fused={"0": value}))
    changed = model[0].lora_delta("default").abs().sum(1) > 0
    assert changed.tolist() == [True, True, False, False, True, True, False, False]


def test_an_attention_of_pytorch_has_parts_too() -> None:
    """"self_attn.q" is q of its input projection and nothing of its output projection."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)).double().eval()
    base, x = copy.deepcopy(model), torch.randn(2, 5, 16, dtype=torch.float64)
    randomise(lora_lab.inject(model, 2, target_modules=["self_attn.q", "self_attn.v", "linear1"]))
    assert sorted(lora_layers(model)) == ["0.linear1", "0.self_attn"]
    delta = model[0].self_attn.lora_delta("default")
    assert not delta[16:32].any() and delta[:16].any() and delta[32:].any()
    y = model(x)
    with torch.no_grad():
        base[0].self_attn.in_proj_weight += delta
        base[0].linear1.weight += model[0].linear1.lora_delta("default")
    assert_close(y, base(x), rtol=0, atol=1e-12)


# The verbs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "falcon-40b"])
def test_merge_unmerge_disabled_and_eject(name: str, variant: str) -> None:
    base = logits(build(name))
    model = adapted(name, variant=variant)
    y = logits(model)
    assert not torch.allclose(y, base)
    with lora_lab.disabled(model):
        assert torch.equal(logits(model), base)
    assert_close(logits(lora_lab.merge(model)), y, rtol=0, atol=1e-10)
    assert torch.equal(logits(lora_lab.unmerge(model)), y)
    assert torch.equal(logits(lora_lab.eject(model)), base)


def test_the_part_that_is_not_named_stays_bit_for_bit() -> None:
    """k of GPT-2's c_attn, merged, of LoRA and of DoRA."""
    weights = build("gpt2").transformer.h[0].attn.c_attn.weight[:, 32:64]
    for variant in ("lora", "dora"):
        model = lora_lab.merge(adapted(variant=variant))
        assert_close(model.transformer.h[0].attn.c_attn.weight[:, 32:64], weights, rtol=1e-15, atol=0)


def two_adapters() -> Any:
    """ "a" has parts of c_attn, "b" all of it and another rank."""
    model = lora_lab.inject(build("gpt2"), 4, target_modules=["c_attn.q", "c_attn.v"], adapter="a")
    return randomise(lora_lab.inject(model, 3, target_modules=["c_attn"], adapter="b"))


def test_it_sums_and_combines_with_plain_adapters() -> None:
    model = two_adapters()
    layer = model.transformer.h[0].attn.c_attn
    both = 0.7 * layer.lora_delta("a") + 0.3 * layer.lora_delta("b")
    lora_lab.combine(model, {"a": 0.7, "b": 0.3}, into="c")
    assert_close(layer.lora_delta("c"), both, rtol=0, atol=1e-12)
    assert layer.lora_A["c"].shape[0] == 2 * 4 + 3
    summed, base = logits(lora_lab.use(model, ["a", "b"])), build("gpt2")
    with torch.no_grad():
        for path, adapted_layer in lora_layers(model).items():
            base.get_submodule(path).weight += sum(adapted_layer.lora_delta(name) for name in "ab").T
    assert_close(summed, logits(base), rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_rows_with_different_adapters_equal_the_rows_run_alone(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients, a part beside the whole, in one batch; of plain LoRA all rows in one batched product."""
    model = lora_lab.inject(build("gpt2"), 4, target_modules=["c_attn.q", "c_attn.v"], adapter="a", variant=variant)
    randomise(lora_lab.inject(model, 3, target_modules=["c_attn"], adapter="b"))
    layer = model.transformer.h[0].attn.c_attn
    x, rows = torch.randn(4, 5, 32, dtype=torch.float64), ["b", None, "a", "a"]
    for parameter in layer.lora_parameters("a").values():
        parameter.requires_grad_()
    alone = torch.cat([lora_lab.use(model, name).transformer.h[0].attn.c_attn(x[i : i + 1]) for i, name in enumerate(rows)])
    wanted = torch.autograd.grad(alone.square().sum(), layer.lora_parameters("a").values())
    batched: list[str] = []
    monkeypatch.setattr(type(layer), "_add_batched", lambda self, *args: batched.append(variant) or LoRA._add_batched(self, *args))
    with lora_lab.per_sample(model, rows):
        together = layer(x)
        grads = torch.autograd.grad(together.square().sum(), layer.lora_parameters("a").values())
    assert batched == (["lora"] if variant == "lora" else [])
    assert_close(together, alone, rtol=0, atol=1e-12)
    assert_close(grads, wanted, rtol=0, atol=1e-9)


def test_state_dicts_pickle_and_deepcopy_keep_the_parts() -> None:
    model = adapted()
    y = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = lora_lab.inject(build("gpt2"), 4, target_modules=MODELS["gpt2"][1])
    other.load_state_dict(model.state_dict())
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False), other):
        assert torch.equal(logits(again), y) and not torch.equal(logits(lora_lab.eject(again)), y)
    assert model.state_dict()["transformer.h.0.attn.c_attn.lora_B.default"].shape == (64, 4)


def test_it_compiles_without_a_break() -> None:
    fused, _ = pair_of_models()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert_close(y, fused(x), rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(model(x).square().sum(), fused.mixed.lora_B["default"])[0] for model in (compiled, fused)]
    assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_base_may_be_quantised(tmp_path: Path, variant: str) -> None:
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**LONG, "hidden_size": 64})).eval()
    lora_lab.quantize(model, "nf4")
    base, whole = logits(model), lora_lab.dequantize(copy.deepcopy(model))
    lora_lab.inject(model, 4, target_modules=["query_key_value.q", "query_key_value.v"], variant=variant)
    assert_close(logits(model), base, rtol=0, atol=1e-4)
    y = logits(randomise(model))
    lora_lab.save(model, tmp_path)
    assert_close(y, logits(lora_lab.load(whole, tmp_path)), rtol=0, atol=1e-4)
    assert not torch.allclose(y, base, atol=1e-2)


def test_16_bit_bases_have_float32_parts() -> None:
    model = lora_lab.inject(build("gpt2").bfloat16(), 4, target_modules=["c_attn.q"])
    layer = randomise(model).transformer.h[0].attn.c_attn
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_B["default"].dtype == layer.lora_B["default"].grad.dtype == torch.float32


# Files --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_save_and_we_read_the_parts_back(tmp_path: Path, name: str, variant: str) -> None:
    model = adapted(name, **VARIANTS[variant])
    y = logits(model)
    assert not torch.allclose(y, logits(build(name)))
    lora_lab.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_close(logits(theirs), y, rtol=0, atol=1e-9)
    again = lora_lab.load(build(name), tmp_path, trainable=True)
    assert torch.equal(logits(again), y)
    for path, layer in lora_layers(model).items():
        other: Any = again.get_submodule(path)
        assert parts_in(other, "default") == parts_in(layer, "default") and other.lora_scaling == layer.lora_scaling
        for container, tensor in layer.lora_parameters("default").items():
            assert torch.equal(other.lora_parameters("default")[container], tensor) and other.lora_parameters("default")[container].requires_grad
    assert str(lora_lab.count_parameters(again)) == str(lora_lab.count_parameters(model))
    lora_lab.save(again, tmp_path / "again")
    assert load_file(tmp_path / "again/adapter_model.safetensors").keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["r"] == json.loads((tmp_path / "adapter_config.json").read_text())["r"]


def test_a_file_may_replace_the_values_of_the_same_parts_only(tmp_path: Path) -> None:
    """Three parts and rank 5 with rsLoRA: sqrt(15) does not divide exactly, the scaling is the same all the same."""
    request = {"rank": 5, "target_modules": ["c_attn.q", "c_attn.k", "c_attn.v"], "rslora": True, "alpha": 7}
    model = adapted(**request)
    y = logits(model)
    lora_lab.save(model, tmp_path)
    parameters = [id(parameter) for parameter in model.parameters()]
    randomise(model)
    assert torch.equal(logits(lora_lab.load(model, tmp_path, replace=True)), y)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for other in (adapted(rank=15, target_modules=["c_attn"], rslora=True, alpha=7 * math.sqrt(3)), adapted(**{**request, "rank": 4})):
        before = logits(other)
        with pytest.raises(LoraLabError, match="in its values only; the (rank|parts) of 'transformer.h.0.attn.c_attn': .* here, .* in"):
            lora_lab.load(other, tmp_path, replace=True)
        assert torch.equal(logits(other), before)


def test_merging_the_checkpoint_is_merging_the_model(tmp_path: Path) -> None:
    """The streaming merge reads the file as PEFT does."""
    base = build("neox").float()
    base.save_pretrained(tmp_path / "base")
    model = randomise(lora_lab.inject(base, 4, target_modules=["query_key_value.q", "query_key_value.v"]))
    lora_lab.save(model, tmp_path / "adapter")
    lora_lab.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(merged), logits(model), rtol=0, atol=1e-3)


def test_an_attention_of_pytorch_in_peft_and_back(tmp_path: Path) -> None:
    """With an output projection of a higher rank, to which PEFT's file is filled up."""
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)).double().eval()

    model = lora_lab.inject(encoder(), 2, target_modules=["self_attn.q", "self_attn.v", "out_proj"], rank_pattern={"out_proj": 6})
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y = randomise(model)(x)
    lora_lab.save(model, tmp_path)
    assert_close(peft.PeftModel.from_pretrained(encoder(), tmp_path).train()(x), y, rtol=0, atol=1e-6)
    again: Any = lora_lab.load(encoder(), tmp_path)
    assert_close(again(x), y, rtol=0, atol=1e-12)
    assert again[0].self_attn.lora_A["default"].shape == (4, 16) and parts_in(again[0].self_attn, "default").names == ("q", "v")
    rewritten(tmp_path, lambda tensors, metadata: tensors["base_model.model.0.self_attn.lora_B.weight"].__setitem__((0, 5), 1e-3))
    with pytest.raises(LoraLabError, match="not zero from column 4 on"):
        lora_lab.load(encoder(), tmp_path)


def test_a_file_of_peft_is_a_plain_adapter(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(build("gpt2"), peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path)
    layer = lora_lab.load(build("gpt2"), tmp_path).transformer.h[0].attn.c_attn
    assert parts_in(layer, "default") is None and layer.lora_B["default"].shape == (96, 8)


def rewritten(folder: Path, change: Any) -> None:
    """The adapter file with its tensors and metadata changed."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


KEY = "base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"


def metadata_of(change: Any) -> Any:
    def rewrite(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        parts = json.loads(metadata["lora_lab_fused"])
        change(parts, parts["transformer.h.1.attn.c_attn"])
        metadata["lora_lab_fused"] = json.dumps(parts)

    return rewrite


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors, metadata: tensors[KEY].__setitem__((40, 0), 1e-3), "saved for parts, but B .* is not zero outside the blocks of q, v"),
    (metadata_of(lambda parts, own: own.update(block_rows=99)), r"of 99 outputs .* has 96"),
    (metadata_of(lambda parts, own: own.update(scaling=3.0)), "scaling 3"),
    (metadata_of(lambda parts, own: own.update(rank=5)), "rank 5"),
    (metadata_of(lambda parts, own: own["parts"].append(["w", [[20, 40]]])), "damaged"),
    (metadata_of(lambda parts, own: own.pop("blocks")), "damaged"),
    (metadata_of(lambda parts, own: parts.update(nowhere=own)), "describe parts of 'nowhere'"),
])  # fmt: skip
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    lora_lab.save(adapted(), tmp_path)
    rewritten(tmp_path, change)
    model = build("gpt2")
    with pytest.raises(LoraLabError, match=message):
        lora_lab.load(model, tmp_path)
    assert not lora_layers(model)


# Requests -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "rank", "targets", "count"), [
    ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 4, "qv", 393_216),  # LoRA paper, table 3: GPT-2 medium (printed 0.35M)
    ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 4, "qv", 737_280),  # GPT-2 large (printed 0.77M)
    ({"n_embd": 12288, "n_layer": 96, "n_head": 96}, 4, "qv", 18_874_368),  # table 5: GPT-3 175B
    ({"n_embd": 12288, "n_layer": 96, "n_head": 96}, 1, "qkv", 3 * 96 * 24_576),  # and of three matrices of rank 1
])  # fmt: skip
def test_the_counts_are_the_published_ones(config: dict[str, int], rank: int, targets: str, count: int) -> None:
    """The plain adapter in a file would be twice as many (with the zeros); all of c_attn with rank r is as many, and another function."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    names = [f"c_attn.{part}" for part in targets]
    assert lora_lab.plan(model, rank=rank, target_modules=names).parameters == count
    assert lora_lab.count_parameters(lora_lab.inject(model, rank, target_modules=names)).trainable == count


def test_one_pair_over_all_has_as_many_parameters_and_is_another_function() -> None:
    """litgpt#629: of GPT-2 with rank 4 both count 4 * 4 * width, but one A for q and v gives both the same four directions to read."""
    parts, whole = adapted(), adapted(target_modules=["c_attn"])
    assert lora_lab.count_parameters(parts).trainable == lora_lab.count_parameters(whole).trainable
    deltas = [model.transformer.h[0].attn.c_attn.lora_delta("default") for model in (parts, whole)]
    assert [int(torch.linalg.matrix_rank(delta)) for delta in deltas] == [8, 4]
    assert [bool(delta[32:64].any()) for delta in deltas] == [False, True]


def test_the_plan_shows_the_parts_and_how_they_are_counted() -> None:
    report = str(lora_lab.plan(build("phi-3"), rank=4, target_modules=["qkv_proj.q", "qkv_proj.v", "gate_up_proj.up", "o_proj"]))
    assert "qkv_proj.q+v        2 x rank 4 * (2 * 32 in + 48 out) =          896" in report
    assert "gate_up_proj.up     2 x rank 4 * (32 in + 48 out) =          640" in report
    dora = lora_lab.plan(build("gpt2"), rank=4, target_modules=["c_attn.q", "c_attn.v"], variant="dora")
    assert "2 x (rank 4 * (2 * 32 in + 64 out) + 64)" in str(dora) and dora.parameters == 2 * (4 * 128 + 64)


def test_layers_and_patterns_go_by_the_path_of_the_fused_layer() -> None:
    model = lora_lab.inject(build("gpt2"), 4, target_modules=["attn.c_attn.q", "0.attn.c_attn.v"], layers=[0], rank_pattern={"c_attn": 2})
    layer = model.transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].shape == (4, 32) and len(lora_layers(model)) == 1
    assert lora_lab.plan(build("gpt2"), rank=2, target_modules=["0.attn.c_attn.v", "1.attn.c_attn.q"]).layers[1].parts.names == ("q",)


def test_a_layer_of_that_name_goes_before_a_part() -> None:
    model = nn.ModuleDict({"qkv": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    assert [layer.parts for layer in lora_lab.plan(model, rank=2, target_modules=["qkv.q"]).layers] == [None]


@pytest.mark.parametrize(("request_", "message"), [
    ({"target_modules": ["c_attn.query"]}, r"the part 'query', but the parts of 'transformer.h.0.attn.c_attn' are q, k, v"),
    ({"target_modules": ["c_attn.q", "c_attn"]}, r"'c_attn' is all of 'transformer.h.0.attn.c_attn', of which q is named, too"),
    ({"target_modules": ["c_atn.q"]}, r"'c_atn.q' matches nothing"),
    ({"target_modules": ["wte.q"]}, r"a Embedding: only linear layers"),
    ({"target_modules": ["c_proj.q"]}, r"which of its 32 outputs are whose is not known here; say so with fused=\{'c_proj'"),
    ({"target_modules": ["c_attn.q"], "init": "pissa"}, r"init='pissa', but .* names only q of"),
    ({"target_modules": ["c_attn.q"], "lora_bias": True}, r"lora_bias=True, but .* names only q of"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_atn": {"q": 96}}}, r"names no part of 'c_atn', such as 'c_atn.q' \(did you mean 'c_attn'\?\)"),
    ({"target_modules": ["c_attn"], "fused": {"c_attn": {"q": 96}}}, r"names no part of 'c_attn'"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": {"q": 64, "k": 16}}}, r"has 96 outputs; the sizes make 80"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": {"q": [0, 1], "k": [1, 2]}}}, r"each number once"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": {"q": [0, 96]}}}, r"numbers from 0 to 95"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": {"q": 32, "k": [32]}}}, r"for every part its number of outputs"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": {"q": 0, "k": 96}}}, r"for every part its number of outputs"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": interleaved(2, {"q": 8, "v": 8})}}, r"has 96 outputs; the layout is one of 32"),
    ({"target_modules": ["c_attn.q"], "fused": {"c_attn": ["q", "k"]}}, r"expected of 'c_attn' a dict"),
    ({"target_modules": ["c_attn.q"], "fused": ["c_attn"]}, r"fused=\['c_attn'\]: expected a dict"),
])  # fmt: skip
def test_what_makes_no_sense_is_an_error_and_changes_nothing(request_: dict[str, Any], message: str) -> None:
    model = build("gpt2")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(LoraLabError, match=message):
        lora_lab.inject(model, 4, **request_)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before and not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
