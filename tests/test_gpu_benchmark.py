"""The GPU benchmark and `make gpu-check`, as far as they go without a GPU: tiny shapes, in Triton's interpreter."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import gpu  # noqa: E402
import gpu_check  # noqa: E402
import peers  # noqa: E402


def run(folder, *shapes):
    arguments = ["--device", "cpu", "--samples", "2", "--window", "0.001", "--no-compile", "--output", str(folder)]
    arguments = gpu.parse_arguments([*arguments, "--shapes", *shapes])
    report = gpu.benchmark(arguments)
    return report, gpu.finish(report, folder)


def test_every_candidate_is_checked_timed_and_drawn(tmp_path):
    report, status = run(tmp_path, "16x91xfloat32", "2x17000xbfloat16")
    assert status == 0
    written = json.loads((tmp_path / "softmax_loss_gpu.json").read_text())
    for logits in gpu.SURENESS:
        assert (tmp_path / f"softmax_loss_gpu_{logits}.png").stat().st_size > 10_000
    found = {(x["shape"][1], x["logits"], x["loss"], x["candidate"], x["mode"]) for x in written["lines"]}
    for num_classes in (91, 17000):
        for logits in gpu.SURENESS:
            for loss in ("cross_entropy", "focal + logit adjustment"):
                for mode in (gpu.BACKWARD, gpu.IN_PLACE, gpu.FORWARD):
                    assert (num_classes, logits, loss, "triton", mode) in found
                assert (num_classes, logits, loss, "eager", gpu.BACKWARD) in found
    limits = {line.shape[1]: line.limit for line in report.lines if line.limit is not None}
    assert limits == {91: 1.5, 17000: 1.4}
    assert len(written["missed"]) == 16  # an interpreter is no GPU
    assert any("eager is faster" in line for line in written["slower_than"])


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
    assert status == 1 and len(report.wrong) == 8  # two losses, two kinds of logits, with a gradient or in place
    assert not any(line.candidate == "triton" and line.mode != gpu.FORWARD for line in report.lines)


def test_a_run_without_ours_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OURS", ("cuda",))  # which does not run on a CPU
    report, status = run(tmp_path, "4x10xfloat32")
    assert status == 1 and report.wrong == ["none of our implementations was timed"]
    assert any(note.startswith("impl='cuda' not timed") for note in report.notes)


@pytest.mark.parametrize("fails", ["nothing", "build", "tests", "benchmark"])
def test_gpu_check_tells_what_failed(tmp_path, monkeypatch, fails):
    junit = '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0"/></testsuites>'
    script = (
        "import sys, pathlib\n"
        "path = [a.partition('=')[2] for a in sys.argv if a.startswith('--junitxml')]\n"
        f"path and pathlib.Path(path[0]).write_text({junit!r})\n"
        "sys.exit(int(sys.argv[1]))"
    )
    steps = {name: ([sys.executable, "-c", script, str(int(name == fails))], 30) for name in gpu_check.STEPS}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == (0 if fails == "nothing" else 1)
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["tests"]["tests"] == 3
    assert {name: record[name]["status"] for name in steps} == {name: int(name == fails) for name in steps}
