"""What log-odds buy: loss and gradient of sure rows, by the usual formulas and here, against float64.

    .venv/bin/python bench/numerics.py            # seconds; prints the tables of docs/numerics.md

Rows have a given log-odds of their target. The usual formulas are written in log-softmax and sigmoid and differentiated
by autograd, in the logits' dtype; the oracle is float64 on the same rounded logits, by the log-sum-exp of the other
classes, so that nothing is subtracted from one. An error is relative to the row's own loss, or to the largest entry of
its own gradient, and the worst row counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from formulas import EAGER_OBJECTIVES
from report import machine_lines
from results import Run, machine
from torch import Tensor

import imbalance_kernels as ik

NUM_ROWS, NUM_CLASSES = 500, 1000
SHARPNESS = 2.0
OFFSETS = (0.0, 1e2, 1e4)
SCAN = torch.arange(0, 25.01, 0.25, dtype=torch.float64)  # log-odds; all exact gradients are normal float32 numbers
GAMMAS = (0.5, 1.0, 2.0)
WRONG = 0.01  # of the gradient's error, more than any rounding to the dtype of the gradient

Losses = Callable[[Tensor, Tensor], Tensor]  # logits (N, C), target (N,) -> losses (N,)


@dataclass(frozen=True)
class Compared:
    """A loss by the usual formula, by this package, and exactly as a function of the log-odds (N,) in float64."""

    name: str
    usual: Losses
    ours: ik.SoftmaxLoss
    exact: Callable[[Tensor], Tensor]
    sharp: Callable[[Tensor], Tensor] | None = None  # exactly too: factor of the log-odds at the second temperature


def _log_p(x: Tensor, target: Tensor) -> Tensor:
    return F.log_softmax(x, dim=1).gather(1, target[:, None])[:, 0]


def _of_log_p(formula: Callable[[Tensor], Tensor]) -> Losses:
    return lambda x, target: formula(_log_p(x, target))


def _truncated(x: Tensor, target: Tensor) -> Tensor:
    weight = 1 - F.softmax(SHARPNESS * x, dim=1).gather(1, target[:, None])[:, 0]
    return -weight * _log_p(x, target)


def _focal(gamma: float) -> Callable[[Tensor], Tensor]:
    return lambda d: -torch.exp(gamma * F.logsigmoid(-d)) * F.logsigmoid(d)


def compared() -> list[Compared]:
    none = {"reduction": "none"}
    return [
        Compared(
            "cross-entropy",
            lambda x, target: F.cross_entropy(x, target, reduction="none"),
            ik.CrossEntropyLoss(**none),
            lambda d: -F.logsigmoid(d),
        ),
        Compared(
            "focal, gamma 0.5",
            _of_log_p(lambda log_p: -((1 - log_p.exp()) ** 0.5) * log_p),
            ik.FocalLoss(0.5, **none),
            _focal(0.5),
        ),
        Compared("focal, gamma 2", _of_log_p(EAGER_OBJECTIVES["focal"]), ik.FocalLoss(2.0, **none), _focal(2.0)),
        Compared(
            "soft truncation, K 1",
            _of_log_p(EAGER_OBJECTIVES["soft_truncation"]),
            ik.SoftTruncationLoss(form="log_odds", **none),
            _focal(1.0),
        ),
        Compared(
            "soft truncation, K 2",
            _truncated,
            ik.SoftTruncationLoss(SHARPNESS, form="one_minus_softmax", **none),
            lambda d: -F.logsigmoid(d),
            sharp=lambda d: torch.sigmoid(-d),
        ),
        Compared(
            "generalised cross-entropy, q 0.7",
            _of_log_p(EAGER_OBJECTIVES["gce"]),
            ik.GeneralizedCrossEntropyLoss(**none),
            lambda d: -torch.expm1(0.7 * F.logsigmoid(d)) / 0.7,
        ),
        Compared(
            "smooth accuracy",
            _of_log_p(EAGER_OBJECTIVES["smooth_accuracy"]),
            ik.SmoothAccuracyLoss(**none),
            lambda d: torch.sigmoid(-d),
        ),
    ]


def _log_odds(x: Tensor, target: Tensor) -> Tensor:
    rest = x.scatter(1, target[:, None], -math.inf)
    return x.gather(1, target[:, None])[:, 0] - rest.logsumexp(dim=1)


def exactly(loss: Compared) -> Losses:
    def losses(x: Tensor, target: Tensor) -> Tensor:
        value = loss.exact(_log_odds(x, target))
        return value if loss.sharp is None else value * loss.sharp(_log_odds(SHARPNESS * x, target))

    return losses


def sure_rows(log_odds: float, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) whose targets (N,) have this log-odds, up to the rounding to dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, NUM_CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(NUM_CLASSES, (NUM_ROWS,), generator=generator)
    aim = x.gather(1, target[:, None])[:, 0] + log_odds - _log_odds(x, target)
    return (x.scatter(1, target[:, None], aim[:, None]) + offset).to(dtype), target


def value_and_gradient(losses: Losses, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = losses(x, target)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach().double(), gradient.double()


def worst_errors(losses: Losses, exact: Losses, x: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the largest relative errors over all rows, of the loss and of the gradient; NaN where either is."""
    value, gradient = value_and_gradient(losses, x, target)
    true_value, true_gradient = value_and_gradient(exact, x.double(), target)
    of_value = (value - true_value).abs() / true_value.abs()
    of_gradient = (gradient - true_gradient).abs().amax(1) / true_gradient.abs().amax(1)
    return tuple(float(error.max()) for error in (of_value, of_gradient))


