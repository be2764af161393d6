"""Channels-first logits (N, C, d1, ...): layouts, memory, pixels that are left out, and how they meet autograd.

That every objective and option is right on them stands in the table, tests/test_softmax_loss.py.
"""

import math

import oracle
import pytest
import torch
from implementations import IMPLEMENTATIONS, KERNELS
from oracle import worst_row_error
from test_softmax_loss import GRADIENT_TOLERANCE, OPTIONS, VALUE_TOLERANCE, as_images

import imbalance_kernels as ik
from imbalance_kernels.functional import softmax_loss
from imbalance_kernels.objectives import Focal
from imbalance_kernels.ops.checks import as_rows
from imbalance_kernels.ops.kernel_arguments import loss_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SoftmaxOptions

C = 11
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("impl", KERNELS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
FOCAL = {"objective": Focal(1.5)}

# (a tensor, what of it is the input, the dimension of classes); those above the line are seen as they are.
LAYOUTS = {
    "contiguous": ((3, C, 4, 5), lambda x: x, 1),
    "images of a batch": ((6, C, 4, 5), lambda x: x[::2], 1),
    "channels of more": ((3, C + 4, 4, 5), lambda x: x[:, 2 : 2 + C], 1),
    "every second channel": ((3, 2 * C, 4, 5), lambda x: x[:, ::2], 1),
    "rows of an image": ((3, C, 9, 5), lambda x: x[:, :, 2:6], 1),
    "one dimension": ((3, C, 7), lambda x: x, 1),
    "three dimensions": ((2, C, 2, 3, 4), lambda x: x, 1),
    "no batch": ((C, 4, 5), lambda x: x, 0),
    "classes in the middle": ((2, 3, C, 4, 5), lambda x: x, 2),
    "classes before the batch": ((C, 3, 4, 5), lambda x: x.movedim(0, 1), 1),
    "a transposed matrix": ((C, 7), lambda x: x.t(), 1),
    # ------------------------------------------------
    "columns of an image": ((3, C, 4, 9), lambda x: x[..., 2:7], 1),
    "every second column": ((3, C, 4, 9), lambda x: x[..., ::2], 1),
    "a transposed image": ((3, C, 5, 4), lambda x: x.transpose(2, 3), 1),
    "every second batch of two": ((4, 3, C, 4, 5), lambda x: x[:, :2], 2),
}
COPIED = list(LAYOUTS)[-4:]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make_layout(layout, dtype=torch.float32):
    """(the tensor, the input, the dimension of classes, a target with ignored pixels)."""
    shape, view, class_dim = LAYOUTS[layout]
    whole = (torch.randn(shape) * 3).to(dtype)
    input = view(whole)
    target = torch.randint(C, input.movedim(class_dim, -1).shape[:-1])
    target.view(-1)[::5] = -100
    return whole, input, class_dim, target


def rows_of(x, class_dim):
    return x.movedim(class_dim, -1).reshape(-1, x.shape[class_dim])


@each_reduction
@each_layout
@each_impl
def test_layouts(impl, layout, reduction):
    _, input, class_dim, target = make_layout(layout)
    sample_weight = torch.rand(target.shape)
    upstream = torch.randn(target.shape if reduction == "none" else ())
    options = {"reduction": reduction, "label_smoothing": 0.1}
    exact = {"objective": "focal", "parameters": (1.5,), "sample_weight": sample_weight.reshape(-1), **options}
    of_rows = upstream.reshape(-1) if reduction == "none" else upstream
    value, gradient = oracle.loss_and_gradient(rows_of(input, class_dim), of_rows, target=target.reshape(-1), **exact)
    x = input.detach().requires_grad_()
    assert x.stride() == input.stride()
    loss = softmax_loss(x, target, impl=impl, class_dim=class_dim, sample_weight=sample_weight, **FOCAL, **options)
    assert loss.shape == upstream.shape
    torch.testing.assert_close(loss.detach().double().reshape(value.shape), value, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(loss, x, upstream)
    assert worst_row_error(rows_of(found, class_dim), gradient) < 5e-6


@each_layout
def test_what_is_seen_without_a_copy(layout):
    _, input, class_dim, target = make_layout(layout)
    rows = as_rows(input, target, class_dim, planes=True)
    is_copied = layout in COPIED
    assert rows.owned == is_copied
    assert (rows.logits.data_ptr() == input.data_ptr()) != is_copied
    assert rows.logits.dim() == (2 if is_copied else 3)
    assert rows.logits.stride(-1) == 1
    assert as_rows(input, target, class_dim, planes=False).owned


def test_rows_stay_rows():
    """Memory in torch.channels_last holds rows, and so does a tensor with one pixel."""
    target = torch.randint(C, (3, 4, 5))
    rows = as_rows(torch.randn(3, C, 4, 5).to(memory_format=torch.channels_last), target, 1, planes=True)
    assert rows.logits.shape == (60, C) and not rows.owned
    assert as_rows(torch.randn(3, C, 1, 1), target[:, :1, :1], 1, planes=True).logits.shape == (3, C)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in COPIED])
