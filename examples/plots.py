"""The pictures of the demo and of the detector, drawn from what was measured."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy
import torch
from boxes import Detections, Truths, hits, iou, nms
from digit_canvases import CLASS_NAMES, Canvases
from long_tail import CROSS_ENTROPY, LOGIT_ADJUSTMENT
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imbalance_kernels.objectives import REGISTRY

PLAIN = "#8a8f98"  # cross-entropy, torch: what everybody has
OURS = "#c8452f"  # what this package adds
OURS_LIGHT = "#e69a86"
RIGHT = "#2f6fb5"
INK = "#2b2d31"
QUIET = "#5b6069"
FAINT = "#e4e6ea"

plt.rcParams.update(
    {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": PLAIN,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.dpi": 100,
        "savefig.dpi": 150,
    }
)


def finish(figure: Figure, title: str, explanation: str, path: Path) -> Path:
    """Title and explanation at the upper left, at fixed distances whatever the figure's height; save and close."""
    inch = 1 / figure.get_figheight()
    left = 0.12 / figure.get_figwidth()
    figure.text(left, 1 - 0.12 * inch, title, va="top", fontsize=14, fontweight="bold")
    figure.text(left, 1 - 0.48 * inch, explanation, va="top", color=QUIET)
    lines = explanation.count("\n") + 1
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.6 + 0.2 * lines) * inch))
    figure.savefig(path)
    plt.close(figure)
    return path