def shown(error: float) -> str:
    """Return an error to one digit; 1 is all of it."""
    return "NaN" if math.isnan(error) else f"{error:.0e}".replace("e-0", "e-") if error < 0.095 else f"{error:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def errors_of_sure_rows(dtype: torch.dtype, log_odds: Sequence[float]) -> str:
    """Each cell: error of the loss / of the gradient."""
    rows = []
    for loss in compared():
        for who, losses in (("usual", loss.usual), ("here", loss.ours)):
            cells = [
                " / ".join(map(shown, worst_errors(losses, exactly(loss), *sure_rows(d, dtype)))) for d in log_odds
            ]
            rows.append([loss.name if who == "usual" else "", who, *cells])
    return table(["loss", "", *(f"log-odds {d:g}" for d in log_odds)], rows)


def errors_under_an_offset(dtype: torch.dtype) -> str:
    loss = compared()[0]
    candidates = {
        "`logsumexp(x) - x_t`": lambda x, target: x.logsumexp(dim=1) - x.gather(1, target[:, None])[:, 0],
        "`F.cross_entropy`": loss.usual,
        "here": loss.ours,
    }
    rows = [
        [
            name,
            *(
                " / ".join(map(shown, worst_errors(losses, exactly(loss), *sure_rows(0, dtype, offset))))
                for offset in OFFSETS
            ),
        ]
        for name, losses in candidates.items()
    ]
    return table(["cross-entropy", *(f"offset {offset:g}" for offset in OFFSETS)], rows)


def torchvisions_formula(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss as torchvision.ops has it, alpha switched off."""
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    return F.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** gamma


def our_sigmoid_focal(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    return ik.functional.sigmoid_focal_loss(x, y, alpha=-1, gamma=gamma, reduction="none")


def first_failures(loss: Callable[[Tensor, Tensor, float], Tensor], gamma: float, dtype: torch.dtype) -> list[str]:
    """Return from which log-odds on the gradient is wrong by 1 % or more, exactly 0, NaN: of either label."""
    found = []
    for label in (1.0, 0.0):
        x = (SCAN if label == 1 else -SCAN).to(dtype)
        y = torch.full_like(x, label)
        gradients = []
        for of, logits, labels in (
            (loss, x, y),
            (lambda x, y, gamma: _focal(gamma)((2 * y - 1) * x), x.double(), y.double()),
        ):
            logits = logits.clone().requires_grad_()
            gradients.append(torch.autograd.grad(of(logits, labels, gamma).sum(), logits)[0].double())
        ours, exact = gradients
        wrong = ~((ours - exact).abs() < WRONG * exact.abs())
        found.append([_first(wrong), _first(ours == 0), _first(ours.isnan())])
    return [
        positive if positive == negative else f"{positive}, {negative}"
        for positive, negative in zip(*found, strict=True)
    ]


def _first(failed: Tensor) -> str:
    """Return the lowest log-odds at which it failed."""
    return f"{float(SCAN[failed.nonzero()[0, 0]]):g}" if bool(failed.any()) else "never"


def failures_of_sigmoids() -> str:
    """Log-odds of the truth from which on a gradient fails; two numbers are of positives, of negatives."""
    rows = [
        [str(dtype).removeprefix("torch."), f"{gamma:g}", who, *first_failures(loss, gamma, dtype)]
        for dtype in (torch.float32, torch.bfloat16)
        for gamma in GAMMAS
        for who, loss in (("torchvision's formula", torchvisions_formula), ("here", our_sigmoid_focal))
    ]
    return table(["dtype", "gamma", "", "wrong by 1 % from", "exactly 0 from", "NaN from"], rows)


def tables() -> dict[str, str]:
    """Return each table of docs/numerics.md by its heading."""
    return {
        "float32: error of the loss / of the gradient": errors_of_sure_rows(torch.float32, (5, 10, 15, 25)),
        "bfloat16: error of the loss / of the gradient": errors_of_sure_rows(torch.bfloat16, (2, 5, 10, 25)),
        "float32, log-odds 0, an offset of all logits": errors_under_an_offset(torch.float32),
        "sigmoid focal loss: log-odds from which on the gradient fails": failures_of_sigmoids(),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("python bench/numerics.py\n")
    print(machine_lines(Run(machine(torch.get_num_threads()))))
    for heading, text in tables().items():
        print(f"\n## {heading}\n\n{text}")


if __name__ == "__main__":
    main()
