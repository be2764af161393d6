"""The three products of a linear layer and its gradients, on a chunk of rows, where memory and rounding are ours.

N rows of a chunk, C classes, D features. Products of halves are summed in float32 everywhere; what differs is where
they are rounded. The gradient of the weight is a sum over chunks, which stays in float32 where its total is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_d_bias", "add_d_weight", "d_input_of", "logits_of"]

ACCELERATOR_BLOCK_NUMBERS = 1 << 26  # the same where cuBLAS is not: memory, 256 MB, is what limits it
BLOCK_NUMBERS = 1 << 19  # of float32, 2 MB: what one operand of a product of halves takes on a CPU


def logits_of(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write ``rows weight^T + bias``: (N, D), (C, D), (C,) to out (N, C)."""
    if _by_blocks(rows):
        rows = rows.float()
        for classes in _blocks(weight.shape[0], rows.shape):
            block = torch.mm(rows, weight[classes].float().t())
            out[:, classes] = block if bias is None else block.add_(bias[classes])
    elif bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def d_input_of(d_logits: Tensor, weight: Tensor) -> Tensor:
    """Return ``d_logits weight``: (N, C), (C, D) to (N, D), rounded once."""
    if not _by_blocks(d_logits):
        return torch.mm(d_logits, weight)
    total = d_logits.new_zeros((d_logits.shape[0], weight.shape[1]), dtype=torch.float32)
    for classes in _blocks(weight.shape[0], total.shape):
        total.addmm_(d_logits[:, classes].float(), weight[classes].float())
    return total.to(d_logits.dtype)


def add_d_weight(d_logits: Tensor, rows: Tensor, total: Tensor, first: bool) -> None:
    """Add ``d_logits^T rows``: (N, C), (N, D) to total (C, D), which holds nothing yet at the first."""
    if d_logits.dtype == total.dtype and not _by_blocks(d_logits):
        if first:
            torch.mm(d_logits.t(), rows, out=total)
        else:
            total.addmm_(d_logits.t(), rows)
    elif d_logits.device.type == "cuda" and torch.version.hip is None:  # cuBLAS sums and writes float32
        beta = 0 if first else 1
        torch.addmm(total, d_logits.t(), rows, out_dtype=torch.float32, beta=beta, out=total)
    else:  # not a product of halves, added: 64 such roundings lie 20 % further off than the unchunked product's one
        rows = rows.float()
        block_numbers = BLOCK_NUMBERS if rows.device.type == "cpu" else ACCELERATOR_BLOCK_NUMBERS
        for classes in _blocks(total.shape[0], rows.shape, block_numbers):
            block = torch.mm(d_logits[:, classes].float().t(), rows)
            total[classes] = block if first else block.add_(total[classes])


def add_d_bias(d_logits: Tensor, total: Tensor) -> None:
    """Add the sum over rows of d_logits (N, C) to total (C,), as a product: on a CPU twice as fast as a sum."""
    if d_logits.dtype == total.dtype:
        total.addmv_(d_logits.t(), d_logits.new_ones(d_logits.shape[0]))
    else:
        total.add_(d_logits.sum(dim=0, dtype=total.dtype))


def _by_blocks(operand: Tensor) -> bool:
    """Return whether a product of halves is made of float32 copies, a block of classes at a time.

    CPUs without instructions for a half multiply it 5 to 60 times slower than float32.
    """
    if operand.device.type != "cpu" or operand.dtype not in (torch.bfloat16, torch.float16):
        return False
    return operand.dtype == torch.float16 or not _MULTIPLIES_BFLOAT16


def _multiplies_bfloat16() -> bool:
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)


_MULTIPLIES_BFLOAT16 = _multiplies_bfloat16()


def _blocks(num_classes: int, operand: torch.Size, block_numbers: int = BLOCK_NUMBERS) -> list[slice]:
    """Return blocks of classes, small enough that float32 copies of an operand's stay in cache."""
    size = max(64, block_numbers // max(1, *operand))
    return [slice(first, first + size) for first in range(0, num_classes, size)]
