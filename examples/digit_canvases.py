"""Images to detect digits in: real handwritten ones at random places, sizes and contrasts, from long-tailed classes.

The digits are scikit-learn's, of 8 x 8 pixels. Those in test images are others than those in training images, and there
every class is as frequent as another, so that the rare ones can be measured too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from image_data import read_digits
from torch import Tensor

CLASS_NAMES = tuple(str(digit) for digit in range(10))
CANVAS_SIZE = 96  # pixels
DIGITS = range(3, 9)  # in an image
SIZES = range(16, 25)  # pixels, of a digit with its margins
CONTRASTS = (0.4, 1.0)
NOISE = 0.15  # standard deviation; the brightest pixel of a digit is its contrast
MOST_OVERLAP = 0.15  # of the smaller box's area
INK = 0.25  # a digit's box holds its pixels that are brighter than this, of 1
NO_DIGIT = -1


@dataclass(frozen=True)
class Canvases:
    images: Tensor  # (N, 1, size, size), float32
    boxes: Tensor  # (N, M, 4), float32; left, top, right, bottom in pixels, as many rows as the fullest image needs
    labels: Tensor  # (N, M), int64; NO_DIGIT where there is none

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Canvases:
        return Canvases(self.images.to(device), self.boxes.to(device), self.labels.to(device))


def class_probabilities(imbalance_factor: float) -> Tensor:
    """(C,): class 0 is the most frequent, the last one imbalance_factor times rarer, what is between exponential."""
    weights = imbalance_factor ** -torch.linspace(0, 1, len(CLASS_NAMES), dtype=torch.float64)
    return weights / weights.sum()


class Stamps:
    """The digits of one part of the data at every size, with their boxes."""

    def __init__(self, digits: Tensor, labels: Tensor) -> None:
        self.of_class = [(labels == k).nonzero()[:, 0].tolist() for k in range(len(CLASS_NAMES))]
        digits = digits.float()[:, None] / 16
        self.pixels, self.boxes = {}, {}  # by size: (N, size, size); N boxes
        for size in SIZES:
            stamps = F.interpolate(digits, (size, size), mode="bicubic").clamp(0, 1)[:, 0]
            ink = stamps > INK
            sides = [ink.any(1), ink.any(2)]  # columns, rows
            first = [side.int().argmax(1) for side in sides]
            last = [size - side.flip(1).int().argmax(1) for side in sides]
            self.pixels[size], self.boxes[size] = stamps, torch.stack([*first, *last], 1).tolist()


def _overlap(first: list[float], second: list[float]) -> float:
    """Intersection over the smaller area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(width, 0) * max(height, 0) / min(areas)


def _draw(
    image: Tensor, stamps: Stamps, labels: list[int], source: random.Random
) -> tuple[list[list[float]], list[int]]:
    """Put digits where they leave one another legible; one that finds no place in 50 tries is left out."""
    boxes: list[list[float]] = []
    drawn: list[int] = []
    for label in labels:
        size, digit = source.choice(SIZES), source.choice(stamps.of_class[label])
        left, top, right, bottom = stamps.boxes[size][digit]
        contrast = source.uniform(*CONTRASTS)
        for _ in range(50):
            x, y = source.randint(0, CANVAS_SIZE - size), source.randint(0, CANVAS_SIZE - size)
            box = [x + left, y + top, x + right, y + bottom]
            if all(_overlap(box, other) <= MOST_OVERLAP for other in boxes):
                part = image[y : y + size, x : x + size]
                torch.maximum(part, contrast * stamps.pixels[size][digit], out=part)
                boxes.append(box)
                drawn.append(label)
                break
    return boxes, drawn


def compose(stamps: Stamps, probabilities: Tensor, num_images: int, seed: int) -> Canvases:
    """Draw images; the seed decides everything in them."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(num_images, CANVAS_SIZE, CANVAS_SIZE)
    boxes = torch.zeros(num_images, DIGITS[-1], 4)
    labels = torch.full((num_images, DIGITS[-1]), NO_DIGIT)
    for image, its_boxes, its_labels in zip(images, boxes, labels, strict=True):
        wanted = source.choices(range(len(CLASS_NAMES)), probabilities.tolist(), k=source.choice(DIGITS))
        drawn = _draw(image, stamps, wanted, source)
        its_boxes[: len(drawn[0])] = torch.tensor(drawn[0])
        its_labels[: len(drawn[1])] = torch.tensor(drawn[1])
    images += NOISE * torch.randn(images.shape, generator=generator)
    return Canvases(images[:, None], boxes, labels)


def load_canvases(num_train: int, num_test: int, imbalance_factor: float, seed: int) -> tuple[Canvases, Canvases]:
    """Training images of long-tailed classes, and test images of other digits and balanced classes."""
    train_digits, train_labels, test_digits, test_labels = read_digits()
    train = compose(Stamps(train_digits, train_labels), class_probabilities(imbalance_factor), num_train, 2 * seed)
    return train, compose(Stamps(test_digits, test_labels), class_probabilities(1), num_test, 2 * seed + 1)