@each_reduction
@each_kernel
def test_in_place(impl, reduction, layout):
    """The gradient takes the logits' memory and no other: what lies between is untouched."""
    shape, view, class_dim = LAYOUTS[layout]
    whole, input, _, target = make_layout(layout)
    upstream = torch.randn(target.shape if reduction == "none" else ())
    options = {"impl": impl, "class_dim": class_dim, "reduction": reduction, **FOCAL}
    x = input.detach().requires_grad_()
    (right,) = torch.autograd.grad(softmax_loss(x, target, **options), x, upstream)
    leaf = whole.clone().requires_grad_()
    memory = leaf * 1
    loss = softmax_loss(view(memory), target, inplace=True, **options)
    (found,) = torch.autograd.grad(loss, leaf, upstream)
    torch.testing.assert_close(view(found), right, rtol=0, atol=0)
    torch.testing.assert_close(view(memory.detach()), right, rtol=0, atol=0)
    view(memory.detach()).zero_(), view(whole).zero_()
    assert torch.equal(memory, whole)


@pytest.mark.parametrize("layout", COPIED)
@each_kernel
def test_in_place_where_a_copy_is_made_raises(impl, layout):
    _, input, class_dim, target = make_layout(layout)
    with pytest.raises(ValueError, match="inplace=True needs an input that can be seen as"):
        softmax_loss(input, target, impl=impl, class_dim=class_dim, inplace=True)


@each_kernel
def test_in_place_on_pixels_that_share_memory_raises(impl):
    for shape in ((1, C, 4, 5), (3, 1, 4, 5)):
        input = torch.randn(shape).expand(3, C, 4, 5)
        with pytest.raises(ValueError, match="memory of their own"):
            softmax_loss(input, torch.zeros(3, 4, 5, dtype=torch.int64), impl=impl, inplace=True)


@pytest.mark.parametrize("option", ["smoothing", "softcap", "everything"])
@each_reduction
@each_impl
def test_ignored_pixels_may_hold_anything(impl, reduction, option):
    """Also beside others in a vector; the ignored class may be one that exists."""
    options = {**OPTIONS[option](C), "impl": impl, "reduction": reduction, "ignore_index": 4, **FOCAL}
    input, target = torch.randn(2, C, 3, 21), torch.randint(C, (2, 3, 21))
    ignored = target == 4
    upstream = torch.randn(target.shape if reduction == "none" else ())
    results = []
    for held in (0.0, math.nan, math.inf):
        x = torch.where(ignored[:, None], held, input).requires_grad_()
        loss = softmax_loss(x, target, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, x, upstream)))
    value, gradient = results[0]
    assert torch.isfinite(gradient).all() and (gradient.movedim(1, -1)[~ignored] != 0).any()
    assert (gradient.movedim(1, -1)[ignored] == 0).all()
    assert reduction != "none" or (value[ignored] == 0).all()
    for other in results[1:]:
        assert torch.equal(other[0], value) and torch.equal(other[1], gradient)


