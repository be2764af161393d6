"""The table of the multi-label softmax: implementation x dtype x shape x labels, against a literal float64 oracle."""

import itertools
import math

import multilabel_oracle
import oracle
import pytest
import torch
from implementations import IMPLEMENTATIONS, KERNELS
from test_sigmoid_loss import TARGETS, make_target
from test_softmax_loss import DTYPES, GRADIENT_TOLERANCE, VALUE_TOLERANCE

import imbalance_kernels as ik
from imbalance_kernels.functional import multilabel_softmax_loss
from imbalance_kernels.ops import labels
from imbalance_kernels.ops.kernels import kernels

SHAPES = {
    (1, 1): "one logit",
    (257, 1): "rows of one class",
    (70, 3): "many rows to a program, fewer classes than a vector",
    (5, 16): "one whole vector",
    (33, 91): "vectors and a remainder",
    (3, 1000): "as many floats as a lane's registers take on a GPU",
    (2, 2000): "as many halves",
    (2, 2001): "the same, of which no vector is aligned",
    (3, 4096): "exactly one block",
    (2, 4097): "a block and one class",
    (2, 9001): "blocks and a remainder",
    (2, 20001): "longer than what one program of Triton holds",
}
IMAGES = {
    (1, 1): "one logit",
    (258, 1): "one class",
    (1500, 3): "images that end within a tile of a CPU's, and within a vector",
    (2304, 19): "whole vectors, more of them than a tile has",
    (33, 91): "fewer pixels than a vector",
    (72, 600): "more classes than a program of Triton holds",
    (24, 5001): "more classes than a tile of a CPU's holds",
}
ARRANGEMENTS = ("rows", "images")


# Triton's interpreter takes half a minute for images of so many classes.
IMAGE_CASES = [
    (impl, dtype, shape)
    for impl, dtype, shape in itertools.product(IMPLEMENTATIONS, DTYPES, IMAGES)
    if impl != "triton" or shape[1] < 5000 or dtype == torch.float32
]


def arranged(*shapes):
    """Each shape (N, C) as rows and as images, whose kernels do not change any more where rows' still do."""
    cases = [(shape, arrangement) for shape in shapes for arrangement in ARRANGEMENTS]
    cases = [(shape, arrangement) for shape, arrangement in cases if arrangement == "rows" or shape[1] < 10000]
    return pytest.mark.parametrize("shape, arrangement", cases, ids=str)


def make_logits(shape, dtype):
    """Rows from unsure to sure."""
    return (torch.randn(shape) * torch.logspace(-1, 0.8, shape[0])[:, None]).to(dtype)


def images_of(num_rows):
    """How many images and how many pixels of each make so many rows; of most numbers several."""
    images = next(images for images in (3, 5, 2, 1) if num_rows % images == 0)
    return images, num_rows // images


def place(tensor, arrangement, classes=False):
    """A tensor (N, ...) of rows, or as that of channels-first images (B, C, P); classes are the last dimension."""
    if arrangement == "rows":
        return tensor.clone()
    images = tensor.reshape(*images_of(len(tensor)), *tensor.shape[1:])
    return images.movedim(-1, 1).contiguous() if classes else images


def rows_of(tensor, arrangement):
    """The reverse of what has classes."""
    return tensor if arrangement == "rows" else tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def run(logits, target, arrangement, upstream=None, **options):
    """The loss, or losses (N,), and the gradient (N, C) of rows, whose logits may be given as images."""
    x = place(logits, arrangement, classes=True).requires_grad_(True)
    dense = target.is_floating_point() or target.dtype == torch.bool
    if options.get("sample_weight") is not None:
        options["sample_weight"] = place(options["sample_weight"], arrangement)
    loss = multilabel_softmax_loss(x, place(target, arrangement, classes=dense), **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype).reshape(loss.shape)
    (gradient,) = torch.autograd.grad(loss, x, upstream)
    return loss.detach().reshape(-1) if loss.dim() else loss.detach(), rows_of(gradient, arrangement)


def check(logits, target, impl, reduction, arrangement="rows", **options):
    """Compare value and gradient under a random upstream gradient."""
    upstream = torch.randn(logits.shape[:1] if reduction == "none" else (), dtype=torch.float64)
    exact = {"target": target, "reduction": reduction, **options}
    value, gradient = oracle.loss_and_gradient(logits, upstream, multilabel_oracle.multilabel_softmax, **exact)
    found = run(logits, target, arrangement, upstream, impl=impl, reduction=reduction, **options)
    compare(*found, value, gradient)


