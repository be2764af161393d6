"""What a loss returns beside itself: the targets' log-probabilities, and whether the raw logits predict the target."""

import math
from functools import partial

import oracle
import pytest
import torch
import torch._dynamo
from implementations import IMPLEMENTATIONS, KERNELS
from test_modules import LOSSES, inputs, log_p, one_hot
from test_softmax_loss import OPTIONS, SHAPES, as_images, make_case
from torch import Tensor

import imbalance_kernels as ik
from imbalance_kernels import functional as F
from imbalance_kernels.objectives import REGISTRY
from imbalance_kernels.ops.kernel_arguments import loss_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SoftmaxOptions

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
FLAGS = {"return_log_probs": True, "return_correct": True}
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("impl", KERNELS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def assert_log_probs(found: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """Compare log-probabilities (N,), each relative to its own size where that is above one."""
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not found.requires_grad
    assert found.shape == right.shape
    error = (found.double() - right).abs() / right.abs().clamp_min(1)
    assert float(error.max()) <= TOLERANCE[dtype]


def mixed_case(shape, dtype):
    """Rows of random logits, half of whose targets are the highest or tie with it."""
    logits, target = make_case(shape, dtype)
    classes = torch.arange(target.shape[0])
    highest = logits.double().amax(dim=1).to(dtype)
    valid = target != -100
    chosen = valid & (classes % 2 == 0)
    logits[classes[chosen], target[chosen]] = highest[chosen]
    return logits, target


def value_and_gradient(loss, x: Tensor, target: Tensor, **call):
    """What a loss returns on logits made of a leaf, and the leaf's gradient for a random upstream gradient."""
    leaf = x.clone().requires_grad_()
    output = loss(leaf * 1, target, **call)
    value = output.loss if isinstance(output, ik.LossOutput) else output
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value.dtype)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    return output, value.detach(), gradient


# ---------------------------------------------------------------- values


@each_impl
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, impl):
    """Against the oracle, in rows and channels-first, with all that is asked for and with one of it."""
    logits, target = mixed_case(shape, dtype)
    log_probs, correct = oracle.log_probs(logits, target), oracle.correct(logits, target)
    if len(target) > 4:
        assert correct.any() and not correct.all()
    images, targets = as_images(logits, shape), as_images(target, shape)
    for reduction in REDUCTIONS:
        found = F.cross_entropy(images, targets, reduction=reduction, impl=impl, **FLAGS)
        assert found.log_probs.shape == found.correct.shape == targets.shape
        assert_log_probs(found.log_probs.flatten(), log_probs, dtype)
        assert found.correct.dtype == torch.bool and torch.equal(found.correct.flatten(), correct)
        for name, other in (("log_probs", "correct"), ("correct", "log_probs")):
            alone = F.cross_entropy(images, targets, reduction=reduction, impl=impl, **{f"return_{name}": True})
            assert isinstance(alone, ik.LossOutput) and getattr(alone, other) is None
            assert torch.equal(getattr(alone, name), getattr(found, name))


@each_impl
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", [(33, 91), (2, 9001), (3, 19, 2, 25), (1, 9001, 1, 2)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_effective_and_raw_logits(option, shape, dtype, impl):
    """Log-probabilities follow prior, margin, scale and cap, and neither weights nor smoothing; `correct` none."""
    logits, target = mixed_case(shape, dtype)
    options = OPTIONS[option](shape[1])
    maps = ("scale", "factor", "prior", "softcap", "margin")
    log_probs = oracle.log_probs(logits, target, **{name: options[name] for name in maps if name in options})
    found = F.softmax_loss(
        as_images(logits, shape), as_images(target, shape), REGISTRY["focal"](), **options, impl=impl, **FLAGS
    )
    assert_log_probs(found.log_probs.flatten(), log_probs, dtype)
    assert torch.equal(found.correct.flatten(), oracle.correct(logits, target))


