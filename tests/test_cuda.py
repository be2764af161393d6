"""What is CUDA's own: widths around the boundaries of its kernels, layouts of rows, targets that are no class.

The kernels run emulated on the CPU (`make test-emulated`); everything else is left out. The tables of the other files
run them through everything that all implementations share.
"""

import math

import pytest
import test_softmax_loss as tables
import torch
from implementations import EMULATED
from test_softmax_loss import check, make_case
from test_triton import check_targets_outside

from imbalance_kernels.functional import softmax_loss, target_and_rest

pytestmark = pytest.mark.skipif(not EMULATED, reason="make test-emulated runs the CUDA kernels")

# Numbers of 16 bytes. A row takes 1 to 32 lanes with 4 packs each, or 32 with 8; then 1 to 16 blocks of at most 256
# threads with 8 packs each; then it is swept by up to 1024 threads with 4 packs each at a time.
PACK = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8, torch.float64: 2}
BOUNDARIES = {
    "a lane": 4,
    "two lanes": 8,
    "all lanes": 128,
    "a warp": 32 * 8,
    "a block": 256 * 8,
    "two blocks": 2 * 256 * 8,
    "four blocks": 4 * 256 * 8,
    "eight blocks": 8 * 256 * 8,
    "sixteen blocks": 16 * 256 * 8,
}

OPTIONS = {
    "plain": lambda num_classes: {},
    "prior": tables.OPTIONS["prior"],
    "everything": tables.OPTIONS["everything"],
}


def logits_of(layout: str, num_rows: int, num_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits as make_case gives them, in memory as the layout says."""
    logits, _ = make_case((num_rows, num_classes), dtype)
    if layout == "strided":
        wide = torch.full((num_rows, num_classes + 2 * PACK[dtype]), math.nan, dtype=dtype)
        return wide[:, :num_classes].copy_(logits)
    if layout == "unaligned":
        flat = torch.full((num_rows * num_classes + 1,), math.nan, dtype=dtype)
        return flat[1:].view(num_rows, num_classes).copy_(logits)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_widths(option, boundary, dtype):
    """The widest row of each kernel, and one class more."""
    for num_classes in (BOUNDARIES[boundary] * PACK[dtype], BOUNDARIES[boundary] * PACK[dtype] + 1):
        logits, target = make_case((9 if num_classes < 5000 else 3, num_classes), dtype)
        options = OPTIONS[option](num_classes)
        reductions = ["mean", "none"] if num_classes < 10000 else ["mean"]
        for reduction in reductions:
            check(logits, target, "cuda", reduction, options, options)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned"])
@pytest.mark.parametrize("dtype", PACK, ids=str)
@pytest.mark.parametrize("num_classes", [40, 1032, 9016])
@pytest.mark.parametrize("option", OPTIONS)
def test_layouts(option, num_classes, dtype, layout):
    """Rows of whole packs, and the same numbers where vectors of 16 bytes would be misaligned."""
    logits = logits_of(layout, 3, num_classes, dtype)
    target = torch.tensor([0, num_classes - 1, -100])
    options = OPTIONS[option](num_classes)
    check(logits, target, "cuda", "sum", options, options)
    split = target_and_rest(logits, target, impl="cuda")
    exact = target_and_rest(logits.double(), target, impl="reference")
    for found, expected in zip(split, exact, strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [40, 1032, 9016, 140000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_are_no_class(num_classes, smoothing):
    check_targets_outside(num_classes, smoothing, impl="cuda")


@pytest.mark.parametrize("num_classes", [40, 1032, 9016, 140000])
def test_ignored_rows_are_not_read(num_classes):
    """In place they become 0, whatever they held; with a normalizer of 0 all do."""
    logits, _ = make_case((4, num_classes), torch.float32)
    logits[1] = math.nan
    target = torch.tensor([1, -100, 2, num_classes - 1])
    for normalizer in (3.0, 0.0):
        x = logits.clone().requires_grad_()
        loss = softmax_loss(x * 1, target, normalizer=normalizer, inplace=True, impl="cuda")
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and (x.grad[1] == 0).all()
        assert (loss == 0) == (normalizer == 0) and (x.grad == 0).all() == (normalizer == 0)
