"""LoRA on parameters themselves: stacks of experts, and whatever a module multiplies with in its own forward."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from small_models import randomise
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import lora_lab
from lora_lab import LoraLabError
from lora_lab.parameters import layer as parameters
from lora_lab.parameters import weight_sums
from lora_lab.parameters.layer import ParameterLoRA, ParameterOwner

NAMES = ["up", "down", "flat"]


class Experts(nn.Module):
    """Stacks in either orientation, a matrix and a vector, in a forward of its own that reads each stack once for every expert."""

    def __init__(self, transposed: bool = False, n: int = 3, width: int = 6, inner: int = 4) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(n, *((width, inner) if transposed else (inner, width))))
        self.flat = nn.Parameter(torch.randn(width, width))
        self.down = nn.Parameter(torch.randn(n, *((inner, width) if transposed else (width, inner))))
        self.bias = nn.Parameter(torch.randn(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        total = torch.zeros_like(x)
        for e in range(len(self.up)):
            up, down = (self.up[e], self.down[e]) if self.is_transposed else (self.up[e].T, self.down[e].T)
            total = total + torch.tanh(x @ up) @ down
        return self.proj(scale * total @ self.flat.T + self.bias)


def base(transposed: bool = False, **sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), Experts(transposed, **sizes)).double()


def adapted(transposed: bool = False, names: Any = NAMES, **request: Any) -> nn.Sequential:
    model = lora_lab.inject(base(transposed), rank=2, alpha=3, target_parameters=names, **{"target_modules": [], **request})
    return randomise(model, by=0.3)


def inputs() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(5, 6, dtype=torch.float64)


def dense(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """W + scaling * B A of every adapted parameter, by the formula of PEFT's ParamWrapper; with its history."""
    found = {}
    for path, layer in lora_lab.targets.lora_layers(model).items():
        if isinstance(layer, ParameterLoRA) and adapter in layer.lora_variant:
            A, B, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_scaling[adapter]
            rule = "or,ri->oi" if A.ndim == 2 else "eor,eri->eio" if layer.lora_transposed else "eor,eri->eoi"
            found[path.replace("lora_of_", "")] = layer.weight + scaling * torch.einsum(rule, B, A)
    return found


# The function -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_forward_and_gradients_are_those_of_the_parameters_replaced_by_W_plus_delta(transposed: bool) -> None:
    """Hu et al. 2021, equation 3, matrix by matrix; the stack [n, in, out] of a module that says is_transposed gets A^T B^T."""
    model, x = adapted(transposed), inputs().requires_grad_()
    weight = torch.randn(5, 6, dtype=torch.float64)
    assert not torch.allclose(model(x), base(transposed)(x))
    expected = functional_call(base(transposed), dense(model), (x,))
    assert_close(model(x), expected, rtol=0, atol=1e-12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *trained])
    assert_close(torch.autograd.grad((model(x) * weight).sum(), [x, *trained]), wanted, rtol=0, atol=1e-12)


def test_nothing_has_changed_yet_after_inject_and_nothing_is_left_after_eject() -> None:
    plain, x = base(), inputs()
    before, keys = plain(x), list(plain[1].__dict__)
    model = lora_lab.inject(plain, rank=2, target_parameters=NAMES, target_modules=[])
    assert torch.equal(model(x), before) and isinstance(model[1], Experts) and isinstance(model[1], ParameterOwner)
    lora_lab.eject(randomise(model))
    assert torch.equal(model(x), before) and type(model[1]) is Experts and list(model[1].__dict__) == keys
    assert list(model.state_dict()) == list(base().state_dict()) and all(parameter.requires_grad for parameter in model.parameters())


