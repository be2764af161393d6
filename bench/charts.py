"""A run as pictures: times of the main losses in copies of the logits, and every loss beside plain cross-entropy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from candidates import BACKWARD, CLONE, COMPILED, EAGER, FORWARD, IN_PLACE, OURS
from formulas import MAIN_LOSSES, OTHER_LOSSES, PLAIN, Loss
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from results import MAIN, OTHERS, Group, Run

GREY = "#8a8f98"
RED = "#c8452f"
LIGHT_RED = "#e69a86"
INK = "#2b2d31"
QUIET = "#5b6069"
FAINT = "#e4e6ea"

STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
}

# label, candidate, mode, colour. The reference is in the table: its bar would make all others short.
BARS = (
    ("eager torch", EAGER, BACKWARD, GREY),
    ("torch.compile", COMPILED, BACKWARD, GREY),
    ("clone() alone", CLONE, "", FAINT),
    ("ours", OURS, BACKWARD, RED),
    ("ours, in place", OURS, IN_PLACE, RED),
    ("ours, loss only", OURS, FORWARD, LIGHT_RED),
)


def draw(run: Run, folder: Path) -> list[Path]:
    """Return the pictures' paths: one of times per dtype, one of every loss."""
    pictures = []
    with plt.rc_context(STYLE):
        for dtype in dict.fromkeys(group.dtype for group in run.groups):
            groups = [group for group in run.groups if group.kind == MAIN and group.dtype == dtype]
            pictures.append(_times(groups, run, folder / f"softmax_loss_{dtype}.png"))
        groups = [group for group in run.groups if group.kind == OTHERS]
        pictures.append(_ratios(groups, folder / "softmax_loss_every_loss.png"))
    return pictures


def finish_figure(figure: Figure, title: str, explanation: str, path: Path) -> Path:
    """Title and explanation at the upper left, at fixed distances whatever the figure's height; save and close."""
    inch = 1 / figure.get_figheight()
    left = 0.12 / figure.get_figwidth()
    figure.text(left, 1 - 0.12 * inch, title, va="top", fontsize=14, fontweight="bold")
    figure.text(left, 1 - 0.46 * inch, explanation, va="top", color=QUIET)
    lines = explanation.count("\n") + 1
    figure.tight_layout(w_pad=2.5, rect=(0, 0, 0.985, 1 - (0.55 + 0.2 * lines) * inch))  # half a tick's label aside
    for axis in figure.axes:
        _make_room(axis)
    figure.savefig(path)
    plt.close(figure)
    return path


def label_bar(axis: Axes, text: str, right: float, place: int) -> None:
    """Write a bar's figures beside it. The axis makes room for them once its own size is known (`finish_figure`)."""
    label = axis.annotate(text, (right, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    label.set_in_layout(False)


def _make_room(axis: Axes) -> None:
    """End the axis where the text that reaches farthest does."""
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    width = axis.get_window_extent().width
    for label in labels:
        beside = label.get_window_extent().x1 - axis.transData.transform(label.xy)[0]  # the same wherever the axis ends
        axis.set_xlim(right=max(axis.get_xlim()[1], label.xy[0] * width / max(width - beside, 0.2 * width)))


def _times(groups: list[Group], run: Run, path: Path) -> Path:
    rows, columns = len(MAIN_LOSSES), len(groups)
    figure, axes = plt.subplots(rows, columns, figsize=(max(9.5, 4.2 * columns + 1), 2.7 * rows + 1.2), squeeze=False)
    for column, group in enumerate(groups):
        for row, loss in enumerate(MAIN_LOSSES):
            _time_bars(axes[row][column], group, loss.name)
            axes[row][column].set_title(f"{loss.name}\n{group.shape[0]} x {group.shape[1]}", loc="left", fontsize=10)
            axes[row][column].tick_params(labelleft=column == 0)
    for axis in axes[-1]:
        axis.set_xlabel("time, in copies of the logits")
    machine = run.machine
    samples = len(groups[0].measurements[0].samples)
    explanation = (
        f"Forward + backward with a fresh gradient, unless it says otherwise; best of {samples} samples. "
        f"Figures: copies (time).\n"
        f"Dashed: a warm copy_ of the logits, the floor for a loss with its gradient. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}."
    )
    return finish_figure(figure, f"Softmax losses, {groups[0].dtype}", explanation, path)


def _time_bars(axis: Axes, group: Group, loss: str) -> None:
    labels = []
    for label, candidate, mode, colour in BARS:
        measurement = group.find("" if candidate == CLONE else loss, candidate, mode)
        if measurement is None:
            continue
        copies = measurement.minimum / group.unit
        text = f"{copies:.{0 if copies >= 100 else 1}f}  ({_milliseconds(measurement.minimum)})"
        axis.barh(len(labels), copies, color=colour, height=0.72)
        label_bar(axis, text, max(copies, 1.0), len(labels))  # right of the bar, and of the dashed line
        labels.append(label)
    finish_bars(axis, labels)


def finish_bars(axis: Axes, labels: list[str], floor: float = 1.0, room: float = 1.1) -> None:
    longest = max((bar.get_width() for bar in axis.patches), default=floor)
    axis.axvline(floor, color=INK, linewidth=1, linestyle="--")
    axis.set_xlim(0, room * max(longest, floor))
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))  # numbers of six digits stay apart
    axis.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(axis="y", length=0)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def _ratios(groups: list[Group], path: Path) -> Path:
    losses = (PLAIN, *OTHER_LOSSES)
    size = (max(8.5, 3.7 * len(groups) + 1.6), 0.26 * len(losses) + 1.9)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for column, (axis, group) in enumerate(zip(axes[0], groups, strict=True)):
        for place, loss in enumerate(losses):
            _ratio_bar(axis, place, group, loss)
        finish_bars(axis, [loss.name for loss in losses], room=1.4)  # for its column of figures
        axis.tick_params(labelleft=column == 0)
        axis.set_title(f"{group.shape[0]} x {group.shape[1]}, {group.dtype}", loc="left", fontsize=10)
        axis.set_xlabel("time, cross-entropy = 1")
    explanation = "Forward + backward with a fresh gradient, our kernel, best times. Mark: the most that is allowed."
    return finish_figure(figure, "What each loss costs, beside our plain cross-entropy", explanation, path)


def _ratio_bar(axis: Axes, place: int, group: Group, loss: Loss) -> None:
    plain, own, beside = (group.find(name, OURS, BACKWARD) for name in (PLAIN.name, loss.name, loss.beside))
    if plain is None or own is None or beside is None:
        return
    ratio = own.minimum / plain.minimum
    axis.barh(place, ratio, color=RED if loss is PLAIN else LIGHT_RED, height=0.72)
    if loss.limit is not None:
        allowed = loss.limit * beside.minimum / plain.minimum
        axis.plot([allowed, allowed], [place - 0.36, place + 0.36], color=INK, linewidth=2)
    right = axis.get_yaxis_transform()  # a column of figures at the axis's right end, clear of bars and marks
    axis.text(1.0, place, f"{ratio:.2f}", transform=right, ha="right", va="center", fontsize=9)
