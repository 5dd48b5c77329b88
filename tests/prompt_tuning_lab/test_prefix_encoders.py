"""Prefixes before encoders (BERT, RoBERTa) and encoder-decoders (T5), ours and transformers'."""

from __future__ import annotations

from typing import Any

import bert_tools
import peft
import pytest
import torch
from llama_tools import relative_error
from prefix_tools import Prefixed, both, encode_with_prefixes, generated, model, random_states, run
from torch.testing import assert_close

from lora_lab.errors import LoraLabError
from lora_lab.models.generation import generate
from prompt_tuning_lab.prefix import Prefix, from_rows, keys_and_values, to_rows
from prompt_tuning_lab.prefix_cache import prefix_shape
from prompt_tuning_lab.prefix_insertion import insert_prefixes

SIDES = ["ours", "theirs"]
EXACT = {"rtol": 0, "atol": 1e-10}
ENCODERS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "RobertaModel", "RobertaForSequenceClassification"]
ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
each_encoder = pytest.mark.parametrize(("side", "name"), [(side, name) for side in SIDES for name in ENCODERS])
on_both_sides = pytest.mark.parametrize("side", SIDES)


def padded() -> torch.Tensor:
    """Rows of 7, 5 and 4 words."""
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 4:] = 0, 0
    return mask


def answer(out: Any) -> torch.Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def seen_by_text_alone(front: int, text: int) -> torch.Tensor:
    """The mask of [front, text] under which front does not see the text: [1, 1, T, T], True where one looks."""
    mask = torch.ones(front + text, front + text, dtype=torch.bool)
    mask[:front, front:] = False
    return mask[None, None]


# Encoders -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_a_prefix_is_words_in_front_that_do_not_see_the_text(name: str) -> None:
    """P-tuning v2, section 3.2; the oracle is transformers' model with a mask that says so. Positions of the text start at P."""
    models, front = both(name), torch.tensor([5, 9, 3])
    with torch.no_grad():
        whole = torch.cat((front.expand(3, -1), ids), 1)
        expected = models["theirs"](input_ids=whole, attention_mask=seen_by_text_alone(3, 7).expand(3, -1, -1, -1)).last_hidden_state[:, 3:]
        for base in models.values():
            actual = run(base, [keys_and_values(base, front)], [0, 0, 0], input_ids=ids).last_hidden_state
            assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification", "BertModel"])
def test_answers_and_gradients_are_pefts(name: str) -> None:
    models, mask = both(name), padded()
    task = "SEQ_CLS" if "Classification" in name else "FEATURE_EXTRACTION"
    theirs = peft.get_peft_model(models["theirs"], peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)).double()
    rows = theirs.prompt_encoder["default"].embedding.weight
    rows.data.mul_(0.5)
    text = ids.masked_fill(mask == 0, bert_tools.padding(name))
    reference = answer(theirs(input_ids=text, attention_mask=mask))
    keep = mask.bool() if reference.ndim == 3 else slice(None)
    weights = torch.randn_like(reference[keep])
    (reference[keep] * weights).sum().backward()
    for base in (models["ours"], theirs.get_base_model()):
        states = from_rows(rows.detach(), prefix_shape(base)).clone().requires_grad_()
        out = answer(run(base, [states], [0, 0, 0], input_ids=text, attention_mask=mask))
        (out[keep] * weights).sum().backward()
        assert_close(out[keep], reference[keep], **EXACT)
        assert_close(to_rows(states.grad), rows.grad, **EXACT)


@each_encoder
def test_rows_of_an_encoder_with_different_prefixes_and_none_are_as_if_alone(side: str, name: str) -> None:
    base, mask = model(side, name), padded()
    text = ids.masked_fill(mask == 0, bert_tools.padding(name))
    prefixes, which = [random_states(base, 2), random_states(base, 5)], [1, -1, 0]
    with torch.no_grad():
        together = answer(run(base, prefixes, which, input_ids=text, attention_mask=mask))
        for row, index in enumerate(which):
            keep = mask[row].bool()
            given = {"input_ids": ids[row : row + 1, keep]}
            alone = answer(run(base, prefixes, [index], **given) if index >= 0 else base(**given))[0]
            assert_close(together[row, keep] if together.ndim == 3 else together[row], alone, **EXACT)


