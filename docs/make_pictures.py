"""The pictures of the losses: value and slope of every objective, drawn from the registries (`make docs` runs this).

A new objective of a registry gets its picture without a change here; what VARIANTS says of it is drawn beside it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import torch  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402
from plots import FAINT, INK, OURS, OURS_LIGHT, PLAIN, QUIET, RIGHT  # noqa: E402
from torch import Tensor  # noqa: E402

from imbalance_kernels import AngularMargin, BinaryPrior  # noqa: E402
from imbalance_kernels.binary_objectives import BINARY_REGISTRY, side_slopes, side_values  # noqa: E402
from imbalance_kernels.logit_map import CircleMargin  # noqa: E402
from imbalance_kernels.objectives import REGISTRY, CrossEntropy, Objective  # noqa: E402

# Other values of an objective's first parameter, drawn beside its default.
VARIANTS: dict[str, tuple[float, ...]] = {
    "focal": (0.5, 5.0),
    "hard_truncation": (0.9,),
    "soft_truncation": (0.5, 4.0),
    "poly": (-1.0, 3.0),
    "poly_focal": (0.5, 5.0),
    "gce": (0.3, 1.0),
}
LABELS = ((1.0, RIGHT), (0.5, OURS_LIGHT), (0.0, OURS))  # of a sigmoid loss, and their colours
SOFT_LABELS = ("quality_focal", "varifocal")  # whose labels are scores
DASHES = ((0, (5, 1.5)), (0, (1, 1.5)))
RANGE = torch.linspace(-6, 6, 481, dtype=torch.float64)
COSINES = torch.linspace(-1, 1, 481, dtype=torch.float64)


def _pair(x: Tensor, left: str, right: str, across: str) -> tuple[Figure, Axes, Axes]:
    """Return two panels over one axis: a value and a slope."""
    figure, (value, slope) = plt.subplots(1, 2, figsize=(8, 2.7))
    for axes, title in ((value, left), (slope, right)):
        axes.axvline(0, color=FAINT, zorder=0)
        axes.axhline(0, color=FAINT, zorder=0)
        axes.set_title(title, fontsize=10.5, loc="left")
        axes.set_xlabel(across, fontsize=9, color=QUIET)
        axes.set_xlim(float(x[0]), float(x[-1]))
        axes.tick_params(labelsize=9)
    if x is RANGE:
        for axes in (value, slope):
            axes.set_xticks([-6, -3, 0, 3, 6])
    return figure, value, slope


def _finish(figure: Figure, axes: Axes, path: Path) -> Path:
    """One legend beside both panels; save with a palette, which takes a third of the space."""
    handles, labels = axes.get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(0.8, 0.55), fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def _label(objective: Objective) -> str:
    """Return the default's label in the legend, a parameter a line."""
    parameters = [f"{field.name} {getattr(objective, field.name):g}" for field in fields(objective)]
    return "\n".join([*parameters, "(default)"]) if parameters else "this loss"


def objective_picture(objective: type[Objective], path: Path) -> Path:
    """G and -A over the log-odds of the true class, at the defaults and at VARIANTS; dashed grey is cross-entropy."""
    figure, value, slope = _pair(
        RANGE, "loss", "pull towards the truth (minus the slope)", "log-odds of the true class, log p / (1 - p)"
    )
    plain, default = CrossEntropy(), objective()
    for axes, curve in ((value, plain.value(RANGE)), (slope, -plain.slope(RANGE))):
        look = {"linewidth": 2.2} if objective is CrossEntropy else {"linewidth": 1.3, "linestyle": (0, (4, 3))}
        axes.plot(RANGE, curve, color=PLAIN, label="cross-entropy", **look)
    if objective is not CrossEntropy:
        for number, dashes in zip(VARIANTS.get(objective.name, ()), DASHES, strict=False):
            name = fields(default)[0].name
            other = replace(default, **{name: number})
            for axes, curve in ((value, other.value(RANGE)), (slope, -other.slope(RANGE))):
                axes.plot(RANGE, curve, color=OURS_LIGHT, linewidth=1.8, linestyle=dashes, label=f"{name} {number:g}")
        for axes, curve in ((value, default.value(RANGE)), (slope, -default.slope(RANGE))):
            axes.fill_between(RANGE, curve, color=OURS, alpha=0.08, linewidth=0)
            axes.plot(RANGE, curve, color=OURS, linewidth=2.2, label=_label(default))
    value.set_ylim(-0.15, 6.2)
    slope.set_ylim(-0.06, max(1.45, 1.05 * float(slope.dataLim.y1)))
    return _finish(figure, value, path)


