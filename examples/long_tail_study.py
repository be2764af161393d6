"""Which loss for a long tail? Every method on the same network, images and seeds: `make study`.

Runs that are missing from the results are made and added one by one, so that it may be stopped at any time; then the
tables, the plots and the text of docs/study.md are written anew from all of them. `--report` writes these alone.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import image_data
import study_report
import study_training
import torch
from study_methods import BY_NAME, MAIN, METHODS
from study_training import FASHION, SETTINGS, Setting
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@dataclasses.dataclass(frozen=True)
class Run:
    setting: Setting
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.setting.name, self.method, self.seed


def all_runs() -> Iterator[Run]:
    """Seed after seed, so that a study that is stopped early has some of everything; the main setting first."""
    for setting in SETTINGS:
        names = [method.name for method in METHODS] if setting == FASHION else MAIN
        for seed in range(setting.seeds):
            yield from (Run(setting, name, seed) for name in names)


def fingerprint() -> str:
    """What every result depends on: images, network, schedule, metrics; not words, nor which methods there are."""
    digest = hashlib.sha256()
    for module in (image_data, study_training):
        tree = ast.parse(inspect.getsource(module))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant):  # a docstring
                    body[0] = ast.Pass()
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


class Results:
    """JSON, a line for each run after a line that says what made them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        self.made_by = json.loads(lines[0]) if lines else None
        for line in lines[1:]:
            self.add(json.loads(line))

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["setting"], record["method"], record["seed"]] = record

    def start(self) -> None:
        """Write the first line, if there is none.

        Raises:
            ValueError: what is there was made by other code.
        """
        if self.made_by is None:
            self.made_by = {"fingerprint": fingerprint(), "torch": torch.__version__}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.made_by) + "\n")
        elif self.made_by["fingerprint"] != fingerprint():
            raise ValueError(
                f"{self.path} was made with other images, network or schedule (image_data.py, study_training.py): "
                "move it away, or give another file by --results"
            )

    def append(self, record: dict[str, Any]) -> None:
        self.add(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def in_one_thread(run: Run, folder: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    return study_training.run(BY_NAME[run.method], run.setting, run.seed, folder)


def make(runs: list[Run], results: Results, folder: Path | None, processes: int) -> None:
    missing = [run for run in runs if run.key not in results.records]
    bar = tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run", dynamic_ncols=True, disable=None)
    with bar, ProcessPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(in_one_thread, run, folder) for run in missing]):
            record = done.result()
            results.append(record)
            bar.set_description(f"{record['setting']}, {record['method']}, seed {record['seed']}")
            bar.update()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four IDX files of Fashion-MNIST (.gz or not)")
    parser.add_argument(
        "--results", type=Path, default=DOCS / "study" / "results.jsonl", help="what is read and added to"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of study.md and images/")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--report", action="store_true", help="make no runs")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    results = Results(arguments.results)
    if not arguments.report:
        if image_data.find_fashion_mnist(arguments.data) is None:
            print("Fashion-MNIST is needed: `apt install dataset-fashion-mnist`, or --data FOLDER with its IDX files.")
            return 1
        results.start()
        make(list(all_runs()), results, arguments.data, arguments.processes)
    for path in study_report.write(list(results.records.values()), arguments.docs):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
