"""Counting classes, weights made of counts, and what weights and samplers do to a prior."""

import math
import sys
import warnings
from collections import Counter
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import imbalance_kernels as ik
from imbalance_kernels.priors import (
    class_counts,
    effective_number_weights,
    effective_prior,
    inverse_frequency_weights,
    ldam_margins,
)

COUNTS = torch.tensor([6000, 1200, 240, 60])

# ---------------------------------------------------------------- class_counts


def some_targets(num=200, num_classes=7):
    """Without the last class, and with ignored ones."""
    target = torch.randint(num_classes - 1, (num,))
    target[torch.rand(num) < 0.2] = -100
    found = Counter(target.tolist())
    return target, [found[j] for j in range(num_classes)]


def loader(target, **options):
    return DataLoader(TensorDataset(torch.randn(len(target), 2), target), batch_size=32, **options)


FORMS = {
    "tensor": lambda t: t,
    "int32": lambda t: t.int(),
    "int8": lambda t: t.to(torch.int8),
    "images": lambda t: t.view(2, -1, 10),
    "list": lambda t: t.tolist(),
    "tuple": lambda t: tuple(t.tolist()),
    "nested list": lambda t: t.view(20, -1).tolist(),
    "list of numbers of torch": lambda t: list(t),
    "array": lambda t: t.numpy(),
    "read-only array of int16": lambda t: np.broadcast_to(t.numpy().astype(np.int16), (1, len(t))),
    "array's tolist": lambda t: list(t.numpy()),
    "batches": lambda t: t.split(32),
    "generator of batches": lambda t: (batch for batch in t.split(32)),
    "generator of lists": lambda t: (batch.tolist() for batch in t.split(32)),
    "generator of nested lists": lambda t: (batch.view(2, -1).tolist() for batch in t.split(100)),
    "generator of numbers": lambda t: (int(label) for label in t),
    "pairs": lambda t: [(torch.randn(len(batch), 2), batch) for batch in t.split(32)],
    "pairs of arrays": lambda t: [(np.zeros((len(batch), 2)), batch.numpy()) for batch in t.split(32)],
    "loader": loader,
    "shuffled loader": lambda t: loader(t, shuffle=True),
    "samples": lambda t: (TensorDataset(torch.randn(len(t), 2), t)[i] for i in range(len(t))),
    "samples with anything beside": lambda t: ((object(), int(label)) for label in t),
}


@pytest.mark.parametrize("form", FORMS)
def test_classes_are_counted_in_every_form(form):
    target, want = some_targets()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = class_counts(FORMS[form](target), 7)
    assert counts.tolist() == want and counts.dtype == torch.int64


@pytest.mark.parametrize("nothing", [[], torch.tensor([], dtype=torch.int64), np.zeros((0, 3)), iter(()), [[], []]])
def test_nothing_counts_nothing(nothing):
    assert class_counts(nothing, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 255])
def test_what_is_ignored_does_not_count(ignore_index):
    target = torch.tensor([0, 1, 1, 2, ignore_index, 1])
    want = [int(((target == j) & (target != ignore_index)).sum()) for j in range(3)]
    assert class_counts(target, 3, ignore_index).tolist() == want
    assert class_counts([target, target], 3, ignore_index=ignore_index).tolist() == [2 * n for n in want]


def test_progress_over_batches(capsys, monkeypatch):
    """A bar on a terminal, none with progress=False, and none without tqdm."""
    tqdm = pytest.importorskip("tqdm")
    shown = []

    def bar(batches, **options):
        assert options["disable"] is None  # off where there is no terminal
        shown.append(len(batches))
        return batches

    monkeypatch.setattr(tqdm, "tqdm", bar)
    target, want = some_targets()
    assert class_counts(loader(target), 7).tolist() == want and shown == [7]
    assert class_counts(loader(target), 7, progress=False).tolist() == want
    assert class_counts(target, 7).tolist() == want and shown == [7]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert class_counts(loader(target), 7).tolist() == want and shown == [7]
    assert capsys.readouterr() == ("", "")


