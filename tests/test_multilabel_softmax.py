"""The table of the multi-label softmax: implementation x dtype x shape x labels, against a literal float64 oracle."""

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


def make_logits(shape, dtype):
    """Rows from unsure to sure."""
    return (torch.randn(shape) * torch.logspace(-1, 0.8, shape[0])[:, None]).to(dtype)


def check(logits, target, impl, reduction, **options):
    """Compare value and gradient under a random upstream gradient."""
    upstream = torch.randn(logits.shape[:1] if reduction == "none" else (), dtype=torch.float64)
    exact = {"target": target, "reduction": reduction, **options}
    value, gradient = oracle.loss_and_gradient(logits, upstream, multilabel_oracle.multilabel_softmax, **exact)
    x = logits.clone().requires_grad_(True)
    loss = multilabel_softmax_loss(x, target, impl=impl, reduction=reduction, **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    (found,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    compare(loss.detach(), found, value, gradient)


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


@pytest.mark.parametrize("shape", [(257, 1), (33, 91), (2, 5001), (2, 20001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_options(impl, dtype, shape):
    logits = make_logits(shape, dtype)
    prior = 0.2 + 0.6 * torch.rand(shape[1])
    weight = torch.rand(shape[0]) + 0.1
    for kind in ("lists", "soft", "labels"):
        target = make_target(kind, *shape, dtype)
        check(logits, target, impl, "mean", prior=prior)
        check(logits, target, impl, "none", threshold=0.7)
        check(logits, target, impl, "none", prior=prior, threshold=-1.5, sample_weight=weight)
        check(logits, target, impl, "mean", sample_weight=weight)
        check(logits, target, impl, "sum", sample_weight=weight, normalizer=3.5)
        if kind != "soft":  # a class may be what does not count
            check(logits, torch.where(target == -100, 0, target), impl, "none", ignore_index=0)


@pytest.mark.parametrize("shape", [(70, 3), (33, 91), (5, 5001)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_does_not_count_costs_exactly_0(impl, shape):
    """Whatever it holds: rows of weight 0, rows of ignored labels, everything where the normalizer is 0."""
    logits = make_logits(shape, torch.float32)
    weight = torch.rand(shape[0])
    weight[::3] = 0
    for kind in ("labels", "lists", "soft"):
        target = make_target(kind, *shape, torch.float32)
        uncounted = weight == 0
        if kind == "labels":
            uncounted = uncounted | (target == -100)
        options = {"sample_weight": weight, "impl": impl}
        want = multilabel_softmax_loss(logits, target, **options)
        for hole in (math.nan, math.inf):
            x = logits.masked_fill(uncounted[:, None], hole).requires_grad_(True)
            loss = multilabel_softmax_loss(x, target, **options)
            (gradient,) = torch.autograd.grad(loss, x)
            assert torch.equal(loss, want) and gradient.isfinite().all()
            assert (gradient[uncounted] == 0).all() and (gradient[~uncounted] != 0).any(dim=1).all()
        rows = multilabel_softmax_loss(x, target, reduction="none", **options)
        assert (rows[uncounted] == 0).all() and (rows[~uncounted] > 0).all()
        for zero in (0.0, torch.tensor(0.0)):
            x = (logits * math.nan).requires_grad_(True)
            loss = multilabel_softmax_loss(x, target, normalizer=zero, impl=impl)
            assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize("shape", [(40, 7), (3, 5001), (3, 20001)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_extreme_logits(impl, dtype, shape):
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
        x = logits.clone().requires_grad_(True)
        loss = multilabel_softmax_loss(x, target, reduction="none", impl=impl)
        (found,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isfinite().all() and found.isfinite().all()
        torch.testing.assert_close(loss.double(), value.detach(), rtol=3e-6, atol=1e-6 if dtype == torch.float32 else 0)
        # each entry by its own size: where a positive is far above, nothing is left of the others but what they are
        torch.testing.assert_close(found.double(), gradient, rtol=2e-5, atol=1e-30)


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


@pytest.mark.parametrize("shape", [(40, 7), (3, 5001), (3, 20001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_classes_cost_nothing(impl, dtype, shape):
    """As if they were not there, positives and negatives alike; a row of nothing else costs 0."""
    logits = make_logits(shape, dtype)
    masked = torch.rand(shape[1]) < 0.4
    masked[0], masked[-1] = True, False
    for kind in ("bool", "soft"):
        target = make_target(kind, *shape, dtype)
        x = logits.masked_fill(masked, -math.inf).requires_grad_(True)
        loss = multilabel_softmax_loss(x, target, reduction="none", impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        upstream = torch.ones(shape[0], dtype=torch.float64)
        function = multilabel_oracle.multilabel_softmax
        exact = {"target": target[:, ~masked], "reduction": "none"}
        value, want = oracle.loss_and_gradient(logits[:, ~masked], upstream, function, **exact)
        assert (gradient[:, masked] == 0).all()
        compare(loss.detach(), gradient[:, ~masked], value, want)
        x = torch.full(shape, -math.inf, dtype=dtype, requires_grad=True)
        loss = multilabel_softmax_loss(x, target, prior=0.5 * torch.rand(shape[1]) + 0.1, reduction="sum", impl=impl)
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forms_of_the_same_labels_agree(impl, dtype):
    """bool and floating point to the bit; lists, whose positives are summed in their order, with duplicates or not."""
    logits = make_logits((33, 91), dtype)
    lists = torch.randint(91, (33, 5))
    lists = torch.where(torch.rand(33, 5) < 0.3, -100, lists)
    dense = multilabel_oracle.one_hot(lists, 91, -100).bool()
    forms = (dense, dense.to(dtype), dense.float(), lists, torch.cat([lists, lists], dim=1).flip(1).int())
    results = []
    for target in forms:
        x = logits.clone().requires_grad_(True)
        loss = multilabel_softmax_loss(x, target, reduction="sum", impl=impl)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for loss, gradient in results[1:3]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
    for found in results[3:]:
        rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 2e-6)
        torch.testing.assert_close(found, results[0], rtol=rounding, atol=1e-6)


LAYOUTS = {
    "rows": (1, lambda x: x),
    "some columns": (1, lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]]),
    "classes first": (0, lambda x: x.t().contiguous()),
    "one row": (0, lambda x: x[0]),
    "images": (1, lambda x: x.reshape(3, 11, 91).transpose(1, 2).contiguous()),
    "channels last": (1, lambda x: x.reshape(3, 11, 91).transpose(1, 2)),
    "sequences": (-1, lambda x: x.reshape(3, 11, 91)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layouts(impl, dtype, layout, inplace):
    class_dim, as_layout = LAYOUTS[layout]
    rows = make_logits((33, 91), dtype)
    given = as_layout(rows)
    if layout == "one row":
        rows = rows[:1]
    rows_shape = given.movedim(class_dim, -1).shape[:-1]
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
            leaf = given.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
            options = {"sample_weight": None if weight is None else weight.reshape(rows_shape), "impl": impl}
            options |= {"class_dim": class_dim, "reduction": reduction}
            if inplace and layout in ("classes first", "images"):
                with pytest.raises(ValueError, match="inplace=True needs an input that can be seen as"):
                    multilabel_softmax_loss(leaf * 1, shaped, inplace=True, **options)
                continue
            x = leaf * 1 if inplace else leaf
            loss = multilabel_softmax_loss(x, shaped, inplace=inplace, **options)
            up = upstream.reshape(rows_shape) if reduction == "none" else upstream
            (found,) = torch.autograd.grad(loss, leaf, up.to(loss.dtype))
            loss = loss.detach().reshape(-1) if reduction == "none" else loss.detach()
            compare(loss, found.movedim(class_dim, -1).reshape(-1, 91), value, gradient)


@pytest.mark.parametrize("impl", KERNELS)
def test_in_place_takes_the_logits_memory(impl):
    leaf = make_logits((33, 91), torch.float32).requires_grad_(True)
    x = leaf * 1
    loss = multilabel_softmax_loss(x, make_target("bool", 33, 91, torch.float32), inplace=True, impl=impl)
    held = x.detach().clone()
    loss.backward()
    assert torch.equal(held, leaf.grad) and not torch.equal(held, leaf.detach())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_rows_bits_are_its_own(impl):
    for shape in ((300, 7), (5, 5001), (3, 20001)):
        logits, target = make_logits(shape, torch.float32), make_target("lists", *shape, torch.float32)
        together = multilabel_softmax_loss(logits, target, reduction="none", impl=impl)
        for row in (0, 1, shape[0] // 2, shape[0] - 1):
            alone = multilabel_softmax_loss(logits[row : row + 1], target[row : row + 1], reduction="none", impl=impl)
            assert torch.equal(alone[0], together[row])


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


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_labels_out_of_range(impl, monkeypatch):
    """They raise where they can be read; else a class label makes its row NaN, and one of a list is left out."""
    x = torch.randn(3, 4)
    wrong = (
        (torch.tensor([0, 5, 1]), r"target 5 is out of bounds.*\[0, 4\].*background"),
        (torch.tensor([0, -1, 1]), "target -1 is out of bounds"),
        (torch.tensor([[0, 4, 1], [3, -1, 1], [0, 9, 9]]), r"target 4 is out of bounds.*\[0, 3\]"),
    )
    for target, message in wrong:
        with pytest.raises(IndexError, match=message):
            multilabel_softmax_loss(x, target, impl=impl)
    if impl == "cpu":
        return
    monkeypatch.setattr(labels, "may_read_values", lambda logits: False)  # as on a GPU
    for target, _ in wrong[:2]:
        leaf = x.clone().requires_grad_(True)
        losses = multilabel_softmax_loss(leaf, target, reduction="none", impl=impl)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert losses.isnan().tolist() == [False, True, False]
        assert gradient.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]
        leaf = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(multilabel_softmax_loss(leaf, target, impl=impl), leaf)
        rest = x[[0, 2]].requires_grad_(True)  # the wrong row is not in the divisor
        (want,) = torch.autograd.grad(multilabel_softmax_loss(rest, target[[0, 2]], impl=impl), rest)
        torch.testing.assert_close(gradient[[0, 2]], want)
    losses = multilabel_softmax_loss(x, wrong[2][0], reduction="none", impl=impl)
    right = torch.tensor([[0, -100, 1], [3, -100, 1], [0, -100, -100]])
    torch.testing.assert_close(losses, multilabel_softmax_loss(x, right, reduction="none", impl=impl))


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
    """Schemas, fakes and autograd's registration, by torch's own checks."""
    namespace = kernels(impl)
    logits, lists = torch.randn(6, 5), torch.tensor([[0, 3], [2, -100]] * 3)
    for reduction in ("mean", "none"):
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
