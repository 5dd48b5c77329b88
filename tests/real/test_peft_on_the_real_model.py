"""Adapters of the real model travel to PEFT and back: our hand-written Llama and transformers' compute the same with one file."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch.testing import assert_close

import lora_lab

pytestmark = pytest.mark.real
NAME = "smollm2-135m-instruct-q4"


@pytest.fixture
def ids(smollm2):
    return torch.tensor([smollm2[1].encode("Write a negative review of a toaster that burns one side only.")])


@pytest.fixture
def theirs(smollm2):
    transformers.logging.set_verbosity_error()
    from lora_lab.models.catalogue import fetch

    return transformers.AutoModelForCausalLM.from_pretrained(fetch(NAME)).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def small_but_visible(model):
    """A random adapter on 210 layers would drown the model: keep its update small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.02)
    return model


def test_peft_reads_our_adapter_of_the_real_model(smollm2, theirs, ids, tmp_path):
    ours, _ = lora_lab.models.load(NAME)
    lora_lab.save(small_but_visible(lora_lab.inject(ours, rank=8, alpha=16, init="random")), tmp_path)
    tuned = logits(ours.eval(), ids)
    assert (tuned - logits(smollm2[0], ids)).abs().max() > 0.5
    assert_close(logits(peft.PeftModel.from_pretrained(theirs, tmp_path).eval(), ids), tuned, rtol=1e-4, atol=1e-3)


def test_we_read_pefts_adapter_of_the_real_model(smollm2, theirs, ids, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = small_but_visible(peft.get_peft_model(theirs, config).eval())
    tuned.save_pretrained(tmp_path)
    ours = lora_lab.load(lora_lab.models.load(NAME)[0], tmp_path)
    assert (logits(tuned, ids) - logits(smollm2[0], ids)).abs().max() > 0.1  # a hundred times the tolerance below
    assert_close(logits(ours, ids), logits(tuned, ids), rtol=1e-4, atol=1e-3)


def test_the_file_records_which_base_it_belongs_to(smollm2, tmp_path):
    """The hash is the GGUF file's in the wheel, which anybody can compute."""
    from safetensors import safe_open

    ours, _ = lora_lab.models.load(NAME)
    lora_lab.save(lora_lab.inject(ours, rank=1, target_modules=["q_proj"]), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