@each_impl
@pytest.mark.parametrize("margin", ["arc", "circle"])
@pytest.mark.parametrize("shape", [(33, 91), (3, 19, 2, 25)], ids=str)
def test_margins_on_cosines(shape, margin, impl):
    logits, target = make_case(shape, torch.float32, cosines=True)
    logits = logits * 0.9
    ours = ik.AngularMargin(m2=0.4) if margin == "arc" else ik.logit_map.CircleMargin(0.25)
    right = oracle.log_probs(logits, target, margin=(margin, 0.4 if margin == "arc" else 0.25), scale=8.0)
    images, targets = as_images(logits, shape), as_images(target, shape)
    found = F.softmax_loss(images, targets, margin=ours, scale=8.0, impl=impl, **FLAGS)
    assert_log_probs(found.log_probs.flatten(), right, torch.float32)
    assert torch.equal(found.correct.flatten(), oracle.correct(logits, target))


# What a map makes equal, or turns round, is still told apart in the raw logits.
MAPS = {
    "softcap": {"softcap": 1.0},
    "scale": {"scale": 0.5},
    "negative scale": {"scale": -2.0},
    "zero scale": {"scale": 0.0},
    "prior": {"prior": torch.tensor([0.998, 0.001, 0.001])},
    "factor": {"factor": torch.tensor([0.0, 0.0, 0.0])},
    "margin": {"margin": 1e5},
    "plain": {},
}


@each_impl
@each_dtype
@pytest.mark.parametrize("pixels", [None, 5], ids=["rows", "channels first"])
@pytest.mark.parametrize("name", MAPS)
def test_correct_goes_by_raw_logits(name, pixels, dtype, impl):
    low, high = (5e-324, 1e-323) if dtype == torch.float64 else (1e-45, 3e-45)
    low, high = (100.0, 101.0) if dtype in (torch.bfloat16, torch.float16) else (low, high)
    rows = [([low, high, low], 0), ([low, high, low], 1), ([0.0, -0.0, -1.0], 1), ([40.0, 41.0, -1.0], 0)]
    rows += [([41.0, 40.0, -1.0], 0), ([-3.0, -2.0, -1.0], 2), ([7.0, 7.0, 7.0], 2)]
    logits, target = torch.tensor([row for row, _ in rows], dtype=dtype), torch.tensor([t for _, t in rows])
    right = oracle.correct(logits, target)
    assert right.tolist() == [False, True, True, False, True, True, True]
    if pixels is not None:
        logits, target, right = (
            logits[:, :, None].repeat(1, 1, pixels),
            target[:, None].repeat(1, pixels),
            right[:, None],
        )
    found = F.softmax_loss(logits, target, **MAPS[name], impl=impl, return_correct=True)
    assert torch.equal(found.correct, right.expand_as(found.correct))


