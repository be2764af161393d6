"""The behaviour contract on CPU (DESIGN.md, section 6): in place, upstream, memory, compile, layouts, equal bits."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from implementations import EMULATED, IMPLEMENTATIONS, KERNELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import imbalance_kernels as ik
from imbalance_kernels import functional as F
from imbalance_kernels.logit_map import LogitMap
from imbalance_kernels.ops.kernel_arguments import objective_arguments, split_arguments
from imbalance_kernels.options import SoftmaxOptions

REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
C = 37  # several vectors and a tail, for every dtype
PRIOR = torch.arange(1.0, C + 1) / torch.arange(1.0, C + 1).sum()

# One loss for each way through the package: one trip; float16 and "none" split the row; two temperatures read it twice.
LOSSES = {
    "cross_entropy": ik.CrossEntropyLoss,
    "focal, everything": partial(
        ik.FocalLoss, 1.5, weight=PRIOR * C, prior=PRIOR, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, scale=1.3
    ),
    "two temperatures": ik.SoftTruncationLoss,
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(*shape: int, num_classes: int = C, seed: int = 1) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a leaf and logits made from it by an operation that saves neither."""
    leaf = x.detach().clone().requires_grad_()
    return leaf, leaf * 1


def gradient(loss: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the logits' gradient for a random upstream gradient, the same for losses of one shape."""
    leaf, logits = logits_of(x)
    value = loss(logits, *args, **kwargs)
    value.backward(randn(*value.shape, seed=9, dtype=value.dtype))
    return leaf.grad


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error relative to the largest entry wanted."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("impl", KERNELS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# ---------------------------------------------------------------- the caller's logits


@each_impl
@each_reduction
@each_dtype
@each_loss
def test_logits_are_not_changed(loss, dtype, reduction, impl):
    x, target = randn(9, C, dtype=dtype), classes(9)
    leaf, logits = logits_of(x)
    version = logits._version
    loss(reduction=reduction, impl=impl)(logits, target).sum().backward()
    assert torch.equal(logits, x) and torch.equal(leaf, x) and logits._version == version
    sequence, layout = x.view(3, 3, C).movedim(-1, 1), dict(class_dim=1)
    for shaped in (sequence, sequence.contiguous(), x.t().contiguous().t().view(3, 3, C).movedim(-1, 1)):
        before = shaped.clone()
        loss(reduction=reduction, impl=impl, **layout)(shaped.requires_grad_(), target.view(3, 3)).sum().backward()
        assert torch.equal(shaped, before)


@each_kernel
@each_reduction
@each_dtype
@pytest.mark.parametrize("loss", (ik.CrossEntropyLoss, LOSSES["focal, everything"]))
def test_in_place_gives_the_same_gradient_in_the_logits_storage(loss, dtype, reduction, impl):
    x, target = randn(9, C, dtype=dtype), torch.where(torch.arange(9) == 4, -100, classes(9))
    want = gradient(loss(reduction=reduction, impl=impl), x, target)
    leaf, logits = logits_of(x)
    storages = []
    logits.register_hook(lambda d_logits: storages.append(d_logits.untyped_storage().data_ptr()))
    value = loss(reduction=reduction, inplace=True, impl=impl)(logits, target)
    value.backward(randn(*value.shape, seed=9, dtype=value.dtype))
    assert torch.equal(leaf.grad, want)
    assert storages == [logits.untyped_storage().data_ptr()] and torch.equal(logits, want)
    assert torch.equal(leaf, x)


@each_kernel
@each_reduction
@each_dtype
def test_in_place_bumps_the_version(dtype, reduction, impl):
    _, logits = logits_of(randn(9, C, dtype=dtype))
    version = logits._version
    ik.CrossEntropyLoss(reduction=reduction, inplace=True, impl=impl)(logits, classes(9)).sum().backward()
    assert logits._version > version


@each_reduction
@each_dtype
@pytest.mark.parametrize("producer", (torch.tanh, torch.sigmoid, torch.exp, partial(torch.softmax, dim=1)))
def test_in_place_after_a_producer_that_saved_the_logits_raises(producer, dtype, reduction):
    x, target = randn(9, C, dtype=dtype), classes(9)
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        value = ik.CrossEntropyLoss(reduction=reduction, inplace=inplace)(producer(leaf), target).sum()
        if not inplace:
            value.backward()
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        assert leaf.grad is None


@each_reduction
@pytest.mark.parametrize(
    "view", (lambda x: x.view(3, 3, C), lambda x: x.t().t(), lambda x: x[:]), ids=("view", "t", "slice")
)
def test_in_place_through_a_view_of_saved_logits_raises(view, reduction):
    """The producer saved the base, the loss overwrites a view of it."""
    logits = randn(9, C).requires_grad_().tanh()
    loss = ik.CrossEntropyLoss(reduction=reduction, inplace=True, class_dim=-1)
    rows = view(logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss(rows, classes(*rows.shape[:-1])).sum().backward()


@each_impl
@each_reduction
def test_in_place_on_a_leaf_raises(reduction, impl):
    leaf = randn(9, C).requires_grad_()
    for inplace_loss in (F.cross_entropy, F.focal_loss):
        with pytest.raises(ValueError, match="inplace=True.*input, a leaf that requires grad"):
            inplace_loss(leaf, classes(9), reduction=reduction, inplace=True, impl=impl)
    assert torch.equal(leaf, randn(9, C)) and leaf._version == 0


@each_reduction
@pytest.mark.parametrize(
    "view",
    (lambda x: x[:, :5], lambda x: x.view(9, C), lambda x: x[::2], lambda x: x.view(3, 3, C)),
    ids=("columns", "view", "rows", "sequence"),
)
def test_in_place_on_a_view_of_a_leaf_raises(view, reduction):
    """As in torch: a parameter would be overwritten by its gradient."""
    leaf = randn(9, C).requires_grad_()
    rows = view(leaf)
    with pytest.raises((ValueError, RuntimeError), match="leaf"):
        F.cross_entropy(
            rows, classes(*rows.shape[:-1], num_classes=5), reduction=reduction, inplace=True, class_dim=-1
        ).sum().backward()
    assert torch.equal(leaf, randn(9, C))


@each_reduction
def test_in_place_without_a_gradient_leaves_the_logits_alone(reduction):
    leaf, constant = randn(9, C).requires_grad_(), randn(9, C)
    loss = ik.CrossEntropyLoss(reduction=reduction, inplace=True)
    with torch.no_grad():
        loss(leaf, classes(9)), loss(leaf[:, 3:], classes(9, num_classes=5))
    with torch.inference_mode():
        loss(leaf, classes(9))
    loss(constant, classes(9))
    for x in (leaf, constant):
        assert torch.equal(x, randn(9, C)) and x._version == 0


@each_reduction
def test_in_place_needs_rows_without_a_copy(reduction):
    """A copy would take the gradient in the logits' stead, silently."""
    loss = partial(F.cross_entropy, reduction=reduction, inplace=True)
    image, wide = (logits_of(randn(*shape))[1] for shape in ((2, C, 5, 4), (9, 2 * C)))
    for logits in (image[..., 1:], wide[:, ::2]):
        with pytest.raises(ValueError, match="inplace=True needs an input that can be seen as"):
            loss(logits, classes(logits.shape[0], *logits.shape[2:]))


@each_reduction
def test_in_place_on_rows_that_share_memory_raises(reduction):
    """As in torch: an expanded row would take the gradient of every row that it stands for."""
    _, logits = logits_of(randn(1, C))
    with pytest.raises((ValueError, RuntimeError), match="memory|expand|copy|overlap"):
        F.cross_entropy(logits.expand(9, C), classes(9), reduction=reduction, inplace=True).sum().backward()


@each_kernel
@each_reduction
def test_in_place_on_strided_rows_writes_the_rows_alone(reduction, impl):
    wide = randn(9, C + 6)
    want = gradient(ik.CrossEntropyLoss(reduction=reduction, impl=impl), wide[::2, 3 : 3 + C], classes(5))
    leaf, logits = logits_of(wide)
    value = ik.CrossEntropyLoss(reduction=reduction, inplace=True, impl=impl)(logits[::2, 3 : 3 + C], classes(5))
    value.backward(randn(*value.shape, seed=9))
    changed = wide.clone()
    changed[::2, 3 : 3 + C] = want
    assert torch.equal(logits, changed)
    assert torch.equal(leaf.grad[::2, 3 : 3 + C], want) and float(leaf.grad.norm()) == pytest.approx(float(want.norm()))


def test_in_place_with_two_temperatures_raises():
    _, logits = logits_of(randn(9, C))
    with pytest.raises(ValueError, match="inplace=True.*form='log_odds'"):
        F.soft_truncation_loss(logits, classes(9), inplace=True)
    with pytest.raises(ValueError, match="inplace=True.*form='log_odds'"):
        ik.SoftTruncationLoss(inplace=True)


@each_reduction
@pytest.mark.parametrize("requires_grad", (True, False), ids=("leaf", "non-leaf"))
def test_compiled_slice_of_a_padded_vocabulary_is_left_alone(requires_grad, reduction):
    """A view that reshape does not copy: its memory is the caller's, compiled as eager."""
    base = randn(2, 3, C + 3)
    target = classes(2, 3)

    def step(x):
        rows = x if requires_grad else x * 1.0
        loss = F.cross_entropy(rows[..., :C], target, class_dim=-1, reduction=reduction).sum()
        return loss, rows

    leaf = base.clone().requires_grad_()
    with compiled(step, "aot_eager") as (run, _):
        loss, rows = run(leaf)
        loss.backward()
    assert torch.equal(leaf.detach(), base) and torch.equal(rows.detach(), base)


@pytest.mark.parametrize("name", ("weight", "factor"))
def test_a_class_vector_changed_before_backward_raises(name):
    """With "none" the kernel runs again in backward: it must see the same constants."""
    vector = torch.ones(C)
    _, logits = logits_of(randn(9, C))
    loss = F.softmax_loss(logits, classes(9), reduction="none", impl="cpu", **{name: vector}).sum()
    vector.mul_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_impl
def test_normalizer_of_zero_gives_zero_whatever_the_rows_hold(impl):
    leaf = torch.tensor([[-math.inf, 0.0]], requires_grad=True)
    loss = F.cross_entropy(leaf, torch.tensor([0]), normalizer=0.0, impl=impl)
    loss.backward()
    assert loss == 0 and torch.equal(leaf.grad, torch.zeros(1, 2))


@each_impl
def test_truncation_near_certainty_keeps_its_threshold(impl):
    """1 - threshold cancels in float32: the limit is taken in double."""
    d = torch.linspace(12, 16, 401)
    logits = torch.stack([d, torch.zeros_like(d)], dim=1)
    kept = F.hard_truncation_loss(logits, torch.zeros(401, dtype=torch.long), 1 - 1e-6, reduction="none", impl=impl) > 0
    assert torch.equal(kept, d < math.log((1 - 1e-6) / 1e-6))


@each_impl
@each_reduction
@each_dtype
@pytest.mark.parametrize("bad", (C, -1, 10**12))
def test_a_bad_target_raises_before_anything_is_written(bad, dtype, reduction, impl):
    x, target = randn(9, C, dtype=dtype), classes(9)
    target[8] = bad  # the last row
    _, logits = logits_of(x)
    with pytest.raises(IndexError, match=f"target {bad} is out of bounds"):
        ik.CrossEntropyLoss(torch.ones(C), reduction=reduction, inplace=True, impl=impl)(
            logits, target
        ).sum().backward()
    assert torch.equal(logits, x)


@each_reduction
@each_dtype
def test_two_heads_share_the_logits(dtype, reduction):
    x, targets = randn(9, C, dtype=dtype), (classes(9), classes(9, seed=2))
    losses = (ik.CrossEntropyLoss(reduction=reduction), ik.FocalLoss(reduction=reduction))
    want = sum(gradient(loss, x, target).double() for loss, target in zip(losses, targets, strict=True))
    leaf, logits = logits_of(x)
    values = [loss(logits, target) for loss, target in zip(losses, targets, strict=True)]
    upstream = randn(*values[0].shape, seed=9, dtype=values[0].dtype)
    torch.autograd.backward(values, [upstream, upstream])
    assert relative_error(leaf.grad, want) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(logits, x)


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_the_last_of_two_heads_may_be_in_place(reduction):
    x, target = randn(9, C), classes(9)
    want = gradient(ik.FocalLoss(reduction=reduction), x, target) + gradient(
        ik.PolyLoss(reduction=reduction), x, target
    )
    leaf, logits = logits_of(x)
    first = ik.FocalLoss(reduction=reduction)(logits, target)
    second = ik.PolyLoss(reduction=reduction, inplace=True)(logits, target)
    torch.autograd.backward([first, second], [randn(seed=9), randn(seed=9)])
    assert relative_error(leaf.grad, want) < 1e-6


@pytest.mark.parametrize(("dtype", "reduction"), ((torch.float32, "none"), (torch.float16, "mean")))
def test_two_heads_that_need_the_logits_in_backward_cannot_both_be_in_place(dtype, reduction):
    _, logits = logits_of(randn(9, C, dtype=dtype))
    loss = ik.CrossEntropyLoss(reduction=reduction, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss(logits, classes(9)) + loss(logits, classes(9, seed=2))).sum().backward()


def test_an_earlier_reader_that_saved_the_logits_raises():
    _, logits = logits_of(randn(9, C))
    penalty = logits.square().mean()
    value = ik.CrossEntropyLoss(inplace=True)(logits, classes(9))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (value + penalty).backward()


# ---------------------------------------------------------------- upstream gradients


@pytest.mark.parametrize("inplace", (False, True))
@each_impl
@each_reduction
@each_dtype
@pytest.mark.parametrize("loss", (ik.CrossEntropyLoss, LOSSES["focal, everything"]))
def test_a_retained_graph_gives_2_and_then_3(loss, dtype, reduction, impl, inplace):
    x, target = randn(9, C, dtype=dtype), classes(9)
    make = partial(loss, reduction=reduction, impl=impl)
    one = torch.autograd.grad(make()(leaf := x.clone().requires_grad_(), target).sum(), leaf)[0]
    leaf, logits = logits_of(x)
    value = make(inplace=inplace)(logits, target)
    for upstream, retain in ((2.0, True), (3.0, True), (0.5, True), (3.0, False)):
        (got,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream), retain_graph=retain)
        assert relative_error(got, upstream * one.double()) <= 4 * torch.finfo(dtype).eps, upstream


@each_dtype
@each_reduction
def test_the_first_of_two_gradients_is_not_changed_by_the_second(reduction, dtype):
    leaf, logits = logits_of(randn(9, C, dtype=dtype))
    value = ik.CrossEntropyLoss(reduction=reduction)(logits, classes(9)).sum()
    (first,) = torch.autograd.grad(value, leaf, torch.tensor(2.0, dtype=value.dtype), retain_graph=True)
    kept = first.clone()
    torch.autograd.grad(value, leaf, torch.tensor(3.0, dtype=value.dtype))
    assert torch.equal(first, kept)


@each_impl
@pytest.mark.parametrize("reduction", ("sum", "mean"))
@each_dtype
@pytest.mark.parametrize("upstream", (1.0, 1 / 8, 1 / 3, -2.7, 65536.0, 0.0))
def test_upstream_gradients_are_rounded_as_promised(upstream, dtype, reduction, impl):
    """Once to the logits' dtype; bfloat16 twice unless the upstream gradient is a power of two."""
    x, target = randn(64, C, dtype=dtype), classes(64)
    leaf = x.double().clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, target, reduction=reduction).backward()
    want = upstream * leaf.grad
    leaf, logits = logits_of(x)
    value = ik.CrossEntropyLoss(reduction=reduction, impl=impl)(logits, target)
    value.backward(torch.tensor(upstream, dtype=value.dtype))
    finfo = torch.finfo(dtype)
    want = want.where(want.abs() < finfo.max, want.sign() * math.inf)
    twice = dtype == torch.bfloat16 and upstream in (1 / 3, -2.7)
    roundings = {torch.float32: 40, torch.float64: 40}.get(dtype, 1.02 if twice else 0.51)
    error = (leaf.grad.double() - want).abs().nan_to_num(0.0)  # infinite both
    assert bool((error <= roundings * finfo.eps * want.abs() + finfo.smallest_normal * finfo.eps).all())


