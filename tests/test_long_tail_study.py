"""examples/long_tail_study.py: what a method's logits mean, that a study goes on where it was, and its page."""

import dataclasses
import json
from pathlib import Path

import long_tail_study
import pytest
import study_report
import study_training
import torch
from long_tail_study import Results, Run, make
from study_methods import BY_NAME, CROSS_ENTROPY, LOGIT_ADJUSTMENT, METHODS, STARTED

ROOT = Path(__file__).parent.parent
DIGITS = dataclasses.replace(study_training.SETTINGS[-1], steps=4, seeds=2)
COUNTS = torch.tensor([900, 90, 10])

# Whose minimum is known: cross-entropy under any prior, weights and sampler. The others' logits are as good as its.
EXACT = [
    method
    for method in METHODS
    if method.group in ("plain", "class weights", "logit adjustment") or "effective prior" in method.name
    if "running" not in method.name
] + [BY_NAME["VS"]]


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.name)
def test_evidence_is_the_classes_likelihood(method):
    """Of the logits that minimise the loss over a whole population: log p(x | class), but for a constant of x."""
    likelihood = torch.rand(5, 3, dtype=torch.float64) + 0.1  # of five different images
    likelihood /= likelihood.sum(dim=0)
    frequency = torch.ones(3) if method.is_balanced else COUNTS
    joint = likelihood * frequency / frequency.sum()
    loss = method.loss(COUNTS)
    if method.deferred is not None:
        loss.weight = method.deferred(COUNTS)
    loss.reduction = "none"
    logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def expected():
        optimizer.zero_grad()
        rows = loss(logits.repeat_interleave(3, dim=0), torch.arange(3).repeat(5))
        (rows * joint.flatten()).sum().backward()
        return (rows * joint.flatten()).sum()

    optimizer.step(expected)
    found = torch.log_softmax(method.evidence(logits.detach(), COUNTS), dim=1)
    torch.testing.assert_close(found, torch.log(likelihood / likelihood.sum(dim=1, keepdim=True)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:weight is close to 1 / prior")  # two methods do that on purpose
def test_every_method_trains(method):
    record = study_training.run(method, DIGITS, 0, None)
    assert json.loads(json.dumps(record)) == record and record["class_counts"][0] == 20 * record["class_counts"][-1]
    recalls = [*record["recall"].values(), *record.get("post_hoc", {}).values()]
    assert all(len(recall) == 10 and all(0 <= share <= 1 for share in recall) for recall in recalls)
    assert all(0 <= error <= 1 for error in record["ece"].values())
    assert ("post_hoc" in record) == (method.name == CROSS_ENTROPY)


def test_the_bias_start_is_the_fixed_prior():
    """The same steps but for rounding, if the prior is in the loss or in the last layer's bias at the start."""
    data = study_training.load_images(None, 20, 0, digits=True)
    setting = dataclasses.replace(DIGITS, steps=20)
    logits = {name: study_training.train(BY_NAME[name], data, setting, 0) for name in (STARTED, LOGIT_ADJUSTMENT)}
    found, expected = (BY_NAME[name].evidence(found, data.class_counts) for name, found in logits.items())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (logits[STARTED] - expected).abs().max() > 1


def test_calibration_error():
    """Of certain and half-certain answers, counted by hand."""
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    labels, weight = torch.tensor([0, 1, 0, 0]), torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    certain, half = torch.softmax(logits, dim=1)[[0, 2], 0].tolist()
    expected = (abs(2 * certain - 1) + abs(4 * half - 4)) / 6
    assert study_training.calibration_error(logits, labels, weight) == pytest.approx(expected, abs=1e-5)


def test_a_study_goes_on_where_it_was(tmp_path):
    path = tmp_path / "results.jsonl"
    runs = [Run(DIGITS, name, seed) for seed in range(2) for name in (CROSS_ENTROPY, LOGIT_ADJUSTMENT)]
    results = Results(path)
    results.start()
    make(runs[:2], results, None, processes=1)
    before = path.read_text()
    again = Results(path)
    again.start()
    make(runs, again, None, processes=1)
    assert path.read_text().startswith(before) and len(path.read_text().splitlines()) == 5
    assert Results(path).records.keys() == {run.key for run in runs}
    # The same seed gives the same run, whenever it is made.
    other = study_training.run(BY_NAME[CROSS_ENTROPY], DIGITS, 1, None)
    assert {**other, "seconds": 0} == {**again.records[DIGITS.name, CROSS_ENTROPY, 1], "seconds": 0}


def test_results_of_another_schedule_are_not_added_to(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"fingerprint": "of another", "torch": "2"}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl was made with other images"):
        Results(path).start()


def test_the_pages_are_what_the_results_say(tmp_path):
    """Every number of the study's pages, from the results beside them."""
    results = Results(ROOT / "docs" / "study" / "results.jsonl")
    assert results.made_by["fingerprint"] == long_tail_study.fingerprint()
    assert results.records.keys() == {run.key for run in long_tail_study.all_runs()}
    pages = {name: (ROOT / "docs" / name).read_text() for name in study_report.PAGES}
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    written = study_report.write(list(results.records.values()), tmp_path)
    assert {name: (tmp_path / name).read_text() for name in pages} == pages
    assert all(path.stat().st_size > 10_000 for path in written if path.suffix == ".png")


def test_a_page_without_a_mark_raises():
    text = "<!-- begin main -->\nold\n<!-- end main -->\n"
    assert study_report.replaced(text, {"main": "new"}) == "<!-- begin main -->\n\nnew\n\n<!-- end main -->\n"
    with pytest.raises(ValueError, match="begin claims"):
        study_report.replaced(text, {"main": "new", "claims": "x"})
