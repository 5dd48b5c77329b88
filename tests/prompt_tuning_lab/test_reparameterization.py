"""Networks that make prompts while they train: what they start as, what they fold to, PEFT's weights in them. Trap numbers: as in test_prefix.py."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from prefix_tools import model, run
from torch.testing import assert_close

from lora_lab.errors import LoraLabError
from prompt_tuning_lab.prefix import Prefix, to_rows
from prompt_tuning_lab.prefix_cache import PrefixShape
from prompt_tuning_lab.reparameterization import PrefixMLP, PTuning, ResidualPrompt
from prompt_tuning_lab.soft_prompt import Prompt, SoftPrompt

ROWS, STATES = torch.randn(5, 32) * 0.14, torch.randn(2, 2, 5, 2, 8) * 0.14
MAKERS: dict[str, Any] = {
    "p-tuning": lambda: PTuning(ROWS, 16), "residual": lambda: ResidualPrompt(ROWS, 16), "prefix": lambda: PrefixMLP(STATES, 16),
}  # fmt: skip
each = pytest.mark.parametrize("method", MAKERS)
ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))


def start(method: str) -> torch.Tensor:
    return STATES if method == "prefix" else ROWS


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained(prompt: Prompt, seed: int = 3) -> Prompt:
    """As after some training: every parameter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return prompt


@each
def test_it_begins_as_what_it_is_given(method: str) -> None:
    """The start decides (section 6 of the reference); T27: a product of small factors would shrink it to nothing. Residual to the last bit."""
    prompt = MAKERS[method]()
    assert_close(prompt(), start(method), rtol=0, atol=0 if method == "residual" else 1e-5)
    assert prompt.method == method and prompt.num_virtual_tokens == 5
    assert_close(prompt.initial, start(method), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.136, 35.0])
def test_the_start_is_right_at_any_embeddings_scale(scale: float) -> None:
    """SmolLM2's vectors have an RMS of 0.136, T5's of tens: 20 rows as they are there, from a hidden layer as wide."""
    rows = torch.randn(20, 64) * scale
    for prompt in (PTuning(rows), PTuning(rows, 24), ResidualPrompt(rows)):
        assert_close(prompt(), rows, rtol=0, atol=1e-4 * scale)