@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_float16_gradients_do_not_underflow_before_the_scalers_factor(reduction):
    """1/N times a probability of 1e-3 is below float16's smallest number: only scaled it can be held."""
    num_rows = 8192
    x, target = randn(num_rows, C, dtype=torch.float16), classes(num_rows)
    exact = x.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, target).backward()
    assert float((exact.grad.half() == 0).float().mean()) < 1 and float(exact.grad.abs().min()) < 2.0**-25
    leaf, logits = logits_of(x)
    value = ik.CrossEntropyLoss(reduction=reduction)(logits, target)
    (65536 * (value.sum() / num_rows if reduction == "none" else value)).backward()
    assert not bool((leaf.grad == 0).any())
    error = (leaf.grad.double() / 65536 / exact.grad - 1).abs()
    assert float(error.max()) < 0.51 * 2**-10


def test_a_gradient_scaler():
    h, weight, target = randn(512, 16), 0.3 * randn(C, 16, seed=1), classes(512)
    exact = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(h.double() @ exact.t(), target).backward()
    weight = weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with torch.autocast("cpu", dtype=torch.float16):
        value = ik.CrossEntropyLoss()(torch.nn.functional.linear(h, weight), target)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    assert relative_error(weight.grad, exact.grad) < 2e-3
    before = weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before - weight.grad)


