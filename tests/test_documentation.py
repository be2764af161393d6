"""The pages of docs/ and the README: their code runs, their links lead somewhere, their figures are measured ones."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import imbalance_kernels as ik
from imbalance_kernels import modules, objectives
from imbalance_kernels.binary_objectives import BINARY_REGISTRY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
RESULTS = ROOT / "bench" / "results" / "2026-11-21-epyc-2-cores"


def code_blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_code_of(path: Path, names: dict) -> int:
    """Run all blocks of a page, in order and in one namespace; what they claim they assert."""
    text = path.read_text()
    blocks = code_blocks(text)
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(path), "exec"), names)
    return len(blocks)


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if code_blocks(path.read_text())])
def test_the_code_of_a_page_runs(name):
    assert run_code_of(PAGES[name], {}) > 0


def test_pages_with_code_are_found():
    """Each of these teaches by code: a change of how blocks are marked must not leave them out."""
    expected = {"index.md", "recipes.md", "priors.md", "coming-from.md", "detection.md"}
    expected |= {f"losses/{name}.md" for name in ("objectives", "priors-and-margins", "sigmoid", "batch")}
    found = {name for name, path in PAGES.items() if code_blocks(path.read_text())}
    assert expected <= found
    assert sum(path.read_text().count("```python") for path in PAGES.values()) == sum(
        len(code_blocks(path.read_text())) for path in PAGES.values()
    )


class ImageModel(torch.nn.Module):
    """Logits of each pixel, so that the README's examples, of rows and of images, can have one namespace."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, num_classes, 1)
        self.head = torch.nn.Linear(features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)


def test_the_readmes_code_runs():
    num_classes, features = 5, 8
    names = {
        "torch": torch,
        "num_classes": num_classes,
        "features": features,
        "class_counts": torch.tensor([500, 100, 20, 5, 1]),
        "model": ImageModel(num_classes, features),
        "images": torch.randn(2, 3, 4, 4),
        "labels": torch.randint(num_classes, (2, 4, 4)),
        "hidden": torch.randn(2, 6, features, requires_grad=True),
        "tokens": torch.randint(num_classes, (2, 6)),
        "logits": torch.randn(2, num_classes, 4, 4, requires_grad=True),
        "target": torch.randint(num_classes, (2, 4, 4)),
        "num_positive": torch.tensor(7),
    }
    assert run_code_of(README, names) >= 5


def test_contributings_objective_works():
    """The specification and the public class of its example; value and slope against autograd."""
    specification, _, public = (
        next(block for block in code_blocks(CONTRIBUTING.read_text()) if start in block)
        for start in ("class Brier(Objective)", "def brier(", "class BrierLoss(")
    )
    names = {**vars(objectives), "dataclass": dataclasses.dataclass, "ClassVar": ClassVar}
    exec(compile(specification, str(CONTRIBUTING), "exec", dont_inherit=True), names)
    names = {**vars(modules), "objectives": SimpleNamespace(Brier=names["Brier"])}
    exec(compile(public, str(CONTRIBUTING), "exec", dont_inherit=True), names)

    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (8,))
    loss = names["BrierLoss"](impl="reference", reduction="none")(logits, target)
    literal = (1 - logits.softmax(1).gather(1, target[:, None])[:, 0]).square()
    torch.testing.assert_close(loss, literal)
    upstream = torch.randn(8, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(value, logits, upstream)[0] for value in (loss, literal))
    torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- completeness and links


def test_every_loss_and_objective_is_on_a_page():
    prose = "\n".join(path.read_text() for name, path in PAGES.items() if name.startswith("losses/"))
    losses = [name for name in ik.__all__ if name.endswith("Loss")]
    assert len(losses) > 25
    assert [name for name in losses if f"`{name}" not in prose and f"ik.{name}(" not in prose] == []
    for objective in BINARY_REGISTRY:
        picture = DOCS / "images" / f"objective_{objective}.png"
        assert picture.read_bytes().startswith(b"\x89PNG"), "make docs draws it"
        assert f"(../images/{picture.name})" in prose, objective


@pytest.mark.parametrize("path", [README, CONTRIBUTING, *PAGES.values()], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    """Links to files; their anchors are mkdocs' to check."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", path.read_text())
    local = [link for link in links if not link.startswith("https://")]
    assert not [link for link in local if not (path.parent / link).exists()]


def test_the_site_shows_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in PAGES if f": {name}" not in navigation] == []


# ---------------------------------------------------------------- figures


def table_rows(text: str) -> list[str]:
    return re.findall(r"^\|.*\|$", text, flags=re.MULTILINE)


def test_figures_of_performance_are_measured_ones():
    """Each number in a table of figures stands in the results that the page links."""
    page = PAGES["performance.md"].read_text()
    measured = set()
    for name in ("float32", "bfloat16", "linear", "sigmoid_loss"):
        assert f"{RESULTS.name}/{name}.txt" in page
        measured |= set(re.findall(r"\d+(?:\.\d+)?", (RESULTS / f"{name}.txt").read_text()))
    rows = table_rows(page[page.index("## Softmax losses on logits") :])
    numbers = [number for row in rows for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", row)]
    assert len(numbers) > 200
    assert [number for number in numbers if number not in measured] == []


def test_tables_of_numerics_are_the_measured_ones():
    page = PAGES["numerics.md"].read_text()
    measured = table_rows((RESULTS / "numerics.txt").read_text())
    assert len(measured) > 50 and "\n".join(measured[:16]) in page
    shown = table_rows(page)
    assert [row for row in measured if row not in shown] == []


@pytest.fixture(scope="module")
def numerics():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import numerics
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return numerics


def test_what_numerics_says_holds_here(numerics):
    """On this machine too: the usual formulas lose sure rows, and nothing here does."""
    for dtype, sure, most in ((torch.float32, 15.0, 1e-5), (torch.bfloat16, 5.0, 1e-2)):
        for loss in numerics.compared():
            exact, rows = numerics.exactly(loss), numerics.sure_rows(sure, dtype)
            assert max(numerics.worst_errors(loss.ours, exact, *rows)) < most, loss.name
            assert min(numerics.worst_errors(loss.usual, exact, *rows)) > 0.1, loss.name
    first_wrong, first_zero, first_nan = numerics.first_failures(numerics.torchvisions_formula, 0.5, torch.float32)
    assert first_nan != "never" and first_zero == "never" and first_wrong != "never"
    assert numerics.first_failures(numerics.our_sigmoid_focal, 0.5, torch.float32) == ["never"] * 3
    assert [numerics.shown(error) for error in (float("nan"), 1.2e-7, 0.03, 0.5, 1.0)] == [
        "NaN",
        "1e-7",
        "3e-2",
        "0.5",
        "1.0",
    ]
