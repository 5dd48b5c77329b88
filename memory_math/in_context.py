"""Examples in the prompt, or a tuned model: what k-shot prompting takes of the context window, the memory, the time and the money.

    in_context("llama-2-70b-chat", shots=5, tokens_per_shot=300, question_tokens=200, answer_tokens=100,
               gpu="A100-80GB", gpus=4, mfu=0.4, price=2.5, tuning_tokens=2e6).table()

Every request reads its examples again. Their keys and values are 2 * L * kv * hd elements per token (L layers, kv key/value heads of hd),
and reading the prompt ("prefill") takes 2N operations per token, and 2 * L * a * hd * T^2 in all for attention over T tokens (a heads;
half of the square, as the mask is causal). A tuned model is asked without examples; it costs its training, once.
Sources: Kaplan et al. (arXiv:2001.08361), section 2.1, for the operations; Ainslie et al. (GQA, arXiv:2305.13245) for kv below a.
Left out: caching the examples' keys and values between requests, which takes the time away and not the memory or the window; whether
the examples, or the tuning, help the answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .amounts import positive, share
from .architectures import Architecture, architecture_of, config_file_of, fields_of, preset_of, read_config
from .errors import MemoryMathError
from .hardware import GPU, Price, gpu_of
from .presets import PRESETS
from .report import size_text
from .request import whole
from .time_and_cost import TrainingTime, active_parameters_of, parameters_of, training_flops, training_time

# tokens, by the beginning of a preset's name (the longest that fits), where the config fields here do not say: the models' own configs
KNOWN_WINDOWS = {
    "llama-7b": 2048, "llama-13b": 2048, "llama-30b": 2048, "llama-33b": 2048, "llama-65b": 2048, "llama-1-": 2048, "alpaca": 2048, "koala": 2048,
    "open_llama": 2048, "llama-2-": 4096, "llama-3-": 8192, "meta-llama-3-": 8192, "llama-3.1-": 131072, "llama-3.2-": 131072,
    "llama-3.3-": 131072, "tinyllama": 2048, "smollm-": 2048, "smollm2-": 8192, "mistral-7b": 32768, "mixtral-8x7b": 32768,
    "gemma-": 8192, "pythia": 2048, "gpt-neox": 2048, "dolly-v2": 2048, "falcon": 2048,
}  # fmt: skip
WINDOW_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Prompt:
    """One request. window_share: of prompt and answer in the context window. prefill_seconds, decode_seconds, dollars: None where no
    GPU, or no price, was given."""

    prompt_tokens: int
    answer_tokens: int
    kv_cache_bytes: int
    prefill_flops: float
    window_share: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    dollars: float | None

    @property
    def seconds(self) -> float | None:
        return None if self.prefill_seconds is None or self.decode_seconds is None else self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True)
class InContext:
    """The same question with `shots` examples in the prompt (few_shot) and to a tuned model without any (tuned).

    tuning: the one-off training, None where no tuning_tokens or no GPU was given. largest_shots: how many examples leave room for the
    question and the answer; None where the window is not known.
    """

    name: str
    shots: int
    tokens_per_shot: int
    context_window: int | None
    largest_shots: int | None
    few_shot: Prompt
    tuned: Prompt
    tuning: TrainingTime | None
    gpus: int

    @property
    def fits(self) -> bool | None:
        """Whether examples, question and answer are within the context window; None where the window is not known."""
        return None if self.few_shot.window_share is None else self.few_shot.window_share <= 1

    @property
    def break_even_requests(self) -> int | None:
        """Requests after which the examples have taken as much GPU time as the tuning (at one price per hour: as much money)."""
        if self.tuning is None or self.few_shot.seconds is None or self.tuned.seconds is None:
            return None
        return math.ceil(self.tuning.gpu_hours * 3600 / ((self.few_shot.seconds - self.tuned.seconds) * self.gpus))

    def table(self) -> str:
        """Few-shot and tuned side by side, then the tuning and the number of requests it pays off at, as fixed-width text."""
        lines = [f"{self.name}: {self.shots} examples of {self.tokens_per_shot:,} tokens", f"{'':<24}{f'{self.shots}-shot':>16}{'tuned':>16}"]
        for name, few, tuned in zip(ROWS, _column(self.few_shot), _column(self.tuned), strict=True):
            lines.append(f"{name:<24}{few:>16}{tuned:>16}")
        if self.context_window is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines.append(f"context window {self.context_window:,} tokens: {verdict}; at most {self.largest_shots} examples")
        if self.tuning is not None:
            money = "" if self.tuning.dollars is None else f", ${self.tuning.dollars:,.2f}"
            lines.append(f"tuning, once: {self.tuning.gpu_hours:,.2f} GPU-hours{money}; pays off after {self.break_even_requests:,} requests")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


ROWS = ("prompt tokens", "share of the window", "KV cache", "prefill operations", "prefill", "decoding", "dollars per request")


def _column(prompt: Prompt) -> tuple[str, ...]:
    def shown(value: float | None, form: str, unit: str = "") -> str:
        return "-" if value is None else f"{value:{form}}{unit}"

    return (
        f"{prompt.prompt_tokens:,}", shown(prompt.window_share, ".1%"), size_text(prompt.kv_cache_bytes), shown(prompt.prefill_flops, ".3g"),
        shown(prompt.prefill_seconds, ".3f", " s"), shown(prompt.decode_seconds, ".3f", " s"), shown(prompt.dollars, ".6f"),
    )  # fmt: skip


def in_context(
    model: object,
    *,
    shots: int,
    tokens_per_shot: int,
    question_tokens: int,
    answer_tokens: int,
    context_window: int | None = None,
    bytes_per_element: int = 2,
    gpu: str | GPU | None = None,
    gpus: int = 1,
    mfu: float | None = None,
    price: float | Price | None = None,
    batch_size: int = 1,
    tuning_tokens: float | None = None,
    tuning_method: str = "lora",
    tuning_mfu: float | None = None,
) -> InContext:
    """k examples in every prompt against a tuned model that needs none.

    model: a decoder: a preset, a config, a path, or a model with a .config.
    context_window: tokens; None reads it from the config, or from KNOWN_WINDOWS for a preset's name, and is unknown without either.
    bytes_per_element: of the weights and of the keys and values, 2 in fp16 and bf16.
    gpu, gpus, mfu: seconds, if given together: prefill at this share of the peak; decoding at the memory's speed, as each token of the
    answer reads all weights (once for the batch_size requests that are answered together) and the request's own keys and values. Both
    ignore what the GPUs say to each other. price: dollars per GPU-hour.
    tuning_tokens: examples x tokens x epochs to train on; tuning_method, tuning_mfu: as training_time's method and mfu; None is `mfu`.
    Raises MemoryMathError for an encoder or encoder-decoder, and for values that do nothing without another one.

    >>> llama = in_context("llama-2-70b", shots=5, tokens_per_shot=300, question_tokens=200, answer_tokens=100)
    >>> llama.few_shot.kv_cache_bytes // (1700 + 100)        # 2 x 80 layers x 8 heads x 128 x 2 bytes
    327680
    >>> llama.largest_shots, round(llama.few_shot.window_share, 3)
    (12, 0.439)
    """
    architecture = _decoder(model)
    counts = {"shots": shots, "tokens_per_shot": tokens_per_shot, "question_tokens": question_tokens, "answer_tokens": answer_tokens}
    for name, value in {**counts, "bytes_per_element": bytes_per_element, "gpus": gpus, "batch_size": batch_size}.items():
        whole(name, value)
    window = _window_of(model, context_window)
    _check_together(gpu, mfu, price, tuning_tokens, tuning_mfu, gpus, batch_size)
    device = None if gpu is None else gpu_of(gpu)

    def prompt(tokens: int) -> Prompt:
        return _prompt(model, architecture, tokens, answer_tokens, window, bytes_per_element, device, gpus, mfu, price, batch_size)

    tuning = None
    if tuning_tokens is not None:
        reached = mfu if tuning_mfu is None else tuning_mfu
        tuning = training_time(model, tuning_tokens, gpus=gpus, gpu=device, mfu=reached, price=price, method=tuning_method)
    most = None if window is None else max(0, (window - question_tokens - answer_tokens) // tokens_per_shot)
    few_shot, tuned = prompt(shots * tokens_per_shot + question_tokens), prompt(question_tokens)
    return InContext(architecture.name, shots, tokens_per_shot, window, most, few_shot, tuned, tuning, gpus)


def kv_cache_bytes(model: object, tokens: int, *, bytes_per_element: int = 2) -> int:
    """Keys and values of `tokens` positions: 2 * layers * kv_heads * head_dim elements each.

    >>> kv_cache_bytes("llama-3-8b", 1024) / 2**30
    0.125
    """
    shape = _decoder(model)
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * whole("bytes_per_element", bytes_per_element)
    return per_token * whole("tokens", tokens)


def _prompt(
    model: object, architecture: Architecture, tokens: int, answer: int, window: int | None, itemsize: int,
    gpu: GPU | None, gpus: int, mfu: float | None, price: float | Price | None, batch_size: int,
) -> Prompt:  # fmt: skip
    cache = kv_cache_bytes(architecture, tokens + answer, bytes_per_element=itemsize)
    flops = training_flops(model, tokens, method="inference", sequence_length=tokens).model
    window_share = None if window is None else (tokens + answer) / window
    if gpu is None or mfu is None:
        return Prompt(tokens, answer, cache, flops, window_share, None, None, None)
    prefill = flops / (gpus * gpu.flops_per_second * mfu)
    weights = itemsize * (parameters_of(model) if batch_size > 1 else active_parameters_of(model))  # several requests use most experts
    positions = answer * tokens + answer * (answer + 1) // 2  # the cache grows by one position with each token of the answer
    read = answer * weights / batch_size + kv_cache_bytes(architecture, positions, bytes_per_element=itemsize)
    decode = read / (gpus * gpu.bandwidth_bytes_per_second)
    dollars_per_hour = price.dollars_per_hour if isinstance(price, Price) else price
    dollars = None if dollars_per_hour is None else (prefill + decode) / 3600 * gpus * dollars_per_hour
    return Prompt(tokens, answer, cache, flops, window_share, prefill, decode, dollars)


def _decoder(model: object) -> Architecture:
    architecture = architecture_of(model)
    task = getattr(architecture, "task", "ForCausalLM")
    if task != "ForCausalLM":
        raise MemoryMathError(f"{architecture.name} is a {task}: in-context learning is for decoders with a language model's head")
    return architecture


def _check_together(
    gpu: object, mfu: float | None, price: float | Price | None, tuning_tokens: float | None, tuning_mfu: float | None, gpus: int, batch_size: int
) -> None:
    """Values that would do nothing."""
    if (gpu is None) != (mfu is None):
        raise MemoryMathError(f"gpu={gpu!r} with mfu={mfu!r}: seconds need both, mfu being the share of the GPU's peak that prefill reaches")
    if mfu is not None:
        share("mfu", mfu)
    dollars = price.dollars_per_hour if isinstance(price, Price) else price
    if dollars is not None:
        positive("price", dollars)
    idle = {"price": (price, None), "tuning_tokens": (tuning_tokens, None), "gpus": (gpus, 1), "batch_size": (batch_size, 1)}
    for name, (value, default) in idle.items():
        if gpu is None and value != default:
            raise MemoryMathError(f"{name}={value!r} does nothing without a gpu and its mfu: give them, or leave it out")
    if tuning_mfu is not None and tuning_tokens is None:
        raise MemoryMathError(f"tuning_mfu={tuning_mfu!r} does nothing without tuning_tokens: give them, or leave it out")


def _window_of(model: object, given: int | None) -> int | None:
    if given is not None:
        return whole("context_window", given)
    preset = preset_of(str(model)) if isinstance(model, (str, Path)) else None
    fields = _config_of(model, preset)
    for field in WINDOW_FIELDS:
        value = fields.get(field)
        if isinstance(value, int) and value > 0:
            return value
    known = [beginning for beginning in KNOWN_WINDOWS if preset is not None and preset.startswith(beginning)]
    return KNOWN_WINDOWS[max(known, key=len)] if known else None


def _config_of(model: object, preset: str | None) -> Mapping[str, object]:
    """The config's fields, read from where `architecture_of` reads them."""
    if preset is not None:
        return PRESETS[preset]
    if isinstance(model, (str, Path)):
        path = config_file_of(str(model))
        return {} if path is None else read_config(path)
    if isinstance(model, Mapping):
        return model
    to_dict = getattr(model, "to_dict", None)  # of a config itself
    return fields_of(model) or (to_dict() if callable(to_dict) else {})
