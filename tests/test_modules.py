"""Modules and their functional twins: drop-in for torch's loss, literal formulas, keywords, state, and errors."""

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import test_sigmoid_modules as sigmoid_tables
import torch
from implementations import IMPLEMENTATIONS
from torch import Tensor

import imbalance_kernels as ik
from imbalance_kernels import functional as F
from imbalance_kernels import implementation

REDUCTIONS = ("none", "sum", "mean")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(shape: tuple[int, ...], num_classes: int, seed: int = 1) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the loss and the logits' gradient for a random upstream gradient, the same for losses of one shape."""
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    value.backward(randn(*value.shape, seed=9, dtype=value.dtype))
    return value.detach(), x.grad


def assert_same(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float = 1e-12, smallest: float = 0.0
) -> None:
    """Compare values and gradients, each relative to its own size, or to `smallest` where that is larger."""
    for ours, theirs in zip(got, want, strict=True):
        finite = theirs.abs()[torch.isfinite(theirs)]
        size = max(smallest, float(finite.max()) if finite.numel() else 0.0)
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def assert_identical(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- drop-in for torch.nn.CrossEntropyLoss

SHAPES = {
    "(N, C)": (7, 5),
    "one class: the loss is 0": (4, 1),
    "no rows: the mean is NaN": (0, 5),
    "one sample (C,)": (5,),
    "sequence (N, C, d1)": (3, 5, 4),
    "image (N, C, d1, d2)": (2, 5, 3, 2),
    "volume (N, C, d1, d2, d3), a dimension of one": (2, 5, 1, 3, 2),
    "more classes than a block, an odd tail": (3, 131),
}


def class_dim_of(shape: tuple[int, ...]) -> int:
    return 0 if len(shape) == 1 else 1


def target_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    dim = class_dim_of(shape)
    return shape[:dim] + shape[dim + 1 :]


def targets_of(shape: tuple[int, ...], ignored: str) -> tuple[Tensor, int]:
    """Return targets and ignore_index."""
    num_classes = shape[class_dim_of(shape)]
    target = classes(target_shape(shape), num_classes)
    if ignored == "some":
        return torch.where(randn(*target.shape, seed=2) > 0.5, -100, target), -100
    if ignored == "a class":
        return target, num_classes // 2
    if ignored == "all":
        return torch.full_like(target, -7), -7
    return target, -100


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("ignored", ("none", "some", "a class", "all"))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_cross_entropy_is_torchs(shape, reduction, weighted, ignored, smoothing, impl):
    x = 3 * randn(*shape)
    target, ignore_index = targets_of(shape, ignored)
    weight = randn(shape[class_dim_of(shape)], seed=3).abs() if weighted else None
    options = dict(weight=weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(**options), x, target)
    got = value_and_gradient(ik.CrossEntropyLoss(**options, impl=impl), x, target)
    assert_same(got, want, smallest=float(1 in shape))  # one class: 0, but for a rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_class_probabilities_are_torchs(shape, reduction, weighted, smoothing, impl):
    x, dim = 3 * randn(*shape), class_dim_of(shape)
    target = randn(*shape, seed=4).softmax(dim)
    options = dict(
        weight=randn(shape[dim], seed=3).abs() if weighted else None, reduction=reduction, label_smoothing=smoothing
    )
    want = value_and_gradient(torch.nn.CrossEntropyLoss(**options), x, target)
    got = value_and_gradient(ik.CrossEntropyLoss(**options, impl=impl), x, target)
    assert_same(got, want, smallest=float(1 in shape))  # one class: 0, but for a rounding


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ("unnormalised", "one-hot", "zero on a masked class"))
def test_class_probabilities_need_not_be_a_distribution(kind, impl):
    x, target = 3 * randn(6, 5), randn(6, 5, seed=4).abs()
    if kind == "one-hot":
        target = torch.nn.functional.one_hot(classes((6,), 5), 5).double()
    want = value_and_gradient(torch.nn.CrossEntropyLoss(reduction="none"), x, target)
    if (
        kind == "zero on a masked class"
    ):  # torch gives 0 * -inf = NaN; ours is the loss of the four classes that are left
        target[:, 2] = 0
        four = [0, 1, 3, 4]
        value, gradient = value_and_gradient(torch.nn.CrossEntropyLoss(reduction="none"), x[:, four], target[:, four])
        want = value, torch.zeros(6, 5, dtype=torch.float64).index_copy(1, torch.tensor(four), gradient)
        x[:, 2] = -math.inf
    assert_same(value_and_gradient(ik.CrossEntropyLoss(reduction="none", impl=impl), x, target), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("target_dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_class_probabilities_in_another_dtype(target_dtype, dtype, impl):
    x = 3 * randn(6, 37, dtype=dtype)
    target = randn(6, 37, seed=4).softmax(1).to(target_dtype)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(), x.double(), target.double())
    got = value_and_gradient(ik.CrossEntropyLoss(impl=impl), x, target)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert_same(got[:1], want[:1], 1e-6)
    assert_same(got[1:], want[1:], 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_masked_target_is_torchs(reduction, weighted, impl):
    """Loss infinite, -1 at the target, the softmax of the others elsewhere."""
    x, target = 3 * randn(5, 4), torch.tensor([0, 3, 1, 2, 2])
    x[1, 3] = x[4, 2] = -math.inf
    options = dict(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).double() if weighted else None, reduction=reduction)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(**options), x, target)
    got = value_and_gradient(ik.CrossEntropyLoss(**options, impl=impl), x, target)
    assert bool(torch.isinf(want[0]).any()) and bool(torch.isfinite(want[1]).all())
    assert_same(got, want)
    if reduction == "none" and not weighted:
        assert float(got[1][1, 3] / randn(5, seed=9)[1]) == -1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", (ik.CrossEntropyLoss, ik.FocalLoss, ik.PolyLoss))
