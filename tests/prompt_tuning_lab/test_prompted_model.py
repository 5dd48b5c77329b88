"""The model with prompts beside it: called like its base, trained alone, with everything that lora_lab does to models.

Trap numbers are those of the project's reference on prompt tuning.
"""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers
from llama_tools import compiled
from prefix_tools import both, model
from prompt_tools import EXACT, ROUNDED, ROWS, alone, gradients, joined, padded, randomised, with_tasks
from torch.testing import assert_close

import lora_lab
from lora_lab.errors import LoraLabError
from lora_lab.training import fit
from prompt_tuning_lab import inject, per_sample, use

METHODS = ["prompt", "prefix", "p-tuning", "residual"]
on_both_sides = pytest.mark.parametrize("side", ["ours", "theirs"])
ids = torch.tensor([ROWS[0], [*ROWS[1], 7, 2]])


# Like the base ------------------------------------------------------------------------------------------------------------------


@on_both_sides
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_is_the_bases_of_prompt_and_text_and_logits_are_the_texts(side: str, name: str) -> None:
    """T1: PEFT's logits have P positions more than the labels, and evaluators that index them are silently wrong."""
    prompted = with_tasks(model(side, name))
    reference = prompted.base(inputs_embeds=torch.cat([joined(prompted, "c", row.tolist()) for row in ids]),
                              labels=torch.cat((torch.full((2, 7), -100), ids), 1))  # fmt: skip
    out = prompted(input_ids=ids, labels=ids)
    assert type(out) is type(reference) and out.logits.shape == (2, 7, 64)
    assert_close(out.loss, reference.loss, **(EXACT if side == "ours" else ROUNDED))
    assert_close(out.logits, reference.logits[:, 7:], **(EXACT if side == "ours" else ROUNDED))
    first_alone = prompted(input_ids=ids, labels=torch.cat((ids[:, :1], torch.full((2, 6), -100)), 1)).loss
    expected = torch.nn.functional.cross_entropy(reference.logits[:, 6], ids[:, 0])  # the last virtual token predicts the first word
    assert_close(first_alone.double(), expected, **(EXACT if side == "ours" else ROUNDED))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loss_logits_and_gradient_are_pefts(name: str) -> None:
    """Without padding, where PEFT is right: the same prompt before the same model, so that its files mean the same here."""
    models = both(name)
    theirs = peft.get_peft_model(copy.deepcopy(models["theirs"]), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    rows = theirs.prompt_encoder["default"].embedding.weight
    rows.data.mul_(0.4)
    reference = theirs(input_ids=ids, labels=ids)
    reference.loss.backward()
    for base in models.values():
        prompted = inject(base, 5, init=rows.detach())
        prompted.tasks.double()
        out = prompted(input_ids=ids, labels=ids)
        assert_close(out.logits, reference.logits[:, 5:], **ROUNDED)
        assert_close(out.loss.float(), reference.loss.float(), **ROUNDED)
        assert_close(gradients(prompted, input_ids=ids, labels=ids)["tasks.default.weight"], rows.grad, **ROUNDED)


@on_both_sides
def test_t5_is_pefts_and_every_row_of_its_prompt_learns(side: str) -> None:
    """T12, T13: PEFT makes 2 P rows for a T5, of which the second half never gets a gradient and is counted as trainable."""
    models = both("t5")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=1)
    theirs = peft.get_peft_model(copy.deepcopy(models["theirs"]), config).double()
    rows, labels = theirs.prompt_encoder["default"].embedding.weight, torch.tensor([[7, 8, 1], [9, 1, -100]])
    reference = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    prompted = inject(models[side], 5, init=rows.detach())
    prompted.tasks.double()
    out = prompted(input_ids=ids, labels=labels)
    assert_close(out.logits, reference.logits, **ROUNDED)
    assert_close(out.loss.float(), reference.loss.float(), **ROUNDED)
    slope = gradients(prompted, input_ids=ids, labels=labels)["tasks.default.weight"]
    assert slope.shape == (5, 30) and (slope.abs().amax(1) > 0).all()


