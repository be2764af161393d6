"""Softmax focal loss of images (N, C, H, W): ours where the logits are, and eager formulas on a permuted copy.

Loss and gradient on CPU, beside a warm copy of the logits. Values are compared first, in float64 on a small image.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import torch
from candidates import COMPILED, COPY, EAGER, OURS, Candidate, Produce
from timing import measure
from torch import Tensor

import imbalance_kernels as ik

GAMMA = 2.0
LossOf = Callable[[Tensor, Tensor], Tensor]


def permuted(input: Tensor, target: Tensor) -> Tensor:  # (N, C, H, W), (N, H, W)
    """The usual formula, on rows; an ignored pixel counts nothing."""
    rows, labels = input.permute(0, 2, 3, 1).reshape(-1, input.shape[1]), target.reshape(-1)
    valid = labels != -100
    log_probs = torch.log_softmax(rows, dim=1)
    log_p = log_probs.gather(1, torch.where(valid, labels, 0)[:, None]).squeeze(1)
    losses = -((1 - log_p.exp()) ** GAMMA) * log_p
    return torch.where(valid, losses, torch.zeros_like(losses)).sum() / valid.sum()


def channels_first(input: Tensor, target: Tensor) -> Tensor:  # the same
    """The formula without a permuted copy: cross-entropy takes classes in dimension 1."""
    log_p = -torch.nn.functional.cross_entropy(input, target, reduction="none")
    return (-((1 - log_p.exp()) ** GAMMA) * log_p).sum() / (target != -100).sum()


def images(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) and labels (N, H, W), a tenth of them ignored, in patches as a border is."""
    torch.manual_seed(0)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target[:, :, : shape[3] // 10] = -100
    return torch.randn(shape, dtype=dtype) * 2, target


def step_of(loss_of: LossOf, input: Tensor, target: Tensor) -> Callable[[], Tensor]:
    """One call: the loss and the gradient of the logits."""
    leaf = input.detach().requires_grad_()

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(loss_of(leaf, target), leaf)
        return gradient

    return step


def check(losses: dict[str, LossOf]) -> None:
    """Raise unless everybody has the gradient of the first."""
    input, target = images((2, 19, 9, 33), torch.float64)
    first, *others = (step_of(loss_of, input, target)() for loss_of in losses.values())
    for gradient in others:
        torch.testing.assert_close(gradient, first, rtol=1e-7, atol=1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", nargs=4, type=int, default=[8, 19, 512, 1024], metavar=("N", "C", "H", "W"))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the formulas")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    losses: dict[str, LossOf] = {
        f"{EAGER}, permuted": permuted,
        f"{EAGER}, channels first": channels_first,
        OURS: functools.partial(ik.functional.focal_loss, gamma=GAMMA, impl=OURS),
    }
    if arguments.compile:
        losses |= {name.replace(EAGER, COMPILED): torch.compile(loss) for name, loss in losses.items() if EAGER in name}
    check(losses)

    input, target = images(tuple(arguments.shape), getattr(torch, arguments.dtype))
    buffer = torch.empty_like(input).copy_(input)
    parameter, memory = torch.zeros((), requires_grad=True), input.clone()

    def in_place() -> Tensor:
        logits = Produce.apply(parameter, memory)
        loss = ik.functional.focal_loss(logits, target, gamma=GAMMA, impl=OURS, inplace=True)
        loss.backward()
        return memory

    candidates = [
        Candidate("", COPY, "", lambda: buffer.copy_(input)),
        *(Candidate("", name, "", step_of(loss_of, input, target)) for name, loss_of in losses.items()),
        Candidate("", f"{OURS}, in place", "", in_place),
    ]
    for candidate in candidates:
        candidate.step()
    measurements = measure(candidates, arguments.samples, 0.005, long_call=math.inf)  # to each the memory of its own
    copy, permuted_eager = measurements[0], measurements[1]
    print(f"{'x'.join(map(str, arguments.shape))} {arguments.dtype}, {arguments.threads} threads, loss and gradient")
    for measurement in measurements:
        print(
            f"{measurement.candidate:32} median {measurement.median * 1e3:8.1f} ms, minimum "
            f"{measurement.minimum * 1e3:8.1f} ms: {measurement.median / copy.median:6.2f} copies, "
            f"{permuted_eager.median / measurement.median:5.2f} x as fast as the first formula"
        )


if __name__ == "__main__":
    main()