@each_impl
@each_dtype
@pytest.mark.parametrize("num_classes", [3, 37, 5000])
@pytest.mark.parametrize("channels_first", [False, True], ids=["rows", "channels first"])
def test_special_rows(channels_first, num_classes, dtype, impl):
    """Ties, masks, NaN, infinity and ignored rows: (logits at three classes, target, log p, correct)."""
    inf, nan = math.inf, math.nan
    cases = [
        ((2.0, 2.0, 1.0), 1, None, True),
        ((2.0, 2.0, 1.0), 0, None, True),
        ((-inf, 1.0, 0.0), 0, -inf, False),
        ((-inf, 1.0, 0.0), 1, None, True),
        ((1.0, nan, 0.0), 0, nan, False),
        ((1.0, nan, 0.0), 1, nan, False),
        ((nan, nan, nan), -100, 0.0, False),
        ((5.0, 1.0, 0.0), -100, 0.0, False),
        ((inf, 1.0, 0.0), 1, nan, False),
        ((inf, 1.0, 0.0), 0, 0.0, True),
    ]
    logits = torch.full((len(cases) + 2, num_classes), -20.0)
    for row, (values, *_) in enumerate(cases):
        logits[row, [0, num_classes // 2, num_classes - 1]] = torch.tensor(values)
    logits[-2] = -inf  # all masked
    logits[-1] = torch.where(torch.arange(num_classes) == 1, 1.0, -inf)  # but the target
    position = {0: 0, 1: num_classes // 2, -100: -100}
    target = torch.tensor([position[t] for _, t, *_ in cases] + [1, 1])
    log_probs = [log_p for *_, log_p, _ in cases] + [nan, 0.0]
    correct = torch.tensor([right for *_, right in cases] + [False, True])
    logits = logits.to(dtype)
    if channels_first:
        logits, target = logits.t().contiguous()[None], target[None]
    for options in ({}, {"prior": torch.full((num_classes,), 1 / num_classes)}):
        for x in (logits, logits.clone().requires_grad_()):
            found = F.cross_entropy(x, target, reduction="none", impl=impl, **options, **FLAGS)
            for row, (ours, right) in enumerate(zip(found.log_probs.flatten().tolist(), log_probs, strict=True)):
                if right is None:
                    assert math.isfinite(ours) and ours < 0, row
                else:
                    assert ours == right or (math.isnan(ours) and math.isnan(right)), (row, ours, right)
            assert torch.equal(found.correct.flatten(), correct)


@each_impl
def test_log_probs_of_sure_rows_keep_their_digits(impl):
    logits = torch.tensor([[16.0, 0.0], [0.0, 30.0], [1e4, -1e4], [-80.0, 10.0]])
    found = F.cross_entropy(logits, torch.tensor([0, 1, 1, 0]), impl=impl, return_log_probs=True)
    right = [-math.log1p(math.exp(-16)), -math.log1p(math.exp(-30)), -2e4, -90.0]
    torch.testing.assert_close(found.log_probs.double(), torch.tensor(right, dtype=torch.float64), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- the loss beside them


@each_impl
@each_reduction
@each_dtype
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("shape", [(9, 37), (2, 9001), (2, 19, 3, 7)], ids=str)
def test_loss_and_gradient_have_the_same_bits(shape, inplace, dtype, reduction, impl):
    """Whether anything is asked for or nothing; and what is asked for is of the logits, not of their gradient."""
    logits, target = mixed_case(shape, dtype)
    images, targets = as_images(logits, shape), as_images(target, shape)
    for options in ({}, {"prior": torch.softmax(torch.linspace(0, 3, shape[1]), 0), "label_smoothing": 0.1}):
        loss = ik.SoftmaxLoss(REGISTRY["focal"](), reduction=reduction, inplace=inplace, impl=impl, **options)
        right, value, gradient = value_and_gradient(loss, images, targets)
        assert isinstance(right, Tensor)
        found, value_beside, gradient_beside = value_and_gradient(loss, images, targets, **FLAGS)
        assert torch.equal(value_beside, value) and torch.equal(gradient_beside, gradient)
        assert not found.log_probs.requires_grad and not found.correct.requires_grad
        maps = {name: options[name] for name in options if name == "prior"}
        assert_log_probs(found.log_probs.flatten(), oracle.log_probs(logits, target, **maps), dtype)
        assert torch.equal(found.correct.flatten(), oracle.correct(logits, target))
        with torch.no_grad():
            without = loss(images, targets, **FLAGS)
        # By another kernel, where one only reads.
        assert_log_probs(without.log_probs.flatten(), oracle.log_probs(logits, target, **maps), dtype)
        assert torch.equal(without.correct, found.correct)


@each_impl
def test_shapes(impl):
    """Of the target's shape, whatever the logits' layout."""
    shapes = {(5,): 0, (4, 5): 1, (2, 5, 3): 1, (2, 5, 3, 2): 1, (2, 3, 5): -1, (0, 5): 1, (2, 5, 0): 1, (3, 1): 1}
    for shape, class_dim in shapes.items():
        x = torch.randn(shape)
        classes_last = x.movedim(class_dim, -1)
        target = torch.randint(shape[class_dim], classes_last.shape[:-1])
        found = F.cross_entropy(x, target, class_dim=class_dim or 1, impl=impl, **FLAGS)
        assert found.loss.shape == ()
        assert found.log_probs.shape == found.correct.shape == target.shape
        right = torch.log_softmax(classes_last.double(), -1).gather(-1, target[..., None]).squeeze(-1)
        torch.testing.assert_close(found.log_probs.double(), right, rtol=1e-6, atol=1e-6)
        flat = classes_last.reshape(target.numel(), shape[class_dim])
        assert torch.equal(found.correct.flatten(), oracle.correct(flat, target.flatten()))
    permuted = torch.randn(5, 7).t()  # rows that are copied first
    found = F.cross_entropy(permuted, torch.arange(7) % 5, impl=impl, **FLAGS)
    assert_log_probs(found.log_probs, oracle.log_probs(permuted, torch.arange(7) % 5), torch.float32)


@each_impl
@each_reduction
def test_a_normalizer_of_zero(reduction, impl):
    """Nothing counts then: as if every target were ignored."""
    if reduction == "none":
        reduction = "sum"
    x, target = torch.randn(6, 11), torch.arange(6)
    head = torch.nn.Linear(4, 11)
    for normalizer in (0.0, torch.zeros(())):
        module = ik.SoftmaxLoss(reduction=reduction, impl=impl)
        fused = module.linear(torch.randn(6, 4), head.weight, target, normalizer=normalizer, **FLAGS)
        for found in (module(x, target, normalizer=normalizer, **FLAGS), fused):
            assert found.loss == 0 and (found.log_probs == 0).all() and not found.correct.any()
    found = F.cross_entropy(x, target, normalizer=3.0, impl=impl, **FLAGS)
    assert_log_probs(found.log_probs, oracle.log_probs(x, target), torch.float32)
    images = torch.randn(2, 11, 3)
    found = F.cross_entropy(images, target.view(2, 3), normalizer=0.0, impl=impl, **FLAGS)
    assert (found.log_probs == 0).all() and not found.correct.any()


@each_impl
@pytest.mark.parametrize("name", FLAGS)
def test_class_probabilities_raise(name, impl):
    x, target = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), 1)
    head = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match=f"{name}=True needs class indices"):
        F.cross_entropy(x, target, impl=impl, **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True needs class indices"):
        ik.CrossEntropyLoss(impl=impl).linear(torch.randn(4, 3), head.weight, target, **{name: True})


@each_impl
def test_flags_are_bools(impl):
    loss, logits, target = ik.FocalLoss(impl=impl), torch.randn(2, 3), torch.tensor([0, 2])
    weight = torch.randn(3, 3)
    for name in FLAGS:
        for call in (partial(loss, logits, target), partial(loss.linear, logits, weight, target)):
            with pytest.raises(TypeError, match=f"{name} is 'yes', but it must be True or False"):
                call(**{name: "yes"})


@each_kernel
def test_class_probabilities_raise_in_the_operation(impl):
    x, target = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), 1)
    call = loss_arguments(target, SoftmaxOptions(), None, None)
    with pytest.raises(ValueError, match="log_probs and correct need class indices"):
        kernels(impl).softmax_loss(x, *call, False, True, False)
    with pytest.raises(ValueError, match="log_probs and correct need class indices"):
        kernels(impl).softmax_loss_(x, *call, False, True)


