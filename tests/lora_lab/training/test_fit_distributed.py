"""Several processes train what one would: DDP and FSDP2 over gloo, here with two. Starting them is what takes the time, so each start does much."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import t5_tools
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port, refused, start
from safetensors.torch import load_file
from tiny_workshop import (
    QUIET,
    VOCABULARY,
    OverFeatures,
    chat_tokenizer,
    forgotten,
    our_llama,
    same_bits,
    text_rows,
    their_llama,
    token_rows,
    weights,
)

import lora_lab
from lora_lab import LoraLabError
from lora_lab.__main__ import main
from lora_lab.models import loading
from lora_lab.training import TrainConfig, evaluate, fit, shard, snapshots
from lora_lab.training.batches import count_steps, step_batches
from lora_lab.training.distributed import World, own_device, world
from lora_lab.training.dtensors import piece
from lora_lab.training.loop import Run
from lora_lab.training.precision import PRECISIONS, store_in
from lora_lab.wrapping import gathered

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed with gloo")
ROOT = Path(lora_lab.__file__).parent.parent
ROWS, HELD_OUT = token_rows(13), token_rows(5, seed=5)  # 7 micro-batches of 2 rows, 3 of the held-out: neither divides by two


def adapted(make: Callable[[], Any] = our_llama, rank: int = 2, **request: Any) -> Any:
    torch.manual_seed(1)
    return lora_lab.inject(make(), rank=rank, init="random", **request)


def quantised() -> Any:
    return adapted(lambda: lora_lab.quantize(our_llama(), "nf4"))


def with_a_weight_nobody_asks() -> Any:
    """It requires grad, and no loss depends on it."""
    model = adapted()
    model.model.idle = torch.nn.Linear(3, 3)
    return model


def tied() -> Any:
    return our_llama(tie_word_embeddings=True)


def encoder_decoder() -> Any:
    """In float64: with these weights T5 makes a rounding in the first step a difference of 1e-3 in the eighth."""
    return adapted(lambda: t5_tools.pair("1.1", vocab_size=VOCABULARY)[0].double())


def settings(**changes: Any) -> dict[str, Any]:
    return {"epochs": 2, "micro_batch_size": 2, "learning_rate": 0.01, "eval_every": 3, **QUIET, **changes}


PLAIN = {"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 0.1}  # AdamW and clipping would hide a gradient that is too large
# (kind, model, settings): runs in which two processes compute what one does
RUNS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "ddp": ("ddp", adapted, {}),
    "fsdp": ("fsdp", adapted, {}),
    "ddp, accumulating, checkpointing": ("ddp", adapted, {"grad_accum_steps": 2, "gradient_checkpointing": True, **PLAIN}),
    "fsdp, accumulating, checkpointing": ("fsdp", adapted, {"grad_accum_steps": 2, "gradient_checkpointing": True, **PLAIN}),
    "ddp, transformers, checkpointing": ("ddp", lambda: adapted(their_llama), {"gradient_checkpointing": True}),
    "fsdp, transformers, checkpointing": ("fsdp", lambda: adapted(their_llama), {"gradient_checkpointing": True}),
    "ddp, bf16-mixed": ("ddp", adapted, {"precision": "bf16-mixed"}),
    "fsdp, bf16-mixed": ("fsdp", adapted, {"precision": "bf16-mixed"}),
    "ddp, fp16-mixed": ("ddp", adapted, {"precision": "fp16-mixed"}),
    "fsdp, fp16-mixed": ("fsdp", adapted, {"precision": "fp16-mixed"}),
    "ddp, all weights": ("ddp", tied, {"optimizer": "adafactor"}),
    "fsdp, all weights": ("fsdp", tied, {"optimizer": "lion", "learning_rate": 1e-3}),
    "ddp, nf4": ("ddp", quantised, {"precision": "bf16-mixed"}),
    "ddp, packed": ("ddp", adapted, {"packing": True, "max_tokens": 40}),
    "ddp, an unused weight": ("ddp", with_a_weight_nobody_asks, {}),
    "fsdp, an unused weight": ("fsdp", with_a_weight_nobody_asks, {}),
    "fsdp, an encoder-decoder": ("fsdp", encoder_decoder, {"gradient_checkpointing": True}),
    "fsdp, less rows than processes": ("fsdp", lambda: adapted(rank=1, variant="dora"), {"lora_plus_ratio": 4.0}),
    "fsdp, best weights": ("fsdp", tied, {"keep_best": True, "eval_every": 1, "learning_rate": 0.05}),
}  # fmt: skip


def outcome(model: Any, result: Any) -> dict[str, Any]:
    trained = {name: gathered(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": result.losses, "eval_losses": result.eval_losses, "weights": trained, "best": result.best_step,
            "counts": (result.tokens, result.computed_tokens, result.label_tokens, result.steps, result.skipped_steps)}  # fmt: skip


# Stories: what two processes do, and what they have found --------------------------------------------------------------------------


def curves(rank: int, port: int, folder: Path) -> None:
    start(rank, port)
    found: dict[str, Any] = {}
    for name, (kind, make, changes) in RUNS.items():
        model = make()
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(rank)  # process 1 begins with other values, and has to take process 0's
        found[name] = outcome(model, fit(model, ROWS, settings(distributed=kind, **changes), eval_data=HELD_OUT))
    for kind in ("ddp", "fsdp"):
        model = our_llama()
        found[f"{kind}, bf16"] = outcome(model, fit(model, ROWS, settings(distributed=kind, precision="bf16"), eval_data=HELD_OUT))
    model: Any = our_llama()
    model.model.norm = torch.nn.Sequential(model.model.norm, OverFeatures(model.config.hidden_size))
    found["statistics"] = outcome(model, fit(model, ROWS, settings(distributed="ddp"), eval_data=HELD_OUT)), dict(model.named_buffers())
    model = adapted(their_llama)
    found["the same object"] = shard(model, "bf16-mixed") is model
    found["held"] = sum(piece(p).numel() for p in model.parameters()), sum(p.numel() for p in model.parameters())
    found["asked for nothing"] = outcome(model, fit(model, ROWS, settings(precision="bf16-mixed"), eval_data=HELD_OUT))
    found["evaluated"] = evaluate(model, HELD_OUT, TrainConfig(precision="bf16-mixed", micro_batch_size=2, progress=False))
    lora_lab.save(model, folder / f"adapter-{rank}")
    found["logits"] = model(input_ids=torch.arange(6)[None]).logits.detach()
    torch.save(found, folder / f"curves-{rank}.pt")
    world().leave()


class PowerCut(Exception):
    pass


def stops(rank: int, port: int, folder: Path) -> None:
    """Runs that stop, go on, and are refused."""
    start(rank, port)
    found: dict[str, Any] = {}
    whole_step = Run.backward

    def fails_in(step: int, with_error: Callable[[], None]) -> None:
        def backward(run: Run, *args: Any) -> float:
            if run.result.steps == step:
                with_error()
            return whole_step(run, *args)

        Run.backward = backward  # type: ignore[method-assign]

    def cut() -> None:
        raise PowerCut

    def pressed() -> None:
        if rank == 1:  # one of them hears of it first
            signal.raise_signal(signal.SIGINT)

    def run(name: str, make: Callable[[], Any] = lambda: adapted(dropout=0.1), **changes: Any) -> None:
        model = make()
        config = settings(save_every=2, output_dir=folder / name, **changes)
        found[name] = outcome(model, fit(model, ROWS, config, eval_data=HELD_OUT))

    for kind in ("ddp", "fsdp"):
        run(f"{kind} at once", distributed=kind, keep_best=True)
        fails_in(5, cut)
        try:
            run(f"{kind} in parts", distributed=kind, keep_best=True)
        except PowerCut:
            Run.backward = whole_step  # type: ignore[method-assign]
        run(f"{kind} in parts", lambda: forgotten(adapted(dropout=0.1)), distributed=kind, keep_best=True, resume=True)
    fails_in(3, cut)
    try:
        run("begun by two", adapted, distributed="fsdp")
    except PowerCut:
        Run.backward = whole_step  # type: ignore[method-assign]
    fails_in(2, pressed)
    found["interrupted"] = refused(lambda: run("interrupted", distributed="ddp"))
    Run.backward = whole_step  # type: ignore[method-assign]

    def asks(rows: Any = ROWS, make: Callable[[], Any] = adapted, **changes: Any) -> str:
        return refused(lambda: fit(make(), rows, settings(**changes), eval_data=HELD_OUT))

    def broken() -> Any:
        model = adapted()
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    def other_base() -> Any:
        return adapted(lambda: our_llama(seed=1 + rank))

    (folder / "file").touch()
    found["messages"] = {
        "nan, ddp": asks(make=broken), "nan, fsdp": asks(make=broken, distributed="fsdp"),
        "rate": asks(learning_rate=0.01 + rank), "rows": asks(rows=ROWS[rank:]), "base": asks(make=other_base),
        "base, fsdp": asks(make=other_base, distributed="fsdp"), "few rows": asks(rows=ROWS[:1]),
        "in backward": asks(optimizer_in_backward=True, max_grad_norm=None), "adafactor": asks(optimizer="adafactor", distributed="fsdp"),
        "offload": asks(activation_offload=True, distributed="fsdp"),
        "wrapped": asks(make=lambda: torch.nn.parallel.DistributedDataParallel(adapted())),
        "two dtypes": asks(make=lambda: adapted(modules_to_save=["norm"]), precision="bf16", distributed="fsdp"),
        "divided twice": refused(lambda: shard(shard(adapted()))), "ddp of pieces": asks(make=lambda: shard(adapted()), distributed="ddp"),
        "other precision": asks(make=lambda: shard(adapted()), precision="bf16-mixed"),
        "disk": asks(output_dir=folder / "file" / "run"), "unfinished": asks(output_dir=folder / "begun by two"),
    }  # fmt: skip
    torch.save(found, folder / f"stops-{rank}.pt")
    world().leave()


def breaks(rank: int, port: int, folder: Path, kind: str) -> None:
    """Process 1 fails alone in its second step; process 0 waits for its gradients."""
    start(rank, port)
    whole_step = Run.backward

    def backward(run: Run, *args: Any) -> float:
        if run.result.steps == 1 and rank == 1:
            raise LoraLabError("the dog ate it")
        return whole_step(run, *args)

    Run.backward = backward  # type: ignore[method-assign]
    (folder / f"{kind}-{rank}").write_text(refused(lambda: fit(adapted(), ROWS, settings(distributed=kind, eval_every=None))))


def told(story: Callable[..., None], folder: Path) -> list[dict[str, Any]]:
    mp.spawn(story, args=(free_port(), folder), nprocs=2)
    return [{**torch.load(folder / f"{story.__name__}-{rank}.pt"), "folder": folder} for rank in (0, 1)]


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(curves, tmp_path_factory.mktemp("curves"))


@pytest.fixture(scope="module")
def stop(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(stops, tmp_path_factory.mktemp("stops"))


def alone(make: Callable[[], Any], **changes: Any) -> dict[str, Any]:
    """One process with the same rows in each step."""
    model = make()
    accumulated = {**changes, "grad_accum_steps": 2 * changes.get("grad_accum_steps", 1)}
    return outcome(model, fit(model, ROWS, settings(**accumulated), eval_data=HELD_OUT))


def check_same(one: dict[str, Any], two: dict[str, Any], loss: float = 1e-4, weight: float = 1e-5) -> None:
    assert two["losses"] == pytest.approx(one["losses"], rel=loss) and two["eval_losses"] == pytest.approx(one["eval_losses"], rel=loss)
    assert (two["counts"], two["best"]) == (one["counts"], one["best"]) and two["weights"].keys() == one["weights"].keys()
    for name, values in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], values, rtol=weight, atol=weight, msg=lambda text, name=name: f"{name}: {text}")


# One curve ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_loss_curve_of_one(curve: list[dict[str, Any]], name: str) -> None:
    """The same rows in each step, and each row's share of the step's labelled tokens. What process 1 began with must not count."""
    _, make, changes = RUNS[name]
    one = alone(make, **changes)
    assert one["eval_losses"][-1] != pytest.approx(one["eval_losses"][0], rel=3e-4)  # it learns something
    for two in curve:
        check_same(one, two[name])
    assert same_bits(curve[0][name]["weights"], curve[1][name]["weights"])


def test_half_of_the_rows_have_another_curve() -> None:
    """That the test above can fail: what process 0 would do without process 1, or with averages of averages."""
    rows, config = token_rows(13), TrainConfig(**settings())
    steps = [*zip(step_batches(rows, config, 2), range(4), strict=False)]
    assert all(len({sum(label != -100 for i in batch for label in rows[i]["labels"][1:]) for batch in step}) == len(step) for step, _ in steps)
    one, half = alone(adapted), adapted()
    result = fit(half, rows, settings(max_steps=8), eval_data=HELD_OUT)
    assert result.losses != pytest.approx(one["losses"], rel=1e-2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_weights_of_16_bit_are_rounded_alike_in_all_processes(curve: list[dict[str, Any]], kind: str) -> None:
    """By chance, and under DDP by the same chance everywhere: each process takes the whole step."""
    one, two = alone(our_llama, precision="bf16"), curve[0][f"{kind}, bf16"]
    assert two["losses"] == pytest.approx(one["losses"], rel=0.03) and two["losses"][-1] < two["losses"][0]
    assert same_bits(two["weights"], curve[1][f"{kind}, bf16"]["weights"])


def test_running_statistics_are_the_first_process_s_everywhere(curve: list[dict[str, Any]]) -> None:
    """Each process sees other rows; evaluated by all of them, the model has to be one model."""
    (first, buffers), (second, others) = (found["statistics"] for found in curve)
    assert same_bits(buffers, others) and first["eval_losses"] == second["eval_losses"]
    assert not torch.equal(buffers["model.norm.1.norm.running_mean"], torch.zeros(16))


def test_a_model_that_was_divided_before_is_trained_as_it_is_and_saved_whole(curve: list[dict[str, Any]]) -> None:
    """`shard`, `fit`, `evaluate`, `save`: the adapter loads into a model that is whole, and computes the same."""
    found = curve[0]
    assert found["the same object"]
    for held, of in (each["held"] for each in curve):
        assert held == pytest.approx(of / 2, rel=0.02)
    check_same(alone(lambda: adapted(their_llama), precision="bf16-mixed"), found["asked for nothing"])
    assert found["evaluated"] == pytest.approx(found["asked for nothing"]["eval_losses"][-1], rel=1e-4)
    assert same_bits(*(load_file(found["folder"] / f"adapter-{rank}" / "adapter_model.safetensors") for rank in (0, 1)))
    model = lora_lab.load(their_llama(), found["folder"] / "adapter-0", trainable=True)  # as there: a layer that trains adds in another order
    store_in(PRECISIONS["bf16-mixed"], model)
    torch.testing.assert_close(model(input_ids=torch.arange(6)[None]).logits.detach(), found["logits"])
    assert not torch.allclose(found["logits"], lora_lab.eject(model)(input_ids=torch.arange(6)[None]).logits, rtol=0.1)


# Stopping, going on, files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_that_were_stopped_and_resumed_are_two_that_were_not(stop: list[dict[str, Any]], kind: str) -> None:
    """With dropout: each process goes on with its own random numbers."""
    for found in stop:
        once, parts = found[f"{kind} at once"], found[f"{kind} in parts"]
        assert same_bits(parts["weights"], once["weights"])
        assert all(parts[name] == once[name] for name in ("losses", "eval_losses", "counts", "best"))
    ours, theirs = (snapshots.newest(stop[0]["folder"] / f"{kind} {name}") for name in ("in parts", "at once"))
    assert same_bits(ours.tensors, theirs.tensors)
    random = [ours.tensors[f"random/{rank}/cpu"] for rank in (0, 1)]
    assert not torch.equal(*random)
    assert (ours.tensors["weights/model.layers.0.mlp.up_proj.lora_A.default"].shape) == (2, 16)


def test_what_two_processes_began_one_can_finish(stop: list[dict[str, Any]], tmp_path: Path) -> None:
    """Snapshots hold whole tensors. One process takes twice the micro-batches, or it would be another run."""
    model, folder = forgotten(adapted()), stop[0]["folder"] / "begun by two"
    with pytest.raises(LoraLabError, match=r"grad_accum_steps \* processes=1: the run began with 2"):
        fit(model, ROWS, settings(save_every=2, output_dir=folder, resume=True), eval_data=HELD_OUT)
    with pytest.warns(UserWarning, match="began with processes 2, this is 1: it goes on, but not bit for bit"):
        result = fit(model, ROWS, settings(save_every=2, output_dir=folder, resume=True, grad_accum_steps=2), eval_data=HELD_OUT)
    check_same(alone(adapted), outcome(model, result))


def test_only_the_first_process_writes(stop: list[dict[str, Any]]) -> None:
    folder = stop[0]["folder"] / "ddp in parts"
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [*range(1, 9)]
    assert sorted(path.name for path in folder.rglob("*")) == sorted(
        ["log.jsonl", "snapshots", *["step-000006", "step-000008"], *["state.json", "tensors.safetensors"] * 2]
    )


def test_ctrl_c_in_one_process_is_agreed_on_before_all_stop(stop: list[dict[str, Any]]) -> None:
    for found in stop:
        assert found["interrupted"] == "interrupted after step 3 of 8; resume=True goes on from there"
    assert snapshots.newest(stop[0]["folder"] / "interrupted").step == 3


MESSAGES = {
    "nan, ddp": "the loss is nan at step 1: in rows .* the weight 'model.layers.1.mlp.up_proj.weight'",
    "nan, fsdp": "the loss is nan at step 1: in rows .* the weight 'model.layers.1.mlp.up_proj.weight'",
    "rate": "the setting learning_rate is 1.01 in process 1, and 0.01 in process 0: give every process the same",
    "rows": "the SHA-256 of the rows is .* in process 1",
    "base": "the weight 'model.embed_tokens.weight' is .* in process 1, and .* in process 0",
    "base, fsdp": "the weight 'model.embed_tokens.weight' is .* in process 1, and .* in process 0",
    "few rows": r"2 processes, but 1 rows make 1 micro-batches: lower micro_batch_size \(2\), or start fewer processes",
    "in backward": "optimizer_in_backward=True with several processes",
    "adafactor": "optimizer='adafactor' with fsdp",
    "offload": "activation_offload=True with fsdp",
    "wrapped": r"give it the model inside \(.module\)",
    "two dtypes": r"torch.bfloat16 \(model.norm.weight\).*torch.float32|torch.float32 .* and torch.bfloat16 \(model.norm.weight\)",
    "divided twice": "shard: 'FSDPLlamaForCausalLM' is divided among processes by FSDP",
    "ddp of pieces": "distributed='ddp': this model is divided by fully_shard already",
    "other precision": "precision='bf16-mixed': the model was divided with other dtypes",
    "disk": "could not save log|could not save",
    "unfinished": "holds a run that was stopped after step 2 of 8",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_work_is_said_by_every_process(stop: list[dict[str, Any]], name: str) -> None:
    for found in stop:
        assert re.search(MESSAGES[name], found["messages"][name]), found["messages"][name]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_the_others_with_its_message(tmp_path: Path, kind: str) -> None:
    """Not after the half hour that PyTorch waits for a neighbour."""
    mp.spawn(breaks, args=(free_port(), tmp_path, kind), nprocs=2)
    assert (tmp_path / f"{kind}-1").read_text() == "the dog ate it"
    assert (tmp_path / f"{kind}-0").read_text() == "process 1 stopped: the dog ate it"


# The command line --------------------------------------------------------------------------------------------------------------------


def torchrun(*words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lora_lab", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_torchrun_finetunes_and_writes_one_adapter_that_loads(tmp_path: Path, kind: str) -> None:
    loading.save(our_llama(max_position_embeddings=128), tmp_path / "model", chat_tokenizer())
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in text_rows()))
    given = ["finetune", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--precision", "fp32", "--rank", 2, "--epochs", 2,
             "--micro-batch-size", 1, "--learning-rate", "0.02"]  # fmt: skip
    done = torchrun(*given, "--out", tmp_path / "two", "--distributed", kind)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter saved to") == done.stdout.count("training loss") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "log.jsonl"]
    assert main([str(word) for word in [*given, "--out", tmp_path / "one", "--grad-accum-steps", 2]]) == 0
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    one, two = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert two == pytest.approx(one, rel=1e-4) and two[-1] < two[0]
    adapters = [weights(lora_lab.load(our_llama(), tmp_path / name)) for name in ("one", "two")]
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-5) for name in adapters[0])


# Without processes -------------------------------------------------------------------------------------------------------------------


def test_alone_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world() == World() and not dist.is_initialized()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert world() == World() and not dist.is_initialized()  # torchrun --nproc-per-node 1
    assert len(fit(adapted(), ROWS, settings(max_steps=1, distributed="fsdp", eval_every=None)).losses) == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed_without_torchrun_is_refused(kind: str) -> None:
    model = adapted()
    before = weights(model)
    with pytest.raises(LoraLabError, match=f"distributed='{kind}', but this process is alone: start the program with torchrun"):
        fit(model, ROWS, settings(distributed=kind))
    with pytest.raises(LoraLabError, match="shard: this process is alone"):
        shard(model)
    with pytest.raises(LoraLabError, match=r"distributed='dpp': expected ddp, fsdp or None \(did you mean 'ddp'\?\)"):
        TrainConfig(distributed="dpp")
    assert same_bits(weights(model), before)


def test_every_micro_batch_counts_once_and_every_process_has_as_many() -> None:
    for size in (1, 2, 3, 4, 8):
        for batches in range(size, 20):
            shares = [World(rank, size).mine(range(batches)) for rank in range(size)]
            assert len({len(share) for share in shares}) == 1
            assert sorted(batch for share in shares for batch, counts in share if counts) == [*range(batches)]


def test_random_numbers_differ_by_process_and_the_first_has_those_of_one_alone() -> None:
    assert World(0, 4).seed(7) == 7 and len({World(rank, 4).seed(7) for rank in range(4)}) == 4


@pytest.mark.parametrize("rows, epochs", [(13, 1.0), (13, 2.5), (8, 3.0), (5, 0.5)])
def test_steps_are_counted_as_they_are_taken(rows: int, epochs: float) -> None:
    lengths = token_rows(rows)
    for processes in (1, 2, 4):
        config = TrainConfig(**settings(epochs=epochs, grad_accum_steps=2))
        steps = count_steps(lengths, config, processes)
        together = TrainConfig(**settings(epochs=epochs, grad_accum_steps=2 * processes))
        assert steps == count_steps(lengths, together)
        ours, theirs = step_batches(lengths, config, processes), step_batches(lengths, together)
        assert [next(ours) for _ in range(steps)] == [next(theirs) for _ in range(steps)]


def test_under_torchrun_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda") == "cuda" and own_device(None) is None
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_device("cuda") == "cuda:3" and own_device("cpu") == "cpu" and own_device(None) is None
    with pytest.raises(LoraLabError, match="device 'cuda:0' for each of 4 processes: give 'cuda'"):
        own_device("cuda:0")
