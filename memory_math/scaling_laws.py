"""How large a model, and on how many tokens, for a given compute budget: Kaplan's laws and Chinchilla's, with three sets of constants.

    chinchilla(5.76e23).parameters                     the rule of thumb: 20 tokens per parameter
    chinchilla(5.76e23, constants="published")         the constants printed in the paper
    chinchilla(5.76e23, constants="refit")             the same data, fitted again by Besiroglu et al.

The parametric law is L(N, D) = E + A / N^alpha + B / D^beta, N parameters, D tokens, L in nats per token. With C = 6ND operations to spend
it is lowest at N = G (C/6)^(beta/(alpha+beta)), D = (C/6) / N, G = (alpha A / (beta B))^(1/(alpha+beta)).

The printed constants do not give the 20 tokens per parameter that the same paper's other two methods and its model have: 93 at Chinchilla's
budget, 59 with the digits that the paper's TeX source has. The refit gives 18. That is why they are choices here and not one answer.
Sources: Kaplan et al. (arXiv:2001.08361); Hoffmann et al. (arXiv:2203.15556), approach 3 and table 3; Besiroglu et al.
(arXiv:2404.10102), table 1. All were fitted to decoders trained on web text with their authors' tokenizers: the shape carries over to
other models, the third digit does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .amounts import positive
from .errors import MemoryMathError
from .request import one_of
from .svg import line_chart

PF_DAY_FLOPS = 1e15 * 86_400
TOKENS_PER_PARAMETER = 20.0


@dataclass(frozen=True)
class Law:
    """The constants of L(N, D) = E + A / N^alpha + B / D^beta, and where they are printed. E: the loss that no model gets below."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str


LAWS = {
    "published": Law(1.69, 406.4, 410.7, 0.34, 0.28, "Hoffmann et al. 2022 (arXiv:2203.15556), equation 10"),
    "published-unrounded": Law(1.6934, 406.4, 410.7, 0.3392, 0.2849, "the same paper's TeX source, as told by arXiv:2404.10102"),
    "refit": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al. 2024 (arXiv:2404.10102), table 1"),
}
CONSTANTS = ("rule", *LAWS)


@dataclass(frozen=True)
class ComputeOptimal:
    """The best use of `flops` training operations. parameters, tokens: not whole numbers, as a fit gives them. loss: None for the rule,
    which says nothing about it."""

    flops: float
    constants: str
    parameters: float
    tokens: float
    loss: float | None

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    def table(self) -> str:
        """This budget under every set of constants, as fixed-width text; this one is marked."""
        lines = [f"{self.flops:.4g} operations{'':<9}{'parameters':>12}{'tokens':>12}{'per parameter':>15}{'loss':>8}"]
        for name in CONSTANTS:
            row = chinchilla(self.flops, name)
            loss = "-" if row.loss is None else f"{row.loss:.4f}"
            sizes = f" {_count(row.parameters):>11} {_count(row.tokens):>11} {row.tokens_per_parameter:>14.1f} {loss:>7}"
            lines.append(f"{'> ' if name == self.constants else '  '}{name:<28}{sizes}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def chinchilla(flops: float, constants: str = "rule") -> ComputeOptimal:
    """The compute-optimal model for a training budget in operations (6ND).

    constants: "rule", 20 tokens per parameter; "published", "published-unrounded", "refit": see LAWS.
    Raises MemoryMathError for an unknown name, and for a budget that is not a number above 0.

    >>> best = chinchilla(5.76e23)                         # Gopher's budget, with which Chinchilla was trained
    >>> round(best.parameters / 1e9, 1), round(best.tokens / 1e12, 2)
    (69.3, 1.39)
    >>> [round(chinchilla(5.76e23, name).tokens_per_parameter, 1) for name in ("published", "published-unrounded", "refit")]
    [92.6, 59.1, 18.4]
    """
    positive("flops", flops)
    if one_of("constants", constants, CONSTANTS) == "rule":
        parameters = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
        return ComputeOptimal(flops, constants, parameters, TOKENS_PER_PARAMETER * parameters, None)
    law = LAWS[constants]
    total = law.alpha + law.beta
    parameters = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total) * (flops / 6) ** (law.beta / total)
    tokens = flops / 6 / parameters
    return ComputeOptimal(flops, constants, parameters, tokens, loss(parameters, tokens, constants))


def loss(parameters: float, tokens: float, constants: str = "refit") -> float:
    """L(N, D) of the parametric law, in nats per token (of the tokenizer and text that the law was fitted on).

    >>> round(loss(70e9, 1.4e12, "published"), 4), round(loss(70e9, 1.4e12, "refit"), 4)
    (1.9366, 1.9739)
    """
    law = LAWS[one_of("constants", constants, LAWS)]
    positive("parameters", parameters)
    positive("tokens", tokens)
    return law.E + law.A / parameters**law.alpha + law.B / tokens**law.beta


def optimal_tokens(parameters: float, constants: str = "rule") -> float:
    """The tokens with which a model of this size is compute-optimal; training on more costs more than a larger model would.

    >>> optimal_tokens(70e9) / 1e12
    1.4
    """
    positive("parameters", parameters)
    if one_of("constants", constants, CONSTANTS) == "rule":
        return TOKENS_PER_PARAMETER * parameters
    law = LAWS[constants]
    return (law.beta * law.B * parameters**law.alpha / (law.alpha * law.A)) ** (1 / law.beta)  # where N's and D's last operations buy the same


