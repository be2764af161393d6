"""Adjusted logits, prediction rules, first biases and thresholds."""

import math

import numpy as np
import pytest
import torch

import imbalance_kernels as ik
from imbalance_kernels.priors import adjust_logits, best_threshold, init_focal_bias_, init_prior_bias_, predict

C = 5
COUNTS = [600, 250, 100, 40, 10]
LOG_PRIOR = torch.tensor([math.log(n / 1000) for n in COUNTS], dtype=torch.float64)


def running(tau=1.0):
    """Counts of one pseudo-count less, which are those above with it."""
    prior = ik.RunningPrior(C, tau=tau)
    prior.counts.copy_(torch.tensor(COUNTS) - 1)
    return prior


PRIORS = {
    "Prior": (ik.Prior(COUNTS), 1.0),
    "Prior of another tau": (ik.Prior(COUNTS, tau=0.5), 0.5),
    "RunningPrior": (running(2.0), 2.0),
    "probabilities": (torch.tensor(COUNTS) / 1000, 1.0),
}

# ---------------------------------------------------------------- adjust_logits


@pytest.mark.parametrize("tau", [None, 0.0, 1.5, -1.0])
@pytest.mark.parametrize("kind", PRIORS)
def test_adjusted_logits_are_those_of_the_loss(kind, tau):
    prior, own = PRIORS[kind]
    used = own if tau is None else tau
    x, target = torch.randn(9, C, dtype=torch.float64, requires_grad=True), torch.randint(C, (9,))
    adjusted = adjust_logits(x, prior, tau)
    rounding = 1e-6 if kind == "probabilities" else 1e-13  # those are in float32
    torch.testing.assert_close(adjusted, x + used * LOG_PRIOR, rtol=rounding, atol=rounding)
    loss = ik.CrossEntropyLoss(prior=ik.Prior(COUNTS, tau=used))(x, target)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(adjusted, target), loss, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(adjusted.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize(
    ("shape", "class_dim"), [((C,), 1), ((7, C), 1), ((7, C), -1), ((2, C, 3, 4), 1), ((2, 3, C), -1), ((2, 3, C), 2)]
)
def test_shapes(shape, class_dim):
    dim = 0 if len(shape) == 1 else class_dim
    x = torch.randn(shape, dtype=torch.float64)
    want = (x.movedim(dim, -1) + LOG_PRIOR).movedim(-1, dim)
    prior = ik.Prior(COUNTS)
    torch.testing.assert_close(adjust_logits(x, prior, class_dim=class_dim), want)
    options = {"rule": "overall", "trained_with": "adjusted", "class_dim": class_dim}
    assert torch.equal(predict(x, prior, **options), want.argmax(dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_halves_are_adjusted_in_float32(dtype):
    """A prior of 1e-7 is added to 3 digits of the logit, not rounded to them."""
    prior = ik.Prior([10**7 - 1, 1], tau=2.0)
    x = torch.tensor([[1.0, 0.5]], dtype=dtype)
    adjusted = adjust_logits(x, prior)
    assert adjusted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(adjusted.double(), x.double() + prior.bias, rtol=1e-6, atol=0)


def test_sigmoids_take_a_binary_prior():
    prior = ik.BinaryPrior([500, 10, 1], total_count=1000, tau=0.5)
    x = torch.randn(4, 3, dtype=torch.float64)
    odds = torch.tensor([math.log(n / (1000 - n)) for n in (500, 10, 1)], dtype=torch.float64)
    torch.testing.assert_close(adjust_logits(x, prior), x + 0.5 * odds, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(adjust_logits(x, prior, tau=-1), x - odds, rtol=1e-13, atol=1e-15)
    target = torch.randint(4, (4,))
    torch.testing.assert_close(
        ik.SigmoidCrossEntropyLoss()(adjust_logits(x, prior), target),
        ik.SigmoidCrossEntropyLoss(prior=prior)(x, target),
    )
    with pytest.raises(TypeError, match="prior is a BinaryPrior.*adjust_logits"):
        predict(x, prior, rule="overall", trained_with="adjusted")


# ---------------------------------------------------------------- predict


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("tau", [None, 0.3, 1.0])
def test_the_four_rules(kind, tau):
    prior, own = PRIORS[kind]
    shift = (own if tau is None else tau) * LOG_PRIOR
    x = 3 * torch.randn(500, C, dtype=torch.float64)
    table = {
        ("overall", "cross_entropy"): x,
        ("balanced", "cross_entropy"): x - shift,
        ("overall", "adjusted"): x + shift,
        ("balanced", "adjusted"): x,
    }
    found = {}
    for (rule, trained_with), scores in table.items():
        found[rule, trained_with] = predict(x, prior, rule=rule, trained_with=trained_with, tau=tau)
        assert torch.equal(found[rule, trained_with], scores.argmax(1))
    assert len({tuple(prediction.tolist()) for prediction in found.values()}) == 3


def test_the_rules_are_bayes():
    """Two classes on a line with known densities: what a model learns exactly, and which rule makes the fewest errors.

    x ~ N(0, 1) of class 0, N(2, 1) of class 1, prior 0.9 and 0.1: P(x | y) are equal at 1, P(y | x) at 1 + log(9) / 2.
    """
    prior = torch.tensor([0.9, 0.1], dtype=torch.float64)
    x = torch.linspace(-3, 6, 9001, dtype=torch.float64)
    density = torch.stack([-(x**2) / 2, -((x - 2) ** 2) / 2], dim=1)
    learned = {"cross_entropy": (density + prior.log()).log_softmax(1), "adjusted": density}
    for trained_with, logits in learned.items():
        for rule, boundary in (("overall", 1 + math.log(9) / 2), ("balanced", 1.0)):
            predicted = predict(logits, prior, rule=rule, trained_with=trained_with)
            away = (x - boundary).abs() > 1e-9
            assert torch.equal(predicted[away], (x > boundary).long()[away])


def test_an_excluded_class_is_never_predicted():
    prior = ik.Prior([5, 0, 3], zero_count="exclude")
    x = torch.tensor([[0.0, 100.0, 1.0]])
    for rule in ("overall", "balanced"):
        for trained_with in ("cross_entropy", "adjusted"):
            for tau in (None, 0.0, -1.0):
                assert int(predict(x, prior, rule=rule, trained_with=trained_with, tau=tau)) != 1
    assert adjust_logits(x, prior, tau=-1.0)[0, 1] == -math.inf


X = torch.randn(4, C)
WRONG = {
    "rule": (
        lambda: predict(X, PRIORS["Prior"][0], rule="mean", trained_with="adjusted"),
        ValueError,
        "rule is 'mean'",
    ),
    "trained_with": (
        lambda: predict(X, PRIORS["Prior"][0], rule="overall", trained_with="focal"),
        ValueError,
        "trained_with is 'focal'",
    ),
    "both must be given": (lambda: predict(X, PRIORS["Prior"][0]), TypeError, "rule"),
    "classes": (lambda: adjust_logits(X, ik.Prior([1, 2])), ValueError, r"prior has shape \(2,\)"),
    "class_dim": (lambda: adjust_logits(X, ik.Prior([1, 2]), class_dim=2), ValueError, "class_dim is 2"),
    "integers": (lambda: adjust_logits(X.long(), ik.Prior(COUNTS)), TypeError, "logits has dtype torch.int64"),
    "a list": (lambda: adjust_logits([1.0], ik.Prior(COUNTS)), TypeError, "logits is a list"),
    "counts": (lambda: adjust_logits(X, torch.tensor(COUNTS).float()), ValueError, "are they counts"),
    "a list as prior": (lambda: adjust_logits(X, COUNTS), TypeError, "prior is a list"),
    "tau": (lambda: adjust_logits(X, ik.Prior(COUNTS), tau=math.nan), ValueError, "tau is nan"),
    "tau of a binary prior": (
        lambda: adjust_logits(X, ik.BinaryPrior([1] * C, 9), tau=math.inf),
        ValueError,
        "tau is inf",
    ),
    "no bias": (
        lambda: init_prior_bias_(torch.nn.Linear(2, C, bias=False), ik.Prior(COUNTS)),
        ValueError,
        "linear is a Linear without a bias",
    ),
    "other classes": (
        lambda: init_prior_bias_(torch.nn.Linear(2, 7), ik.Prior(COUNTS)),
        ValueError,
        r"bias of shape \(7,\), but prior has 5 classes",
    ),
    "excluded": (
        lambda: init_prior_bias_(torch.nn.Linear(2, 2), ik.Prior([1, 0], zero_count="exclude")),
        ValueError,
        "prior excludes a class",
    ),
    "a tensor": (lambda: init_focal_bias_(torch.zeros(3)), ValueError, "layer is a Tensor without a bias"),
    "pi of 1": (lambda: init_focal_bias_(torch.nn.Linear(2, 2), 1.0), ValueError, "prior is 1.0"),
    "pi NaN": (lambda: init_focal_bias_(torch.nn.Linear(2, 2), math.nan), ValueError, "prior is nan"),
    "pi of each class": (
        lambda: init_focal_bias_(torch.nn.Linear(2, 2), torch.rand(2)),
        TypeError,
        "one number here: use init_prior_bias_",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- first biases


@pytest.mark.parametrize("tau", [None, 0.25])
@pytest.mark.parametrize("kind", PRIORS)
def test_a_layer_that_starts_at_the_prior(kind, tau):
    prior, own = PRIORS[kind]
    head = torch.nn.Linear(3, C, dtype=torch.float64)
    bias = head.bias
    assert init_prior_bias_(head, prior, tau) is head and head.bias is bias and bias.requires_grad
    want = (own if tau is None else tau) * LOG_PRIOR
    torch.testing.assert_close(bias.detach(), want, rtol=1e-6 if kind == "probabilities" else 1e-13, atol=0)


def test_a_start_at_the_prior_is_the_adjusted_loss():
    head, x, target = torch.nn.Linear(8, C), torch.randn(20, 8), torch.randint(C, (20,))
    adjusted = ik.LogitAdjustedLoss(COUNTS)(torch.nn.functional.linear(x, head.weight), target)
    plain = ik.CrossEntropyLoss()(init_prior_bias_(head, ik.Prior(COUNTS))(x), target)
    torch.testing.assert_close(*(torch.autograd.grad(v, head.weight)[0] for v in (plain, adjusted)))
    torch.testing.assert_close(plain, adjusted)


def test_a_detectors_anchors_and_a_binary_prior():
    prior = ik.BinaryPrior([500, 10, 1], total_count=1000)
    head = init_prior_bias_(torch.nn.Conv2d(4, 6, 1), prior)
    torch.testing.assert_close(head.bias.detach().view(2, 3).double(), prior.bias.expand(2, 3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pi", [0.01, 0.5, 1e-9, 1 - 1e-9])
def test_a_layer_that_starts_at_retinanets(pi):
    head = torch.nn.Conv2d(4, 6, 1, dtype=torch.float64)
    bias = head.bias
    assert init_focal_bias_(head, pi) is head and head.bias is bias
    want = torch.tensor([-math.log((1 - pi) / pi), pi], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([bias[3], bias[3].sigmoid()]).detach(), want, rtol=1e-8, atol=1e-15)
    assert (bias == bias[3]).all()
    assert init_focal_bias_(torch.nn.Linear(2, 2)).bias[0].sigmoid().item() == pytest.approx(0.01, rel=1e-6)


# ---------------------------------------------------------------- best_threshold


def f1_of(truth, predicted):
    """The harmonic mean of precision and recall."""
    if not truth.any() and not predicted.any():
        return 1.0
    hits = (truth & predicted).sum()
    return 0.0 if hits == 0 else 2 / (predicted.sum() / hits + truth.sum() / hits)


def balanced_of(truth, predicted):
    return np.mean([(predicted[truth == kind] == kind).mean() for kind in np.unique(truth)])


def accuracy_of(truth, predicted):
    return (truth == predicted).mean()


METRICS = {"f1": f1_of, "balanced_accuracy": balanced_of, "accuracy": accuracy_of}


def brute_force(scores, truth, metric):
    """Every cut that a threshold can make, from all to none; the best quality, and the fewest predicted with it."""
    candidates = sorted(set(scores.tolist())) + ([math.inf] if not np.isinf(scores).any() else [])
    qualities = [METRICS[metric](truth, scores >= c) for c in candidates]
    best = max(qualities)
    fewest = [c for c, q in zip(candidates, qualities, strict=True) if q > best - 1e-12][-1]
    return best, (scores >= fewest).sum()


def check(scores, truth, metric):
    """A threshold reaches the best quality, with the fewest predicted; and where it lies."""
    threshold = best_threshold(torch.as_tensor(scores), torch.as_tensor(truth), metric)
    assert threshold.shape == () and threshold.dtype == torch.as_tensor(scores).dtype
    predicted = (torch.as_tensor(scores) >= threshold).numpy()
    best, fewest = brute_force(np.asarray(scores, dtype=np.float64), truth, metric)
    assert METRICS[metric](truth, predicted) == pytest.approx(best, abs=1e-12) and predicted.sum() == fewest
    return float(threshold)


@pytest.mark.parametrize("levels", [3, 10, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("metric", METRICS)
def test_it_is_the_best_of_all_thresholds(metric, share, levels):
    """With ties of scores, many, few and none."""
    generator = np.random.default_rng(levels)
    for num_rows in (1, 2, 3, 17, 60):
        for _ in range(3):
            truth = generator.random(num_rows) < share
            scores = np.round(generator.normal(size=num_rows) + truth, int(math.log10(levels))).astype(np.float32)
            if levels == 3:
                scores = np.round(scores)
            threshold = check(scores, truth, metric)
            above, below = scores[scores >= threshold], scores[scores < threshold]
            if above.size and below.size:
                assert threshold == pytest.approx((above.min() / 2 + below.max() / 2), rel=1e-6)
            elif above.size:
                assert threshold == scores.min()
            else:
                assert threshold == math.inf


@pytest.mark.parametrize("metric", METRICS)
def test_labels_of_one_kind(metric):
    scores = torch.tensor([0.3, 0.1, 0.9])
    assert best_threshold(scores, torch.ones(3), metric) == scores.min()
    assert best_threshold(scores, torch.zeros(3), metric) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neighbouring_numbers_and_infinite_ones(dtype):
    """Where a midpoint would be rounded to the lower score, or leaves the range."""
    one = torch.tensor(1.0, dtype=dtype)
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
    infinite = torch.tensor(math.inf, dtype=dtype)
    pairs = [
        (one, torch.nextafter(one, infinite)),
        (torch.nextafter(one, infinite), torch.nextafter(torch.nextafter(one, infinite), infinite)),
        (torch.zeros_like(one), smallest),
        (-largest, largest),
        (largest * 0.75, largest),
        (one, infinite),
        (-infinite, one),
        (-infinite, infinite),
    ]
    for low, high in pairs:
        scores = torch.stack([low, high, low, high])
        threshold = best_threshold(scores, torch.tensor([0, 1, 0, 1]))
        assert threshold.dtype == dtype and (scores >= threshold).tolist() == [False, True, False, True]
    assert threshold == math.inf
    threshold = best_threshold(largest * torch.tensor([0.5, 1.0], dtype=dtype), torch.tensor([0, 1]))
    assert threshold == largest * 0.75


def test_nothing_lies_above_an_infinite_score():
    """So that a label of 0 there cannot be avoided: "nothing at all" is no cut."""
    scores = torch.tensor([math.inf, 1.0])
    threshold = best_threshold(scores, torch.tensor([0, 1]), "accuracy")
    assert (scores >= threshold).tolist() == [True, True]
    threshold = best_threshold(scores, torch.tensor([0, 0]), "accuracy")
    assert (scores >= threshold).tolist() == [True, False]


@pytest.mark.parametrize("metric", METRICS)
def test_each_column_on_its_own(metric):
    scores = torch.randn(50, 4, dtype=torch.float64).round(decimals=1)
    targets = torch.rand(50, 4) < torch.tensor([0.0, 0.1, 0.5, 1.0])
    together = best_threshold(scores, targets, metric)
    assert together.shape == (4,)
    for kind in (targets, targets.int(), targets.double()):
        for j in range(4):
            assert best_threshold(scores[:, j], kind[:, j], metric) == together[j]
    assert best_threshold(torch.randn(5, 0), torch.zeros(5, 0), metric).shape == (0,)


def test_it_is_fast():
    """A million scores in one sort, and no N x N anything."""
    scores = torch.randn(10**6)
    threshold = best_threshold(scores, torch.rand(10**6) < torch.sigmoid(scores - 2))
    assert 0.5 < threshold < 2.5


S, T = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
WRONG_SCORES = {
    "metric": ((S, T, "auc"), ValueError, "metric is 'auc'"),
    "shape": ((S, torch.tensor([0, 1, 1])), ValueError, r"targets has shape \(3,\)"),
    "volume": ((torch.rand(2, 2, 2), torch.ones(2, 2, 2)), ValueError, r"scores has shape \(2, 2, 2\)"),
    "no rows": ((S[:0], T[:0]), ValueError, r"scores has shape \(0,\)"),
    "integers": ((T, T), TypeError, "scores has dtype torch.int64"),
    "NaN": ((torch.tensor([0.1, math.nan]), T), ValueError, "scores holds NaN"),
    "classes": ((S, torch.tensor([0, 2])), ValueError, "targets must be 0 or 1"),
    "probabilities": ((S, S), ValueError, "targets must be 0 or 1"),
    "a list": ((S, [0, 1]), TypeError, "targets is a list"),
    "a list of scores": (([0.1, 0.2], T), TypeError, "scores is a list"),
    "another device": ((S, T.to("meta")), ValueError, "targets is on meta"),
}


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_scores_that_do_not_fit_raise(case):
    arguments, error, message = WRONG_SCORES[case]
    with pytest.raises(error, match=message):
        best_threshold(*arguments)