@on_both_sides
def test_hidden_states_and_attention_are_the_texts(side: str) -> None:
    """Of attention the text's rows: they still sum to 1, over virtual tokens and text."""
    if side == "ours":
        base = both("BertModel")["ours"]
        prompted = with_tasks(base, {"a": 5})
        assert prompted(input_ids=ids).last_hidden_state.shape == (2, 7, 32)
        return
    base = decoder = both("gpt2")["theirs"]
    base.set_attn_implementation("eager")
    prompted = with_tasks(base, {"a": 5})
    out = prompted(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert [each.shape for each in out.hidden_states] == [(2, 7, 32)] * 3
    assert [each.shape for each in out.attentions] == [(2, 4, 7, 12)] * 2 and torch.allclose(out.attentions[0].sum(-1), torch.ones(()).double())
    whole = decoder(inputs_embeds=torch.cat([joined(prompted, "a", row.tolist()) for row in ids]), output_hidden_states=True)
    assert_close(out.hidden_states[1], whole.hidden_states[1][:, 5:], **EXACT)
    logits, *_ = prompted(input_ids=ids, return_dict=False)
    assert_close(logits, out.logits, **EXACT)


@on_both_sides
def test_fewer_logits_can_be_asked_for(side: str) -> None:
    prompted = with_tasks(with_tasks(model(side, "llama"), {"front": 3}), {"behind": 4}, placement="after-bos")
    with torch.no_grad():
        for task in ("front", "behind"):
            whole = use(prompted, task)(input_ids=ids).logits
            assert_close(prompted(input_ids=ids, logits_to_keep=3).logits, whole[:, -3:], **EXACT)
            assert_close(prompted(input_ids=ids, logits_to_keep=30).logits, whole, **EXACT)


def test_arguments_go_in_by_position_too_and_no_task_is_the_base_itself() -> None:
    prompted = with_tasks(model("ours", "llama"))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(prompted(ids, mask).logits, prompted(input_ids=ids, attention_mask=mask).logits)
        assert torch.equal(use(prompted, None)(ids).logits, prompted.base(ids).logits)
    assert prompted.config is prompted.base.config and prompted.get_input_embeddings() is prompted.base.get_input_embeddings()
    with pytest.raises(LoraLabError, match="document_lengths"):
        prompted(ids[:1], document_lengths=[3, 4])


# Frozen -------------------------------------------------------------------------------------------------------------------------


@on_both_sides
@pytest.mark.parametrize("method", METHODS)
def test_only_the_prompt_is_updated(side: str, method: str) -> None:
    """google-research/prompt-tuning, train_test.py; T22: the embedding, tied to the head, stays frozen."""
    base = model(side, "llama", torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    prompted = randomised(inject(base, 4, method=method)).train()
    was = prompted.prompt()().detach().clone()
    optimizer = torch.optim.SGD([p for p in prompted.parameters() if p.requires_grad], lr=1.0)
    prompted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in base.parameters()) and all(p.grad is not None for p in prompted.prompt().parameters())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert prompted.base is base and (prompted.prompt()() - was).abs().max() > 1e-4


@on_both_sides
def test_the_frozen_base_draws_no_dropout_in_training(side: str) -> None:
    """T26: model.train() turns the dropout of a frozen model on again, which is noise and nothing else."""
    config = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).train()
    base = theirs if side == "theirs" else lora_lab.models.GPT2LMHeadModel(lora_lab.models.GPT2Config.from_dict(config)).train()
    prompted = inject(base, 4)
    assert prompted.training and not any(module.training for module in base.modules())
    losses = [prompted(input_ids=ids, labels=ids).loss for _ in range(2)]
    assert torch.equal(*losses) and torch.equal(losses[0], prompted.eval()(input_ids=ids, labels=ids).loss)
    prompted.train()
    assert prompted.prompt().training and not any(module.training for module in base.modules())


def test_our_models_make_no_logits_where_only_the_loss_is_wanted() -> None:
    """As without a prompt: only labelled positions are computed in training mode."""
    prompted = with_tasks(model("ours", "llama")).train()
    assert prompted(input_ids=ids, labels=ids).logits is None and not prompted.base.training
    assert prompted(input_ids=ids).logits.shape == (2, 7, 64)
    assert prompted.eval()(input_ids=ids, labels=ids).logits.shape == (2, 7, 64)


def test_a_second_task_is_the_only_active_and_trainable_one_and_the_first_keeps_its_values() -> None:
    prompted = randomised(inject(model("ours", "llama", torch.float32), 4))
    before = prompted.prompt().weight.detach().clone()
    assert inject(prompted, 6, task="train", method="p-tuning") is prompted  # a name that modules have for something else
    assert prompted.active == "train" and sorted(prompted.tasks) == ["default", "train"]
    assert {name.split(".")[1] for name, p in prompted.named_parameters() if p.requires_grad} == {"train"}
    assert torch.equal(prompted.prompt("default").weight, before)
    with pytest.raises(LoraLabError, match=r"task='trian': this model has the tasks \['default', 'train'\] \(did you mean 'train'\?\)"):
        prompted.prompt("trian")
    with pytest.raises(LoraLabError, match="no task is active"):
        use(prompted, None).prompt()


