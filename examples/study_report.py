"""The long-tail study's tables, plots and findings, written into docs/study.md between their marks.

Errors are means over seeds with the standard error of the mean; two methods are compared seed by seed, on the same
images, initial weights and batches, and differ if their mean difference is more than twice its standard error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator
from plots import FAINT, INK, OURS, PLAIN, QUIET, RIGHT, finish
from study_methods import (
    CROSS_ENTROPY,
    FOCAL,
    LDAM_DRW,
    LOGIT_ADJUSTMENT,
    MAIN,
    METHODS,
    POST_HOC,
    RUNNING,
    STARTED,
    TAUS,
)
from study_training import FASHION, POST_HOC_TAUS, SETTINGS

Record = dict[str, Any]
AS_IT_IS, BALANCED, OVERALL = "as it is", "balanced", "overall"


def balanced_error(recall: Sequence[float]) -> float:
    """In per cent, as all errors here."""
    return 100 * (1 - statistics.mean(recall))


def overall_error(recall: Sequence[float], counts: Sequence[int]) -> float:
    """Of test images as frequent as in training."""
    return 100 * (1 - sum(r * n for r, n in zip(recall, counts, strict=True)) / sum(counts))


@dataclass(frozen=True)
class Metric:
    name: str
    of: Callable[[Record], float]


ERROR_AS_IT_IS = Metric("balanced error, as it is", lambda r: balanced_error(r["recall"][AS_IT_IS]))
ERROR_BALANCED = Metric("balanced error, balanced rule", lambda r: balanced_error(r["recall"][BALANCED]))
ERROR_OVERALL = Metric("overall error, overall rule", lambda r: overall_error(r["recall"][OVERALL], r["class_counts"]))
ECE_BALANCED = Metric("ECE, balanced", lambda r: 100 * r["ece"][BALANCED])
ECE_OVERALL = Metric("ECE, overall", lambda r: 100 * r["ece"][OVERALL])


def recall_of(bucket: slice) -> Callable[[Record], float]:
    return lambda r: 100 * statistics.mean(r["recall"][AS_IT_IS][bucket])


FREQUENT, MIDDLE, RARE = (
    Metric(name, recall_of(bucket))
    for name, bucket in (("frequent", slice(0, 3)), ("middle", slice(3, 7)), ("rare", slice(7, 10)))
)


class Study:
    """Records by setting and method."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records: dict[tuple[str, str], dict[int, Record]] = {}
        for record in records:
            self.records.setdefault((record["setting"], record["method"]), {})[record["seed"]] = record
            if record["method"] == CROSS_ENTROPY:  # whose logits are corrected after training
                adjusted = record | {
                    "method": POST_HOC,
                    "recall": record["recall"] | {AS_IT_IS: record["post_hoc"]["1"]},
                }
                self.records.setdefault((record["setting"], POST_HOC), {})[record["seed"]] = adjusted

    def has(self, method: str, setting: str = FASHION.name) -> bool:
        return (setting, method) in self.records

    def values(self, method: str, metric: Metric, setting: str = FASHION.name) -> dict[int, float]:
        return {seed: metric.of(record) for seed, record in sorted(self.records[setting, method].items())}

    def mean(self, method: str, metric: Metric, setting: str = FASHION.name) -> tuple[float, float]:
        return with_error(list(self.values(method, metric, setting).values()))

    def difference(self, method: str, other: str, metric: Metric) -> tuple[float, float]:
        """Mean and standard error of method - other over the seeds that both have."""
        ours, theirs = self.values(method, metric), self.values(other, metric)
        return with_error([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; nan of one value."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), spread


def shown(found: tuple[float, float], sign: bool = False) -> str:
    mean, error = found
    return f"{mean:+.1f} ± {error:.1f}" if sign else f"{mean:.1f} ± {error:.1f}"


def differs(found: tuple[float, float]) -> bool:
    return abs(found[0]) > 2 * found[1]


# ---------------------------------------------------------------- tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(study: Study) -> str:
    metrics = (ERROR_AS_IT_IS, ERROR_BALANCED, ERROR_OVERALL, FREQUENT, MIDDLE, RARE, ECE_BALANCED, ECE_OVERALL)
    rows, group = [], ""
    names = [(method.name, method.group) for method in METHODS]
    place = next(i for i, (name, _) in enumerate(names) if name == STARTED)
    names.insert(place + 1, (POST_HOC, names[place][1]))
    for name, of_group in names:
        if not study.has(name):
            continue
        if of_group != group:
            group = of_group
            rows.append([f"**{group}**", *[""] * len(metrics)])
        rows.append([name, *(shown(study.mean(name, metric)) for metric in metrics)])
    return table(["method", *(metric.name for metric in metrics)], rows)


def settings_table(study: Study, metric: Metric) -> str:
    names = [*MAIN, POST_HOC]
    settings = [setting for setting in SETTINGS if study.has(CROSS_ENTROPY, setting.name)]
    rows = [
        [name, *(shown(study.mean(name, metric, s.name)) if study.has(name, s.name) else "" for s in settings)]
        for name in names
    ]
    return table(["method", *(setting.name for setting in settings)], rows)


@dataclass(frozen=True)
class Claim:
    """That `method` is better than `other` (below 0), or as good (`equal`), in `metric`."""

    text: str
    source: str
    method: str
    other: str
    metric: Metric = ERROR_AS_IT_IS
    equal: bool = False


MENON, CAO, KINI, KEXUE = "Menon et al. 2021", "Cao et al. 2019", "Kini et al. 2021", "kexue.fm 7615"
TWICE_WEIGHTED, TWICE_SAMPLED = "adjustment + weights 1/p", "adjustment + balanced sampler"

CLAIMS = (
    Claim("Logit adjustment is better than cross-entropy", MENON, LOGIT_ADJUSTMENT, CROSS_ENTROPY),
    Claim("LDAM-DRW is better than cross-entropy", CAO, LDAM_DRW, CROSS_ENTROPY),
    Claim("Logit adjustment is better than LDAM-DRW", MENON, LOGIT_ADJUSTMENT, LDAM_DRW),
    Claim("Logit adjustment is better than post-hoc adjustment", MENON, LOGIT_ADJUSTMENT, POST_HOC),
    Claim("VS loss is better than logit adjustment", KINI, "VS", LOGIT_ADJUSTMENT),
    Claim("Focal loss alone is about as good as cross-entropy", CAO, FOCAL, CROSS_ENTROPY, equal=True),
    Claim("Weights 1/p are better than cross-entropy", KEXUE, "weights 1/p", CROSS_ENTROPY),
    Claim("Deferred weights are better than the same from the start", CAO, "weights 1/p, deferred", "weights 1/p"),
    Claim(
        "Deferred effective-number weights are better than the same from the start",
        CAO,
        "effective number, deferred",
        "effective number",
    ),
    Claim(
        "A prior as the start of the last layer's bias is the same training as in the loss (balanced rule)",
        KEXUE,
        STARTED,
        LOGIT_ADJUSTMENT,
        ERROR_BALANCED,
        equal=True,
    ),
    Claim("A running prior is as good as that of the whole training set", "", RUNNING, LOGIT_ADJUSTMENT, equal=True),
    Claim("Adjustment alone is better than with weights 1/p", KEXUE, LOGIT_ADJUSTMENT, TWICE_WEIGHTED),
    Claim(
        "With the effective prior that is what weights 1/p are",
        "",
        "effective prior of weights 1/p",
        "weights 1/p",
        equal=True,
    ),
    Claim("Adjustment alone is better than with a balanced sampler", KEXUE, LOGIT_ADJUSTMENT, TWICE_SAMPLED),
    Claim(
        "With the effective prior that is what the balanced sampler is",
        "",
        "effective prior of the balanced sampler",
        "balanced sampler",
        equal=True,
    ),
)


def claims_table(study: Study) -> str:
    rows = []
    for claim in CLAIMS:
        if not (study.has(claim.method) and study.has(claim.other)):
            continue
        found = study.difference(claim.method, claim.other, claim.metric)
        if claim.equal:
            verdict = "not reproduced: they differ" if differs(found) else "reproduced: not told apart"
        elif not differs(found):
            verdict = "not reproduced: not told apart"
        else:
            verdict = "reproduced" if found[0] < 0 else "not reproduced: the other way round"
        rows.append([claim.text, claim.source, shown(found, sign=True), verdict])
    return table(["claim", "source", "difference, points", "found here"], rows)


GOALS = (
    ("every class counts the same, the model used as it is", ERROR_AS_IT_IS),
    ("every class counts the same, logits corrected at test time", ERROR_BALANCED),
    ("images as frequent as in training", ERROR_OVERALL),
    ("probabilities to be believed, classes equally frequent", ECE_BALANCED),
    ("probabilities to be believed, classes as frequent as in training", ECE_OVERALL),
)


def which_loss_table(study: Study) -> str:
    """For each goal the best method, and those that are not told apart from it."""
    rows = []
    for goal, metric in GOALS:
        names = [method.name for method in METHODS if study.has(method.name)]
        names += [POST_HOC] if metric is ERROR_AS_IT_IS else []
        best = min(names, key=lambda name: study.mean(name, metric)[0])
        others = [name for name in names if name != best and not differs(study.difference(name, best, metric))]
        others.sort(key=lambda name: study.mean(name, metric)[0])
        plain = shown(study.mean(CROSS_ENTROPY, metric))
        rows.append([goal, best, shown(study.mean(best, metric)), plain, "; ".join(others) or "none"])
    return table(["what counts", "best", "%", "cross-entropy", "not told apart from the best"], rows)


# ---------------------------------------------------------------- plots


def plot_errors(study: Study, path: Path) -> Path:
    names = [name for name in [*(method.name for method in METHODS), POST_HOC] if study.has(name)]
    names.sort(key=lambda name: study.mean(name, ERROR_AS_IT_IS)[0], reverse=True)
    figure, axes = plt.subplots(figsize=(9, 0.27 * len(names) + 2))
    for place, name in enumerate(names):
        as_it_is, balanced = study.mean(name, ERROR_AS_IT_IS), study.mean(name, ERROR_BALANCED)
        axes.plot([as_it_is[0], balanced[0]], [place, place], color=FAINT, linewidth=2, zorder=1)
        axes.errorbar(balanced[0], place, xerr=balanced[1], fmt="o", color=PLAIN, markersize=5, zorder=2)
        axes.errorbar(as_it_is[0], place, xerr=as_it_is[1], fmt="o", color=OURS, markersize=5, zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")  # most lie within two points, some hardly train
    axes.xaxis.set_major_locator(FixedLocator([14, 16, 18, 20, 25, 30, 40, 50, 70]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("balanced error, % (logarithmic)")
    axes.grid(axis="x", color=FAINT)
    explanation = (
        "Fashion-MNIST with 100 images of the most frequent class for one of the rarest; mean and standard error of\n"
        "five seeds. Red: the model as it is. Grey: its logits corrected for what is left of the prior in them."
    )
    return finish(figure, "Balanced error of every method", explanation, path)


def plot_trade_off(study: Study, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(9, 6))

    def point(recalls: list[tuple[Sequence[float], Sequence[int]]]) -> tuple[float, float]:
        return (
            statistics.mean(overall_error(recall, counts) for recall, counts in recalls),
            statistics.mean(balanced_error(recall) for recall, _ in recalls),
        )

    def as_it_is(name: str) -> tuple[float, float]:
        found = study.records[FASHION.name, name].values()
        return point([(r["recall"][AS_IT_IS], r["class_counts"]) for r in found])

    plain = study.records[FASHION.name, CROSS_ENTROPY].values()
    post_hoc = [(tau, point([(r["post_hoc"][f"{tau:g}"], r["class_counts"]) for r in plain])) for tau in POST_HOC_TAUS]
    trained = [(tau, as_it_is(f"logit adjustment, τ = {tau:g}")) for tau in TAUS]
    start = [(0.0, as_it_is(CROSS_ENTROPY))]
    taus = ", ".join(f"{tau:g}" for tau in TAUS)
    for points, color, label in (
        (start + post_hoc, PLAIN, "post-hoc adjustment"),
        (start + trained, OURS, f"logit adjustment in training, τ = {taus}"),
    ):
        axes.plot(*zip(*(at for _, at in points), strict=True), "o-", color=color, label=label, zorder=3)
    for tau, at in post_hoc:  # the curve falls steeply, then rises: beside it, then below
        offset = (10, -3) if tau <= 0.5 else (4, -13)
        axes.annotate(f"τ {tau:g}", at, xytext=offset, textcoords="offset points", fontsize=8, color=QUIET)
    shown_names = {tau_name for tau_name in (f"logit adjustment, τ = {tau:g}" for tau in TAUS)} | {CROSS_ENTROPY}
    others = [method.name for method in METHODS if method.name in MAIN and method.name not in shown_names]
    for name in others:
        if study.has(name):
            at = as_it_is(name)
            axes.plot(*at, "o", color=RIGHT, zorder=4)
            lines = name.replace(", ", ",\n")
            axes.annotate(lines, at, xytext=(6, 1), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xlabel("error of images as frequent as in training, %")
    axes.set_ylabel("balanced error, %")
    axes.grid(color=FAINT)
    axes.legend(frameon=False, labelcolor=QUIET)
    explanation = "Each model as it is, mean of five seeds; τ = 0 is cross-entropy. Lower and further left is better."
    return finish(figure, "What a larger τ buys, and what it costs", explanation, path)


# ---------------------------------------------------------------- the page


def replaced(text: str, blocks: dict[str, str]) -> str:
    """Return text with what stands between each block's marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the page must have {begin.strip()} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n\n{end}{rest.split(end)[1]}"
    return text


def blocks(study: Study, records: Sequence[Record]) -> dict[str, str]:
    seconds = sum(record["seconds"] for record in records)
    counted = {s.name: sum(r["setting"] == s.name for r in records) for s in SETTINGS}
    runs = ", ".join(f"{n} of {name}" for name, n in counted.items() if n)
    return {
        "runs": f"{len(records)} runs ({runs}), {seconds / 3600:.1f} hours of one thread.",
        "main": main_table(study),
        "claims": claims_table(study),
        "settings as it is": settings_table(study, ERROR_AS_IT_IS),
        "settings balanced": settings_table(study, ERROR_BALANCED),
        "which loss": which_loss_table(study),
    }


PAGES = {"study.md": None, "choosing.md": ("which loss",)}  # and which blocks; None: all


def write(records: list[Record], docs: Path) -> list[Path]:
    study = Study(records)
    made = blocks(study, records)
    for name, wanted in PAGES.items():
        page = docs / name
        page.write_text(replaced(page.read_text(), made if wanted is None else {key: made[key] for key in wanted}))
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    return [
        *(docs / name for name in PAGES),
        plot_errors(study, images / "study_errors.png"),
        plot_trade_off(study, images / "study_trade_off.png"),
    ]
