"""Training that goes on from a file: exactly, where a network makes the prompt; and from what PEFT keeps, which PEFT itself cannot do."""

from __future__ import annotations

import peft
import pytest
import torch
from prompt_file_tools import METHODS, TENSORS, answer, batch, peft_folder, peft_model, prompted, theirs
from torch.testing import assert_close

from lora_lab import LoraLabError, files
from prompt_tuning_lab.checkpoint import load, save
from prompt_tuning_lab.injection import inject
from prompt_tuning_lab.interpretation import drift
from prompt_tuning_lab.prefix import Prefix
from prompt_tuning_lab.reparameterization import PrefixMLP, PTuning, ResidualPrompt
from prompt_tuning_lab.soft_prompt import SoftPrompt

NETWORKS = {"p-tuning": PTuning, "residual": ResidualPrompt, "prefix-mlp": PrefixMLP}


def gradients(model):
    inputs = batch("gpt2")
    model.zero_grad()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.prompt().named_parameters()}


def train(model, steps):
    inputs = batch("gpt2")
    optimizer = torch.optim.AdamW(model.prompt().parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", list(METHODS))
def test_training_goes_on_exactly(method, tmp_path):
    """Feature rows 31 and 17: the folded file and the one that trains on, together. Outputs, gradients and the next steps are equal."""
    model = prompted("gpt2", method)
    save(model, tmp_path)
    again = load(theirs("gpt2"), tmp_path, trainable=True)
    assert type(again.prompt()) is type(model.prompt())
    assert torch.equal(again.prompt()(), model.prompt()())
    mine, theirs_ = gradients(model), gradients(again)
    assert mine.keys() == theirs_.keys() and all(torch.equal(mine[name], theirs_[name]) for name in mine)
    assert any(slope.abs().max() > 0 for slope in mine.values())
    assert torch.equal(train(model, 3).prompt()(), train(again, 3).prompt()())


@pytest.mark.parametrize("method", list(NETWORKS))
def test_without_being_asked_the_network_is_left_on_the_disk(method, tmp_path):
    """For use, what it made is enough: a plain prompt, frozen, which costs what a plain one does."""
    model = prompted("gpt2", method)
    save(model, tmp_path)
    again = load(theirs("gpt2"), tmp_path)
    assert type(again.prompt()) is (Prefix if method == "prefix-mlp" else SoftPrompt)
    assert_close(answer(again, "gpt2"), answer(model.eval(), "gpt2"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", list(NETWORKS))
def test_drift_goes_on_from_where_it_began(method, tmp_path):
    model = prompted("gpt2", method)
    save(model, tmp_path)
    again = load(theirs("gpt2"), tmp_path, trainable=True)
    assert torch.equal(again.prompt().initial, model.prompt().initial) and not torch.equal(model.prompt().initial, model.prompt()())
    if method != "prefix-mlp":
        assert drift(again) == drift(model)


def test_loading_draws_no_random_numbers(tmp_path):
    save(prompted("gpt2", "p-tuning"), tmp_path)
    base = theirs("gpt2")
    torch.manual_seed(5)
    load(base, tmp_path, trainable=True)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


# What PEFT keeps ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "prefix-mlp"])
def test_what_peft_saved_trains_on_here_and_not_there(method, tmp_path):
    """Feature row 31: "Cannot set a prompt learning adapter to trainable when loading pretrained adapter"."""
    peft_folder(tmp_path, "gpt2", method)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(theirs("gpt2"), tmp_path, is_trainable=True)
    if method in ("p-tuning", "prefix-mlp"):
        with pytest.warns(UserWarning, match="does not have the MLP that made its prompt") as caught:
            model = load(theirs("gpt2"), tmp_path, trainable=True)
        assert caught[0].filename == __file__
    else:
        model = load(theirs("gpt2"), tmp_path, trainable=True)
    start = model.prompt()().detach().clone()
    trained = train(model, 2).prompt()()
    assert not torch.equal(start, trained) and all(p.grad is None for p in model.base.parameters())


@pytest.mark.parametrize("method", list(NETWORKS))
def test_ours_without_its_network_trains_on_as_the_rows_it_made(method, tmp_path):
    model = prompted("gpt2", method)
    save(model, tmp_path)
    next(tmp_path.glob("trainable-*")).unlink()
    with pytest.warns(UserWarning, match=f"the network of method '{model.prompt().method}' that made its prompt"):
        again = load(theirs("gpt2"), tmp_path, trainable=True)
    assert type(again.prompt()) is (Prefix if method == "prefix-mlp" else SoftPrompt) and torch.equal(again.prompt()(), model.prompt()())


def test_pefts_own_network_begins_ours(tmp_path):
    """While it is live, PEFT has the MLP, with the names ours has: its parameters load, and make the same rows."""
    live = peft_model("gpt2", "p-tuning")
    encoder = live.prompt_encoder["default"]
    prompt = inject(theirs("gpt2"), 4, method="p-tuning", encoder_hidden_size=12, init="random").prompt()
    prompt.load_state_dict(encoder.state_dict())
    assert_close(prompt(), encoder(torch.arange(4)))


# Pairs that stay together ---------------------------------------------------------------------------------------------------------


def networks(folder):
    return sorted(path.name for path in folder.glob("trainable-*"))


def test_a_network_is_found_by_the_rows_it_made(tmp_path):
    """Whatever else replaced the prompt's file, a network of other rows is not taken for its own."""
    save(prompted("gpt2", "p-tuning"), tmp_path)
    peft_folder(tmp_path / "other", "gpt2", "p-tuning")
    (tmp_path / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())
    with pytest.warns(UserWarning, match="does not have the MLP"):
        assert type(load(theirs("gpt2"), tmp_path, trainable=True).prompt()) is SoftPrompt


def test_saving_again_leaves_one_network_and_a_plain_prompt_leaves_none(tmp_path):
    model = prompted("gpt2", "residual")
    save(model, tmp_path)
    first = networks(tmp_path)
    save(train(model, 1), tmp_path)
    assert len(first) == len(networks(tmp_path)) == 1 and first != networks(tmp_path)
    save(prompted("gpt2", "prompt"), tmp_path)
    assert networks(tmp_path) == []


@pytest.mark.parametrize("method", list(NETWORKS))
@pytest.mark.parametrize("survives", [0, 1, 2])
def test_an_interrupted_save_leaves_the_old_pair_or_the_new_one(method, survives, tmp_path, monkeypatch):
    """Whichever of the three files is the last that was written, what loads and what trains on are one prompt."""
    old = prompted("gpt2", method)
    save(old, tmp_path)
    new = train(prompted("gpt2", method), 2)
    writes, replace = [], files.os.replace

    def replace_some(source, target):
        writes.append(target)
        if len(writes) > survives:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_some)
    with pytest.raises(LoraLabError, match="No space left"):
        save(new, tmp_path)
    monkeypatch.undo()
    for trainable in (False, True):
        found = load(theirs("gpt2"), tmp_path, trainable=trainable).prompt()
        assert torch.equal(found(), (old if survives < 2 else new).prompt()())
    assert isinstance(found, NETWORKS[method])
    assert not list(tmp_path.glob(".*"))