WRONG_TARGETS = {
    "above": ([0, 3], IndexError, r"targets_or_batches holds 3, .* \[0, 3\) or ignore_index=-100"),
    "below": (torch.tensor([[0, -1]]), IndexError, "targets_or_batches holds -1"),
    "above in a later batch": ([torch.tensor([0]), torch.tensor([7])], IndexError, "targets_or_batches holds 7"),
    "probabilities": (torch.rand(4, 3), TypeError, "targets_or_batches holds torch.float32.*class indices"),
    "floats": ([0.0, 1.0], TypeError, "targets_or_batches holds torch.float32"),
    "bool": (torch.tensor([True]), TypeError, "targets_or_batches holds torch.bool"),
    "dictionaries": ([{"labels": torch.tensor([0])}], TypeError, "a batch that is a dict.*batch\\['labels'\\]"),
    "a dictionary": ({"labels": [0]}, TypeError, "targets_or_batches is a dict"),
    "triples": ([(torch.zeros(1), torch.tensor([0]), "x")], TypeError, "a batch that is a tuple of 3"),
    "a string": ("012", TypeError, "targets_or_batches is a str"),
    "nothing": (None, TypeError, "targets_or_batches is a NoneType"),
    "inputs": ([(torch.tensor([0]), torch.zeros(1))], TypeError, "targets_or_batches holds torch.float32"),
}


@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_what_is_no_target_raises(case):
    given, error, message = WRONG_TARGETS[case]
    with pytest.raises(error, match=message):
        class_counts(given, 3)


@pytest.mark.parametrize(
    ("num_classes", "error"), [(0, ValueError), (-1, ValueError), (3.0, TypeError), (True, TypeError)]
)
def test_the_number_of_classes_must_be_one(num_classes, error):
    with pytest.raises(error, match="num_classes is"):
        class_counts([0], num_classes)


# ---------------------------------------------------------------- weights


def test_inverse_frequency_weights_are_scikit_learns_balanced():
    target, want = some_targets()
    present = torch.tensor(want[:-1])
    labels = target[target >= 0].numpy()
    theirs = len(labels) / (6 * np.bincount(labels))
    ours = inverse_frequency_weights(present)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-14)
    assert float(ours[labels].mean()) == pytest.approx(1, rel=1e-14)  # what a sample weighs


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99, 0.9999, 1 - 3e-8, 1 - 1e-12])
def test_effective_number_weights(beta):
    """Against 60 digits; in floating point 1 - beta^n of the literal formula has lost its own at 1 - 3e-8."""
    counts = [6000, 1200, 240, 60, 1]
    with localcontext() as context:
        context.prec = 60
        exact = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** n) for n in counts]
        exact = [float(5 * weight / sum(exact)) for weight in exact]
    ours = effective_number_weights(counts, beta)
    np.testing.assert_allclose(ours.numpy(), exact, rtol=1e-13)
    assert ours.dtype == torch.float64 and float(ours.sum()) == pytest.approx(5, rel=1e-14)


def test_weights_of_numbers_that_are_infinite_or_none():
    for function, name in (
        (inverse_frequency_weights, "weight 1 / n"),
        (effective_number_weights, "effective weight"),
        (ldam_margins, "LDAM margin"),
    ):
        with pytest.raises(ValueError, match=f"class_counts has a zero, whose {name}"):
            function([3, 0, 1])
        with pytest.raises(ValueError, match="class_counts must be finite"):
            function([3, -1, 1])
        with pytest.raises(ValueError, match="class_counts has shape"):
            function([[3, 1]])
        with pytest.raises(TypeError, match="class_counts is a Prior"):
            function(ik.Prior([3, 1]))
    for beta in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="beta is"):
            effective_number_weights([3, 1], beta)


# ---------------------------------------------------------------- effective priors


def normalised(values):
    return torch.tensor([v / math.fsum(values) for v in values], dtype=torch.float64)


S, W = [5.0, 1.0, 3.0, 2.0], [0.5, 4.0, 1.0, 2.0]
EFFECTIVE = {
    "the data": ({}, COUNTS.tolist()),
    "a sampler": ({"sampler": torch.tensor(S)}, S),
    "a sampler's probabilities": ({"sampler": normalised(S)}, S),
    "weights": ({"weight": torch.tensor(W)}, [n * w for n, w in zip(COUNTS.tolist(), W, strict=True)]),
    "both": ({"sampler": S, "weight": W}, [s * w for s, w in zip(S, W, strict=True)]),
    "a balanced sampler": ({"sampler": "balanced"}, [1] * 4),
    "a balanced sampler and weights": ({"sampler": "balanced", "weight": W}, W),
    "inverse weights": ({"weight": inverse_frequency_weights(COUNTS)}, [1] * 4),
}


