"""The operations that kernels implement, one namespace of torch.ops for each implementation.

The C++ extension registers torch.ops.imbalance_kernels (csrc/bindings.cpp). Here torch.ops.imbalance_kernels_triton
gets the same schemas, and both get what torch.compile asks of an operation. Triton is imported when the first of its
kernels runs. Tests have a third, torch.ops.imbalance_kernels_emulated: the CUDA kernels, run on the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import implementation  # loads the extension, which registers its operations
from imbalance_kernels.options import accumulate_dtype

__all__ = [
    "COLUMN_SUMS_SCHEMA",
    "LOSS_SCHEMA",
    "MULTILABEL_SCHEMA",
    "REPORTS_SCHEMA",
    "SCHEMAS",
    "SIGMOID_SCHEMA",
    "SPLIT_BACKWARD_SCHEMA",
    "SPLIT_SCHEMA",
    "fake_reports",
    "kernels",
]

SPLIT_SCHEMA = (
    "Tensor target, float scale, Tensor? factor, Tensor? bias, float? softcap, str margin_kind, "
    "float[] margin_parameters, Tensor? class_margin, Tensor? class_weight, float label_smoothing, int ignore_index"
)
LOSS_SCHEMA = (
    "str objective, float[] objective_parameters, Tensor? class_parameter, Tensor? sample_weight, Tensor? normalizer, "
    "str reduction, float z_loss"
)
SIGMOID_SCHEMA = (
    "Tensor target, str objective, float[] objective_parameters, Tensor? class_parameter, float positive, "
    "float negative, Tensor? positive_weight, Tensor? negative_weight, Tensor? bias, Tensor? sample_weight, "
    "Tensor? normalizer, int ignore_index, str reduction"
)
MULTILABEL_SCHEMA = (
    "Tensor target, Tensor? bias, Tensor? sample_weight, Tensor? normalizer, int ignore_index, str reduction"
)
COLUMN_SUMS_SCHEMA = "Tensor target, Tensor? sample_weight, int ignore_index, bool from_softmax"
REPORTS_SCHEMA = "bool with_log_probs, bool with_correct"
SPLIT_BACKWARD_SCHEMA = "Tensor rest, Tensor shift, Tensor d_target, Tensor d_rest, Tensor d_weighted_logits"

SCHEMAS = {
    "softmax_loss": (
        f"(Tensor logits, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, bool with_gradient, {REPORTS_SCHEMA}) -> "
        "(Tensor loss, Tensor d_logits, Tensor log_probs, Tensor correct)"
    ),
    "softmax_loss_": (
        f"(Tensor(a!) logits, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, {REPORTS_SCHEMA}) -> "
        "(Tensor loss, Tensor log_probs, Tensor correct)"
    ),
    "softmax_loss_backward": f"(Tensor logits, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, Tensor upstream) -> Tensor d_logits",
    "softmax_loss_backward_": f"(Tensor(a!) logits, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, Tensor upstream) -> ()",
    "sigmoid_loss": f"(Tensor logits, {SIGMOID_SCHEMA}, bool with_gradient) -> (Tensor loss, Tensor d_logits)",
    "sigmoid_loss_": f"(Tensor(a!) logits, {SIGMOID_SCHEMA}) -> Tensor loss",
    "sigmoid_loss_backward": f"(Tensor logits, {SIGMOID_SCHEMA}, Tensor upstream) -> Tensor d_logits",
    "sigmoid_loss_backward_": f"(Tensor(a!) logits, {SIGMOID_SCHEMA}, Tensor upstream) -> ()",
    "multilabel_softmax": (
        f"(Tensor logits, {MULTILABEL_SCHEMA}, bool with_gradient) -> (Tensor loss, Tensor d_logits)"
    ),
    "multilabel_softmax_": f"(Tensor(a!) logits, {MULTILABEL_SCHEMA}) -> Tensor loss",
    "multilabel_softmax_backward": f"(Tensor logits, {MULTILABEL_SCHEMA}, Tensor upstream) -> Tensor d_logits",
    "multilabel_softmax_backward_": f"(Tensor(a!) logits, {MULTILABEL_SCHEMA}, Tensor upstream) -> ()",
    "column_sums": (
        f"(Tensor logits, {COLUMN_SUMS_SCHEMA}) -> (Tensor predicted, Tensor true_positives, Tensor positives)"
    ),
    "column_sums_backward": (
        f"(Tensor logits, {COLUMN_SUMS_SCHEMA}, Tensor d_predicted, Tensor d_true_positives) -> Tensor d_logits"
    ),
    "scale_": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "target_and_rest": (
        f"(Tensor logits, {SPLIT_SCHEMA}) -> "
        "(Tensor target_logit, Tensor rest, Tensor shift, Tensor weighted_logits, Tensor weight_sum)"
    ),
    "target_and_rest_backward": f"(Tensor logits, {SPLIT_SCHEMA}, {SPLIT_BACKWARD_SCHEMA}) -> Tensor d_logits",
    "target_and_rest_backward_": f"(Tensor(a!) logits, {SPLIT_SCHEMA}, {SPLIT_BACKWARD_SCHEMA}) -> ()",
}

_triton = torch.library.Library("imbalance_kernels_triton", "DEF")  # lives as long as the registration should


def kernels(impl: str) -> Any:
    """Return the namespace with the operations of an implementation, "cpu", "cuda" or "triton"."""
    if impl == "triton":
        return torch.ops.imbalance_kernels_triton
    if impl == "cuda" and implementation.emulates_cuda():
        return torch.ops.imbalance_kernels_emulated
    return torch.ops.imbalance_kernels  # for the device of the logits


def _launcher(name: str) -> Callable[..., Any]:
    stems = ("target_and_rest", "sigmoid_loss", "multilabel_softmax", "column_sums")
    module = next((stem for stem in stems if name.startswith(stem)), "softmax_loss")

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"imbalance_kernels.triton_kernels.{module}"), name)(*arguments)

    return launch


def _num_rows(logits: Tensor) -> int:
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def _fake_softmax_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    *_, reduction, _, with_gradient, with_log_probs, with_correct = options
    shape = (_num_rows(logits),) if reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=accumulate_dtype(logits.dtype))
    d_logits = logits.new_empty(logits.shape if with_gradient else (0,))
    return loss, d_logits, *fake_reports(loss, _num_rows(logits), with_log_probs, with_correct)


def _fake_softmax_loss_(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    loss = logits.new_empty((), dtype=accumulate_dtype(logits.dtype))
    return loss, *fake_reports(loss, _num_rows(logits), *options[-2:])


def fake_reports(loss: Tensor, num_rows: int, with_log_probs: bool, with_correct: bool) -> tuple[Tensor, Tensor]:
    """Return log_probs and correct (N,), (0,) where not asked for, of the dtypes that go with a loss."""
    log_probs = loss.new_empty((num_rows if with_log_probs else 0,))
    return log_probs, loss.new_empty((num_rows if with_correct else 0,), dtype=torch.bool)


def _fake_sigmoid_loss(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, with_gradient = options
    loss = logits.new_empty(logits.shape if reduction == "none" else (), dtype=accumulate_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape if with_gradient else (0,))


def _fake_multilabel_softmax(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, with_gradient = options
    shape = (_num_rows(logits),) if reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=accumulate_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape if with_gradient else (0,))


def _fake_column_sums(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty((logits.shape[1],), dtype=accumulate_dtype(logits.dtype)) for _ in range(3))


def _fake_target_and_rest(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, ...]:
    label_smoothing = options[8]
    weighted = logits.shape[0] if label_smoothing > 0 or target.is_floating_point() else 0
    sizes = [logits.shape[0]] * 3 + [weighted] * 2
    return tuple(logits.new_empty((size,), dtype=accumulate_dtype(logits.dtype)) for size in sizes)


def _fake_gradient(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_nothing(logits: Tensor, *_: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "softmax_loss": _fake_softmax_loss,
    "softmax_loss_": _fake_softmax_loss_,
    "softmax_loss_backward": _fake_gradient,
    "softmax_loss_backward_": _fake_nothing,
    "sigmoid_loss": _fake_sigmoid_loss,
    "sigmoid_loss_": lambda logits, *_: logits.new_empty((), dtype=accumulate_dtype(logits.dtype)),
    "sigmoid_loss_backward": _fake_gradient,
    "sigmoid_loss_backward_": _fake_nothing,
    "multilabel_softmax": _fake_multilabel_softmax,
    "multilabel_softmax_": lambda logits, *_: logits.new_empty((), dtype=accumulate_dtype(logits.dtype)),
    "multilabel_softmax_backward": _fake_gradient,
    "multilabel_softmax_backward_": _fake_nothing,
    "column_sums": _fake_column_sums,
    "column_sums_backward": _fake_gradient,
    "scale_": _fake_nothing,
    "target_and_rest": _fake_target_and_rest,
    "target_and_rest_backward": _fake_gradient,
    "target_and_rest_backward_": _fake_nothing,
}

for _name, _schema in SCHEMAS.items():
    _triton.define(_name + _schema)
    _triton.impl(_name, _launcher(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"imbalance_kernels_triton::{_name}", _FAKES[_name], lib=_triton)
    if implementation.extension() is not None:
        torch.library.register_fake(f"imbalance_kernels::{_name}", _FAKES[_name])
    if implementation.emulates_cuda():
        torch.library.register_fake(f"imbalance_kernels_emulated::{_name}", _FAKES[_name])
