"""How many numbers a prompt has: the closed forms of the papers, one function each.

    prompt        P * H                                             Lester et al. 2021, table 4
    prefix        P * 2 * L * N * D                                 a key and a value for each token, layer and key/value head
    prefix, MLP   P * H + linear(H, h) + linear(h, 2 * L * H)       Li and Liang 2021, section 4.3
    p-tuning      P * H + linear(H, h) + linear(h, h) + linear(h, H)
    residual      P * H + 2 * H * m + 2 * H                         Razdaibiedina et al. 2023: no biases, and a norm's weight and bias

P virtual tokens, H hidden, L layers, N key/value heads of D numbers, h and m widths of an MLP; linear(i, o) = i * o + o.
"""

from __future__ import annotations


def prompt_parameters(num_virtual_tokens: int, hidden_size: int) -> int:
    """A vector as wide as an embedding for each virtual token.

    >>> prompt_parameters(5, 4096)          # T5-XXL with 5 tokens: the lecture's "over five orders of magnitude"
    20480
    """
    return num_virtual_tokens * hidden_size


def prefix_parameters(num_virtual_tokens: int, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
    """A key and a value for each virtual token, layer and key/value head.

    >>> prefix_parameters(1, num_layers=12, num_kv_heads=12, head_dim=64)      # BERT-base, a token (P-tuning v2)
    18432
    """
    return num_virtual_tokens * 2 * num_layers * num_kv_heads * head_dim


def prefix_mlp_parameters(num_virtual_tokens: int, hidden_size: int, mlp_hidden_size: int, num_layers: int) -> int:
    """Embedding -> Linear -> Tanh -> Linear to all layers' keys and values; as many key/value heads as heads.

    Source: Li and Liang 2021 (arXiv:2101.00190), section 4.3.

    >>> prefix_mlp_parameters(5, 768, 512, 12) + linear_parameters(768, 9)     # P-tuning v2 prints 9860105, a head of 9 labels included
    9860105
    """
    keys_and_values = 2 * num_layers * hidden_size
    mlp = linear_parameters(hidden_size, mlp_hidden_size) + linear_parameters(mlp_hidden_size, keys_and_values)
    return prompt_parameters(num_virtual_tokens, hidden_size) + mlp


def p_tuning_parameters(num_virtual_tokens: int, hidden_size: int, mlp_hidden_size: int) -> int:
    """Embedding -> Linear -> ReLU -> Linear -> ReLU -> Linear, as PEFT's P_TUNING.

    >>> p_tuning_parameters(20, 1024, 128)         # bloomz-560m in PEFT's documentation
    300288
    """
    first, last = linear_parameters(hidden_size, mlp_hidden_size), linear_parameters(mlp_hidden_size, hidden_size)
    return prompt_parameters(num_virtual_tokens, hidden_size) + first + linear_parameters(mlp_hidden_size, mlp_hidden_size) + last


def p_tuning_lstm_parameters(num_virtual_tokens: int, hidden_size: int, lstm_hidden_size: int, num_layers: int) -> int:
    """Embedding -> bidirectional LSTM -> Linear -> ReLU -> Linear, as PEFT's P_TUNING with an LSTM.

    A direction of a layer has four gates, each with weights of its input and of its state and two biases.
    Source: Liu et al. 2021 (arXiv:2103.10385), section 3.

    >>> p_tuning_lstm_parameters(5, 32, 16, num_layers=2)
    15072
    """
    both = 2 * lstm_hidden_size
    inputs = [hidden_size] + [both] * (num_layers - 1)
    lstm = sum(2 * 4 * lstm_hidden_size * (width + lstm_hidden_size + 2) for width in inputs)
    return prompt_parameters(num_virtual_tokens, hidden_size) + lstm + linear_parameters(both, both) + linear_parameters(both, hidden_size)


def residual_parameters(num_virtual_tokens: int, hidden_size: int, mlp_hidden_size: int) -> int:
    """``x + up(relu(down(norm(x))))``: two matrices without biases, and the norm's weight and bias, which all tokens share.

    Source: Razdaibiedina et al. 2023 (arXiv:2305.03937), 2dm + 2d + dN.

    >>> residual_parameters(10, 768, 50)
    86016
    """
    return prompt_parameters(num_virtual_tokens, hidden_size) + 2 * hidden_size * mlp_hidden_size + 2 * hidden_size


def multitask_parameters(num_virtual_tokens: int, hidden_size: int, num_tasks: int, rank: int, submodules: int = 1) -> int:
    """A shared prompt, and for each of T tasks a factor of rank r: P * S * H + T * P * S * r + T * r * H.

    submodules: S, the stacks that the prompt is made for (PEFT makes it for encoder and decoder).
    Source: Wang et al. 2023 (arXiv:2303.02861), section 3.

    >>> multitask_parameters(5, 32, num_tasks=3, rank=2, submodules=2)
    572
    """
    rows = num_virtual_tokens * submodules
    return prompt_parameters(rows, hidden_size) + num_tasks * rank * (rows + hidden_size)


def linear_parameters(inputs: int, outputs: int) -> int:
    """Of a linear layer with a bias."""
    return inputs * outputs + outputs
