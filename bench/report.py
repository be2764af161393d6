"""A run as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from candidates import ALL_MODES, BACKWARD, CLONE, COMPILED, COPY, EAGER
from formulas import MAIN_LOSSES, OTHER_LOSSES, PLAIN
from results import MAIN, OTHERS, Group, Run
from targets import targets_of
from timing import Measurement

CELL = 27  # characters


def heading(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}"


def machine_lines(run: Run) -> str:
    machine = run.machine
    build = machine["build"]
    kernels = f"{build['compiler']}, {build['instruction_set']}" if build else "not built"
    return (
        f"{machine['date']}  {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads\n"
        f"torch {machine['torch']}, imbalance-kernels {machine['imbalance_kernels']} ({kernels}), "
        f"transparent huge pages: {machine['transparent_huge_pages']}, "
        f"THP_MEM_ALLOC_ENABLE: {machine['THP_MEM_ALLOC_ENABLE']}"
    )


def group_table(group: Group, run: Run) -> str:
    lines = [heading(f"{group.name}{'' if group.kind == MAIN else ': every loss, forward + backward'}")]
    lines.append(_baselines(group, run))
    lines.append(_values(group))
    lines += _main_rows(group) if group.kind == MAIN else _other_rows(group)
    return "\n".join(lines)


def _baselines(group: Group, run: Run) -> str:
    clone = group.find("", CLONE, "")
    text = f"copy_ {1e3 * group.unit:.2f} ms ({_gigabytes(group, group.unit):.0f} GB/s)"
    text += f"; clone() {1e3 * clone.minimum:.2f} ms, {clone.minimum / group.unit:.1f} copies"
    huge = run.clone_with_huge_pages(group)
    if huge is not None:
        text += f"; with huge pages copy_ {1e3 * huge[COPY]:.2f} ms, clone() {1e3 * huge[CLONE]:.2f} ms"
        text += f", {huge[CLONE] / huge[COPY]:.1f} of its copies"
    return text


def _values(group: Group) -> str:
    """One line: the largest errors against float64, of a row's gradient for ours, of all of them for the others."""
    worst: dict[str, float] = {}
    for check in group.checks:
        error = check.gradient_error if check.candidate in (EAGER, COMPILED) else check.row_error
        if error is not None:
            worst[check.candidate] = max(worst.get(check.candidate, 0.0), error)
    errors = ", ".join(f"{candidate} {error:.0e}" for candidate, error in worst.items())
    return f"values: {len(group.checks)} checks against float64; largest relative error of a gradient: {errors}"


def _main_rows(group: Group) -> list[str]:
    lines = [f"{'':<40}" + "".join(f"{mode:>{CELL}}" for mode in ALL_MODES) + f"{'GB/s':>8}{'x eager':>9}{'peak':>7}"]
    lines.append(f"{'':<40}" + f"{'ms copies (median)':>{CELL}}" * len(ALL_MODES) + f"{'logits':>24}")
    for loss in MAIN_LOSSES:
        for name in dict.fromkeys(m.candidate for m in group.measurements if m.loss == loss.name):
            cells = "".join(_cell(group, group.find(loss.name, name, mode)) for mode in ALL_MODES)
            lines.append(f"{loss.name:<25}{name:<15}{cells}{_summary(group, loss.name, name)}")
    return lines


def _other_rows(group: Group) -> list[str]:
    lines = [f"{'':<40}{'ms copies (median)':>{CELL}}{'times':>8} {'of':<17}{'allowed':>8}{'x eager':>9}"]
    for loss in (PLAIN, *OTHER_LOSSES):
        for name in dict.fromkeys(m.candidate for m in group.measurements if m.loss and m.candidate != EAGER):
            own, ratio = group.find(loss.name, name, BACKWARD), group.ratio(loss, name)
            if own is None or ratio is None:
                continue
            allowed = "" if loss.limit is None else f"{loss.limit:.2f}"
            beside = f"{ratio:>8.2f} {loss.beside:<17}{allowed:>8}"
            lines.append(
                f"{loss.name:<25}{name:<15}{_cell(group, own)}{beside}{_times_eager(group, loss.name, name):>9}"
            )
    return lines


