"""On a GPU, where there is one (`make gpu-check`): the table's cases, sizes beyond 2^31, graphs, streams, memory.

On a machine without one the same kernels are emulated or interpreted (all other files) and compiled for devices that
are not there (test_cuda_compile.py, test_triton_compile.py), and these tests are left out. To try the tests themselves,
IMBALANCE_KERNELS_STAND_INS=1 runs on CPU what goes there (`gpu_check.py --dry-run`): Triton's kernels interpreted, and
the CUDA ones where IMBALANCE_KERNELS_EMULATED names their emulation.
"""

import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import oracle
import pytest
import test_behaviour
import test_log_probs as reports_table
import test_sigmoid_loss as sigmoid_table
import test_softmax_loss as table
import test_triton
import torch
from implementations import EMULATED, STAND_INS
from oracle import worst_row_error

import imbalance_kernels as ik
from imbalance_kernels.binary_objectives import BINARY_REGISTRY
from imbalance_kernels.functional import column_sums, multilabel_softmax_loss, sigmoid_loss, softmax_loss
from imbalance_kernels.logit_map import LogitMap
from imbalance_kernels.objectives import REGISTRY, Focal
from imbalance_kernels.ops.kernel_arguments import split_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SoftmaxOptions

pytestmark = pytest.mark.gpu
needs_device = pytest.mark.skipif(STAND_INS, reason="has no stand-in on a CPU")

DEVICE = "cpu" if STAND_INS else "cuda"
IMPLEMENTATIONS = ("cuda", "triton") if EMULATED or not STAND_INS else ("triton",)
REPETITIONS = 2 if STAND_INS else 100  # a race would show at one of them

each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", table.DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", [*table.SHAPES, (5, 32000), (3, 128256)], ids=str)


