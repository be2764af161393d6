"""A small one-stage detector of handwritten digits, trained with BCE, focal loss, and focal loss with a prior.

    make demo-detection     # or: python examples/detection.py --help

The detector is anchor-free: each point of a grid says which digit's centre it is near, if any, and how far away the
sides of that digit's box are. Of the points 99 % are near none, and of the digits the most frequent is 100 times as
frequent as the rarest: two imbalances at once. Prints average precision (AP), per class and by frequency, and draws
what was found.

The losses take the logits as the network makes them, (B, C, H, W), and a label per point, (B, H, W): a class, C for the
background, or IGNORED. Nothing becomes one-hot, nothing is permuted, and the number of positives never leaves the
device.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import plots
import torch
from boxes import Detections, Truths, average_precision_per_class, iou, nms_per_class
from digit_canvases import CANVAS_SIZE, CLASS_NAMES, Canvases, load_canvases
from torch import Tensor, nn
from tqdm import tqdm

import imbalance_kernels as ik

NUM_CLASSES = len(CLASS_NAMES)
BACKGROUND = NUM_CLASSES
IGNORED = -100
IMBALANCE_FACTOR = 100
BUCKETS = {"frequent": slice(0, 3), "middle": slice(3, 7), "rare": slice(7, 10)}  # of classes, sorted by frequency

STRIDE = 4  # pixels from point to point
GRID = CANVAS_SIZE // STRIDE
POSITIVE_RADIUS = 2.0  # pixels from a digit's centre, in x and in y
IGNORED_RADIUS = 6.0
TYPICAL_DISTANCE = 8.0  # pixels from centre to side, where the box's outputs start

LEARNING_RATE = 0.032  # with the radius of positives chosen among three rates and two radii, see "Detection" in README
WIDTH = 48  # channels

NMS_THRESHOLD = 0.5
BEFORE_NMS, AFTER_NMS = 300, 100  # detections of an image, those of the highest scores

RETINANET_LOG_ODDS = math.log(0.01 / 0.99)


@dataclass(frozen=True)
class Method:
    """A loss, where the last layer's bias starts, and what every class's logits get added where they are scores.

    A prior in the loss is itself a start of the bias, one for each class, so the bias starts at 0 there. Prediction
    then takes the raw logits, without the prior: the balanced rule, by which a rare class needs no more evidence than a
    frequent one. What is added to all classes alike makes scores of a usual size of them; it changes no rank.
    """

    name: str
    make_loss: Callable[[ik.BinaryPrior], nn.Module]
    bias_start: float
    score_shift: float = 0.0


BCE, FOCAL, FOCAL_PRIOR = "BCE", "focal", "focal + prior"
METHODS = (
    Method(BCE, lambda prior: ik.SigmoidCrossEntropyLoss(ignore_index=IGNORED), RETINANET_LOG_ODDS),
    Method(FOCAL, lambda prior: ik.SigmoidFocalLoss(ignore_index=IGNORED), RETINANET_LOG_ODDS),
    Method(
        FOCAL_PRIOR,
        lambda prior: ik.SigmoidFocalLoss(prior=prior, ignore_index=IGNORED),
        bias_start=0.0,
        score_shift=RETINANET_LOG_ODDS,
    ),
)


def grid_points() -> Tensor:
    """(2, H, W): x and y of each point, in pixels."""
    along = (torch.arange(GRID) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(along, along, indexing="xy"))


def assign(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What each point should say.

    Args:
        boxes: (N, M, 4) in pixels.
        labels: (N, M), negative where there is no box.

    Returns:
        Labels (N, H, W): the class of the nearest box if its centre is near, else the background; IGNORED between the
        two radii, and near a centre but outside of the box. Distances (N, 4, H, W) from the point to the left, top,
        right and bottom side of that box.
    """
    points = grid_points().to(boxes.device)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2  # (N, M, 2)
    offsets = (points[None, None] - centres[..., None, None]).abs().amax(2)  # (N, M, H, W)
    offsets = offsets.masked_fill((labels < 0)[..., None, None], math.inf)
    offset, nearest = offsets.min(1)  # (N, H, W)

    sides = boxes.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 4))  # (N, H * W, 4)
    sides = sides.movedim(2, 1).reshape(len(boxes), 4, GRID, GRID)
    distances = torch.cat([points - sides[:, :2], sides[:, 2:] - points], 1)

    classes = labels.gather(1, nearest.flatten(1)).reshape(offset.shape)
    positive = (offset <= POSITIVE_RADIUS) & (distances.amin(1) > 0)
    near = torch.where(offset <= IGNORED_RADIUS, IGNORED, BACKGROUND)
    return torch.where(positive, classes, near), distances


