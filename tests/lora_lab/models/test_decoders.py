"""GPT-2, GPT-NeoX and Falcon against transformers', each in several shapes: logits, loss, every gradient, padding, caches, packed rows."""

from __future__ import annotations

import pytest
import torch
from decoder_tools import FAMILIES, SHAPES, loss_and_gradients, ours, pair, theirs
from llama_tools import assert_same, ids, logits_of, relative_error, saved_for_backward
from torch.testing import assert_close

import lora_lab
from lora_lab import models
from lora_lab.models import loading
from lora_lab.models.recompute import Recomputable

DROPOUTS = {"gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}, "neox": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
            "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.2}}  # fmt: skip


def with_dropout(shape: str) -> dict[str, float]:
    return DROPOUTS[shape.partition("-")[0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_transformers(shape: str) -> None:
    mine, reference = pair(shape)
    assert type(mine) is loading.FAMILIES[type(reference).__name__]
    assert_same(mine, reference, input_ids=ids())


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("shape", FAMILIES)
def test_padding_is_transformers(shape: str, side: str) -> None:
    mine, reference = pair(shape)
    tokens, mask = ids(3), torch.ones(3, 9, dtype=torch.long)
    if side in ("left", "both"):
        mask[0, :3] = 0
    if side in ("right", "both"):
        mask[1, -4:] = 0
    follows_text = torch.cat((mask[:, :1], mask[:, 1:] & mask[:, :-1]), 1)  # what comes after padding would be predicted from padding
    assert_same(mine, reference, input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(follows_text == 0, -100))


@pytest.mark.parametrize("shape", FAMILIES)
def test_positions_and_embeddings_may_be_given(shape: str) -> None:
    mine, reference = pair(shape)
    tokens, positions = ids(), torch.randint(0, 48, (2, 9))
    assert relative_error(*(logits_of(model, input_ids=tokens, position_ids=positions) for model in (mine, reference))) < 1e-4
    embeddings = torch.randn(2, 9, 32)
    assert relative_error(*(logits_of(model, inputs_embeds=embeddings) for model in (mine, reference))) < 1e-4


@pytest.mark.parametrize("steps", [[4, 1, 1, 1, 1, 1], [2, 3, 4]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", FAMILIES)
def test_a_cache_changes_nothing(shape: str, padded: bool, steps: list[int]) -> None:
    mine, _ = pair(shape)
    tokens, mask = ids(), torch.ones(2, 9, dtype=torch.long)
    mask[0, : 2 * padded] = 0
    whole = logits_of(mine, input_ids=tokens, attention_mask=mask)
    cache, parts, done = None, [], 0
    for length in steps:
        now = slice(done, done + length)
        with torch.no_grad():
            out = mine(input_ids=tokens[:, now], attention_mask=mask[:, : now.stop] if padded else None, past_key_values=cache, use_cache=True)
        cache, done = out.past_key_values, now.stop
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [shape for shape in FAMILIES if shape != "falcon-40b"])  # of which transformers keeps each key for every head
def test_a_past_may_be_transformers(shape: str) -> None:
    mine, reference = pair(shape)
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    past = [reference(input_ids=tokens[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values for _ in range(2)]
    logits = [logits_of(model, input_ids=tokens[:, 4:], attention_mask=mask, past_key_values=past.pop()) for model in (mine, reference)]
    assert relative_error(*logits) < 1e-4


@pytest.mark.parametrize("shape", FAMILIES)
def test_documents_in_one_row_do_not_see_each_other(shape: str) -> None:
    mine, _ = pair(shape)
    tokens, lengths = ids(1, 12), [5, 1, 6]
    alone = torch.cat([logits_of(mine, input_ids=part) for part in tokens.split(lengths, 1)], 1)
    assert_close(logits_of(mine, input_ids=tokens, document_lengths=lengths), alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(mine, input_ids=tokens), alone, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", FAMILIES)
def test_greedy_generation_is_transformers(shape: str) -> None:
    """Prompts of different lengths, padded on the left, fp32."""
    mine, reference = pair(shape)
    prompts = [[5, 9, 33], [7, 8, 10, 11, 12, 40, 3], [60]]
    tokens, mask = models.generation.left_pad(prompts, 0)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = reference.generate(input_ids=tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :].tolist()
    assert models.generate(mine, prompts, max_new_tokens=8).ids == expected
    assert models.generate(mine, prompts, max_new_tokens=8, use_cache=False).ids == expected
    assert len({tuple(row) for row in expected}) > 1


# Dropout and checkpointing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*FAMILIES, "neox-sequential", "falcon-sequential"])
def test_dropout_is_where_transformers_has_it(shape: str) -> None:
    """The same random numbers, drawn in the same order, give the same loss in training mode."""
    mine, reference = pair(shape, **with_dropout(shape))
    tokens, losses = ids(), []
    for model, training in ((mine, True), (reference, True), (mine, False)):
        torch.manual_seed(5)
        losses.append(model.train(training)(input_ids=tokens, labels=tokens).loss)
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert abs(losses[0] - losses[2]) > 1e-3


@pytest.mark.parametrize("shape", FAMILIES)
def test_every_mode_of_checkpointing_gives_the_same_gradients(shape: str) -> None:
    mine = lora_lab.inject(ours(theirs(shape, **with_dropout(shape))), rank=2, dropout=0.2, init="random", bias="all")
    plain = loss_and_gradients(mine, False)
    for mode in (True, 2, "attention"):
        assert_close(loss_and_gradients(mine, mode), plain)
    blocks = [module for module in mine.modules() if isinstance(module, Recomputable)]
    assert len(blocks) == 2
    mine.gradient_checkpointing_enable(2)
    assert [block.recompute for block in blocks] == [True, False]


@pytest.mark.parametrize("shape", FAMILIES)
def test_less_is_kept_for_backward_than_by_transformers(shape: str) -> None:
    """GELU keeps its input, fused projections are not kept beside what is made of them, and no mask is made where none is needed."""
    tokens, kept = ids(2, 40), []
    for model in pair(shape):
        with saved_for_backward() as saved:
            model.train()(input_ids=tokens, labels=tokens)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for address, size in saved.items() if address not in own))
    assert kept[0] < {"gpt2": 0.6, "neox": 0.9, "falcon-7b": 0.8, "falcon-40b": 0.9, "falcon-rw-1b": 1.0}[shape] * kept[1]
