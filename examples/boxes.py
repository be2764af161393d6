"""Boxes as (left, top, right, bottom): overlap, non-maximum suppression, and average precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    from torchvision.ops import nms as _torchvision_nms
except (ImportError, RuntimeError):  # the latter where it was built for another torch
    _torchvision_nms = None


@dataclass(frozen=True)
class Detections:
    """What was found in one image, the surest first."""

    boxes: Tensor  # (D, 4)
    scores: Tensor  # (D,)
    labels: Tensor  # (D,)


@dataclass(frozen=True)
class Truths:
    """What is there in one image."""

    boxes: Tensor  # (G, 4)
    labels: Tensor  # (G,)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """(N, M): intersection over union of boxes (N, 4) and (M, 4); of two empty boxes 0."""
    corners = torch.maximum(first[:, None, :2], second[:, :2]), torch.minimum(first[:, None, 2:], second[:, 2:])
    intersection = (corners[1] - corners[0]).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def own_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """torchvision.ops.nms: indices of the boxes that overlap no better kept one by more, the best first."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = (iou(boxes[order], boxes[order]) > threshold).cpu().numpy()
    keep = torch.ones(len(order), dtype=torch.bool)
    kept = keep.numpy()  # the same memory: rows of an array are quicker to reach
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[keep.to(order.device)]


nms = own_nms if _torchvision_nms is None else _torchvision_nms


def nms_per_class(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices that remain when boxes suppress those of their own class: each class is moved to a place of its own."""
    if not len(boxes):
        return labels
    apart = boxes.max() - boxes.min() + 1
    return nms(boxes + labels[:, None] * apart, scores, threshold)


def hits(found: Detections, truths: Truths, threshold: float) -> Tensor:
    """(D,) bool: which detections are right, the surest first choosing: the best overlap of its class not yet taken."""
    overlaps = iou(found.boxes, truths.boxes) * (found.labels[:, None] == truths.labels)
    overlaps = torch.where(overlaps >= threshold, overlaps, 0.0).cpu().numpy()  # (D, G)
    right = torch.zeros(len(found.labels), dtype=torch.bool)
    for detection in overlaps.any(1).nonzero()[0]:
        truth = overlaps[detection].argmax()
        if overlaps[detection, truth] > 0:
            right[detection] = True
            overlaps[:, truth] = 0
    return right


def average_precision(scores: Tensor, right: Tensor, num_truths: int) -> float:
    """Area under precision over recall, where a recall's precision is the best at that recall or above.

    Equal scores enter together: their order means nothing. NaN where there is nothing to find.
    """
    if not num_truths:
        return float("nan")
    if not len(scores):
        return 0.0
    order = scores.argsort(descending=True)
    scores, right = scores[order], right[order].double()
    last_of_score = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    rank = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    true_positives = right.cumsum(0)[last_of_score]
    precision = true_positives / rank[last_of_score]
    envelope = precision.flip(0).cummax(0).values.flip(0)
    recall = torch.cat([torch.zeros(1, dtype=torch.float64), true_positives / num_truths])
    return float((recall.diff() * envelope).sum())


def average_precision_per_class(
    found: list[Detections], truths: list[Truths], num_classes: int, threshold: float = 0.5
) -> Tensor:
    """(C,) float64: of all images together, a detection being right at this overlap."""
    right = torch.cat([hits(*pair, threshold) for pair in zip(found, truths, strict=True)])
    scores = torch.cat([image.scores for image in found]).cpu()
    labels = torch.cat([image.labels for image in found]).cpu()
    counts = torch.cat([image.labels for image in truths]).bincount(minlength=num_classes).tolist()
    values = [average_precision(scores[labels == k], right[labels == k], counts[k]) for k in range(num_classes)]
    return torch.tensor(values, dtype=torch.float64)
