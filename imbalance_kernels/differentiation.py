"""What the autograd.Functions share: a backward that refuses to be differentiated, and whether its graph is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["declared", "graph_is_kept", "once_differentiable", "only_once"]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "double backward through a loss of imbalance_kernels is not supported: write the loss in plain PyTorch"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make gradients that raise where they are differentiated.

    torch's decorator of this name lets them pass as constants when the upstream gradient is one: silently wrong.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(None if d is None else _Refuse.apply(d.detach().requires_grad_()) for d in gradients)

    return once


class _Declared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return value(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return d_value * ctx.slope(x), None, None  # value, slope


def declared(x: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``value(x)``, whose derivative is declared to be ``slope(x)``, element by element."""
    return _Declared.apply(x, value, slope)


class _OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor]:
        return (d_x,)


def only_once(x: Tensor) -> Tensor:
    """Return x for a formula in plain PyTorch that, like the kernels, is to be differentiated once."""
    return _OnlyOnce.apply(x)


def graph_is_kept() -> bool:
    """Return whether the running backward may be followed by another over the same graph."""
    asks = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asks is None else bool(asks())