def compare(loss, found, value, gradient):
    """Compare with float64: losses each with its own size, gradients row by row; of one class they are one row."""
    dtype = found.dtype
    if found.shape[1] == 1:
        found, gradient = found.T, gradient.T
    assert loss.shape == value.shape
    size = value.abs().clamp_min(1e-6)
    assert float(((loss.double() - value).abs() / size).max()) <= 2 * VALUE_TOLERANCE[dtype]
    if dtype == torch.float16:  # denormals: absolute spacing 2^-24
        tiny = gradient.abs().amax(dim=1, keepdim=True) < 2.0**-13
        assert float((found.double() - gradient).abs().masked_fill(~tiny, 0).max()) <= 2.0**-24
        found, gradient = found.masked_fill(tiny, 0), gradient.masked_fill(tiny, 0)
    assert oracle.worst_row_error(found, gradient) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", TARGETS)
def test_loss(kind, impl, dtype, shape):
    logits = make_logits(shape, dtype)
    for reduction in ("mean", "sum", "none"):
        check(logits, make_target(kind, *shape, dtype), impl, reduction)


@pytest.mark.parametrize("impl, dtype, shape", IMAGE_CASES, ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_images(kind, impl, dtype, shape):
    """Channels-first images give what their pixels give as rows."""
    logits = make_logits(shape, dtype)
    for reduction in ("mean", "sum", "none"):
        check(logits, make_target(kind, *shape, dtype), impl, reduction, "images")


@arranged((257, 1), (33, 91), (2, 5001), (2, 20001))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_options(impl, dtype, shape, arrangement):
    logits = make_logits(shape, dtype)
    prior = 0.2 + 0.6 * torch.rand(shape[1])
    weight = torch.rand(shape[0]) + 0.1
    for kind in ("lists", "soft", "labels"):
        target = make_target(kind, *shape, dtype)
        for reduction, options in (
            ("mean", {"prior": prior}),
            ("none", {"threshold": 0.7}),
            ("none", {"prior": prior, "threshold": -1.5, "sample_weight": weight}),
            ("mean", {"sample_weight": weight}),
            ("sum", {"sample_weight": weight, "normalizer": 3.5}),
        ):
            check(logits, target, impl, reduction, arrangement, **options)
        if kind != "soft":  # a class may be what does not count
            check(logits, torch.where(target == -100, 0, target), impl, "none", arrangement, ignore_index=0)


@arranged((70, 3), (33, 91), (5, 5001))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_does_not_count_costs_exactly_0(impl, shape, arrangement):
    """Whatever it holds: rows of weight 0, rows of ignored labels, everything where the normalizer is 0."""
    logits = make_logits(shape, torch.float32)
    weight = torch.rand(shape[0])
    weight[::3] = 0
    for kind in ("labels", "lists", "soft"):
        target = make_target(kind, *shape, torch.float32)
        uncounted = weight == 0
        if kind == "labels":
            uncounted = uncounted | (target == -100)
        options = {"arrangement": arrangement, "sample_weight": weight, "impl": impl}
        want, _ = run(logits, target, **options)
        for hole in (math.nan, math.inf):
            x = logits.masked_fill(uncounted[:, None], hole)
            loss, gradient = run(x, target, **options)
            assert torch.equal(loss, want) and gradient.isfinite().all()
            assert (gradient[uncounted] == 0).all() and (gradient[~uncounted] != 0).any(dim=1).all()
        rows, _ = run(x, target, reduction="none", **options)
        assert (rows[uncounted] == 0).all() and (rows[~uncounted] > 0).all()
        for zero in (0.0, torch.tensor(0.0)):
            loss, gradient = run(logits * math.nan, target, arrangement, normalizer=zero, impl=impl)
            assert loss == 0 and (gradient == 0).all()


@arranged((40, 7), (3, 5001), (3, 20001))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl, dtype, shape, arrangement):
    """Finite at 1e4 with every kind of label, and accurate: the oracle is the same sums, shifted, in float64."""
    sizes = torch.tensor([0.0, 1.0, -1.0, 50.0, -50.0, 120.0, -120.0, 1e4, -1e4])
    logits = sizes[torch.randint(len(sizes), shape)] + torch.randn(shape)
    logits = logits.to(dtype)
    for kind in TARGETS:
        target = make_target(kind, *shape, dtype)
        y, keep = multilabel_oracle.labels_of(target, shape[1], -100)
        exact = logits.double().requires_grad_(True)
        zero = torch.zeros(shape[0], 1, dtype=torch.float64)
        negative = torch.cat([zero, torch.where(y == 1, -math.inf, exact + torch.log1p(-y))], dim=1)
        positive = torch.cat([zero, torch.where(y == 0, -math.inf, torch.log(y) - exact)], dim=1)
        value = keep * (torch.logsumexp(negative, dim=1) + torch.logsumexp(positive, dim=1))
        (gradient,) = torch.autograd.grad(value.sum(), exact)
        loss, found = run(logits, target, arrangement, reduction="none", impl=impl)
        assert loss.isfinite().all() and found.isfinite().all()
        torch.testing.assert_close(loss.double(), value.detach(), rtol=3e-6, atol=1e-6 if dtype == torch.float32 else 0)
        # each entry by its own size: where a positive is far above, nothing is left of the others but what they are
        torch.testing.assert_close(found.double(), gradient, rtol=2e-5, atol=1e-30)


