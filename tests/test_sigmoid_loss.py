"""The table of the sigmoid family: objectives x implementation x dtype x layout x labels, against a literal oracle."""

import math

import oracle
import pytest
import sigmoid_oracle
import torch
from implementations import IMPLEMENTATIONS
from test_softmax_loss import DTYPES, GRADIENT_TOLERANCE, VALUE_TOLERANCE

from imbalance_kernels.binary_objectives import BINARY_REGISTRY
from imbalance_kernels.functional import sigmoid_loss
from imbalance_kernels.ops import labels

SHAPES = {
    (1, 1): "one logit",
    (257, 1): "binary classification: rows narrower than a vector",
    (70, 3): "many rows to a block",
    (33, 91): "vectors and a remainder",
    (2, 5001): "pieces of rows",
}

TARGETS = {
    "labels": "(N,), the background among them, and ignored ones",
    "lists": "(N, 3), padded",
    "bool": "dense and hard",
    "float": "dense, hard",
    "soft": "dense, from 0 to 1, the ends among them",
}


def make_target(kind, num_rows, num_classes, dtype):
    """Targets as users have them: mostly negative."""
    if kind == "labels":
        target = torch.randint(num_classes + 1, (num_rows,))
        target[num_rows // 2 :: 5] = -100 if num_rows > 1 else 0
        return target
    if kind == "lists":
        target = torch.randint(num_classes, (num_rows, 3 if num_classes != 3 else 4))
        return torch.where(torch.rand(target.shape) < 0.5, target, -100)
    hard = torch.rand(num_rows, num_classes) < 0.2
    if kind == "bool":
        return hard
    if kind == "float":
        return hard.to(dtype)
    soft = torch.rand(num_rows, num_classes)
    return torch.where(soft < 0.4, 0.0, torch.where(soft > 0.9, 1.0, soft)).to(dtype)


def make_logits(shape, dtype):
    """Sure and unsure, but not where a loss begins: p = 0.05, the clip of asymmetric loss, and p = 0.5."""
    x = torch.randn(shape) * 3
    for beginning in (-2.944, 0.0):
        x = torch.where((x - beginning).abs() < 0.05, x + 0.1, x)
    return x.to(dtype)


def check(logits, target, impl, reduction, ours, exact, device="cpu"):
    """Compare value and gradient under a random upstream gradient; the oracle stays on CPU, with rows."""
    upstream = torch.randn(logits.shape if reduction == "none" else (), dtype=torch.float64)
    value, gradient = oracle.loss_and_gradient(
        logits, upstream, function=sigmoid_oracle.loss, target=target, reduction=reduction, **exact
    )
    x = logits.to(device, copy=True).requires_grad_(True)
    loss = sigmoid_loss(x, target.to(device), impl=impl, reduction=reduction, **ours)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    (found,) = torch.autograd.grad(loss, x, upstream.to(device, loss.dtype))
    compare(loss.detach().cpu(), found.cpu(), value, gradient)


def compare(loss, found, value, gradient):
    """Compare with float64 what was found in another dtype, a gradient row by row; of one class it is one row."""
    dtype = found.dtype
    if found.shape[1] == 1:
        found, gradient = found.T, gradient.T
    size = value.abs().max().clamp_min(1e-3)
    assert loss.shape == value.shape
    assert float((loss.double() - value).abs().max() / size) <= VALUE_TOLERANCE[dtype]
    if dtype == torch.float16:  # denormals: absolute spacing 2^-24
        tiny = gradient.abs().amax(dim=1, keepdim=True) < 2.0**-13
        assert float((found.double() - gradient).abs().masked_fill(~tiny, 0).max()) <= 2.0**-24
        found, gradient = found.masked_fill(tiny, 0), gradient.masked_fill(tiny, 0)
    assert oracle.worst_row_error(found, gradient) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BINARY_REGISTRY)
def test_objective(name, impl, dtype, shape):
    logits = make_logits(shape, dtype)
    objective = BINARY_REGISTRY[name]()
    exact = {"objective": name, "parameters": objective.parameters()}
    for kind in TARGETS:
        for reduction in ("mean", "none"):
            check(logits, make_target(kind, *shape, dtype), impl, reduction, {"objective": objective}, exact)


def _vector(num_classes):
    return 0.2 + 0.6 * torch.rand(num_classes)


OPTIONS = {
    "alpha": lambda c: {"alpha": 0.25},
    "alpha of each class": lambda c: {"alpha": _vector(c)},
    "weight": lambda c: {"weight": 3 * _vector(c)},
    "pos_weight": lambda c: {"pos_weight": 3 * _vector(c)},
    "prior": lambda c: {"prior": _vector(c)},
    "everything": lambda c: {
        "alpha": _vector(c),
        "weight": 3 * _vector(c),
        "pos_weight": 3 * _vector(c),
        "prior": _vector(c),
    },
}


