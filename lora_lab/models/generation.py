"""Text generation: batched, cached, greedy or sampled.

Prompts of different lengths are padded on the left, so that every row's next token is at the same place; each row stops on its
own. Works with any causal model that takes transformers' arguments, ours or transformers'. Of an encoder-decoder the encoder reads
the prompts, once and padded on the right, and the decoder begins each row with the model's start token.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLabError
from ..wrapping import base_of
from .base import PretrainedModel, context_of, in_mode, is_encoder_decoder, pad_id_of
from .causal import CausalLM

OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Generation:
    """ids: the new tokens of each row, its stop token included if it came.  texts: decoded, "" without a tokenizer.

    ended: whether a stop token came, before the room was used up.
    """

    ids: list[list[int]]
    texts: list[str]
    seconds: float
    ended: list[bool] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.ids)) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else (int, float)):
                raise LoraLabError(f"{name}={value!r}: expected {'a whole number' if name == 'top_k' else 'a number'}")
        checks = {"temperature": self.temperature == 0 or self.temperature >= 1e-5, "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0}  # fmt: skip
        for name, right in checks.items():
            if not right:
                raise LoraLabError(f"{name}={getattr(self, name)!r}: expected temperature 0 or >= 1e-5, top_k >= 0, 0 < top_p <= 1, "
                                   "repetition_penalty > 0")  # fmt: skip


def generate(model: nn.Module, prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor, tokenizer: Any = None, *,
             max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
             seed: int | Sequence[int] | None = None, stop_ids: Sequence[int] | None = None, use_cache: bool = True,
             on_token: OnToken | None = None) -> Generation:  # fmt: skip
    """Continue each prompt, or with an encoder-decoder answer it, by up to max_new_tokens tokens.

    prompts: texts or lists of ids. Texts are tokenised as they are (apply the chat template first); for an encoder-decoder with the
        special tokens its tokenizer adds, T5's end token.
    temperature: 0 takes the likeliest token.  top_k, top_p: sample among the likeliest k / the smallest set with probability top_p.
    repetition_penalty: divides the logits of tokens seen, those of the prompt included where the model continues it (Keskar et al.
        2019, arXiv:1909.05858, section 4.1).
    seed: row i samples from its own stream seed + i (or seed[i]), so a row's text does not depend on its neighbours.
    stop_ids: None takes the tokenizer's, of an encoder-decoder without one the config's.  on_token(row, id, text): called for each new
        token, for streaming.
    Raises LoraLabError for an empty prompt, a prompt beyond the model's context, a setting out of range, or a model that only reads.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    answers = is_encoder_decoder(model)
    if isinstance(base := base_of(model), PretrainedModel) and not (answers or isinstance(base, CausalLM)):
        raise LoraLabError(f"a {type(base).__name__} reads text and writes none: generate needs a causal language model or an encoder-decoder")
    rows = _encode(prompts, tokenizer, special_tokens=answers)
    # what the encoder reads takes no room from the answer
    limits = _limits(base, [[0]] * len(rows), max_new_tokens) if answers else _limits(model, rows, max_new_tokens)
    ends = getattr(tokenizer, "end_ids", None) or _eos(model.config if answers and tokenizer is None else tokenizer)
    given = stop_ids if isinstance(stop_ids, Iterable) or stop_ids is None else [stop_ids]
    stops = frozenset(_whole_numbers(given, "stop_ids") if given is not None else ends)
    stream = _Stream(limits, tokenizer, stops, on_token)
    started = time.perf_counter()
    generators, pad = _generators(seed, len(rows), model), pad_id_of(tokenizer)
    with in_mode(model, training=False), torch.inference_mode():
        for tokens in (_answer_tokens if answers else _tokens)(model, rows, sampling, generators, use_cache, limits, pad):
            if stream.add(tokens):
                break
    texts = ["" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True) for ids in stream.ids]
    return Generation(stream.ids, texts, time.perf_counter() - started, [not stops.isdisjoint(ids[-1:]) for ids in stream.ids])