@arranged((40, 7), (4, 601), (4, 1201), (4, 20001))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_infinite_logits(impl, dtype, shape, arrangement):
    """A negative of +inf costs +inf. Its gradient is NaN, and that of other negatives 0, as of torch.logsumexp.

    A positive of +inf costs nothing; NaN makes NaN, also beside +inf; other rows do not notice.
    """
    middle = shape[1] // 2
    for kind in TARGETS:
        logits, target = make_logits(shape, dtype), make_target(kind, *shape, dtype)
        if kind == "labels":
            target[1], target[3] = 0, middle
        elif kind == "lists":
            target[1:4:2] = -100
            target[1, 0], target[3, -1] = 0, middle
        else:
            target[1, middle], target[3, middle] = 0, 1
            target[1, middle + 1] = 0.5 if kind == "soft" else 0
        x = logits.clone()
        x[1, middle : middle + 2] = x[3, middle] = math.inf
        loss, found = run(x, target, arrangement, reduction="none", impl=impl)
        want, gradient = run(logits, target, arrangement, reduction="none", impl=impl)
        others = torch.tensor([row not in (1, 3) for row in range(shape[0])])
        assert torch.equal(loss[others], want[others]) and torch.equal(found[others], gradient[others])

        y, _ = multilabel_oracle.labels_of(target, shape[1], -100)
        terms = torch.where(y == 0, 0.0, y * torch.exp(-x.double()))  # of positives
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
        assert loss[1] == math.inf and found[1, middle : middle + 2].isnan().all()
        own = torch.zeros(shape[1], dtype=torch.bool)
        own[middle : middle + 2] = True
        rest = (-terms[1] / (1 + terms[1].sum()))[~own]
        torch.testing.assert_close(found[1][~own].double(), rest, rtol=tolerance, atol=6e-8)

        negatives = torch.where(y[3] == 1, 0.0, (1 - y[3]) * torch.exp(logits[3].double()))
        value = torch.log1p(negatives.sum()) + torch.log1p(terms[3].sum())
        torch.testing.assert_close(loss[3].double(), value, rtol=1e-5, atol=0)
        assert found[3, middle] == 0 and found[3].isfinite().all() and (found[3] != 0).any()

        x[1, 0] = math.nan
        assert run(x, target, arrangement, reduction="none", impl=impl)[0][1].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_positive_far_above_hides_no_negative(impl):
    """What "all minus the positive" could not give: the negatives' share after a sum of e^80."""
    x = torch.tensor([[80.0, -9.0, -10.0, -11.0]], requires_grad=True)
    loss = multilabel_softmax_loss(x, torch.tensor([[0, -100]]), impl=impl)
    loss.backward()
    share = torch.exp(torch.tensor([-9.0, -10.0, -11.0], dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(float(torch.log1p(share.sum())), rel=1e-6)
    torch.testing.assert_close(x.grad[0, 1:].double(), share / (1 + share.sum()), rtol=1e-6, atol=0)
    assert float(x.grad[0, 0]) == pytest.approx(-math.exp(-80), rel=1e-5)


@arranged((40, 7), (3, 5001), (3, 20001))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_classes_cost_nothing(impl, dtype, shape, arrangement):
    """As if they were not there, positives and negatives alike; a row of nothing else costs 0."""
    logits = make_logits(shape, dtype)
    masked = torch.rand(shape[1]) < 0.4
    masked[0], masked[-1] = True, False
    for kind in ("bool", "soft"):
        target = make_target(kind, *shape, dtype)
        options = {"arrangement": arrangement, "impl": impl}
        loss, gradient = run(logits.masked_fill(masked, -math.inf), target, reduction="none", **options)
        upstream = torch.ones(shape[0], dtype=torch.float64)
        function = multilabel_oracle.multilabel_softmax
        exact = {"target": target[:, ~masked], "reduction": "none"}
        value, want = oracle.loss_and_gradient(logits[:, ~masked], upstream, function, **exact)
        assert (gradient[:, masked] == 0).all()
        compare(loss, gradient[:, ~masked], value, want)
        x = torch.full(shape, -math.inf, dtype=dtype)
        loss, gradient = run(x, target, prior=0.5 * torch.rand(shape[1]) + 0.1, reduction="sum", **options)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forms_of_the_same_labels_agree(impl, dtype, arrangement):
    """bool and floating point to the bit; lists, whose positives are summed in their order, with duplicates or not."""
    logits = make_logits((33, 91), dtype)
    lists = torch.randint(91, (33, 5))
    lists = torch.where(torch.rand(33, 5) < 0.3, -100, lists)
    dense = multilabel_oracle.one_hot(lists, 91, -100).bool()
    forms = (dense, dense.to(dtype), dense.float(), lists, torch.cat([lists, lists], dim=1).flip(1).int())
    results = [run(logits, target, arrangement, reduction="sum", impl=impl) for target in forms]
    for loss, gradient in results[1:3]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    for found in results[3:]:
        rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
        torch.testing.assert_close(found, results[0], rtol=rounding, atol=1e-6)


def as_images(rows, *sizes):
    """33 rows as images of so many rows of pixels."""
    return rows.reshape(*sizes, -1).movedim(-1, 1).contiguous()


# The dimension of classes, a tensor, and what of it is the input; the last is copied, all others are seen as they are.
LAYOUTS = {
    "rows": (1, lambda x: x.clone(), lambda x: x),
    "some columns": (1, lambda x: torch.cat([x, x], dim=1), lambda x: x[:, :91]),
    "classes first": (0, lambda x: x.t().contiguous(), lambda x: x),
    "one row": (0, lambda x: x[0].clone(), lambda x: x),
    "channels last": (1, lambda x: x.reshape(3, 11, 91), lambda x: x.transpose(1, 2)),
    "sequences": (-1, lambda x: x.reshape(3, 11, 91), lambda x: x),
    "images": (1, lambda x: as_images(x, 3, 11), lambda x: x),
    "one image": (0, lambda x: as_images(x, 1, 3, 11)[0], lambda x: x),
    "images of a batch": (1, lambda x: as_images(x, 3, 11).repeat_interleave(2, dim=0), lambda x: x[::2]),
    "channels of more": (1, lambda x: as_images(x, 3, 11).repeat(1, 2, 1), lambda x: x[:, 91:]),
    "every second channel": (1, lambda x: as_images(x, 3, 11).repeat_interleave(2, dim=1), lambda x: x[:, ::2]),
    "rows of an image": (1, lambda x: as_images(x, 1, 3, 11).repeat(1, 1, 2, 1), lambda x: x[:, :, 3:]),
    "wider images": (1, lambda x: as_images(x, 1, 3, 11).repeat(1, 1, 1, 2), lambda x: x[..., :11]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_seen_without_a_copy(layout):
    class_dim, whole_of, view = LAYOUTS[layout]
    input = view(whole_of(make_logits((33, 91), torch.float32)))
    target = torch.zeros(input.movedim(class_dim, -1).shape[:-1], dtype=torch.long)
    seen = labels.as_labels(input, target, class_dim)
    is_copied = layout == "wider images"
    assert seen.owned == is_copied and (seen.logits.data_ptr() == input.data_ptr()) != is_copied
    assert seen.logits.stride(-1) == 1
    of_rows = ("rows", "some columns", "one row", "channels last", "sequences", "wider images")
    assert seen.logits.dim() == (2 if layout in of_rows else 3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layouts(impl, dtype, layout, inplace):
    """In place the gradient takes the logits' memory and no other: what lies between is untouched."""
    class_dim, whole_of, view = LAYOUTS[layout]
    rows = make_logits((33, 91), dtype)
    whole = whole_of(rows)
    if layout == "one row":
        rows = rows[:1]
    rows_shape = view(whole).movedim(class_dim, -1).shape[:-1]
    for kind in TARGETS:
        target = make_target(kind, 33, 91, dtype)[: rows.shape[0]]
        dense = kind not in ("labels", "lists")
        if dense:
            shaped = target.reshape((*rows_shape, 91)).movedim(-1, class_dim)
        else:
            shaped = target.reshape((*rows_shape, *target.shape[1:]))
        for reduction, weight in (("mean", None), ("none", torch.rand(rows.shape[0]) + 0.1)):
            upstream = torch.randn(rows.shape[:1] if reduction == "none" else (), dtype=torch.float64)
            exact = {"target": target, "reduction": reduction, "sample_weight": weight}
            value, gradient = oracle.loss_and_gradient(rows, upstream, multilabel_oracle.multilabel_softmax, **exact)
            leaf = whole.clone().requires_grad_(True)
            options = {"sample_weight": None if weight is None else weight.reshape(rows_shape), "impl": impl}
            options |= {"class_dim": class_dim, "reduction": reduction}
            memory = leaf * 1 if inplace else leaf
            x = view(memory)
            assert x.stride() == view(whole).stride()
            if inplace and layout == "wider images":
                with pytest.raises(ValueError, match="inplace=True needs an input that can be seen as"):
                    multilabel_softmax_loss(x, shaped, inplace=True, **options)
                continue
            loss = multilabel_softmax_loss(x, shaped, inplace=inplace, **options)
            up = (upstream.reshape(rows_shape) if reduction == "none" else upstream).to(loss.dtype)
            (found,) = torch.autograd.grad(loss, leaf, up)
            found = view(found).movedim(class_dim, -1).reshape(-1, 91)
            compare(loss.detach().reshape(-1) if reduction == "none" else loss.detach(), found, value, gradient)
            if inplace and impl != "reference":
                held = view(memory.detach()).movedim(class_dim, -1).reshape(-1, 91)
                assert torch.equal(held, found)
            if inplace:
                untouched = memory.detach().clone()
                view(untouched).copy_(view(whole))
                assert torch.equal(untouched, whole)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_rows_bits_are_its_own(impl):
    for shape in ((300, 7), (5, 5001), (3, 20001)):
        logits, target = make_logits(shape, torch.float32), make_target("lists", *shape, torch.float32)
        together = multilabel_softmax_loss(logits, target, reduction="none", impl=impl)
        for row in (0, 1, shape[0] // 2, shape[0] - 1):
            alone = multilabel_softmax_loss(logits[row : row + 1], target[row : row + 1], reduction="none", impl=impl)
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "lists", "soft"])
@pytest.mark.parametrize(
    "impl, num_classes",  # a CPU's tile does not hold 5000; other kernels do not change after 600
    [(impl, width) for impl in KERNELS for width in (3, 19, 600, 5000) if width < 5000 or impl == "cpu"],
)
def test_a_pixels_bits_are_its_own(impl, num_classes, kind, dtype):
    """They depend neither on its place, nor on how many pixels or images there are, nor on others' labels.

    Slices stay channels-first.
    """
    width = 260 if num_classes < 100 else 37
    shape = (3, num_classes, 2, width)
    rows = make_logits((6 * width, num_classes), dtype)
    target = make_target(kind, *rows.shape, dtype)
    if kind == "soft":  # where hard ones may go another way
        target[: 3 * width] = target[: 3 * width].round()
    input = rows.reshape(3, 2, width, -1).movedim(-1, 1).contiguous()
    target = target.reshape(3, 2, width, *target.shape[1:])
    target = target.movedim(-1, 1).contiguous() if kind == "soft" else target

    def losses_and_gradients(of):
        images = (of[0], slice(None), *of[1:])
        x = input[images].detach().requires_grad_()
        given = target[images] if kind == "soft" else target[of]
        loss = multilabel_softmax_loss(x, given, reduction="none", impl=impl)
        return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]

    losses, gradients = losses_and_gradients((slice(None), slice(None), slice(None)))
    assert gradients.shape == shape
    for b, h, w, m in ((0, 0, 0, 2), (0, 0, 1, 2), (1, 1, 5, 2), (2, 1, width - 2, 2), (2, 0, 3, 19), (1, 0, 2, 30)):
        of = (slice(b, b + 1), slice(h, h + 1), slice(w, w + m))
        loss, gradient = losses_and_gradients(of)
        assert torch.equal(loss, losses[of])
        assert torch.equal(gradient, gradients[(of[0], slice(None), *of[1:])])


def test_threads_do_not_change_bits():
    """Of the CPU kernels, whose threads share an image."""
    logits, before = make_logits((2 * 100 * 101, 19), torch.float32), torch.get_num_threads()
    for kind in ("lists", "soft"):
        target, results = make_target(kind, *logits.shape, torch.float32), []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(run(logits, target, "images", impl="cpu"))
        finally:
            torch.set_num_threads(before)
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_there(impl):
    """No rows, or none that counts: the mean is NaN with a gradient of 0. No classes: rows cost 0."""
    for shape, target in (((0, 4), torch.zeros(0, dtype=torch.long)), ((3, 4), torch.full((3,), -100))):
        x = torch.randn(shape, requires_grad=True)
        loss = multilabel_softmax_loss(x, target, impl=impl)
        assert loss.isnan() and (torch.autograd.grad(loss, x)[0] == 0).all()
        loss = multilabel_softmax_loss(x, target, normalizer=0, impl=impl)
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
    x = torch.randn(3, 0, requires_grad=True)
    loss = multilabel_softmax_loss(x, torch.zeros(3, dtype=torch.long), impl=impl)
    assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == (3, 0)
    x = torch.randn(3, 4, requires_grad=True)
    no_labels = multilabel_softmax_loss(x, torch.zeros(3, 0, dtype=torch.long), reduction="none", impl=impl)
    want = torch.log1p(torch.exp(x.detach().double()).sum(dim=1))
    torch.testing.assert_close(no_labels.detach().double(), want, rtol=1e-6, atol=0)


@arranged((3, 4), (3, 601), (3, 5001), (3, 20001))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_labels_out_of_range(impl, shape, arrangement, monkeypatch):
    """They raise where they can be read; else they make their row NaN, listed ones too."""
    c, x = shape[1], torch.randn(shape)
    wrong = (
        (torch.tensor([0, c + 1, 1]), rf"target {c + 1} is out of bounds.*\[0, {c}\].*background"),
        (torch.tensor([0, -1, 1]), "target -1 is out of bounds"),
        (torch.tensor([[0, 3, 1], [3, c, 1], [0, -100, 2]]), rf"target {c} is out of bounds.*\[0, {c - 1}\]"),
        (torch.tensor([[0, -100, 1], [3, 1, -1], [-100, -100, -100]]), rf"target -1 is out .*\[0, {c - 1}\]"),
    )
    for target, message in wrong:
        with pytest.raises(IndexError, match=message):
            run(x, target, arrangement, impl=impl)
    if impl == "cpu":
        return
    monkeypatch.setattr(labels, "may_read_values", lambda logits: False)  # as on a GPU
    for target, _ in wrong:
        losses, gradient = run(x, target, arrangement, reduction="none", impl=impl)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == [False, True, False]
        loss, gradient = run(x, target, arrangement, impl=impl)
        assert loss.isnan()
        _, want = run(x[[0, 2]], target[[0, 2]], arrangement, impl=impl)
        if target.dim() == 2:  # the wrong row is not in the divisor, but where rows are not asked for their label
            want = want * 2 / 3
        torch.testing.assert_close(gradient[[0, 2]], want)
        weight = torch.tensor([1.0, 0.0, 1.0])  # what does not count is not NaN either
        losses, gradient = run(x, target, arrangement, reduction="none", sample_weight=weight, impl=impl)
        assert losses[1] == 0 and (gradient[1] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_retained_graphs_and_double_backward(impl):
    leaf = make_logits((33, 91), torch.float32).requires_grad_(True)
    loss = multilabel_softmax_loss(leaf, make_target("lists", 33, 91, torch.float32), impl=impl)
    one, two, three = (torch.autograd.grad(loss, leaf, torch.tensor(u), retain_graph=True)[0] for u in (1.0, 2.0, 3.0))
    torch.testing.assert_close(two, 2 * one, rtol=1e-6, atol=0)
    torch.testing.assert_close(three, 3 * one, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_the_module_is_the_function():
    """With a prior that no change of precision rounds."""
    logits, target = make_logits((33, 7), torch.bfloat16), make_target("lists", 33, 7, torch.bfloat16)
    prior = ik.BinaryPrior([1, 3, 500, 70, 9, 10, 2], total_count=10**7)
    module = ik.MultilabelSoftmaxLoss(0.5, prior=prior, reduction="none").bfloat16()
    want = multilabel_softmax_loss(logits, target, 0.5, prior=prior, reduction="none")
    assert torch.equal(module(logits, target), want)
    assert torch.equal(
        module(logits, target, sample_weight=torch.full((33,), 2.0)),
        multilabel_softmax_loss(
            logits, target, 0.5, prior=prior, reduction="none", sample_weight=torch.full((33,), 2.0)
        ),
    )
    assert "threshold=0.5" in repr(module) and "prior=True" in repr(module)


def test_what_does_not_fit_raises():
    x, lists = torch.randn(4, 5), torch.zeros(4, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="threshold is nan"):
        ik.MultilabelSoftmaxLoss(math.nan)
    with pytest.raises(ValueError, match=r"sample_weight has shape \(4, 5\).*one number for each row, \(4,\)"):
        multilabel_softmax_loss(x, lists, sample_weight=torch.ones(4, 5))
    with pytest.raises(ValueError, match="reduction is 'average'"):
        multilabel_softmax_loss(x, lists, reduction="average")
    with pytest.raises(ValueError, match=r"prior has shape \(3,\)"):
        multilabel_softmax_loss(x, lists, prior=torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="dense labels must be floating"):
        multilabel_softmax_loss(x, torch.zeros(4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="normalizer is given with reduction='none'"):
        multilabel_softmax_loss(x, lists, reduction="none", normalizer=1)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_operations_are_what_they_say(impl):
    """Schemas, fakes and autograd's registration, by torch's own checks: of rows, of images and of some channels."""
    namespace = kernels(impl)
    lists = torch.tensor([[0, 3], [2, -100]] * 3)
    given = (torch.randn(6, 5), torch.randn(2, 5, 3), torch.randn(2, 9, 3)[:, 2:7])
    for logits, reduction in itertools.product(given, ("mean", "none")):
        arguments = (lists, torch.randn(5), torch.rand(6), None, -100, reduction)
        upstream = torch.randn(6 if reduction == "none" else ())
        for name, last in (("multilabel_softmax", (True,)), ("multilabel_softmax_backward", (upstream,))):
            operation = getattr(namespace, name).default
            torch.library.opcheck(operation, (logits, *arguments, *last), test_utils=("test_schema", "test_faketensor"))
        for name, last in (("multilabel_softmax_", ()), ("multilabel_softmax_backward_", (upstream,))):
            if reduction == "none" and not last:
                continue
            operation = getattr(namespace, name).default
            torch.library.opcheck(operation, (logits, *arguments, *last), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", [(7, 5, 1), (2, 1, 9), (0, 5, 4), (3, 5, 0), (1, 1, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("impl", KERNELS)
def test_shapes_of_the_operation(impl, shape):
    """One pixel, one class, no image, no pixel, no class: what is otherwise seen as rows."""
    images, num_classes, pixels = shape
    logits, num_rows = torch.randn(shape), images * pixels
    rows = logits.movedim(1, 2).reshape(num_rows, num_classes)
    hard = torch.rand(shape) < 0.4
    for target in (hard, torch.randint(num_classes + 1, (num_rows,))):
        of_rows = hard.movedim(1, 2).reshape(num_rows, num_classes) if target.dim() == 3 else target
        arguments = (None, None, None, -100, "none")
        loss, gradient = kernels(impl).multilabel_softmax(logits, target, *arguments, True)
        want, of_row = kernels(impl).multilabel_softmax(rows, of_rows, *arguments, True)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradient, of_row.reshape(images, pixels, num_classes).movedim(2, 1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", [None, *KERNELS])
def test_compile(impl, reduction):
    """One graph, whatever the number of images and the height."""
    module = ik.MultilabelSoftmaxLoss(0.5, reduction=reduction, impl=impl)

    def step(h, target):
        return module(h * 2, target)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for images, height in ((2, 3), (4, 5)):
        input, target = torch.randn(images, 19, height, 7), torch.randint(20, (images, height, 7))
        results = []
        for call in (step, compiled):
            h = input.clone().requires_grad_()
            loss = call(h, target)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), h)))
        torch.testing.assert_close(results[0], results[1])
    torch._dynamo.reset()