@each_impl
@each_dtype
def test_gradient_accumulation(dtype, impl):
    """Micro-batches with the batch's own normalizer add up to its mean; .grad is not shared with a graph."""
    x, target = randn(12, C, dtype=dtype), torch.where(torch.arange(12) % 5 == 4, -100, classes(12))
    leaf = x.double().clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, target).backward()
    loss, count = ik.CrossEntropyLoss(impl=impl), (target != -100).sum()
    shared = torch.zeros(C, dtype=dtype, requires_grad=True)
    rows = []
    for part in range(3):
        leaf_part = x[4 * part : 4 * part + 4].clone().requires_grad_()
        loss(leaf_part + shared, target[4 * part : 4 * part + 4], normalizer=count).backward()
        rows.append(leaf_part.grad)
    assert relative_error(torch.cat(rows), leaf.grad) <= torch.finfo(dtype).eps
    assert relative_error(shared.grad, leaf.grad.sum(0)) <= 8 * torch.finfo(dtype).eps

    twice = x.clone().requires_grad_()
    for _ in range(2):
        loss(twice, target).backward()
    assert relative_error(twice.grad, 2 * leaf.grad) <= 2 * torch.finfo(dtype).eps


def test_a_loss_used_twice_in_a_graph():
    x, target = randn(9, C), classes(9)
    leaf, logits = logits_of(x)
    value = ik.CrossEntropyLoss()(logits, target)
    (2 * value + value.square()).backward()
    want, want_logits = logits_of(x.double())
    value = torch.nn.functional.cross_entropy(want_logits, target)
    (2 * value + value.square()).backward()
    assert relative_error(leaf.grad, want.grad) < 1e-6