def label_picture(objective: type[Objective], path: Path) -> Path:
    """Loss and slope of a logit, for labels 1, 0 and, where they are scores, 1/2; dashed grey is cross-entropy."""
    figure, value, slope = _pair(RANGE, "loss", "slope: the logit's gradient", "logit x, log p / (1 - p)")
    default, plain = objective(), CrossEntropy()
    for label, colour in LABELS:
        if label == 0.5 and objective.name not in SOFT_LABELS:
            continue
        y = torch.full_like(RANGE, label)
        for axes, sides in ((value, side_values), (slope, side_slopes)):
            for of, look in (
                (plain, {"color": PLAIN, "linewidth": 1.1, "linestyle": (0, (4, 3))}),
                (default, {"color": colour, "linewidth": 2.2, "label": f"label {label:g}"}),
            ):
                positive, negative = sides(of, RANGE, y)
                axes.plot(RANGE, y * positive + (1 - y) * negative, **look)
    value.plot([], [], color=PLAIN, linewidth=1.1, linestyle=(0, (4, 3)), label="cross-entropy")
    value.set_ylim(-0.15, 6.2)
    slope.set_ylim(-1.35, 1.35)
    return _finish(figure, value, path)


def prior_picture(path: Path) -> Path:
    """What a prior does to cross-entropy of two classes: the curve is moved by the prior's log-odds."""
    figure, value, slope = _pair(
        RANGE, "loss of a positive", "pull towards the positive class", "logit x, as the model gives it"
    )
    plain = CrossEntropy()
    for probability, colour, dashes in (
        (0.9, OURS_LIGHT, DASHES[0]),
        (0.5, PLAIN, (0, (4, 3))),
        (0.1, OURS, "-"),
        (0.01, INK, "-"),
    ):
        x = RANGE + BinaryPrior.from_probabilities([probability]).bias
        for axes, curve in ((value, plain.value(x)), (slope, -plain.slope(x))):
            axes.plot(RANGE, curve, color=colour, linewidth=2, linestyle=dashes, label=f"prior {probability:g}")
    value.set_ylim(-0.15, 9)
    return _finish(figure, value, path)


def margin_picture(path: Path) -> Path:
    """What margins make of the target's cosine, before it is scaled: the maps of CosFace, LDAM, ArcFace and circle."""
    figure, value, slope = _pair(
        COSINES, "what the target's cosine becomes", "its slope", "cosine of the sample and its class"
    )
    angle, circle, one = AngularMargin(m2=0.5), CircleMargin(), torch.ones_like(COSINES)
    maps: tuple[tuple[str, str, str | tuple, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
        ("no margin", PLAIN, (0, (4, 3)), lambda s: s, lambda s: one),
        ("CosFace 0.35", OURS_LIGHT, "-", lambda s: s - 0.35, lambda s: one),
        ("LDAM 0.5", INK, DASHES[1], lambda s: s - 0.5, lambda s: one),
        ("ArcFace 0.5 rad", OURS, "-", angle.value, angle.slope),
        ("circle 0.25", RIGHT, "-", circle.value, circle.slope),
    )
    for name, colour, dashes, of_value, of_slope in maps:
        value.plot(COSINES, of_value(COSINES), color=colour, linewidth=2, linestyle=dashes, label=name)
        slope.plot(COSINES, of_slope(COSINES), color=colour, linewidth=2, linestyle=dashes)
    slope.set_ylim(-0.15, 4)
    return _finish(figure, value, path)


def pictures(folder: Path) -> Iterator[Path]:
    """Draw all of them into a folder."""
    for name, objective in BINARY_REGISTRY.items():
        draw = objective_picture if name in REGISTRY else label_picture
        yield draw(objective, folder / f"objective_{name}.png")
    yield prior_picture(folder / "prior.png")
    yield margin_picture(folder / "margins.png")


if __name__ == "__main__":
    for path in pictures(DOCS / "images"):
        print(path)