def test_a_masked_target_still_pulls(loss, impl):
    """p_t = 0: every objective that is a cross-entropy there has its gradient, through the scale."""
    x, target = 3 * randn(3, 4), torch.tensor([0, 3, 1])
    x[torch.arange(3), target] = -math.inf
    _, gradient = value_and_gradient(loss(scale=2.5, reduction="none", impl=impl), x, target)
    want = 2.5 * ((2.5 * x).softmax(1) - torch.nn.functional.one_hot(target, 4)) * randn(3, seed=9)[:, None]
    assert_same((gradient,), (want,))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_classes_are_torchs(reduction, impl):
    x, target = 3 * randn(6, 9), torch.tensor([0, 3, 1, 2, 2, 8])
    x[torch.arange(6), torch.tensor([1, 4, 8, 0, 7, 0])] = -math.inf
    x[2, 3:] = -math.inf
    want = value_and_gradient(torch.nn.CrossEntropyLoss(reduction=reduction), x, target)
    got = value_and_gradient(ik.CrossEntropyLoss(reduction=reduction, impl=impl), x, target)
    assert_same(got, want)
    assert bool((got[1][x == -math.inf] == 0).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_a_row_that_is_all_masked_is_nan_and_alone_so(dtype, impl):
    x, target = randn(5, 9, dtype=dtype), torch.tensor([0, 3, 1, 2, 2])
    x[2] = -math.inf
    losses, gradient = value_and_gradient(ik.CrossEntropyLoss(reduction="none", impl=impl), x, target)
    assert torch.isnan(losses).tolist() == [False, False, True, False, False]
    assert bool(torch.isfinite(gradient[[0, 1, 3, 4]]).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_nothing_valid_is_nan_with_zero_gradient_and_zero_with_a_normalizer(dtype, impl):
    x, target = randn(4, 9, dtype=dtype), torch.full((4,), -100)
    mean, gradient = value_and_gradient(ik.CrossEntropyLoss(impl=impl), x, target)
    assert math.isnan(mean) and not gradient.any()
    for reduction in ("mean", "sum"):
        loss = ik.CrossEntropyLoss(reduction=reduction, impl=impl)
        for normalizer in (3.0, 0.0):
            value, gradient = value_and_gradient(loss, x, target, normalizer=normalizer)
            assert value == 0 and not gradient.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_row_is_exactly_zero_whatever_it_holds(reduction, impl):
    x, target = randn(5, 9), torch.tensor([0, -100, 1, -100, -100])
    x[1], x[3], x[4, ::2] = math.nan, math.inf, -math.inf
    loss = ik.FocalLoss(reduction=reduction, label_smoothing=0.1, z_loss=1e-2, impl=impl)
    value, gradient = value_and_gradient(loss, x, target)
    counted = torch.tensor([0, 2])
    if reduction == "none":
        assert value[[1, 3, 4]].tolist() == [0, 0, 0]
    else:
        assert_same((value,), (loss(x[counted], target[counted]),))
    assert bool((gradient[[1, 3, 4]] == 0).all())
    assert bool((gradient[counted] != 0).all()) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_zero_are_torchs(reduction, dtype, impl):
    """A batch of classes of weight zero has a divisor of zero."""
    x, target, weight = randn(3, 4, dtype=dtype), torch.tensor([1, 1, 1]), torch.tensor([1.0, 0, 2, 3]).to(dtype)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(weight, reduction=reduction), x, target)
    assert_same(value_and_gradient(ik.CrossEntropyLoss(weight, reduction=reduction, impl=impl), x, target), want)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    ((ik.CrossEntropyLoss, torch.nn.CrossEntropyLoss), (F.cross_entropy, torch.nn.functional.cross_entropy)),
    ids=("module", "function"),
)
def test_positional_order_is_torchs(ours, theirs):
    their_names = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(ours).parameters)[: len(their_names)] == their_names


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("reduce", (None, True, False))
@pytest.mark.parametrize("size_average", (None, True, False))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deprecated_flags_are_torchs(reduction, size_average, reduce):
    x, target, weight = randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1]), randn(4, seed=3).abs()
    arguments = (weight, size_average, 3, reduce, reduction, 0.1)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(*arguments), x, target)
    assert_same(value_and_gradient(ik.CrossEntropyLoss(*arguments), x, target), want)
    assert_same(value_and_gradient(lambda x: F.cross_entropy(x, target, *arguments), x), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.int64, torch.int32))
