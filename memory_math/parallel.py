"""Several devices: which part of the weights, gradients and optimizer states each one holds, and what passing them around takes.

ZeRO stage 1 divides the optimizer states among N devices, stage 2 the gradients as well, stage 3 the weights as well (the same as FSDP2).
In mixed precision the states include the float32 masters, and weights and gradients are 16 bit: 2 + 2 + 12 = 16 bytes per parameter with
Adam, 4 + 12/N in stage 1, 2 + 14/N in stage 2, 16/N in stage 3. Source: Rajbhandari et al. 2020 (arXiv:1910.02054), section 3 and figure 1.

Tensor parallelism divides heads, the width of the MLP and the vocabulary by t and repeats the norms on each device.
Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import MemoryMathError

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Parallel:
    """zero_stage, world_size: N data-parallel devices. tensor_parallel: t devices to a model; every other number is for one of them."""

    zero_stage: int = 0
    world_size: int = 1
    tensor_parallel: int = 1

    @property
    def state_shards(self) -> int:
        return self.world_size if self.zero_stage >= 1 else 1

    @property
    def gradient_shards(self) -> int:
        return self.world_size if self.zero_stage >= 2 else 1

    @property
    def weight_shards(self) -> int:
        return self.world_size if self.zero_stage >= 3 else 1

    @property
    def sharded(self) -> bool:
        """Whether training follows ZeRO's rules; on one device that is its mixed precision alone."""
        return self.zero_stage > 0


def check_parallel(zero_stage: int, world_size: int, tensor_parallel: int) -> Parallel:
    """The division, or MemoryMathError."""
    if zero_stage not in ZERO_STAGES or isinstance(zero_stage, bool):
        raise MemoryMathError(f"zero_stage={zero_stage!r}: expected 0 (every device holds everything), 1, 2 or 3")
    return Parallel(zero_stage, world_size, tensor_parallel)


def communication_bytes(parallel: Parallel, blocks: Sequence[int], rest: int, trained: int, itemsize: int) -> int:
    """What one device holds to exchange weights and gradients, beside its own share.

    blocks: weights of each block. rest: weights outside of blocks (embedding, last norm, head). trained: trained weights. itemsize: bytes of
    each in the exchange.
    Without ZeRO and in stage 1, DistributedDataParallel keeps its buckets, a second copy of all gradients (gradient_as_bucket_view=False, PyTorch's
    default; lora_lab's gradients are views of them, see simulate.py).
    In stage 2 the gradients of one block wait to be divided. In stage 3 the block at work and the next one are there whole, so is the
    rest from the first use to the last (FSDP2's root group), and the gradients of a block as in stage 2.
    Source: torch.nn.parallel.DistributedDataParallel and torch.distributed.fsdp.fully_shard, PyTorch 2.13.
    """
    if parallel.world_size == 1:
        return 0
    if parallel.zero_stage <= 1:
        return trained * itemsize
    largest = max(blocks, default=0)
    gradients = min(largest, trained) * itemsize
    return gradients if parallel.zero_stage == 2 else gradients + (2 * largest + rest) * itemsize
