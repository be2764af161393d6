"""Column sums, and the losses made of them, against literal float64 formulas; several processes against one."""

import copy
import itertools
import math
import queue
from functools import partial

import multilabel_oracle
import oracle
import pytest
import torch
from implementations import IMPLEMENTATIONS, KERNELS
from test_sigmoid_loss import TARGETS, make_target
from test_softmax_loss import DTYPES
from torch.profiler import ProfilerActivity, profile

import imbalance_kernels as ik
from imbalance_kernels.functional import column_sums, f1_weighted_cross_entropy, smooth_f1_loss
from imbalance_kernels.ops import labels
from imbalance_kernels.ops.kernels import kernels

SHAPES = {
    (1, 1): "one logit",
    (5000, 1): "many rows of one class",
    (257, 3): "rows narrower than a vector",
    (33, 91): "vectors and a remainder",
    (3, 5001): "rows wider than a block",
}
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

each_p = pytest.mark.parametrize("from_softmax", [False, True], ids=["sigmoid", "softmax"])


def make_logits(shape, dtype):
    return (torch.randn(shape) * 3).to(dtype)


def of_softmax(rows, gradient, upstreams, weight):
    """The gradient (N, C) without the cancellation of sure rows, and how large each row's could be (N, 1).

    A row's entries add up to 0, which gives that of its highest logit by the others; and none is larger than what is
    left to these, times the largest difference of what p's gradient can be.
    """
    p = torch.softmax(rows.double(), dim=1)
    highest = p.argmax(dim=1, keepdim=True)
    others = gradient.scatter(1, highest, 0.0)
    left = p.scatter(1, highest, 0.0).sum(dim=1, keepdim=True)
    size = left * weight[:, None] * 2 * upstreams.abs().sum(dim=0).max()
    return others.scatter(1, highest, -others.sum(dim=1, keepdim=True)), size


def check(x, given, rows, target, impl, as_rows=lambda x: x, oracle_weight=None, **options):
    """Compare sums, and the gradient under random upstream gradients, of x with what `rows` give."""
    num_rows, num_classes = rows.shape
    signs = torch.randint(2, (num_classes,)) * 2 - 1  # one for both: their sum is not to cancel
    upstreams = (signs * (torch.rand(2, num_classes) + 0.1)).double()
    exact = rows.detach().double().requires_grad_(True)
    of_rows = {name: options[name] for name in ("ignore_index", "from_softmax") if name in options}
    *sums, count = multilabel_oracle.column_sums(exact, target, sample_weight=oracle_weight, **of_rows)
    (gradient,) = torch.autograd.grad(sums[:2], exact, list(upstreams))
    size = gradient.abs().amax(dim=1, keepdim=True)
    if options.get("from_softmax"):
        _, keep = multilabel_oracle.labels_of(target, num_classes, options.get("ignore_index", -100))
        weight = keep * (torch.ones(num_rows) if oracle_weight is None else oracle_weight)
        gradient, size = of_softmax(rows.detach(), gradient, upstreams, weight.double())
    x = x.requires_grad_(True)
    found = column_sums(x, given, impl=impl, **options)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for ours, theirs in zip(found, (*sums, count), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        tolerance = SUM_TOLERANCE[x.dtype]
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=tolerance, atol=tolerance * 1e-3)
    assert not found.positives.requires_grad and not found.rows.requires_grad
    (d_x,) = torch.autograd.grad(found[:2], x, [upstream.to(dtype) for upstream in upstreams])
    assert d_x.dtype == x.dtype
    d_rows = as_rows(d_x).double()
    if num_classes == 1 and not options.get("from_softmax"):
        size = size.max()
    error, tolerance = (d_rows - gradient).abs(), GRADIENT_TOLERANCE[x.dtype] * size
    if x.dtype == torch.float16:
        tolerance = torch.where(size == 0, 0.0, tolerance.clamp_min(2.0**-24))
    assert bool((error <= tolerance).all()), (error - tolerance).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", TARGETS)
