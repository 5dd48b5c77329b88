"""What would save how much: every knob of a request turned by itself, its effect predicted, and what turning it costs.

    print(savings("llama-3-8b", precision="bf16-mixed", batch_size=8, sequence_length=2048))

Savings do not add up: a knob that lowers one phase of the step is worth nothing while another phase is the peak. `explain_oom` in
questions.py looks for knobs that make a step fit together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from .errors import MemoryMathError
from .footprint import Footprint, implementation_of, predict
from .report import html_grid, markdown_grid, size_text, text_grid, title_of
from .request import ADAPTED, VIRTUAL

Asked = Mapping[str, Any]
FREE, TIME, ROUNDING, LEARNING = range(4)  # prices: nothing; time; the same training in fewer bits; another training


@dataclass(frozen=True)
class Knob:
    """name: what is done. change: from all keywords of a request to those it sets, or None where it does not apply.

    price: FREE, TIME, ROUNDING or LEARNING, the worst it costs. cost: the same in words.
    """

    name: str
    change: Callable[[Asked], dict[str, Any] | None]
    price: int
    cost: str


def _where(**allowed: Collection[Any]) -> Callable[[Asked], bool]:
    """Whether each of these keywords has one of these values."""
    return lambda asked: all(asked[name] in values for name, values in allowed.items())


def _set(where: Callable[[Asked], bool] = lambda _: True, **keywords: Any) -> Callable[[Asked], dict[str, Any] | None]:
    """These keywords, where the request is one of those and does not have them all already."""

    def change(asked: Asked) -> dict[str, Any] | None:
        return dict(keywords) if where(asked) and any(asked[name] != value for name, value in keywords.items()) else None

    return change


def _zero(stage: int) -> Callable[[Asked], dict[str, Any] | None]:
    return lambda asked: {"zero_stage": stage} if asked["world_size"] > 1 and asked["zero_stage"] < stage else None


def _accumulate(batch_size: Callable[[int], int]) -> Callable[[Asked], dict[str, Any] | None]:
    """A smaller micro-batch, and as many more of them for one step."""

    def change(asked: Asked) -> dict[str, Any] | None:
        before = asked["batch_size"]
        after = batch_size(before)
        if asked["method"] == "inference" or not 0 < after < before or before % after:
            return None
        return {"batch_size": after, "grad_accum_steps": asked["grad_accum_steps"] * (before // after)}

    return change


def _own_model_code(asked: Asked) -> dict[str, Any] | None:
    """lora_lab's models have fused attention and one loss; where others were asked for, these keywords change with it."""
    needed = {"implementation": "lora_lab", "attention": "sdpa", "loss": asked["loss"] and "chunked"}
    return None if asked["implementation"] == "lora_lab" else {name: value for name, value in needed.items() if asked[name] != value}


def _fused_step(asked: Asked) -> dict[str, Any] | None:
    """For those that PyTorch has one kernel for; not in the place of lora_lab's rounded step, which is another kind of training."""
    rounded = asked["implementation"] == "lora_lab" and asked["method"] == "full" and asked["precision"] == "bf16"
    there = asked["optimizer"] in ("sgd", "momentum", "adam", "adamw") and asked["optimizer_implementation"] != "fused"
    return {"optimizer_implementation": "fused"} if there and not rounded else None