def test_names_that_are_given_in_the_wrong_place():
    with pytest.raises(TypeError, match="takes return_log_probs when it is called"):
        ik.FocalLoss(return_log_probs=True)
    with pytest.raises(TypeError, match="has no keyword return_correct"):
        ik.SigmoidFocalLoss(return_correct=True)
    with pytest.raises(TypeError, match="return_correct"):
        F.sigmoid_cross_entropy(torch.randn(3, 2), torch.ones(3, 2), return_correct=True)


# ---------------------------------------------------------------- every loss


@each_impl
@pytest.mark.parametrize("name", LOSSES)
def test_every_module_and_twin(name, impl):
    """The loss as without, log p_t of its own effective logits, and what the raw ones predict."""
    case = LOSSES[name]
    x, target = inputs(case)
    right = log_p(case.logits(x, one_hot(target)), one_hot(target))
    module = case.module(**case.arguments, reduction="none", impl=impl)
    found = module(x, target, **FLAGS)
    assert torch.equal(found.loss, module(x, target))
    torch.testing.assert_close(found.log_probs, right, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.correct, oracle.correct(x, target))
    of_twin = case.function(x, target, **case.arguments, reduction="none", impl=impl, **FLAGS)
    for ours, theirs in zip(found, of_twin, strict=True):
        assert torch.equal(ours, theirs)


@each_impl
@each_reduction
@pytest.mark.parametrize("form", ["softmax_neg", "one_minus_softmax"])
def test_two_temperatures(form, reduction, impl):
    """Which read the logits once more for `correct`; images are copied to rows."""
    logits, target = mixed_case((3, 19, 2, 25), torch.float32)
    images, targets = (as_images(x, (3, 19, 2, 25)) for x in (logits, target))
    loss = ik.SoftTruncationLoss(form=form, reduction=reduction, impl=impl, prior=torch.softmax(torch.randn(19), 0))
    right, value, gradient = value_and_gradient(loss, images, targets)
    found, value_beside, gradient_beside = value_and_gradient(loss, images, targets, **FLAGS)
    assert torch.equal(value_beside, value) and torch.equal(gradient_beside, gradient)
    bias = torch.exp(loss._bias)
    assert_log_probs(found.log_probs.flatten(), oracle.log_probs(logits, target, prior=bias), torch.float32)
    assert torch.equal(found.correct.flatten(), oracle.correct(logits, target))
    if reduction != "none":
        found = loss(images, targets, normalizer=0.0, **FLAGS)
        assert (found.log_probs == 0).all() and not found.correct.any()