def test_copies_pickles_and_state_dicts_keep_everything() -> None:
    prompted = with_tasks(model("ours", "llama"))
    with torch.no_grad():
        logits = prompted(input_ids=ids).logits
        for copied in (copy.deepcopy(prompted), pickle.loads(pickle.dumps(prompted))):
            assert torch.equal(copied(input_ids=ids).logits, logits) and copied.base is not prompted.base
            copied.prompt().weight.zero_()
            assert not torch.equal(copied(input_ids=ids).logits, logits)
            copied.load_state_dict(prompted.state_dict())
            assert torch.equal(copied(input_ids=ids).logits, logits)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_stay_float32_whatever_the_model_becomes(method: str) -> None:
    """T23: bfloat16 rounds updates below |w| / 256 away; float16's Adam divides by zero."""
    prompted = inject(model("ours", "llama", torch.float32), 4, method=method)
    rows = prompted.prompt()().detach().clone()
    for cast in (prompted.bfloat16, prompted.half, lambda: prompted.to(torch.bfloat16)):
        cast()
        assert {p.dtype for p in prompted.tasks.parameters()} == {torch.float32} and torch.equal(prompted.prompt()(), rows)
    assert next(prompted.base.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(prompted(input_ids=ids, labels=ids).loss)
    assert prompted.double().prompt()().dtype == torch.float64
    assert prompted.float().prompt()().dtype == torch.float32


# Context, dtypes, compilation ---------------------------------------------------------------------------------------------------


def test_the_prompt_counts_against_the_context() -> None:
    """T28: P + T positions, of a padded row its own. RoBERTa's table has two rows that are for no text."""
    prompted = with_tasks(model("ours", "gpt2"), {"a": 40, "b": 5})
    with pytest.raises(LoraLabError, match="40 virtual tokens and a text of 9 are 49 positions, the model's context is 48: shorten the text to 8"):
        use(prompted, "a")(input_ids=torch.full((1, 9), 5))
    words, mask = padded([[5] * 8, [6] * 20], "right")
    with torch.no_grad(), per_sample(prompted, ["a", "b"]):
        assert_close(prompted(input_ids=words, attention_mask=mask).logits[0, :8], alone(prompted, "a", [5] * 8), **EXACT)
    roberta = with_tasks(both("RobertaModel")["theirs"], {"a": 10})
    assert roberta(input_ids=torch.full((1, 12), 5)).last_hidden_state.shape == (1, 12, 32)
    with pytest.raises(LoraLabError, match="the model's context is 22"):
        roberta(input_ids=torch.full((1, 13), 5))
    too_long = [{"input_ids": [5] * 9, "labels": [5] * 9}]
    with pytest.raises(LoraLabError, match="the row has 9 tokens, but max_length, or the model's context, is 8"):
        fit(use(prompted, "a"), too_long, {"max_steps": 1, "progress": False})


@on_both_sides
def test_16_bit_bases_and_autocast_read_the_prompt(side: str) -> None:
    """T23: cast once, where it is inserted."""
    prompted = with_tasks(model(side, "llama", torch.float32))
    with torch.no_grad():
        expected = prompted(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert (prompted(input_ids=ids).logits - expected).abs().max() < 0.1 * expected.abs().max()
        assert prompted.bfloat16()(input_ids=ids).logits.dtype == torch.bfloat16
        assert (prompted(input_ids=ids).logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_plain_path_compiles_without_a_graph_break(name: str, masked: bool) -> None:
    """The whole model in one graph, forward and backward; padding on the left, too."""
    prompted = with_tasks(model("ours", name)).train()
    words, mask = padded(ROWS, "left")
    inputs = {"input_ids": words, **({"attention_mask": mask} if masked else {})}
    slopes = []
    with compiled(lambda **given: prompted(**given).logits) as called:
        for run in (lambda **given: prompted(**given).logits, called):
            prompted.zero_grad()
            logits = run(**inputs)[mask.bool()]
            (logits * torch.linspace(-1, 1, 64)).sum().backward()
            slopes.append((logits.detach(), prompted.prompt().weight.grad))
    assert_close(*slopes, **EXACT)
    assert not prompted.base.training