@each_p
def test_column_sums(from_softmax, kind, impl, dtype, shape):
    rows, target = make_logits(shape, dtype), make_target(kind, *shape, dtype)
    options = {"from_softmax": from_softmax}
    check(rows.clone(), target, rows, target, impl, **options)
    weight = torch.rand(shape[0])
    weight[::4] = 0
    check(rows.clone(), target, rows, target, impl, sample_weight=weight, oracle_weight=weight, **options)
    if kind in ("labels", "lists"):  # a class may be what does not count
        target = torch.where(target == -100, 0, target)
        check(rows.clone(), target, rows, target, impl, ignore_index=0, **options)


LAYOUTS = {
    "images": lambda x: x,
    "wider images": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "some classes": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other images": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


SIZES = {
    (2, 5, 7, 9): "a piece of an image",
    (2, 3, 50, 53): "two pieces",
    (9, 4, 1, 3): "images narrower than a vector",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_images(from_softmax, impl, dtype, size, layout):
    """(B, C, H, W) logits are read as they lie, and give what (B * H * W, C) rows give."""
    images = LAYOUTS[layout](make_logits(size, dtype))
    num_images, num_classes, height, width = size
    rows = images.movedim(1, -1).reshape(-1, num_classes)
    weight = torch.rand(rows.shape[0])
    weight[::4] = 0
    for kind in TARGETS:
        target = make_target(kind, *rows.shape, dtype)
        shaped = target.reshape(num_images, height, width, *target.shape[1:])
        given = shaped if kind in ("labels", "lists") else shaped.movedim(-1, 1)
        options = {"as_rows": lambda x: x.movedim(1, -1).reshape(-1, num_classes), "from_softmax": from_softmax}
        if kind == "lists":
            options |= {"sample_weight": weight.reshape(num_images, height, width), "oracle_weight": weight}
        check(images.detach().clone(memory_format=torch.preserve_format), given, rows, target, impl, **options)


@pytest.mark.parametrize("size", [(1, 2000, 1, 37), (1, 300, 3, 151)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_softmax_of_images_with_many_classes(impl, size):
    """So many that a piece of an image is more than one run of pixels, the fewest for the first."""
    images, (_, num_classes, *shape) = make_logits(size, torch.float32), size
    rows = images.movedim(1, -1).reshape(-1, num_classes)
    weight = torch.rand(rows.shape[0])
    for kind in ("labels", "lists", "soft"):
        target = make_target(kind, *rows.shape, torch.float32)
        shaped = target.reshape(1, *shape, *target.shape[1:])
        options = {"as_rows": lambda x: x.movedim(1, -1).reshape(-1, num_classes), "from_softmax": True}
        options |= {"sample_weight": weight.reshape(1, *shape), "oracle_weight": weight}
        given = shaped.movedim(-1, 1) if kind == "soft" else shaped
        check(images.clone(), given, rows, target, impl, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_strided_rows(from_softmax, impl):
    wide, target = make_logits((33, 40), torch.float32), make_target("labels", 33, 21, torch.float32)
    for narrow in (wide[:, :21], wide[:, 3:24], wide.t().contiguous().t()[:, :21]):
        check(narrow.detach(), target, narrow.clone(), target, impl, from_softmax=from_softmax)


@pytest.mark.parametrize("shape", [(257, 3), (33, 91), (3, 5001), (2, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_what_does_not_count_adds_nothing(from_softmax, impl, shape):
    """Whatever it holds; and its gradient is 0."""
    rows = shape[:1] if len(shape) == 2 else (shape[0], *shape[2:])
    logits, weight = make_logits(shape, torch.float32), torch.rand(rows)
    weight = torch.where(weight < 0.3, 0.0, weight)
    target = torch.randint(shape[1] + 1, rows)
    target = torch.where(torch.rand(rows) < 0.2, -100, target)
    uncounted = (weight == 0) | (target == -100)
    options = {"sample_weight": weight, "from_softmax": from_softmax, "impl": impl}
    want = column_sums(logits, target, **options)
    holes = uncounted.unsqueeze(1) if len(shape) == 4 else uncounted[:, None]
    for hole in (math.nan, math.inf):
        x = logits.masked_fill(holes, hole).requires_grad_(True)
        sums = column_sums(x, target, **options)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(sums, want, strict=True))
        (gradient,) = torch.autograd.grad((sums.predicted + sums.true_positives).sum(), x)
        assert gradient.isfinite().all() and (gradient.masked_select(holes) == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits_and_masks(impl):
    """p to full relative accuracy where it is small; a mask of -inf adds nothing to the sums of p."""
    x = torch.tensor([[-80.0, -1e4, -math.inf, 1e4, 40.0, 90.0]]).t().contiguous().requires_grad_(True)
    for row in range(6):
        leaf = x.detach()[row : row + 1].requires_grad_(True)
        sums = column_sums(leaf, torch.ones(1, 1), impl=impl)
        p = torch.sigmoid(leaf.detach().double())
        torch.testing.assert_close(sums.true_positives.detach().double(), p[0], rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(sums.predicted.sum(), leaf)
        variance = p * torch.sigmoid(-leaf.detach().double())
        torch.testing.assert_close(gradient.double(), variance, rtol=1e-6, atol=1.2e-38)


@pytest.mark.parametrize("shape", [(33, 9), (3, 5001), (2, 19, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_softmax_of_extreme_logits_and_masks(impl, dtype, shape):
    """Offsets that all of a row have, sure rows, and masks of -inf: p = 0 and a gradient of 0, without NaN."""
    logits = torch.randn(shape) * 3
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[-1, 0] += 40
    logits[:, 1::3] = -math.inf
    images = logits.to(dtype)
    as_rows = {2: lambda x: x, 4: lambda x: x.movedim(1, -1).reshape(-1, shape[1])}[len(shape)]
    rows = as_rows(images)
    target = make_target("labels", *rows.shape, dtype)
    given = target.reshape(shape[0], *shape[2:])
    check(images.clone(), given, rows, target, impl, as_rows=as_rows, from_softmax=True)
    leaf = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(column_sums(leaf, given, from_softmax=True, impl=impl).predicted[0], leaf)
    assert (gradient[:, 1::3] == 0).all()


@pytest.mark.parametrize("shape", [(3, 9), (3, 5001), (3, 9, 1, 2)], ids=str)
@pytest.mark.parametrize("hole", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_without_a_softmax(impl, hole, shape):
    """Nothing but -inf, or inf, or NaN: as torch's softmax the whole row is NaN, and no other."""
    logits = make_logits(shape, torch.float32)
    logits[1, :: 1 if hole == -math.inf else 4] = hole
    labels = torch.randint(shape[1], (3, *shape[2:]))
    leaf = logits.clone().requires_grad_(True)
    sums = column_sums(leaf, labels, from_softmax=True, impl=impl)
    assert sums.predicted.isnan().all()
    named = torch.zeros(shape[1], dtype=torch.bool).index_fill(0, labels[1].flatten(), True)
    assert torch.equal(sums.true_positives.isnan(), named) and sums.positives.isfinite().all()
    (gradient,) = torch.autograd.grad(sums.true_positives.sum(), leaf)
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(200_003, 3), (20_001, 40), (1, 2, 300, 501)], ids=str)
@pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "triton"])  # its interpreter is slow
@each_p
def test_many_rows(from_softmax, impl, shape):
    """Sums of float32 that a plain running sum would lose, and the same bits whatever the threads."""
    logits, labels = make_logits(shape, torch.float32), torch.rand(shape) < 0.001
    dims = [0] if len(shape) == 2 else [0, 2, 3]
    p = torch.softmax(logits.double(), dim=1) if from_softmax else torch.sigmoid(logits.double())
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(column_sums(logits, labels, from_softmax=from_softmax, impl=impl))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0].predicted.double(), p.sum(dims), rtol=3e-7, atol=0)
    torch.testing.assert_close(found[0].true_positives.double(), (p * labels).sum(dims), rtol=1e-6, atol=1e-9)
    assert torch.equal(found[0].positives.double(), labels.double().sum(dims))
    if impl != "reference":
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1024, 300), (2, 19, 64, 128)], ids=str)
@pytest.mark.parametrize("impl", [impl for impl in KERNELS if impl != "triton"])  # its interpreter allocates too
@each_p
def test_nothing_of_the_logits_size_but_the_gradient(from_softmax, impl, shape):
    """Half of it is for vectors of N and C, and for what two threads work in."""
    logits = make_logits(shape, torch.float32).requires_grad_(True)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            sums = column_sums(logits, labels, from_softmax=from_softmax, impl=impl)
            (sums.true_positives.sum() + sums.predicted[0]).backward()
    finally:
        torch.set_num_threads(threads)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = list(itertools.accumulate(change for _, change in changes))
    assert logits.nbytes <= max(held) < 1.5 * logits.nbytes


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_nothing_there(from_softmax, impl):
    for shape, target in (
        ((0, 4), torch.zeros(0, dtype=torch.long)),
        ((3, 0), torch.zeros(3, dtype=torch.long)),
        ((3, 4), torch.full((3,), -100)),
        ((2, 4, 0), torch.zeros(2, 0, dtype=torch.long)),
    ):
        x = torch.randn(shape, requires_grad=True)
        sums = column_sums(x, target, from_softmax=from_softmax, impl=impl)
        assert all((vector == 0).all() and vector.shape == (shape[1],) for vector in sums[:3])
        (gradient,) = torch.autograd.grad(sums.predicted.sum() + sums.true_positives.sum(), x)
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_labels_out_of_range(from_softmax, impl, monkeypatch):
    """They raise where they can be read, else they make the sums NaN."""
    x = torch.randn(3, 4)
    wrong = [torch.tensor(target) for target in ([0, 5, 1], [0, -1, 1], [[0, 1, 1], [0, 4, 1], [2, -100, -100]])]
    for target in wrong:
        with pytest.raises(IndexError, match=r"target (5|-1|4) is out of bounds"):
            column_sums(x, target, from_softmax=from_softmax, impl=impl)
    if impl == "cpu":
        return
    monkeypatch.setattr(labels, "may_read_values", lambda logits: False)  # as on a GPU
    for target in wrong:
        for leaf, given in ((x.clone(), target), (x.t()[None].contiguous(), target[None])):
            sums = column_sums(leaf.requires_grad_(True), given, from_softmax=from_softmax, impl=impl)
            assert sums.predicted.isnan().all() and sums.true_positives.isnan().all()
            (gradient,) = torch.autograd.grad(sums.predicted.sum(), leaf)
            rows = gradient if leaf.dim() == 2 else gradient[0].t()
            assert rows.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize("impl", KERNELS)
@each_p
def test_the_operations_are_what_they_say(from_softmax, impl):
    """Schemas and fakes, by torch's own checks."""
    namespace = kernels(impl)
    for logits, target in (
        (torch.randn(6, 5), torch.tensor([0, 5, 2, -100, 1, 1])),
        (torch.randn(2, 5, 3), torch.rand(2, 5, 3)),
    ):
        arguments = (logits, target, torch.rand(6), -100, from_softmax)
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(namespace.column_sums.default, arguments, test_utils=tests)
        upstream = (torch.randn(5), torch.randn(5))
        torch.library.opcheck(namespace.column_sums_backward.default, (*arguments, *upstream), test_utils=tests)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_retained_graphs_and_double_backward(from_softmax, impl):
    leaf = make_logits((33, 9), torch.float32).requires_grad_(True)
    sums = column_sums(leaf, make_target("lists", 33, 9, torch.float32), from_softmax=from_softmax, impl=impl)
    total = sums.true_positives.sum()
    one, three = (torch.autograd.grad(total, leaf, torch.tensor(u), retain_graph=True)[0] for u in (1.0, 3.0))
    torch.testing.assert_close(three, 3 * one, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), leaf)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("smooth", [0.0, 1.0])
@pytest.mark.parametrize("average", ["per_class", "global"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@each_p
def test_smooth_f1(from_softmax, impl, average, smooth):
    """Absent classes among them, which are left out of the mean without smoothing."""
    logits = make_logits((33, 9), torch.float64)
    weight = torch.rand(33)
    for kind in TARGETS:
        target = make_target(kind, 33, 9, torch.float64)
        if kind == "labels":
            target[target == 4] = 9
        elif kind != "lists":
            target[:, 4] = 0
        options = {"average": average, "smooth": smooth, "sample_weight": weight, "from_softmax": from_softmax}
        want = oracle.loss_and_gradient(logits, 1.7, multilabel_oracle.smooth_f1, target=target, **options)
        x = logits.clone().requires_grad_(True)
        loss = smooth_f1_loss(x, target, impl=impl, **options)
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(1.7, dtype=torch.float64))
        torch.testing.assert_close((loss.detach(), gradient), want, rtol=1e-11, atol=1e-14)
        module = ik.SmoothF1Loss(average, smooth, from_softmax, impl=impl)
        assert torch.equal(module(logits, target, sample_weight=weight), loss.detach())


@pytest.mark.parametrize("average", ["per_class", "global"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_batch_without_positives(impl, average):
    """Without smoothing it costs 0 and teaches nothing; with it what is predicted costs."""
    x = make_logits((6, 3), torch.float32).requires_grad_(True)
    background = torch.full((6,), 3)
    loss = smooth_f1_loss(x, background, average, impl=impl)
    assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    loss = smooth_f1_loss(x, background, average, smooth=1.0, impl=impl)
    assert loss > 0 and (torch.autograd.grad(loss, x)[0] > 0).all()
    empty = torch.randn(0, 3, requires_grad=True)
    loss = smooth_f1_loss(empty, torch.zeros(0, dtype=torch.long), average, impl=impl)
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("average", ["per_class", "global"])
def test_f1_weighted_cross_entropy(average, reduction):
    logits, weight = make_logits((33, 9), torch.float64), torch.rand(33)
    for kind in ("labels", "lists", "bool", "soft"):
        target = make_target(kind, 33, 9, torch.float64)
        for options in ({"sample_weight": weight}, {"smooth": 2.0}):
            upstream = torch.randn((33, 9) if reduction == "none" else (), dtype=torch.float64)
            options = {**options, "average": average, "reduction": reduction}
            function = multilabel_oracle.f1_weighted_cross_entropy
            want = oracle.loss_and_gradient(logits, upstream, function, target=target, **options)
            x = logits.clone().requires_grad_(True)
            loss = f1_weighted_cross_entropy(x, target, **options)
            (gradient,) = torch.autograd.grad(loss, x, upstream)
            torch.testing.assert_close((loss.detach(), gradient), want, rtol=1e-11, atol=1e-14)
            own = {name: options[name] for name in ("average", "reduction", "smooth") if name in options}
            module = ik.F1WeightedCrossEntropyLoss(**own)
            assert torch.equal(module(logits, target, sample_weight=options.get("sample_weight")), loss.detach())


def test_weights_are_those_of_the_gradient_of_f1():
    """What kexue 7708 derives them from: 1 - F1 moves p as the weighted sum of p does, times 2 / sum (y + p)."""
    logits = make_logits((33, 4), torch.float64).requires_grad_(True)
    labels = (torch.rand(33, 4) < 0.3).double()
    p, n = torch.sigmoid(logits), torch.sigmoid(-logits)
    (of_f1,) = torch.autograd.grad(smooth_f1_loss(logits, labels) * 4, logits)
    (of_entropy,) = torch.autograd.grad(f1_weighted_cross_entropy(logits, labels, reduction="sum"), logits)
    slope = torch.where(labels == 1, p, n)  # d p / d log p, and d n / d log n
    total = (labels + p).sum(dim=0)
    torch.testing.assert_close(of_f1, (of_entropy * slope * 2 / total).detach(), rtol=1e-10, atol=1e-14)


def test_the_running_average_is_of_sums():
    """Training updates it, evaluation reads it, the state dict carries it, and no change of precision rounds it."""
    loss = ik.F1WeightedCrossEntropyLoss(momentum=0.75, num_classes=4, reduction="none")
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(4):
        logits, target = make_logits((33, 4), torch.float32), make_target("labels", 33, 4, torch.float32)
        if step == 3:
            loss.eval()
        else:
            sums = multilabel_oracle.column_sums(logits, target)[:3]
            expected = 0.75 * expected + 0.25 * torch.stack(sums)
        predicted, true_positives, positives = expected
        f1 = 2 * true_positives / (predicted + positives)
        y, keep = multilabel_oracle.labels_of(target, 4, -100)
        x = logits.double()
        want = -(1 - f1 / 2) * y * torch.nn.functional.logsigmoid(x)
        want = (want - f1 / 2 * (1 - y) * torch.nn.functional.logsigmoid(-x)) * keep[:, None]
        torch.testing.assert_close(loss(logits, target).double(), want, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loss.running_sums.double(), expected, rtol=1e-6, atol=0)
    copy = ik.F1WeightedCrossEntropyLoss(momentum=0.75, num_classes=4, reduction="none").eval()
    copy.load_state_dict(loss.state_dict())
    assert torch.equal(copy(logits, target), loss(logits, target))
    with torch.no_grad():
        loss.running_sums.mul_(1e5).add_(1 / 3)
    held = loss.running_sums.clone()
    for changed in (loss.half(), loss.double(), loss.to(torch.bfloat16)):
        assert changed.running_sums.dtype == torch.float32 and torch.equal(changed.running_sums, held)
    assert (
        set(loss.state_dict()) == {"running_sums", "running_weight"}
        and not ik.F1WeightedCrossEntropyLoss().state_dict()
    )


def test_nothing_predicted_and_nothing_there_is_right():
    """F1 of 0 / 0 is 1: before the first batch of a running average evaluation is half of cross-entropy."""
    loss = ik.F1WeightedCrossEntropyLoss(momentum=0.9, num_classes=3).eval()
    logits, target = make_logits((6, 3), torch.float32), torch.tensor([0, 3, 1, 2, -100, 1])
    half = ik.SigmoidCrossEntropyLoss()(logits, target) / 2
    torch.testing.assert_close(loss(logits, target), half)


def test_what_does_not_fit_raises():
    x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    for make in (ik.SmoothF1Loss, ik.F1WeightedCrossEntropyLoss):
        with pytest.raises(ValueError, match="average is 'macro', but it must be one of"):
            make("macro")
        with pytest.raises(ValueError, match="smooth is -1, but it must be at least 0"):
            make(smooth=-1)
    with pytest.raises(ValueError, match=r"momentum is 1.0, but it must be None or in \[0, 1\)"):
        ik.F1WeightedCrossEntropyLoss(momentum=1.0, num_classes=3)
    with pytest.raises(ValueError, match="momentum is given without num_classes"):
        ik.F1WeightedCrossEntropyLoss(momentum=0.9)
    with pytest.raises(ValueError, match="num_classes is given without momentum"):
        ik.F1WeightedCrossEntropyLoss(num_classes=3)
    with pytest.raises(ValueError, match="num_classes is 5, but input has 3 classes"):
        ik.F1WeightedCrossEntropyLoss(momentum=0.9, num_classes=5)(x, target)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4, 3\).*one number for each row, \(4,\)"):
        column_sums(x, target, sample_weight=torch.ones(4, 3))


# ---------------------------------------------------------------- several processes


def _step(loss, weight, inputs, labels):
    """The loss of a linear layer, and its weight's gradient."""
    head = torch.nn.Linear(6, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head, lambda model: loss(model(inputs), labels)


def _losses(process_group):
    options = {"process_group": process_group}
    return [
        ik.SmoothF1Loss(**options),
        ik.SmoothF1Loss("global", 1.0, **options),
        ik.SmoothF1Loss(from_softmax=True, **options),
        ik.F1WeightedCrossEntropyLoss(**options),
        ik.F1WeightedCrossEntropyLoss(momentum=0.5, num_classes=3, **options),
    ]


def _work(rank, address, weight, inputs, labels, results):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        share = slice(0, 7) if rank == 0 else slice(7, None)
        for loss in _losses(torch.distributed.group.WORLD):
            head, call = _step(loss, weight, inputs[share], labels[share])
            model = torch.nn.parallel.DistributedDataParallel(head)
            value = call(model)
            value.backward()
            results.put((rank, value.item(), head.weight.grad.tolist()))
        logits = inputs[share].clone().requires_grad_(True)
        sums = column_sums(logits, labels[share], process_group=torch.distributed.group.WORLD)
        results.put((rank, [float(sums.rows), sums.rows.requires_grad, sums.positives.requires_grad], None))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_both_batches(tmp_path):
    """Under DistributedDataParallel, with batches of different sizes for F1 and of equal ones for a mean."""
    inputs, weight = torch.randn(14, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3, 0, 0, 0, 3, 2, 2, 1, 2, 2, 3, 1])
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    workers = [
        context.Process(target=_work, args=(rank, address, weight, inputs, labels, results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = {0: [], 1: []}
    while sum(map(len, found.values())) < 2 * (len(_losses(None)) + 1):
        try:
            rank, *result = results.get(timeout=5)
            found[rank].append(result)
        except queue.Empty:
            assert not any(worker.exitcode for worker in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for index, loss in enumerate(_losses(None)):
        head, call = _step(loss, weight, inputs, labels)
        value = call(head)
        value.backward()
        values = [found[rank][index][0] for rank in range(2)]
        if isinstance(loss, ik.SmoothF1Loss):
            assert values == pytest.approx([value.item()] * 2, rel=1e-6)
        else:  # a mean over each process's logits, with weights of all
            assert sum(values) / 2 == pytest.approx(value.item(), rel=1e-6)
        for rank in range(2):
            gradient = torch.tensor(found[rank][index][1], dtype=torch.float64)
            torch.testing.assert_close(gradient, head.weight.grad.double(), rtol=1e-5, atol=1e-8)
    assert [found[rank][-1][0] for rank in range(2)] == [[14.0, False, False]] * 2


def test_a_running_average_begins_with_its_first_batch():
    """Its sums are divided by what they weigh, so that `smooth` weighs the same from the first batch on."""
    x, y = torch.randn(20, 3), torch.rand(20, 3) < 0.4
    running = ik.F1WeightedCrossEntropyLoss(smooth=1.0, momentum=0.9, num_classes=3)
    torch.testing.assert_close(running(x, y), ik.F1WeightedCrossEntropyLoss(smooth=1.0)(x, y))


def test_what_raises_or_is_not_finite_changes_no_running_average():
    x, y = torch.randn(20, 3), torch.rand(20, 3) < 0.4
    loss = ik.F1WeightedCrossEntropyLoss(momentum=0.9, num_classes=3)
    loss(x, y)
    held = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match="normalizer"):
        loss(x, y, normalizer=torch.ones(2))
    loss(x * math.nan, y)
    assert all(torch.equal(value, held[name]) for name, value in loss.state_dict().items())


COMPILED = {
    "SmoothF1Loss": ik.SmoothF1Loss,
    "SmoothF1Loss from softmax": partial(ik.SmoothF1Loss, from_softmax=True),
    "SmoothF1Loss from softmax, reference": partial(ik.SmoothF1Loss, from_softmax=True, impl="reference"),
    "F1WeightedCrossEntropyLoss": ik.F1WeightedCrossEntropyLoss,
}


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_compiles_as_one_graph(make):
    loss, x, y = make(smooth=1.0), torch.randn(20, 3, requires_grad=True), torch.rand(20, 3) < 0.4
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
    torch.testing.assert_close(*(torch.autograd.grad(function(x, y), x)[0] for function in (compiled, loss)))
