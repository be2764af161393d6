"""The GPU benchmark and `make gpu-check`, as far as they go without a GPU: tiny shapes, kernels on stand-ins."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from implementations import EMULATED

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import gpu  # noqa: E402
import gpu_check  # noqa: E402
import peers  # noqa: E402
import read_floor  # noqa: E402

IMPLEMENTATIONS = ("cuda", "triton") if EMULATED else ("triton",)
NONE = "there is none"


def run(folder, *shapes):
    arguments = ["--device", "cpu", "--samples", "2", "--window", "0.001", "--no-compile", "--output", str(folder)]
    arguments = gpu.parse_arguments([*arguments, "--shapes", *shapes])
    report = gpu.benchmark(arguments)
    return report, gpu.finish(report, folder)


def test_every_candidate_is_checked_timed_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TARGETS", {(16, 91, "float32"): 1.25})
    monkeypatch.setattr(gpu, "judges", lambda device: True)
    report, status = run(tmp_path, "16x91xfloat32", "2x17000xbfloat16")
    assert status == 0
    written = json.loads((tmp_path / "softmax_loss_gpu.json").read_text())
    for picture in ("random", "peaked", "random_forward", "peaked_forward", "every_loss"):
        assert (tmp_path / f"softmax_loss_gpu_{picture}.png").stat().st_size > 10_000
    found = {(x["shape"][1], x["logits"], x["loss"], x["candidate"], x["mode"]) for x in written["lines"]}
    vectors = [loss.name for loss in gpu.VECTOR_LOSSES]
    for num_classes in (91, 17000):
        for logits in gpu.SURENESS:
            assert (num_classes, logits, "", "read floor", gpu.FORWARD) in found
            for loss in ("cross_entropy", "focal, margin and prior"):
                for mode in gpu.EVERY_MODE:
                    assert all((num_classes, logits, loss, impl, mode) in found for impl in IMPLEMENTATIONS)
                assert (num_classes, logits, loss, "eager", gpu.BACKWARD) in found
        for impl in IMPLEMENTATIONS:
            assert all((num_classes, "random", loss, impl, gpu.BACKWARD) in found for loss in vectors)
            assert (num_classes, "random", vectors[0], impl, gpu.FORWARD) in found
    limits = {(line.candidate, line.shape[1]): line.limit for line in report.lines if line.limit is not None}
    assert limits == {("triton", 91): 1.5, ("triton", 17000): 1.4, **({("cuda", 91): 1.25} if EMULATED else {})}
    # Of each implementation and shape: copies in both modes of both losses on either logits, and with a prior; five
    # read floors; three further vectors, and one in a loss alone; six beside random logits; eight beside eager torch.
    of_triton = [verdict for verdict in written["verdicts"] if ", triton, " in verdict["what"]]
    assert len(of_triton) == 2 * (9 + 5 + 4 + 6 + 8)
    copies = [verdict for verdict in of_triton if verdict["what"].endswith(": copies")]
    assert copies and not any(verdict["met"] for verdict in copies)  # an interpreter is no GPU
    assert EMULATED or any(note.startswith("impl='cuda' NOT TIMED") for note in report.notes)


def test_a_cpu_is_not_judged_as_a_gpu(tmp_path, capsys):
    """Neither on the terminal nor in what is written; one line says why."""
    report, status = run(tmp_path, "16x91xfloat32")
    assert status == 0 and {line.limit for line in report.lines} == {None}
    written = json.loads((tmp_path / "softmax_loss_gpu.json").read_text())
    assert written["verdicts"] == [] and not written["judged"]
    shown = capsys.readouterr().out
    assert shown.count(gpu.NO_VERDICTS) == 1 and gpu.NO_VERDICTS in written["notes"]
    assert not any(word in shown for word in ("NOT MET", ": met", "promises,"))


@pytest.mark.parametrize("copies, seconds", [(1.05, 1e-3), (16257.04, 14.37e-3), (0.55, 5e-6), (123.0, 12.0)])
@pytest.mark.parametrize("count", [1, 18])
def test_figures_stay_inside_their_panel(tmp_path, monkeypatch, count, copies, seconds):
    """Beside bars of any length; text that reached into the next panel would lie on its labels."""
    finished = []
    monkeypatch.setattr(gpu.plt, "close", finished.append)
    line = gpu.Line((8, 9), "float32", "random", "cross_entropy", "triton", gpu.IN_PLACE, [seconds], copies, 1, "")
    lines = [replace(line, copies=max(1.0, copies * (place + 1) / count)) for place in range(count)]
    gpu._picture([lines, lines], "title", "explanation", tmp_path / "picture.png")
    (figure,) = finished
    figure.draw_without_rendering()  # at the figure's own resolution again
    texts = [(axis, text) for axis in figure.axes for text in axis.texts]
    assert len(texts) == 2 * count
    for axis, text in texts:
        assert text.get_window_extent().x1 <= axis.get_window_extent().x1 + 1
        assert text.xy[0] == 1 or text.xy[0] < axis.get_xlim()[1] < 3 * copies
        ticks = zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        ends = [label.get_window_extent().x1 for at, label in ticks if at <= axis.get_xlim()[1]]  # others are not drawn
        assert max(ends) <= figure.bbox.width


@pytest.mark.parametrize(
    "value, text", [(0.546, "0.55"), (9.99, "9.99"), (99.4, "99.4"), (100.4, "100"), (16257.04, "16257")]
)
def test_no_more_digits_than_tell_something(value, text):
    assert gpu.figure_of(value) == text
    assert gpu.time_of(value / 1e3) == f"{text} ms"
    assert gpu.time_of(value / 1e6) == (
        f"{text} us" if value < 100 else f"{value / 1e3:.{2 if value < 1e4 else 1}f} ms"
    )


def test_verdicts():
    def line(loss, candidate, mode, seconds, logits="random", copies=1.0, limit=None):
        return gpu.Line(
            (8, 9), "float32", logits, loss, candidate, mode, [2 * seconds, seconds], copies, 1.0, "", limit
        )

    prior, factor, smoothed = (loss.name for loss in gpu.VECTOR_LOSSES)
    lines = [
        line("", "read floor", gpu.FORWARD, 0.92),
        line("", "read floor", gpu.FORWARD, 0.92, "peaked"),
        line("cross_entropy", "cuda", gpu.FORWARD, 1.0),
        line(prior, "cuda", gpu.FORWARD, 1.08),
        line("cross_entropy", "cuda", gpu.BACKWARD, 2.0, copies=1.11, limit=1.1),
        line("cross_entropy", "cuda", gpu.BACKWARD, 2.1, "peaked", copies=1.09, limit=1.1),
        line("cross_entropy", "quack", gpu.BACKWARD, 1.9),
        line("cross_entropy", "liger", gpu.IN_PLACE, 0.1),
        line(prior, "cuda", gpu.BACKWARD, 2.0, copies=1.05, limit=1.1),
        line(factor, "cuda", gpu.BACKWARD, 2.1),
        line(smoothed, "cuda", gpu.BACKWARD, 2.3),
    ]
    found = {str(x).partition(": ")[2]: (round(x.figure, 3), x.met) for x in gpu.verdicts_of(gpu.Report({}, lines))}
    start = "8 x 9 float32, random logits, "
    peaked = "8 x 9 float32, peaked logits, cross_entropy, cuda, forward + backward: "
    assert found == {
        start + "cross_entropy, cuda, forward only: read floors": (1.087, True),
        start + "cross_entropy, cuda, forward + backward: copies": (1.11, False),
        start + "cross_entropy, cuda, forward + backward: beside quack": (1.053, False),
        start + f"{prior}, cuda, forward only: read floors": (1.174, False),
        start + f"{prior}, cuda, forward only: beside cross_entropy": (1.08, False),
        start + f"{prior}, cuda, forward + backward: copies": (1.05, True),
        start + f"{prior}, cuda, forward + backward: beside cross_entropy": (1.0, True),
        peaked + "copies": (1.09, True),
        peaked + "beside random logits": (1.05, False),
        start + f"{factor}, cuda, forward + backward: beside {prior}": (1.05, True),
        start + f"{smoothed}, cuda, forward + backward: beside {factor}": (1.095, False),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4096), (7, 9001)], ids=str)
@pytest.mark.parametrize("block_bytes", read_floor.BLOCKS)
def test_the_read_floor_reads_everything(block_bytes, shape, dtype):
    logits = torch.randn(shape).to(dtype)
    found, right = (read(logits, block_bytes).double() for read in (read_floor.read, read_floor.sums))
    torch.testing.assert_close(found, right, rtol=0, atol=1e-3)
    assert float(found.sum()) == pytest.approx(float(logits.double().sum()), abs=1e-2)


def test_what_there_was_no_time_for_is_missed(tmp_path):
    report, status = run(tmp_path, "4x10xfloat32", "--seconds", "0")
    assert status == 1 and any("cross_entropy was not timed, out of time" in wrong for wrong in report.wrong)


def test_absent_peers_say_so(tmp_path):
    report, _ = run(tmp_path, "4x10xfloat32")
    absent = [peer.name for peer in peers.PEERS if peers.load(peer)[0] is None]
    for name in absent:
        assert any(note.startswith(f"{name} not timed") for note in report.notes)
    assert peers.WITHOUT_LOGITS in report.notes


def test_a_wrong_value_of_ours_is_not_timed_and_fails(tmp_path, monkeypatch):
    right = gpu.truth_of

    def wrong(problem, loss):
        truth = right(problem, loss)
        truth.gradient[-1] *= 1.001
        return truth

    monkeypatch.setattr(gpu, "truth_of", wrong)
    report, status = run(tmp_path, "16x91xfloat32")
    # Two losses, two kinds of logits, with a gradient or in place; three with class vectors.
    assert status == 1 and sum(", triton, " in wrong for wrong in report.wrong) == 8 + 3
    assert not any(line.candidate == "triton" and line.mode != gpu.FORWARD for line in report.lines)


def test_a_run_without_ours_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OURS", ("cuda",))  # which does not run on a CPU, or not twice
    monkeypatch.setattr(gpu.implementation, "emulates_cuda", lambda: False)
    report, status = run(tmp_path, "4x10xfloat32")
    assert status == 1 and report.wrong == ["none of our implementations was timed"]
    assert any(note.startswith("impl='cuda' NOT TIMED") for note in report.notes)


@pytest.mark.parametrize("fails", ["nothing", *gpu_check.SECONDS])
def test_gpu_check_tells_what_failed(tmp_path, monkeypatch, capsys, fails):
    junit = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0"/></testsuites>'
    script = f"import sys, pathlib; pathlib.Path({str(tmp_path / 'tests.xml')!r}).write_text({junit!r}); sys.exit(%d)"
    steps = [
        gpu_check.Step(
            name, [sys.executable, "-c", script % (name == fails)], not_run="" if name != "memcheck" else NONE
        )
        for name in gpu_check.SECONDS
    ]
    monkeypatch.setattr(gpu_check, "steps_on_gpu", lambda folder: steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == (0 if fails in ("nothing", "memcheck") else 1)
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["tests"]["tests"] == 3 and record["machine"]["versions"]["torch"] == torch.__version__
    right = {name: "failed" if name == fails else "passed" for name in gpu_check.SECONDS} | {"memcheck": "not run"}
    assert {name: step["status"] for name, step in record["steps"].items()} == right
    statuses = {name: None if name == "memcheck" else int(name == fails) for name in gpu_check.SECONDS}
    assert {name: step["exit_status"] for name, step in record["steps"].items()} == statuses
    shown = capsys.readouterr().out.splitlines()
    for name, status in right.items():
        words = {"passed": r"passed in \d+ s", "failed": r"failed \(exit status 1\) in \d+ s"}.get(
            status, rf"not run \({NONE}\)"
        )
        assert re.fullmatch(f"{name}: {words}", shown[-len(right) - 2 + list(right).index(name)])
    assert shown[-2] == "of 3 tests 0 failed and 0 were left out"


def test_gpu_check_ends_a_step_that_takes_too_long(tmp_path):
    step = gpu_check.Step("tests", [sys.executable, "-c", "import time; time.sleep(60)"])
    found = gpu_check.run(step, tmp_path, 0.5)
    assert (found["status"], found["exit_status"]) == ("out of time", None)
    absent = gpu_check.run(gpu_check.Step("memcheck", [str(tmp_path / "absent")]), tmp_path, 9.0)
    assert absent["status"] == "failed" and "No such file" in gpu_check.said("memcheck", absent)


@pytest.mark.parametrize("absent", ["nothing", "setuptools", "an old setuptools", "ninja", "xdist"])
def test_gpu_check_names_what_is_not_there(tmp_path, monkeypatch, absent):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == absent else name)
    monkeypatch.setattr(
        gpu_check.metadata, "version", lambda name: "76.1" if absent == "an old setuptools" else "77.0.3"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    if absent != "ninja":
        (programs / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))  # not on PATH, as that of .venv
    monkeypatch.setenv("PATH", str(tmp_path))
    names = {"nothing": [], "ninja": ["ninja"], "xdist": ["pytest-xdist"]}
    assert gpu_check.lacking() == names.get(absent, ["setuptools>=77"])


def test_gpu_check_takes_eight_minutes_at_most():
    assert sum(gpu_check.SECONDS.values()) <= 8 * 60


def test_commands_on_a_gpu(tmp_path, monkeypatch):
    """For the GPUs that there are, with the sanitizer where there is one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device else (8, 6))
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    steps = {step.name: step for step in gpu_check.steps_on_gpu(tmp_path)}
    assert list(steps) == list(gpu_check.SECONDS)
    assert steps["build"].environment == {"TORCH_CUDA_ARCH_LIST": "8.6;9.0"}
    assert steps["memcheck"].not_run == steps["racecheck"].not_run == gpu_check.NOT_FOUND
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "/tool")
    steps = {step.name: step for step in gpu_check.steps_on_gpu(tmp_path)}
    assert steps["racecheck"].command[:3] == ["/tool", "--tool", "racecheck"] and not steps["racecheck"].not_run


