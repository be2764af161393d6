"""What every operation checks before anything is written, and the layouts that kernels see: rows, or channels-first."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imbalance_kernels.binary_objectives import BinaryObjective
from imbalance_kernels.logit_map import CircleMargin
from imbalance_kernels.objectives import CrossEntropy
from imbalance_kernels.ops import layout
from imbalance_kernels.options import LOGIT_DTYPES, SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import RowTargets

__all__ = [
    "Rows",
    "as_linear_rows",
    "as_rows",
    "check_class_vector",
    "check_cosines",
    "check_inplace",
    "check_input",
    "check_linear_cosines",
    "check_options",
    "check_normalizer",
    "check_range",
    "check_reduction",
    "check_row_tensors",
    "check_target",
    "may_read_values",
]

REDUCTIONS = ("none", "sum", "mean")
COSINE_TOLERANCE = 0.01  # half-precision cosines may leave [-1, 1] by a rounding


class Rows(NamedTuple):
    """Logits and targets as rows, or as B images of P pixels with channels first, where N is B * P."""

    logits: Tensor  # (N, C) with stride(1) == 1, or (B, C, P) with stride(2) == 1
    target: Tensor  # (N,) int64, or contiguous class probabilities in the logits' shape
    shape: torch.Size  # of the target's rows, which is the shape of an unreduced loss
    owned: bool  # logits are a copy of the caller's, free to be overwritten


def _check_tensors(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            layer = f": pass {name.removeprefix('linear_')} of it" if isinstance(value, torch.nn.Linear) else ""
            raise TypeError(f"{name} is a {type(value).__name__}, but it must be a tensor{layer}")


def check_input(input: Tensor, target: Tensor, class_dim: int) -> int:
    """Check what every family takes; return the dimension of classes, from 0."""
    _check_tensors(input=input, target=target)
    if type(input).__name__ == "DTensor" or type(target).__name__ == "DTensor":
        raise TypeError(
            "input is a DTensor, whose sharded form does not exist yet: pass input.to_local() where each rank holds "
            "whole rows, or input.full_tensor()"
        )
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, but it must be one of {', '.join(map(str, LOGIT_DTYPES))}")
    if input.dim() == 0:
        raise ValueError(
            "input has no dimensions, but it must be (C,), (N, C), (N, C, d1, ...) or, with class_dim=-1, (..., C)"
        )
    if input.dim() == 1:
        class_dim = 0
    if not -input.dim() <= class_dim < input.dim():
        raise ValueError(f"class_dim is {class_dim}, but input has shape {tuple(input.shape)}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, but input is on {input.device}")
    return class_dim % input.dim()


def check_target(input: Tensor, target: Tensor, class_dim: int) -> None:
    """Check the softmax family's target; class_dim is from 0."""
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target holds class probabilities ({target.dtype}) of shape {tuple(target.shape)}, but they must have "
                f"input's shape {tuple(input.shape)}"
            )
        if target.requires_grad:
            raise ValueError("target requires grad, but class probabilities are constants: pass target.detach()")
    else:
        if target.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"target has dtype {target.dtype}, but it must be int64 or int32 class indices, or floating point"
            )
        if target.shape != input.movedim(class_dim, -1).shape[:-1]:
            raise ValueError(_wrong_target_shape(input, target, class_dim))


def as_rows(input: Tensor, target: Tensor, class_dim: int, planes: bool) -> Rows:
    """Return a checked input and target as rows; class_dim is from 0.

    There is no copy where the layout allows it, as it is; with `planes` also not where it is channels-first.
    """
    classes_last = input.movedim(class_dim, -1)
    shape = classes_last.shape[:-1]
    are_rows = layout.are_rows(classes_last)
    are_planes = planes and not are_rows and layout.are_planes(input, class_dim)
    arrange = layout.as_planes if are_planes else layout.as_rows
    logits = arrange(input, class_dim)
    owned = not are_planes and not are_rows
    logits = logits.contiguous() if owned else logits
    if target.is_floating_point():
        return Rows(logits, arrange(target, class_dim).contiguous(), shape, owned)
    return Rows(logits, target.reshape(-1).to(torch.int64), shape, owned)


