"""One run of the long-tail study: a small network trained with one method on one data set, and what it reached."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from image_data import LongTailedImages, load_images
from study_methods import CROSS_ENTROPY, Method, log_prior
from torch import Tensor, nn

from imbalance_kernels import priors

POST_HOC_TAUS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Setting:
    """A training set; the test set is that of its images, every class as frequent."""

    name: str
    imbalance_factor: int
    seeds: int
    profile: str = "exponential"
    digits: bool = False
    batch_size: int = 128
    steps: int = 1000
    learning_rate: float = 4e-3
    weight_decay: float = 2e-2  # of weights, not of biases
    deferred_from: float = 0.75  # of the steps: when deferred weights are switched on


FASHION = Setting("Fashion-MNIST, factor 100", 100, seeds=5)
SETTINGS = (
    FASHION,
    Setting("Fashion-MNIST, factor 10", 10, seeds=5),
    Setting("Fashion-MNIST, factor 500", 500, seeds=5),
    Setting("Fashion-MNIST, factor 100, step profile", 100, seeds=5, profile="step"),
    Setting("digits, factor 20", 20, seeds=3, digits=True, batch_size=32, steps=600),
)


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers; the last one gives cosines times `scale` where that is not 1."""

    def __init__(self, image_size: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * (image_size // 4) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, num_classes, bias=scale == 1)
        if scale == 1:
            nn.init.zeros_(self.head.bias)  # or a prior that it starts with would not be all that differs
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, or cosines in training, which losses of cosines scale themselves."""
        features = self.features(images)
        if self.scale == 1:
            return self.head(features)
        cosines = F.linear(F.normalize(features), F.normalize(self.head.weight))
        return cosines if self.training else self.scale * cosines


@functools.lru_cache(maxsize=2)
def images_of(setting: Setting, seed: int, folder: Path | None) -> LongTailedImages:
    """Return the images of a setting and a seed; methods follow one another on the same."""
    return load_images(folder, setting.imbalance_factor, seed, setting.profile, setting.digits)


def batches(data: LongTailedImages, setting: Setting, is_balanced: bool, seed: int):
    """Yield the indices of each step's images: the data shuffled again and again, or every class as often."""
    generator = torch.Generator().manual_seed(seed)
    weights = (1 / data.class_counts.double())[data.train_labels]
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(setting.steps):
        if is_balanced:
            yield torch.multinomial(weights, setting.batch_size, replacement=True, generator=generator)
            continue
        if len(order) < setting.batch_size:
            order = torch.randperm(len(data.train_labels), generator=generator)
        yield order[: setting.batch_size]
        order = order[setting.batch_size :]


def train(method: Method, data: LongTailedImages, setting: Setting, seed: int) -> Tensor:
    """Return the test logits (N, C). The seed fixes the initial weights and the batches, whatever the method."""
    torch.manual_seed(seed)
    model = SmallCNN(data.train_images.shape[-1], len(data.class_counts), method.scale)
    if method.starts_with_prior:
        priors.init_prior_bias_(model.head, log_prior(data.class_counts).exp())
    model.to(memory_format=torch.channels_last)
    loss_function = method.loss(data.class_counts)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=setting.weight_decay
    )
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.learning_rate, total_steps=setting.steps, pct_start=0.1
    )
    for step, batch in enumerate(batches(data, setting, method.is_balanced, seed)):
        if method.deferred is not None and step == round(setting.deferred_from * setting.steps):
            loss_function.weight = method.deferred(data.class_counts).float()
        images = data.train_images[batch].contiguous(memory_format=torch.channels_last)
        loss = loss_function(model(images), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images) for images in data.test_images.split(1000)])


def recalls(logits: Tensor, labels: Tensor) -> list[float]:
    """The share of each class's test images that is recognised, (C,)."""
    hits = (logits.argmax(1) == labels).double()
    found = torch.zeros(logits.shape[1], dtype=torch.float64).index_add(0, labels, hits)
    return [round(x, 5) for x in (found / labels.bincount(minlength=logits.shape[1])).tolist()]


def calibration_error(logits: Tensor, labels: Tensor, weight: Tensor) -> float:
    """ECE: mean distance of confidence and accuracy over bins of confidence; images weigh `weight` (N,)."""
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    difference = weight * (confidence - (predicted == labels).double())
    per_bin = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, difference)
    return round(float(per_bin.abs().sum() / weight.sum()), 5)


def run(method: Method, setting: Setting, seed: int, folder: Path | None) -> dict[str, Any]:
    """Train and test; return what goes to the results, as JSON has it."""
    begin = time.perf_counter()
    data = images_of(setting, seed, folder)
    logits = train(method, data, setting, seed)
    labels, counts = data.test_labels, data.class_counts
    evidence = method.evidence(logits, counts)
    with_prior = evidence + log_prior(counts)
    frequency = (counts.double() / counts.sum())[labels]
    record = {
        "setting": setting.name,
        "method": method.name,
        "seed": seed,
        "class_counts": counts.tolist(),
        "recall": {
            "as it is": recalls(logits, labels),
            "balanced": recalls(evidence, labels),
            "overall": recalls(with_prior, labels),
        },
        "ece": {
            "balanced": calibration_error(evidence, labels, torch.ones_like(frequency)),
            "overall": calibration_error(with_prior, labels, frequency),
        },
    }
    if method.name == CROSS_ENTROPY:
        record["post_hoc"] = {
            f"{tau:g}": recalls(priors.adjust_logits(logits, log_prior(counts).exp(), -tau), labels)
            for tau in POST_HOC_TAUS
        }
    record["seconds"] = round(time.perf_counter() - begin, 2)
    return record
