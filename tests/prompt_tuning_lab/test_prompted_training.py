"""What lora_lab does to models, done to prompted ones: training, checkpointing, evaluation, and LoRA in the same model.

Trap numbers are those of the project's reference on prompt tuning.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from llama_tools import saved_for_backward
from prefix_tools import both, model
from prompt_tools import EXACT, ROUNDED, ROWS, alone, gradients, joined, padded, randomised, with_tasks
from tiny_workshop import forgotten
from torch.testing import assert_close

import lora_lab
from lora_lab.errors import LoraLabError
from lora_lab.models.recompute import Recomputable
from lora_lab.training import fit, perplexity, score_choices
from prompt_tuning_lab import PromptedModel, inject, per_sample, use

METHODS = ["prompt", "prefix", "p-tuning", "residual"]
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
ids = torch.tensor([ROWS[0], [*ROWS[1], 7, 2]])


# Training -----------------------------------------------------------------------------------------------------------------------

ROWS_TO_LEARN = [{"input_ids": row, "labels": [-100] * (len(row) - 2) + row[-2:]} for row in ROWS]


@on_both_sides
@pytest.mark.parametrize("method", METHODS)
def test_fit_trains_the_prompt_and_nothing_else(side: str, method: str) -> None:
    """`fit` knows no method: whatever requires grad is trained. The base's mode, weights and dtypes are as before."""
    base = model(side, "gpt2", torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    prompted = inject(base, 4, method=method, seed=0)
    result = fit(prompted, ROWS_TO_LEARN, {"max_steps": 12, "micro_batch_size": 3, "learning_rate": 0.3, "progress": False})
    assert result.losses[-1] < 0.6 * result.losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items()) and not base.training


@on_both_sides
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_fit_in_16_bit_keeps_the_prompt_in_float32(side: str, precision: str) -> None:
    """T23."""
    prompted = inject(model(side, "llama", torch.float32), 4, method="residual", seed=0)
    result = fit(prompted, ROWS_TO_LEARN, {"max_steps": 6, "micro_batch_size": 3, "learning_rate": 0.02, "precision": precision, "progress": False})
    assert result.losses[-1] < result.losses[0]
    weight = prompted.prompt().weight
    assert weight.dtype == torch.float32 and not torch.equal(weight.bfloat16().float(), weight)  # finer than bfloat16 has it


def test_fit_trains_classifiers_and_t5s_by_their_base() -> None:
    """What a row is to a model is asked of the base."""
    classifier = inject(both("BertForSequenceClassification", torch.float32)["ours"], 4, seed=0)
    rows = [{"input_ids": row, "label": index} for index, row in enumerate(ROWS)]
    result = fit(classifier, rows, {"max_steps": 12, "micro_batch_size": 3, "learning_rate": 0.05, "progress": False})
    assert result.losses[-1] < result.losses[0]
    answers = inject(both("t5", torch.float32)["ours"], 4, seed=0)
    rows = [{"input_ids": row, "labels": [7 + index, 1]} for index, row in enumerate(ROWS)]
    result = fit(answers, rows, {"max_steps": 12, "micro_batch_size": 3, "learning_rate": 0.3, "progress": False})
    assert result.losses[-1] < result.losses[0] and result.label_tokens == 12 * 6
    with pytest.raises(LoraLabError, match="packing=True"):
        fit(inject(model("ours", "llama", torch.float32), 4), ROWS_TO_LEARN, {"max_steps": 1, "packing": True})


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Any) -> None:
    settings = {"max_steps": 6, "micro_batch_size": 2, "learning_rate": 0.05, "save_every": 3, "progress": False}

    def run(folder: str, **more: Any) -> torch.Tensor:
        prompted = inject(model("ours", "llama", torch.float32), 4, method="residual", seed=0)
        forgotten(prompted) if more else None
        fit(prompted, ROWS_TO_LEARN, {**settings, "output_dir": str(tmp_path / folder), **more})
        return prompted.prompt()().detach()

    whole = run("whole")
    for snapshot in sorted((tmp_path / "whole" / "snapshots").iterdir())[1:]:
        for file in snapshot.iterdir():
            file.unlink()
        snapshot.rmdir()
    assert torch.equal(run("whole", resume=True), whole)


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["prompt", "residual"])
def test_checkpointing_recomputes_under_a_base_in_eval_mode(side: str, name: str, method: str) -> None:
    """T10: PEFT's base has to be in training mode for it, dropout and all. Gradients are the same, and less is kept."""
    prompted = randomised(inject(model(side, name), 4, method=method)).train()
    inputs = {"input_ids": ids, "labels": ids}
    plain, kept_plain = gradients(prompted, **inputs), kept_bytes(prompted, inputs)
    prompted.base.gradient_checkpointing_enable()
    if side == "theirs":
        prompted.base.disable_input_require_grads() if hasattr(prompted.base, "_require_grads_hook") else None
    again, kept_again = gradients(prompted, **inputs), kept_bytes(prompted, inputs)
    assert kept_again < 0.7 * kept_plain
    assert plain.keys() == again.keys() and not any(module.training for module in prompted.base.modules())
    for key, slope in plain.items():
        assert_close(again[key], slope, **ROUNDED)