@pytest.mark.parametrize(
    "option, probabilities",
    [(option, given) for option in ("prior", "weighted smoothing", "softcap") for given in (False, True)]
    + [("everything", False)],  # a margin, which class probabilities do not have, among it
)
@each_kernel
def test_masks(impl, option, probabilities):
    """-inf leaves a class out of a pixel, a pixel without classes is NaN and alone so, a target may be masked."""
    options = {**OPTIONS[option](C), "reduction": "none"}
    rows = torch.randn(46, C, dtype=torch.float64)
    rows[torch.rand(46, C) < 0.2] = -math.inf
    rows[7], rows[11, 3], rows[12, 3] = -math.inf, -math.inf, 0.5
    target = torch.randint(C, (46,))
    target[11:13], target[20] = 3, -100
    if probabilities:  # of unmasked classes
        target = torch.softmax(torch.randn(46, C, dtype=torch.float64), 1) * (rows != -math.inf)
    upstream = torch.randn(46, dtype=torch.float64)
    shape = (2, C, 1, 23)
    results = {}
    for name, to in (("reference", (46, C)), (impl, shape)):
        x = as_images(rows, to).requires_grad_()
        loss = softmax_loss(x, as_images(target, to), impl=name, **options)
        (gradient,) = torch.autograd.grad(loss, x, as_images(upstream, to))
        results[name] = loss.detach().reshape(46), rows_of(gradient, 1)
    for found, right in zip(results[impl], results["reference"], strict=True):
        others = torch.arange(46) != 7
        torch.testing.assert_close(found[others], right[others], rtol=1e-9, atol=1e-11)
    assert torch.isnan(results[impl][0][7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_classes", [3, 19, 1200, 5000])
@each_kernel
def test_a_pixels_bits_are_its_own(impl, num_classes, dtype):
    """They depend neither on its place nor on how many pixels or images there are. Slices stay channels-first."""
    width = 260 if num_classes < 100 else 37
    input = (torch.randn(3, num_classes, 2, width) * 4).to(dtype)
    target = torch.randint(num_classes, (3, 2, width))
    options = {"impl": impl, "reduction": "none", "weight": torch.rand(num_classes), "label_smoothing": 0.1, **FOCAL}

    def run(of):
        x = input[(of[0], slice(None), *of[1:])].detach().requires_grad_()
        loss = softmax_loss(x, target[of], **options)
        return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    losses, gradients = run((slice(None), slice(None), slice(None)))
    for b, h, w, m in ((0, 0, 0, 2), (0, 0, 1, 2), (1, 1, 5, 2), (2, 1, width - 2, 2), (2, 0, 3, 19), (1, 0, 2, 30)):
        of = (slice(b, b + 1), slice(h, h + 1), slice(w, w + m))
        loss, gradient = run(of)
        assert torch.equal(loss, losses[of])
        assert torch.equal(gradient, gradients[(of[0], slice(None), *of[1:])])


@pytest.mark.skipif("cpu" not in KERNELS, reason="of the CPU kernels: a run of the emulated ones has no others")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_do_not_change_bits(reduction):
    input, target = torch.randn(2, 19, 100, 101), torch.randint(19, (2, 100, 101))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            x = input.clone().requires_grad_()
            loss = softmax_loss(x, target, impl="cpu", reduction=reduction, **FOCAL)
            results.append((loss.detach(), *torch.autograd.grad(loss, x, torch.ones_like(loss))))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", [impl for impl in KERNELS if impl == "cpu"])
def test_a_target_that_is_no_class_raises_before_anything_is_written(impl, inplace):
    for wrong in (C, -1):
        input, target = torch.randn(2, C, 3, 5), torch.randint(C, (2, 3, 5))
        target[1, 2, 3] = wrong
        before = input.clone()
        with pytest.raises(IndexError, match=f"target {wrong} is out of bounds"):
            softmax_loss(input.requires_grad_() * 1 if not inplace else input, target, impl=impl, inplace=inplace)
        assert torch.equal(input.detach(), before)


@each_reduction
@each_impl
def test_double_backward_raises(impl, reduction):
    x = torch.randn(2, C, 3, 4, requires_grad=True)
    loss = softmax_loss(x, torch.randint(C, (2, 3, 4)), impl=impl, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels of more", "images of a batch"])
@pytest.mark.parametrize("inplace", [False, True])
@each_kernel
def test_upstream_gradients(impl, inplace, layout):
    """Of a loss whose gradient is made before they are known: scaled in place, or a new one where the graph is kept."""
    _, input, class_dim, target = make_layout(layout)
    options = {"impl": impl, "class_dim": class_dim, **FOCAL}
    x = input.detach().requires_grad_()
    (one,) = torch.autograd.grad(softmax_loss(x, target, **options), x)
    x = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    whole = torch.cat([x, torch.zeros_like(x)], dim=1) if layout == "channels of more" else x * 1
    of_input = whole[:, :C]
    loss = softmax_loss(of_input, target, inplace=inplace, **options)
    for factor in (2.0, 3.0):
        (found,) = torch.autograd.grad(loss, x, torch.tensor(factor), retain_graph=factor == 2.0)
        torch.testing.assert_close(found, factor * one)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", [None, *KERNELS])
def test_compile(impl, reduction):
    """One graph, whatever the number of images and the height."""
    module = ik.FocalLoss(1.5, reduction=reduction, impl=impl)

    def step(h, target):
        return module(h * 2, target)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for images, height in ((2, 3), (4, 5)):
        input, target = torch.randn(images, C, height, 7), torch.randint(C, (images, height, 7))
        results = []
        for run in (step, compiled):
            h = input.clone().requires_grad_()
            loss = run(h, target)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), h)))
        torch.testing.assert_close(results[0], results[1])
    torch._dynamo.reset()