@pytest.mark.parametrize("case", EFFECTIVE)
def test_the_effective_prior_is_what_is_seen_times_what_it_weighs(case):
    options, want = EFFECTIVE[case]
    for prior, tau in ((ik.Prior(COUNTS, tau=0.5), 0.5), (normalised(COUNTS.tolist()), 1.0)):
        found = effective_prior(prior, **options)
        assert isinstance(found, ik.Prior) and found.tau == tau
        torch.testing.assert_close(found.probabilities, normalised(want), rtol=1e-13, atol=0)
        torch.testing.assert_close(found.bias, tau * normalised(want).log(), rtol=1e-12, atol=1e-13)


def test_a_weighted_sampler_draws_what_is_said():
    """Its shares are compared with what it draws."""
    targets = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    weights = torch.rand(100, dtype=torch.float64) + 0.1
    weights[targets == 2] *= 20
    sampler = WeightedRandomSampler(weights, num_samples=40000, generator=torch.Generator().manual_seed(0))
    prior = ik.Prior([60, 30, 10])
    want = normalised([float(weights[targets == j].sum()) for j in range(3)])
    for given in (sampler, weights, weights.tolist()):
        found = effective_prior(prior, given, targets=targets).probabilities
        torch.testing.assert_close(found, want, rtol=1e-13, atol=0)
    drawn = class_counts(targets[list(sampler)], 3) / 40000
    torch.testing.assert_close(drawn.double(), want, rtol=0, atol=0.015)  # 6 standard deviations


def test_the_effective_prior_is_what_training_learns():
    """Cross-entropy's optimum over logits without inputs, with a sampler's frequencies and class weights."""
    drawn, weight = torch.tensor(S, dtype=torch.float64), torch.tensor(W, dtype=torch.float64)
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = ik.CrossEntropyLoss(weight)(logits.expand(4, 4), torch.arange(4), sample_weight=drawn)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = effective_prior(ik.Prior(COUNTS), sampler=drawn, weight=weight)
    torch.testing.assert_close(logits.softmax(1)[0].detach(), found.probabilities, rtol=1e-6, atol=0)


def test_an_excluded_class_stays_excluded():
    prior = ik.Prior([3, 0, 1], zero_count="exclude")
    for options in ({}, {"sampler": "balanced"}, {"weight": [1.0, 0.0, 2.0]}, {"sampler": [1, 0, 1]}):
        found = effective_prior(prior, **options)
        assert found.bias[1] == -math.inf and found.probabilities[1] == 0
        assert torch.isfinite(found.bias[[0, 2]]).all()


WRONG_EFFECTIVE = {
    "a class that is never drawn": ({"sampler": [1, 0, 1, 1]}, ValueError, "sampler is 0 for class 1"),
    "a weight of 0": ({"weight": [1, 1, 1, 0]}, ValueError, "weight is 0 for class 3"),
    "a negative weight": ({"weight": [1, 1, 1, -1]}, ValueError, "weight must be finite and at least 0"),
    "weight's shape": ({"weight": [1, 1, 1]}, ValueError, r"weight has shape \(3,\).*prior has 4 classes"),
    "sampler's shape": ({"sampler": [1, 1, 1]}, ValueError, r"sampler has shape \(3,\)"),
    "another word": ({"sampler": "uniform"}, ValueError, "sampler is 'uniform'"),
    "no targets": ({"sampler": WeightedRandomSampler([1.0] * 9, 9)}, ValueError, "give the data's targets"),
    "without replacement": (
        {"sampler": WeightedRandomSampler([1.0] * 9, 5, replacement=False), "targets": [0] * 9},
        ValueError,
        "without replacement.*class_counts",
    ),
    "another sampler": (
        {"sampler": torch.utils.data.SequentialSampler([1, 2])},
        TypeError,
        "sampler is a SequentialSampler.*class_counts",
    ),
    "targets alone": ({"targets": [0, 1]}, ValueError, "targets is given without a sampler"),
    "targets of a word": ({"sampler": "balanced", "targets": [0, 1]}, ValueError, "targets is given with sampler"),
    "fewer targets": ({"sampler": [1.0] * 5, "targets": [0, 1, 2, 3]}, ValueError, r"targets has shape \(4,\)"),
    "a target outside": ({"sampler": [1.0] * 2, "targets": [0, 4]}, IndexError, "targets holds 4"),
    "float targets": ({"sampler": [1.0] * 2, "targets": [0.0, 1.0]}, TypeError, "targets holds torch.float32"),
}


@pytest.mark.parametrize("case", WRONG_EFFECTIVE)
def test_what_does_not_fit_an_effective_prior_raises(case):
    options, error, message = WRONG_EFFECTIVE[case]
    with pytest.raises(error, match=message):
        effective_prior(ik.Prior(COUNTS), **options)