def moved(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def check(logits, target, impl, reduction, ours, exact, shape=(0, 0)):
    ours = {name: moved(value) for name, value in ours.items()}
    table.check(logits, target, impl, reduction, ours, exact, device=DEVICE, shape=shape)


@each_impl
@each_shape
@each_dtype
@pytest.mark.parametrize("name", REGISTRY)
def test_objective(name, dtype, shape, impl):
    logits, target = table.make_case(shape, dtype)
    objective = REGISTRY[name]()
    for reduction in ("mean", "none"):
        exact = {"objective": name, "parameters": objective.parameters()}
        check(logits, target, impl, reduction, {"objective": objective}, exact, shape=shape)


@each_impl
@pytest.mark.parametrize("shape", [*table.OF_OPTIONS, (4, 1000), (2, 20001)], ids=str)
@each_dtype
@pytest.mark.parametrize("option", table.OPTIONS)
def test_option(option, dtype, shape, impl):
    logits, target = table.make_case(shape, dtype)
    options = table.OPTIONS[option](shape[1])
    for name, reduction in (("cross_entropy", "mean"), ("focal", "none"), ("focal", "mean")):
        exact = {"objective": name, "parameters": REGISTRY[name]().parameters(), **options}
        check(logits, target, impl, reduction, {"objective": REGISTRY[name](), **options}, exact, shape=shape)


@each_impl
@pytest.mark.parametrize("shape", [*table.OF_OPTIONS, (4, 1000), (3, 32000), (2, 128256)], ids=str)
@each_dtype
def test_log_probs_and_correct(dtype, shape, impl):
    logits, target = reports_table.mixed_case(shape, dtype)
    images, targets = (moved(table.as_images(x, shape)) for x in (logits, target))
    prior = torch.softmax(torch.randn(shape[1]), 0)
    for options in ({}, {"prior": prior, "scale": 1.3, "softcap": 6.0}):
        loss = ik.SoftmaxLoss(**options, impl=impl, inplace=True).to(DEVICE)
        right = oracle.log_probs(logits, target, **options)
        for requires_grad in (False, True):  # in place too
            found = loss(images.clone().requires_grad_(requires_grad) * 1, targets, **reports_table.FLAGS)
            reports_table.assert_log_probs(found.log_probs.cpu().flatten(), right, dtype)
            assert torch.equal(found.correct.cpu().flatten(), oracle.correct(logits, target))


def check_sigmoid(logits, target, impl, reduction, ours, exact):
    ours = {name: moved(value) for name, value in ours.items()}
    sigmoid_table.check(logits, target, impl, reduction, ours, exact, device=DEVICE)


@each_impl
@pytest.mark.parametrize("shape", [*sigmoid_table.SHAPES, (1000, 80)], ids=str)
@each_dtype
@pytest.mark.parametrize("name", BINARY_REGISTRY)
def test_sigmoid_objective(name, dtype, shape, impl):
    logits = sigmoid_table.make_logits(shape, dtype)
    objective = BINARY_REGISTRY[name]()
    exact = {"objective": name, "parameters": objective.parameters()}
    for kind in sigmoid_table.TARGETS:
        target = sigmoid_table.make_target(kind, *shape, dtype)
        for reduction in ("mean", "none"):
            check_sigmoid(logits, target, impl, reduction, {"objective": objective}, exact)


@each_impl
@pytest.mark.parametrize("shape", [(257, 1), (33, 91), (2, 5001)], ids=str)
@each_dtype
@pytest.mark.parametrize("option", sigmoid_table.OPTIONS)
def test_sigmoid_option(option, dtype, shape, impl):
    logits, options = sigmoid_table.make_logits(shape, dtype), sigmoid_table.OPTIONS[option](shape[1])
    for name, kind, reduction in (("focal", "labels", "mean"), ("cross_entropy", "soft", "none")):
        objective = BINARY_REGISTRY[name]()
        exact = {"objective": name, "parameters": objective.parameters(), **options}
        target = sigmoid_table.make_target(kind, *shape, dtype)
        check_sigmoid(logits, target, impl, reduction, {"objective": objective, **options}, exact)


@each_impl
@each_dtype
def test_losses_of_labels_are_those_of_the_reference(dtype, impl):
    """Sigmoid losses of images, the multi-label softmax, and sums over a batch, in float64 on CPU."""
    labels = torch.randint(-1, 20, (3, 8, 9))
    images = torch.randn(3, 19, 8, 9).to(dtype)
    lists = torch.where(torch.rand(50, 4) < 0.5, torch.randint(91, (50, 4)), -1)
    rows = torch.randn(50, 91).to(dtype)
    wide, wide_lists = torch.randn(3, 5001).to(dtype), torch.randint(5001, (3, 4))

    def sums(logits, target, **keywords):
        found = column_sums(logits, target, **keywords)
        return torch.cat([found.predicted, found.true_positives])

    sums_of_softmax = partial(sums, from_softmax=True)

    for function, logits, target in (
        (sigmoid_loss, images, labels),
        (multilabel_softmax_loss, rows, lists),
        (multilabel_softmax_loss, wide, wide_lists),
        (sums_of_softmax, wide, wide_lists),
        (multilabel_softmax_loss, images, labels),
        (multilabel_softmax_loss, images, images > 1),
        (sums, rows, lists),
        (sums, images, labels),
        (sums_of_softmax, rows, lists),
        (sums_of_softmax, images, labels),
    ):
        exact = logits.double().requires_grad_()
        expected = function(exact, target, ignore_index=-1, impl="reference")
        x = logits.to(DEVICE).requires_grad_()
        found = function(x, target.to(DEVICE), ignore_index=-1, impl=impl)
        upstream = torch.randn_like(expected)
        gradients = [
            torch.autograd.grad(value, leaf, upstream.to(value.device, value.dtype))[0].cpu().double()
            for value, leaf in ((found, x), (expected, exact))
        ]
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
        size = float(gradients[1].abs().max())
        tolerance = table.GRADIENT_TOLERANCE[dtype] if dtype != torch.float16 else 3e-3
        torch.testing.assert_close(*gradients, rtol=2 * tolerance, atol=tolerance * size)


@each_impl
@pytest.mark.parametrize("shape", [(33, 91), (3, 19, 2, 25), (2, 20001)], ids=str)
@each_dtype
@pytest.mark.parametrize("margin", ["arc", "circle"])
def test_margins_on_cosines(margin, dtype, shape, impl):
    logits, target = table.make_case(shape, dtype, cosines=True)
    logits = logits * 0.9
    ours = ik.AngularMargin(m2=0.4) if margin == "arc" else ik.logit_map.CircleMargin(0.25)
    exact = {"margin": (margin, 0.4 if margin == "arc" else 0.25), "scale": 8.0}
    for reduction in ("sum", "none"):
        check(logits, target, impl, reduction, {"margin": ours, "scale": 8.0}, exact, shape=shape)


@each_impl
@pytest.mark.parametrize("shape", [(33, 91), (3, 19, 2, 25), (2, 20001)], ids=str)
@each_dtype
@pytest.mark.parametrize("option", ["plain", "prior", "softcap", "weighted smoothing", "z-loss"])
def test_class_probabilities(option, dtype, shape, impl):
    logits, _ = table.make_case(shape, dtype)
    target = torch.softmax(torch.randn(logits.shape), dim=1).to(dtype)
    options = {} if option == "plain" else table.OPTIONS[option](shape[1])
    for reduction in ("mean", "none"):
        check(logits, target, impl, reduction, options, options, shape=shape)


@each_impl
@each_dtype
def test_weights_of_rows_and_normalizer(dtype, impl):
    logits, target = table.make_case((33, 91), dtype)
    for options in (
        {"sample_weight": torch.rand(33)},
        {"sample_weight": torch.rand(33), "weight": torch.rand(91), "label_smoothing": 0.1, "z_loss": 0.01},
        {"sample_weight": torch.rand(33), "normalizer": 7.0},
    ):
        check(logits, target, impl, "mean", options, options)
        check(logits, target, impl, "sum", options, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", test_triton.FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_in_units_in_the_last_place(function, dtype):
    test_triton.check_function(function, dtype, DEVICE)


@each_impl
@pytest.mark.parametrize("name", REGISTRY)
def test_confident_rows_keep_seven_digits(name, impl):
    """Against the registry in float64, at log-odds where one minus a probability has no digits left."""
    d = torch.tensor([15.0, 16.5, 30.0, -15.0, 3.0])
    logits = torch.stack([d, torch.zeros_like(d)], dim=1).to(DEVICE).requires_grad_()
    objective = REGISTRY[name]()
    loss = softmax_loss(
        logits, torch.zeros(5, dtype=torch.long).to(DEVICE), objective=objective, impl=impl, reduction="none"
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    for found, exact in ((loss, objective.value(d.double())), (gradient[:, 0], objective.slope(d.double()))):
        torch.testing.assert_close(found.detach().cpu().double(), exact, rtol=3e-6, atol=1e-30)


# On each side of: one lane and two, a warp and a block, and clusters of one, two and sixteen blocks, the largest, in
# either size of numbers; and no whole number of vectors.
CUDA_WIDTHS = [64, 65, 512, 516, 1024, 1032, 8200, 16392, 32768, 32776, 131072, 131080, 262144, 262152, 262151]


@each_impl
@pytest.mark.parametrize("num_classes", [*test_triton.WIDTHS, *CUDA_WIDTHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_across_every_block_boundary(num_classes, dtype, impl):
    test_triton.check_block_boundary(num_classes, dtype, DEVICE, impl)


@each_impl
@pytest.mark.parametrize("num_classes", [50, 20000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_outside_makes_its_row_nan_and_no_other(num_classes, smoothing, impl):
    test_triton.check_targets_outside(num_classes, smoothing, DEVICE, impl)


@each_impl
def test_a_target_outside_raises_where_that_is_asked_for(monkeypatch, impl):
    monkeypatch.setenv("IMBALANCE_KERNELS_CHECK", "1")
    with pytest.raises(IndexError, match="target 9 is out of bounds"):
        ik.CrossEntropyLoss(impl=impl)(torch.randn(2, 5, device=DEVICE), torch.tensor([1, 9], device=DEVICE))


# Everything that overwrites logits which other warps or programs may still have to read.
IN_PLACE = {
    "loss and gradient": (ik.FocalLoss, {}, torch.bfloat16),
    "soft cap": (ik.FocalLoss, {"softcap": 20.0}, torch.float32),
    "smoothing": (ik.CrossEntropyLoss, {"label_smoothing": 0.1}, torch.bfloat16),
    "gradient alone": (ik.FocalLoss, {"reduction": "none"}, torch.float32),
    "float16": (ik.CrossEntropyLoss, {}, torch.float16),
    "angle": (ik.ArcFaceLoss, {}, torch.float32),
}


@each_impl
@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("num_classes", [2, 50, 1000, 16384, 32000, 128256])
def test_the_gradient_in_place_is_the_same(num_classes, case, impl):
    make, keywords, dtype = IN_PLACE[case]
    x = torch.randn(64, num_classes, device=DEVICE).tanh().to(dtype)
    target = torch.randint(num_classes, (64,), device=DEVICE)
    (right,) = torch.autograd.grad(make(**keywords, impl=impl)(leaf := x.clone().requires_grad_(), target).sum(), leaf)
    for _ in range(REPETITIONS):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        (found,) = torch.autograd.grad(make(**keywords, impl=impl, inplace=True)(logits, target).sum(), logits)
        assert torch.equal(found, right)


@each_impl
@pytest.mark.parametrize("num_classes", [50, 1000, 20000])
def test_the_backward_of_the_split_in_place(num_classes, impl):
    """Several programs to a row, of which one owns the target."""
    x = torch.randn(64, num_classes, device=DEVICE)
    target = torch.randint(num_classes, (64,), device=DEVICE)
    split = split_arguments(SoftmaxOptions(logit_map=LogitMap(softcap=5.0)))
    found = kernels(impl).target_and_rest(x, target, *split)
    upstream = [torch.randn(64, device=DEVICE) for _ in range(3)]
    right = kernels(impl).target_and_rest_backward(x, target, *split, *found[1:3], *upstream)
    for _ in range(REPETITIONS):
        logits = x.clone()
        kernels(impl).target_and_rest_backward_(logits, target, *split, *found[1:3], *upstream)
        assert torch.equal(logits, right)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [7, 90, 96, 1000, 4099, 32000])
@pytest.mark.parametrize("pad", [0, 1, 8])
def test_a_rows_bits_are_its_own(num_classes, dtype, pad, impl):
    """Alone or among any number of others of its stride."""
    storage = torch.randn(150, num_classes + pad, device=DEVICE).to(dtype)
    logits, target = storage[:, :num_classes], torch.randint(num_classes, (150,), device=DEVICE)
    loss = ik.FocalLoss(0.5, label_smoothing=0.1, z_loss=1e-3, reduction="none", impl=impl)
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, target)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    for rows in (slice(3, 4), slice(5, 7), slice(13, 80)):
        part = logits[rows].detach().requires_grad_()
        again = loss(part, target[rows])
        assert torch.equal(again, value[rows])
        assert torch.equal(torch.autograd.grad(again.sum(), part)[0], gradient[rows])


@needs_device
@each_impl
def test_more_than_2_to_the_31_logits(impl):
    num_rows, num_classes = 17000, 128256
    logits = torch.randn(num_rows, num_classes, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(num_classes, (num_rows,), device=DEVICE)
    loss = ik.FocalLoss(reduction="sum", impl=impl)
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    last = logits[-5:].detach().clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(last, target[-5:]), last)
    assert torch.equal(gradient[-5:], right)


@each_impl
def test_rows_beyond_2_to_the_31_elements(impl):
    """Rows so far apart that most of the memory between them is never touched."""
    storage = torch.empty(3 << 30, device=DEVICE, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 1000), (1 << 30, 1)).copy_(torch.randn(3, 1000))
    target = torch.tensor([1, 2, 999], device=DEVICE)
    leaf = logits.detach().requires_grad_()
    (found,) = torch.autograd.grad(ik.CrossEntropyLoss(impl=impl)(leaf, target), leaf)
    copy = logits.contiguous().requires_grad_()
    (right,) = torch.autograd.grad(ik.CrossEntropyLoss(impl=impl)(copy, target), copy)
    torch.testing.assert_close(found, right, rtol=1e-2, atol=0)


@needs_device
@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("num_classes", [91, 32000])
def test_in_a_graph(num_classes, reduction, impl):
    """Captured once, replayed with other logits, targets and upstream gradients."""
    prior = torch.softmax(torch.randn(num_classes), 0)
    loss = ik.FocalLoss(prior=prior, reduction=reduction, label_smoothing=0.1, impl=impl).to(DEVICE)
    x = torch.randn(40, num_classes, device=DEVICE).requires_grad_()
    target = torch.randint(num_classes, (40,), device=DEVICE)
    upstream = torch.ones((40,) if reduction == "none" else (), device=DEVICE)

    def step():
        output = loss(x, target, return_log_probs=True, return_correct=True)
        return torch.autograd.grad(output.loss, x, upstream)[0], output.log_probs, output.correct

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            target.random_(num_classes)
            upstream.uniform_()
        graph.replay()
        assert all(torch.equal(ours, right) for ours, right in zip(found, step(), strict=True))


# In a process of its own: each case is the first use of its kernels, by which they are loaded and told of their shared
# memory and clusters, and all are captured before any has run. On a CPU there is nothing to capture, only to compare.
FIRST_USE = """
import sys
import torch
import imbalance_kernels as ik

device = torch.device(sys.argv[1])
half = (torch.bfloat16, torch.float16)
captured = []
for num_classes, dtype, reduction in (
    (91, torch.float32, "mean"),
    (1000, half[0], "mean"),
    (1000, half[1], "mean"),
    (32000, half[0], "none"),
    (128256, torch.float32, "mean"),
    (128256, half[0], "mean"),
    (300000, torch.float32, "none"),
):
    prior = torch.softmax(torch.randn(num_classes), 0)
    loss = ik.FocalLoss(prior=prior, reduction=reduction, label_smoothing=0.1, impl="cuda").to(device)
    x = torch.randn(4, num_classes, device=device).to(dtype).requires_grad_()
    target = torch.randint(num_classes, (4,), device=device)
    upstream = torch.rand((4,) if reduction == "none" else (), device=device)
    torch.autograd.grad((x * 2).float().sum(), x)  # torch's own first use is not what is tried

    def step(loss=loss, x=x, target=target, upstream=upstream):
        value = loss(x, target)
        return value.detach(), torch.autograd.grad(value, x, upstream)[0]

    graph = None
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    else:
        found = step()
    captured.append((graph, found, step))
for graph, found, step in captured:
    if graph is not None:
        for tensor in found:
            tensor.zero_()
        graph.replay()
    right = step()
    assert all(torch.equal(a, b) and a.isfinite().all() and a.any() for a, b in zip(found, right, strict=True))
print("compared", len(captured))
"""


# Triton compiles at the first use, which torch asks to have done before a capture (test_in_a_graph).
@pytest.mark.skipif("cuda" not in IMPLEMENTATIONS, reason="the CUDA kernels have no stand-in here")
def test_the_first_use_may_be_in_a_graph():
    call = [sys.executable, "-c", FIRST_USE, DEVICE]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and "compared 7" in done.stdout, done.stderr[-3000:]


@needs_device
@each_impl
@pytest.mark.parametrize(
    "shapes", [((64, 91), (64, 1000)), ((40, 1000), (40, 32000)), ((8, 32000), (8, 128256))], ids=str
)
def test_two_threads_do_not_meet(shapes, impl):
    """Each with its own number of classes and stream: the same bits as one after the other."""
    loss = ik.FocalLoss(label_smoothing=0.1, impl=impl)
    cases = [
        (torch.randn(shape, device=DEVICE).requires_grad_(), torch.randint(shape[1], shape[:1], device=DEVICE))
        for shape in shapes
    ]

    def step(x, target):
        value = loss(x, target)
        return value.detach(), torch.autograd.grad(value, x)[0]

    right = [step(*case) for case in cases]
    both_are_there = threading.Barrier(2)

    def repeat(case, right):
        both_are_there.wait(timeout=60)
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [step(*case) for _ in range(REPETITIONS)]
            return all(torch.equal(a, b) for pair in found for a, b in zip(pair, right, strict=True))

    torch.cuda.synchronize()  # the streams are the threads' own, and know nothing of what was made before
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeat, cases, right)) == [True, True]


@needs_device
@each_impl
def test_on_another_stream(impl):
    stream = torch.cuda.Stream()
    x, target = torch.randn(2000, 8142, device=DEVICE), torch.randint(8142, (2000,), device=DEVICE)
    right = ik.CrossEntropyLoss(impl=impl)(x, target)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x.mul(1.0).mul(1.0)
        found = ik.CrossEntropyLoss(impl=impl)(late, target)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, right)


@needs_device
@each_impl
def test_nothing_waits_for_the_device(impl):
    losses = [
        ik.FocalLoss(prior=torch.softmax(torch.randn(1000), 0), reduction=r, impl=impl).to(DEVICE)
        for r in ("mean", "none")
    ]
    x = torch.randn(40, 1000, device=DEVICE).requires_grad_()
    target = torch.randint(1000, (40,), device=DEVICE)
    half = x.detach().half().requires_grad_()
    for loss in losses:
        for leaf in (x, half):
            loss(leaf, target).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            for leaf in (x, half):
                loss(leaf, target).sum().backward()
        softmax_loss(
            x, target, impl=impl, normalizer=torch.ones((), device=DEVICE), sample_weight=torch.ones(40, device=DEVICE)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fused_case(dtype, reduction, impl):
    """A fused loss, what it is called with, and its upstream gradient; an ignored row holds NaN."""
    loss = ik.FocalLoss(reduction=reduction, label_smoothing=0.1, impl=impl, chunk_bytes=1 << 16).to(DEVICE)
    input = torch.randn(40, 64, device=DEVICE, dtype=dtype)
    target = torch.randint(1000, (40,), device=DEVICE)
    target[3], input[3] = -100, math.nan
    weight = torch.randn(1000, 64, device=DEVICE, dtype=dtype).div(4)
    upstream = torch.rand((40,) if reduction == "none" else (), device=DEVICE) + 0.5
    return loss, (input.requires_grad_(), weight.requires_grad_()), target, upstream


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_impl
def test_fused_with_the_linear_layer(impl, dtype, reduction):
    """Against float64, in several chunks; rows that are ignored are multiplied there, as zeros."""
    loss, (input, weight), target, upstream = fused_case(dtype, reduction, impl)
    found = torch.autograd.grad(loss.linear(input, weight, target), (input, weight), upstream)
    leaves = [x.detach().double().cpu().nan_to_num().requires_grad_() for x in (input, weight)]
    exact = ik.FocalLoss(reduction=reduction, label_smoothing=0.1, impl="reference")
    right = torch.autograd.grad(exact(leaves[0] @ leaves[1].t(), target.cpu()), leaves, upstream.double().cpu())
    for ours, theirs in zip(found, right, strict=True):
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert float((ours.double().cpu() - theirs).abs().max()) <= limit * float(theirs.abs().max())


@needs_device
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_impl
def test_fused_in_a_graph_on_another_stream(impl, dtype, reduction):
    """So nothing waits for the device either."""
    loss, leaves, target, upstream = fused_case(dtype, reduction, impl)

    def step():
        return torch.autograd.grad(loss.linear(*leaves, target), leaves, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        leaves[0].normal_()
        target.random_(1000)
        upstream.uniform_(0.5, 1.5)
    graph.replay()
    for ours, right in zip(found, step(), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-6)


@needs_device
@each_impl
@pytest.mark.parametrize("inplace, gradients", [(False, 1), (True, 0)])
def test_memory_is_one_gradient_and_in_place_none(inplace, gradients, impl):
    logits = torch.randn(2048, 32000, device=DEVICE)
    logits = torch.zeros((), device=DEVICE, requires_grad=True) + logits  # no leaf
    target = torch.randint(32000, (2048,), device=DEVICE)
    loss = ik.FocalLoss(prior=torch.softmax(torch.randn(32000), 0), inplace=inplace, impl=impl).to(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < (gradients + 0.02) * logits.numel() * 4
    assert (gradient.data_ptr() == logits.data_ptr()) == inplace


@each_impl
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, impl):
    loss = ik.FocalLoss(prior=torch.softmax(torch.randn(91), 0), label_smoothing=0.1, impl=impl)
    weight = torch.randn(91, 16, device=DEVICE).requires_grad_()
    step = lambda h, target: loss(h @ weight.t(), target)  # noqa: E731
    run = torch.compile(step, fullgraph=True, backend=backend)
    for num_rows in (9, 40, 33):
        h, target = torch.randn(num_rows, 16, device=DEVICE), torch.randint(91, (num_rows,), device=DEVICE)
        (found,) = torch.autograd.grad(run(h, target), weight)
        (right,) = torch.autograd.grad(step(h, target), weight)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@each_impl
def test_float16_with_a_gradient_scaler(impl):
    head = torch.nn.Linear(32, 1000, device=DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    h, target = torch.randn(4096, 32, device=DEVICE), torch.randint(1000, (4096,), device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        logits = head(h)
        loss = ik.CrossEntropyLoss(impl=impl)(logits, target)
    scaler.scale(loss).backward()
    exact = oracle.loss_and_gradient(logits.detach().cpu(), 1.0, target=target.cpu())[1]
    right = exact.t() @ h.cpu().double()
    found = head.weight.grad.cpu().double() / scaler.get_scale()
    assert worst_row_error(found, right) < 2e-2


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_classes", [91, 1000, 32000, 128255])
def test_repeated_runs_have_the_same_bits(num_classes, dtype, impl):
    x = torch.randn(300 if num_classes < 2000 else 9, num_classes, device=DEVICE).to(dtype)
    target = torch.randint(num_classes, (len(x),), device=DEVICE)
    loss = ik.FocalLoss(prior=torch.softmax(torch.randn(num_classes), 0), label_smoothing=0.1, impl=impl).to(DEVICE)
    right = None
    for _ in range(REPETITIONS):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, target)
        found = value.detach(), torch.autograd.grad(value, leaf)[0]
        right = found if right is None else right
        assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options, target", [("everything", "indices"), ("plain", "probabilities")])
@pytest.mark.parametrize("op", test_behaviour.OP_CALLS)
def test_opcheck(op, options, target, dtype, impl):
    """Schema (what is mutated), fake kernel and its device, and the operation under aot dispatch."""
    arguments = test_behaviour.OP_CALLS[op](test_behaviour.OPTIONS[options], dtype, target, 5)
    operation = getattr(kernels(impl), op.split()[0]).default
    torch.library.opcheck(operation, tuple(moved(value) for value in arguments))


@each_impl
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_opcheck_scale_(factor, impl):
    gradient = torch.randn(5, 91, device=DEVICE)
    torch.library.opcheck(kernels(impl).scale_.default, (gradient, torch.tensor(factor, device=DEVICE)))


if torch.cuda.device_count() > 1:  # nothing to leave out where there is one

    @each_impl
    @pytest.mark.parametrize("num_classes", [91, 32000])
    def test_on_a_device_that_is_not_the_current_one(num_classes, impl):
        x, target = torch.randn(40, num_classes), torch.randint(num_classes, (40,))
        gradients = []
        for device in ("cuda:0", "cuda:1"):
            leaf = x.to(device).requires_grad_()
            ik.FocalLoss(label_smoothing=0.1, impl=impl)(leaf, target.to(device)).mul(0.5).backward()
            assert torch.cuda.current_device() == 0 and leaf.grad.device == leaf.device
            gradients.append(leaf.grad.cpu())
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


@needs_device
def test_the_default_on_a_gpu_is_cuda():
    logits = torch.randn(3, 5, device=DEVICE)
    assert ik.implementation.choose(None, logits) == "cuda"
    losses = softmax_loss(logits, torch.tensor([0, 1, -100], device=DEVICE), objective=Focal(), reduction="none")
    assert losses.is_cuda and math.isfinite(losses.sum())