@each_encoder
def test_an_encoders_prefix_matters_and_gets_every_gradient(side: str, name: str) -> None:
    """T14, T25: no number of it is dead, and zeros are not nothing."""
    base = model(side, name).requires_grad_(False)
    prefix = Prefix(random_states(base, 3)).double()
    out = answer(run(base, [prefix()], [0, 0, 0], input_ids=ids))
    (out * torch.randn_like(out)).sum().backward()
    assert (prefix.weight.grad != 0).all() and all(parameter.grad is None for parameter in base.parameters())
    zeros = answer(run(base, [torch.zeros_like(prefix())], [0, 0, 0], input_ids=ids))
    assert not torch.allclose(zeros, answer(base(input_ids=ids)), atol=1e-4)


@pytest.mark.parametrize("mode", [True, "attention"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "t5"])
def test_checkpointing_of_our_models_keeps_the_prefix(name: str, mode: bool | str) -> None:
    """T10."""
    base = model("ours", name).requires_grad_(False).train()
    labels = {"labels": torch.tensor([0, 1, 2]) if name != "t5" else ids}
    gradients = []
    for each in (False, mode):
        base.gradient_checkpointing_enable(each)
        prefixes = [random_states(base, length).requires_grad_() for length in (2, 5)]
        run(base, prefixes, [1, 0, -1], input_ids=ids, **labels).loss.backward()
        gradients.append([prefix.grad for prefix in prefixes])
    assert_close(*gradients, **EXACT)
    assert all((gradient != 0).all() for gradient in gradients[0])


@on_both_sides
def test_vectors_and_positions_that_are_given_are_used(side: str) -> None:
    base = model(side, "RobertaModel")
    states, embeds = random_states(base, 3), base.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = run(base, [states], [0, 0, 0], input_ids=ids).last_hidden_state
        told = torch.arange(2, 9)[None]  # RoBERTa's first position is 2
        for given in ({"inputs_embeds": embeds}, {"input_ids": ids, "position_ids": told}):
            assert_close(run(base, [states], [0, 0, 0], **given).last_hidden_state, expected, **EXACT)


def test_an_encoder_continues_nothing() -> None:
    base = model("ours", "BertModel")
    past = insert_prefixes(base, [random_states(base, 2)], [0, 0, 0], {"input_ids": ids})
    with pytest.raises(LoraLabError, match="nothing to continue"):
        run(base, [random_states(base, 2)], [0, 0, 0], **{**past, "attention_mask": None})


# T5 -----------------------------------------------------------------------------------------------------------------------------


LABELS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(2))


def test_a_t5s_encoder_reads_words_in_front_that_do_not_see_the_text() -> None:
    """The oracle is transformers' encoder with a mask that says so: its relative positions count from the prefix on."""
    models, front = both("t5"), torch.tensor([5, 9, 3])
    with torch.no_grad():
        whole = torch.cat((front.expand(3, -1), ids), 1)
        encoder = models["theirs"].get_encoder()
        expected = encoder(input_ids=whole, attention_mask=seen_by_text_alone(3, 7).expand(3, -1, -1, -1)).last_hidden_state[:, 3:]
        for base in models.values():
            actual = encode_with_prefixes(base, [keys_and_values(base, front)], [0, 0, 0], {"input_ids": ids}).last_hidden_state
            assert relative_error(actual, expected) < 1e-6  # transformers' norms are float32 in a float64 model


@on_both_sides
def test_a_t5s_decoder_has_written_the_text_in_front(side: str) -> None:
    """Its layers are the last ones of the prefix. encoder_outputs that are given are taken as they are: the prefix is in them."""
    base, front = model(side, "t5"), torch.tensor([5, 9, 3])
    with torch.no_grad():
        of_front = encode_with_prefixes(base, [], [-1], {"input_ids": front[None]})
        given = {"encoder_outputs": type(of_front)(last_hidden_state=of_front.last_hidden_state.expand(3, -1, -1))}
        expected = base(**given, decoder_input_ids=torch.cat((front.expand(3, -1), LABELS), 1)).logits[:, 3:]
        actual = run(base, [keys_and_values(base, front)], [0, 0, 0], **given, decoder_input_ids=LABELS).logits
    assert_close(actual, expected, rtol=0, atol=1e-10)