def _cell(group: Group, measurement: Measurement | None) -> str:
    if measurement is None:
        return f"{'-':>{CELL}}"
    best, median = (_digits(seconds / group.unit) for seconds in (measurement.minimum, measurement.median))
    return f"{_digits(1e3 * measurement.minimum):>9} {best:>6} {f'({median})':>8}".rjust(CELL)


def _digits(number: float) -> str:
    """Three digits, more before the point."""
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _summary(group: Group, loss: str, candidate: str) -> str:
    """Of forward + backward: GB/s (a read and a write of the logits, the least possible), speed-up, peak in logits."""
    measurement = group.find(loss, candidate, BACKWARD)
    if measurement is None:
        return ""
    speed = _gigabytes(group, measurement.minimum)
    return f"{speed:>8.1f}{_times_eager(group, loss, candidate):>9}{measurement.peak_bytes / group.logits_bytes:>7.2f}"


def _times_eager(group: Group, loss: str, candidate: str) -> str:
    own, eager = group.find(loss, candidate, BACKWARD), group.find(loss, EAGER, BACKWARD)
    return "-" if own is None or eager is None else f"{eager.minimum / own.minimum:.1f}"


def _gigabytes(group: Group, seconds: float) -> float:
    return 2 * group.logits_bytes / seconds / 1e9


def targets_table(run: Run) -> str:
    targets = targets_of(run)
    judged = [target for target in targets if target.measured is not None]
    met = sum(bool(target.met) for target in judged)
    summary = f"Targets: {met} of {len(judged)} met" if judged else "Targets: this run has none of their shapes"
    lines = [heading(f"{summary}; {len(targets) - len(judged)} not measured")]
    for target in judged:
        limit = f"{'at most' if target.at_most else 'at least'} {target.limit:.2f}"
        verdict = "met" if target.met else "NOT MET"
        lines.append(f"{target.where:<24}{target.what:<94}{target.measured:>7.2f}  {limit:<14}{verdict}")
    return "\n".join(lines)


def closing_lines(run: Run, written: list[Path], seconds: float) -> str:
    groups = (*run.checked_only, *run.groups)
    lines = [f"\n{sum(len(group.checks) for group in groups)} values checked, {len(run.failed)} wrong"]
    for group, check in run.failed:
        errors = (check.loss_error, check.gradient_error, check.row_error)
        texts = ["-" if error is None else f"{error:.1e}" for error in errors]
        where = f"{group.name}, {check.loss}, {check.candidate}, {check.mode}"
        lines.append(
            f"WRONG VALUE, not timed: {where}: relative errors of loss, gradient, worst row {', '.join(texts)}"
        )
    lines += run.notes
    lines.append(f"{seconds:.0f} s; written: {', '.join(map(str, written))}")
    return "\n".join(lines)


def write_json(run: Run, path: Path) -> Path:
    groups = []
    for group in run.groups:
        record = asdict(group) | {"name": group.name, "unit_ms": 1e3 * group.unit}
        record["measurements"] = [_measurement_record(group, m) for m in group.measurements]
        groups.append(record)
    targets = [asdict(target) | {"met": target.met} for target in targets_of(run)]
    record = {
        "machine": run.machine,
        "notes": run.notes,
        "checks_on_a_small_shape": [asdict(group) for group in run.checked_only],
        "groups": groups,
        "clone_with_huge_pages": run.clones,
        "targets": targets,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _measurement_record(group: Group, measurement: Measurement) -> dict:
    loss = next((loss for loss in OTHER_LOSSES if loss.name == measurement.loss), PLAIN)
    ratio = group.ratio(loss, measurement.candidate) if group.kind == OTHERS else None
    return {
        "loss": measurement.loss,
        "candidate": measurement.candidate,
        "mode": measurement.mode,
        "calls": measurement.calls,
        "min_ms": 1e3 * measurement.minimum,
        "median_ms": 1e3 * measurement.median,
        "copies": measurement.minimum / group.unit,
        "median_copies": measurement.median / group.unit,
        "ratio": ratio,  # to the loss it stands beside
        "peak_bytes": measurement.peak_bytes,
        "samples_ms": [round(1e3 * sample, 5) for sample in measurement.samples],
    }
