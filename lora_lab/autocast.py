"""What autocast is doing, asked in a way that every device answers."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x is; None where it is off, or where there is none (the meta device)."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else None
