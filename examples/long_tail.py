"""Long-tailed image classification: one small CNN, one training set, seven ways to treat the imbalance.

The training set has 100 images of the most frequent class for each image of the rarest; the test set has as many of
one class as of another. Every method but the last trains the same network from the same initial weights on the same
batches; the last one takes the cross-entropy model and corrects its logits at test time, without training again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from image_data import LongTailedImages, load_images
from torch import Tensor, nn
from tqdm import tqdm

import imbalance_kernels as ik

LEARNING_RATE = 2e-3
TAU = 1.0


@dataclass(frozen=True)
class Schedule:
    batch_size: int
    steps: int
    seeds: int


# The digits are so few that more seeds can be afforded, and so few that they are needed.
SCHEDULES = {
    "Fashion-MNIST": Schedule(batch_size=128, steps=1500, seeds=2),
    "scikit-learn digits": Schedule(batch_size=32, steps=400, seeds=5),
}


@dataclass(frozen=True)
class Method:
    name: str
    make_loss: Callable[[Tensor], nn.Module]  # class counts -> loss
    cosine: bool = False  # LDAM's margins are meant for cosines: the last layer is normalised


CROSS_ENTROPY = "cross-entropy"
LOGIT_ADJUSTMENT = "logit adjustment"
POST_HOC = "post-hoc adjustment"

METHODS = (
    Method(CROSS_ENTROPY, lambda counts: ik.CrossEntropyLoss()),
    Method("1/p weights", lambda counts: ik.CrossEntropyLoss(weight=counts.sum() / (len(counts) * counts))),
    Method("focal", lambda counts: ik.FocalLoss(gamma=2.0)),
    Method("LDAM", lambda counts: ik.LDAMLoss(counts), cosine=True),
    Method(LOGIT_ADJUSTMENT, lambda counts: ik.LogitAdjustedLoss(counts, tau=TAU)),
    Method("focal + adjustment", lambda counts: ik.FocalLoss(gamma=2.0, prior=ik.Prior(counts, tau=TAU))),
)


class SmallCNN(nn.Module):
    def __init__(self, image_size: int, num_classes: int, cosine: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, num_classes, bias=not cosine)
        self.cosine = cosine

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.cosine:
            return F.linear(F.normalize(features), F.normalize(self.head.weight))
        return self.head(features)


def train(method: Method, data: LongTailedImages, schedule: Schedule, seed: int, progress: tqdm) -> Tensor:
    """Train one network, return its test logits, (N, C). The seed fixes the initial weights and the batches."""
    torch.manual_seed(seed)
    device = data.train_images.device
    model = SmallCNN(data.train_images.shape[-1], len(data.class_counts), method.cosine)
    model.to(device, memory_format=torch.channels_last)
    loss_function = method.make_loss(data.class_counts).to(device)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-5)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=schedule.steps, pct_start=0.1)

    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(schedule.steps):
        if len(order) < schedule.batch_size:
            order = torch.randperm(len(data.train_labels), generator=generator)
        batch, order = order[: schedule.batch_size].to(device), order[schedule.batch_size :]
        images = data.train_images[batch].contiguous(memory_format=torch.channels_last)
        loss = loss_function(model(images), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        progress.update()

    with torch.no_grad():
        return torch.cat([model(images) for images in data.test_images.split(1000)])


def recall_per_class(logits: Tensor, labels: Tensor) -> Tensor:
    """(C,): the share of each class's test images that is recognised."""
    hits = (logits.argmax(1) == labels).double()
    total = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    return total.index_add(0, labels, hits).cpu() / labels.bincount(minlength=logits.shape[1]).cpu()


@dataclass
class Result:
    """What a method reached; one entry a seed."""

    recall: list[Tensor] = field(default_factory=list)  # (C,) each
    overall: list[float] = field(default_factory=list)
    balanced: list[float] = field(default_factory=list)
    tail: list[float] = field(default_factory=list)

    def add(self, recall: Tensor, class_counts: Tensor) -> None:
        prior = class_counts.double() / class_counts.sum()
        self.recall.append(recall)
        self.overall.append(float(recall @ prior))
        self.balanced.append(float(recall.mean()))
        self.tail.append(float(recall[-tail_size(len(recall)) :].mean()))  # classes are sorted by count


def tail_size(num_classes: int) -> int:
    return num_classes // 3