def kept_bytes(prompted: PromptedModel, inputs: dict[str, Any]) -> int:
    with saved_for_backward() as kept:
        loss = prompted(**inputs).loss
    own = {p.untyped_storage().data_ptr() for p in prompted.parameters()}
    del loss
    return sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("mode", [2, "attention"])
def test_each_mode_of_our_checkpointing_works_under_a_prompt(mode: Any) -> None:
    prompted = with_tasks(model("ours", "llama")).train()
    plain = gradients(prompted, input_ids=ids, labels=ids)
    prompted.base.gradient_checkpointing_enable(mode)
    again = gradients(prompted, input_ids=ids, labels=ids)
    assert_close(again["tasks.c.weight"], plain["tasks.c.weight"], **EXACT)
    assert not any(module.recompute_in_eval for module in prompted.base.modules() if isinstance(module, Recomputable))
    with pytest.raises(LoraLabError, match="use_cache=True under gradient checkpointing"):
        prompted.base.gradient_checkpointing_enable() or prompted(input_ids=ids, use_cache=True)


def test_checkpointing_by_fit_is_the_bases_and_gone_afterwards() -> None:
    for side in ("ours", "theirs"):
        losses = []
        for checkpointing in (False, True):
            prompted = inject(model(side, "llama", torch.float32), 4, seed=0)
            settings = {"max_steps": 3, "micro_batch_size": 3, "learning_rate": 0.05, "gradient_checkpointing": checkpointing, "progress": False}
            losses.append(fit(prompted, ROWS_TO_LEARN, settings).losses)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and not lora_lab.models.recompute.recompute_mode(prompted.base)


def test_checkpointing_that_would_switch_dropout_on_is_refused() -> None:
    """T10 and T26 at once: OPT's blocks ask one switch for both."""
    config = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
              "word_embed_proj_dim": 32}  # fmt: skip
    for dropout in (0.1, 0.0):
        base = transformers.OPTForCausalLM(transformers.OPTConfig(**config, dropout=dropout)).train()
        prompted = inject(base, 4)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if dropout:
            with pytest.raises(LoraLabError, match=r"OPTForCausalLM with dropout=0.1.*build it with dropout=0.0"):
                prompted(input_ids=ids, labels=ids)
        else:
            assert gradients(prompted, input_ids=ids, labels=ids)


# Together with lora_lab ---------------------------------------------------------------------------------------------------------


def lora(prompted: PromptedModel, adapter: str, seed: int) -> None:
    torch.manual_seed(seed)
    lora_lab.inject(prompted, rank=2, target_modules=["q_proj", "v_proj"], init="random", adapter=adapter)


def test_the_verbs_of_lora_lab_work_on_the_base(tmp_path: Any) -> None:
    """T24: PEFT refuses LoRA and a prompt in one model."""
    prompted = with_tasks(model("ours", "llama"))
    base = prompted.base
    with torch.no_grad():
        plain = prompted(input_ids=ids).logits
        assert lora_lab.inject(prompted, rank=2, init="random", adapter="x") is prompted
        adapted = prompted(input_ids=ids).logits
        assert not torch.allclose(adapted, plain) and isinstance(base.model.layers[0].self_attn.q_proj, lora_lab.LoRALinear)
        lora_lab.save(prompted, tmp_path)
        with lora_lab.disabled(prompted):
            assert_close(prompted(input_ids=ids).logits, plain, **EXACT)
        assert lora_lab.merge(prompted) is prompted and torch.allclose(prompted(input_ids=ids).logits, adapted)
        assert lora_lab.unmerge(prompted) is prompted
        assert lora_lab.use(prompted, None) is prompted and torch.equal(prompted(input_ids=ids).logits, plain)
        assert lora_lab.load(prompted, tmp_path, adapter="y") is prompted and torch.equal(prompted(input_ids=ids).logits, adapted)
        assert lora_lab.combine(prompted, {"x": 0.5, "y": 0.5}, into="z") is prompted
        assert torch.allclose(lora_lab.use(prompted, "z")(input_ids=ids).logits, adapted)
        assert lora_lab.eject(prompted) is prompted and torch.equal(prompted(input_ids=ids).logits, plain)
        assert "attention" not in lora_lab.plan(prompted, 2).layers[0].path and lora_lab.plan(prompted, 2).layers[0].path.startswith("model.layers")
    assert [name for name, p in prompted.named_parameters() if p.requires_grad and not name.startswith("base")] == ["tasks.c.weight"]