def _halve(name: str, where: Callable[[Asked], bool] = lambda _: True) -> Callable[[Asked], dict[str, Any] | None]:
    return lambda asked: {name: asked[name] // 2} if where(asked) and asked[name] >= 2 else None


_FULL, _ADAPTED, _PROMPT_ONLY = _where(method=["full"]), _where(method=ADAPTED), _where(method=["inference"])
_ADAM = _where(optimizer=["adam", "adamw"], method=["full", *ADAPTED, *VIRTUAL])
_FROZEN_BASE = _where(method=["frozen", "lora", "dora", *VIRTUAL, "inference"], quantization=["none"])
_ALL_LINEAR = _where(method=ADAPTED, target_modules=["all-linear"])
_NOT_FULL = _where(method=["frozen", *ADAPTED, *VIRTUAL, "inference"])
_CODES = "frozen weights rounded to 4 bit and unpacked in every pass"

KNOBS = (  # from the cheapest to the dearest
    Knob("fused optimizer", _fused_step, FREE, "nothing: the same step in one kernel"),
    Knob("fused attention", _set(_where(attention=["eager"]), attention="sdpa"), FREE, "nothing: the same up to rounding, and faster"),
    Knob("chunked loss", _set(loss="chunked"), TIME, "the softmax over the vocabulary is computed again in backward"),
    Knob("gradient checkpointing", _set(gradient_checkpointing=True), TIME, "one more forward pass: a third more compute, half more with adapters"),
    Knob("half the batch, accumulated", _accumulate(lambda batch: batch // 2 if batch > 2 else 0), TIME, "smaller passes keep a GPU less busy"),
    Knob("batch of one, accumulated", _accumulate(lambda batch: 1), TIME, "the smallest passes keep a GPU least busy"),
    Knob("optimizer in backward", _set(optimizer_in_backward=True), TIME, "no gradient accumulation, no clipping by the norm of all gradients"),
    Knob("ZeRO stage 1", _zero(1), TIME, "updated weights are gathered once a step"),
    Knob("ZeRO stage 2", _zero(2), TIME, "updated weights are gathered once a step"),
    Knob("ZeRO stage 3", _zero(3), TIME, "half more communication: weights are gathered in forward and in backward"),
    Knob("lora_lab's model code", _own_model_code, TIME, "another library; norms and activations are computed again in backward"),
    Knob("optimizer states in host memory", _set(offload_optimizer=True), TIME, "every step waits for the bus or the CPU"),
    Knob("activations in host memory", _set(offload_activations=True), TIME, "every pass moves them over the bus and back"),
    Knob("16-bit products", _set(_where(precision=["fp32"]), precision="bf16-mixed"), ROUNDING,
         "products, and weights that do not train, rounded to 16 bit; faster where a GPU has bf16"),
    Knob("pure 16 bit", _set(_NOT_FULL, precision="bf16"), ROUNDING, "everything but adapters in 16 bit"),
    Knob("8-bit AdamW", _set(_ADAM, optimizer="adamw8bit"), ROUNDING, "moments in blocks of 8-bit codes (bitsandbytes)"),
    Knob("8-bit base", _set(_FROZEN_BASE, quantization="int8"), ROUNDING, "frozen weights rounded to 8 bit; slower products"),
    Knob("4-bit base", _set(_FROZEN_BASE, quantization="nf4"), ROUNDING, _CODES),
    Knob("double quantisation", _set(_where(method=["qlora"], quantization=["none", "nf4"]), quantization="nf4-dq"), ROUNDING,
         "scales of the 4-bit blocks rounded to 8 bit"),
    Knob("pure 16 bit", _set(_FULL, precision="bf16"), LEARNING, "small updates round to nothing, unless rounded stochastically"),
    Knob("LoRA", _set(_FULL, method="lora"), LEARNING, "only adapters learn: less than full training on hard new tasks (arXiv:2405.09673)"),
    Knob("QLoRA", _set(_FULL, method="qlora"), LEARNING, f"as LoRA, with {_CODES}"),
    Knob("adapters on attention only", _set(_ALL_LINEAR, target_modules="attention"), LEARNING,
         "adapters on all layers learn better (QLoRA, arXiv:2305.14314, section 4)"),
    Knob("half the rank", _halve("rank", _ADAPTED), LEARNING, "updates of fewer directions"),
    Knob("no dropout", _set(_ADAPTED, dropout=0.0), LEARNING, "less regularisation"),
    Knob("Adafactor", _set(_ADAM, optimizer="adafactor"), LEARNING, "another optimizer: second moments by row and column only"),
    Knob("Lion", _set(_ADAM, optimizer="lion"), LEARNING, "another optimizer: learning rate 3 to 10 times lower (arXiv:2302.06675, section 5)"),
    Knob("half the batch", _halve("batch_size", _PROMPT_ONLY), LEARNING, "half as many answers at a time"),
    Knob("half the sequence", _halve("sequence_length"), LEARNING, "longer texts are cut or split"),
)  # fmt: skip


@dataclass(frozen=True)
class Saving:
    """One knob turned: the keywords it sets, bytes of the total before and after, and what it costs."""

    knob: str
    change: dict[str, Any]
    before_bytes: int
    after_bytes: int
    cost: str

    @property
    def saved_bytes(self) -> int:
        return self.before_bytes - self.after_bytes


class Savings(list[Saving]):
    """The savings, largest first, and how they look as a table."""

    def __init__(self, savings: list[Saving], title: str) -> None:
        super().__init__(savings)
        self.title = title

    def __str__(self) -> str:
        return f"{self.title}\n{text_grid(*self._cells(), left=(0, 4, 5))}" if self else f"{self.title}: no knob saves anything"

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        return f"**{self.title}**\n\n{markdown_grid(*self._cells(), left=(0, 4, 5))}"

    def _repr_html_(self) -> str:
        header, rows = self._cells()
        return f"<div><p><b>{escape(self.title)}</b></p>\n{html_grid(header, [[escape(cell) for cell in row] for row in rows], left=(0, 4, 5))}</div>"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        rows = [
            [saving.knob, size_text(saving.saved_bytes), f"{saving.saved_bytes / saving.before_bytes:.1%}", size_text(saving.after_bytes),
             ", ".join(f"{name}={value!r}" for name, value in saving.change.items()), saving.cost]
            for saving in self
        ]  # fmt: skip
        return ["knob", "saves", "share", "leaves", "keywords", "costs"], rows


def savings(source: object, **request: Any) -> Savings:
    """Every knob by itself: what the total would be, largest saving first. source, request: as in `predict`.

    Knobs that save nothing, that do not apply and that `predict` refuses here are left out.

    >>> found = savings("smollm2-135m", method="lora", batch_size=4, sequence_length=256, attention="eager")
    >>> [saving.after_bytes for saving in found if saving.change == {"attention": "sdpa"}] == [
    ...     predict("smollm2-135m", method="lora", batch_size=4, sequence_length=256, attention="sdpa").total]
    True
    """
    before = predict(source, **request)
    turned = [(knob, change, footprint) for knob, change, footprint in turn_all(source, request) if footprint.total < before.total]
    found = [Saving(knob.name, change, before.total, footprint.total, knob.cost) for knob, change, footprint in turned]
    return Savings(sorted(found, key=lambda saving: -saving.saved_bytes), f"{title_of(before)}: {size_text(before.total)}")


def turn_all(source: object, request: Asked) -> list[tuple[Knob, dict[str, Any], Footprint]]:
    """Every knob that applies and that `predict` accepts here, with the keywords it sets and the footprint then."""
    asked = {**predict_defaults(), **request}
    asked["implementation"] = asked["implementation"] or implementation_of(source)
    if "sequence_length" not in request:
        asked["sequence_length"] = predict(source, **request).request["sequence_length"]  # not 2048, where positions are fewer
    found = []
    for knob in KNOBS:
        change = knob.change(asked)
        footprint = None if change is None else try_predict(source, {**request, **change})
        if change is not None and footprint is not None:
            found.append((knob, change, footprint))
    return found


def try_predict(source: object, request: Asked) -> Footprint | None:
    """The footprint, or None where `predict` refuses."""
    try:
        return predict(source, **request)
    except MemoryMathError:
        return None


def predict_defaults() -> dict[str, Any]:
    """Every keyword of `predict` with its default."""
    return {name: given.default for name, given in inspect.signature(predict).parameters.items() if given.default is not given.empty}
