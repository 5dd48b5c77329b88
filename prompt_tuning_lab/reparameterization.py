"""Prompts that a small network makes while they train: easier to move than the numbers themselves, and folded away afterwards.

    p-tuning    rows = W3 relu(W2 relu(W1 e))            e: [P, H], trained, too (PEFT's P_TUNING with an MLP)
    residual    rows = x + Wup relu(Wdown norm(x))       x: [P, H], trained, too (Residual Prompt Tuning)
    prefix      keys and values = W2 tanh(W1 e)          e: [P, N D], trained, too (Li & Liang; PEFT's prefix_projection)

Why it helps: the network is shared by all virtual tokens, so one step moves all of them together, and a weight that all rows pass counts P times.
For the same reason its learning rate is smaller than that of plain rows. What is inserted is the network's output; `folded()` keeps that alone,
which is what PEFT's files hold, so a folded prompt costs and computes what a plain one does.

Every one of them begins as the rows, or keys and values, that it is given. The residual network ends in zeros, so it adds nothing at first. (In the
paper's code all layers begin as random, and the norm stands behind them: what is added then has size 1 in each coordinate, seven times that of
SmolLM2's embeddings.) Of the others the last layer is solved for: the smallest change of its random start after which the output is what was
asked for, which exists as long as there are no more virtual tokens than hidden units. (PEFT's begin as random rows, whatever the embedding.)
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lab.checks import LARGEST, is_size
from lora_lab.errors import LoraLabError

from .prefix import Prefix, check_prefix, from_rows, shape_of, to_rows
from .prefix_cache import PrefixShape
from .soft_prompt import Prompt, SoftPrompt, check_rows

Plain = TypeVar("Plain", SoftPrompt, Prefix)


class PTuning(Prompt):
    """Rows [P, H] out of an MLP over an embedding [P, H]; PEFT's `PromptEncoder`, and its parameters' names, so that its weights load.

    weight: [P, H], what it begins as.  hidden_size: of the MLP; None is H, as in PEFT.
    Source: Liu et al. 2021 (arXiv:2103.10385), section 3; theirs has an LSTM before the MLP, which PEFT's default leaves out.

    >>> prompt = PTuning(torch.randn(20, 1024), hidden_size=128)
    >>> prompt().shape, sum(parameter.numel() for parameter in prompt.parameters())  # PEFT's documentation, bloomz-560m
    (torch.Size([20, 1024]), 300288)
    """

    method: ClassVar[str] = "p-tuning"
    initial: Tensor

    def __init__(self, weight: Tensor, hidden_size: int | None = None) -> None:
        super().__init__()
        check_rows(weight, "weight")
        (tokens, width), hidden = weight.shape, check_width("hidden_size", weight.shape[1] if hidden_size is None else hidden_size)
        self.hidden_size, at = hidden, weight.device
        self.embedding = nn.Embedding(tokens, width, device=at, dtype=torch.float32)  # normal numbers of size 1, what the first layer is made for
        self.mlp_head = nn.Sequential(_linear(width, hidden, at), nn.ReLU(), _linear(hidden, hidden, at), nn.ReLU(), _linear(hidden, width, at))
        solve_last_layer(self.mlp_head, self.embedding.weight, weight)
        self.register_buffer("initial", self().detach(), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:  # type: ignore[override]
        return self.embedding.num_embeddings

    def forward(self) -> Tensor:
        rows: Tensor = self.mlp_head(self.embedding.weight)
        return rows

    def folded(self) -> SoftPrompt:
        """The plain prompt of these rows; it remembers this one's start."""
        return _remembering(SoftPrompt(self()), self.initial)