def as_linear_rows(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> Rows:
    """Return input (..., D) as rows (N, D), in autocast's dtype where that is on, and target as rows.

    The layer's weight (C, D) and bias (C,) are checked. They keep their dtype: a master copy in float32 goes with an
    input of halves.
    """
    _check_tensors(input=input, linear_weight=linear_weight, target=target)
    _check_not_distributed(input, linear_weight, target, linear_bias)
    if input.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype}, but it must be one of {', '.join(map(str, LOGIT_DTYPES))}")
    if linear_weight.dim() != 2:
        raise ValueError(
            f"linear_weight has shape {tuple(linear_weight.shape)}, but it must be (num_classes, in_features)"
        )
    num_classes, in_features = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, but with linear_weight {tuple(linear_weight.shape)} it must be "
            f"(..., {in_features})"
        )
    if linear_bias is not None and linear_bias.shape != (num_classes,):
        raise ValueError(f"linear_bias has shape {tuple(linear_bias.shape)}, but it must be ({num_classes},)")
    for name, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, but input is on {input.device}")
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(input.device.type))
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            _check_master_copy(name, tensor, input)
    shape = input.shape[:-1]
    num_rows = math.prod(shape)
    rows = input.reshape(num_rows, in_features)
    if target.is_floating_point():
        if target.shape != (*shape, num_classes):
            raise ValueError(
                f"target holds class probabilities ({target.dtype}) of shape {tuple(target.shape)}, but with input "
                f"{tuple(input.shape)} and {num_classes} classes they must be {(*shape, num_classes)}"
            )
        if target.requires_grad:
            raise ValueError("target requires grad, but class probabilities are constants: pass target.detach()")
        return Rows(rows, target.reshape(num_rows, num_classes).contiguous(), shape, False)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target has dtype {target.dtype}, but it must be int64 or int32 class indices, or floating point"
        )
    if target.shape != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but with input {tuple(input.shape)} it must be {tuple(shape)}"
        )
    return Rows(rows, target.reshape(num_rows).to(torch.int64), shape, False)


def _check_not_distributed(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> None:
    if any(type(tensor).__name__ == "DTensor" for tensor in (linear_weight, linear_bias)):
        raise TypeError(
            "linear_weight or linear_bias is a DTensor, whose sharded form does not exist yet: pass "
            "linear_weight.full_tensor(), or let FSDP gather the layer by calling a module that owns it (LinearLoss)"
        )
    if any(type(tensor).__name__ == "DTensor" for tensor in (input, target)):
        raise TypeError(
            "input or target is a DTensor, whose sharded form does not exist yet: pass input.to_local() where each "
            "rank holds whole rows, or input.full_tensor()"
        )


def _check_master_copy(name: str, tensor: Tensor, input: Tensor) -> None:
    if not (input.dtype in (torch.bfloat16, torch.float16) and tensor.dtype == torch.float32):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, but input has {input.dtype}: they must be of one dtype, or {name} "
            "float32 with an input in half precision"
        )


def check_options(options: SoftmaxOptions, num_classes: int, target: Tensor) -> None:
    """Check everything that does not depend on the values of the logits or targets."""
    if isinstance(options.objective, BinaryObjective):
        raise TypeError(f"objective is {options.objective.name}, a loss of a logit and its label: use SigmoidLoss")
    check_reduction(options.reduction)
    _check_number("label_smoothing", options.label_smoothing, 0, 1)
    _check_number("z_loss", options.z_loss, 0, math.inf)
    logit_map = options.logit_map
    if not -math.inf < logit_map.scale < math.inf:
        raise ValueError(f"scale is {logit_map.scale!r}, but it must be finite")
    if logit_map.softcap is not None and not 0 < logit_map.softcap < math.inf:
        raise ValueError(f"softcap is {logit_map.softcap!r}, but it must be None or above 0")
    check_class_vector("weight", options.weight, num_classes)
    check_class_vector("prior", logit_map.bias, num_classes)
    check_class_vector("factor", logit_map.factor, num_classes)
    if isinstance(logit_map.margin, Tensor):
        check_class_vector("margin", logit_map.margin, num_classes)
    check_class_vector("gamma", options.objective.class_parameter(), num_classes)
    if isinstance(logit_map.margin, CircleMargin) and logit_map.softcap is not None:
        raise ValueError("softcap is given, but CircleLoss maps cosines, which need no cap")
    if target.is_floating_point():
        for name in ("return_log_probs", "return_correct"):
            if getattr(options, name):
                raise ValueError(
                    f"{name}=True needs class indices, but target holds class probabilities, which name no one class"
                )
        if not isinstance(options.objective, CrossEntropy):
            raise ValueError(
                f"target holds class probabilities, but the objective is {options.objective.name}: only cross-entropy "
                "is defined for them; use CrossEntropyLoss (with a prior, a scale or a soft cap) or class indices"
            )
        if logit_map.margin is not None:
            raise ValueError("target holds class probabilities, but a margin needs class indices")
        if options.ignore_index >= 0:
            raise ValueError("ignore_index is not supported with class probabilities: give such rows sample_weight 0")


