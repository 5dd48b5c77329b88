"""Several processes train a prompt as one would: DDP and FSDP2 over gloo, here with two, which are started once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bert_tools
import pytest
import t5_tools
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port, refused, start
from tiny_workshop import QUIET, VOCABULARY, our_llama, their_llama, token_rows

import lora_lab
from lora_lab.training import fit, shard
from lora_lab.training.distributed import world
from prompt_tuning_lab import inject, load, save, use

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not dist.is_available(), reason="needs torch.distributed with gloo")
ROWS, HELD_OUT = token_rows(7), token_rows(3, seed=5)  # 4 micro-batches of 2 rows and less, 2 of the held-out
TEXTS = [{"input_ids": row["input_ids"], "label": number % 3} for number, row in enumerate(ROWS)]
SGD = {"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 1.0}  # AdamW and clipping would hide a gradient that is too large


def prompted(make: Callable[..., Any] = our_llama, **options: Any) -> Any:
    return inject(make(), 4, **{"init": "random", "seed": 0, **options})


def encoder_decoder(**options: Any) -> Any:
    """In float64: with these weights T5 makes much of a rounding."""
    return prompted(lambda: t5_tools.pair("1.1", vocab_size=VOCABULARY)[0].double(), **options)


def classifier() -> Any:
    """The prompt goes in before the backbone, and the head trains along."""
    torch.manual_seed(0)
    model = prompted(lambda: bert_tools.pair("BertForSequenceClassification", vocab_size=VOCABULARY, max_position_embeddings=64)[0])
    model.base.classifier.requires_grad_(True)
    return model


def beside_another_task() -> Any:
    """A frozen task, and a LoRA adapter that trains with the other."""
    model = inject(prompted(task="old"), 3, method="prefix", init="random", seed=1)
    torch.manual_seed(2)
    return lora_lab.inject(model, rank=2, init="random")


# (kind, model, settings): runs in which two processes compute what one does
RUNS: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "ddp, rows": ("ddp", prompted, {"grad_accum_steps": 2, "gradient_checkpointing": True, **SGD}),
    "fsdp, rows": ("fsdp", prompted, {"gradient_checkpointing": True, **SGD}),
    "ddp, prefix, 16 bit": ("ddp", lambda: prompted(method="prefix"), {"precision": "bf16-mixed"}),
    "fsdp, prefix, 16 bit": ("fsdp", lambda: prompted(method="prefix"), {"precision": "bf16-mixed", "gradient_checkpointing": True}),
    "ddp, residual": ("ddp", lambda: prompted(their_llama, method="residual", encoder_hidden_size=5), {}),
    "fsdp, p-tuning": ("fsdp", lambda: prompted(their_llama, method="p-tuning", encoder_hidden_size=5), {"gradient_checkpointing": True}),
    "fsdp, a network's prefix": ("fsdp", lambda: prompted(method="prefix", prefix_projection=True, encoder_hidden_size=5), {}),
    "fsdp, an encoder-decoder's prefix": ("fsdp", lambda: encoder_decoder(method="prefix"), {}),
    "ddp, a classifier": ("ddp", classifier, {}),
    "fsdp, a classifier": ("fsdp", classifier, {}),
    "fsdp, beside another task": ("fsdp", beside_another_task, {"precision": "bf16-mixed"}),
}  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {"epochs": 2, "micro_batch_size": 2, "learning_rate": 0.05, "eval_every": 3, **QUIET, **changes}


def trained(name: str, **changes: Any) -> tuple[Any, list[float]]:
    """The model after its run, and the losses of all steps and evaluations."""
    _, make, given = RUNS[name]
    model = make()
    if dist.is_initialized() and dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(1)  # process 1 begins with other values, and has to take process 0's
    rows, held_out = (TEXTS, TEXTS[:3]) if "classifier" in name else (ROWS, HELD_OUT)
    result = fit(model, rows, settings(**{**given, **changes}), eval_data=held_out)
    return model, result.losses + result.eval_losses


def story(rank: int, port: int, folder: Path) -> None:
    """What two processes do, and what each has found."""
    start(rank, port)
    found: dict[str, Any] = {}
    for name, (kind, _, _) in RUNS.items():
        model, losses = trained(name, distributed=kind)
        save(model, folder / name / str(rank))
        found[name] = losses
    model = shard(prompted())
    found["refused"] = [refused(lambda: inject(model, 3, task="late")), refused(lambda: load(model, folder / "fsdp, rows" / str(rank), "late"))]
    found["logits"] = use(model, None)(input_ids=torch.arange(6)[None]).logits.detach()
    torch.save(found, folder / f"{rank}.pt")
    world().leave()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(story, args=(free_port(), folder), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_loss_curve_of_one_and_save_its_prompt(told: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    """The same rows in each step. The file is whole, in each process, and loads into a model that is; its network trains on."""
    folder, everyone = told
    one, losses = trained(name, grad_accum_steps=2 * RUNS[name][2].get("grad_accum_steps", 1))
    prompt, began = one.prompt(), RUNS[name][1]().prompt()
    assert (prompt() - began()).abs().max() > 1e-2  # it learns something
    for rank, found in enumerate(everyone):
        assert found[name] == pytest.approx(losses, rel=1e-4)
        again = load(RUNS[name][1]().base, folder / name / str(rank), "again", trainable=True, head=True).prompt()
        torch.testing.assert_close(again(), prompt(), rtol=1e-4, atol=1e-5)
        assert again.hidden_size == prompt.hidden_size and again.state_dict().keys() == prompt.state_dict().keys()


def test_half_of_the_rows_have_another_curve() -> None:
    """That the test above can fail: what process 0 would do without process 1."""
    _, losses = trained("ddp, prefix, 16 bit", grad_accum_steps=2)
    assert trained("ddp, prefix, 16 bit", max_steps=4)[1][:4] != pytest.approx(losses[:4], rel=1e-3)


def test_a_model_that_is_divided_takes_no_new_task_and_answers_as_it_did(told: tuple[Path, list[dict[str, Any]]]) -> None:
    """Its parameters would not be divided, and no process would exchange their gradients."""
    for found in told[1]:
        assert all("is divided among processes by FSDP: inject and load before that" in text for text in found["refused"]), found["refused"]
        torch.testing.assert_close(found["logits"], our_llama()(input_ids=torch.arange(6)[None]).logits.detach())