class ResidualPrompt(Prompt):
    """``x + Wup relu(Wdown norm(x))``, x [P, H] the rows themselves: at the start exactly x, as Wup is zero.

    weight: [P, H], what it begins as.  hidden_size: of the bottleneck m; the paper sees no gain beyond 50 or so. Parameters: P H + 2 H m + 2 H.
    Source: Razdaibiedina et al. 2023 (arXiv:2305.03937). The norm stands in front, so that the network reads rows of any scale alike
    and writes at the scale of the rows (at the end, as in their code, it would write at scale 1); without biases, which the norm has.

    >>> rows = torch.randn(10, 64)
    >>> prompt = ResidualPrompt(rows, hidden_size=16)
    >>> torch.equal(prompt(), rows), sum(parameter.numel() for parameter in prompt.parameters()) == 10 * 64 + 2 * 64 * 16 + 2 * 64
    (True, True)
    """

    method: ClassVar[str] = "residual"
    initial: Tensor

    def __init__(self, weight: Tensor, hidden_size: int = 128) -> None:
        super().__init__()
        check_rows(weight, "weight")
        width, hidden = weight.shape[1], check_width("hidden_size", hidden_size)
        self.hidden_size = hidden
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.norm = nn.LayerNorm(width, device=weight.device, dtype=torch.float32)
        self.down, self.up = _linear(width, hidden, weight.device, bias=False), _linear(hidden, width, weight.device, bias=False)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("initial", self.weight.detach().clone(), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:  # type: ignore[override]
        return len(self.weight)

    def forward(self) -> Tensor:
        added: Tensor = self.up(F.relu(self.down(self.norm(self.weight))))
        return self.weight + added

    def folded(self) -> SoftPrompt:
        """The plain prompt of these rows; it remembers this one's start."""
        return _remembering(SoftPrompt(self()), self.initial)


class PrefixMLP(Prompt):
    """Keys and values [L, 2, P, N, D] out of an MLP over an embedding [P, N D]; PEFT's prefix_projection, and its parameters' names.

    weight: [L, 2, P, N, D], what it begins as.  hidden_size: of the MLP, h; None is w = N D, as in PEFT.
    Parameters: P w + (w + 1) h + (h + 1) 2 L w.
    Source: Li & Liang 2021 (arXiv:2101.00190), section 4.3.

    >>> prefix = PrefixMLP(torch.randn(12, 2, 5, 12, 64), hidden_size=512)  # P-tuning v2's of BERT-base, 393,728 + 9,455,616 + 3,840
    >>> prefix().shape, sum(parameter.numel() for parameter in prefix.parameters())
    (torch.Size([12, 2, 5, 12, 64]), 9853184)
    """

    method: ClassVar[str] = "prefix"
    initial: Tensor

    def __init__(self, weight: Tensor, hidden_size: int | None = None) -> None:
        super().__init__()
        check_prefix(weight)
        self.shape: PrefixShape = shape_of(weight)
        width = self.shape.heads * self.shape.head_dim
        self.hidden_size = hidden = check_width("hidden_size", width if hidden_size is None else hidden_size)
        self.embedding = nn.Embedding(weight.shape[2], width, device=weight.device, dtype=torch.float32)
        self.transform = nn.Sequential(_linear(width, hidden, weight.device), nn.Tanh(), _linear(hidden, self.shape.per_token, weight.device))
        solve_last_layer(self.transform, self.embedding.weight, to_rows(weight))
        self.register_buffer("initial", self().detach(), persistent=False)

    @property
    def num_virtual_tokens(self) -> int:  # type: ignore[override]
        return self.embedding.num_embeddings

    def forward(self) -> Tensor:
        return from_rows(self.transform(self.embedding.weight), self.shape)

    def folded(self) -> Prefix:
        """The plain prefix of these keys and values; it remembers this one's start."""
        return _remembering(Prefix(self()), self.initial)


@torch.no_grad()
def solve_last_layer(network: nn.Sequential, inputs: Tensor, outputs: Tensor) -> None:
    """Change the last layer as little as can be so that the network makes these outputs of these inputs. inputs: [P, I].  outputs: [P, O].

    With h [P, h + 1] what the last layer sees and a one for its bias, the smallest change D of [W, b] with ``h D^T = outputs - now`` is the
    pseudoinverse's; it is exact where h has rank P. Raises LoraLabError where there are more rows than that.
    """
    last = network[-1]
    assert isinstance(last, nn.Linear)
    if len(inputs) > last.in_features + 1:
        raise LoraLabError(f"{len(inputs)} virtual tokens from {last.in_features} hidden units cannot begin as what they are given: expected a "
                           f"hidden_size of at least {len(inputs) - 1}, or method='residual', which always can")  # fmt: skip
    if inputs.device.type == "meta":
        return
    seen = network[:-1](inputs)
    seen = torch.cat((seen, torch.ones_like(seen[:, :1])), dim=1).double()
    missing = outputs.to(seen) - network(inputs).double()
    change = (torch.linalg.pinv(seen) @ missing).to(last.weight.dtype)
    last.weight.add_(change[:-1].T)
    last.bias.add_(change[-1])


def check_width(name: str, value: int) -> int:
    if not is_size(value):
        raise LoraLabError(f"{name}={value!r}: expected a whole number of at least 1, at most {LARGEST:,}, the units of the network that makes "
                           "the prompt")  # fmt: skip
    return value


def _linear(fan_in: int, fan_out: int, device: torch.device, bias: bool = True) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=bias, device=device, dtype=torch.float32)


def _remembering(prompt: Plain, initial: Tensor) -> Plain:
    prompt.initial = initial.detach().clone()
    return prompt
