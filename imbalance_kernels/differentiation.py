"""What the autograd.Functions share: a backward that refuses to be differentiated, and whether its graph is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["anchor", "declared", "graph_is_kept", "once_differentiable", "only_once"]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "double backward through a loss of imbalance_kernels is not supported: write the loss in plain PyTorch"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make gradients that raise where they are differentiated.

    torch's decorator of this name lets them pass as constants when the upstream gradient is one: silently wrong. What
    they are differentiated by must be among the tensors that were saved for backward, or have its `anchor` there: a
    refusal that the inputs are not reached from would be passed over by torch.autograd.grad, which names them.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Tensor) -> Any:
        differentiable = torch.is_grad_enabled()
        saved = [tensor for tensor in ctx.saved_tensors if tensor is not None] if differentiable else []
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not differentiable:
            return gradients
        depends_on = [tensor for tensor in saved if tensor.requires_grad]
        return tuple(None if d is None else _Refuse.apply(d.detach().requires_grad_(), *depends_on) for d in gradients)

    return once


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def anchor(*inputs: Tensor | None) -> Tensor | None:
    """Return a tensor of no elements that the inputs are reached from, for what need not be saved itself.

    A compiled graph, whose backward raises by itself where it is differentiated, has none.
    """
    if torch.compiler.is_compiling():
        return None
    return _Anchor.apply(*(tensor for tensor in inputs if tensor is not None and tensor.requires_grad))


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
        ctx.save_for_backward(x)
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
