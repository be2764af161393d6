"""Breaks each formula of the files of objectives, three of either family, in turn, and sees that the tests notice.

Every rule below is applied to every place of every formula, one at a time, in a temporary copy of the checkout; the
tests of the objectives run there. A mutant that they pass is a hole in the tests: it is printed, and the script fails.

    python tests/mutate_objectives.py [--language python|cpp|triton] [--binary] [--only focal] [--jobs 2] [--all]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from imbalance_kernels.objectives import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["imbalance_kernels", "csrc", "tests", "triton_kernels", "pyproject.toml"]
PYTHON, CPP, TRITON = "imbalance_kernels/objectives.py", "csrc/objectives.h", "triton_kernels/objectives.py"
PYTHON_BINARY, CPP_BINARY, TRITON_BINARY = (
    "imbalance_kernels/binary_objectives.py",
    "csrc/binary_objectives.h",
    "triton_kernels/binary_objectives.py",
)
FILES = {
    "python": [PYTHON, PYTHON_BINARY],
    "cpp": [CPP, CPP_BINARY],
    "triton": [TRITON, TRITON_BINARY],
}
TESTS = {
    PYTHON: [
        "tests/test_objectives.py",
        "tests/test_numerics.py",
        "-k",
        "test_objectives or mpmath or gamma_per_class",
    ],
    CPP: ["tests/test_objectives_cpp.py", "tests/test_binary_objectives_cpp.py"],
    TRITON: ["tests/test_triton.py", "-k", "equal_the_registry"],
    PYTHON_BINARY: ["tests/test_binary_objectives.py"],
    CPP_BINARY: ["tests/test_binary_objectives_cpp.py"],
    TRITON_BINARY: ["tests/test_triton.py", "-k", "binary_objectives_equal_the_registry"],
}
# What must be found in each file, lest a rule silently miss a formula.
FORMULAS = {
    **dict.fromkeys((PYTHON, CPP, TRITON), set(REGISTRY)),
    PYTHON_BINARY: {"side_values", "side_slopes", "quality_focal", "varifocal", "asymmetric"},
    CPP_BINARY: {"mixed_sides", "focal_sides", "quality_focal_sides", "varifocal_sides", "clipped_focal"},
    TRITON_BINARY: {
        "_mixed_sides",
        "_focal_sides",
        "_quality_focal_sides",
        "_varifocal",
        "_varifocal_sides",
        "_clipped_focal",
        "_asymmetric",
        "_asymmetric_sides",
    },
}

OPERATORS = [
    ("a sign dropped", r"(?:(?<=[({] )|(?<=[({])|(?<=, )|(?<=return )|(?<=\* ))-(?=[\w(])", ""),
    ("plus to minus", r" \+ ", " - "),
    ("minus to plus", r" - ", " + "),
    ("times to plus", r" \* ", " + "),
    ("divided to times", r" / ", " * "),
]
TRUTHS = [  # of both kernels' objectives, which are written alike
    ("n to p", r"\bt\.n\b", "t.p"),
    ("p to n", r"\bt\.p\b", "t.n"),
    ("n to p", r"\bsharp\.n\b", "sharp.p"),
    ("p to n", r"\bsharp\.p\b", "sharp.n"),
    ("m1 dropped", r"expm1_nonpositive", "exp_nonpositive"),
]
RULES = {
    PYTHON: [
        *OPERATORS,
        ("n to p", r"\b_n\((?=\w)", "torch.sigmoid("),
        ("p to n", r"torch\.sigmoid\((?!-)", "torch.sigmoid(-"),
        ("gamma + 1 to gamma", r"\bself\.gamma \+ 1\b", "self.gamma"),
        ("half to one", r"\b0\.5\b", "1.0"),
        ("one to two", r"(?<=\+ )1\b", "2"),
        ("1p dropped", r"\b(?P<name>log|exp)(?:1p|m1)\(", r"\g<name>("),
        ("guard dropped", r"torch\.where\([^,]+, [^,]+(?:\([^()]*\))?, (?P<kept>.+)\)$", r"\g<kept>"),
        ("guard dropped", r"(?<=return ).+ if gamma == 0 else ", ""),
        ("guard dropped", r"math\.inf if self\.threshold == 1 else ", ""),
    ],
    CPP: [
        *OPERATORS,
        *TRUTHS,
        ("log p to log n", r"\blog_p\b(?=[;, )}])(?<!p_log_p)", "log_n"),
        ("gamma + 1 to gamma", r"\bgamma \+ Number\(1\)", "gamma"),
        ("half to one", r"Number\(0\.5\)", "Number(1)"),
        ("one to two", r"Number\(1\)", "Number(2)"),
        ("zero to one", r"Number\(0\)", "Number(1)"),
        (
            "guard dropped",
            r"M::select\((?:[^,()]|\([^()]*(?:\([^()]*\)[^()]*)*\))+, [^,]+, (?P<kept>.+)\)(?=;|, )",
            r"\g<kept>",
        ),
    ],
    TRITON: [
        *OPERATORS,
        *TRUTHS,
        ("log p to log n", r"\bt\.log_p\b", "t.log_n"),
        ("gamma + 1 to gamma", r"\bgamma \+ 1\.0", "gamma"),
        ("half to one", r"\b0\.5\b", "1.0"),
        ("one to two", r"\b1\.0\b", "2.0"),
        ("zero to one", r"\b0\.0\b", "1.0"),
        ("guard dropped", r"tl\.where\(t?\.?\w+ [=>]=? [^,]+, [^,]+, (?P<kept>.+)\)(?=$)", r"\g<kept>"),
    ],
}
LABELS = [
    ("y to 1 - y", r"(?<![\w.])y(?= \* )", "(1 - y)"),
    ("which label", r"(?<=y == )1\b|(?<=equal\(y, )one\b", "2"),
    ("sides swapped", r"(?<=tl\.where\(positive, )(?P<a>[^,]+), (?P<b>.+)\)(?=,?$)", r"\g<b>, \g<a>)"),
    ("beta - 1 to beta", r"beta - 1\.0|less_one\(beta\)", "beta"),
    ("halves - 2 to halves", r"halves - 2", "halves"),
]
RULES |= {
    PYTHON_BINARY: [
        *OPERATORS,
        *LABELS,
        ("n to p", r"torch\.sigmoid\(-x\)", "torch.sigmoid(x)"),
        ("p to n", r"torch\.sigmoid\(x\)", "torch.sigmoid(-x)"),
        ("log n to log p", r"logsigmoid\(-x\)", "logsigmoid(x)"),
        ("log p to log n", r"logsigmoid\(x\)", "logsigmoid(-x)"),
        ("exponent", r"self\.beta - 1", "self.beta"),
        ("1p dropped", r"\blog1p\(", "log("),
        ("guard dropped", r"torch\.where\([^,]+, torch\.\w+_like\(\w+\), (?P<kept>.+)\)(?=\)?$)", r"\g<kept>"),
        ("clamp dropped", r"\.clamp_min\(0\)", ""),
        ("absolute value dropped", r"\.abs\(\)", ""),
        ("sign dropped", r"torch\.sign\((?P<kept>\w+)\)", r"\g<kept>"),
    ],
    CPP_BINARY: [*RULES[CPP], *LABELS],
    TRITON_BINARY: [
        *RULES[TRITON],
        *LABELS,
        ("absolute value dropped", r"tl\.abs\((?P<kept>\w+)\)", r"\g<kept>"),
    ],
}

# Mutants that change nothing to observe, and why: (file, function, text of the line, rule).
EQUIVALENT = {
    (
        CPP,
        "n_power",
        "Number(2)), n * n",
        "guard dropped",
    ): "products are exact to the last bits; powers are good enough",
    (CPP, "n_power", "Number(1)), n, power", "guard dropped"): "the same",
    (CPP, "evaluate", "return cross_entropy(truth);", ""): "never reached",
    (TRITON, "power_of", "gamma == 2", "guard dropped"): "products are exact to the last bits; powers are good enough",
    (TRITON, "power_of", "gamma == 1", "guard dropped"): "the same",
    (
        PYTHON_BINARY,
        "_mixed_power",
        "torch.where(y == 1, log_n",
        "which label",
    ): "the logarithm of the same number; where that underflows, so does the cost that its power multiplies",
    (
        PYTHON_BINARY,
        "asymmetric",
        "m = (p - self.clip).clamp_min(0)",
        "clamp dropped",
    ): "in the slope, which is 0 below the clip; the value's is noticed",
    (CPP_BINARY, "focal_sides", "M::select(positive, t.log_n", "guard dropped"): "the same",
    (TRITON_BINARY, "_focal_sides", "tl.where(y == 1, t.log_n", "guard dropped"): "the same",
    (TRITON_BINARY, "_focal_sides", "tl.where(y == 1, t.log_n", "which label"): "the same",
    (TRITON_BINARY, "_clipped_focal", "cost = tl.where(small", "zero to one"): "stands where the other branch counts",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    line: int  # from 0
    rule: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line + 1}  {self.rule}\n      {self.before.strip()}\n      {self.after.strip()}"


METHODS = ("value", "slope", "_weight", "_limit", "side_values", "side_slopes")
HELPERS = (
    *("_log_p", "_n", "_p_log_p", "_n_power"),
    *("side_values", "side_slopes", "_times", "_cross_entropy", "_cross_entropy_slope", "_mixed_power"),
)


def python_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """(objective or helper, line) of every line of a formula: methods and helpers but their docstrings and checks."""
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ClassDef) and node.name != "Objective":
            named = (x.value for x in node.body if isinstance(x, ast.AnnAssign) and ast.unparse(x.target) == "name")
            name = next(map(ast.literal_eval, named), None)
            if name is None:  # no objective
                continue
            functions = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name in METHODS]
        elif isinstance(node, ast.FunctionDef) and node.name in HELPERS:
            name, functions = node.name, [node]
        else:
            continue
        for function in functions:
            for statement in function.body:
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                    yield from ((name, line - 1) for line in range(statement.lineno, statement.end_lineno + 1))


def triton_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """The same of triton_kernels/objectives.py: all of its functions but their docstrings."""
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef):
            for statement in node.body:
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                    yield from ((node.name, line - 1) for line in range(statement.lineno, statement.end_lineno + 1))


def cpp_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """The same of csrc/objectives.h: everything in the braces of a function."""
    name = ""
    for number, line in enumerate(lines):
        head = re.match(r"\s*(?:explicit )?IMBALANCE_INLINE (?:[\w<>]+ )*(\w+)\(", line)
        if head:
            name = head.group(1)
            if line.rstrip().endswith("}"):  # on one line
                yield name, number
        elif line.rstrip() in ("}", "  }", "};"):
            name = ""
        elif name:
            yield name, number


def language_of(file: str) -> str:
    return next(language for language, files in FILES.items() if file in files)


def mutants_of(file: str) -> list[Mutant]:
    lines = (ROOT / file).read_text().split("\n")
    functions = {"python": python_functions, "cpp": cpp_functions, "triton": triton_functions}[language_of(file)]
    found = []
    for function, number in functions(lines):
        line = lines[number]
        code, comment = re.match(r"(.*?)(\s*(?:#|//).*)?$", line).groups()
        body = code.index("{ ") + 1 if "IMBALANCE_INLINE" in code else 0  # of a function on one line
        for rule, pattern, replacement in RULES[file]:
            for place in re.finditer(pattern, code):
                after = code[: place.start()] + place.expand(replacement) + code[place.end() :] + (comment or "")
                known = any(
                    (file, function) == key[:2] and key[2] in line and key[3] in ("", rule) for key in EQUIVALENT
                )
                if place.start() >= body and after != line and not known:
                    found.append(Mutant(file, function, number, rule, line, after))
    missing = FORMULAS[file] - {mutant.function for mutant in found}
    if missing:
        sys.exit(f"{file}: no formula found for {', '.join(sorted(missing))}: mend the rules of {Path(__file__).name}")
    return found


def run_tests(mutant: Mutant | None, checkout: Path, file: str) -> str | None:
    """Return the first test that fails in the checkout with the mutant in place, or None."""
    path = checkout / file
    original = path.read_text()
    if mutant is not None:
        lines = original.split("\n")
        assert lines[mutant.line] == mutant.before
        lines[mutant.line] = mutant.after
        path.write_text("\n".join(lines))
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *TESTS[file]]
    try:
        run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        path.write_text(original)
    if run.returncode == 0:
        return None
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if first is None:
        sys.exit(f"pytest gave no verdict ({run.returncode}):\n{run.stdout}\n{run.stderr}")
    return first.group(1)


def with_progress(verdicts: Iterable, total: int) -> Iterator:
    try:
        from tqdm import tqdm
    except ImportError:
        for done, verdict in enumerate(verdicts, 1):
            print(f"\r{done} of {total} mutants", end="" if done < total else "\n", file=sys.stderr, flush=True)
            yield verdict
    else:
        yield from tqdm(verdicts, total=total, unit="mutant")


def print_table(verdicts: list[tuple[Mutant, str | None]]) -> None:
    rows: dict[tuple[str, str], list[bool]] = {}
    for mutant, noticed_by in verdicts:
        rows.setdefault((mutant.file, mutant.function), []).append(noticed_by is not None)
    print(f"\n{'file':32} {'formula':18} {'mutants':>7} {'noticed':>7}")
    for (file, function), noticed in rows.items():
        print(f"{file:32} {function:18} {len(noticed):7} {sum(noticed):7}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--language", choices=["python", "cpp", "triton"], help="only this language's formulas")
    parser.add_argument("--binary", action="store_true", help="only the files of binary objectives")
    parser.add_argument("--only", metavar="NAME", help="only this objective or helper function")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument("--all", action="store_true", help="print every mutant, and the test that noticed it")
    arguments = parser.parse_args()

    files = [file for language, both in FILES.items() if arguments.language in (None, language) for file in both]
    files = [file for file in files if "binary" in file or not arguments.binary]
    mutants = [m for file in files for m in mutants_of(file) if arguments.only in (None, m.function)]
    with tempfile.TemporaryDirectory() as folder:
        checkouts: Queue[Path] = Queue()
        for job in range(arguments.jobs):
            checkout = Path(folder) / str(job)
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                checkout.mkdir(exist_ok=True)
                copy(ROOT / name, checkout / name)
            (checkout / "imbalance_kernels/triton_kernels").symlink_to(checkout / "triton_kernels")  # as if installed
            checkouts.put(checkout)

        def verdict(mutant: Mutant | None, file: str) -> tuple[Mutant | None, str | None]:
            checkout = checkouts.get()
            try:
                return mutant, run_tests(mutant, checkout, file)
            finally:
                checkouts.put(checkout)

        for file in files:  # what the tests say of the formulas as they are
            if (failed := verdict(None, file)[1]) is not None:
                sys.exit(f"{failed} fails without any mutant: mend that first")
        with ThreadPoolExecutor(arguments.jobs) as pool:
            running = pool.map(lambda mutant: verdict(mutant, mutant.file), mutants)
            verdicts = list(with_progress(running, len(mutants)))

    if arguments.all:
        for mutant, noticed_by in verdicts:
            print(f"{mutant}\n      noticed by {noticed_by}" if noticed_by else f"{mutant}\n      SURVIVED")
    print_table(verdicts)
    survivors = [mutant for mutant, noticed_by in verdicts if noticed_by is None]
    print(f"\n{len(mutants)} mutants, {len(mutants) - len(survivors)} noticed")
    for mutant in survivors:
        print(f"SURVIVED  {mutant}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