class Detector(nn.Module):
    """Images (B, 1, size, size) to logits (B, C, H, W) and distances to the sides of boxes (B, 4, H, W), in pixels."""

    def __init__(self, bias_start: float) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.features = nn.Sequential(
            block(1, WIDTH // 2, stride=2),
            block(WIDTH // 2, WIDTH, stride=2),
            block(WIDTH, WIDTH),
            block(WIDTH, WIDTH),
        )
        self.classes = nn.Sequential(block(WIDTH, WIDTH), nn.Conv2d(WIDTH, NUM_CLASSES, 1))
        self.sides = nn.Sequential(block(WIDTH, WIDTH), nn.Conv2d(WIDTH, 4, 1))
        for last in (self.classes[-1], self.sides[-1]):
            nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(self.classes[-1].bias, bias_start)
        nn.init.zeros_(self.sides[-1].bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.classes(features), TYPICAL_DISTANCE * self.sides(features).exp()


def iou_loss(distances: Tensor, truth: Tensor, positive: Tensor) -> Tensor:
    """The sum of 1 - IoU over positive points, (); distances (B, 4, H, W), positive (B, H, W).

    Both boxes hold the point, so their intersection is made of the shorter distances.
    """
    truth = torch.where(positive[:, None], truth, 1.0)
    shorter = torch.minimum(distances, truth)
    intersection, area, true_area = (
        (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3]) for sides in (shorter, distances, truth)
    )
    return torch.where(positive, 1 - intersection / (area + true_area - intersection), 0.0).sum()


def detector_loss(class_loss: nn.Module, outputs: tuple[Tensor, Tensor], labels: Tensor, distances: Tensor) -> Tensor:
    """Loss of classes and of boxes, (), each divided by the number of positive points; nothing waits for the device."""
    positive = (labels >= 0) & (labels < BACKGROUND)
    num_positive = positive.sum()
    of_classes = class_loss(outputs[0], labels, normalizer=num_positive)
    return of_classes + iou_loss(outputs[1], distances, positive) / num_positive.clamp_min(1)


def class_prior(labels: Tensor) -> ik.BinaryPrior:
    """Of each class: positive points, out of all points that count."""
    counted = labels[labels != IGNORED]
    counts = counted.bincount(minlength=NUM_CLASSES + 1)[:NUM_CLASSES]
    return ik.BinaryPrior(counts, total_count=len(counted), zero_count="laplace")


@torch.no_grad()
def detect(model: Detector, images: Tensor, score_shift: float) -> list[Detections]:
    """What the model finds in each image: per class, the points of the highest scores after suppression."""
    model.eval()
    points = grid_points().to(images.device)
    found = []
    for batch in images.split(100):
        logits, distances = model(batch)
        scores = torch.sigmoid(logits + score_shift).flatten(1)  # (B, C * H * W)
        boxes = torch.cat([points - distances[:, :2], points + distances[:, 2:]], 1)  # (B, 4, H, W)
        boxes = boxes.flatten(2).movedim(1, 2)  # (B, H * W, 4)
        for image_scores, image_boxes in zip(scores, boxes, strict=True):
            best, where = image_scores.topk(BEFORE_NMS)
            labels, its_boxes = where // GRID**2, image_boxes[where % GRID**2]
            kept = nms_per_class(its_boxes, best, labels, NMS_THRESHOLD)[:AFTER_NMS]
            found.append(Detections(its_boxes[kept], best[kept], labels[kept]))
    model.train()
    return found


def truths_of(canvases: Canvases) -> list[Truths]:
    pairs = zip(canvases.boxes, canvases.labels, strict=True)
    return [Truths(boxes[labels >= 0], labels[labels >= 0]) for boxes, labels in pairs]


def named_right(found: list[Detections], truths: list[Truths]) -> Tensor:
    """(C,): of the test digits of each class, those where the surest box over them, of any class, has their class."""
    labels = torch.cat([truth.labels for truth in truths])
    right = torch.zeros(NUM_CLASSES, dtype=torch.float64, device=labels.device)
    for image, truth in zip(found, truths, strict=True):
        over = iou(truth.boxes, image.boxes) >= 0.5  # (G, D)
        surest = torch.where(over, image.scores, -1.0).max(1)
        named = (image.labels[surest.indices] == truth.labels) & (surest.values >= 0)
        right.index_add_(0, truth.labels, named.double())
    return (right / labels.bincount(minlength=NUM_CLASSES)).cpu()


@dataclass
class Result:
    """What a loss reached; one entry a seed."""

    losses: list[list[float]] = field(default_factory=list)  # at each evaluation
    ap: list[list[list[float]]] = field(default_factory=list)  # at each evaluation, per class
    named_right: list[list[float]] = field(default_factory=list)  # at the end, per class


@dataclass(frozen=True)
class Schedule:
    train_images: int
    test_images: int
    batch_size: int
    steps: int
    evaluations: int
    seeds: int

    def evaluated_at(self) -> list[int]:
        return [round(self.steps * (k + 1) / self.evaluations) for k in range(self.evaluations)]


def train(
    method: Method,
    train_set: Canvases,
    test_set: Canvases,
    schedule: Schedule,
    seed: int,
    progress: tqdm,
    result: Result,
) -> list[Detections]:
    """Train one detector, add to its result, return what it finds in the test images.

    The seed fixes initial weights and batches; all losses share them, and the learning rate.
    """
    torch.manual_seed(seed)
    device = train_set.images.device
    labels, distances = assign(train_set.boxes, train_set.labels)
    model = Detector(method.bias_start).to(device)
    class_loss = method.make_loss(class_prior(labels)).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=schedule.steps, pct_start=0.1)
    truths = truths_of(test_set)

    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses, ap = [], []
    for step in range(1, schedule.steps + 1):
        if len(order) < schedule.batch_size:
            order = torch.randperm(len(train_set), generator=generator)
        batch, order = order[: schedule.batch_size].to(device), order[schedule.batch_size :]
        loss = detector_loss(class_loss, model(train_set.images[batch]), labels[batch], distances[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        progress.update()
        if step in schedule.evaluated_at():
            found = detect(model, test_set.images, method.score_shift)
            ap.append(average_precision_per_class(found, truths, NUM_CLASSES).tolist())
            losses.append(loss.item())
            progress.set_postfix_str(f"loss {losses[-1]:.3f}, AP {statistics.mean(ap[-1]):.3f}")
    result.losses.append(losses)
    result.ap.append(ap)
    result.named_right.append(named_right(found, truths).tolist())
    return found


def mean_over(per_class: list[float]) -> float:
    """Over the classes that are there."""
    return float(torch.tensor(per_class, dtype=torch.float64).nanmean())


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def by_loss(title: str, columns: dict[str, Callable[[Result], list[float]]], results: dict[str, Result]) -> str:
    """A table with a row a loss; a column is what it makes of a result, one number a seed."""
    lines = [f"{title:<14}" + "".join(f"{head:>15}" for head in columns)]
    for name, result in results.items():
        lines.append(f"{name:<14}" + "".join(f"{spread(column(result)):>15}" for column in columns.values()))
    return "\n".join(lines)


def ap_table(results: dict[str, Result], schedule: Schedule) -> str:
    columns: dict[str, Callable[[Result], list[float]]] = {}
    for k, step in enumerate(schedule.evaluated_at()):
        columns[f"at step {step}"] = lambda result, k=k: [mean_over(seed[k]) for seed in result.ap]
    for bucket, classes in BUCKETS.items():
        columns[bucket] = lambda result, classes=classes: [mean_over(seed[-1][classes]) for seed in result.ap]
    return by_loss("AP", columns, results)


def named_right_table(results: dict[str, Result]) -> str:
    buckets = {"all classes": slice(None)} | BUCKETS
    columns = {
        bucket: lambda result, classes=classes: [mean_over(seed[classes]) for seed in result.named_right]
        for bucket, classes in buckets.items()
    }
    return by_loss("named right", columns, results)


def class_table(results: dict[str, Result], objects: list[int]) -> str:
    lines = [
        f"{'AP of class':<14}" + "".join(f"{name:>8}" for name in CLASS_NAMES),
        f"{'in training':<14}" + "".join(f"{count:>8,}" for count in objects),
    ]
    for name, result in results.items():
        per_class = torch.tensor([seed[-1] for seed in result.ap]).mean(0).tolist()
        lines.append(f"{name:<14}" + "".join(f"{value:>8.3f}" for value in per_class))
    return "\n".join(lines)


def compare(results: dict[str, Result], name: str, other: str, k: int, step: int) -> str:
    """Say how the AP of a loss differs from another's, seed against the same seed, at an evaluation."""
    pairs = zip(results[name].ap, results[other].ap, strict=True)
    differences = [mean_over(ours[k]) - mean_over(theirs[k]) for ours, theirs in pairs]
    mean = statistics.mean(differences)
    what = f"{name} against {other}, step {step}: {mean:+.3f}"
    if len(differences) == 1:
        return f"{what}, of one seed, which tells nothing of noise"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    verdict = "not told apart from noise" if abs(mean) < 2 * error else "better" if mean > 0 else "worse"
    return f"{what} ± {error:.3f}, {verdict}"


def notes(schedule: Schedule, prior: ik.BinaryPrior) -> str:
    names = {bucket: CLASS_NAMES[classes] for bucket, classes in BUCKETS.items()}
    buckets = ", ".join(f"{bucket} {first}-{last}" for bucket, (first, *_, last) in names.items())
    seeds = f"{schedule.seeds} seeds, each" if schedule.seeds > 1 else "one seed,"
    training = f"{schedule.steps} steps of {schedule.batch_size} images"
    biases = f"{float(prior.bias.max()):.1f} to {float(prior.bias.min()):.1f}"
    return f"""\
AP:           average precision at IoU 0.5, mean over classes; of some classes at the last step
classes:      {buckets}
named right:  of the test digits, those over which the surest box of any class is of their class; mean over classes
mean ± standard deviation of {seeds} with its own images, initial weights and batches

The same for all: network, images, initial weights, {training}, Adam in one cycle up to
{LEARNING_RATE:g}, a loss divided by the number of positive points, and a last layer whose bias starts at RetinaNet's
log(0.01 / 0.99). A prior in the loss is such a start for each class (here from {biases}): there the bias
starts at 0, and prediction uses the logits without it.

AP ranks the boxes of one class among themselves, so a shift of all their scores is nothing to it, save by which
{AFTER_NMS} boxes of an image are kept. Which class a box gets is what a prior shifts: "named right"."""


def run(arguments: argparse.Namespace, schedule: Schedule, device: torch.device) -> tuple[dict, list[Path]]:
    results = {method.name: Result() for method in METHODS}
    objects = torch.zeros(NUM_CLASSES, dtype=torch.int64)  # digits of each class in the training images
    examples: dict[str, list[Detections]] = {}  # what each loss found with the first seed
    total = schedule.seeds * len(METHODS) * schedule.steps
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as progress:
        for seed in range(schedule.seeds):
            progress.set_description(f"images, seed {seed}")
            sets = load_canvases(schedule.train_images, schedule.test_images, IMBALANCE_FACTOR, seed)
            train_set, test_set = (part.to(device) for part in sets)
            objects += train_set.labels[train_set.labels >= 0].bincount(minlength=NUM_CLASSES).cpu()
            if seed == 0:
                example_set, prior = sets[1], class_prior(assign(sets[0].boxes, sets[0].labels)[0])
            for method in METHODS:
                progress.set_description(f"{method.name}, seed {seed}")
                found = train(method, train_set, test_set, schedule, seed, progress, results[method.name])
                if seed == 0:
                    examples[method.name] = found

    steps = schedule.evaluated_at()
    print("\n" + ap_table(results, schedule))
    print("\n" + class_table(results, (objects // schedule.seeds).tolist()))
    print("\n" + named_right_table(results))
    findings = [compare(results, FOCAL, BCE, k, step) for k, step in enumerate(steps)]
    findings += [compare(results, FOCAL_PRIOR, other, -1, steps[-1]) for other in (BCE, FOCAL)]
    print("\nDifferences of AP, ± their standard error over seeds; twice the error counts:")
    print("\n".join("  " + finding for finding in findings))
    print("\n" + notes(schedule, prior))

    summary = {
        "class_names": list(CLASS_NAMES),
        "objects": (objects // schedule.seeds).tolist(),
        "schedule": asdict(schedule) | {"learning_rate": LEARNING_RATE},
        "steps": steps,
        "results": {name: asdict(result) for name, result in results.items()},
        "findings": findings,
    }
    pictures = [
        plots.average_precision(summary, arguments.output / "detection_ap.png"),
        plots.detections(example_set, examples, arguments.output / "detections.png"),
    ]
    return summary, pictures


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for pictures and results")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=400, help="of each training")
    parser.add_argument("--batch", type=positive, default=16, help="images of a step")
    parser.add_argument("--train-images", type=positive, default=2000)
    parser.add_argument("--test-images", type=positive, default=200)
    arguments = parser.parse_args(argv)
    if arguments.batch > arguments.train_images:
        parser.error(f"--batch {arguments.batch} is more than --train-images {arguments.train_images}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    schedule = Schedule(
        train_images=arguments.train_images,
        test_images=arguments.test_images,
        batch_size=arguments.batch,
        steps=arguments.steps,
        evaluations=min(4, arguments.steps),
        seeds=arguments.seeds,
    )
    sys.stdout.reconfigure(line_buffering=True)  # also through a pipe the text keeps pace with the progress bar
    arguments.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    print(
        f"Detecting digits: {schedule.train_images} training images of {CANVAS_SIZE} x {CANVAS_SIZE} pixels, the most "
        f"frequent digit {IMBALANCE_FACTOR} times\nas frequent as the rarest; {schedule.test_images} test images of "
        "other handwritten digits, all equally frequent."
    )
    ik.show_config()
    summary, pictures = run(arguments, schedule, device)
    summary |= {"torch": torch.__version__, "seconds": time.perf_counter() - begin}
    results_path = arguments.output / "detection.json"
    results_path.write_text(json.dumps(summary, indent=1) + "\n")
    print()
    for path in (*pictures, results_path):
        print(path.resolve())
    print(f"All of it took {summary['seconds']:.0f} s.")
    return summary


if __name__ == "__main__":
    main()
