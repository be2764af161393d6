"""What imbalance-kernels does, in a few minutes on real data: `make demo`, or `python examples/demo.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import long_tail
import plots
import torch
import vocabulary_head
from image_data import find_fashion_mnist

import imbalance_kernels as ik

INTRODUCTION = """\
imbalance-kernels: losses for classes that are far from balanced. What you will see:

  1. Long-tailed images. The same small network learns with different losses from a training set whose rarest class
     has {imbalance_factor} times fewer images than the most frequent one. Look at balanced accuracy.
  2. A head of 131,072 tokens. The same language model learns with torch's cross-entropy and with ours. Look at the time
     and the memory of the loss; the losses themselves should agree.
  3. Where the pictures are: of both parts, and of what tells one loss from another.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four IDX files of Fashion-MNIST (.gz or not)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for pictures and results.json")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--imbalance-factor", type=int, default=100, help="most frequent class / rarest class")
    parser.add_argument("--seeds", type=int, help="seeds per method (default: 2 for Fashion-MNIST, 5 for digits)")
    parser.add_argument("--rows", type=int, help="tokens per step of part 2 (default: 512 on a CPU, 4096 on a GPU)")
    parser.add_argument("--steps", type=int, default=30, help="steps of part 2")
    arguments = parser.parse_args()
    if arguments.seeds is not None and arguments.seeds < 2:
        parser.error("--seeds: the spread over seeds needs at least 2")
    try:
        find_fashion_mnist(arguments.data)
    except FileNotFoundError as error:
        parser.error(str(error))
    return arguments


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = arguments.rows or (512 if device.type == "cpu" else 4096)
    sys.stdout.reconfigure(line_buffering=True)  # also through a pipe the text keeps pace with the progress bars
    arguments.output.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    print(INTRODUCTION.format(imbalance_factor=arguments.imbalance_factor))
    ik.show_config()

    heading("1. Long-tailed images")
    images = long_tail.run(arguments.data, arguments.imbalance_factor, arguments.seeds, device)
    images_done = time.perf_counter()
    print(f"This part took {images_done - begin:.0f} s.")

    heading("2. A head of 131,072 tokens")
    head = vocabulary_head.run(rows, arguments.steps, device)
    head_done = time.perf_counter()
    print(f"This part took {head_done - images_done:.0f} s.")

    heading("3. Pictures")
    pictures = [
        plots.accuracy_per_class(images, arguments.output / "accuracy_per_class.png"),
        plots.slopes(arguments.output / "slopes.png"),
        plots.time_and_memory(head, arguments.output / "time_and_memory.png"),
    ]
    results = {"torch": torch.__version__, "long_tail": images, "vocabulary_head": head}
    results["seconds"] = {"long_tail": images_done - begin, "vocabulary_head": head_done - images_done}
    results_path = arguments.output / "results.json"
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    for path in (*pictures, results_path):
        print(path.resolve())
    print(f"All of it took {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