def operation(impl, logits, target, options, normalizer=None):
    """The loss and the gradient of channels-first logits (B, C, P), as the operation has them."""
    arguments = loss_arguments(target, options, None, normalizer)
    return kernels(impl).softmax_loss(logits, *arguments, True, False, False)[:2]


@pytest.mark.parametrize("shape", [(7, C, 1), (2, 1, 9), (0, C, 5), (3, C, 0), (1, 1, 1)], ids=str)
@each_kernel
def test_shapes_of_the_operation(impl, shape):
    """One pixel, one class, no image, no pixel: what is otherwise seen as rows."""
    logits = torch.randn(shape[0], 2 * shape[1], shape[2])[:, ::2]
    num_rows = shape[0] * shape[2]
    target = torch.randint(shape[1], (num_rows,))
    options = SoftmaxOptions(reduction="sum", label_smoothing=0.1)
    value, gradient = oracle.loss_and_gradient(
        rows_of(logits, 1), 1.0, target=target, reduction="sum", label_smoothing=0.1
    )
    loss, found = operation(impl, logits, target, options)
    torch.testing.assert_close(loss.double(), value, rtol=VALUE_TOLERANCE[torch.float32], atol=1e-6)
    assert found.shape == logits.shape and found.is_contiguous()
    assert worst_row_error(rows_of(found, 1), gradient) <= GRADIENT_TOLERANCE[torch.float32]


@each_impl
def test_nothing_valid(impl):
    x = torch.randn(2, C, 3, 4, requires_grad=True)
    target = torch.full((2, 3, 4), -100)
    for normalizer, value in ((None, math.nan), (0.0, 0.0), (2.0, 0.0)):
        loss = softmax_loss(x, target, impl=impl, normalizer=normalizer)
        torch.testing.assert_close(loss.detach(), torch.tensor(value), equal_nan=True)
        (gradient,) = torch.autograd.grad(loss, x)
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    "name, reduction",
    [
        (name, reduction)
        for name in ("softmax_loss", "softmax_loss_", "softmax_loss_backward", "softmax_loss_backward_")
        for reduction in ("mean", "none")
        if (name, reduction) != ("softmax_loss_", "none")  # which needs the upstream gradient
    ],
)
@each_kernel
def test_opcheck(impl, name, reduction):
    """Schema (what is mutated), fake kernel, and the operation under aot dispatch with dynamic shapes."""
    options = SoftmaxOptions(reduction=reduction, **FOCAL)
    arguments = (torch.randn(2, C, 6), *loss_arguments(torch.randint(C, (12,)), options, torch.rand(12), None))
    if name == "softmax_loss":
        arguments = (*arguments, True)
    if "backward" not in name:
        arguments = (*arguments, True, True)  # with_log_probs, with_correct
    if "backward" in name:
        arguments = (*arguments, torch.randn((12,) if reduction == "none" else ()))
    torch.library.opcheck(getattr(kernels(impl), name).default, arguments)


@each_kernel
def test_what_the_operation_refuses(impl):
    target = torch.zeros(12, dtype=torch.int64)
    options = SoftmaxOptions()
    with pytest.raises(ValueError, match="B, C, P"):
        operation(impl, torch.randn(2, C, 12)[..., ::2], target, options)
    with pytest.raises(ValueError, match="target must be"):
        operation(impl, torch.randn(2, C, 6), target[:2], options)
    with pytest.raises(ValueError, match="shape"):
        operation(impl, torch.randn(2, C, 6), torch.rand(12, C), options)