def accuracy_per_class(result: dict, path: Path) -> Path:
    figure, (accuracy, counts) = plt.subplots(
        2, 1, figsize=(9, 5.8), sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    classes = range(len(result["class_names"]))
    recalls = {name: torch.tensor(result["results"][name]["recall"]) for name in (CROSS_ENTROPY, LOGIT_ADJUSTMENT)}
    best = max(recalls, key=lambda name: float(recalls[name].mean()))
    for (name, recall), colour, offset in zip(recalls.items(), (PLAIN, OURS), (-0.09, 0.09), strict=True):  # (seeds, C)
        position = [k + offset for k in classes]
        accuracy.plot(position, recall.mean(0), "o", color=colour, markersize=8, label=name)
        accuracy.vlines(position, recall.amin(0), recall.amax(0), color=colour, linewidth=2, alpha=0.55)
        mean = float(recall.mean())
        accuracy.plot([len(classes) - 0.3, len(classes) + 0.3], [mean, mean], color=colour, linewidth=2.5)
        accuracy.text(len(classes) + 0.4, mean, f"{mean:.3f}", color=colour, va="bottom" if name == best else "top")
    accuracy.set_ylabel("accuracy of the class (recall)")
    accuracy.set_ylim(-0.02, 1.03)
    accuracy.grid(axis="y", color=FAINT)
    accuracy.set_axisbelow(True)
    accuracy.legend(frameon=False, loc="lower left")

    counts.bar(classes, result["class_counts"], width=0.6, color=FAINT, edgecolor=PLAIN, linewidth=0.8)
    counts.set_yscale("log")
    counts.set_ylim(0.6, 6 * max(result["class_counts"]))
    counts.set_yticks([])
    counts.minorticks_off()
    counts.spines["left"].set_visible(False)
    for k, count in enumerate(result["class_counts"]):
        counts.text(k, count * 1.2, f"{count:,}", ha="center", va="bottom", fontsize=9)
    counts.set_ylabel("training images\n(log scale)")
    counts.tick_params(axis="x", length=0)
    accuracy.tick_params(axis="x", length=0)
    counts.set_xticks([*classes, len(classes)], [*result["class_names"], "balanced\naccuracy"])
    return finish(
        figure,
        f"Who pays for the imbalance: accuracy per class, {result['data']}",
        f"Classes from the most frequent to the rarest. Dots: mean of {result['schedule']['seeds']} seeds;\n"
        "bars: from the lowest to the highest seed; at the right: the mean over classes.",
        path,
    )


def _objective_title(objective: object) -> str:
    parameters = ", ".join(f"{field.name} {getattr(objective, field.name):g}" for field in fields(objective))
    name = objective.name.replace("_", " ")
    return f"{name} ({parameters})" if parameters else name


def slopes(path: Path) -> Path:
    log_odds = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    objectives = [objective() for objective in REGISTRY.values()]
    plain = -REGISTRY["cross_entropy"]().slope(log_odds)
    columns = 3
    rows = -(-len(objectives) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(10, 1.2 + 2.5 * rows), sharex=True, sharey=True, squeeze=False)
    for axes, objective in zip(grid.flat, objectives, strict=False):
        pull = -objective.slope(log_odds)
        axes.axvline(0, color=FAINT, zorder=0)
        axes.axhline(0, color=FAINT, zorder=0)
        axes.plot(log_odds, plain, color=PLAIN, linewidth=1.3, linestyle=(0, (4, 3)))
        if objective.name == "cross_entropy":
            axes.plot(log_odds, pull, color=PLAIN, linewidth=2.4)
        else:
            axes.fill_between(log_odds, pull, color=OURS, alpha=0.10, linewidth=0)
            axes.plot(log_odds, pull, color=OURS, linewidth=2.2)
        axes.set_title(_objective_title(objective), fontsize=10.5, loc="left")
    for axes in grid.flat[len(objectives) :]:
        axes.set_visible(False)
    grid[0, 0].text(-5.8, 1.27, "p near 0", fontsize=9, color=QUIET)
    grid[0, 0].text(5.8, 1.27, "p near 1", fontsize=9, color=QUIET, ha="right")
    grid[0, 0].set_xticks([-6, -3, 0, 3, 6])
    figure.supxlabel("log-odds of the true class, log p / (1 - p)", fontsize=10)
    figure.supylabel("pull towards the true class (minus the slope)", fontsize=10)
    return finish(
        figure,
        "Every loss here is one curve: how hard a row pulls, given how sure the model is",
        "The true class's logit gets the slope at the row's log-odds as its gradient; the others share its opposite.\n"
        "A prior or a margin moves a row along the axis, an objective is the curve itself. Dashed: cross-entropy.",
        path,
    )


def _bars(axes: Axes, title: str, values: list[float | None], labels: list[str], floors: list[float]) -> None:
    """One bar a row, from the top; no bar where there is no value, and a stroke at the floor where there is one."""
    position = range(len(values), 0, -1)
    lengths = [value or 0.0 for value in values]
    bars = axes.barh(position, lengths, height=0.55, color=[PLAIN, OURS, OURS_LIGHT, OURS])
    axes.bar_label(bars, labels, padding=7)
    for y, floor in zip(position, floors, strict=False):
        axes.vlines(floor, y - 0.38, y + 0.38, color=INK, linewidth=2)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(0, 1.6 * max(*lengths, *floors, 1e-9))
    axes.set_ylim(0.5, len(values) + 0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def time_and_memory(result: dict, path: Path) -> Path:
    names, rows = list(result["rows"]), result["rows"].values()
    copy_ms, logits_mib, chunk_mib = result["copy_ms_best"], result["logits_mib"], result["chunk_mib"]
    memory_measured = all(row["peak_mib"] is not None for row in rows)
    figure, panels = plt.subplots(1, 2 + memory_measured, figsize=(13, 4), sharey=True)

    loss = [row.get("loss_ms_best") for row in rows]
    labels = ["makes no logits" if ms is None else f"{ms:.0f} ms = {ms / copy_ms:.1f} copies" for ms in loss]
    floors = [copy_ms for ms in loss if ms is not None]
    _bars(panels[0], "time of the loss and its gradient", loss, labels, floors)

    head = [row["head_ms_best"] for row in rows]
    _bars(panels[1], "time of head and loss", head, [f"{ms:.0f} ms" for ms in head], [])

    if memory_measured:
        peaks = [row["peak_mib"] for row in rows]
        floors = [2 * logits_mib, 2 * logits_mib, logits_mib, chunk_mib]
        _bars(panels[2], "peak memory of head and loss", peaks, [f"{mib:.0f} MiB" for mib in peaks], floors)

    panels[0].set_yticks(range(len(names), 0, -1), [name.replace(", ", ",\n") for name in names])
    num_rows, num_tokens = result["shape"]
    return finish(
        figure,
        f"Cross-entropy over {num_tokens:,} tokens, against the floor",
        f"{num_rows} rows of float32 logits on {result['device']}; forward and backward, best step, median memory. "
        f"Strokes: the floor, which is\none copy of the logits ({copy_ms:.0f} ms); logits and their gradient "
        f"({logits_mib:.0f} MiB each), in place one of them, fused one chunk of rows ({chunk_mib:.0f} MiB).",
        path,
    )


def average_precision(result: dict, path: Path) -> Path:
    """Left AP as training goes, right AP of each class at its end."""
    figure, (rise, classes) = plt.subplots(1, 2, figsize=(12, 4.6), gridspec_kw={"width_ratios": [2, 3]})
    num_classes, names = len(result["class_names"]), list(result["results"])
    looks = dict(zip(names, ((PLAIN, "o"), (OURS, "o"), (OURS_LIGHT, "s")), strict=True))
    for number, (name, (colour, marker)) in enumerate(looks.items()):
        ap = numpy.array(result["results"][name]["ap"])  # (seeds, evaluations, C)
        means = numpy.nanmean(ap, 2)
        rise.fill_between(result["steps"], means.min(0), means.max(0), color=colour, alpha=0.18, linewidth=0)
        rise.plot(result["steps"], means.mean(0), marker, linestyle="-", color=colour, label=name)
        position = numpy.arange(num_classes) + 0.2 * (number - 1)
        classes.plot(position, ap[:, -1].mean(0), marker, color=colour, markersize=7)
        classes.vlines(position, ap[:, -1].min(0), ap[:, -1].max(0), color=colour, linewidth=2, alpha=0.55)
    rise.set_xlabel("step")
    rise.set_xticks(result["steps"])
    rise.set_ylabel("AP, mean over classes")
    rise.legend(frameon=False, loc="lower right")
    ticks = [f"{name}\n{count:,}" for name, count in zip(result["class_names"], result["objects"], strict=True)]
    classes.set_xticks(range(num_classes), ticks)
    classes.set_xlabel("digit, and how many the training images show")
    classes.set_ylabel(f"AP at step {result['steps'][-1]}")
    classes.tick_params(axis="x", length=0)
    for axes in (rise, classes):
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=FAINT)
        axes.set_axisbelow(True)
    seeds = result["schedule"]["seeds"]
    over = f"Mean of {seeds} seeds; bands and bars from the lowest to the highest. " if seeds > 1 else "One seed. "
    return finish(
        figure,
        "Detecting long-tailed digits: average precision at IoU 0.5",
        over + "The same steps, rate and images for every loss.",
        path,
    )


ALONE = 0.3  # overlap by which a box is suppressed in the picture, whatever its class


def detections(canvases: Canvases, found: dict[str, list[Detections]], path: Path, columns: int = 5) -> Path:
    """The first test images: what each loss's detector found in them, a row a loss.

    As many boxes are drawn as there are digits, so that the losses' scores, whose scales differ, need no threshold.
    """
    columns = min(columns, len(canvases.images))
    figure, grid = plt.subplots(
        len(found), columns, figsize=(2.3 * columns + 0.5, 2.35 * len(found) + 1.2), squeeze=False
    )
    for row, (name, images) in zip(grid, found.items(), strict=True):
        row[0].set_ylabel(name, fontsize=11)
        for axes, image, boxes, labels, all_found in zip(
            row, canvases.images, canvases.boxes, canvases.labels, images, strict=False
        ):
            truths = Truths(boxes[labels >= 0], labels[labels >= 0])
            alone = nms(all_found.boxes, all_found.scores, ALONE)
            shown = alone[: len(truths.labels)]
            seen = Detections(*(part[shown].cpu() for part in vars(all_found).values()))
            right = hits(seen, truths, 0.5)
            axes.imshow(image[0].numpy(), cmap="gray_r", vmin=-0.2, vmax=1.7)
            _outline(axes, seen, right)
            same = (seen.labels[:, None] == truths.labels) & right[:, None]
            missed = ~((iou(seen.boxes, truths.boxes) >= 0.5) & same).any(0)
            for box, label in zip(truths.boxes[missed].tolist(), truths.labels[missed].tolist(), strict=True):
                _box(axes, box, CLASS_NAMES[label], INK, below=True, linestyle=(0, (2, 2)))
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
    return finish(
        figure,
        "What the detectors find",
        "Test images of the first seed, in each as many boxes as it has digits: the surest of any class.\n"
        "Blue: right. Red: wrong. Dashed, with its class below: a digit that no right box is over.",
        path,
    )


def _outline(axes: Axes, seen: Detections, right: torch.Tensor) -> None:
    for box, label, is_right in zip(seen.boxes.tolist(), seen.labels.tolist(), right.tolist(), strict=True):
        _box(axes, box, CLASS_NAMES[label], RIGHT if is_right else OURS)


def _box(axes: Axes, box: list[float], text: str, colour: str, below: bool = False, **line: object) -> None:
    left, top, right, bottom = box
    axes.add_patch(
        plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.4, **line)
    )
    at, align = ((right, bottom), "top") if below else ((left, top), "bottom")
    if not 8 < at[1] < max(axes.get_ylim()) - 8:  # inside, where the picture ends outside
        align = "bottom" if below else "top"
    axes.text(
        *at, text, color=colour, fontsize=9, fontweight="bold", va=align, ha="right" if below else "left", clip_on=True
    )