def check_reduction(reduction: str) -> None:
    """Check that a reduction is one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, but it must be one of {REDUCTIONS}")


def check_row_tensors(
    options: SoftmaxOptions, rows: Rows, sample_weight: Tensor | None, normalizer: Tensor | float | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return sample_weight (N,) and normalizer () in the accumulation dtype, checked."""
    logits = rows.logits
    dtype = accumulate_dtype(logits.dtype)
    if sample_weight is not None:
        if sample_weight.requires_grad:
            raise ValueError("sample_weight requires grad, but it is a constant: pass sample_weight.detach()")
        if sample_weight.shape != rows.shape:
            raise ValueError(
                f"sample_weight has shape {tuple(sample_weight.shape)}, but it must be {tuple(rows.shape)}"
            )
        if sample_weight.device != logits.device:
            raise ValueError(f"sample_weight is on {sample_weight.device}, but input is on {logits.device}")
        sample_weight = sample_weight.reshape(-1).to(dtype)
    return sample_weight, check_normalizer(normalizer, options.reduction, logits)


def check_normalizer(normalizer: Tensor | float | None, reduction: str, logits: Tensor) -> Tensor | None:
    """Return normalizer () in the accumulation dtype, checked."""
    if normalizer is None:
        return None
    dtype = accumulate_dtype(logits.dtype)
    if reduction == "none":
        raise ValueError("normalizer is given with reduction='none', which divides by nothing: use 'sum' or 'mean'")
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad:
            raise ValueError("normalizer requires grad, but it is a constant: pass normalizer.detach()")
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}, but it must be one number")
        return normalizer.reshape(()).to(logits.device, dtype)
    return torch.full((), float(normalizer), dtype=dtype, device=logits.device)


def check_range(rows: Rows, options: SoftmaxOptions, num_classes: int) -> None:
    """Check that class indices are in [0, C) or ignored. The CPU kernels do it themselves, for the rows that they get.

    Eagerly on CPU; on an accelerator it would wait for the device, and is done only if IMBALANCE_KERNELS_CHECK=1.

    Raises:
        IndexError: a target is neither.
    """
    if rows.target.is_floating_point() or not may_read_values(rows.logits):
        return
    outside = ((rows.target < 0) | (rows.target >= num_classes)) & (rows.target != options.ignore_index)
    if bool(outside.any()):
        raise IndexError(
            f"target {int(rows.target[outside][0])} is out of bounds: it must be in [0, {num_classes}) or "
            f"ignore_index={options.ignore_index}"
        )


def check_cosines(rows: Rows, options: SoftmaxOptions) -> None:
    """Check, where values may be read (see `check_range`), that the targets' logits are cosines.

    Raises:
        ValueError: one is outside [-1, 1]: embeddings, or products that were not normalised.
    """
    if rows.target.is_floating_point() or not may_read_values(rows.logits):
        return
    logits = rows.logits.detach()
    targets = RowTargets.of(rows.target, logits.shape[1], options.ignore_index)
    indices = targets.indices.view(logits.shape[0], 1, *logits.shape[2:])
    cosines = logits.gather(1, indices).reshape(-1)
    _check_range_of_cosines(cosines, targets, "input holds", "before the last product")


