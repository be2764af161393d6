"""Counting classes."""

import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from imbalance_kernels.priors import class_counts

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