@pytest.mark.parametrize(
    ("loss", "impl"),
    [(loss, "cpu") for loss in LOSSES.values()]
    + [
        (LOSSES["cross_entropy"], "reference"),
        (LOSSES["focal, everything"], "reference"),
    ],  # two temperatures are right
)
@each_reduction
@each_dtype
def test_double_backward_raises(loss, dtype, reduction, impl):
    """A gradient penalty must not take the gradient for a constant, of named inputs neither."""
    leaf = randn(9, C, dtype=dtype).requires_grad_()
    for x in (leaf, leaf.mul(1)):
        value = loss(reduction=reduction, impl=impl)(x, classes(9)).sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        penalty = value + first.float().square().sum()
        for named in (x, leaf):
            with pytest.raises(RuntimeError, match="differentiate|double backward|twice"):
                torch.autograd.grad(penalty, named, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiate|double backward|twice"):
            penalty.backward()


@pytest.mark.parametrize("function", (F.target_log_odds, F.target_log_probs))
def test_double_backward_of_the_split_raises(function):
    x = randn(9, C).requires_grad_()
    value = function(x, classes(9)).sum()
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate|double backward|twice"):
        (value + first.square().sum()).backward()


# ---------------------------------------------------------------- without a gradient; memory


@contextmanager
def recorded_operations() -> Iterator[list[tuple[str, int]]]:
    """Record the operations that torch dispatches, each with the number of elements that it makes."""
    seen: list[tuple[str, int]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
            outputs = result if isinstance(result, tuple | list) else (result,)
            made = [x for x in outputs if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
            seen.append((str(function), max((x.numel() for x in made), default=0)))
            return result

    with Record():
        yield seen


@each_reduction
@each_dtype
@each_loss
@pytest.mark.parametrize("how", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_without_a_gradient_nothing_of_the_logits_size_is_made(how, loss, dtype, reduction):
    x, target = randn(9, C, dtype=dtype), classes(9)
    with recorded_operations() as operations, how():
        value = loss(reduction=reduction)(x if how is torch.enable_grad else x.requires_grad_(), target)
    assert not value.requires_grad
    assert any("imbalance_kernels" in name for name, _ in operations)
    assert max(size for _, size in operations) <= C < x.numel()
    with_gradient = loss(reduction=reduction)(x.requires_grad_(), target)
    torch.testing.assert_close(value, with_gradient.detach(), rtol=1e-6, atol=0)


@each_dtype
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("inplace", (False, True))
def test_forward_and_backward_make_one_gradient(reduction, dtype, inplace):
    _, logits = logits_of(randn(9, C, dtype=dtype))
    target = classes(9)
    with recorded_operations() as operations:
        ik.FocalLoss(reduction=reduction, prior=PRIOR, inplace=inplace)(logits, target).sum().backward()
    made = [name for name, size in operations if size == logits.numel()]
    assert made.pop() == "aten.mul.Tensor", "the backward of what made the logits"
    assert len(made) == (0 if inplace else 1), made


MEMORY = """
import imbalance_kernels as ik, torch

def high_water(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines["VmHWM"].split()[0])

def extra(num_rows, dtype, upstream=None, requires_grad=True, **options):
    x = torch.linspace(-3, 3, 32768).repeat(num_rows, 1).to(dtype)
    target = torch.arange(num_rows)
    leaf = torch.zeros((), requires_grad=True)
    logits = Logits.apply(leaf, x) if requires_grad else x
    before = high_water(reset=True)
    loss = ik.FocalLoss(prior=torch.ones(32768) / 32768, **options)(logits, target)
    if requires_grad:
        loss.backward(None if upstream is None else torch.full_like(loss, upstream))
    return (high_water() - before) / (x.numel() * x.element_size())

class Logits(torch.autograd.Function):  # makes logits of existing memory, and keeps nothing
    @staticmethod
    def forward(ctx, leaf, x):
        ctx.mark_dirty(x)
        return x
    @staticmethod
    def backward(ctx, d_logits):
        return d_logits[0, 0].float(), None

CASES
for options in cases:
    extra(4, **options)  # the code itself is loaded page by page
    print(extra(1024, **options))
"""
MEMORY_CASES = [
    (dict(dtype=dtype, inplace=inplace, reduction=reduction, upstream=upstream), 0.0 if inplace else 1.0)
    for inplace in (False, True)
    for dtype, reduction, upstream in (
        ("float32", "mean", None),
        ("float32", "mean", 1 / 3),
        ("float32", "none", 1 / 3),
        ("bfloat16", "mean", None),
        ("float16", "mean", None),
    )
] + [
    (dict(dtype=dtype, requires_grad=False, reduction=reduction), 0.0)
    for dtype, reduction in (("float32", "mean"), ("float32", "none"), ("float16", "sum"))
]


def test_peak_memory_is_one_gradient_and_in_place_none():
    """Of logits of 128 MiB (float32), by Linux' high-water mark; 3 % are for vectors of N, C and threads' rows."""
    cases = "cases = " + repr([options for options, _ in MEMORY_CASES])
    for dtype in ("float32", "bfloat16", "float16"):
        cases = cases.replace(f"'dtype': '{dtype}'", f"'dtype': torch.{dtype}")
    script = MEMORY.replace("CASES", cases)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for (options, want), line in zip(MEMORY_CASES, run.stdout.split(), strict=True):
        assert want - 0.03 < float(line) < want + 0.03, options


# ---------------------------------------------------------------- autocast and compile


@each_reduction
def test_autocast(reduction):
    """The logits of a linear layer in bfloat16, a float32 loss, float32 gradients."""
    h, target = randn(9, 16), classes(9)
    loss = ik.FocalLoss(prior=PRIOR, label_smoothing=0.1, reduction=reduction)
    head = torch.nn.Linear(16, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(h)
        value = loss(logits, target)
    assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
    upstream = randn(*value.shape, seed=9)
    value.backward(upstream)
    assert head.weight.grad.dtype == torch.float32
    leaf = logits.detach().clone().requires_grad_()
    outside = loss(leaf, target)
    outside.backward(upstream)
    assert torch.equal(value, outside)
    want = leaf.grad.double().t() @ h.bfloat16().double()
    assert relative_error(head.weight.grad, want) < 1e-2
    assert torch.equal(logits.detach(), leaf.detach())


@contextmanager
def compiled(function: Callable[..., Any], backend: str, **options: Any) -> Iterator[tuple[Callable[..., Any], Any]]:
    """Compile without graph breaks; yield the function and a counter of its compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    yield torch.compile(function, fullgraph=True, backend=counter, **options), counter
    torch._dynamo.reset()


def step_of(
    loss: Callable[..., Tensor], dtype: torch.dtype = torch.float32
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a training step's forward: a head, then its loss."""
    return lambda h, weight, target: loss((h @ weight.t()).to(dtype), target)


def head_gradient(step: Callable[..., Tensor], num_rows: int, dynamic: bool = False) -> tuple[Tensor, Tensor]:
    h, weight, target = randn(num_rows, 8), randn(C, 8, seed=2).div(4).requires_grad_(), classes(num_rows)
    if dynamic:
        torch._dynamo.mark_dynamic(h, 0), torch._dynamo.mark_dynamic(target, 0)
    value = step(h, weight, target)
    value.backward(randn(*value.shape, seed=9, dtype=value.dtype))
    return value.detach(), weight.grad


def assert_as_eager(
    run: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    num_rows: int,
    dynamic: bool = False,
    tolerance: float = 1e-5,
) -> None:
    for got, want in zip(head_gradient(run, num_rows, dynamic), head_gradient(eager, num_rows), strict=True):
        assert got.shape == want.shape and relative_error(got, want) < tolerance


COMPILED = {
    "cross_entropy": (LOSSES["cross_entropy"], torch.float32),
    "focal, everything": (LOSSES["focal, everything"], torch.float32),
    "two temperatures": (LOSSES["two temperatures"], torch.float32),
    "none": (partial(LOSSES["focal, everything"], reduction="none"), torch.float32),
    "float16": (LOSSES["cross_entropy"], torch.float16),
    "bfloat16": (LOSSES["cross_entropy"], torch.bfloat16),
    "in place": (partial(ik.CrossEntropyLoss, inplace=True), torch.float32),
    "in place, none": (partial(ik.CrossEntropyLoss, inplace=True, reduction="none"), torch.float32),
    "reference": (partial(LOSSES["focal, everything"], impl="reference"), torch.float32),
    "triton": (partial(LOSSES["focal, everything"], impl="triton"), torch.float32),
    "triton, none": (partial(LOSSES["focal, everything"], impl="triton", reduction="none"), torch.float32),
    "triton, in place": (partial(ik.CrossEntropyLoss, impl="triton", inplace=True), torch.bfloat16),
    "triton, two temperatures": (partial(LOSSES["two temperatures"], impl="triton"), torch.float32),
}
if EMULATED:  # what compiles for Triton does so for CUDA
    COMPILED = {
        name.replace("triton", "cuda"): (partial(make, impl="cuda"), dtype)
        for name, (make, dtype) in COMPILED.items()
        if "triton" in name
    }


# Inductor keeps float32 between the operations of a half, where eager rounds.
COMPILED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("case", COMPILED)
def test_compile_static(case):
    make, dtype = COMPILED[case]
    eager = step_of(make(), dtype)
    with compiled(eager, "aot_eager", dynamic=False) as (run, counter):
        for _ in range(2):
            assert_as_eager(run, eager, 9, tolerance=COMPILED_TOLERANCE[dtype])
        assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("case", COMPILED)
def test_compile_dynamic_rows_once(case, backend):
    """Rows marked dynamic: one graph serves every N."""
    make, dtype = COMPILED[case]
    eager = step_of(make(), dtype)
    with compiled(eager, backend) as (run, counter):
        for num_rows in (9, 4, 33, 64, 5):
            assert_as_eager(run, eager, num_rows, dynamic=True, tolerance=COMPILED_TOLERANCE[dtype])
        assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile_discovers_dynamic_rows(backend):
    """Left to itself dynamo compiles for the first N, then for any: two graphs, and no more."""
    eager = step_of(ik.FocalLoss(prior=PRIOR))
    with compiled(eager, backend) as (run, counter):
        for num_rows in range(3, 12):
            assert_as_eager(run, eager, num_rows)
        assert counter.frame_count == 2


@pytest.mark.parametrize(
    "loss",
    (ik.CrossEntropyLoss(), ik.FocalLoss(1.5), F.focal_loss, ik.SoftTruncationLoss()),
    ids=lambda loss: getattr(loss, "__name__", repr(loss)),
)
def test_compile_with_everything_dynamic(loss):
    """dynamic=True makes symbols of a module's numbers too (dynamo may start anew for them, within the first call)."""
    eager, counts = step_of(loss), []
    with compiled(eager, "aot_eager", dynamic=True) as (run, counter):
        for num_rows in (9, 4, 33):
            assert_as_eager(run, eager, num_rows)
            counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


COSINES = {"arcface", "cosface", "circle"}
EVERY = {
    "logit_adjusted": ik.LogitAdjustedLoss(prior=PRIOR),
    "balanced_softmax": ik.BalancedSoftmaxLoss(torch.arange(1, C + 1)),
    "focal per class": ik.FocalLoss(PRIOR * C),
    "hard_truncation": ik.HardTruncationLoss(),
    "soft_truncation log_odds": ik.SoftTruncationLoss(form="log_odds"),
    "soft_truncation one_minus_softmax": ik.SoftTruncationLoss(form="one_minus_softmax"),
    "poly": ik.PolyLoss(),
    "gce": ik.GeneralizedCrossEntropyLoss(),
    "smooth_accuracy": ik.SmoothAccuracyLoss(),
    "ldam": ik.LDAMLoss(torch.arange(1, C + 1), scale=2.0),
    "cosface": ik.CosFaceLoss(scale=4.0),
    "arcface": ik.ArcFaceLoss(scale=4.0),
    "circle": ik.CircleLoss(scale=4.0),
    "vs": ik.VSLoss(torch.arange(1, C + 1)),
    "function: cross_entropy": F.cross_entropy,
    "function: focal": partial(F.focal_loss, gamma=1.5, label_smoothing=0.1, weight=PRIOR * C),
    "function: a Prior": partial(F.logit_adjusted_loss, prior=ik.Prior(torch.arange(1, C + 1))),
    "function: probabilities": partial(F.cross_entropy, prior=PRIOR),
    "function: soft_truncation": F.soft_truncation_loss,
    "function: target_log_probs": lambda x, target: -F.target_log_probs(x, target).mean(),
    "function: target_and_rest": lambda x, target: F.target_and_rest(x, target, bias=PRIOR, scale=2.0).log_odds.mean(),
    "sample_weight and normalizer": lambda x, target: F.cross_entropy(
        x, target, sample_weight=target.float(), normalizer=target.sum()
    ),
    "class probabilities": lambda x, target: F.cross_entropy(x, x.detach().softmax(1), label_smoothing=0.1),
    "images": lambda x, target: F.cross_entropy(x.t()[None], target[None]),
}


@pytest.mark.parametrize("case", EVERY)
def test_every_loss_compiles(case):
    loss = (lambda x, target: EVERY[case](x.tanh(), target)) if case in COSINES else EVERY[case]
    eager = step_of(loss)
    with compiled(eager, "aot_eager") as (run, counter):
        assert_as_eager(run, eager, 9, dynamic=True)
        assert_as_eager(run, eager, 12, dynamic=True)
        assert counter.frame_count == 1


def test_compile_sees_reassigned_options():
    """Deferred re-weighting and an annealed smoothing."""
    loss = ik.CrossEntropyLoss(PRIOR * C)
    eager = step_of(loss)
    with compiled(eager, "aot_eager") as (run, _):
        assert_as_eager(run, eager, 9)
        loss.weight = torch.linspace(0.5, 2, C)
        assert_as_eager(run, eager, 9)
        for smoothing in (0.1, 0.2, 0.3):
            loss.label_smoothing = smoothing
            assert_as_eager(run, eager, 9)


@pytest.mark.parametrize(
    ("backend", "reduction", "inplace"),
    [("aot_eager", reduction, inplace) for reduction in REDUCTIONS for inplace in (False, True)]
    + [("inductor", "mean", False), ("inductor", "mean", True), ("inductor", "none", False)],
)
def test_compile_and_a_retained_graph(backend, reduction, inplace):
    """With donated buffers, the default, torch itself refuses a second backward."""
    h, weight, target = randn(9, 8), randn(C, 8, seed=2).requires_grad_(), classes(9)
    eager = step_of(ik.FocalLoss(reduction=reduction, inplace=inplace))
    (one,) = torch.autograd.grad(step_of(ik.FocalLoss(reduction=reduction))(h, weight, target).sum(), weight)
    not_donated = torch._functorch.config.patch(donated_buffer=False)
    no_cache = torch._inductor.config.patch(force_disable_caches=True)  # which would not see that patch
    with not_donated, no_cache, compiled(eager, backend) as (run, _):
        value = run(h, weight, target)
        for upstream, retain in ((2.0, True), (3.0, True), (0.5, False)):
            (got,) = torch.autograd.grad(value, weight, torch.full_like(value, upstream), retain_graph=retain)
            assert relative_error(got, upstream * one) < 1e-5, upstream


def test_compile_without_a_gradient():
    loss = ik.FocalLoss(prior=PRIOR)
    x, target = randn(9, C), classes(9)
    with compiled(loss, "aot_eager") as (run, _), torch.no_grad():
        assert torch.equal(run(x, target), loss(x, target))


# ---------------------------------------------------------------- layouts

LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (0, 11))[:, :C],
    "columns at an odd offset": lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1 : 1 + C],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "rows of stride 0": lambda x: x,  # expanded in the test
}


@each_kernel
@each_reduction
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_rows_are_read_where_they_are(layout, dtype, reduction, impl):
    x, target = randn(9, C, dtype=dtype), classes(9)
    strided = LAYOUTS[layout](x)
    if layout == "rows of stride 0":
        x, strided = x[:1].repeat(9, 1), x[:1].expand(9, C)
    assert not strided.is_contiguous() and torch.equal(strided, x)
    loss = ik.FocalLoss(prior=PRIOR, label_smoothing=0.1, reduction=reduction, impl=impl)
    want_leaf, leaf = x.clone().requires_grad_(), strided.detach().requires_grad_()
    with recorded_operations() as operations:
        value = loss(leaf, target)
        value.backward(randn(*value.shape, seed=9, dtype=value.dtype))
    assert sum(size == x.numel() for _, size in operations) == 1, "one gradient, and no copy"
    want = loss(want_leaf, target)
    want.backward(randn(*want.shape, seed=9, dtype=want.dtype))
    assert torch.equal(value, want) and torch.equal(leaf.grad, want_leaf.grad)


@each_impl
@each_reduction
@pytest.mark.parametrize(
    "view",
    (
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch._neg_view(-x),
        lambda x: torch.complex(x, -x).conj().imag,
    ),
    ids=("transposed", "every other column", "negated lazily", "imaginary part of a conjugate"),
)
def test_other_layouts(view, reduction, impl):
    x, target = randn(9, C), classes(9)
    strided = view(x)
    assert torch.equal(strided, x)
    loss = ik.FocalLoss(prior=PRIOR, reduction=reduction, impl=impl)
    leaf = strided.detach().requires_grad_()
    value = loss(leaf, target)
    value.backward(randn(*value.shape, seed=9))
    want = gradient(loss, x, target)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    assert torch.equal(strided, x)


@each_reduction
def test_strided_arguments(reduction):
    """Targets, weights and probabilities that are not contiguous; a sample weight of stride 0; a weight in float64."""
    x, target = randn(9, C), classes(9)
    weight, sample_weight = PRIOR * C, torch.full((9,), 0.7)
    want = gradient(ik.CrossEntropyLoss(weight, reduction=reduction), x, target, sample_weight=sample_weight)
    strided = weight.double().repeat_interleave(2)[::2]
    loss = ik.CrossEntropyLoss(strided, reduction=reduction)
    target_view = torch.stack((target, target), 1)[:, 0]
    got = gradient(loss, x, target_view, sample_weight=torch.tensor(0.7).expand(9))
    assert not strided.is_contiguous() and not target_view.is_contiguous()
    assert torch.equal(got, want)
    probabilities = randn(9, C, seed=3).softmax(1)
    want = gradient(loss, x, probabilities)
    assert torch.equal(gradient(loss, x, probabilities.t().contiguous().t()), want)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_rows_beyond_2_to_the_31_elements(reduction, inplace):
    """Three rows, 2^30 elements apart: offsets need 64 bits; memory that is not touched costs nothing."""
    x, stride = randn(3, C, dtype=torch.bfloat16), 2**30 + 5
    storage = torch.empty(2 * stride + C, dtype=torch.bfloat16).untyped_storage()
    rows = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, C), (stride, 1)).copy_(x)
    want = gradient(ik.CrossEntropyLoss(reduction=reduction), x, classes(3))
    logits = _Logits.apply(torch.zeros((), requires_grad=True), rows)
    seen = []
    logits.register_hook(seen.append)
    value = ik.CrossEntropyLoss(reduction=reduction, inplace=inplace)(logits, classes(3))
    value.backward(randn(*value.shape, seed=9))
    assert torch.equal(seen[0], want)
    assert torch.equal(rows, want if inplace else x)