def check_linear_cosines(
    rows: Rows, linear_weight: Tensor, linear_bias: Tensor | None, options: SoftmaxOptions
) -> None:
    """The same of a linear layer, whose input is `rows.logits` (N, D).

    Raises:
        ValueError: a target's logit is outside [-1, 1], or there is a bias.
    """
    if linear_bias is not None:
        raise ValueError("linear_bias is given, but this loss is defined on cosines: use a layer without a bias")
    if rows.target.is_floating_point() or not may_read_values(rows.logits):
        return
    targets = RowTargets.of(rows.target, linear_weight.shape[0], options.ignore_index)
    with torch.no_grad():
        products = rows.logits.float() * linear_weight[targets.indices].float()  # (N, D)
    _check_range_of_cosines(
        products.sum(dim=1), targets, "input times linear_weight is", "or use LinearLoss(cosine=True)"
    )


def _check_range_of_cosines(cosines: Tensor, targets: RowTargets, what: str, where: str) -> None:
    beyond = (cosines.abs() > 1 + COSINE_TOLERANCE) & targets.valid & torch.isfinite(cosines)
    if bool(beyond.any()):
        raise ValueError(
            f"{what} {float(cosines[beyond][0]):.4g} for a target, but this loss is defined on cosines in [-1, 1]: "
            f"normalise embeddings and class vectors {where}"
        )


def may_read_values(logits: Tensor) -> bool:
    """Return whether checks may read the values of tensors beside logits, see `check_range`."""
    if torch.compiler.is_compiling() or logits.shape[1] == 0:
        return False
    return logits.device.type == "cpu" or os.environ.get("IMBALANCE_KERNELS_CHECK") == "1"


class _Layout(Protocol):
    @property
    def logits(self) -> Tensor: ...

    @property
    def owned(self) -> bool: ...


def check_inplace(input: Tensor, rows: _Layout, class_dim: int) -> None:
    """Check that the gradient may take the memory of the logits.

    Raises:
        ValueError: input is, or is a view of, a leaf that requires grad; it is not seen as rows without a copy; its
            elements share memory.
    """
    root = input
    if not torch.compiler.is_compiling() and input._is_view() and input._base is not None:
        root = input._base
    if torch.is_grad_enabled() and root.is_leaf and root.requires_grad:
        raise ValueError(
            "inplace=True would overwrite input, a leaf that requires grad (or a view of one), by its gradient"
        )
    if rows.owned:
        raise ValueError(
            f"inplace=True needs an input that can be seen as (N, C) rows, or as (B, C, P) with pixels last, without a "
            f"copy, but its shape is {tuple(input.shape)} with strides {input.stride()} and class_dim={class_dim}"
        )
    if not layout.has_memory_of_its_own(rows.logits):
        raise ValueError(f"inplace=True needs rows with memory of their own, but input's strides are {input.stride()}")


def check_class_vector(argument: str, vector: Tensor | None, num_classes: int) -> None:
    """Check a constant with one entry per class."""
    if vector is None:
        return
    if vector.requires_grad:
        raise ValueError(f"{argument} requires grad, but class vectors are constants: pass {argument}.detach()")
    if not vector.is_floating_point():
        raise TypeError(f"{argument} has dtype {vector.dtype}, but it must be floating point")
    if vector.shape != (num_classes,):
        raise ValueError(
            f"{argument} has shape {tuple(vector.shape)}, but input has {num_classes} classes: it must be "
            f"({num_classes},)"
        )


def _check_number(argument: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and value < math.inf):
        wants = f"at least {low} and finite" if math.isinf(high) else f"from {low} to {high}"
        raise ValueError(f"{argument} is {value!r}, but it must be {wants}")


def _wrong_target_shape(input: Tensor, target: Tensor, class_dim: int) -> str:
    wants = input.movedim(class_dim, -1).shape[:-1]
    message = (
        f"target has shape {tuple(target.shape)}, but with input {tuple(input.shape)} and class_dim={class_dim} it "
        f"must be {tuple(wants)}"
    )
    if target.shape == input.shape[:-1]:
        message += "; if the classes are the last dimension, as in language models, pass class_dim=-1"
    elif target.shape == input.shape:
        message += f", or {tuple(input.shape)} in floating point for class probabilities"
    return message