@each
def test_the_first_step_moves_the_output_and_the_network_learns(method: str) -> None:
    """Residual: zeros behind let the rows and the last layer learn at once, the first layer from the second step on."""
    prompt = MAKERS[method]()
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    target, losses = torch.randn_like(start(method)), []
    for _ in range(3):
        loss = (prompt() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert all((parameter.grad != 0).any() for parameter in prompt.parameters())


@each
def test_folded_is_what_forward_gives_and_remembers_the_start(method: str) -> None:
    """Rows 14 and 17 of the feature table: the file of the folded prompt is the plain method's."""
    prompt = trained(MAKERS[method]())
    folded = prompt.folded()
    assert type(folded) is (Prefix if method == "prefix" else SoftPrompt)
    assert torch.equal(folded(), prompt().detach()) and not torch.allclose(folded(), start(method), atol=1e-2)
    assert torch.equal(folded.initial, prompt.initial) and folded.weight.requires_grad
    with torch.no_grad():
        folded.weight.zero_()
    assert prompt().abs().max() > 0  # a copy


@each
def test_it_is_float32_trains_all_of_itself_and_keeps_nothing_else_in_its_file(method: str) -> None:
    prompt = MAKERS[method]()
    assert {parameter.dtype for parameter in prompt.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in prompt.parameters())
    assert prompt.state_dict().keys() == dict(prompt.named_parameters()).keys()
    torch.set_default_dtype(torch.float64)
    try:
        assert {parameter.dtype for parameter in MAKERS[method]().parameters()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


@each
def test_a_trained_one_is_the_same_after_its_file(method: str) -> None:
    """Training resumes from these; PEFT's files have the folded rows only."""
    prompt, other = trained(MAKERS[method]()), MAKERS[method]()
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(other(), prompt())


@each
def test_calling_it_changes_nothing(method: str) -> None:
    """T27: PEFT's MPT multiplies its embeddings in place."""
    prompt = trained(MAKERS[method]())
    before = {name: value.clone() for name, value in prompt.state_dict().items()}
    assert torch.equal(prompt(), prompt())
    assert all(torch.equal(value, before[name]) for name, value in prompt.state_dict().items())


# PEFT -----------------------------------------------------------------------------------------------------------------------------


def test_pefts_p_tuning_weights_make_the_same_rows() -> None:
    base = model("theirs", "llama", torch.float32)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16)
    theirs = peft.get_peft_model(base, config)
    encoder, prompt = theirs.prompt_encoder["default"], PTuning(ROWS, 16)
    assert count(prompt) == count(encoder)
    prompt.load_state_dict(encoder.state_dict())
    assert torch.equal(prompt(), encoder(torch.arange(5)))
    assert_close(prompt.folded()(), theirs.get_prompt_embedding_to_save("default"), rtol=0, atol=0)


def test_pefts_prefix_projection_makes_the_same_keys_and_values_and_logits() -> None:
    base = model("theirs", "llama", torch.float32)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24)
    theirs = peft.get_peft_model(base, config)
    encoder, prompt = theirs.prompt_encoder["default"], PrefixMLP(STATES, 24)
    assert count(prompt) == count(encoder)
    prompt.load_state_dict(encoder.state_dict())
    assert torch.equal(to_rows(prompt()), encoder(torch.arange(5)))
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        assert_close(run(base, [prompt()], [0, 0, 0], input_ids=ids).logits, expected, rtol=0, atol=1e-5)
        assert_close(run(base, [prompt.folded()()], [0, 0, 0], input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_gradients_reach_the_network_through_a_frozen_model() -> None:
    base = model("ours", "llama", torch.float32).requires_grad_(False)
    prompt = trained(PrefixMLP(STATES, 16))
    run(base, [prompt()], [0, 0, 0], input_ids=ids, labels=ids).loss.backward()
    assert all((parameter.grad != 0).any() for parameter in prompt.parameters())


# Counts and bad input -------------------------------------------------------------------------------------------------------------


def test_published_counts() -> None:
    """PEFT's documentation (bloomz-560m, 20 tokens, hidden 128); section 5 of the reference for P = 5, D = 32, h = 16; P-tuning v2's comment."""
    assert count(PTuning(torch.randn(20, 1024), 128)) == 20_480 + 131_200 + 16_512 + 132_096 == 300_288
    assert count(PTuning(torch.randn(5, 32), 16)) == 1_504
    assert count(PrefixMLP(torch.empty(12, 2, 5, 12, 64, device="meta"), 512)) == 3_840 + 393_728 + 9_455_616
    assert count(ResidualPrompt(torch.randn(10, 768), 50)) == 2 * 768 * 50 + 2 * 768 + 768 * 10


def test_more_virtual_tokens_than_the_network_can_tell_apart_are_refused() -> None:
    PrefixMLP(torch.randn(2, 2, 17, 2, 8), 16)
    for make in (lambda: PTuning(torch.randn(18, 32), 16), lambda: PrefixMLP(torch.randn(2, 2, 18, 2, 8), 16)):
        with pytest.raises(LoraLabError, match="18 virtual tokens from 16 hidden units.*hidden_size of at least 17, or method='residual'"):
            make()


@pytest.mark.parametrize("value", [0, -1, 2.5, 10**30, True, "8"])
@pytest.mark.parametrize("make", [PTuning, ResidualPrompt, PrefixMLP])
def test_a_width_that_is_none_is_refused(make: Any, value: Any) -> None:
    with pytest.raises(LoraLabError, match="hidden_size="):
        make(STATES if make is PrefixMLP else ROWS, value)


@pytest.mark.parametrize("make", [PTuning, ResidualPrompt])
def test_rows_that_are_none_are_refused(make: Any) -> None:
    for bad in (torch.zeros(3), torch.full((2, 4), torch.nan), "rows"):
        with pytest.raises(LoraLabError, match="weight"):
            make(bad)
    with pytest.raises(LoraLabError, match="expected numbers"):
        PrefixMLP(ROWS)
    assert PrefixMLP(STATES).shape == PrefixShape(2, 2, 8)
