"""The reference by the names and arguments of the kernels' operations, for code that calls whichever was chosen.

What kernels do in place is done with temporaries here, by autograd: `imbalance_kernels.reference` is the specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.ops.kernel_arguments import LossArguments, SplitArguments, options_of_loss, options_of_split

__all__ = [
    "softmax_loss",
    "softmax_loss_",
    "softmax_loss_backward_",
    "target_and_rest",
    "target_and_rest_backward_",
]


def softmax_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, no gradient (with_gradient is False), log_probs and correct, (0,) where not asked for."""
    *call, with_gradient, with_log_probs, with_correct = arguments
    assert with_gradient is False
    loss, log_probs, correct = _outputs(logits, LossArguments(*call), with_log_probs, with_correct)
    return loss, logits.new_empty(0), log_probs, correct


def softmax_loss_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, log_probs and correct, with the gradient in the logits' memory."""
    *split_and_loss, with_log_probs, with_correct = arguments
    call = LossArguments(*split_and_loss)
    with _autograd():
        x = logits.detach().requires_grad_()
        loss, log_probs, correct = _outputs(x, call, with_log_probs, with_correct)
        (d_logits,) = torch.autograd.grad(loss, x)
    logits.copy_(d_logits if call.normalizer is None else torch.where(call.normalizer == 0, 0.0, d_logits))
    return loss.detach(), log_probs, correct


def softmax_loss_backward_(logits: Tensor, *arguments: Any) -> None:
    """Overwrite the logits by their gradient, for an upstream gradient, the last argument."""
    *call, upstream = arguments
    with _autograd():
        x = logits.detach().requires_grad_()
        loss, *_ = _outputs(x, LossArguments(*call), False, False)
        (d_logits,) = torch.autograd.grad(loss, x, upstream)
    logits.copy_(d_logits)


def target_and_rest(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return target_logit, rest, shift, weighted_logits and weight_sum, (N,), the last two (0,) where not asked for."""
    call = SplitArguments(*arguments)
    split = reference.target_and_rest(logits, call.target, options_of_split(call))
    return tuple(split.shift.new_empty(0) if vector is None else vector for vector in split)


def target_and_rest_backward_(logits: Tensor, *arguments: Any) -> None:
    """Overwrite the logits by their gradient, for upstream gradients, the last three arguments."""
    *call, _rest, _shift, d_target, d_rest, d_weighted_logits = arguments
    with _autograd():
        x = logits.detach().requires_grad_()
        target_logit, rest, _, weighted_logits, _ = target_and_rest(x, *call)
        outputs, upstreams = (target_logit, rest, weighted_logits), (d_target, d_rest, d_weighted_logits)
        used = [pair for pair in zip(outputs, upstreams, strict=True) if pair[0].requires_grad]
        (d_logits,) = torch.autograd.grad([output for output, _ in used], x, [upstream for _, upstream in used])
    logits.copy_(d_logits)


@contextmanager
def _autograd() -> Iterator[None]:
    """Record, also where a dispatch mode (a counter, a check of schemas) switched autograd off below itself."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        yield


def _outputs(logits: Tensor, call: LossArguments, with_log_probs: bool, with_correct: bool) -> tuple[Tensor, ...]:
    """Return the loss, log_probs and correct, the last two (0,) where not asked for."""
    options = options_of_loss(call).reporting(with_log_probs, with_correct)
    loss, log_probs, correct = reference.softmax_loss(logits, call.target, options, call.sample_weight, call.normalizer)
    return (
        loss,
        log_probs if with_log_probs and log_probs is not None else loss.new_empty(0),
        loss.new_empty(0, dtype=torch.bool) if correct is None else correct,
    )