def test_only_the_adapters_train_and_the_module_shows_its_own_parameters() -> None:
    model = adapted()
    wanted = {f"1.lora_of_{name}.lora_{AB}.default" for name in NAMES for AB in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert model[1].up is model[1]._parameters["up"] and isinstance(model[1].up, nn.Parameter)
    assert set(base().state_dict()) < set(model.state_dict())
    model[1].up = replaced = nn.Parameter(torch.zeros_like(model[1].up))
    assert model[1].up is replaced and dict(model.named_parameters())["1.up"] is replaced
    with pytest.raises(TypeError, match="cannot assign"):
        model[1].up = torch.zeros(3)
    assert model.float()(inputs().float()).dtype == torch.float32


def test_the_sum_is_formed_once_however_often_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[Tensor] = []
    monkeypatch.setattr(parameters, "add_product", lambda *args: formed.append(weight_sums.add_product(*args)) or formed[-1])
    with torch.no_grad():
        adapted()(inputs())
    assert len(formed) == len(NAMES)


def test_backward_forms_the_sums_again_instead_of_keeping_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second copy of every expert of the model would be kept otherwise."""
    model, x, sums = adapted(), inputs().requires_grad_(), []

    def watched(*args: Tensor) -> Tensor:
        sums.append(weakref.ref(total := weight_sums.add_product(*args)))
        return total

    monkeypatch.setattr(parameters, "add_product", watched)
    y = model(x)
    gc.collect()
    assert len(sums) == 3 and all(total() is None for total in sums)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("changed", ["the weight", "the input"])
def test_a_change_between_forward_and_backward_is_noticed(changed: str) -> None:
    """As autograd does for what it keeps itself, so that gradients are never those of other values."""
    model, x = adapted(names=["up"]), inputs()
    y = model[1](x) + model[1](inputs().requires_grad_())
    with torch.no_grad():
        (model[1].up if changed == "the weight" else x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_loop_over_experts_gets_its_gradients_in_one_piece() -> None:
    """Indexing a stack n times would fill n stacks with zeros in backward, as it does in PEFT."""
    seen: list[Any] = []

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            taken = [self.w[2], self.w[torch.tensor(0)], self.w[-1]]
            seen.extend(part.grad_fn.name() for part in taken)
            return sum(x @ part.T for part in taken) + x @ self.w[1:3].sum(0).T + x @ self.w.mean(0).T

    model = randomise(lora_lab.inject(nn.Sequential(Loop()), rank=2, target_modules=[], target_parameters=["w"]))
    x = inputs()
    assert_close(model(x), functional_call(lora_lab.eject(copy.deepcopy(model)), dense(model), (x,)), rtol=0, atol=1e-12)
    assert set(seen[:3]) == {"UnbindBackward0"}
    wanted = torch.autograd.grad(functional_call(lora_lab.eject(copy.deepcopy(model)), dense(model), (x,)).square().sum(), list(dense_pairs(model)))
    assert_close(torch.autograd.grad(model(x).square().sum(), list(dense_pairs(model))), wanted, rtol=0, atol=1e-11)


def dense_pairs(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_other_threads_see_the_parameter_while_a_forward_runs() -> None:
    model, seen = adapted(), {}

    def look() -> None:
        seen["there"] = model[1].up

    class Looking(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            seen["here"] = model[1].up
            return x

    model[1].proj = Looking()
    model(inputs())
    assert seen["there"] is model[1].up and not torch.equal(seen["here"], model[1].up)


def test_a_module_that_calls_itself_keeps_its_update() -> None:
    class Twice(Experts):
        def forward(self, x: Tensor, again: bool = True) -> Tensor:  # type: ignore[override]
            return Experts.forward(self, self(x, again=False) if again else x)

    def twice() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), Twice()).double()

    model = randomise(lora_lab.inject(twice(), rank=2, target_modules=[], target_parameters=["up"]))
    assert_close(model(inputs()), functional_call(twice(), dense(model), (inputs(),)), rtol=0, atol=1e-12)


# Precision ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_16_bit_base_computes_with_what_a_merge_would_write(dtype: torch.dtype) -> None:
    """The sum in float32, rounded once: no rounding of the update by itself, whatever A and B are stored in."""
    torch.manual_seed(0)
    model = nn.Sequential(Experts(n=5, width=64, inner=48)).to(torch.bfloat16)
    randomise(lora_lab.inject(model, rank=4, alpha=3, target_modules=[], target_parameters=NAMES, dtype=dtype), by=0.05)
    part = model[0].lora_of_up
    assert part.lora_A["default"].dtype == dtype and part.lora_delta("default").dtype == torch.float32
    exact = (part.weight.double() + part.lora_delta("default").double()).to(torch.bfloat16)
    formed = part(part.weight).total
    assert formed.dtype == torch.bfloat16 and (formed != exact).float().mean() < 1e-3  # ties that float32 rounds the other way
    x = torch.randn(7, 64).to(torch.bfloat16)
    y = model(x)
    y.float().sum().backward()
    assert part.lora_A["default"].grad.dtype == dtype and part.lora_A["default"].grad.abs().sum() > 0
    with torch.no_grad():
        assert_close(lora_lab.merge(copy.deepcopy(model))(x), y, rtol=0.02, atol=0.02)


def test_16_bit_gradients_are_close_to_those_in_float64() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(Experts(n=5, width=64, inner=48))
    wide.load_state_dict(wide.bfloat16().state_dict())
    narrow = randomise(lora_lab.inject(copy.deepcopy(wide), rank=4, target_modules=[], target_parameters=["up"]), by=0.05)
    wide = lora_lab.inject(wide.double(), rank=4, target_modules=[], target_parameters=["up"])
    wide.load_state_dict(narrow.state_dict())
    x = torch.randn(7, 64).bfloat16()
    narrow(x).float().square().mean().backward()
    wide(x.double()).square().mean().backward()
    for own, exact in zip(dense_pairs(narrow), dense_pairs(wide), strict=True):
        assert (own.grad.double() - exact.grad).norm() < 0.03 * exact.grad.norm()


@pytest.mark.parametrize("limit", [1, 7, 40, 2**18])
def test_the_rounded_sum_has_the_gradients_of_the_sum_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setitem(weight_sums.ELEMENTS_AT_ONCE, "cpu", limit)
    W, left, right = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 5), (3, 4, 2), (3, 2, 5)))
    assert_close(weight_sums._RoundedSum.apply(W, left, right), W + left @ right, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(weight_sums._RoundedSum.apply, (W, left, right))
    assert torch.autograd.gradgradcheck(weight_sums._RoundedSum.apply, (W, left, right))


def test_autocast_does_not_round_the_sum_of_a_16_bit_base() -> None:
    part = adapted().bfloat16()[1].lora_of_up
    part.lora_A.float(), part.lora_B.float()
    wanted = part(part.weight).total
    weight = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weight).sum(), [part.lora_A["default"], part.lora_B["default"]])
    with torch.autocast("cpu", torch.bfloat16):
        total = part(part.weight).total
        assert torch.equal(total, wanted)
        again = torch.autograd.grad((total * weight).sum(), [part.lora_A["default"], part.lora_B["default"]])
    assert_close(again, gradients, rtol=0, atol=0)


def test_autocast_leaves_the_parameter_its_dtype() -> None:
    model, x = adapted().float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        formed = model[1].lora_of_up(model[1].up).total
        y = model(x)
    assert formed.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert_close(formed, model[1].lora_of_up(model[1].up).total, rtol=0, atol=0)
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in dense_pairs(model))


# PyTorch around it ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    model, x = adapted().to(dtype), inputs().to(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-10}
    assert_close(compiled(x), model(x), **tolerance)
    compiled(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in dense_pairs(model)]
    model.zero_grad()
    model(x).sum().backward()
    if dtype == torch.float64:
        assert_close(gradients, [parameter.grad for parameter in dense_pairs(model)], rtol=0, atol=1e-10)
    lora_lab.use(model, None)
    assert_close(compiled(x), model(x), **tolerance)  # the selection is looked at again


def test_torch_func_sees_through_it() -> None:
    model, x = adapted(), inputs()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.func.grad(lambda own: functional_call(model, own, (x,)).square().sum())({name: p.detach() for name, p in trained.items()})
    model(x).square().sum().backward()
    assert_close(gradients, {name: parameter.grad for name, parameter in trained.items()}, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_adapters_and_owners_of_their_own(clone: Any) -> None:
    model, x = adapted(), inputs()
    copied = clone(model)
    assert torch.equal(copied(x), model(x)) and type(copied[1]) is type(model[1])
    assert copied[1].lora_of_up.weight is copied[1].up
    before = model(x)
    randomise(copied, by=1.0)
    assert torch.equal(model(x), before) and not torch.allclose(copied(x), before)


def test_a_state_dict_goes_round() -> None:
    model, fresh = adapted(), lora_lab.inject(base(), rank=2, alpha=3, target_modules=[], target_parameters=NAMES)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs()), model(inputs()))


def test_checkpointing_recomputes_under_the_same_adapters_or_says_so() -> None:
    model, x = adapted(), inputs().requires_grad_()
    model(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in [x, *dense_pairs(model)]]
    x.grad = None
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert_close([parameter.grad for parameter in [x, *dense_pairs(model)]], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_recompute_with_another_adapter_fails(needs_grad: bool) -> None:
    """Also where the input has no gradient, as that of a first layer."""
    model, x = adapted(), inputs().requires_grad_(needs_grad)
    lora_lab.inject(model, rank=2, alpha=3, target_modules=[], target_parameters=NAMES, adapter="other", init="random")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = checkpoint(model[1], x, use_reentrant=False).square().sum()
    lora_lab.use(model, "default")
    with pytest.raises(LoraLabError, match="recomputed a layer with other adapters"):
        loss.backward()


def test_a_forward_that_checkpoints_a_part_of_itself_is_refused() -> None:
    """That part runs again when forward is over, and would find the parameter without its update: wrong gradients without a word."""

    class Inside(Experts):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return checkpoint(lambda y: torch.tanh(y @ self.flat.T), x, use_reentrant=False)

    model, x = nn.Sequential(Inside()).double(), inputs().requires_grad_()
    lora_lab.inject(model, rank=2, target_modules=[], target_parameters=["flat"], init="random")
    with pytest.raises(LoraLabError, match="checkpoint the whole module from outside"):
        model(x)
    with torch.no_grad():
        model(x)
    with torch.autograd.graph.save_on_cpu():
        checkpointed = nn.Sequential(Experts()).double()
        randomise(lora_lab.inject(checkpointed, rank=2, target_modules=[], target_parameters=["flat"]))(x).sum().backward()


# The verbs ------------------------------------------------------------------------------------------------------------------------


def several() -> nn.Sequential:
    """Adapters a and b on different parameters of one module, in different ranks, and a on a layer besides."""
    model = lora_lab.inject(base(), rank=2, target_parameters=["up", "down"], target_modules=["0"], adapter="a")
    lora_lab.inject(model, rank=3, alpha=5, target_parameters=["up", "flat"], target_modules=[], adapter="b")
    return randomise(model, by=0.3)


def test_adapters_are_used_summed_and_switched_off() -> None:
    model, x = several(), inputs()
    lora_lab.use(model, ["a", "b"])
    plain = base()
    plain[0].load_state_dict(lora_lab.merge(lora_lab.use(copy.deepcopy(model), "a"))[0].state_dict())
    own = dict(plain.named_parameters())
    deltas = [dense(model, name) for name in ("a", "b")]
    summed = {name: own[name] + sum(delta[name] - own[name] for delta in deltas if name in delta) for name in {**deltas[0], **deltas[1]}}
    assert_close(model(x), functional_call(plain, summed, (x,)), rtol=0, atol=1e-12)
    with lora_lab.disabled(model):
        assert torch.equal(model(x), base()(x))
    lora_lab.use(model, "b")
    assert_close(model(x), functional_call(base(), deltas[1], (x,)), rtol=0, atol=1e-12)
    assert lora_lab.targets.adapter_names(model) == ["a", "b"]


def test_merge_adds_the_update_matrix_by_matrix_and_unmerge_puts_the_bits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_lab.merging, "ELEMENTS_AT_ONCE", 10)  # blocks that begin and end inside a matrix
    for transposed in (False, True):
        model, x = adapted(transposed), inputs()
        before, bits, expected = model(x), {name: p.clone() for name, p in base(transposed).named_parameters()}, dense(model)
        lora_lab.merge(model)
        assert type(model[1]) is Experts and set(model.state_dict()) == set(bits)
        for name, parameter in model.named_parameters():
            assert_close(parameter, expected.get(name, bits[name]), rtol=0, atol=1e-12)
        assert_close(model(x), before, rtol=0, atol=1e-12)
        with pytest.raises(LoraLabError, match="merged"):
            lora_lab.save(model, "nowhere")
        lora_lab.unmerge(model)
        assert all(torch.equal(model.get_parameter(name), values) for name, values in bits.items())
        assert torch.equal(model(x), before) and isinstance(model[1], ParameterOwner)


def test_merging_for_good_leaves_a_plain_model_and_nan_is_refused() -> None:
    model, x = adapted(), inputs()
    before = model(x)
    lora_lab.eject(lora_lab.merge(model, restorable=False))
    assert_close(model(x), before, rtol=0, atol=1e-12)
    model = adapted()
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[1].lora_of_down.lora_B["default"][1, 2, 0] = float("nan")
    with pytest.raises(LoraLabError, match="lora_of_down.*not finite"):
        lora_lab.merge(model)
    assert torch.equal(model[1].down, kept["1.down"]) and isinstance(model[1], ParameterOwner)


def test_a_tied_parameter_is_merged_only_where_it_is_untied() -> None:
    model = nn.ModuleDict({"a": Experts(), "b": Experts()}).double()
    model["b"].up = model["a"].up
    randomise(lora_lab.inject(model, rank=2, target_modules=[], target_parameters=["a.up"]))
    x = inputs()
    here, there = model["a"](x), model["b"](x)
    with pytest.raises(LoraLabError, match="shares its up"):
        lora_lab.merge(model)
    lora_lab.merge(model, untie=True)
    assert_close(model["a"](x), here, rtol=0, atol=1e-12)
    assert torch.equal(model["b"](x), there)
    lora_lab.unmerge(model)
    assert model["a"].up is model["b"].up and torch.equal(model["a"](x), here)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_combined_adapters_have_the_weighted_sum_of_the_updates(tmp_path, method: str) -> None:
    model, x = several(), inputs()
    wanted = {path: 0.7 * layer.lora_delta("a") * ("a" in layer.lora_variant) if "b" not in layer.lora_variant else
              sum(weight * layer.lora_delta(name) for name, weight in (("a", 0.7), ("b", -0.4)) if name in layer.lora_variant)
              for path, layer in lora_lab.targets.lora_layers(model).items()}  # fmt: skip
    lora_lab.combine(model, {"a": 0.7, "b": -0.4}, into="c", method=method, **({} if method == "cat" else {"rank": 6}))
    for path, layer in lora_lab.targets.lora_layers(model).items():
        assert_close(layer.lora_delta("c"), wanted[path], rtol=0, atol=1e-12)
    assert lora_lab.combine_error(model, "c") < 1e-12
    lora_lab.save(model, tmp_path, adapter="c")
    again = lora_lab.load(base(), tmp_path)
    assert_close(again(x), model(x), rtol=0, atol=1e-12)


def test_combine_by_svd_is_the_best_of_its_rank_for_each_matrix() -> None:
    """Eckart and Young 1936."""
    model = lora_lab.combine(several(), {"a": 1.0, "b": 1.0}, into="c", method="svd", rank=2)
    part = model[1].lora_of_up
    exact, own = part.lora_delta("a") + part.lora_delta("b"), part.lora_delta("c")
    for whole, best in zip(exact, own, strict=True):
        assert_close((whole - best).norm(), torch.linalg.svdvals(whole)[2:].norm(), rtol=1e-9, atol=1e-12)
    assert 0 < lora_lab.combine_error(model, "c") < 1


def test_rows_of_a_batch_cannot_have_different_parameters() -> None:
    model, x = several(), inputs()
    before = model(x)
    with pytest.raises(LoraLabError, match="'b' adapts the parameter '1.up'"), lora_lab.per_sample(model, [None, "b", None, None, "b"]):
        raise AssertionError("nothing may run")
    assert torch.equal(model(x), before)
    lora_lab.inject(model, rank=2, target_modules=["0"], adapter="layer", init="random")
    with lora_lab.per_sample(model, ["layer", None, None, None, None]):  # rows without an adapter on a parameter are rows as any other
        assert torch.equal(model(x)[1:], base()(x)[1:]) and not torch.allclose(model(x)[:1], base()(x)[:1])


def test_counts_plan_and_meta_device_agree() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6), Experts())
    plan = lora_lab.plan(model, rank=2, target_modules=["0"], target_parameters=NAMES, rank_pattern={"down": 5})
    assert [(layer.path, layer.rank, layer.stack, layer.parameters) for layer in plan.layers] == [
        ("0", 2, 0, 24), ("1.up", 2, 3, 60), ("1.flat", 2, 1, 24), ("1.down", 5, 3, 150)]  # fmt: skip
    assert "3 * rank 5 * (4 in + 6 out)" in str(plan)
    lora_lab.inject(model, rank=2, target_modules=["0"], target_parameters=NAMES, rank_pattern={"down": 5})
    assert lora_lab.count_parameters(model).trainable == plan.parameters == 258
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "down" in lora_lab.summary(model) and "[3, 5, 4]" in lora_lab.summary(model)


def test_every_expert_begins_as_a_layer_of_its_own() -> None:
    """A uniform in +-1/sqrt(in), as nn.Linear's weight; "gaussian" has the deviation 1/r, not 1/(n r)."""
    torch.manual_seed(0)
    model = nn.Sequential(Experts(n=64, width=100, inner=50))
    lora_lab.inject(model, rank=4, target_modules=[], target_parameters=["up"], adapter="k")
    lora_lab.inject(model, rank=4, target_modules=[], target_parameters=["up"], adapter="g", init="gaussian")
    kaiming, gaussian = model[0].lora_of_up.lora_A["k"], model[0].lora_of_up.lora_A["g"]
    assert 0.0999 < kaiming.abs().max() < 0.1 and 0.24 < gaussian.std() < 0.26
    assert not model[0].lora_of_up.lora_B["k"].any()
    lora_lab.inject(model, rank=4, target_modules=[], target_parameters=["up"], adapter="o", init="orthogonal", freeze_A=True)
    part = model[0].lora_of_up
    assert part.lora_B["o"].any() and part.lora_delta("o").abs().max() < 1e-5
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_of_up.lora_B.o"]


def test_spectra_and_overlaps_have_a_line_for_each_matrix() -> None:
    model = several()
    report = lora_lab.spectra.spectra(model, "b")
    assert [layer.path for layer in report.layers] == ["1.up[0]", "1.up[1]", "1.up[2]", "1.flat"]
    part = model[1].lora_of_up
    assert_close(torch.tensor(report.layers[1].values[:3]).double(), torch.linalg.svdvals(part.lora_delta("b")[1])[:3], rtol=1e-5, atol=1e-6)
    assert [path for path, _ in lora_lab.spectra.overlaps(model, "a", "b").layers] == ["1.up[0]", "1.up[1]", "1.up[2]"]
    turned = lora_lab.spectra.spectra(adapted(transposed=True))
    straight = [layer.amplification for layer in turned.layers]
    assert all(size.weight_norm > 0 and size.factor > 0 for size in straight)


def test_training_moves_the_adapter_and_nothing_else() -> None:
    model, x = adapted(), inputs()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(lora_lab.parameter_groups(model, 1e-2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(model.get_parameter(name), values) for name, values in frozen.items())


# Requests -------------------------------------------------------------------------------------------------------------------------


def test_layers_and_exclude_modules_choose_among_parameters_too() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Experts(), Experts()]), "head": Experts()})
    paths = lambda **request: [layer.path for layer in lora_lab.plan(model, target_modules=[], target_parameters=["up"], **request).layers]  # noqa: E731
    assert paths() == ["layers.0.up", "layers.1.up", "head.up"]
    assert paths(layers=[1]) == ["layers.1.up"]
    assert paths(exclude_modules=["head", "0.up"]) == ["layers.1.up"]
    assert paths(modules_to_save=["head"]) == ["layers.0.up", "layers.1.up"]
    with pytest.raises(LoraLabError, match="leave no layer to adapt"):
        paths(exclude_modules=["layers", "head"])


