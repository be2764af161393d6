"""The sigmoid family as modules and functions: arguments, state, autograd's contracts, torch's and torchvision's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from implementations import IMPLEMENTATIONS, KERNELS
from sigmoid_oracle import OBJECTIVES, one_hot

import imbalance_kernels as ik
from imbalance_kernels import functional
from imbalance_kernels.ops.kernel_arguments import sigmoid_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SigmoidOptions

# module -> its functional twin and arguments other than the defaults
MODULES = {
    ik.SigmoidFocalLoss: (functional.sigmoid_focal_loss, {"alpha": 0.4, "gamma": 1.5}),
    ik.SigmoidCrossEntropyLoss: (functional.sigmoid_cross_entropy, {"pos_weight": torch.rand(5) + 0.5}),
    ik.SigmoidHardTruncationLoss: (functional.sigmoid_hard_truncation_loss, {"threshold": 0.7}),
    ik.SigmoidSoftTruncationLoss: (functional.sigmoid_soft_truncation_loss, {"sharpness": 2.0}),
    ik.SigmoidPolyLoss: (functional.sigmoid_poly_loss, {"epsilon": 2.0}),
    ik.SigmoidSmoothAccuracyLoss: (functional.sigmoid_smooth_accuracy_loss, {}),
    ik.QualityFocalLoss: (functional.quality_focal_loss, {"beta": 3.0}),
    ik.VarifocalLoss: (functional.varifocal_loss, {"alpha": 0.3, "gamma": 1.0}),
    ik.AsymmetricLoss: (functional.asymmetric_loss, {"gamma_neg": 2.0, "gamma_pos": 0.5, "clip": 0.1}),
}
LABELS = torch.tensor([0, 5, 3, 5, -100, 2, 5])
PRIOR = ik.BinaryPrior([9, 1, 3, 2, 5], total_count=20, tau=0.5)


def logits(dtype=torch.float32, num_rows=7, num_classes=5):
    return (2 * torch.randn(num_rows, num_classes, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_is_its_function(module):
    function, own = MODULES[module]
    x = logits()
    for keywords in ({}, own, {**own, "prior": PRIOR, "weight": torch.rand(5), "ignore_index": 5, "reduction": "sum"}):
        same = {"reduction": "mean"} if module is ik.SigmoidFocalLoss else {}  # torchvision's default is "none"
        ours = module(**keywords)(x, LABELS.clamp(0), normalizer=3)
        twin = function(x, LABELS.clamp(0), **{**same, **keywords}, normalizer=3)
        assert torch.equal(ours, twin) and ours.isfinite()
    defaults = [module()(x, LABELS), module(**own)(x, LABELS)]
    assert not own or not torch.equal(*defaults)  # the arguments arrive


FORMULAS = {
    ik.SigmoidFocalLoss: ("focal", (2.0,), 0.25),
    ik.SigmoidCrossEntropyLoss: ("cross_entropy", (), None),
    ik.SigmoidHardTruncationLoss: ("hard_truncation", (0.5,), None),
    ik.SigmoidSoftTruncationLoss: ("soft_truncation", (1.0,), None),
    ik.SigmoidPolyLoss: ("poly", (1.0,), None),
    ik.SigmoidSmoothAccuracyLoss: ("smooth_accuracy", (), None),
    ik.QualityFocalLoss: ("quality_focal", (2.0,), None),
    ik.VarifocalLoss: ("varifocal", (2.0, 0.75), None),
    ik.AsymmetricLoss: ("asymmetric", (4.0, 1.0, 0.05), None),
}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_defaults_are_the_literature_s(module):
    name, parameters, alpha = FORMULAS[module]
    x, y = logits(torch.float64), one_hot(LABELS, 5, -100)
    positive, negative = OBJECTIVES[name](x, y, *parameters)
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    literal = (y * positive + (1 - y) * negative)[LABELS != -100]
    literal = literal.sum() if module is ik.AsymmetricLoss else literal.mean()
    torch.testing.assert_close(module()(x, LABELS), literal, rtol=1e-9, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weight", [None, torch.rand(5) + 0.5], ids=["", "weight"])
@pytest.mark.parametrize("shape", [(5,), (1,), ()], ids=str)
def test_torchs_bce_with_logits(shape, weight, reduction, impl):
    """The same positions, values and gradients, a state dict that goes both ways; pos_weight broadcasts."""
    pos_weight = torch.rand(shape) + 0.5
    theirs = torch.nn.BCEWithLogitsLoss(weight, None, None, reduction, pos_weight)
    ours = ik.SigmoidCrossEntropyLoss(weight, None, None, reduction, pos_weight, impl=impl)
    x, y = logits(), torch.rand(7, 5)
    expected, found = theirs(x, y), ours(x, y)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, x, upstream)[0] for value in (found, expected)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2), (-1, 2), (0.9, 0), (0.25, 1.5)])
def test_torchvisions_focal_loss(alpha, gamma, impl):
    """Its formula in float64, by its positions; its labels may be soft."""
    x = logits(torch.float64)
    for y in (torch.rand(7, 5, dtype=torch.float64), one_hot(LABELS, 5, -100)):
        p = torch.sigmoid(x)
        p_t = p * y + (1 - p) * (1 - y)
        literal = F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** gamma
        literal = literal if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * literal
        for reduction in ("none", "mean", "sum"):
            found = functional.sigmoid_focal_loss(x, y, alpha, gamma, reduction, impl=impl)
            expected = literal if reduction == "none" else getattr(literal, reduction)()
            upstream = torch.randn_like(expected)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
            gradients = (torch.autograd.grad(value, x, upstream, retain_graph=True)[0] for value in (found, expected))
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


def test_constants_stay_exact():
    """A prior, alpha and gamma of each class are no state, and .half() does not round them."""
    loss = ik.SigmoidFocalLoss(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.linspace(0, 2.1, 5), prior=PRIOR)
    x, y = logits(torch.float64), torch.rand(7, 5)
    before = loss(x, y), loss(x.float(), y)
    assert loss.state_dict() == {}
    for moved in (loss.half(), loss.double(), copy.deepcopy(loss).bfloat16(), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(moved(x, y), before[0]) and torch.equal(moved(x.float(), y), before[1])
    torch.testing.assert_close(PRIOR.bias, 0.5 * torch.logit(PRIOR.probabilities))
    assert "prior" in repr(loss) and "gamma" in str(ik.SigmoidFocalLoss.__init__.__doc__ or ik.SigmoidFocalLoss.__doc__)


def test_weights_may_be_reassigned():
    x, loss = logits(), ik.SigmoidCrossEntropyLoss()
    plain = loss(x, LABELS)
    loss.weight = torch.full((5,), 2.0)
    torch.testing.assert_close(loss(x, LABELS), 2 * plain)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: ik.SigmoidFocalLoss(gama=2), TypeError, "SigmoidFocalLoss has no keyword gama: use gamma"),
        (lambda x: ik.SigmoidPolyLoss(objective=1), TypeError, "SigmoidPolyLoss sets objective itself"),
        (lambda x: ik.SigmoidFocalLoss(normalizer=1), TypeError, "takes normalizer when it is called"),
        (lambda x: ik.SigmoidFocalLoss(alpha=1.5), ValueError, "alpha is 1.5"),
        (lambda x: ik.SigmoidFocalLoss(gamma=-1.0), ValueError, "gamma is -1.0"),
        (lambda x: ik.QualityFocalLoss(0.5), ValueError, "beta is 0.5"),
        (lambda x: ik.AsymmetricLoss(clip=1.0), ValueError, "clip is 1.0"),
        (lambda x: ik.SigmoidFocalLoss(prior=ik.Prior([1, 2])), TypeError, "use BinaryPrior"),
        (lambda x: ik.SigmoidFocalLoss(prior=0.01), TypeError, "prior is a float"),
        (lambda x: ik.BinaryPrior([0, 1], 10), ValueError, "positive_counts has a class that is never"),
        (lambda x: ik.BinaryPrior([3, 1], 2), ValueError, "total_count is 2"),
        (lambda x: ik.BinaryPrior.from_probabilities([0.5, 1.0]), ValueError, "between 0 and 1"),
        (lambda x: ik.SigmoidLoss(weight=2.0)(x, LABELS), TypeError, "weight"),
        (lambda x: ik.SigmoidLoss(weight=torch.rand(4))(x, LABELS), ValueError, "weight has shape"),
        (lambda x: ik.SigmoidLoss(alpha=torch.rand(4))(x, LABELS), ValueError, "has shape"),
        (lambda x: ik.SigmoidLoss(alpha=torch.rand(5), weight=torch.rand(1))(x, LABELS), ValueError, "as alpha is"),
        (lambda x: ik.SigmoidLoss(alpha=torch.tensor([2.0, 0.5])), ValueError, "each class's must be from 0 to 1"),
        (lambda x: ik.SigmoidLoss(alpha="x"), TypeError, "alpha is a str"),
        (lambda x: ik.SigmoidLoss(weight=torch.rand(5, requires_grad=True))(x, LABELS), ValueError, "weight requires"),
        (lambda x: ik.SigmoidLoss()(x, LABELS, sample_weight=1.0), TypeError, "sample_weight is a float"),
        (lambda x: ik.SigmoidLoss(prior=torch.rand(4))(x, LABELS), ValueError, "prior has shape"),
        (lambda x: ik.SigmoidFocalLoss(gamma=torch.rand(4))(x, LABELS), ValueError, "gamma has shape"),
        (lambda _: ik.SigmoidLoss(reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda x: functional.sigmoid_loss(x, LABELS, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda x: ik.SigmoidLoss(reduction="none")(x, LABELS, normalizer=2), ValueError, "normalizer is given"),
        (lambda x: ik.SigmoidLoss()(x, torch.ones(7, 5, dtype=torch.long)), ValueError, "target has input's shape"),
        (lambda x: ik.SigmoidLoss()(x, LABELS.to(torch.uint8)), TypeError, "target has dtype torch.uint8"),
        (lambda x: ik.SigmoidLoss()(x, torch.rand(7, 4)), ValueError, "target holds dense labels"),
        (lambda x: ik.SigmoidLoss()(x, torch.rand(7, 5, requires_grad=True)), ValueError, "target requires grad"),
        (lambda x: ik.SigmoidLoss()(x.view(1, 7, 5), LABELS[None]), ValueError, "pass class_dim=-1"),
        (lambda x: ik.SigmoidLoss()(x, LABELS, sample_weight=torch.rand(5)), ValueError, "sample_weight has shape"),
        (lambda x: ik.SigmoidLoss()(x, LABELS + 6), IndexError, "target 6 is out of bounds"),
        (lambda x: ik.SigmoidLoss(inplace=True)(x, LABELS), ValueError, "inplace=True would overwrite input"),
        (lambda x: ik.SoftmaxLoss(ik.binary_objectives.QualityFocal())(x, LABELS % 5), TypeError, "use SigmoidLoss"),
    ],
)
def test_bad_arguments_raise(call, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        call(logits())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_upstream_gradients(dtype, impl):
    """2 and then 3 on a graph that is kept; 65536 before float16's 1/N underflows."""
    x = logits(dtype)
    loss = ik.SigmoidFocalLoss(impl=impl)(x, LABELS)
    expected = torch.autograd.grad(ik.SigmoidFocalLoss(impl="reference")(x.double(), LABELS), x)[0].double()
    tolerance = {"rtol": {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype], "atol": 1e-6}
    for upstream in (2.0, 3.0):
        found = torch.autograd.grad(loss, x, torch.tensor(upstream), retain_graph=True)[0].double()
        torch.testing.assert_close(found, upstream * expected, **tolerance)
    (found,) = torch.autograd.grad(loss, x, torch.tensor(1 / 3))
    torch.testing.assert_close(found.double(), expected / 3, **tolerance)
    if dtype == torch.float16:
        many = logits(dtype, 4000, 50)
        loss = ik.SigmoidFocalLoss(impl=impl)(many, torch.full((4000,), 50))
        (found,) = torch.autograd.grad(loss * 65536, many)
        assert (found != 0).float().mean() > 0.95


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_in_place(impl):
    """The logits become their gradient, and whoever saved them hears of it."""
    leaf = logits()
    x = leaf * 1
    expected = torch.autograd.grad(ik.SigmoidFocalLoss()(leaf, LABELS), leaf)[0]
    version = x._version
    loss = ik.SigmoidFocalLoss(inplace=True, impl=impl)(x, LABELS)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
    assert impl == "reference" or x._version > version
    x = leaf.exp()  # which saves its result
    loss = ik.SigmoidFocalLoss(inplace=True, impl=impl)(x, LABELS)
    if impl != "reference":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction, impl):
    x = logits()
    loss = ik.SigmoidFocalLoss(reduction=reduction, impl=impl)(x, LABELS).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_as_one_graph(impl):
    loss = ik.SigmoidFocalLoss(prior=PRIOR, impl=impl)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x in (logits(), logits(num_rows=7)):
        found, expected = compiled(x, LABELS, normalizer=3.0), loss(x, LABELS, normalizer=3.0)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layouts_of_targets(impl):
    """Class labels, lists of them and dense ones of any dtype say the same; int32 does as int64."""
    x = logits()
    labels = torch.where(LABELS == -100, 5, LABELS)
    expected = ik.SigmoidFocalLoss(impl="reference")(x, one_hot(labels, 5, -100))
    dense = one_hot(labels, 5, -100)
    lists = torch.where(labels == 5, -100, labels)[:, None]
    padded = torch.cat([lists, torch.full_like(lists, -100), lists], dim=1)
    for target in (
        labels,
        labels.int(),
        lists,
        padded,
        padded.int(),
        dense,
        dense.bool(),
        dense.half(),
        dense.bfloat16(),
    ):
        torch.testing.assert_close(ik.SigmoidFocalLoss(impl=impl)(x, target), expected.float())
    last = x.view(1, 7, 5)
    torch.testing.assert_close(ik.SigmoidFocalLoss(impl=impl, class_dim=-1)(last, labels[None]), expected.float())
    one = ik.SigmoidFocalLoss(impl=impl)(x[0], labels[0])
    torch.testing.assert_close(one, ik.SigmoidFocalLoss(impl=impl)(x[:1], labels[:1]))
    empty = ik.SigmoidFocalLoss(impl=impl)(x, torch.zeros(7, 0, dtype=torch.long))  # no class at all
    torch.testing.assert_close(empty, ik.SigmoidFocalLoss(impl=impl)(x, torch.zeros(7, 5)))


@pytest.mark.parametrize("impl", KERNELS)
def test_the_operations_are_what_they_say(impl):
    """Schemas and fakes: what is written, shapes and dtypes, for rows and images."""
    tests = ("test_schema", "test_faketensor")
    for shape, rows in (((7, 5), 7), ((2, 5, 3), 6)):
        x, labels = torch.randn(shape), torch.randint(6, (rows,))
        for reduction, upstream in (("mean", torch.tensor(2.0)), ("none", torch.randn(shape))):
            call = sigmoid_arguments(labels, SigmoidOptions(reduction=reduction), None, None)
            operation = kernels(impl)
            torch.library.opcheck(operation.sigmoid_loss.default, (x, *call, True), test_utils=tests)
            torch.library.opcheck(operation.sigmoid_loss.default, (x, *call, False), test_utils=tests)
            torch.library.opcheck(operation.sigmoid_loss_backward.default, (x, *call, upstream), test_utils=tests)
            changed = (x.clone(), *call, upstream)
            torch.library.opcheck(operation.sigmoid_loss_backward_.default, changed, test_utils=tests)
            if reduction == "mean":
                torch.library.opcheck(operation.sigmoid_loss_.default, (x.clone(), *call), test_utils=tests)
