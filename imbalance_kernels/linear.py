"""Losses that own the last linear layer, and so never hold its logits; LinearLoss is drop-in for torch's.

functional.py has the same as functions: `linear_cross_entropy`, `linear_target_and_rest` and `linear_log_probs`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from imbalance_kernels.modules import CrossEntropyLoss, SoftmaxLoss
from imbalance_kernels.ops.checks import as_linear_rows, check_class_vector, check_row_tensors
from imbalance_kernels.ops.linear import linear_correct, linear_split, prepare_linear
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import (
    Loss,
    LossOutput,
    RowTargets,
    log_probs_of,
    reduce_rows,
    returned,
    row_losses,
    without_rows,
)

__all__ = ["LinearLoss", "RadiusMarginLoss"]

ALIGNMENT = 8  # features: a GPU's products of halves want rows of 16 bytes


class LinearLoss(torch.nn.Module):
    """A linear layer and the loss of its logits in one, without the logits: ``loss(input weight^T + bias, target)``.

    Drop-in for torch.nn.LinearCrossEntropyLoss where the loss is cross-entropy: it is called alike, the layer is
    `linear`, and it loads torch's state dict (whose class weights, if there are any, become the loss's). What torch's
    constructor takes beside the layer (weight, reduction, ...) the loss takes.

    Args:
        in_features: D.
        num_classes: C.
        loss: any softmax-family loss of this package; `CrossEntropyLoss()` by default.
        bias: the layer has one.
        cosine: input and the layer's rows are normalised, so that the logits are cosines, as CosFace, ArcFace and LDAM
            want them; gradients go through the norms. Takes memory for two more copies of the weight.
        device, dtype: of the layer.

    Raises:
        TypeError: the loss has no fused form.
        ValueError: a bias with cosine=True.

    Example:
        >>> loss = LinearLoss(8, 100, CrossEntropyLoss(label_smoothing=0.1))
        >>> loss(torch.randn(2, 5, 8), torch.randint(100, (2, 5))).backward()
        >>> list(loss.state_dict())
        ['linear.weight']
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        loss: SoftmaxLoss | None = None,
        *,
        bias: bool = False,
        cosine: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if loss is not None and not isinstance(loss, SoftmaxLoss):
            raise TypeError(f"loss is a {type(loss).__name__}, but it must be a softmax-family loss of this package")
        if bias and cosine:
            raise ValueError("bias=True with cosine=True: cosines have no bias")
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.loss = CrossEntropyLoss() if loss is None else loss
        self.cosine = cosine

    @classmethod
    def from_linear(cls, head: torch.nn.Linear, loss: SoftmaxLoss | None = None, cosine: bool = False) -> LinearLoss:
        """Return a loss around an existing layer, whose parameters it shares (tied to an embedding, or not).

        Example:
            >>> head = torch.nn.Linear(8, 100)
            >>> LinearLoss.from_linear(head).linear is head
            True
        """
        if not isinstance(head, torch.nn.Linear):
            raise TypeError(f"head is a {type(head).__name__}, but it must be a torch.nn.Linear")
        if type(head).forward is not torch.nn.Linear.forward:
            raise TypeError(f"head is a {type(head).__name__} with a forward of its own, which would not be called")
        has_bias = head.bias is not None
        if has_bias and cosine:
            raise ValueError("head has a bias, but with cosine=True there is none: cosines have no bias")
        made = cls(head.in_features, head.out_features, loss, bias=has_bias, cosine=cosine, device="meta")
        made.linear = head
        return made

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_log_probs: bool = False,
        return_correct: bool = False,
    ) -> Loss:
        """Return the loss, or a LossOutput, see `SoftmaxLoss.linear`: input is (..., D), target (...)."""
        if self.cosine and not target.is_floating_point() and target.shape == input.shape[:-1]:
            ignored = target == self.loss.ignore_index  # what such rows hold does not matter, their norms neither
            input = torch.where(ignored[..., None], torch.zeros_like(input), input)
        input, weight = self._operands(input)
        return self.loss.linear(
            input,
            weight,
            target,
            self.linear.bias,
            sample_weight=sample_weight,
            normalizer=normalizer,
            return_log_probs=return_log_probs,
            return_correct=return_correct,
        )

    def logits(self, input: Tensor) -> Tensor:
        """Return the logits (..., C), cosines with cosine=True: for predictions, which take no loss."""
        input, weight = self._operands(input)
        return torch.nn.functional.linear(input, weight, self.linear.bias)

    def _operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.linear.weight
        return (_normalised(input), _normalised(weight)) if self.cosine else (input, weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if prefix + "weight" in state_dict:  # torch's class weights
            state_dict[prefix + "loss.weight"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Return what is not in the layer or the loss."""
        return "cosine=True" if self.cosine else ""


def _normalised(x: Tensor) -> Tensor:
    """Return x (..., D) of length one, computed in float32 for halves; 0 stays 0, with gradients of order one."""
    exact = x.to(accumulate_dtype(x.dtype))
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    return (exact / torch.where(norm > 0, norm, torch.ones_like(norm))).to(x.dtype)


class RadiusMarginLoss(SoftmaxLoss):
    """``z_j = u_j x + r_t |u_j|`` for the rest, ``z_t = u_t x - r_t |u_t|``, then cross-entropy. kexue.fm 7708.

    A class is a ball around its samples: a sample of class t is to be right also when it moves by r_t anywhere. Linear
    form only, since the class vectors u_j (rows of the layer's weight) take part; gradients go through their norms.
    Class indices only. Logits are made again in backward: four products. Takes memory for two more copies of the
    weight. What is correct goes by ``u_j x``, without the radii, and takes one product more.

    Args:
        radius: r, at least 0, a number or one per class (C,).
        keywords: the shared keyword arguments of `SoftmaxLoss`, but margin and softcap.

    Raises:
        ValueError: a radius below 0 or not finite.
        TypeError: it is called on logits: use `linear`, or `LinearLoss` around it.

    Example:
        >>> loss = LinearLoss(8, 3, RadiusMarginLoss(torch.tensor([0.1, 0.2, 0.4])))
        >>> loss(torch.randn(4, 8), torch.tensor([0, 2, 1, 1])).backward()
    """

    _radius: Tensor

    def __init__(self, radius: float | Tensor, **keywords: Any) -> None:
        for name in ("margin", "softcap"):
            if name in keywords:
                raise TypeError(f"RadiusMarginLoss takes no {name}")
        exact = torch.as_tensor(radius, dtype=torch.float64).detach().to("cpu", copy=True)
        if exact.dim() > 1 or not bool((torch.isfinite(exact) & (exact >= 0)).all()):
            raise ValueError(f"radius is {radius!r}, but it must be at least 0 and finite: a number, or (C,)")
        super().__init__(**keywords)
        self._exact_radius = exact
        self.register_buffer("_radius", exact.to(torch.get_default_device(), torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RadiusMarginLoss:
        super()._apply(fn, recurse)
        self._radius = self._exact_radius.to(self._radius.device, torch.float32)
        return self

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raise: the loss needs the layer."""
        raise TypeError(
            "RadiusMarginLoss needs the norms of the layer's rows: call loss.linear(input, linear_weight, target), or "
            "LinearLoss(in_features, num_classes, RadiusMarginLoss(radius))"
        )

    def _of_linear(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        options: SoftmaxOptions,
        sample_weight: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> Loss:
        if target.is_floating_point():
            raise ValueError("target holds class probabilities, but a margin needs class indices")
        rows = as_linear_rows(input, linear_weight, target, linear_bias)
        num_classes = linear_weight.shape[0]
        dtype = accumulate_dtype(input.dtype)
        radius = self._radius if dtype == torch.float32 else self._exact_radius.to(input.device)
        if radius.dim() == 1:
            check_class_vector("radius", radius, num_classes)
        sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
        rows = rows._replace(target=without_rows(rows.target, options, normalizer))
        targets = RowTargets.of(rows.target, num_classes, options.ignore_index)
        of_row = torch.where(targets.valid, radius.expand(num_classes)[targets.indices], 0.0)  # (N,) r_t
        norms = linear_weight.to(dtype).norm(dim=1)  # (C,) |u_j|

        linear, _, options = prepare_linear(
            _with_column(rows.logits, of_row),
            _with_column(linear_weight, norms),
            rows.target,
            linear_bias,
            options,
            chunk_bytes=self.chunk_bytes,
            accumulate=self.accumulate,
            impl=self.impl,
        )
        split = linear_split(linear, rows.target, options)  # of u_j x + r_t |u_j| for the target too

        logit_map = options.logit_map
        scale = logit_map.scale if logit_map.factor is None else logit_map.scale * logit_map.factor[targets.indices]
        margin = 2 * scale * of_row * norms[targets.indices]  # (N,)
        weighted = split.weighted_logits
        if weighted is not None:
            weighted = weighted - (margin if options.weight is None else margin * options.weight[targets.indices])
        split = split._replace(target=split.target - margin, weighted_logits=weighted)
        losses = row_losses(split, targets, options, sample_weight, num_classes)
        loss = reduce_rows(losses, targets, options, sample_weight, normalizer)
        log_probs = log_probs_of(split, targets) if options.return_log_probs else None
        correct = None
        if options.return_correct:
            layer = linear._replace(input=rows.logits, weight=linear_weight)
            correct = linear_correct(layer, rows.target, options)
        return returned(LossOutput(loss, log_probs, correct), options, rows.shape)


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    """Return x (N, D) with one more column, and columns of zeros up to the alignment."""
    zeros = x.new_zeros((x.shape[0], -(x.shape[1] + 1) % ALIGNMENT))
    return torch.cat((x, column[:, None].to(x.dtype), zeros), dim=1)