def _tokens(model: nn.Module, rows: list[list[int]], sampling: Sampling, generators: list[torch.Generator], use_cache: bool,
            limits: list[int], pad: int) -> Iterator[Tensor]:  # fmt: skip
    """Yield the next token of every row, [B], as often as the row with the most room needs."""
    ids, mask = left_pad(rows, pad, next(model.parameters()).device)
    step, positions, cache = ids, (mask.cumsum(1) - 1).clamp(min=0), None
    last = max(len(row) + limit for row, limit in zip(rows, limits, strict=True)) - 1  # rows that are done may not run out of positions
    for _ in range(max(limits)):
        out = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        token = choose(out.logits[:, -1].float(), ids, mask, sampling, generators)
        yield token
        ids, mask = torch.cat((ids, token[:, None]), 1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        cache = out.past_key_values if use_cache else None
        step = token[:, None] if use_cache else ids
        following = (positions[:, -1:] + 1).clamp(max=last)
        positions = following if use_cache else torch.cat((positions, following), 1)


def _answer_tokens(model: nn.Module, rows: list[list[int]], sampling: Sampling, generators: list[torch.Generator], use_cache: bool,
                   limits: list[int], pad: int) -> Iterator[Tensor]:  # fmt: skip
    """The same of an encoder-decoder. Only its first call reads the prompts; what it made of them goes into the others."""
    ids, mask = right_pad(rows, pad, next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids}
    written, cache = ids.new_full((len(rows), 1), decoder_start(model)), None
    for _ in range(max(limits)):
        step = written[:, -1:] if cache is not None else written
        out = model(**inputs, attention_mask=mask, decoder_input_ids=step, past_key_values=cache, use_cache=use_cache)
        token = choose(out.logits[:, -1].float(), written, torch.ones_like(written), sampling, generators)
        yield token
        written = torch.cat((written, token[:, None]), 1)
        inputs, cache = {"encoder_outputs": (out.encoder_last_hidden_state,)}, out.past_key_values if use_cache else None


def choose(logits: Tensor, ids: Tensor, mask: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row. logits: [B, V].  ids, mask: [B, S], what is there so far.  Returns [B]."""
    if sampling.repetition_penalty != 1.0:
        logits = penalise(logits, ids, mask, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    probabilities = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    draws = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)]
    return torch.cat(draws)


def penalise(logits: Tensor, ids: Tensor, mask: Tensor, penalty: float) -> Tensor:
    """Push tokens already seen away from being chosen: positive logits divided, negative ones multiplied."""
    seen = torch.zeros_like(logits, dtype=torch.int32).scatter_add_(1, ids, mask.to(torch.int32)) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for tokens outside the likeliest top_k, then outside the smallest set with probability top_p (one token at least)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def left_pad(rows: list[list[int]], pad: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """ids and mask, [B, T] each; text ends at the right edge of every row."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def right_pad(rows: list[list[int]], pad: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """ids and mask, [B, T] each; text begins at the left edge of every row."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def decoder_start(model: nn.Module) -> int:
    """The token an encoder-decoder begins with: the config's decoder_start_token_id, else its padding token (T5's)."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    return int(config.pad_token_id if start is None else start)


class _Stream:
    """Collects each row's tokens until its stop token or its limit, and hands out text as it becomes whole."""

    def __init__(self, limits: list[int], tokenizer: Any, stops: frozenset[int], on_token: OnToken | None) -> None:
        self.ids: list[list[int]] = [[] for _ in limits]
        self.done = [False] * len(limits)
        self.shown, self.limits = [0] * len(limits), limits
        self.tokenizer, self.stops, self.on_token = tokenizer, stops, on_token

    def add(self, tokens: Tensor) -> bool:
        """Returns True when every row has stopped."""
        for row, token in enumerate(tokens.tolist()):
            if self.done[row]:
                continue
            self.ids[row].append(token)
            self.done[row] = token in self.stops or len(self.ids[row]) == self.limits[row]
            if self.on_token:
                self.on_token(row, token, self._new_text(row))
        return all(self.done)

    def _new_text(self, row: int) -> str:
        """What this row's newest token added; nothing while it ends in half a character, unless no more will come."""
        text = "" if self.tokenizer is None else self.tokenizer.decode(self.ids[row], skip_special_tokens=True)
        if text.endswith("\ufffd") and not self.done[row]:
            return ""
        new, self.shown[row] = text[self.shown[row] :], len(text)
        return new


def _encode(prompts: Any, tokenizer: Any, special_tokens: bool) -> list[list[int]]:
    if isinstance(prompts, str):
        raise LoraLabError("prompts is one string: expected a list of prompts, [prompt]")
    rows = []
    for index, prompt in enumerate(prompts.tolist() if isinstance(prompts, Tensor) else prompts):
        if isinstance(prompt, str) and tokenizer is None:
            raise LoraLabError("prompts are texts, so a tokenizer is needed: generate(model, prompts, tokenizer)")
        if not isinstance(prompt, Iterable):
            raise LoraLabError(f"prompt {index} is {prompt!r}: expected a text or a list of token ids; one prompt is [prompt]")
        # a rendered chat template brings its own special tokens
        ids = tokenizer.encode(prompt, add_special_tokens=special_tokens) if isinstance(prompt, str) else _whole_numbers(prompt, f"prompt {index}")
        if not ids:
            raise LoraLabError(f"prompt {index} is empty: expected at least one token")
        rows.append(ids)
    if not rows:
        raise LoraLabError("prompts is empty: expected at least one")
    return rows


def _whole_numbers(values: Iterable[Any], what: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise LoraLabError(f"{what} is {values!r:.60}: expected whole numbers, token ids") from None


def _limits(model: nn.Module, rows: list[list[int]], wanted: int) -> list[int]:
    """How many tokens each row may get: as many as it would alone."""
    if not isinstance(wanted, int) or wanted < 1:
        raise LoraLabError(f"max_new_tokens={wanted!r}: expected a whole number of at least 1")
    context = context_of(model)
    longest = max(map(len, rows))
    if context is not None and longest >= context:
        raise LoraLabError(f"a prompt has {longest} tokens, the model's context is {context}: shorten the prompt")
    return [wanted if context is None else min(wanted, context - len(row)) for row in rows]


def _eos(tokenizer: Any) -> list[int]:
    eos = getattr(tokenizer, "eos_token_id", None)
    return list(eos) if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]


def _generators(seed: int | Sequence[int] | None, rows: int, model: nn.Module) -> list[torch.Generator]:
    device = next(model.parameters()).device
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else _whole_numbers(seed if isinstance(seed, Iterable) else [seed], "seed")
    if len(seeds) != rows:
        raise LoraLabError(f"seed has {len(seeds)} values for {rows} prompts: give one number, or one per prompt")
    return [torch.Generator(device).manual_seed(each) for each in seeds]