def test_our_t5_and_transformers_are_one_under_a_prefix() -> None:
    """Logits and every gradient; padding on the right, rows with other prefixes and none."""
    models, mask, results = both("t5"), padded(), []
    for base in models.values():
        prefixes = [random_states(base, length).requires_grad_() for length in (2, 5)]
        out = run(base, prefixes, [1, -1, 0], input_ids=ids, attention_mask=mask, labels=LABELS)
        (out.logits * torch.linspace(0.5, 1, out.logits.numel(), dtype=torch.float64).view_as(out.logits)).sum().backward()
        results.append((out.logits, [prefix.grad for prefix in prefixes]))
        assert out.past_key_values is None
    for mine, reference in zip([results[0][0], *results[0][1]], [results[1][0], *results[1][1]], strict=True):
        assert relative_error(mine, reference) < 1e-5


@on_both_sides
def test_rows_of_a_t5_are_as_if_alone(side: str) -> None:
    base, mask = model(side, "t5"), padded()
    prefixes, which = [random_states(base, 2), random_states(base, 5)], [1, -1, 0]
    with torch.no_grad():
        together = run(base, prefixes, which, input_ids=ids, attention_mask=mask, decoder_input_ids=LABELS).logits
        for row, index in enumerate(which):
            given = {"input_ids": ids[row : row + 1, mask[row].bool()], "decoder_input_ids": LABELS[row : row + 1]}
            assert_close(together[row], (run(base, prefixes, [index], **given) if index >= 0 else base(**given)).logits[0], **EXACT)


@on_both_sides
def test_every_layer_of_a_t5_has_keys_and_values_of_its_own(side: str) -> None:
    """T14: PEFT gives two layers of four the same slots, and half of its prefix never learns. Here each slot moves the output by itself."""
    base = model(side, "t5").requires_grad_(False)
    prefix = Prefix(random_states(base, 3)).double()
    assert len(prefix.weight) == base.config.num_layers + base.config.num_decoder_layers == 5
    run(base, [prefix()], [0, 0, 0], input_ids=ids, labels=LABELS).loss.backward()
    assert (prefix.weight.grad != 0).all()
    with torch.no_grad():
        plain = run(base, [prefix()], [0, 0, 0], input_ids=ids, decoder_input_ids=LABELS).logits
        moved = []
        for layer in range(5):
            for half in range(2):
                other = prefix().clone()
                other[layer, half] += 0.3
                moved.append(run(base, [other], [0, 0, 0], input_ids=ids, decoder_input_ids=LABELS).logits - plain)
    assert all(float(each.abs().max()) > 1e-4 for each in moved)
    assert all(not torch.allclose(first, second) for i, first in enumerate(moved) for second in moved[:i])


@on_both_sides
def test_a_t5_writes_under_a_prefix_with_and_without_a_cache(side: str) -> None:
    """T6: cached == uncached == a loop by hand."""
    base, rows = model(side, "t5"), [ids[0].tolist(), ids[1, :5].tolist(), ids[2, :4].tolist()]
    prefixes, which = [random_states(base, 2, std=2.0), random_states(base, 5, std=2.0)], [1, -1, 0]
    prefixed = Prefixed(base, prefixes, which)
    cached, uncached = (generate(prefixed, rows, max_new_tokens=6, use_cache=use, stop_ids=[]).ids for use in (True, False))
    by_hand = []
    for row, index in zip(rows, which, strict=True):
        written = [0]
        for _ in range(6):
            with torch.no_grad():
                out = run(base, prefixes, [index], input_ids=torch.tensor([row]), decoder_input_ids=torch.tensor([written]))
            written.append(int(out.logits[0, -1].argmax()))
        by_hand.append(written[1:])
    assert cached == uncached == by_hand
    assert cached != generate(Prefixed(base, prefixes, [-1] * 3), rows, max_new_tokens=6, stop_ids=[]).ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}], ids=str)
