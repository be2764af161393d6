"""The floor of a loss alone: a kernel that reads every byte of the logits once, and adds them up.

Nothing else is computed, and one number is written for each block of logits. Which block reads fastest depends on the
GPU: BLOCKS are tried, and the best of them is the floor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCKS", "read", "sums"]

BLOCKS = {8192: 4, 16384: 8, 65536: 16}  # bytes of logits: warps; 64 to 128 bytes a thread


@triton.jit
def _read(logits, size, sums, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + block, tl.sum(tl.load(logits + at, mask=at < size, other=0.0).to(tl.float32)))


def read(logits: Tensor, block_bytes: int) -> Tensor:
    """Return the sum of each block of contiguous logits (N, C), float32."""
    block = block_bytes // logits.element_size()
    sums = torch.empty(triton.cdiv(logits.numel(), block), device=logits.device)
    _read[(len(sums),)](logits, logits.numel(), sums, BLOCK=block, num_warps=BLOCKS[block_bytes])
    return sums


def sums(logits: Tensor, block_bytes: int) -> Tensor:
    """Return the same by torch, in float64."""
    numbers = logits.flatten()
    block = block_bytes // logits.element_size()
    whole = len(numbers) // block * block
    rest = numbers[whole:].sum(dtype=torch.float64)
    of_whole = numbers[:whole].view(-1, block).sum(dim=1, dtype=torch.float64)
    return torch.cat([of_whole, rest[None]]) if whole < len(numbers) else of_whole
