"""The table: registry x implementation x dtype x shape, every option, against the literal float64 oracle."""

import math

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
    # channels first
    (1, 4, 1, 3): "fewer pixels than a vector",
    (5, 3, 1, 21): "vectors of more than one image's pixels",
    (2, 19, 7, 41): "more pixels than a tile, which ends within an image and a vector",
    (1, 2000, 1, 37): "so many classes that a tile has few pixels, the fewest in float64",
    (1, 9001, 1, 2): "classes that do not fit beside one another: blocks, swept twice",
}
OF_OPTIONS = [(33, 91), (2, 9001), (3, 19, 2, 25), (1, 9001, 1, 2)]

# Errors relative to the size of what is compared; the gradient of a half is rounded once more where upstream is not
# one.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 8.5e-3, torch.float16: 1.1e-3}


def rows_of(shape):
    """(N, C) of a shape (N, C), or (N, C, d1, ...) with a row for each pixel."""
    return math.prod((shape[0], *shape[2:])), shape[1]


def as_images(x, shape):
    """(N, C) or (N,) as (N, C, d1, ...) or (N, d1, ...), contiguous; other things are left alone."""
    if len(shape) == 2 or not isinstance(x, torch.Tensor) or x.shape[:1] != rows_of(shape)[:1]:
        return x
    images = x.reshape(shape[0], *shape[2:], *x.shape[1:])
    return images.movedim(-1, 1).contiguous() if x.dim() == 2 else images


def make_case(shape, dtype, cosines=False):
    """Rows of random logits, sure and unsure ones, and targets with ignored rows."""
    num_rows, num_classes = rows_of(shape)
    logits = torch.randn(num_rows, num_classes) * torch.logspace(-1, 0.8, num_rows)[:, None]
    logits = torch.tanh(logits) if cosines else logits
    target = torch.randint(num_classes, (num_rows,))
    target[num_rows // 2 :: 7] = -100 if num_rows > 1 else target[0]
    return logits.to(dtype), target


def check(logits, target, impl, reduction, ours, exact, device="cpu", shape=(0, 0)):
    """Compare value and gradient of rows under a random upstream gradient; the oracle stays on CPU.

    They are given to the loss in `shape` where that is (N, C, d1, ...).
    """
    upstream = torch.randn(target.shape[:1] if reduction == "none" else (), dtype=torch.float64)
    value, gradient = oracle.loss_and_gradient(logits, upstream, target=target, reduction=reduction, **exact)
    x = as_images(logits, shape).to(device, copy=True).requires_grad_(True)
    ours = {name: as_images(option, shape) if name == "sample_weight" else option for name, option in ours.items()}
    loss = softmax_loss(x, as_images(target, shape).to(device), impl=impl, reduction=reduction, **ours)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    (found,) = torch.autograd.grad(loss, x, as_images(upstream, shape).to(device, loss.dtype))
    loss, found = loss.detach().cpu().reshape(value.shape), found.cpu().movedim(1, -1).reshape(logits.shape)
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
        check(logits, target, impl, reduction, {"objective": objective}, exact, shape=shape)


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


@pytest.mark.parametrize("shape", OF_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, impl, dtype, shape):
    logits, target = make_case(shape, dtype)
    options = OPTIONS[option](shape[1])
    for name, reduction in (("cross_entropy", "mean"), ("focal", "none"), ("focal", "mean")):
        objective = REGISTRY[name]()
        exact = {"objective": name, "parameters": objective.parameters(), **options}
        check(logits, target, impl, reduction, {"objective": objective, **options}, exact, shape=shape)


@pytest.mark.parametrize("shape", OF_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("margin", ["arc", "circle"])
def test_margins_on_cosines(margin, impl, dtype, shape):
    logits, target = make_case(shape, dtype, cosines=True)
    logits = logits * 0.9  # the oracle's arc cosine is ill-conditioned at 1, and theta + m stays below pi
    ours = ik.AngularMargin(m2=0.4) if margin == "arc" else ik.logit_map.CircleMargin(0.25)
    exact = {"margin": (margin, 0.4 if margin == "arc" else 0.25), "scale": 8.0}
    for reduction in ("sum", "none"):
        check(logits, target, impl, reduction, {"margin": ours, "scale": 8.0}, exact, shape=shape)


@pytest.mark.parametrize("shape", OF_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", ["plain", "prior", "softcap", "weighted smoothing", "z-loss"])
def test_class_probabilities(option, impl, dtype, shape):
    logits, _ = make_case(shape, dtype)
    target = torch.softmax(torch.randn(logits.shape), dim=1).to(dtype)
    options = {} if option == "plain" else OPTIONS[option](shape[1])
    for reduction in ("mean", "none"):
        check(logits, target, impl, reduction, options, options, shape=shape)


@pytest.mark.parametrize("shape", [(33, 91), (2, 5, 17, 19)], ids=str)  # the pixels of more than a tile
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_of_rows_and_normalizer(impl, dtype, shape):
    logits, target = make_case(shape, dtype)
    weight = _vector(shape[1])
    sample_weight = torch.rand(target.shape)
    for options in (
        {"sample_weight": sample_weight},
        {"sample_weight": sample_weight, "weight": weight, "label_smoothing": 0.1, "z_loss": 0.01},
        {"sample_weight": sample_weight, "normalizer": 7.0},
    ):
        check(logits, target, impl, "mean", options, options, shape=shape)
        check(logits, target, impl, "sum", options, options, shape=shape)


@pytest.mark.parametrize("shape", [(33, 91), (3, 91, 1, 11)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["focal", "poly_focal"])
def test_gamma_per_class(name, impl, dtype, shape):
    logits, target = make_case(shape, dtype)
    gamma = torch.linspace(0, 4, 91)
    second = () if name == "focal" else (0.5,)
    exact = {"objective": name, "parameters": (gamma, *second)}
    for reduction in ("mean", "none"):
        check(logits, target, impl, reduction, {"objective": REGISTRY[name](gamma, *second)}, exact, shape=shape)


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
