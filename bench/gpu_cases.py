"""A few small cases through every CUDA kernel, for compute-sanitizer, whose tools slow them a hundredfold.

    compute-sanitizer --tool racecheck python bench/gpu_cases.py

Values are compared with the reference in float64. On a CPU, with the emulated library, it is that library's sanitizers
that look on.
"""

from __future__ import annotations

import sys

import torch

import imbalance_kernels as ik

# Rows of one lane, of several, of a block, of a cluster and in sweeps, whole packs and not; (N, C)
SHAPES = ((9, 3), (70, 91), (33, 1000), (5, 4100), (3, 32000), (2, 100001), (2, 262160))
LOSSES = {
    "plain": ik.CrossEntropyLoss,
    "prior": lambda **keywords: ik.FocalLoss(margin=0.2, scale=2.0, **keywords),
    "everything": lambda **keywords: ik.FocalLoss(label_smoothing=0.1, z_loss=1e-3, softcap=8.0, **keywords),
}


def error_of(num_rows: int, num_classes: int, dtype: torch.dtype, loss: str, keywords: dict, device: str) -> float:
    """Return the largest error of a row's gradient, relative to the row's largest entry."""
    random = torch.Generator().manual_seed(num_rows + num_classes)
    x = torch.randn(num_rows, num_classes, generator=random).to(dtype)
    target = torch.randint(num_classes, (num_rows,), generator=random)
    target[-1] = -100 if num_rows > 2 else target[-1]
    exact = x.double().requires_grad_()
    reference = {name: value for name, value in keywords.items() if name != "inplace"}
    LOSSES[loss](impl="reference", **reference)(exact, target).sum().backward()
    leaf = x.to(device, copy=True).requires_grad_()
    logits = leaf * 1  # so that it may be overwritten
    value = LOSSES[loss](impl="cuda", **keywords)(logits, target.to(device)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    size = exact.grad.abs().amax(dim=1).clamp_min(1e-30)
    return float(((gradient.cpu().double() - exact.grad).abs().amax(dim=1) / size).max())


def split_error(num_rows: int, num_classes: int, device: str) -> float:
    """Return the same of target_and_rest, whose backward has a kernel of its own."""
    x, target = torch.randn(num_rows, num_classes), torch.randint(num_classes, (num_rows,))
    gradients = []
    for impl, logits in (("cuda", x.to(device, copy=True)), ("reference", x.double())):
        leaf = logits.requires_grad_()
        split = ik.functional.target_and_rest(leaf, target.to(leaf.device), impl=impl)
        split.log_odds.square().sum().backward()
        gradients.append(leaf.grad.cpu().double())
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    wrong = []
    count = 0
    for shape in SHAPES if device != "cpu" else SHAPES[:4]:
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 8.5e-3)):
            for loss in LOSSES:
                for keywords in ({}, {"inplace": True}, {"reduction": "none"}):
                    error = error_of(*shape, dtype, loss, keywords, device)
                    count += 1
                    if not error <= limit:
                        wrong.append(f"{shape} {dtype} {loss} {keywords}: relative error {error:.2e}")
        error = split_error(*shape, device)
        count += 1
        if not error <= 1e-5:
            wrong.append(f"{shape} target_and_rest: relative error {error:.2e}")
    print(f"{count} cases, {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