def test_an_effective_prior_is_of_a_prior():
    with pytest.raises(TypeError, match="prior is a list"):
        effective_prior([1, 2, 3])
    with pytest.raises(TypeError, match="prior is a BinaryPrior"):
        effective_prior(ik.BinaryPrior([1, 2], 5))


# ---------------------------------------------------------------- correcting twice

INVERSE = inverse_frequency_weights(COUNTS).float()
PRIOR = ik.Prior(COUNTS)
TWICE = {
    "1 / prior": lambda: ik.FocalLoss(weight=INVERSE, prior=PRIOR),
    "a multiple of it": lambda: ik.FocalLoss(weight=7.5 * INVERSE.double(), prior=PRIOR),
    "capped": lambda: ik.CrossEntropyLoss(INVERSE.clamp(max=20), prior=PRIOR),
    "effective numbers": lambda: ik.FocalLoss(weight=effective_number_weights(COUNTS), prior=PRIOR),
    "counts": lambda: ik.LogitAdjustedLoss(COUNTS, weight=INVERSE),
    "balanced softmax": lambda: ik.BalancedSoftmaxLoss(COUNTS, weight=INVERSE),
    "VS loss": lambda: ik.VSLoss(COUNTS, weight=INVERSE),
    "any tau": lambda: ik.LogitAdjustedLoss(COUNTS, tau=0.5, weight=INVERSE),
    "probabilities": lambda: ik.FocalLoss(weight=INVERSE, prior=PRIOR.probabilities),
    "a class left out": lambda: ik.FocalLoss(
        weight=torch.cat([INVERSE, torch.ones(1)]), prior=ik.Prior([*COUNTS.tolist(), 0], zero_count="exclude")
    ),
    "of a layer": lambda: ik.LinearLoss(3, 4, ik.FocalLoss(weight=INVERSE, prior=PRIOR)),
}
ONCE = {
    "weights alone": lambda: ik.FocalLoss(weight=INVERSE),
    "a prior alone": lambda: ik.FocalLoss(prior=PRIOR),
    "ones": lambda: ik.FocalLoss(weight=torch.ones(4), prior=PRIOR),
    "1 / square root": lambda: ik.FocalLoss(weight=INVERSE.sqrt(), prior=PRIOR),
    "the prior itself": lambda: ik.FocalLoss(weight=PRIOR.probabilities, prior=PRIOR),
    "the inverse square": lambda: ik.FocalLoss(weight=INVERSE**2, prior=PRIOR),
    "balanced classes": lambda: ik.FocalLoss(weight=torch.ones(3), prior=ik.Prior([50, 52, 49])),
    "the effective prior": lambda: ik.FocalLoss(weight=INVERSE, prior=effective_prior(PRIOR, weight=INVERSE)),
    "margins": lambda: ik.LDAMLoss(COUNTS, weight=INVERSE),
    "weights of another shape": lambda: ik.FocalLoss(weight=torch.ones(3), prior=PRIOR),
    "a prior that has not counted": lambda: ik.FocalLoss(weight=INVERSE, prior=ik.RunningPrior(4)),
    "on meta": lambda: ik.FocalLoss(weight=INVERSE.to("meta"), prior=PRIOR),
    "one class": lambda: ik.FocalLoss(weight=torch.ones(1), prior=ik.Prior([5])),
}


@pytest.mark.parametrize("case", TWICE)
def test_correcting_twice_warns_once(case):
    """At the caller's line, and never again."""
    with pytest.warns(UserWarning, match="corrects the imbalance twice.*effective_prior") as caught:
        loss = TWICE[case]()
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case != "of a layer":
            x = torch.randn(2, len(loss.weight))
            loss(x, torch.tensor([0, 1])), loss.half(), loss.eval()(x, torch.tensor([0, 1]))


@pytest.mark.parametrize("case", ONCE)
def test_correcting_once_does_not_warn(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ONCE[case]()


def test_reassigning_weight_warns():
    loss = ik.FocalLoss(prior=PRIOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.weight = torch.ones(4)
        loss.weight = None
        loss.label_smoothing = 0.1
    with pytest.warns(UserWarning, match="corrects the imbalance twice") as caught:
        loss.weight = INVERSE
    assert len(caught) == 1 and caught[0].filename == __file__ and torch.equal(loss.weight, INVERSE)
    running = ik.FocalLoss(prior=ik.RunningPrior(4))
    running.running_prior.update(torch.repeat_interleave(torch.arange(4), COUNTS))
    with pytest.warns(UserWarning, match="corrects the imbalance twice"):
        running.weight = INVERSE
