"""A language model as a classifier: the log-probability of each possible answer after the prompt (Brown et al. 2020, arXiv:2005.14165, 2.4).

    log P(choice | prompt) = sum over its tokens of log P(token | prompt, the tokens before it)

One pass reads the prompts and gives every choice its first token; choices of several tokens take a second pass, over the prompt's cache
in a causal model and over what the encoder has read in an encoder-decoder. No prompt is read twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...data.batching import length_buckets
from ...data.verbalizing import answer_ids
from ...errors import LoraLabError, did_you_mean
from ...models.base import context_of, is_encoder_decoder, pad_id_of
from ...models.cache import KVCache
from ...models.generation import decoder_start, left_pad, right_pad
from .passes import Prompt, evaluating, in_batches, prompt_ids

Choice = str | Sequence[int]
Ids = tuple[int, ...]
NORMALISE = ("tokens", "characters")


def score_choices(model: nn.Module, prompts: Sequence[Prompt], tokenizer: Any, choices: Sequence[Choice] | Sequence[Sequence[Choice]], *,
                  normalise: str | None = None, end: bool = False, batch_size: int = 16, precision: str = "fp32", use_cache: bool = True,
                  progress: bool = True) -> Tensor:  # fmt: skip
    """log P(choice | prompt) in nats, [prompts, choices], float64 on the CPU; `best_choices` picks.

    model: a causal language model or an encoder-decoder, ours or transformers'.
    prompts: texts as `models.generate` takes them, token ids, or rows, whose answer is left out.  choices: the same for all prompts, or a
        list for each (shorter lists are filled up with -inf). A text is as it stands behind the prompt, the blank included: " positive".
    normalise: divide by the choice's "tokens", or by its "characters" (without blanks around it), so that long answers stand a chance.
    end: the stop token after it counts, too, so that "yes" is not always likelier than "yes, but".
    batch_size: prompts, and then prompts with a choice, in one pass.  use_cache=False reads the prompt again with every choice of several
        tokens.
    What a prompt without content gives the choices can be subtracted (contextual calibration: Zhao et al. 2021, arXiv:2102.09690).
    Raises LoraLabError for an empty prompt or choice, one beyond the context, and where a probability is not a number.
    """
    if normalise is not None and normalise not in NORMALISE:
        raise LoraLabError(f"normalise={normalise!r}: expected None, 'tokens' or 'characters'{did_you_mean(normalise, NORMALISE)}")
    answers = is_encoder_decoder(model)
    rows = prompt_ids(prompts, tokenizer, answers)
    given = _for_each(choices, len(rows))
    encoded = functools.cache(lambda text: answer_ids(text, tokenizer, answers))
    wanted = [[_ids(choice, index, tokenizer, end, encoded) for choice in each] for index, each in enumerate(given)]
    _check_context(model, [[0]] * len(rows) if answers else rows, wanted)
    scores = torch.full((len(rows), max(map(len, wanted))), -torch.inf, dtype=torch.float64)
    pad = pad_id_of(tokenizer)
    with evaluating(model, precision):
        for indices in in_batches([len(row) for row in rows], batch_size, "score", progress):
            read = (_Answered if answers else _Continued)(model, [rows[i] for i in indices], pad, use_cache)
            for index, found in zip(indices, _score(read, [wanted[i] for i in indices], batch_size), strict=True):
                sizes = [_size(choice, ids, normalise, tokenizer) for choice, ids in zip(given[index], wanted[index], strict=True)]
                scores[index, : len(found)] = torch.tensor(found, dtype=torch.float64) / torch.tensor(sizes)
    if (broken := scores.isnan().any(1)).any():
        raise LoraLabError(f"the probabilities after prompt {int(broken.nonzero()[0])} are not numbers: the weights hold NaN, or {precision} is "
                           "too small for them")  # fmt: skip
    return scores


def best_choices(scores: Tensor) -> list[int]:
    """The likeliest choice of each row; of equally likely ones the first.

    >>> best_choices(torch.tensor([[-2.0, -1.0], [-1.0, -1.0]]))
    [1, 0]
    """
    return [row.index(max(row)) for row in scores.tolist()]


# Choices --------------------------------------------------------------------------------------------------------------------


def _for_each(choices: Any, prompts: int) -> list[Sequence[Choice]]:
    """A list of choices for each prompt."""
    if isinstance(choices, str) or not len(choices):
        raise LoraLabError(f"choices={choices!r:.60}: expected a list of at least one text, or such a list for each prompt")
    if not _is_list_of_choices(choices[0]):
        return [choices] * prompts
    if len(choices) != prompts or not all(map(_is_list_of_choices, choices)):
        raise LoraLabError(f"{len(choices)} lists of choices for {prompts} prompts: expected a list for each, with at least one choice")
    return list(choices)


def _is_list_of_choices(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and not isinstance(value[0], int)


def _ids(choice: Choice, prompt: int, tokenizer: Any, end: bool, encoded: Callable[[str], list[int]]) -> Ids:
    if isinstance(choice, str) and tokenizer is None:
        raise LoraLabError(f"choice {choice!r} is text, so a tokenizer is needed")
    ids = encoded(choice) if isinstance(choice, str) else choice
    if not isinstance(ids, Sequence) or not len(ids):
        raise LoraLabError(f"choice {choice!r} of prompt {prompt} is empty: expected a text or ids of at least one token")
    if not end:
        return tuple(ids)
    if (stop := getattr(tokenizer, "eos_token_id", None)) is None:
        raise LoraLabError("end=True: this tokenizer has no stop token (eos_token_id)")
    return (*ids, stop)


def _size(choice: Choice, ids: Ids, normalise: str | None, tokenizer: Any) -> float:
    if normalise == "characters":
        text = choice if isinstance(choice, str) else tokenizer.decode(list(choice))
        return max(len(text.strip()), 1)
    return len(ids) if normalise == "tokens" else 1


def _check_context(model: nn.Module, rows: list[list[int]], wanted: list[list[Ids]]) -> None:
    context = context_of(model)
    for index, (row, choices) in enumerate(zip(rows, wanted, strict=True)):
        if context is not None and (length := len(row) + max(map(len, choices)) - 1) > context:
            raise LoraLabError(f"prompt {index} with its longest choice has {length} tokens, the model's context is {context}: shorten the prompt")


# Passes ---------------------------------------------------------------------------------------------------------------------


class _Read(Protocol):
    """Prompts that a model has read. first: [B, V], logits of the next token."""

    first: Tensor

    def after(self, rows: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        """Logits after each token of `steps` [n, T] behind the prompts `rows` [n]; mask [n, T], 1 for a token.  Returns [n, T, V]."""


class _Continued:
    """By a causal model."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], pad: int, use_cache: bool) -> None:
        self.model = model
        self.ids, self.mask = left_pad(prompts, pad, next(model.parameters()).device)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=self.ids, attention_mask=self.mask, position_ids=positions, use_cache=use_cache, logits_to_keep=1)
        self.first, self.cache = out.logits[:, -1], out.past_key_values if use_cache else None

    def after(self, rows: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        mask = torch.cat((self.mask[rows], mask), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.cache is None:
            steps, length = torch.cat((self.ids[rows], steps), 1), steps.shape[1]
            return self.model(input_ids=steps, attention_mask=mask, position_ids=positions, logits_to_keep=length).logits
        positions = positions[:, -steps.shape[1] :]
        past = rows_of(self.cache, rows)
        return self.model(input_ids=steps, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True).logits


class _Answered:
    """By an encoder-decoder, whose decoder begins with the start token."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], pad: int, use_cache: bool) -> None:
        self.model = model
        ids, self.mask = right_pad(prompts, pad, next(model.parameters()).device)
        self.start = ids.new_full((len(ids), 1), decoder_start(model))
        out = model(input_ids=ids, attention_mask=self.mask, decoder_input_ids=self.start, use_cache=False)
        self.first, self.encoded = out.logits[:, -1], out.encoder_last_hidden_state

    def after(self, rows: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        steps = torch.cat((self.start[rows], steps), 1)
        out = self.model(encoder_outputs=(self.encoded[rows],), attention_mask=self.mask[rows], decoder_input_ids=steps, use_cache=False)
        return out.logits[:, 1:]


def rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows of another one, which stays as it is: ours, or one of transformers'."""
    if isinstance(cache, KVCache):
        return type(cache)([tuple(values[rows] for values in layer) for layer in cache])
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(rows)
    return chosen


def _score(read: _Read, wanted: list[list[Ids]], batch_size: int) -> list[list[float]]:
    """log P of each prompt's choices. Choices of the same tokens are computed once, and so are equal."""
    pairs = list(dict.fromkeys((row, choice) for row, choices in enumerate(wanted) for choice in choices))
    first = torch.log_softmax(_exact(read.first), -1)
    index = torch.tensor([(row, choice[0]) for row, choice in pairs], device=first.device)
    scores = dict(zip(pairs, first[index[:, 0], index[:, 1]].tolist(), strict=True))
    longer = [pair for pair in pairs if len(pair[1]) > 1]
    for chosen in length_buckets([len(choice) for _, choice in longer], batch_size):
        for pair, more in zip([longer[i] for i in chosen], _rest(read, [longer[i] for i in chosen]), strict=True):
            scores[pair] += more
    return [[scores[row, choice] for choice in choices] for row, choices in enumerate(wanted)]


def _rest(read: _Read, pairs: list[tuple[int, Ids]]) -> Iterator[float]:
    """log P of each choice's tokens from the second on."""
    device = read.first.device
    steps, mask = right_pad([list(choice[:-1]) for _, choice in pairs], 0, device)
    targets, _ = right_pad([list(choice[1:]) for _, choice in pairs], 0, device)
    logits = _exact(read.after(torch.tensor([row for row, _ in pairs], device=device), steps, mask))
    found = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    yield from found.where(mask.bool(), 0.0).sum(-1).tolist()


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