class _Logits(torch.autograd.Function):
    """Makes logits of existing memory."""

    @staticmethod
    def forward(ctx, leaf, rows):
        ctx.mark_dirty(rows)
        return rows

    @staticmethod
    def backward(ctx, d_logits):
        return d_logits.new_zeros(()), None


class DTensor(torch.Tensor):
    """Stands in for torch.distributed's, which is known by its name."""


@each_impl
def test_dtensor_raises_and_names_what_to_call(impl):
    x, target = randn(9, C), classes(9)
    for loss in (
        partial(F.cross_entropy, impl=impl),
        ik.SoftTruncationLoss(impl=impl),
        partial(F.target_and_rest, impl=impl),
    ):
        for arguments in ((x.as_subclass(DTensor), target), (x, target.as_subclass(DTensor))):
            with pytest.raises(TypeError, match=r"DTensor.*input\.to_local\(\).*input\.full_tensor\(\)"):
                loss(*arguments)


# ---------------------------------------------------------------- the same bits

BITS = {
    2: "two classes",
    10: "less than a vector",
    16: "whole vectors",
    33: "two vectors and a tail",
    100: "the usual data set",
    1000: "rows of several blocks",
    4099: "a prime number of classes",
}
BIT_LOSSES = {
    "cross_entropy": ik.CrossEntropyLoss,
    "focal": partial(ik.FocalLoss, 1.5, label_smoothing=0.1, z_loss=1e-3),
}


