"""A linear probe: the classes of texts from what a frozen model makes of them. How good features are, and how a new head best begins.

A head that begins as the probe leaves the features alone in the first steps, where a random one would distort them: Kumar et al. 2022
(arXiv:2202.10054), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoraLabError

L2 = 0.1


def linear_probe(features: Tensor, labels: Tensor, classes: int | None = None, l2: float = L2, steps: int = 200) -> nn.Linear:
    """A head [classes, H] by logistic regression (L-BFGS), the features standardised for it and the scale folded into its weights.

    features: [n, H].  labels: [n], 0 to classes - 1.  l2: on the weights.  Raises LoraLabError where there are not as many of both, or none.

    >>> head = linear_probe(torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]), torch.tensor([0, 0, 1, 1]), l2=1e-3)
    >>> head(torch.tensor([[0.5, 5.0], [2.5, 5.0]])).argmax(-1).tolist()
    [0, 1]
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise LoraLabError(f"features {list(features.shape)} and labels {list(labels.shape)}: expected [n, H] and [n], at least one row")
    x = features.detach().float()
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    scaled, head = (x - mean) / std, nn.Linear(x.shape[1], classes or int(labels.max()) + 1, device=x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(scaled), labels) + l2 * head.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        head.weight.div_(std)
        head.bias.sub_(head.weight @ mean)
    return head.requires_grad_(False)