# ---------------------------------------------------------------- fused with the last layer

LINEAR_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def operands(dtype: torch.dtype, num_rows: int = 11, num_classes: int = 29):
    input, head = torch.randn(num_rows, 12).to(dtype), torch.nn.Linear(12, num_classes, dtype=dtype)
    target = torch.randint(num_classes, (num_rows,))
    target[1::4] = -100
    with torch.no_grad():  # half of the rest are right, and surely
        for row in range(0, num_rows, 2):
            if target[row] != -100:
                input[row] = 3 * head.weight[target[row]] / head.weight[target[row]].norm() * 4
    return input, head, target


def raw_logits(input, head):
    """As the buffer holds them: rounded to the input's dtype."""
    return torch.nn.functional.linear(*(x.detach().double() for x in (input, head.weight, head.bias))).to(input.dtype)


@each_impl
@each_reduction
@each_dtype
@pytest.mark.parametrize("rows_of_chunk", [4, 100], ids=["chunks", "one chunk"])
def test_fused(rows_of_chunk, dtype, reduction, impl):
    input, head, target = operands(dtype)
    prior = torch.softmax(torch.randn(29), 0)
    loss = ik.FocalLoss(
        prior=prior,
        label_smoothing=0.1,
        z_loss=0.01,
        reduction=reduction,
        impl=impl,
        chunk_bytes=rows_of_chunk * 29 * dtype.itemsize,
    )
    logits = raw_logits(input, head)
    log_probs, correct = oracle.log_probs(logits, target, prior=prior), oracle.correct(logits, target)
    assert correct.any() and not correct[target != -100].all()
    outputs = []
    for call in ({}, FLAGS):
        leaves = [x.detach().clone().requires_grad_() for x in (input, head.weight, head.bias)]
        output = loss.linear(leaves[0], leaves[1], target, leaves[2], **call)
        value = output.loss if call else output
        upstream = torch.linspace(-1, 2, value.numel()).to(value.dtype).view(value.shape)
        outputs.append((output, value.detach(), *torch.autograd.grad(value, leaves, upstream)))
    (_, *right), (found, *beside) = outputs
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(beside, right, strict=True))
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (found.log_probs.double() - log_probs).abs() / log_probs.abs().clamp_min(1)
    assert float(error.max()) <= LINEAR_TOLERANCE[dtype]
    assert (found.log_probs[target == -100] == 0).all() and not found.log_probs.requires_grad
    assert torch.equal(found.correct, correct)
    with torch.no_grad():
        without = loss.linear(input, head.weight, target, head.bias, **FLAGS)
    assert torch.equal(without.log_probs, found.log_probs) and torch.equal(without.correct, found.correct)
    alone = loss.linear(input, head.weight, target, head.bias, return_correct=True)
    assert alone.log_probs is None and torch.equal(alone.correct, found.correct)


@each_impl
def test_linear_loss_and_its_function(impl):
    """In the input's leading shape, and of cosines."""
    input, head, target = operands(torch.float32)
    input, target = input[:10].view(2, 5, 12), target[:10].view(2, 5)
    logits = raw_logits(input.reshape(10, 12), head)
    log_probs, correct = oracle.log_probs(logits, target.flatten()), oracle.correct(logits, target.flatten())
    module = ik.LinearLoss.from_linear(head, ik.CrossEntropyLoss(impl=impl))
    function = partial(F.linear_cross_entropy, linear_bias=head.bias, impl=impl)
    for found in (module(input, target, **FLAGS), function(input, head.weight, target, **FLAGS)):
        assert found.log_probs.shape == found.correct.shape == (2, 5)
        torch.testing.assert_close(found.log_probs.double().flatten(), log_probs, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.correct.flatten(), correct)
    assert torch.equal(module(input, target), found.loss)
    faces = ik.LinearLoss(12, 29, ik.CosFaceLoss(impl=impl), cosine=True)
    found = faces(input, target, **FLAGS)
    cosines = faces.logits(input).detach().reshape(10, 29)
    right = oracle.log_probs(cosines, target.flatten(), margin=0.35, scale=64.0)
    torch.testing.assert_close(found.log_probs.double().flatten(), right, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.correct.flatten(), oracle.correct(cosines, target.flatten()))