def compare(results: dict[str, Result], name: str, test_images_per_class: int) -> str:
    """Say how balanced accuracy differs from cross-entropy's, seed against the same seed, and whether that is noise.

    The error has two parts: the seeds (standard error of the mean difference), and the test set, which is finite and
    the same for all seeds (binomial, as if the two models erred independently, which overstates it).
    """
    ours, theirs = results[name], results[CROSS_ENTROPY]
    differences = [a - b for a, b in zip(ours.balanced, theirs.balanced, strict=True)]
    mean = statistics.mean(differences)
    from_seeds = statistics.variance(differences) / len(differences)
    recalls = torch.stack([torch.stack(result.recall).mean(0) for result in (ours, theirs)])  # (2, C)
    from_test_set = float((recalls * (1 - recalls)).sum()) / test_images_per_class / recalls.shape[1] ** 2
    error = (from_seeds + from_test_set) ** 0.5
    verdict = "not told apart from noise" if abs(mean) < 2 * error else "better" if mean > 0 else "worse"
    return f"{name}: {mean:+.3f} ± {error:.3f}, {verdict}"


def format_table(results: dict[str, Result], num_classes: int) -> str:
    columns = ("overall", "balanced", "tail")
    lines = [f"{'method':<20}" + "".join(f"{column:>17}" for column in columns)]
    for name, result in results.items():
        cells = [getattr(result, column) for column in columns]
        lines.append(f"{name:<20}" + "".join(f"{statistics.mean(c):>9.3f} ± {statistics.stdev(c):.3f}" for c in cells))
    lines += [
        "",
        "overall:  the test set re-weighted to the training set's class frequencies",
        "balanced: the mean of the classes' recalls, every class counting the same",
        f"tail:     the mean of the recalls of the {tail_size(num_classes)} rarest classes",
        f"mean ± standard deviation over {len(results[CROSS_ENTROPY].overall)} seeds",
    ]
    plain = results[CROSS_ENTROPY]
    if statistics.mean(plain.tail) > statistics.mean(plain.balanced):
        lines.append("The rarest classes are easy here: even cross-entropy does better on them than on average.")
    return "\n".join(lines)


def run(folder: Path | None, imbalance_factor: int, seeds: int | None, device: torch.device) -> dict:
    data = load_images(folder, imbalance_factor, seed=0).to(device)
    schedule = SCHEDULES[data.name]
    seeds = schedule.seeds if seeds is None else seeds
    print(f"Data: {data.name}, {len(data.train_labels)} training images, {len(data.test_labels)} test images.")
    if data.name != "Fashion-MNIST":
        print("For Fashion-MNIST: `apt install dataset-fashion-mnist`, or --data FOLDER with its four IDX files.")
    print("Training images of each class: " + ", ".join(map(str, data.class_counts.tolist())))

    results = {method.name: Result() for method in METHODS}
    results[POST_HOC] = Result()
    log_prior = torch.log(data.class_counts / data.class_counts.sum())
    with tqdm(total=seeds * len(METHODS) * schedule.steps, unit="step", dynamic_ncols=True, disable=None) as progress:
        for seed in range(seeds):
            data = load_images(folder, imbalance_factor, seed).to(device)
            for method in METHODS:
                progress.set_description(f"{method.name}, seed {seed}")
                logits = train(method, data, schedule, seed, progress)
                results[method.name].add(recall_per_class(logits, data.test_labels), data.class_counts.cpu())
                if method.name == CROSS_ENTROPY:
                    adjusted = recall_per_class(logits - TAU * log_prior, data.test_labels)
                    results[POST_HOC].add(adjusted, data.class_counts.cpu())

    per_class = len(data.test_labels) // len(data.class_names)
    findings = [compare(results, name, per_class) for name in results if name != CROSS_ENTROPY]
    print("\n" + format_table(results, len(data.class_names)))
    print("\nBalanced accuracy against cross-entropy, ± the error of seeds and test set; twice the error counts:")
    print("\n".join("  " + finding for finding in findings))
    return {
        "data": data.name,
        "imbalance_factor": imbalance_factor,
        "class_names": list(data.class_names),
        "class_counts": data.class_counts.tolist(),
        "schedule": vars(schedule) | {"seeds": seeds},
        "tail_classes": tail_size(len(data.class_names)),
        "results": {
            name: {key: [x.tolist() if isinstance(x, Tensor) else x for x in values] for key, values in vars(r).items()}
            for name, r in results.items()
        },
        "findings": findings,
    }