@pytest.mark.parametrize("shape", [(257, 1), (33, 91), (2, 5001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, impl, dtype, shape):
    logits = make_logits(shape, dtype)
    options = OPTIONS[option](shape[1])
    cases = (("focal", "labels", "mean"), ("cross_entropy", "soft", "none"), ("gce", "lists", "sum"))
    for name, kind, reduction in cases:
        objective = BINARY_REGISTRY[name]()
        exact = {"objective": name, "parameters": objective.parameters(), **options}
        check(logits, make_target(kind, *shape, dtype), impl, reduction, {"objective": objective, **options}, exact)


@pytest.mark.parametrize("of_logits", [False, True], ids=["rows", "logits"])
@pytest.mark.parametrize("shape", [(257, 1), (33, 91), (2, 5001)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sample_weight_and_normalizer(impl, shape, of_logits):
    """What has weight 0 costs exactly 0, whatever it holds."""
    logits = make_logits(shape, torch.float32)
    weight = torch.rand(shape if of_logits else shape[:1])
    weight = torch.where(weight < 0.3, 0.0, weight)
    for kind in ("labels", "soft"):
        target = make_target(kind, *shape, torch.float32)
        options = {"sample_weight": weight}
        for reduction in ("none", "mean"):
            check(logits, target, impl, reduction, options, options)
        options = {"sample_weight": weight, "normalizer": 3.5}
        check(logits, target, impl, "sum", options, options)
        holes = torch.where(weight == 0, math.nan, 1.0)
        x = (logits * (holes if of_logits else holes[:, None])).requires_grad_(True)
        loss = sigmoid_loss(x, target, sample_weight=weight, impl=impl)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[x.isnan()] == 0).all()
        for zero in (0.0, torch.tensor(0.0)):
            x = (logits * math.nan).requires_grad_(True)
            loss = sigmoid_loss(x, target, normalizer=zero, impl=impl)
            assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


GAMMAS = [
    (name, gamma)
    for name in ("focal", "poly_focal", "quality_focal", "varifocal", "asymmetric")
    for gamma in (0.0, 0.25, 0.5, 1.0, 1.5, 3.0, 5.0, 9.0)
    if name != "quality_focal" or gamma >= 1  # below it raises
]


@pytest.mark.parametrize("name, gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gammas(impl, dtype, name, gamma):
    """Powers that are products, a root, and neither."""
    logits = make_logits((33, 21), dtype)
    objective = BINARY_REGISTRY[name](gamma)
    exact = {"objective": name, "parameters": objective.parameters()}
    for kind in ("labels", "soft"):
        check(logits, make_target(kind, 33, 21, dtype), impl, "sum", {"objective": objective}, exact)


@pytest.mark.parametrize("shape", [(257, 1), (33, 91), (2, 5001)], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["focal", "poly_focal"])
def test_gamma_of_each_class(name, impl, shape):
    gamma = torch.linspace(0, 3, shape[1])
    logits = make_logits(shape, torch.float32)
    objective = BINARY_REGISTRY[name](gamma)
    exact = {"objective": name, "parameters": objective.parameters()}
    for kind in ("labels", "soft"):
        check(logits, make_target(kind, *shape, torch.float32), impl, "none", {"objective": objective}, exact)


LAYOUTS = {
    "images": lambda x: x,
    "wider images": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "some classes": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "other images": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_channels_first(impl, dtype, layout, inplace):
    """(B, C, H, W) logits are read as they lie, and give what (B * H * W, C) rows give."""
    shape = (2, 5, 7, 9)
    images = LAYOUTS[layout](make_logits(shape, dtype))
    if inplace and layout == "wider images":  # no (B, C, P) without a copy
        with pytest.raises(ValueError, match="inplace=True needs an input that can be seen as"):
            sigmoid_loss(images, make_target("labels", 126, 5, dtype).view(2, 7, 9), inplace=True, impl=impl)
        return
    rows = images.movedim(1, -1).reshape(-1, 5)
    num_rows = rows.shape[0]
    options = OPTIONS["everything"](5)
    objective = BINARY_REGISTRY["focal"]()
    exact = {"objective": "focal", "parameters": objective.parameters(), **options}

    def as_image(tensor, width):
        return tensor.reshape(2, 7, 9, *width).movedim(-1, 1) if width == (5,) else tensor.reshape(2, 7, 9, *width)

    for kind in TARGETS:
        target = make_target(kind, num_rows, 5, dtype)
        dense = kind not in ("labels", "lists")
        given = as_image(target, target.shape[1:]) if dense or kind == "labels" else target.reshape(2, 7, 9, -1)
        for reduction, weight in (("mean", None), ("none", torch.rand(num_rows)), ("sum", torch.rand(num_rows, 5))):
            upstream = torch.randn(rows.shape if reduction == "none" else (), dtype=torch.float64)
            call = {"target": target, "reduction": reduction, "sample_weight": weight, **exact}
            value, gradient = oracle.loss_and_gradient(rows, upstream, function=sigmoid_oracle.loss, **call)
            leaf = images.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
            x = leaf if not inplace else leaf * 1
            loss = sigmoid_loss(
                x,
                given,
                objective,
                reduction=reduction,
                inplace=inplace,
                impl=impl,
                sample_weight=None if weight is None else as_image(weight, weight.shape[1:]),
                **options,
            )
            up = as_image(upstream, (5,)) if reduction == "none" else upstream
            (found,) = torch.autograd.grad(loss, leaf, up.to(loss.dtype))
            loss = loss.detach().movedim(1, -1).reshape(-1, 5) if reduction == "none" else loss.detach()
            compare(loss, found.movedim(1, -1).reshape(-1, 5), value, gradient)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_rows(impl):
    wide = make_logits((33, 40), torch.float32)
    target = make_target("labels", 33, 21, torch.float32)
    objective = BINARY_REGISTRY["focal"]()
    exact = {"objective": "focal", "parameters": objective.parameters()}
    for narrow in (wide[:, :21], wide[:, 3:24], wide.t().contiguous().t()[:, :21]):
        check(narrow, target, impl, "mean", {"objective": objective}, exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_focal_is_finite_where_torchvisions_is_not(impl, gamma):
    """torchvision's gradient is NaN at gamma 0.5 from x = 17 on, where 1 - p_t is 0 in float32."""
    x = torch.cat([torch.linspace(-120, 120, 241), torch.tensor([1e4, -1e4])])
    for y in (torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 0.5)):
        logits = x.clone().requires_grad_(True)
        loss = sigmoid_loss(logits, y, BINARY_REGISTRY["focal"](gamma), reduction="none", impl=impl)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and gradient.isfinite().all()
        exact = x.double().requires_grad_(True)
        value = sigmoid_loss(exact, y.double(), BINARY_REGISTRY["focal"](gamma), reduction="none", impl="reference")
        (slope,) = torch.autograd.grad(value.sum(), exact)
        tiny = torch.finfo(torch.float32).tiny * 200
        torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=tiny)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=tiny)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_zero_initialised_head_trains_with_hard_truncation(impl):
    """p = 0.5 exactly is at the threshold, where the weight is half: without it nothing would ever move."""
    x = torch.zeros(4, 3, requires_grad=True)
    loss = sigmoid_loss(x, torch.tensor([0, 3, 2, 3]), BINARY_REGISTRY["hard_truncation"](), reduction="sum", impl=impl)
    loss.backward()
    expected = torch.full((4, 3), 0.25)
    expected[0, 0] = expected[2, 2] = -0.25
    assert torch.equal(x.grad, expected) and float(loss.detach()) == pytest.approx(12 * 0.5 * math.log(2))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_there(impl):
    """No rows, no classes, or nothing valid: the mean is NaN with a gradient of 0, a normalizer of 0 gives 0."""
    for shape, target in (
        ((0, 4), torch.zeros(0, dtype=torch.long)),
        ((3, 0), torch.zeros(3, dtype=torch.long)),
        ((3, 4), torch.full((3,), -100)),
    ):
        x = torch.randn(shape, requires_grad=True)
        loss = sigmoid_loss(x, target, impl=impl)
        assert loss.isnan() and (torch.autograd.grad(loss, x)[0] == 0).all()
        loss = sigmoid_loss(x, target, normalizer=0, impl=impl)
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_labels_out_of_range(impl, monkeypatch):
    """They raise where they can be read, else their rows are NaN."""
    x = torch.randn(3, 4)
    wrong = (
        (torch.tensor([0, 5, 1]), r"target 5 is out of bounds.*\[0, 4\].*background"),
        (torch.tensor([0, -1, 1]), "target -1 is out of bounds"),
        (torch.tensor([[0, 1, 1], [0, 4, 1], [2, -100, -100]]), r"target 4 is out of bounds.*\[0, 3\]"),
    )
    for target, message in wrong:
        with pytest.raises(IndexError, match=message):
            sigmoid_loss(x, target, impl=impl)
    if impl == "cpu":
        return
    monkeypatch.setattr(labels, "may_read_values", lambda logits: False)  # as on a GPU
    for target, _ in wrong:
        for leaf, given in ((x.clone(), target), (x.t()[None].contiguous(), target[None])):
            loss = sigmoid_loss(leaf.requires_grad_(), given, reduction="none", impl=impl)
            (gradient,) = torch.autograd.grad(loss, leaf, torch.randn_like(loss))
            for found in (loss, gradient):
                rows = found if leaf.dim() == 2 else found[0].t()
                assert rows.isnan().tolist() == [[False] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_rows_bits_are_its_own(impl):
    """The same alone, among others, and whatever these hold."""
    logits, target = make_logits((300, 7), torch.float32), make_target("labels", 300, 7, torch.float32)
    options = {"objective": BINARY_REGISTRY["focal"](0.7), "reduction": "none", "impl": impl}
    together = sigmoid_loss(logits, target, **options)
    for row in (0, 1, 150, 299):
        alone = sigmoid_loss(logits[row : row + 1], target[row : row + 1], **options)
        assert torch.equal(alone[0], together[row])