def test_target_dtypes(dtype, impl):
    x, target = randn(6, 4), torch.tensor([0, 1, -100, 3, 3, 1])
    want = value_and_gradient(torch.nn.CrossEntropyLoss(reduction="none"), x, target)
    assert_same(value_and_gradient(ik.CrossEntropyLoss(reduction="none", impl=impl), x, target.to(dtype)), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_loss_of_half_logits_is_float32(dtype):
    x, target = randn(6, 4, dtype=dtype), torch.tensor([0, 1, -100, 3, 3, 1])
    for reduction in REDUCTIONS:
        value, gradient = value_and_gradient(ik.CrossEntropyLoss(reduction=reduction), x, target)
        assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
        assert ik.CrossEntropyLoss(reduction=reduction)(x, target).dtype == torch.float32  # without grad


# ---------------------------------------------------------------- every loss is its literal formula

C = 6
COUNTS = torch.tensor([70000, 9000, 700, 50, 3, 1])
PRIOR = COUNTS.double() / COUNTS.sum()
GAMMAS = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
MARGINS = torch.tensor([0.0, 0.1, 0.2, -0.3, 0.4, 0.5])


def log_p(z: Tensor, onehot: Tensor) -> Tensor:
    return (z.log_softmax(1) * onehot).sum(1)


def p(z: Tensor, onehot: Tensor) -> Tensor:
    return (z.softmax(1) * onehot).sum(1)


def odds(z: Tensor, onehot: Tensor) -> Tensor:
    return (z * onehot).sum(1) - z.masked_fill(onehot.bool(), -math.inf).logsumexp(1)


def circle_logits(x: Tensor, onehot: Tensor, margin: float, detach: bool) -> Tensor:
    pull, push = (1 + margin - x).clamp_min(0), (x + margin).clamp_min(0)
    if detach:
        pull, push = pull.detach(), push.detach()
    return torch.where(onehot.bool(), pull * (x - 1 + margin), push * (x - margin))


def on_target(x: Tensor, onehot: Tensor, target_logit: Tensor) -> Tensor:
    return torch.where(onehot.bool(), target_logit, x)


class Loss(NamedTuple):
    """A module, its functional twin, their own arguments, and the formula: effective logits, then rows from them."""

    module: type
    function: Callable[..., Tensor]
    arguments: dict[str, Any] = {}
    logits: Callable[[Tensor, Tensor], Tensor] = lambda x, onehot: x  # (N, C) of raw logits and one-hot targets
    rows: Callable[[Tensor, Tensor], Tensor] = lambda z, onehot: -log_p(z, onehot)  # (N,)
    cosines: bool = False
    maps_logits: bool = False  # its own logit map leaves no room for some shared keywords


LOSSES = {
    "cross_entropy": Loss(ik.CrossEntropyLoss, F.cross_entropy),
    "logit_adjusted": Loss(
        ik.LogitAdjustedLoss,
        F.logit_adjusted_loss,
        dict(class_counts=COUNTS, tau=1.5),
        lambda x, _: x + 1.5 * PRIOR.log(),
        maps_logits=True,
    ),
    "logit_adjusted, Prior": Loss(
        ik.LogitAdjustedLoss,
        F.logit_adjusted_loss,
        dict(prior=ik.Prior(COUNTS, tau=0.5)),
        lambda x, _: x + 0.5 * PRIOR.log(),
        maps_logits=True,
    ),
    "logit_adjusted, probabilities": Loss(
        ik.LogitAdjustedLoss,
        F.logit_adjusted_loss,
        dict(prior=PRIOR, tau=2.0),
        lambda x, _: x + 2 * PRIOR.log(),
        maps_logits=True,
    ),
    "balanced_softmax": Loss(
        ik.BalancedSoftmaxLoss,
        F.balanced_softmax_loss,
        dict(class_counts=COUNTS.tolist()),
        lambda x, _: (PRIOR * x.exp()).log(),  # counts and prior differ by a constant, which only a z-loss sees
        maps_logits=True,
    ),
    "focal": Loss(ik.FocalLoss, F.focal_loss, {}, rows=lambda z, t: -((1 - p(z, t)) ** 2) * log_p(z, t)),
    "focal 0.5": Loss(
        ik.FocalLoss, F.focal_loss, dict(gamma=0.5), rows=lambda z, t: -((1 - p(z, t)) ** 0.5) * log_p(z, t)
    ),
    "focal per class": Loss(
        ik.FocalLoss,
        F.focal_loss,
        dict(gamma=GAMMAS),
        rows=lambda z, t: -((1 - p(z, t)) ** (t @ GAMMAS.double())) * log_p(z, t),
    ),
    "hard_truncation": Loss(
        ik.HardTruncationLoss,
        F.hard_truncation_loss,
        dict(threshold=0.2),
        rows=lambda z, t: torch.where(p(z, t) < 0.2, -log_p(z, t), 0 * log_p(z, t)),
    ),
    "soft_truncation softmax_neg": Loss(
        ik.SoftTruncationLoss,
        F.soft_truncation_loss,
        dict(sharpness=1.5),
        rows=lambda z, t: -p(-1.5 * z, t) * log_p(z, t),
    ),
    "soft_truncation one_minus_softmax": Loss(
        ik.SoftTruncationLoss,
        F.soft_truncation_loss,
        dict(sharpness=1.5, form="one_minus_softmax"),
        rows=lambda z, t: -(1 - p(1.5 * z, t)) * log_p(z, t),
    ),
    "soft_truncation log_odds": Loss(
        ik.SoftTruncationLoss,
        F.soft_truncation_loss,
        dict(sharpness=1.5, form="log_odds"),
        rows=lambda z, t: -torch.sigmoid(-1.5 * odds(z, t)) * log_p(z, t),
    ),
    "poly": Loss(ik.PolyLoss, F.poly_loss, dict(epsilon=2.0), rows=lambda z, t: -log_p(z, t) + 2 * (1 - p(z, t))),
    "gce": Loss(
        ik.GeneralizedCrossEntropyLoss,
        F.generalized_cross_entropy,
        dict(q=0.4),
        rows=lambda z, t: (1 - p(z, t) ** 0.4) / 0.4,
    ),
    "smooth_accuracy": Loss(ik.SmoothAccuracyLoss, F.smooth_accuracy_loss, rows=lambda z, t: 1 - p(z, t)),
    "poly_focal": Loss(
        ik.SoftmaxLoss,
        F.softmax_loss,
        dict(objective=ik.objectives.PolyFocal(1.5, 0.7)),
        rows=lambda z, t: -((1 - p(z, t)) ** 1.5) * log_p(z, t) + 0.7 * (1 - p(z, t)) ** 2.5,
    ),
    "token_scaled": Loss(
        ik.SoftmaxLoss,
        F.softmax_loss,
        dict(objective=ik.objectives.TokenScaled()),
        rows=lambda z, t: -p(z, t).detach() * log_p(z, t),
    ),
    "ldam": Loss(
        ik.LDAMLoss,
        F.ldam_loss,
        dict(class_counts=COUNTS, max_margin=0.4, scale=10.0),
        lambda x, t: 10 * (x - t * 0.4 * COUNTS.double() ** -0.25),  # the rarest class is seen once
        maps_logits=True,
    ),
    "cosface": Loss(
        ik.CosFaceLoss,
        F.cosface_loss,
        dict(margin=0.3, scale=8.0),
        lambda x, t: 8 * (x - 0.3 * t),
        cosines=True,
        maps_logits=True,
    ),
    "cosface per class": Loss(
        ik.CosFaceLoss,
        F.cosface_loss,
        dict(margin=MARGINS, scale=8.0),
        lambda x, t: 8 * (x - MARGINS.double() * t),
        cosines=True,
        maps_logits=True,
    ),
    "arcface": Loss(
        ik.ArcFaceLoss,
        F.arcface_loss,
        dict(margin=0.4, scale=8.0),
        lambda x, t: 8 * on_target(x, t, torch.cos(x.arccos() + 0.4)),
        cosines=True,
        maps_logits=True,
    ),
    "arcface past pi": Loss(
        ik.ArcFaceLoss,
        F.arcface_loss,
        dict(margin=2.9, scale=8.0),
        lambda x, t: (
            8
            * on_target(
                x, t, torch.where(x.arccos() + 2.9 > math.pi, x - 2.9 * math.sin(2.9), (x.arccos() + 2.9).cos())
            )
        ),
        cosines=True,
        maps_logits=True,
    ),
    "arcface straight_through": Loss(
        ik.ArcFaceLoss,
        F.arcface_loss,
        dict(margin=0.4, scale=8.0, straight_through=True),
        lambda x, t: 8 * on_target(x, t, x + (torch.cos(x.arccos() + 0.4) - x).detach()),
        cosines=True,
        maps_logits=True,
    ),
    "sphereface, combined": Loss(
        ik.CrossEntropyLoss,
        F.cross_entropy,
        dict(margin=ik.AngularMargin(m1=1.35, m2=0.2, m3=0.1), scale=8.0),
        lambda x, t: 8 * on_target(x, t, combined_margin(x, 1.35, 0.2, 0.1)),
        cosines=True,
        maps_logits=True,
    ),
    "circle": Loss(
        ik.CircleLoss,
        F.circle_loss,
        dict(margin=0.3, scale=8.0),
        lambda x, t: 8 * circle_logits(x, t, 0.3, True),
        cosines=True,
        maps_logits=True,
    ),
    "circle, not detached": Loss(
        ik.CircleLoss,
        F.circle_loss,
        dict(margin=0.3, scale=8.0, detach=False),
        lambda x, t: 8 * circle_logits(x, t, 0.3, False),
        cosines=True,
        maps_logits=True,
    ),
    "vs": Loss(
        ik.VSLoss,
        F.vs_loss,
        dict(class_counts=COUNTS, gamma=0.2, tau=1.25),
        lambda x, _: (COUNTS.double() / 70000) ** 0.2 * x + 1.25 * PRIOR.log(),
        maps_logits=True,
    ),
}
WITHOUT_OWN_MAP = {name: loss for name, loss in LOSSES.items() if not loss.maps_logits}


def combined_margin(x: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    angle = m1 * x.arccos() + m2
    turns = (angle / math.pi).floor()
    return (-1) ** turns * angle.cos() - 2 * turns - m3


def each(losses: dict[str, Loss]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses.values(), ids=losses.keys())


def inputs(loss: Loss, rows: int = 13) -> tuple[Tensor, Tensor]:
    x = randn(rows, C)
    return (0.95 * torch.tanh(x) if loss.cosines else 3 * x), classes((rows,), C)


def one_hot(target: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(target, C).double()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each(LOSSES)
def test_module_is_its_formula(loss, impl):
    x, target = inputs(loss)
    onehot = one_hot(target)
    want = value_and_gradient(lambda x: loss.rows(loss.logits(x, onehot), onehot), x)
    module = loss.module(**loss.arguments, reduction="none", impl=impl)
    assert_same(value_and_gradient(module, x, target), want, 1e-11)


@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each(LOSSES)
def test_module_is_its_functional_twin(loss, impl, dtype, reduction):
    x, target = inputs(loss)
    x = x.to(dtype)
    module = value_and_gradient(loss.module(**loss.arguments, reduction=reduction, impl=impl), x, target)
    twin = value_and_gradient(lambda x: loss.function(x, target, **loss.arguments, reduction=reduction, impl=impl), x)
    assert_identical(module, twin)


def test_every_module_and_function_is_in_the_table():
    modules = {value for value in vars(ik).values() if inspect.isclass(value) and issubclass(value, torch.nn.Module)}
    primitives = {"TargetAndRest", "target_and_rest", "target_log_odds", "target_log_probs"}
    primitives |= {"linear_cross_entropy", "linear_log_probs", "linear_target_and_rest"}  # tests/test_linear.py
    modules -= {ik.LinearLoss, ik.RadiusMarginLoss}  # there too
    of_labels = {ik.MultilabelSoftmaxLoss, ik.SmoothF1Loss, ik.DiceLoss, ik.F1WeightedCrossEntropyLoss}
    modules -= of_labels  # tests/test_multilabel_softmax.py, tests/test_batch_statistics.py
    modules -= {ik.RunningPrior}  # no loss: tests/test_running_prior.py
    modules -= {ik.SigmoidLoss, *sigmoid_tables.MODULES}
    primitives |= {"ColumnSums", "column_sums", "multilabel_softmax_loss"}
    primitives |= {"smooth_f1_loss", "dice_loss", "f1_weighted_cross_entropy"}
    primitives |= {"sigmoid_loss", *(twin.__name__ for twin, _ in sigmoid_tables.MODULES.values())}
    assert modules == {loss.module for loss in LOSSES.values()}
    assert set(F.__all__) - primitives == {loss.function.__name__ for loss in LOSSES.values()}


# ---------------------------------------------------------------- shared keywords

WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.5, 3.0, 1.0])
SMOOTHING = 0.2
Z_LOSS = 0.03


def literal(loss: Loss, x: Tensor, target: Tensor, sample_weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return rows (N,) of a loss with every additive keyword, and the mean's divisor ()."""
    valid = target != ignore_index
    onehot = one_hot(torch.where(valid, target, 0))
    weight = onehot @ WEIGHT.double()
    z = loss.logits(x, onehot)
    smooth = -(WEIGHT.double() * z.log_softmax(1)).mean(1)
    rows = (1 - SMOOTHING) * weight * loss.rows(z, onehot) + SMOOTHING * smooth + Z_LOSS * z.logsumexp(1) ** 2
    return valid * sample_weight * rows, (valid * sample_weight * weight).sum()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean", "normalizer"))
@each(LOSSES)
def test_additive_keywords_together(loss, reduction, impl):
    """weight, label_smoothing, z_loss, ignore_index and sample_weight, with classes last and two batch dimensions."""
    x, target = inputs(loss, 12)
    sample_weight = randn(12, seed=5).abs()

    def formula(x):
        rows, divisor = literal(loss, x, target, sample_weight, ignore_index=3)
        if reduction == "none":
            return rows
        return rows.sum() / {"sum": 1, "mean": divisor, "normalizer": 7.5}[reduction]

    module = loss.module(
        **loss.arguments,
        weight=WEIGHT,
        label_smoothing=SMOOTHING,
        z_loss=Z_LOSS,
        ignore_index=3,
        reduction="mean" if reduction == "normalizer" else reduction,
        class_dim=-1,
        impl=impl,
    )
    call = dict(sample_weight=sample_weight.view(3, 4), normalizer=7.5 if reduction == "normalizer" else None)
    got = value_and_gradient(lambda x: module(x.view(3, 4, C), target.view(3, 4), **call).flatten().squeeze(), x)
    assert_same(got, value_and_gradient(formula, x), 1e-11)


MAPS = {
    "prior": (dict(prior=ik.Prior(COUNTS, tau=0.7)), lambda x, t: x + 0.7 * PRIOR.log()),
    "prior tensor": (dict(prior=PRIOR), lambda x, t: x + PRIOR.log()),
    "scale": (dict(scale=0.3), lambda x, t: 0.3 * x),
    "negative scale": (dict(scale=-0.7), lambda x, t: -0.7 * x),
    "softcap": (dict(softcap=2.0), lambda x, t: 2 * (x / 2).tanh()),
    "margin": (dict(margin=0.4), lambda x, t: x - 0.4 * t),
    "margin per class": (dict(margin=MARGINS), lambda x, t: x - MARGINS.double() * t),
    "all": (
        dict(prior=ik.Prior(COUNTS), scale=1.7, softcap=3.0, margin=MARGINS),
        lambda x, t: 1.7 * (3 * (x / 3).tanh() - MARGINS.double() * t) + PRIOR.log(),
    ),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("keyword", MAPS)
@each(WITHOUT_OWN_MAP)
def test_logit_map_keywords(loss, keyword, impl):
    keywords, logits = MAPS[keyword]
    x, target = inputs(loss)
    onehot = one_hot(target)
    want = value_and_gradient(lambda x: loss.rows(logits(x, onehot), onehot), x)
    module = loss.module(**loss.arguments, **keywords, reduction="none", impl=impl)
    assert_same(value_and_gradient(module, x, target), want, 1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_focal_loss_with_an_angle_and_a_prior(impl):
    """Objectives, margins and priors combine freely."""
    x, target = 0.95 * torch.tanh(randn(13, C)), classes((13,), C)
    onehot = one_hot(target)

    def formula(x):
        z = 8 * on_target(x, onehot, torch.cos(x.arccos() + 0.3)) + PRIOR.log()
        return -((1 - p(z, onehot)) ** 1.5) * log_p(z, onehot)

    module = ik.FocalLoss(1.5, margin=ik.AngularMargin(m2=0.3), scale=8.0, prior=PRIOR, reduction="none", impl=impl)
    assert_same(value_and_gradient(module, x, target), value_and_gradient(formula, x), 1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ((5, C), (2, 5, C), (2, 3, 2, C), (C,)), ids=str)
def test_class_dim_last(shape, reduction, impl):
    x, target = randn(*shape), classes(shape[:-1], C)
    loss = ik.FocalLoss(reduction=reduction, class_dim=-1, impl=impl)
    got = value_and_gradient(loss, x, target)
    assert got[0].shape == (target.shape if reduction == "none" else ())
    flat = value_and_gradient(
        lambda x: F.focal_loss(x, target.flatten(), reduction=reduction, impl=impl).reshape(got[0].shape), x.view(-1, C)
    )
    assert_same(got, (flat[0], flat[1].view(shape)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("probabilities", (False, True))
def test_sample_weight_repeats_rows(probabilities, impl):
    """A weight of 3 is the row three times over, a weight of 0 no row, for every reduction."""
    x, counts = randn(4, C), torch.tensor([3, 0, 1, 2])
    target = randn(4, C, seed=4).softmax(1) if probabilities else classes((4,), C)
    for reduction in ("sum", "mean"):
        loss = ik.CrossEntropyLoss(WEIGHT, reduction=reduction, label_smoothing=0.1, z_loss=0.1, impl=impl)
        want = value_and_gradient(
            lambda x, loss=loss: loss(x.repeat_interleave(counts, 0), target.repeat_interleave(counts, 0)), x
        )
        assert_same(value_and_gradient(loss, x, target, sample_weight=counts.double()), want)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16))
@pytest.mark.parametrize(
    "normalizer", (4, 4.0, torch.tensor(4.0), torch.tensor([4]), torch.tensor(4.0, dtype=torch.float16)), ids=repr
)
def test_normalizer_replaces_the_divisor(normalizer, dtype, impl):
    x, target = randn(5, C, dtype=dtype), classes((5,), C)
    rows = F.focal_loss(x, target, weight=WEIGHT, reduction="none", impl=impl)
    for reduction in ("sum", "mean"):
        loss = ik.FocalLoss(weight=WEIGHT, reduction=reduction, impl=impl)
        total, d_total = value_and_gradient(ik.FocalLoss(weight=WEIGHT, reduction="sum", impl=impl), x, target)
        value, gradient = value_and_gradient(loss, x, target, normalizer=normalizer)
        assert_same((value,), (rows.sum() / 4,), 1e-6)
        assert torch.equal(gradient.double(), d_total.double() / 4)  # a power of two divides exactly
        with torch.no_grad():
            assert_same((loss(x, target, normalizer=normalizer),), (total / 4,), 1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("normalizer", (0, 0.0, torch.tensor(0.0)), ids=repr)
def test_a_normalizer_of_zero_gives_zero(normalizer, dtype, impl):
    """A detector's batch without a positive."""
    x, target = randn(5, C, dtype=dtype), classes((5,), C)
    for loss in (ik.FocalLoss(impl=impl), ik.SoftTruncationLoss(reduction="sum", impl=impl)):
        value, gradient = value_and_gradient(loss, x, target, normalizer=normalizer)
        assert value == 0 and not gradient.any()


# ---------------------------------------------------------------- priors and counts in low precision


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_a_prior_of_1e_7_is_exact(dtype, impl):
    """tau log prior is -32.24; 1e-7 is not even a float16, and an epsilon of 1e-8 inside the logarithm gives -32.05."""
    prior = torch.tensor([1e-7, 0.3, 0.7 - 1e-7], dtype=torch.float64)
    x, target = randn(6, 3, dtype=dtype), torch.tensor([0, 0, 0, 1, 2, 1])
    module = ik.LogitAdjustedLoss(prior=prior, tau=2.0, reduction="none", impl=impl).to(dtype)
    want = value_and_gradient(torch.nn.CrossEntropyLoss(reduction="none"), x.double() + 2 * prior.log(), target)
    got = value_and_gradient(module, x, target)
    assert_same(got[:1], want[:1], 1e-12 if dtype == torch.float64 else 1e-6)
    assert_same(got[1:], want[1:], 2 * torch.finfo(dtype).eps)
    assert float(got[0][0]) > 30


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_counts_above_the_largest_float16(dtype, impl):
    counts = torch.tensor([5_000_000_000, 70_000, 1])  # 65504 is the largest float16, 2^31 the largest int32
    x, target = randn(6, 3, dtype=dtype), torch.tensor([0, 0, 2, 1, 2, 1])
    want = torch.nn.functional.cross_entropy(x.double() + counts.double().log(), target)
    factor = (counts.double() / 5e9) ** 0.3
    want_vs = torch.nn.functional.cross_entropy(factor * x.double() + counts.double().log(), target)
    for given in (counts, counts.tolist(), counts.numpy(), counts.double()):
        assert_same((ik.BalancedSoftmaxLoss(given, impl=impl).to(dtype)(x, target),), (want,), 1e-6)
        assert_same((ik.VSLoss(given, impl=impl).to(dtype)(x, target),), (want_vs,), 1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("module", (ik.LogitAdjustedLoss, ik.VSLoss))
@pytest.mark.parametrize(("policy", "counted"), (("laplace", [9, 1, 3, 1]), ("floor", [8, 1, 2, 1])))
def test_zero_counts(policy, counted, module, dtype, impl):
    x, target = randn(6, 4, dtype=dtype), torch.tensor([0, 1, 2, 3, 1, 0])
    got = value_and_gradient(module([8, 0, 2, 0], zero_count=policy, impl=impl), x, target)
    assert_identical(got, value_and_gradient(module(counted, impl=impl), x, target))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("tau", (0.0, 1.0))
def test_an_excluded_class_takes_no_part(tau, dtype, impl):
    """Not even in label smoothing, nor with tau 0; as a target its loss is infinite."""
    x, target = randn(6, 3, dtype=dtype), torch.tensor([0, 1, 1, 0, 1, 0])
    x[:, 2] = 50  # would dominate
    options = dict(tau=tau, reduction="none", impl=impl)
    got = value_and_gradient(ik.LogitAdjustedLoss([8, 2, 0], zero_count="exclude", **options), x, target)
    want = value_and_gradient(ik.LogitAdjustedLoss([8, 2], **options), x[:, :2], target)
    assert_same(got, (want[0], torch.nn.functional.pad(want[1], (0, 1))), 1e-6)
    assert bool((got[1][:, 2] == 0).all())
    loss = ik.LogitAdjustedLoss([8, 2, 0], zero_count="exclude", label_smoothing=0.1, **options)
    value, gradient = value_and_gradient(loss, x, target)
    assert bool(torch.isfinite(value).all()) and bool((gradient[:, 2] == 0).all())
    assert math.isinf(loss(x, torch.full((6,), 2))[0])


# ---------------------------------------------------------------- state


def test_weight_is_a_buffer_that_can_be_reassigned():
    """Deferred re-weighting: unweighted first, weighted after an epoch."""
    x, target = randn(6, C), classes((6,), C)
    loss = ik.LDAMLoss(COUNTS)
    unweighted = loss(x, target)
    for weight in (WEIGHT, None, torch.ones(C), 2 * WEIGHT):
        loss.weight = weight
        assert torch.equal(loss(x, target), ik.LDAMLoss(COUNTS, weight=weight)(x, target))
        assert list(loss.state_dict()) == ([] if weight is None else ["weight"])
    loss.weight = None
    assert torch.equal(loss(x, target), unweighted)


STATEFUL = {
    "prior": lambda: ik.LogitAdjustedLoss(prior=torch.tensor([1e-7, 0.3, 0.7 - 1e-7]), tau=2.0),
    "factor and prior": lambda: ik.VSLoss([70000, 5, 1]),
    "margin": lambda: ik.LDAMLoss([70000, 5, 1]),
    "class parameter": lambda: ik.FocalLoss(torch.tensor([0.1, 1 / 3, 2.7])),
    "everything": lambda: ik.SoftmaxLoss(
        ik.objectives.PolyFocal(torch.tensor([0.1, 1 / 3, 2.7])),
        prior=ik.Prior([70000, 5, 1]),
        margin=torch.tensor([0.1, 1 / 3, 0.7]),
        factor=torch.tensor([0.1, 1 / 3, 0.7]),
    ),
}
CONVERSIONS = {
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "within a parent": lambda m: torch.nn.Sequential(m).half()[0],
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy of half": lambda m: copy.deepcopy(m.half()),
    "pickle from meta": lambda m: pickle.loads(pickle.dumps(m.to("meta"))).to_empty(device="cpu"),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("state", STATEFUL)
def test_class_vectors_survive_conversions_in_full_precision(state, conversion):
    original, module = STATEFUL[state](), CONVERSIONS[conversion](STATEFUL[state]())
    buffers = dict(module.named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())
    for name, buffer in original.named_buffers():
        assert torch.equal(buffers[name], buffer)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, target = randn(7, 3, dtype=dtype), classes((7,), 3)
        assert_identical(value_and_gradient(module, x, target), value_and_gradient(original, x, target))


@pytest.mark.parametrize(
    "make", (lambda: ik.LogitAdjustedLoss([7, 5, 1]), lambda: ik.VSLoss([7, 5, 1]), lambda: ik.LDAMLoss([7, 5, 1]))
)
def test_made_on_meta_and_materialised(make):
    with torch.device("meta"):
        module = make()
    buffers = list(module.buffers())
    assert buffers and all(buffer.is_meta for buffer in buffers)
    x, target = randn(7, 3, dtype=torch.float32), classes((7,), 3)
    assert torch.equal(module.to_empty(device="cpu")(x, target), make()(x, target))


@each(LOSSES)
def test_state_dict_is_the_weight_alone_and_torchs(loss):
    assert dict(loss.module(**loss.arguments).state_dict()) == {}
    module = loss.module(**loss.arguments, weight=WEIGHT)
    theirs = torch.nn.CrossEntropyLoss(weight=torch.zeros(C))
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(theirs.weight, WEIGHT)
    module.load_state_dict(torch.nn.CrossEntropyLoss(weight=torch.ones(C)).state_dict())
    assert torch.equal(module.weight, torch.ones(C))


def test_the_callers_class_vectors_are_not_shared():
    gamma, margin, counts = torch.full((3,), 2.0), torch.full((3,), 0.5), torch.tensor([5.0, 3, 1])
    loss = ik.FocalLoss(gamma, margin=margin, prior=ik.Prior(counts))
    for dtype in (torch.float32, torch.float64):
        x, target = randn(7, 3, dtype=dtype), classes((7,), 3)
        before = loss(x, target)
        gamma.zero_(), margin.zero_(), counts.fill_(1)
        assert torch.equal(loss(x, target), before)
        gamma.fill_(2), margin.fill_(0.5), counts.copy_(torch.tensor([5.0, 3, 1]))


def test_extra_repr_names_what_is_set():
    shown = repr(ik.FocalLoss(1.5, prior=PRIOR, label_smoothing=0.1, scale=2.0, reduction="sum"))
    for part in ("FocalLoss", "focal", "prior", "label_smoothing=0.1", "scale=2.0", "reduction=sum"):
        assert part in shown


# ---------------------------------------------------------------- errors name the argument

X, T = randn(4, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
NAN = float("nan")


def grad(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, requires_grad=True)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # types
    "objective's name": (lambda: ik.SoftmaxLoss("focal"), TypeError, "objective is 'focal', but it must be one of"),
    "objective's class": (lambda: F.softmax_loss(X, T, ik.objectives.Focal), TypeError, "objective is <class.*one of"),
    "no ignore_index": (lambda: ik.FocalLoss(ignore_index=None), TypeError, "ignore_index is None.*must be an int"),
    "no ignore_index of sigmoids": (lambda: ik.SigmoidFocalLoss(ignore_index=None), TypeError, "ignore_index is None"),
    # shapes
    "target shape": (lambda: F.cross_entropy(X, T[:3]), ValueError, r"target has shape \(3,\).*\(4,\)"),
    "no dimensions": (lambda: F.cross_entropy(X[0, 0], T), ValueError, "input has no dimensions"),
    "one-hot integers": (lambda: F.cross_entropy(X, X.long()), ValueError, "target has shape.*probabilities"),
    "probabilities' shape": (lambda: F.cross_entropy(X, X[:2]), ValueError, "target holds class probabilities.*shape"),
    "classes last": (
        lambda: F.cross_entropy(torch.zeros(2, 7, 3), torch.zeros(2, 7, dtype=torch.int64)),
        ValueError,
        r"target has shape \(2, 7\).*class_dim=-1",
    ),
    "class_dim": (lambda: F.cross_entropy(X, T, class_dim=2), ValueError, "class_dim is 2"),
    "weight shape": (lambda: F.cross_entropy(X, T, torch.ones(4)), ValueError, r"weight has shape \(4,\).*3 classes"),
    "prior shape": (lambda: F.cross_entropy(X, T, prior=torch.full((4,), 0.25)), ValueError, r"prior has shape \(4,\)"),
    "counts' shape": (lambda: ik.LogitAdjustedLoss([1, 2])(X, T), ValueError, r"prior has shape \(2,\)"),
    "counts' dimensions": (lambda: ik.LogitAdjustedLoss([[1, 2]]), ValueError, r"class_counts has shape \(1, 2\)"),
    "no counts": (lambda: ik.BalancedSoftmaxLoss([]), ValueError, r"class_counts has shape \(0,\)"),
    "factor shape": (lambda: F.softmax_loss(X, T, factor=torch.ones(2)), ValueError, r"factor has shape \(2,\)"),
    "margin shape": (lambda: F.cross_entropy(X, T, margin=torch.ones(2)), ValueError, r"margin has shape \(2,\)"),
    "gamma shape": (lambda: F.focal_loss(X, T, torch.ones(2)), ValueError, r"gamma has shape \(2,\)"),
    "bias shape": (lambda: F.target_and_rest(X, T, bias=torch.ones(2)), ValueError, r"bias has shape \(2,\)"),
    "sample_weight shape": (
        lambda: F.cross_entropy(X, T, sample_weight=torch.ones(3)),
        ValueError,
        r"sample_weight has shape \(3,\).*\(4,\)",
    ),
    "normalizer shape": (
        lambda: F.cross_entropy(X, T, normalizer=torch.ones(2)),
        ValueError,
        r"normalizer has shape \(2,\)",
    ),
    # dtypes and types
    "input dtype": (lambda: F.cross_entropy(X.long(), T), TypeError, "input has dtype torch.int64"),
    "complex input": (lambda: F.cross_entropy(X.to(torch.complex64), T), TypeError, "input has dtype torch.complex64"),
    "target dtype": (lambda: F.cross_entropy(X, T.to(torch.int16)), TypeError, "target has dtype torch.int16"),
    "weight dtype": (lambda: F.cross_entropy(X, T, torch.ones(3).long()), TypeError, "weight has dtype torch.int64"),
    "bias dtype": (lambda: F.target_and_rest(X, T, bias=torch.ones(3).long()), TypeError, "bias has dtype torch.int64"),
    "weight list": (lambda: ik.CrossEntropyLoss([1.0, 2.0, 3.0]), TypeError, "weight"),
    "prior list": (lambda: F.cross_entropy(X, T, prior=[0.2, 0.3, 0.5]), TypeError, "prior is a list"),
    "prior list, logit adjusted": (lambda: ik.LogitAdjustedLoss(prior=[0.2, 0.3, 0.5]), TypeError, "prior is a list"),
    "probabilities to target_and_rest": (
        lambda: F.target_and_rest(X, X),
        ValueError,
        "target holds class probabilities",
    ),
    # devices
    "target device": (lambda: F.cross_entropy(X, T.to("meta")), ValueError, "target is on meta.*input is on cpu"),
    "sample_weight device": (
        lambda: F.cross_entropy(X, T, sample_weight=torch.ones(4, device="meta")),
        ValueError,
        "sample_weight is on meta",
    ),
    # numbers
    "gamma negative": (lambda: ik.FocalLoss(-0.5), ValueError, "gamma is -0.5"),
    "gamma NaN": (lambda: ik.FocalLoss(NAN), ValueError, "gamma is nan"),
    "gamma infinite": (lambda: F.focal_loss(X, T, math.inf), ValueError, "gamma is inf"),
    "gamma negative for a class": (lambda: ik.FocalLoss(torch.tensor([1.0, -1, 2])), ValueError, "gamma is"),
    "gamma NaN for a class": (lambda: ik.FocalLoss(torch.tensor([1.0, NAN, 2])), ValueError, "gamma is"),
    "gamma text": (lambda: ik.FocalLoss("2"), ValueError, "gamma is '2'"),
    "gamma of VS": (lambda: ik.VSLoss([1, 2, 3], gamma=-0.1), ValueError, "gamma is -0.1"),
    "threshold": (lambda: ik.HardTruncationLoss(0.0), ValueError, "threshold is 0.0"),
    "threshold above 1": (lambda: ik.HardTruncationLoss(1.1), ValueError, "threshold is 1.1"),
    "sharpness": (lambda: ik.SoftTruncationLoss(0.0), ValueError, "sharpness is 0.0"),
    "form": (lambda: ik.SoftTruncationLoss(form="softmax"), ValueError, "form is 'softmax'"),
    "form, function": (lambda: F.soft_truncation_loss(X, T, form="softmax"), ValueError, "form is 'softmax'"),
    "epsilon": (lambda: ik.PolyLoss(-1.5), ValueError, "epsilon is -1.5"),
    "epsilon NaN": (lambda: ik.PolyLoss(NAN), ValueError, "epsilon is nan"),
    "q": (lambda: ik.GeneralizedCrossEntropyLoss(0.0), ValueError, "q is 0.0"),
    "q above 1": (lambda: ik.GeneralizedCrossEntropyLoss(1.5), ValueError, "q is 1.5"),
    "max_margin": (lambda: ik.LDAMLoss([1, 2, 3], max_margin=0.0), ValueError, "max_margin is 0.0"),
    "margin NaN": (lambda: ik.CosFaceLoss(NAN), ValueError, "margin is nan"),
    "margin of Circle": (lambda: ik.CircleLoss(NAN), ValueError, "margin is nan"),
    "scale": (lambda: F.cross_entropy(X, T, scale=math.inf), ValueError, "scale is inf"),
    "softcap": (lambda: F.cross_entropy(X, T, softcap=0.0), ValueError, "softcap is 0.0"),
    "softcap NaN": (lambda: F.cross_entropy(X, T, softcap=NAN), ValueError, "softcap is nan"),
    "softcap of Circle": (lambda: F.circle_loss(X.tanh(), T, softcap=5.0), ValueError, "softcap"),
    "z_loss": (lambda: F.cross_entropy(X, T, z_loss=-1e-4), ValueError, "z_loss is -0.0001"),
    "label_smoothing negative": (
        lambda: F.cross_entropy(X, T, label_smoothing=-0.1),
        ValueError,
        "label_smoothing is -0.1",
    ),
    "label_smoothing above 1": (
        lambda: F.cross_entropy(X, T, label_smoothing=1.1),
        ValueError,
        "label_smoothing is 1.1",
    ),
    "label_smoothing NaN": (lambda: F.cross_entropy(X, T, label_smoothing=NAN), ValueError, "label_smoothing is nan"),
    "tau": (lambda: ik.LogitAdjustedLoss([1, 2, 3], tau=NAN), ValueError, "tau is nan"),
    "reduction": (lambda: F.cross_entropy(X, T, reduction="avg"), ValueError, "reduction is 'avg'.*none.*sum.*mean"),
    "reduction None": (lambda: ik.CrossEntropyLoss(reduction=None)(X, T), ValueError, "reduction is None"),
    "normalizer with none": (
        lambda: F.cross_entropy(X, T, reduction="none", normalizer=2.0),
        ValueError,
        "normalizer is given with reduction='none'",
    ),
    # counts and priors
    "counts and prior": (
        lambda: ik.LogitAdjustedLoss([1, 2, 3], prior=PRIOR),
        ValueError,
        "class_counts and prior: both",
    ),
    "neither": (lambda: ik.LogitAdjustedLoss(), ValueError, "class_counts and prior: neither"),
    "prior twice": (lambda: ik.BalancedSoftmaxLoss([1, 2, 3], prior=PRIOR), TypeError, "prior"),
    "margin twice": (lambda: ik.LDAMLoss([1, 2, 3], margin=0.1), TypeError, "margin"),
    "tau with a Prior": (lambda: ik.LogitAdjustedLoss(prior=ik.Prior([1, 2]), tau=2.0), ValueError, "tau is given"),
    "zero_count with a prior": (
        lambda: ik.LogitAdjustedLoss(prior=PRIOR, zero_count="floor"),
        ValueError,
        "zero_count",
    ),
    "zero count": (
        lambda: ik.LogitAdjustedLoss([1, 0, 3]),
        ValueError,
        "class_counts.*zero_count='laplace'.*floor.*exclude",
    ),
    "zero count, balanced": (lambda: ik.BalancedSoftmaxLoss([1, 0, 3]), ValueError, "class_counts.*zero_count"),
    "zero count, LDAM": (lambda: ik.LDAMLoss([1, 0, 3]), ValueError, "class_counts has a zero"),
    "zero_count unknown": (
        lambda: ik.LogitAdjustedLoss([1, 0, 3], zero_count="one"),
        ValueError,
        "zero_count is 'one'",
    ),
    "negative count": (
        lambda: ik.BalancedSoftmaxLoss([1, -1, 3]),
        ValueError,
        "class_counts must be finite and at least 0",
    ),
    "NaN count": (lambda: ik.VSLoss([1, NAN, 3]), ValueError, "class_counts must be finite"),
    "only zeros": (lambda: ik.LogitAdjustedLoss([0, 0], zero_count="laplace"), ValueError, "class_counts is zero"),
    "counts as prior": (
        lambda: ik.CrossEntropyLoss(prior=torch.tensor([9.0, 1, 5])),
        ValueError,
        "probabilities sum to 15",
    ),
    "zero prior": (
        lambda: ik.CrossEntropyLoss(prior=torch.tensor([0.5, 0, 0.5])),
        ValueError,
        "probabilities must be above 0",
    ),
    # class vectors are constants
    "weight grad": (lambda: F.cross_entropy(X, T, grad(1, 1, 1)), ValueError, "weight requires grad"),
    "prior grad": (lambda: F.cross_entropy(X, T, prior=grad(0.2, 0.3, 0.5)), ValueError, "prior requires grad"),
    "prior grad, logit adjusted": (
        lambda: ik.LogitAdjustedLoss(prior=grad(0.2, 0.8)),
        ValueError,
        "prior requires grad",
    ),
    "counts grad": (lambda: ik.LogitAdjustedLoss(grad(2, 3, 5)), ValueError, "class_counts requires grad"),
    "counts grad, LDAM": (lambda: ik.LDAMLoss(grad(2, 3, 5)), ValueError, "class_counts requires grad"),
    "probabilities grad": (
        lambda: ik.Prior.from_probabilities(grad(0.2, 0.8)),
        ValueError,
        "probabilities requires? grad",
    ),
    "factor grad": (lambda: F.softmax_loss(X, T, factor=grad(1, 1, 1)), ValueError, "factor requires grad"),
    "margin grad": (lambda: F.cross_entropy(X, T, margin=grad(1, 1, 1)), ValueError, "margin requires grad"),
    "margin grad, module": (lambda: ik.CosFaceLoss(grad(1, 1, 1))(X.tanh(), T), ValueError, "margin requires grad"),
    "gamma grad": (lambda: F.focal_loss(X, T, grad(1, 1, 1)), ValueError, "gamma requires grad"),
    "gamma grad, module": (lambda: ik.FocalLoss(grad(1, 1, 1))(X, T), ValueError, "gamma requires grad"),
    "bias grad": (lambda: F.target_and_rest(X, T, bias=grad(1, 1, 1)), ValueError, "bias requires grad"),
    "target grad": (lambda: F.cross_entropy(X, X.softmax(1).requires_grad_()), ValueError, "target requires grad"),
    "sample_weight grad": (
        lambda: F.cross_entropy(X, T, sample_weight=grad(1, 1, 1, 1)),
        ValueError,
        "sample_weight requires",
    ),
    "normalizer grad": (lambda: F.cross_entropy(X, T, normalizer=grad(1)), ValueError, "normalizer requires grad"),
    # class probabilities
    "probabilities to focal": (
        lambda: F.focal_loss(X, X.softmax(1)),
        ValueError,
        "target holds class probabilities.*focal",
    ),
    "probabilities, two temperatures": (
        lambda: ik.SoftTruncationLoss()(X, X.softmax(1)),
        ValueError,
        "target holds class probabilities.*soft_truncation",
    ),
    "probabilities and a margin": (
        lambda: F.cross_entropy(X, X.softmax(1), margin=0.1),
        ValueError,
        "margin needs class",
    ),
    "probabilities and ignore_index": (
        lambda: F.cross_entropy(X, X.softmax(1), ignore_index=1),
        ValueError,
        "ignore_index",
    ),
    # cosines, angles
    "degrees": (lambda: ik.ArcFaceLoss(28.6), ValueError, "28.6.*radians"),
    "degrees, function": (lambda: F.arcface_loss(X.tanh(), T, 28.6), ValueError, "28.6.*radians"),
    "negative angle": (lambda: ik.AngularMargin(m2=-0.1), ValueError, "m2 is -0.1.*radians"),
    "m1": (lambda: ik.AngularMargin(m1=0.5), ValueError, "m1 is 0.5"),
    "m3": (lambda: ik.AngularMargin(m3=NAN), ValueError, "m3 is nan"),
    "embeddings to ArcFace": (lambda: ik.ArcFaceLoss()(9 * X, T), ValueError, "input.*cosines.*normalise"),
    "embeddings to CosFace": (lambda: ik.CosFaceLoss()(9 * X, T), ValueError, "input.*cosines.*normalise"),
    "embeddings to Circle": (lambda: F.circle_loss(9 * X, T), ValueError, "input.*cosines.*normalise"),
    "embeddings to an angle": (lambda: ik.FocalLoss(margin=ik.AngularMargin(m2=0.5))(9 * X, T), ValueError, "cosines"),
    # keywords
    "alpha": (lambda: ik.FocalLoss(alpha=0.25), TypeError, "alpha.*SigmoidFocalLoss.*weight="),
    "alpha, function": (lambda: F.focal_loss(X, T, alpha=0.25), TypeError, "alpha.*SigmoidFocalLoss.*weight="),
    "unknown, forward": (lambda: ik.CrossEntropyLoss()(X, T, weights=X), TypeError, "weights"),
    # implementations
    "impl unknown": (
        lambda: F.cross_entropy(X, T, impl="gpu"),
        ValueError,
        "impl is 'gpu'.*reference.*cpu.*cuda.*triton",
    ),
    "impl cuda on another device": (
        lambda: F.cross_entropy(X.to("meta"), T.to("meta"), impl="cuda"),
        (RuntimeError, ValueError),  # where it was not compiled, and where it was
        "impl='cuda'.*use impl='triton'",
    ),
    "impl cpu on another device": (
        lambda: F.cross_entropy(X.to("meta"), T.to("meta"), impl="cpu"),
        ValueError,
        "impl='cpu' got logits on meta",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_argument(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


@each(LOSSES)
def test_an_unknown_keyword_raises(loss):
    """Under the name that was called, and with the one that was meant."""
    x, target = inputs(loss)
    for called, call in ((loss.module, loss.module), (loss.function, partial(loss.function, x, target))):
        for wrong, right in (("label_smooting", "label_smoothing"), ("temperature", ".*, scale, .*")):
            message = f"{called.__name__} has no keyword {wrong}: use {right}$"
            if called in (ik.SoftmaxLoss, F.softmax_loss):  # Python's own error
                message = rf"{called.__name__}.*\(\) got an unexpected keyword argument '{wrong}'"
            with pytest.raises(TypeError, match=f"^{message}"):
                call(**loss.arguments, **{wrong: 0.1})


@each({name: loss for name, loss in LOSSES.items() if loss.module is not ik.SoftmaxLoss})
def test_what_belongs_to_the_call_is_not_taken_before(loss):
    message = f"^{loss.module.__name__} takes sample_weight when it is called"
    with pytest.raises(TypeError, match=message):
        loss.module(**loss.arguments, sample_weight=torch.ones(13))


# What a loss sets itself, and an argument of its own that its error names.
SETS = {
    "CrossEntropyLoss": ("objective", "label_smoothing"),
    "BalancedSoftmaxLoss": ("prior", "class_counts"),
    "FocalLoss": ("objective", "gamma"),
    "HardTruncationLoss": ("objective", "threshold"),
    "SoftTruncationLoss": ("objective", "sharpness"),
    "PolyLoss": ("objective", "epsilon"),
    "GeneralizedCrossEntropyLoss": ("objective", "q"),
    "SmoothAccuracyLoss": ("objective", ""),
    "LDAMLoss": ("margin", "max_margin"),
    "CosFaceLoss": ("cosines", "margin"),
    "VSLoss": ("factor", "gamma"),
}


@each({name: loss for name, loss in LOSSES.items() if loss.module.__name__ in SETS})
def test_what_a_loss_sets_itself_cannot_be_given(loss):
    x, target = inputs(loss)
    name, own = SETS[loss.module.__name__]
    for called, call in ((loss.module, loss.module), (loss.function, partial(loss.function, x, target))):
        with pytest.raises(TypeError, match=rf"^{called.__name__} sets {name} itself.*{own}"):
            call(**loss.arguments, **{name: 0.1})


def test_an_error_names_the_subclass_that_was_called():
    class Mine(ik.LDAMLoss):
        pass

    with pytest.raises(
        TypeError, match="^Mine sets margin itself; its own arguments are class_counts, max_margin, scale$"
    ):
        Mine([1, 2, 3], margin=0.1)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("target", (-1, 3, -101, 2**31, -(2**40)))
def test_a_target_outside_raises_as_in_torch(target, impl):
    for reduction in REDUCTIONS:
        for loss in (
            ik.CrossEntropyLoss(torch.ones(3), reduction=reduction, impl=impl),
            ik.SoftTruncationLoss(impl=impl),
        ):
            with pytest.raises(IndexError, match=f"target {target} is out of bounds"):
                loss(X, torch.tensor([0, 1, target, 2]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_cosines_may_leave_their_range_by_a_rounding_and_where_ignored(impl):
    x = torch.tensor([[1.004, 0.1], [9.0, 0.2], [0.3, -1.0]], dtype=torch.bfloat16)
    for loss in (ik.ArcFaceLoss(impl=impl), ik.CosFaceLoss(impl=impl), ik.CircleLoss(impl=impl)):
        value, gradient = value_and_gradient(loss, x, torch.tensor([0, -100, 1]))
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all()) and not gradient[1].any()


def test_without_the_extension_cpu_says_how_to_build_it_and_none_means_the_reference(monkeypatch):
    want = F.focal_loss(X, T, impl="reference")
    monkeypatch.setattr(implementation, "_C", None)
    with pytest.raises(RuntimeError, match="impl='cpu'.*--no-build-isolation.*IMBALANCE_KERNELS_BUILD"):
        F.focal_loss(X, T, impl="cpu")
    assert torch.equal(F.focal_loss(X, T), want)