@pytest.mark.parametrize("place", ["bin", "compute-sanitizer"])
def test_the_sanitizer_is_found_in_the_toolkit(tmp_path, monkeypatch, place):
    tool = tmp_path / "toolkit" / place / "compute-sanitizer"
    for folder in ("bin", place):
        (tmp_path / "toolkit" / folder).mkdir(parents=True, exist_ok=True)
    tool.touch(mode=0o755)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), "/usr/bin", "/bin"]))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert Path(gpu_check.sanitizer()).resolve() == tool


def test_the_dry_run(tmp_path):
    """All steps of gpu-check, on stand-ins; the CUDA kernels where their emulation was built (make test-emulated)."""
    command = [sys.executable, "bench/gpu_check.py", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["dry_run"] and record["tests"]["failures"] == 0 < record["tests"]["tests"]
    outcomes = {(step["status"], step["reason"]) for step in record["steps"].values()}
    assert outcomes <= {("passed", ""), ("not run", gpu_check.NOT_EMULATED)}
    assert record["figures"]["verdicts"] == [] and "NOT MET" not in done.stdout
    assert list(record["steps"]) == list(gpu_check.SECONDS)
    ours = {line["candidate"] for line in record["figures"]["lines"]} & set(gpu.OURS)
    assert ours == ({"cuda", "triton"} if record["steps"]["kernels"]["status"] == "passed" else {"triton"})