def test_rows_with_a_prompt_rows_with_an_adapter_and_rows_with_both_are_one_batch() -> None:
    """T24: equal to each row run alone, losses and gradients, also under checkpointing."""
    prompted = with_tasks(model("ours", "llama"))
    lora(prompted, "x", 1), lora(prompted, "y", 2)
    for parameter in [*prompted.tasks.parameters(), *(p for name, p in prompted.named_parameters() if "lora_" in name)]:
        parameter.requires_grad_(True)
    tasks, adapters, rows = ["a", None, "c", "c"], ["x", "y", None, "y"], [*ROWS, ROWS[0]]
    words, mask = padded(rows, "right")
    labels = words.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    for checkpointing in (False, True):
        prompted.base.gradient_checkpointing_enable(checkpointing)
        with per_sample(prompted, tasks), lora_lab.per_sample(prompted, adapters):
            together = gradients(prompted.train(), input_ids=words, attention_mask=mask, labels=labels)
            mixed = prompted.eval()(input_ids=words, attention_mask=mask).logits
        expected = {name: torch.zeros_like(p) for name, p in prompted.named_parameters() if p.requires_grad}
        count = int((labels != -100).sum())
        for index, row in enumerate(rows):
            use(prompted, tasks[index]), lora_lab.use(prompted, adapters[index])
            assert_close(mixed[index, : len(row)], alone(prompted, tasks[index], row), **EXACT)
            own = torch.tensor([row])
            for name, slope in gradients(prompted.train(), input_ids=own, labels=own.masked_fill(torch.arange(len(row)) == 0, -100)).items():
                expected[name] += slope * (len(row) - 1) / count
        assert together.keys() == {name for name, slope in expected.items() if slope.abs().max() > 0}
        for name, slope in together.items():
            assert_close(slope, expected[name], **EXACT)


def test_fit_trains_prompt_and_adapter_together_on_a_quantised_base() -> None:
    prompted = lora_lab.quantize(inject(model("ours", "llama", torch.float32), 4), "int8")
    assert isinstance(prompted, PromptedModel)
    lora_lab.inject(prompted, rank=2)
    result = fit(prompted, ROWS_TO_LEARN, {"max_steps": 4, "micro_batch_size": 3, "learning_rate": 0.05, "progress": False})
    trained = {name.split(".")[0] for name, p in prompted.named_parameters() if p.requires_grad}
    assert result.losses[-1] < result.losses[0] and trained == {"base", "tasks"}


@on_both_sides
def test_evaluation_reads_the_prompt(side: str) -> None:
    """T1: logits of the text alone are what every evaluator expects."""
    prompted = with_tasks(model(side, "llama", torch.float32))
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    with torch.no_grad():
        losses = [prompted(input_ids=torch.tensor([row]), labels=torch.tensor([[-100, *row[1:]]])).loss for row in ROWS]
        expected = sum(float(loss) * (len(row) - 1) for loss, row in zip(losses, ROWS, strict=True)) / sum(len(row) - 1 for row in ROWS)
        rows = [{**row, "labels": [-100, *row["labels"][1:]]} for row in rows]
        assert perplexity(prompted, rows, progress=False) == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
        choices = [[8], [9, 4], [30]]
        for use_cache in (True, False):
            scores = score_choices(prompted, ROWS, None, choices, batch_size=2, use_cache=use_cache, progress=False)
            for row, found in zip(ROWS, scores, strict=True):
                for choice, score in zip(choices, found, strict=True):
                    logits = alone(prompted, "c", [*row, *choice])[len(row) - 1 : -1].log_softmax(-1)
                    assert float(score) == pytest.approx(sum(float(logits[i, token]) for i, token in enumerate(choice)), rel=1e-4)


def test_sentence_vectors_are_made_of_the_text() -> None:
    """sentence-transformers #3000 and #2995: masks of virtual tokens and pooling do not fit together in PEFT."""
    from bert_tools import word_pieces

    base = both("BertModel", torch.float32)["ours"]
    prompted, tokenizer = with_tasks(base, {"a": 5}), word_pieces()
    with torch.no_grad():
        found = lora_lab.models.embed(prompted, tokenizer, ["the cat sat", "a dog"])
        row = tokenizer.encode("a dog")
        hidden = base(inputs_embeds=joined(prompted, "a", row)).last_hidden_state[0, 5:]
    assert_close(found[1], torch.nn.functional.normalize(hidden.mean(0), dim=0), **ROUNDED)
