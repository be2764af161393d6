"""The table: registry x implementation x dtype x shape, every option, against the literal float64 oracle."""

import oracle
import pytest
import torch
from implementations import IMPLEMENTATIONS
from oracle import worst_row_error

import imbalance_kernels as ik
from imbalance_kernels.functional import softmax_loss
from imbalance_kernels.objectives import REGISTRY

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

SHAPES = {
    (1, 2): "one row, two classes: the binary case",
    (70, 3): "more rows than a tile, fewer classes than a vector of any instruction set",
    (5, 16): "one whole AVX-512 vector",
    (33, 91): "vectors, unrolled and not, and a remainder",
    (3, 4096): "exactly one block",
    (2, 4097): "a block and one class",
    (2, 9001): "blocks and a remainder: one shift per block",
}

# Errors relative to the size of what is compared; the gradient of a half is rounded once more where upstream is not
# one.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 8.5e-3, torch.float16: 1.1e-3}


def make_case(shape, dtype, cosines=False):
    """Random logits with a mixture of sure and unsure rows, targets with ignored rows, and an upstream gradient."""
    num_rows, num_classes = shape
    logits = torch.randn(shape) * torch.logspace(-1, 0.8, num_rows)[:, None]
    logits = torch.tanh(logits) if cosines else logits
    target = torch.randint(num_classes, (num_rows,))
    target[num_rows // 2 :: 7] = -100 if num_rows > 1 else target[0]
    return logits.to(dtype), target


def check(logits, target, impl, reduction, ours, exact, device="cpu"):
    """Compare value and gradient under a random upstream gradient; the oracle stays on CPU."""
    shape = target.shape[:1] if reduction == "none" else ()
    upstream = torch.randn(shape, dtype=torch.float64)
    value, gradient = oracle.loss_and_gradient(logits, upstream, target=target, reduction=reduction, **exact)
    x = logits.to(device, copy=True).requires_grad_(True)
    loss = softmax_loss(x, target.to(device), impl=impl, reduction=reduction, **ours)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    (found,) = torch.autograd.grad(loss, x, upstream.to(device, loss.dtype))
    loss, found = loss.detach().cpu(), found.cpu()
    size = value.abs().max().clamp_min(1e-3)
    assert float((loss.double() - value).abs().max() / size) <= VALUE_TOLERANCE[logits.dtype]
    assert found.dtype == logits.dtype
    tiny = gradient.abs().amax(dim=1, keepdim=True) < 2.0**-13 if logits.dtype == torch.float16 else None
    if tiny is not None:  # float16 denormals: absolute spacing 2^-24
        assert float((found.double() - gradient).abs().masked_fill(~tiny, 0).max()) <= 2.0**-24
        found, gradient = found.masked_fill(tiny, 0), gradient.masked_fill(tiny, 0)
    assert worst_row_error(found, gradient) <= GRADIENT_TOLERANCE[logits.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", REGISTRY)
def test_objective(name, impl, dtype, shape):
    logits, target = make_case(shape, dtype)
    objective = REGISTRY[name]()
    for reduction in ("mean", "none"):
        exact = {"objective": name, "parameters": objective.parameters()}
        check(logits, target, impl, reduction, {"objective": objective}, exact)


def _vector(num_classes, low=0.5):
    return low + torch.rand(num_classes)


def _prior(num_classes):
    counts = torch.logspace(0, 6, num_classes, dtype=torch.float64).round()
    return (counts / counts.sum()).float()


OPTIONS = {
    "prior": lambda c: {"prior": _prior(c)},
    "weight": lambda c: {"weight": _vector(c)},
    "factor and negative scale": lambda c: {"factor": _vector(c), "scale": -1.7},
    "softcap": lambda c: {"softcap": 5.0},
    "margin": lambda c: {"margin": 0.35, "scale": 3.0},
    "class margins": lambda c: {"margin": _vector(c, 0.0)},
    "smoothing": lambda c: {"label_smoothing": 0.2},
    "smoothing of all": lambda c: {"label_smoothing": 1.0, "weight": _vector(c)},
    "weighted smoothing": lambda c: {"label_smoothing": 0.1, "weight": _vector(c), "prior": _prior(c)},
    "z-loss": lambda c: {"z_loss": 0.01},
    "everything": lambda c: {
        "prior": _prior(c),
        "weight": _vector(c),
        "factor": _vector(c),
        "scale": 1.3,
        "softcap": 6.0,
        "margin": _vector(c, 0.0),
        "label_smoothing": 0.1,
        "z_loss": 0.001,
    },
}


@pytest.mark.parametrize("shape", [(33, 91), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, impl, dtype, shape):
    logits, target = make_case(shape, dtype)
    options = OPTIONS[option](shape[1])
    for name, reduction in (("cross_entropy", "mean"), ("focal", "none"), ("focal", "mean")):
        objective = REGISTRY[name]()
        exact = {"objective": name, "parameters": objective.parameters(), **options}
        check(logits, target, impl, reduction, {"objective": objective, **options}, exact)


@pytest.mark.parametrize("shape", [(33, 91), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("margin", ["arc", "circle"])
def test_margins_on_cosines(margin, impl, dtype, shape):
    logits, target = make_case(shape, dtype, cosines=True)
    logits = logits * 0.9  # the oracle's arc cosine is ill-conditioned at 1, and theta + m stays below pi
    ours = ik.AngularMargin(m2=0.4) if margin == "arc" else ik.logit_map.CircleMargin(0.25)
    exact = {"margin": (margin, 0.4 if margin == "arc" else 0.25), "scale": 8.0}
    for reduction in ("sum", "none"):
        check(logits, target, impl, reduction, {"margin": ours, "scale": 8.0}, exact)


@pytest.mark.parametrize("shape", [(33, 91), (2, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", ["plain", "prior", "softcap", "weighted smoothing", "z-loss"])
def test_class_probabilities(option, impl, dtype, shape):
    logits, _ = make_case(shape, dtype)
    target = torch.softmax(torch.randn(shape), dim=1).to(dtype)
    options = {} if option == "plain" else OPTIONS[option](shape[1])
    for reduction in ("mean", "none"):
        check(logits, target, impl, reduction, options, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_of_rows_and_normalizer(impl, dtype):
    logits, target = make_case((33, 91), dtype)
    for options in (
        {"sample_weight": torch.rand(33)},
        {"sample_weight": torch.rand(33), "weight": _vector(91), "label_smoothing": 0.1, "z_loss": 0.01},
        {"sample_weight": torch.rand(33), "normalizer": 7.0},
    ):
        check(logits, target, impl, "mean", options, options)
        check(logits, target, impl, "sum", options, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["focal", "poly_focal"])
def test_gamma_per_class(name, impl, dtype):
    logits, target = make_case((33, 91), dtype)
    gamma = torch.linspace(0, 4, 91)
    second = () if name == "focal" else (0.5,)
    exact = {"objective": name, "parameters": (gamma, *second)}
    for reduction in ("mean", "none"):
        check(logits, target, impl, reduction, {"objective": REGISTRY[name](gamma, *second)}, exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["softmax_neg", "one_minus_softmax"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_temperatures(form, impl, reduction):
    logits, target = make_case((33, 91), torch.float64)
    sharpness, prior = 1.5, _prior(91)

    def literal(x, target, reduction):
        keep = target != -100
        z = (x + torch.log(prior.double()))[keep]
        t = target[keep][:, None]
        other = torch.softmax(-sharpness * z, 1) if form == "softmax_neg" else 1 - torch.softmax(sharpness * z, 1)
        kept = -(other * torch.log_softmax(z, 1)).gather(1, t).squeeze(1)
        rows = torch.zeros(len(x), dtype=torch.float64).masked_scatter(keep, kept)
        return rows if reduction == "none" else rows.sum() / keep.sum()

    upstream = torch.randn((33,) if reduction == "none" else (), dtype=torch.float64)
    value, gradient = oracle.loss_and_gradient(logits, upstream, literal, target=target, reduction=reduction)
    x = logits.clone().requires_grad_(True)
    module = ik.SoftTruncationLoss(sharpness, form, prior=prior, impl=impl, reduction=reduction)
    loss = module(x, target)
    (found,) = torch.autograd.grad(loss, x, upstream)
    torch.testing.assert_close(loss.detach(), value, rtol=1e-10, atol=1e-13)
    assert worst_row_error(found, gradient) < 1e-10