def curve(constants: str = "rule", *, lowest_flops: float = 1e18, highest_flops: float = 1e26, points: int = 33) -> tuple[ComputeOptimal, ...]:
    """chinchilla() over budgets that are evenly spaced on a logarithmic scale, both ends included."""
    positive("lowest_flops", lowest_flops)
    positive("highest_flops", highest_flops)
    if highest_flops <= lowest_flops or points < 2:
        raise MemoryMathError(f"curve from {lowest_flops!r} to {highest_flops!r} in {points!r} points: expected a higher end and at least 2 points")
    step = math.log(highest_flops / lowest_flops) / (points - 1)
    return tuple(chinchilla(lowest_flops * math.exp(step * point), constants) for point in range(points))


def plot(constants: Sequence[str] = ("rule", "published", "refit"), *, lowest_flops: float = 1e18, highest_flops: float = 1e26) -> str:
    """Optimal parameters N and tokens D over the budget, one pair of lines for each set of constants, as an SVG document."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name in constants:
        best = curve(name, lowest_flops=lowest_flops, highest_flops=highest_flops)
        series[f"N, {name}"] = [(row.flops, row.parameters) for row in best]
        series[f"D, {name}"] = [(row.flops, row.tokens) for row in best]
    title = "Compute-optimal parameters N and tokens D"
    return line_chart(series, title=title, x_label="training operations", y_label="N, D", log_x=True, log_y=True)


# --- Hoffmann et al., table 3: parameters, operations, tokens (approach 1) ---------------------------------------------------------------------
HOFFMANN_TABLE_3 = (
    (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12), (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12), (1e12, 1.27e26, 21.2e12), (10e12, 1.30e28, 216.2e12),
)  # fmt: skip


@dataclass(frozen=True)
class TableRow:
    """A row of Hoffmann's table 3 beside the rule at the same operations.

    six_n_d: 6 * parameters * tokens over the stated operations. rule: chinchilla(flops, "rule").
    """

    parameters: float
    flops: float
    tokens: float
    rule: ComputeOptimal

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters

    @property
    def six_n_d(self) -> float:
        return 6 * self.parameters * self.tokens / self.flops


def hoffmann_table_3() -> tuple[TableRow, ...]:
    """The nine rows: the paper's own 20 to 22 tokens per parameter, and what the rule makes of each budget."""
    return tuple(TableRow(parameters, flops, tokens, chinchilla(flops)) for parameters, flops, tokens in HOFFMANN_TABLE_3)


def hoffmann_text() -> str:
    """`hoffmann_table_3` as fixed-width text."""
    lines = ["Hoffmann et al. 2022, table 3", f"{'operations':>12}{'parameters':>12}{'tokens':>10}{'per parameter':>15}{'by the rule':>24}"]
    for row in hoffmann_table_3():
        sizes = f"{_count(row.parameters):>12}{_count(row.tokens):>10}{row.tokens_per_parameter:>15.1f}"
        lines.append(f"{row.flops:>12.3g}{sizes}{_count(row.rule.parameters):>12}{_count(row.rule.tokens):>12}")
    return "\n".join(lines)


# --- Kaplan ------------------------------------------------------------------------------------------------------------------------------------
# Kaplan et al. 2020 (arXiv:2001.08361): equations 1.1 to 1.3, table 2 (joint), figure 14 and table 6 (optimum)
KAPLAN_N = (8.8e13, 0.076)  # parameters without the embedding, and the exponent
KAPLAN_D = (5.4e13, 0.095)  # tokens
KAPLAN_C = (3.1e8, 0.050)  # PF-days, at the smallest batch that is efficient
KAPLAN_JOINT = (6.4e13, 0.076, 1.8e13, 0.103)  # Nc, alpha_N, Dc, alpha_D, fitted together
KAPLAN_OPTIMUM = (1.3e9, 0.73)  # parameters at one PF-day, and the exponent


def kaplan_loss(*, parameters: float | None = None, tokens: float | None = None, min_flops: float | None = None) -> float:
    """Kaplan's loss in nats per token, where what is not given is no limit.

    parameters alone: L(N), trained to convergence on all the data one likes. tokens alone: L(D), a large model stopped early. Both: the
    joint L(N, D). min_flops alone: L(Cmin), the best for that many operations. parameters are counted without the embedding.
    Raises MemoryMathError for another combination.

    >>> round(kaplan_loss(parameters=1.5e9), 3)            # about GPT-2 XL's size
    2.304
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("min_flops", min_flops)):
        if value is not None:
            positive(name, value)
    if min_flops is not None and parameters is None and tokens is None:
        return (KAPLAN_C[0] * PF_DAY_FLOPS / min_flops) ** KAPLAN_C[1]
    if min_flops is None and parameters is not None and tokens is not None:
        n_c, alpha_n, d_c, alpha_d = KAPLAN_JOINT
        return ((n_c / parameters) ** (alpha_n / alpha_d) + d_c / tokens) ** alpha_d
    if min_flops is None and parameters is not None:
        return (KAPLAN_N[0] / parameters) ** KAPLAN_N[1]
    if min_flops is None and tokens is not None:
        return (KAPLAN_D[0] / tokens) ** KAPLAN_D[1]
    given = f"parameters={parameters}, tokens={tokens}, min_flops={min_flops}"
    raise MemoryMathError(f"{given}: expected parameters, tokens, both of these, or min_flops alone")


def kaplan_optimal_parameters(min_flops: float) -> float:
    """N_opt = 1.3e9 * (PF-days)^0.73, without the embedding: far more of the budget goes into size than Chinchilla's square root.

    >>> round(kaplan_optimal_parameters(5.76e23) / 1e9)    # for Chinchilla's 70 billion
    804
    """
    positive("min_flops", min_flops)
    return KAPLAN_OPTIMUM[0] * float(min_flops / PF_DAY_FLOPS) ** KAPLAN_OPTIMUM[1]


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.4g}"