def row_bits(loss: Callable[..., Any], reduction: str, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return what belongs to each row (N, ...): its gradient, and for "none" its loss."""
    leaf = x.detach().requires_grad_()
    value = loss(reduction=reduction)(leaf, target)
    value.sum().backward()
    return (leaf.grad, value.detach()) if reduction == "none" else (leaf.grad,)


def assert_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...], rows: slice, what: object) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs[rows]), what


@each_dtype
@pytest.mark.parametrize("reduction", ("none", "sum"))
@pytest.mark.parametrize("loss", BIT_LOSSES.values(), ids=BIT_LOSSES.keys())
@pytest.mark.parametrize("num_classes", BITS)
def test_a_rows_bits_are_its_own(num_classes, loss, reduction, dtype):
    """The same again, alone, in a batch of any size and at any place in it, and at any alignment of its memory."""
    num_rows = 37
    x, target = randn(num_rows, num_classes, dtype=dtype), classes(num_rows, num_classes=num_classes)
    want = row_bits(loss, reduction, x, target)
    assert_bits(row_bits(loss, reduction, x, target), want, slice(None), "again")
    for size in (1, 2, 3, 7, 8, 9, 15, 17, 32):
        assert_bits(row_bits(loss, reduction, x[:size], target[:size]), want, slice(size), size)
    for row in range(0, num_rows, 5):
        rows = slice(row, row + 1)
        assert_bits(row_bits(loss, reduction, x[rows], target[rows]), want, rows, "alone")
    shifted = slice(3, num_rows)
    assert_bits(row_bits(loss, reduction, x[shifted], target[shifted]), want, shifted, "at another place")
    for offset in (1, 2, 3, 5, 8, 13):
        moved = torch.empty(offset + x.numel(), dtype=dtype)[offset:].view_as(x).copy_(x)
        assert_bits(row_bits(loss, reduction, moved, target), want, slice(None), f"offset {offset}")
    wide = torch.nn.functional.pad(x, (1, 2))[:, 1:-2]
    assert_bits(row_bits(loss, reduction, wide, target), want, slice(None), "strided")


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@each_reduction
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("loss", BIT_LOSSES.values(), ids=BIT_LOSSES.keys())
@pytest.mark.parametrize(
    "shape",
    ((100_003, 3), (301, 1031)),
    ids=("so many rows that torch's own operations on rows use threads", "wide rows"),
)
def test_threads_do_not_change_bits(shape, loss, dtype, reduction):
    x, target = randn(*shape, dtype=dtype), classes(shape[0], num_classes=shape[1])
    results = []
    for number in (1, 2, 3):
        with threads(number):
            leaf = x.clone().requires_grad_()
            value = loss(reduction=reduction)(leaf, target)
            value.sum().backward()
            results.append((value.detach(), leaf.grad))
    for value, d_logits in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(d_logits, results[0][1])


# ---------------------------------------------------------------- opcheck and gradcheck

OPS = {
    "cpu": torch.ops.imbalance_kernels,
    "triton": torch.ops.imbalance_kernels_triton,
    "cuda": torch.ops.imbalance_kernels_emulated,
}
OPTIONS = {
    "plain": SoftmaxOptions(),
    "everything": SoftmaxOptions(
        objective=ik.objectives.PolyFocal(PRIOR * C, 0.5),
        logit_map=LogitMap(2.0, PRIOR + 0.5, PRIOR.log(), 10.0, PRIOR),
        weight=PRIOR * C,
        label_smoothing=0.1,
        z_loss=0.01,
        ignore_index=3,
    ),
    "angle": SoftmaxOptions(logit_map=LogitMap(8.0, margin=ik.AngularMargin(m2=0.3))),
}


def split_call(options: SoftmaxOptions, dtype: torch.dtype, target: str, num_rows: int) -> tuple[Any, ...]:
    """Return the arguments of target_and_rest."""
    x = randn(num_rows, C).tanh().to(dtype)
    given = x.float().softmax(1).to(dtype) if target == "probabilities" else classes(num_rows)
    return (x, given, *split_arguments(options.to(torch.device("cpu"), _accumulate(dtype))))


def loss_call(options: SoftmaxOptions, dtype: torch.dtype, target: str, num_rows: int) -> tuple[Any, ...]:
    """Return the arguments of softmax_loss but the last: with_gradient, with_log_probs, with_correct."""
    weights = randn(num_rows, seed=5, dtype=_accumulate(dtype)).abs()
    objective = objective_arguments(options.to(torch.device("cpu"), _accumulate(dtype)).objective)
    rows = (weights, None) if options.z_loss else (None, torch.tensor(3.0, dtype=_accumulate(dtype)))
    reduction = "none" if target == "probabilities" else "mean" if num_rows else "sum"  # the mean of nothing is NaN
    return (*split_call(options, dtype, target, num_rows), *objective, *rows, reduction, options.z_loss)


def upstream_call(options: SoftmaxOptions, dtype: torch.dtype, target: str, num_rows: int) -> tuple[Any, ...]:
    """Return the arguments of softmax_loss_backward."""
    arguments = loss_call(options, dtype, target, num_rows)
    loss, *_ = OPS["cpu"].softmax_loss(*arguments, False, False, False)
    return (*arguments, randn(*loss.shape, seed=6, dtype=loss.dtype))


def backward_call(options: SoftmaxOptions, dtype: torch.dtype, target: str, num_rows: int) -> tuple[Any, ...]:
    """Return the arguments of target_and_rest_backward."""
    arguments = split_call(options, dtype, target, num_rows)
    _, rest, shift, weighted, _ = OPS["cpu"].target_and_rest(*arguments)
    upstream = (randn(num_rows, seed=6, dtype=rest.dtype), randn(num_rows, seed=7, dtype=rest.dtype))
    return (*arguments, rest, shift, *upstream, torch.ones_like(weighted))


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def reports(options: SoftmaxOptions, dtype: torch.dtype, target: str, num_rows: int) -> tuple[bool, bool]:
    """Return with_log_probs and with_correct, which want class indices."""
    return (target == "indices",) * 2


def summed_call(*case: Any) -> tuple[Any, ...]:
    """Return the arguments of softmax_loss_ but the last two: it knows no upstream gradient of "none"."""
    return tuple("sum" if isinstance(value, str) and value == "none" else value for value in loss_call(*case))


OP_CALLS = {
    "softmax_loss": lambda *case: (*loss_call(*case), True, False, False),
    "softmax_loss without gradient": lambda *case: (*loss_call(*case), False, *reports(*case)),
    "softmax_loss with log_probs": lambda *case: (*loss_call(*case), True, reports(*case)[0], False),
    "softmax_loss with correct": lambda *case: (*loss_call(*case), True, False, reports(*case)[1]),
    "softmax_loss_": lambda *case: (*summed_call(*case), False, False),
    "softmax_loss_ with all": lambda *case: (*summed_call(*case), *reports(*case)),
    "softmax_loss_backward": upstream_call,
    "softmax_loss_backward_": upstream_call,
    "target_and_rest": split_call,
    "target_and_rest_backward": backward_call,
    "target_and_rest_backward_": backward_call,
}


@pytest.mark.parametrize("num_rows", (5, 0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("options", "target"), (("plain", "indices"), ("everything", "indices"), ("plain", "probabilities"))
)
@pytest.mark.parametrize("op", OP_CALLS)
@each_kernel
def test_opcheck(impl, op, options, target, dtype, num_rows):
    """Schema (what is mutated), fake kernel, and the operation under aot dispatch with dynamic shapes."""
    operation = getattr(OPS[impl], op.split()[0]).default
    torch.library.opcheck(operation, OP_CALLS[op](OPTIONS[options], dtype, target, num_rows))


@each_kernel
@each_dtype
@pytest.mark.parametrize("factor", (1.0, 1 / 3))
def test_opcheck_scale_(factor, dtype, impl):
    torch.library.opcheck(
        OPS[impl].scale_.default, (randn(5, C, dtype=dtype), torch.tensor(factor, dtype=_accumulate(dtype)))
    )


def test_opcheck_an_angle():
    arguments = loss_call(OPTIONS["angle"], torch.float32, "indices", 5)
    torch.library.opcheck(OPS["cpu"].softmax_loss.default, (*arguments, True, True, True))


def test_every_operation_is_checked():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "imbalance_k" in name and "imbalance_kernels_linear::" not in name  # tests/test_linear.py
    }
    elsewhere = {name for name in registered if name.startswith(("sigmoid_loss", "multilabel_softmax", "column_sums"))}
    assert len(elsewhere) == 10  # test_sigmoid_modules.py, test_multilabel_softmax.py, test_batch_statistics.py
    assert registered == {op.split()[0] for op in OP_CALLS} | {"scale_"} | elsewhere


G = 5  # classes, so that gradcheck's numerical derivative is quick
COUNTS = [50, 9, 5, 2, 1]
PROBABILITIES = randn(4, G, seed=3, dtype=torch.float64).softmax(1)
GRADCHECKED: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "weights, smoothing, z-loss": partial(
        F.cross_entropy, weight=torch.tensor([1, 2, 0.5, 0, 3]), label_smoothing=0.3, z_loss=0.1, ignore_index=2
    ),
    "class probabilities": lambda x, target, **k: F.cross_entropy(x, PROBABILITIES, label_smoothing=0.2, **k),
    "softcap, scale": partial(F.cross_entropy, softcap=1.5, scale=-1.7),
    "logit_adjusted": partial(F.logit_adjusted_loss, class_counts=COUNTS, tau=1.3),
    "balanced_softmax": partial(F.balanced_softmax_loss, class_counts=COUNTS),
    "focal": partial(F.focal_loss, gamma=1.5),
    "focal per class": partial(F.focal_loss, gamma=torch.tensor([0, 0.5, 1, 2, 5.0])),
    "poly_focal": partial(F.softmax_loss, objective=ik.objectives.PolyFocal(1.5, 0.5)),
    "hard_truncation": partial(F.hard_truncation_loss, threshold=0.3),
    "softmax_neg": partial(F.soft_truncation_loss, sharpness=1.5),
    "one_minus_softmax": partial(F.soft_truncation_loss, sharpness=1.5, form="one_minus_softmax", label_smoothing=0.1),
    "log_odds": partial(F.soft_truncation_loss, sharpness=1.5, form="log_odds"),
    "poly": partial(F.poly_loss, epsilon=0.7),
    "gce": F.generalized_cross_entropy,
    "smooth_accuracy": F.smooth_accuracy_loss,
    "ldam": partial(F.ldam_loss, class_counts=COUNTS, scale=3.0),
    "cosface": lambda x, target, **k: F.cosface_loss(x.tanh(), target, scale=4.0, **k),
    "arcface": lambda x, target, **k: F.arcface_loss(x.tanh(), target, scale=4.0, **k),
    "combined margin": lambda x, target, **k: F.cross_entropy(
        x.tanh(), target, margin=ik.AngularMargin(1.3, 0.2, 0.1), scale=4.0, **k
    ),
    "circle": lambda x, target, **k: F.circle_loss(x.tanh(), target, scale=4.0, detach=False, **k),
    "vs": partial(F.vs_loss, class_counts=COUNTS),
}


@each_impl
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("case", GRADCHECKED)
def test_gradcheck(case, reduction, impl):
    x, target = randn(4, G, dtype=torch.float64).requires_grad_(), torch.tensor([0, 2, 4, 1])
    assert torch.autograd.gradcheck(lambda x: GRADCHECKED[case](x, target, reduction=reduction, impl=impl), x)


@each_impl
@pytest.mark.parametrize("part", ("target", "rest", "log_odds", "log_prob", "logsumexp"))
def test_gradcheck_of_the_split(part, impl):
    x, target = randn(4, G, dtype=torch.float64).requires_grad_(), torch.tensor([0, 2, -100, 1])
    bias = torch.linspace(-1, 1, G)

    def function(x):
        split = F.target_and_rest(x, target, scale=1.7, bias=bias, softcap=2.0, impl=impl)
        # target and rest are relative to the shift, which moves with the logits
        return getattr(split, part) + (split.shift if part in ("target", "rest") else 0)

    if part in ("rest", "log_odds", "logsumexp"):  # the ignored row's are infinite, and its gradient zero
        assert torch.autograd.gradcheck(lambda x: function(x)[[0, 1, 3]], x)
    else:
        assert torch.autograd.gradcheck(function, x)
