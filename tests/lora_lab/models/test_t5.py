"""Our T5 against transformers': 1.0, 1.1, FLAN and mT5; logits, loss and every gradient, the cache, generation, float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from llama_tools import compiled, relative_error, saved_for_backward
from t5_tools import EOS, PAD, SHAPES, VOCABULARY, assert_same, ids, logits_of, ours, pair, randomised, theirs
from torch.testing import assert_close

import lora_lab
from lora_lab import LoraLabError, models
from lora_lab.models.blocks import GEGLUFunction
from lora_lab.models.generation import right_pad
from lora_lab.models.loading import FAMILIES
from lora_lab.models.t5 import relative_position_bucket


def masks(*lengths: int, width: int = 13, side: str = "right") -> torch.Tensor:
    rows = [[1] * length + [0] * (width - length) for length in lengths]
    return torch.tensor([row if side == "right" else row[::-1] for row in rows])


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_transformers(shape: str) -> None:
    mine, reference = pair(shape)
    assert type(mine) is FAMILIES[type(reference).__name__]
    labels = ids(3, 8)
    labels[1, 5:] = labels[2, :2] = -100
    assert_same(mine, reference, labels, input_ids=ids(), attention_mask=masks(13, 6, 9))


@pytest.mark.parametrize("shape", ["1.0", "1.1"])
def test_beyond_the_last_bucket_too(shape: str) -> None:
    mine, reference = pair(shape, relative_attention_max_distance=20)
    assert_same(mine, reference, ids(1, 31), input_ids=ids(1, 37))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_encoder_and_of_the_decoder_is_transformers(side: str) -> None:
    mine, reference = pair("1.1")
    target, padding = ids(3, 8), masks(8, 5, 3, width=8, side=side)
    assert_same(mine, reference, target.masked_fill(padding == 0, -100), input_ids=ids(), attention_mask=masks(4, 13, 7, side=side),
                decoder_input_ids=ids(3, 8), decoder_attention_mask=padding)  # fmt: skip


def test_padding_does_not_change_a_row() -> None:
    """Relative positions do not move, so that it may stand on either side."""
    mine, alone, target = pair("1.1")[0].double(), ids(1, 5), ids(1, 6)  # float64: equal but for the order of sums
    expected = logits_of(mine, input_ids=alone, decoder_input_ids=target)
    for side in ("right", "left"):
        padded = torch.nn.functional.pad(alone, (8, 0) if side == "left" else (0, 8))
        assert_close(logits_of(mine, input_ids=padded, attention_mask=masks(5, side=side), decoder_input_ids=target), expected)


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone() -> None:
    mine, _ = pair()
    source, target = ids(2), ids(2, 4)
    logits = logits_of(mine, input_ids=source, attention_mask=masks(13, 0), decoder_input_ids=target)
    assert logits.isfinite().all()
    assert_close(logits[:1], logits_of(mine, input_ids=source[:1], decoder_input_ids=target[:1]))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 9), (11, 40), (4, 3), (64, 100)])
def test_the_buckets_are_those_of_the_released_code(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distance = torch.arange(-300, 301)
    mine = relative_position_bucket(distance, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance)
    attention = transformers.models.t5.modeling_t5.T5Attention
    assert torch.equal(mine, attention._relative_position_bucket(distance, bidirectional, buckets, max_distance))
    assert mine.unique().tolist() == sorted({*mine.tolist()}) and mine.max() == (buckets // 2 * 2 if bidirectional else buckets) - 1


def test_embeddings_may_be_given_instead_of_ids() -> None:
    mine, reference = pair("1.1")
    embeddings, targets = torch.randn(2, 9, 30), torch.randn(2, 4, 30)
    both = [logits_of(model, inputs_embeds=embeddings, decoder_inputs_embeds=targets) for model in (mine, reference)]
    assert relative_error(*both) < 1e-4
    source, target = ids(2), ids(2, 4)
    looked_up = logits_of(mine, inputs_embeds=mine.get_input_embeddings()(source), decoder_inputs_embeds=mine.get_input_embeddings()(target))
    assert_close(looked_up, logits_of(mine, input_ids=source, decoder_input_ids=target))


def test_what_the_encoder_made_may_be_given_in_every_form() -> None:
    mine, reference = pair()
    source, target, mask = ids(2), ids(2, 4), masks(13, 6)
    out = mine(input_ids=source, attention_mask=mask, decoder_input_ids=target)
    hidden = out.encoder_last_hidden_state
    with torch.no_grad():
        theirs_ = reference.encoder(input_ids=source, attention_mask=mask)
    assert relative_error(hidden.detach(), theirs_.last_hidden_state) < 1e-4
    for form in (hidden, (hidden,), theirs_, models.seq2seq.EncoderOutput(hidden)):
        again = logits_of(mine, encoder_outputs=form, attention_mask=mask, decoder_input_ids=target)
        assert_close(again, out.logits, rtol=1e-4, atol=1e-4)


def test_labels_are_not_shifted_against_the_logits_but_the_decoders_input_is() -> None:
    mine, _ = pair()
    source, labels = ids(2), ids(2, 5)
    labels[0, 3:] = -100
    given = torch.cat((torch.full((2, 1), PAD), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)), 1)
    assert torch.equal(mine.shift_right(labels), given)
    logits = logits_of(mine, input_ids=source, decoder_input_ids=given)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert_close(mine(input_ids=source, labels=labels).loss, expected)
    out = mine.train()(input_ids=source, labels=labels)
    assert out.logits is None and out.past_key_values is None
    assert_close(out.loss, expected)
    assert mine.train()(input_ids=source, decoder_input_ids=given).logits is not None


def test_the_encoder_alone_is_transformers(tmp_path: Any) -> None:
    reference = randomised(transformers.T5EncoderModel(theirs("1.1").config).eval())
    reference.save_pretrained(tmp_path)
    mine, _ = models.load(tmp_path)
    assert type(mine) is models.T5EncoderModel and mine.get_output_embeddings() is None
    source, mask = ids(), masks(13, 6, 9)
    with torch.no_grad():
        expected = reference(input_ids=source, attention_mask=mask).last_hidden_state
        assert relative_error(mine(input_ids=source, attention_mask=mask).last_hidden_state, expected) < 1e-4
    models.save(mine, tmp_path / "again")
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert_close(again(input_ids=source, attention_mask=mask).last_hidden_state, expected)


# Dropout ----------------------------------------------------------------------------------------------------------------------


def dropouts(model: Any, monkeypatch: Any) -> tuple[int, int]:
    """How often a training pass drops hidden numbers, and attention weights."""
    counts = {"dropout": 0, "scaled_dot_product_attention": 0}
    for name in counts:
        plain = getattr(torch.nn.functional, name)

        def counted(*args: Any, plain: Any = plain, name: str = name, **options: Any) -> Any:
            rate = options.get("dropout_p", args[4] if len(args) > 4 else 0.0) if name.startswith("scaled") else options.get("p", 0.125)
            counts[name] += rate == 0.125 and options.get("training", True)
            return plain(*args, **options)

        monkeypatch.setattr(torch.nn.functional, name, counted)
    model.train()(input_ids=ids(1), labels=ids(1, 4))
    monkeypatch.undo()
    return counts["dropout"], counts["scaled_dot_product_attention"]


@pytest.mark.parametrize("shape", ["1.0", "1.1"])
def test_dropout_is_where_transformers_has_it(shape: str, monkeypatch: Any) -> None:
    mine, reference = pair(shape, dropout_rate=0.125)
    kinds = dropouts(mine, monkeypatch)
    assert kinds == dropouts(reference, monkeypatch) == (2 + 2 * 3 + 2 + 3 * 4, 2 + 3 * 2)
    assert_close(logits_of(mine, input_ids=ids(1), labels=ids(1, 3)).shape, torch.Size([1, 3, VOCABULARY]))
    source = ids(1)
    assert_close(*(logits_of(mine, input_ids=source, decoder_input_ids=source) for _ in range(2)))  # none in eval mode


def test_geglu_keeps_its_inputs_only_and_has_both_derivatives() -> None:
    gate, up = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GEGLUFunction.apply, (gate, up)) and torch.autograd.gradgradcheck(GEGLUFunction.apply, (gate, up))
    with saved_for_backward() as kept:
        GEGLUFunction.apply(gate, up)
    assert sum(kept.values()) == gate.nbytes + up.nbytes


# The cache --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 1, 2], [4, 3]])
@pytest.mark.parametrize("padded", [False, True])
def test_cached_steps_equal_one_pass(steps: list[int], padded: bool) -> None:
    mine, _ = pair("1.1")
    source, target, mask = ids(2), ids(2, 7), masks(13, 6) if padded else None
    decoder_mask = masks(7, 5, width=7, side="left") if padded else None
    whole = logits_of(mine, input_ids=source, attention_mask=mask, decoder_input_ids=target, decoder_attention_mask=decoder_mask)
    cache, encoded, parts, done = None, None, [], 0
    for length in steps:
        now = slice(done, done + length)
        given = {"input_ids": source} if encoded is None else {"encoder_outputs": (encoded,)}
        seen = None if decoder_mask is None else decoder_mask[:, : now.stop]
        with torch.no_grad():
            out = mine(**given, attention_mask=mask, decoder_input_ids=target[:, now], decoder_attention_mask=seen, past_key_values=cache,
                       use_cache=True)  # fmt: skip
        cache, encoded, done = out.past_key_values, out.encoder_last_hidden_state, now.stop
        parts.append(out.logits)
    text = slice(None) if decoder_mask is None else decoder_mask.bool()
    assert_close(torch.cat(parts, 1)[text], whole[text], rtol=1e-4, atol=1e-4)
    assert cache.length == 7 and all(layer.length == 13 for layer in cache.cross)


def test_the_encoders_keys_and_values_are_computed_once() -> None:
    mine, _ = pair()
    calls = []
    for name, module in mine.named_modules():
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v")) or name == "encoder":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    models.generate(mine, [[5, 6, 7], [8]], max_new_tokens=6, stop_ids=[])
    assert len(calls) == len({*calls}) == 1 + 2 * 3


def test_a_cache_keeps_rows_and_may_be_transformers() -> None:
    mine, reference = pair("1.1")
    source, target = ids(3), ids(3, 4)
    with torch.no_grad():
        past = reference(input_ids=source, decoder_input_ids=target[:, :3], use_cache=True).past_key_values
        hidden = reference.encoder(input_ids=source)
    last = logits_of(mine, input_ids=source, decoder_input_ids=target)[:, -1:]
    given = {"encoder_outputs": hidden, "decoder_input_ids": target[:, 3:]}
    assert_close(logits_of(mine, past_key_values=past, **given), last, rtol=1e-4, atol=1e-4)
    out = mine(input_ids=source, decoder_input_ids=target[:, :3], use_cache=True)
    assert_close(logits_of(mine, past_key_values=[*out.past_key_values], **given), last, rtol=1e-4, atol=1e-4)
    out.past_key_values.keep(torch.tensor([2, 0]))
    given = {"encoder_outputs": (hidden.last_hidden_state[[2, 0]],), "decoder_input_ids": target[[2, 0], 3:]}
    kept = logits_of(mine, past_key_values=out.past_key_values, **given)
    assert_close(kept, last[[2, 0]], rtol=1e-4, atol=1e-4)


def test_a_trained_prefix_of_the_decoder_gets_gradients_also_under_checkpointing() -> None:
    mine, _ = pair()
    mine.train()
    prefix = [tuple(torch.randn(2, 3, 2, 7, requires_grad=True) for _ in range(2)) for _ in range(3)]
    source, labels, slopes = ids(2), ids(2, 4), []
    for mode in (False, True):
        mine.gradient_checkpointing_enable(mode)
        loss = mine(input_ids=source, labels=labels, past_key_values=prefix).loss
        slopes.append(torch.autograd.grad(loss, [tensor for layer in prefix for tensor in layer]))
    assert_close(slopes[1], slopes[0])
    assert all(slope.abs().max() > 0 for slope in slopes[0])


# Generation -------------------------------------------------------------------------------------------------------------------

SHALLOW = {"num_layers": 3, "num_decoder_layers": 2}  # transformers' generate makes a cache of num_layers and no more
PROMPTS = [[9, 4, 33, EOS], [5, EOS], [60, 61, 62, 7, 8, 9, 10, EOS], [20, 21, EOS]]


@pytest.mark.parametrize("shape", ["1.0", "1.1"])
def test_greedy_answers_are_transformers_of_a_batch_and_of_each_row(shape: str) -> None:
    reference = theirs(shape, **SHALLOW)
    source, mask = right_pad(PROMPTS, PAD)
    mine, length = ours(reference), 12
    end = models.generate(mine, PROMPTS, max_new_tokens=length, stop_ids=[]).ids[2][4]  # a random model's answers would not end
    reference.config.eos_token_id = reference.generation_config.eos_token_id = end
    mine = ours(reference)
    expected = reference.generate(input_ids=source, attention_mask=mask, max_new_tokens=length, do_sample=False)[:, 1:].tolist()
    result = models.generate(mine, PROMPTS, max_new_tokens=length).ids
    assert result == [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert result == [models.generate(mine, [prompt], max_new_tokens=length).ids[0] for prompt in PROMPTS]
    assert result == models.generate(mine, PROMPTS, max_new_tokens=length, use_cache=False).ids
    assert result == models.generate(reference, PROMPTS, max_new_tokens=length).ids
    assert len({len(row) for row in result}) > 1 and len({tuple(row) for row in result}) > 2


def test_sampled_answers_do_not_depend_on_their_neighbours() -> None:
    mine, _ = pair("1.1")
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 8, "stop_ids": []}
    together = models.generate(mine, PROMPTS, seed=7, **options).ids
    assert together == [models.generate(mine, [prompt], seed=7 + row, **options).ids[0] for row, prompt in enumerate(PROMPTS)]
    assert together != models.generate(mine, PROMPTS, seed=8, **options).ids
    assert all(len(row) == 8 for row in together)


def test_the_repetition_penalty_is_transformers() -> None:
    reference = theirs("1.1", **SHALLOW)
    source, mask = right_pad(PROMPTS, PAD)
    expected = reference.generate(input_ids=source, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False, repetition_penalty=1.5)
    assert models.generate(ours(reference), PROMPTS, max_new_tokens=9, repetition_penalty=1.5, stop_ids=[]).ids == expected[:, 1:].tolist()


# Checkpointing and compiling ---------------------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, mode: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model.train().gradient_checkpointing_enable(mode)
    loss = model(input_ids=ids(2), attention_mask=masks(13, 7), labels=ids(2, 6)).loss
    loss.backward()
    slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), slopes


@pytest.mark.parametrize("mode", [True, 2, "attention"])
@pytest.mark.parametrize("adapted", [False, True])
def test_every_mode_of_checkpointing_gives_the_same_gradients_with_dropout(mode: Any, adapted: bool) -> None:
    mine, _ = pair("1.1", dropout_rate=0.2)
    if adapted:
        lora_lab.inject(mine, rank=2, dropout=0.2, init="random")
    plain, again = loss_and_gradients(mine, False), loss_and_gradients(mine, mode)
    assert mine.is_gradient_checkpointing and len(plain[1]) > 20
    assert_close(again, plain)


def test_checkpointing_keeps_less_and_refuses_a_cache() -> None:
    mine, _ = pair()
    mine.train()
    kept = {}
    for mode in (False, "attention", True):
        mine.gradient_checkpointing_enable(mode)
        with saved_for_backward() as saved:
            mine(input_ids=ids(2, 40), labels=ids(2, 40))
        kept[mode] = sum(saved.values())
    assert kept[True] < kept["attention"] < kept[False]
    with pytest.raises(LoraLabError, match="use_cache=True under gradient checkpointing"):
        mine(input_ids=ids(1), labels=ids(1, 2), use_cache=True)


def test_it_compiles_without_a_break() -> None:
    mine, _ = pair("1.1", num_layers=1, num_decoder_layers=1)
    mine.train()
    source, mask, target = ids(2), masks(13, 6), ids(2, 5)

    def total() -> torch.Tensor:
        return mine(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits.square().mean()

    expected = torch.autograd.grad(total(), [*mine.parameters()])
    with compiled(total) as run:
        assert_close(torch.autograd.grad(run(), [*mine.parameters()]), expected, rtol=1e-4, atol=1e-4)