def test_a_linear_layer_can_be_adapted_by_its_weight() -> None:
    """As in PEFT; the file is that of the layer."""
    model, x = adapted(names=["0.weight"]), inputs()
    assert_close(model(x), functional_call(base(), dense(model), (x,)), rtol=0, atol=1e-12)
    assert isinstance(model[0], nn.Linear) and [type(layer) for layer in lora_lab.targets.lora_layers(model).values()] == [ParameterLoRA]


def test_attention_and_embedding_can_be_adapted_by_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "words": nn.Embedding(11, 8)}).double().eval()
    plain = copy.deepcopy(model)
    randomise(lora_lab.inject(model, rank=2, target_modules=[], target_parameters=["in_proj_weight", "words.weight"]))
    x, ids = torch.randn(2, 5, 8, dtype=torch.float64), torch.randint(0, 11, (2, 5))
    values = dense(model)
    wanted = functional_call(plain["attention"], {"in_proj_weight": values["attention.in_proj_weight"]}, (x, x, x))[0]
    with torch.no_grad():
        assert_close(model["attention"](x, x, x)[0], wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(wanted, plain["attention"](x, x, x)[0])
    assert_close(model["words"](ids), values["words.weight"][ids], rtol=0, atol=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name that matches nothing": ({"target_parameters": ["upp"]}, r"'upp' matches nothing.\n.*up, flat, down.*did you mean 'up'"),
    "a part of a name": ({"target_parameters": ["own"]}, "'own' matches nothing"),
    "a module": ({"target_parameters": ["1"]}, r"'1' is a Experts: name its parameters, 1.up, 1.flat, 1.down, 1.bias"),
    "a module without parameters": ({"target_parameters": ["2"]}, "'2' is a Dropout without parameters"),
    "a buffer": ({"target_parameters": ["3.table"]}, "'3.table' is a Tensor, no parameter"),
    "a text": ({"target_parameters": "up"}, "expected a list of names"),
    "a number": ({"target_parameters": [3]}, "expected a list of names"),
    "a vector": ({"target_parameters": ["up", "1.bias"]}, r"'1.bias' has shape \[6\]: expected a matrix"),
    "four dimensions": ({"target_parameters": ["4.weight"]}, r"'4.weight' has shape \[2, 2, 1, 1\]"),
    "whole numbers": ({"target_parameters": ["3.codes"]}, "torch.uint8, a quantised weight"),
    "eight bits": ({"target_parameters": ["3.eight"]}, "torch.float8_e4m3fn, a quantised weight"),
    "an LSTM": ({"target_parameters": ["5.weight_ih_l0"]}, "LSTM, which computes with a list of its weights"),
    "a list of parameters": ({"target_parameters": ["6.0"]}, "ParameterList, which has no forward"),
    "an attention's output": ({"target_parameters": ["out_proj.weight"]}, "without a call of its own"),
    "dropout": ({"target_parameters": ["up"], "dropout": 0.1}, "dropout=0.1, but '1.up' is a parameter"),
    "DoRA": ({"target_parameters": ["up"], "variant": "dora"}, "variant='dora', but"),
    "a bias": ({"target_parameters": ["up"], "lora_bias": True}, "lora_bias=True, but"),
    "PiSSA": ({"target_parameters": ["up"], "init": "pissa"}, "init='pissa', but"),
    "layer and weight": ({"target_parameters": ["0.weight"], "target_modules": ["0"]}, "adapted as a layer, too"),
    "attention and weight": ({"target_parameters": ["in_proj_weight"], "target_modules": r"7\.out_proj"}, "adapt both with target_modules=.'7'."),
    "a pattern for nothing": ({"target_parameters": ["up"], "rank_pattern": {"down": 3}}, "'down' matches none"),
    "no parameter and no module": ({"target_parameters": []}, r"target_modules=\[\] names no layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_before_anything_is_changed(case: str) -> None:
    torch.manual_seed(0)
    odd = nn.Module()
    odd.register_buffer("table", torch.zeros(2, 2))
    odd.codes = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    odd.eight = nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    more = [nn.Dropout(), odd, nn.Conv2d(2, 2, 1), nn.LSTM(2, 2), nn.ParameterList([torch.randn(2, 2)]), nn.MultiheadAttention(4, 2)]
    model = nn.Sequential(*base(), *more)
    before, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    request, message = REFUSED[case]
    for verb in (lora_lab.plan, lora_lab.inject):
        with pytest.raises(LoraLabError, match=message):
            verb(model, **{"rank": 2, "target_modules": [], **request})
    assert [type(module) for module in model.modules()] == classes and list(model.state_dict()) == list(before)


def test_one_weight_is_adapted_as_a_layer_or_as_a_parameter() -> None:
    layer = lora_lab.inject(base(), target_modules=["0"], adapter="a")
    with pytest.raises(LoraLabError, match="'0.weight' is of a layer that is adapted itself"):
        lora_lab.inject(layer, target_modules=[], target_parameters=["0.weight"], adapter="b")
    weight = lora_lab.inject(base(), target_modules=[], target_parameters=["0.weight"], adapter="a")
    with pytest.raises(LoraLabError, match="'0' cannot be adapted as a layer: an adapter is on its parameter 'weight'"):
        lora_lab.inject(weight, target_modules=["0"], adapter="b")
    with pytest.raises(LoraLabError, match="carries LoRA adapters"):
        lora_lab.quantize(weight.float())
    computed = base()
    parametrize.register_parametrization(computed[0], "weight", nn.Identity())
    with pytest.raises(LoraLabError, match="computed by a parametrisation"):
        lora_lab.inject(computed, target_modules=[], target_parameters=["0.weight"])
    with pytest.raises(LoraLabError, match="quantised to int8, whose weight is adapted with target_modules"):
        lora_lab.inject(lora_lab.quantize(base().float(), "int8"), target_modules=[], target_parameters=["0.weight"])
    around = base()
    around[1].forward = around[1].forward
    with pytest.raises(LoraLabError, match="forward of its Experts was replaced"):
        lora_lab.inject(around, target_modules=[], target_parameters=["up"])
    taken = base()
    taken[1].lora_of_up = 3
    with pytest.raises(LoraLabError, match="has an attribute 'lora_of_up'"):
        lora_lab.inject(taken, target_modules=[], target_parameters=["up"])