@each_impl
@each_reduction
def test_losses_of_splits_fused(reduction, impl):
    """Two temperatures and the radius margin, which make the logits once more for `correct`."""
    input, head, target = operands(torch.float64)
    input, weight = input / 4, head.weight.detach()
    logits = torch.nn.functional.linear(input, weight)
    correct = oracle.correct(logits, target)
    radius = 2 * torch.rand(29)
    keep, t = target != -100, target.clamp_min(0)
    moved = logits + radius.double()[t][:, None] * weight.norm(dim=1)
    moved = moved - 2 * radius.double()[t][:, None] * weight.norm(dim=1) * torch.nn.functional.one_hot(t, 29)
    assert not torch.equal(oracle.correct(moved, target), correct)
    cases = (
        (ik.SoftTruncationLoss(reduction=reduction, impl=impl, chunk_bytes=4 * 29 * 8), logits),
        (ik.RadiusMarginLoss(radius, reduction=reduction, impl=impl, chunk_bytes=4 * 29 * 8), moved),
    )
    for loss, effective in cases:
        right = torch.log_softmax(effective, 1).gather(1, t[:, None]).squeeze(1) * keep
        found = loss.linear(input, weight.requires_grad_(), target, **FLAGS)
        assert torch.equal(found.loss, loss.linear(input, weight, target)) and found.loss.requires_grad
        torch.testing.assert_close(found.log_probs, right, rtol=1e-11, atol=1e-11)
        assert not found.log_probs.requires_grad and torch.equal(found.correct, correct)
        if reduction != "none":
            found = loss.linear(input, weight, target, normalizer=0.0, **FLAGS)
            assert (found.log_probs == 0).all() and not found.correct.any()


# ---------------------------------------------------------------- compiled


@each_impl
@each_reduction
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("what", ["rows", "channels first", "two temperatures", "fused", "in place"])
def test_compiled(what, dtype, reduction, impl):
    """In one graph, forward and backward, with every result as eagerly."""
    num_classes = 19
    options = dict(reduction=reduction, impl=impl)
    shape = (2, num_classes, 4, 5) if what == "channels first" else (9, num_classes)
    x = torch.randn(shape).to(dtype)
    target = torch.randint(num_classes, (2, 4, 5) if what == "channels first" else (9,))
    target.view(-1)[::4] = -100
    layer = (torch.randn(num_classes, num_classes) / 4).to(dtype)
    loss = {
        "two temperatures": ik.SoftTruncationLoss(**options),
        "in place": ik.FocalLoss(inplace=True, **options),
    }.get(what, ik.FocalLoss(label_smoothing=0.1, prior=torch.softmax(torch.randn(num_classes), 0), **options))

    def step(leaf):
        logits = leaf * 1
        if what == "fused":
            output = loss.linear(logits, layer, target, **FLAGS)
        else:
            output = loss(logits, target, **FLAGS)
        return output.loss, output.log_probs, output.correct

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        leaf = x.clone().requires_grad_()
        value, log_probs, correct = run(leaf)
        assert not log_probs.requires_grad
        upstream = torch.linspace(-1, 2, value.numel()).view(value.shape).to(value.dtype)
        results.append((value.detach(), log_probs, correct, *torch.autograd.grad(value, leaf, upstream)))
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)


def test_compiled_by_inductor():
    """The default backend, with statistics made of the results, and other numbers of rows in the same graph."""

    def step(logits, target):
        output = F.cross_entropy(logits, target, z_loss=1e-4, return_log_probs=True, return_correct=True)
        counted = target != -100
        return output.loss, -output.log_probs.sum() / counted.sum(), output.correct.sum() / counted.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for num_rows in (6, 9):
        logits, target = mixed_case((num_rows, 37), torch.float32)
        for ours, right in zip(compiled(logits, target), step(logits, target), strict=True):
            torch.testing.assert_close(ours, right)
    torch._dynamo.reset()