def test_transformers_generate_finds_the_prefix_of_a_t5(options: dict[str, Any]) -> None:
    base, mask = model("theirs", "t5-deep-encoder"), padded()
    prefixes, which = [random_states(base, 2, std=2.0), random_states(base, 5, std=2.0)], [1, -1, 0]
    together = generated(base, prefixes, which, ids, mask, **options)
    for row, index in enumerate(which):
        keep = mask[row].bool()
        alone = generated(base, prefixes, [index], ids[row : row + 1, keep], mask[row : row + 1, keep], **options)
        assert together[row].tolist() == alone[0].tolist()
    if not options:
        rows = [ids[row, mask[row].bool()].tolist() for row in range(3)]
        ours = Prefixed(both("t5-deep-encoder")["ours"], prefixes, which)
        assert generate(ours, rows, max_new_tokens=6, stop_ids=[]).ids == [[*row] for row in together.tolist()]


@on_both_sides
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_encoders_hooks_are_gone_after_the_call(side: str, attention: str) -> None:
    base = model(side, "t5")
    if side == "theirs":
        base.set_attn_implementation(attention)
    with torch.no_grad():
        before = base(input_ids=ids, decoder_input_ids=LABELS).logits
        under = run(base, [random_states(base, 2), random_states(base, 4)], [0, -1, 1], input_ids=ids, decoder_input_ids=LABELS).logits
        after = base(input_ids=ids, decoder_input_ids=LABELS).logits
    assert torch.equal(before, after) and not torch.allclose(before[0], under[0], atol=1e-3)
    assert_close(under[1], before[1], **EXACT)


@on_both_sides
def test_padding_on_the_left_of_what_a_t5_reads_is_no_distance(side: str) -> None:
    """Relative positions count text, not columns: a row that is padded between prefix and text is as if alone (so are rows of other methods'
    tasks in one batch, which have soft prompts where this row has padding)."""
    base, mask = model(side, "t5"), torch.ones_like(ids)
    mask[1, :3], mask[2, :1] = 0, 0
    prefixes, which = [random_states(base, 2), random_states(base, 5)], [1, 0, -1]
    with torch.no_grad():
        together = run(base, prefixes, which, input_ids=ids, attention_mask=mask, decoder_input_ids=LABELS).logits
        for row, index in enumerate(which):
            given = {"input_ids": ids[row : row + 1, mask[row].bool()], "decoder_input_ids": LABELS[row : row + 1]}
            assert_close(together[row], (run(base, prefixes, [index], **given) if index >= 0 else base(**given)).logits[0], **EXACT)


def test_padding_on_the_left_of_what_a_t5_writes() -> None:
    """Ours counts text there, too; transformers' decoder counts columns, so it is refused."""
    models, mask = both("t5"), torch.ones_like(LABELS)
    mask[1, :2] = 0
    base = models["ours"]
    states = random_states(base, 2)
    with torch.no_grad():
        together = run(base, [states], [0, 0, 0], input_ids=ids, decoder_input_ids=LABELS, decoder_attention_mask=mask).logits
        alone = run(base, [states], [0], input_ids=ids[1:2], decoder_input_ids=LABELS[1:2, 2:]).logits
    assert_close(together[1, 2:], alone[0], **EXACT)
    with pytest.raises(LoraLabError, match=r"relative positions in columns.*Pad on the right"):
        run(models["theirs"], [states], [0, 0, 0], input_ids=ids, decoder_input_ids=LABELS, decoder_attention_mask=mask)


@on_both_sides
def test_what_a_t5_cannot_have_is_named(side: str) -> None:
    base = model(side, "t5")
    states = random_states(base, 2)
    bad = ((lambda: run(base, [states], [0, 0], input_ids=ids, labels=LABELS), "which has 2 rows, the batch 3"),
           (lambda: run(base, [states[:3]], [0] * 3, input_ids=ids, labels=LABELS), r"expected \[5, 2, P, 3, 7\]"),
           (lambda: run(base, [states], [0] * 3, input_ids=ids, attention_mask=torch.ones(3, 4), labels=LABELS), r"expected \[3, 7\]"),
           (lambda: run(base, [states], [0] * 3, labels=LABELS), "needs input_ids"))  # fmt: skip
    for attempt, message in bad:
        with pytest.raises(LoraLabError, match=message):
            attempt()


def test_other_encoder_decoders_are_refused() -> None:
    import transformers

    config = transformers.BartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                     decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8)  # fmt: skip
    with pytest.raises(LoraLabError, match="of encoder-decoders only T5 and mT5 can"):
        prefix_shape(transformers.BartForConditionalGeneration(config))
