"""A language model's head with 131,072 tokens: what head and loss cost in time and in memory.

The tokens are those of corpus.py. Four copies of one small model train on the same batches from the same initial
weights: with torch's cross-entropy, with ours, with ours writing the gradient over the logits, and with head and loss
fused, which never holds the logits. They step in turn, so that all meet the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from corpus import read_tokens
from memory_peak import MemoryPeak
from torch import Tensor, nn
from tqdm import tqdm

import imbalance_kernels as ik

CONTEXT = 8  # tokens that the model sees
WIDTH = 64
WARM_UP_STEPS = 3  # left out of times and memory: first calls allocate, compile and load
LEARNING_RATE = 4e-3

TORCH = "torch F.cross_entropy"
OURS = "imbalance_kernels"
IN_PLACE = "imbalance_kernels, in place"
FUSED = "imbalance_kernels, fused head"
CHUNK_BYTES = 64 << 20  # of logits that the fused head makes at a time


class NextToken(nn.Module):
    """The next token from the last few: embedding, GRU, and a head that shares the embedding's weight."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, num_tokens)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        nn.init.zeros_(self.head.bias)
        self.head.weight = self.embedding.weight

    def forward(self, context: Tensor) -> Tensor:  # (N, CONTEXT) -> (N, WIDTH), what the head sees
        return self.mix(self.embedding(context))[0][:, -1]


@dataclass
class Trainee:
    """One model with its loss, of logits or fused with the head, and what was measured while it trained."""

    model: NextToken
    loss_function: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)  # the loss and the gradient of its logits
    head_seconds: list[float] = field(default_factory=list)  # head and loss, forward and backward
    step_seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int | None] = field(default_factory=list)  # of head and loss

    @property
    def is_fused(self) -> bool:
        return isinstance(self.loss_function, ik.LinearLoss)

    def step(self, context: Tensor, target: Tensor, memory: MemoryPeak, now: Callable[[], float]) -> None:
        begin = now()
        self.optimizer.zero_grad()
        hidden = self.model(context)

        # A part ends when its gradient reaches the node that made what it began with. The hook sits on that node and
        # not on the tensor, because the in-place form changes the logits.
        def head_is_done(_: tuple[Tensor, ...]) -> None:
            self.head_seconds.append(now() - head_begin)
            self.peak_bytes.append(memory.stop())

        hidden.grad_fn.register_prehook(head_is_done)
        memory.start()
        head_begin = now()
        loss = self.loss_function(hidden, target) if self.is_fused else self._loss_of_logits(hidden, target, now)
        loss.backward()
        self.optimizer.step()
        self.step_seconds.append(now() - begin)
        self.losses.append(loss.item())

    def _loss_of_logits(self, hidden: Tensor, target: Tensor, now: Callable[[], float]) -> Tensor:
        # Nobody else holds the logits: torch's loss then frees them early, which is its best case.
        logits = self.model.head(hidden)

        def loss_is_done(_: tuple[Tensor, ...]) -> None:
            self.loss_seconds.append(now() - begin)

        logits.grad_fn.register_prehook(loss_is_done)
        begin = now()
        return self.loss_function(logits, target)


class WarmCopy:
    """The floor of the time: reading the logits once and writing as much once, into memory that is already there."""

    def __init__(self, num_rows: int, num_tokens: int, device: torch.device) -> None:
        self.source, self.destination = torch.ones(2, num_rows, num_tokens, device=device)
        self.seconds: list[float] = []

    def step(self, now: Callable[[], float]) -> None:
        begin = now()
        self.destination.copy_(self.source)
        self.seconds.append(now() - begin)


def _milliseconds(part: str, seconds: list[float]) -> dict[str, float]:
    """The best step, since whatever else the machine does only adds time, and the median one, since that is what a
    training run meets: fresh memory can cost more than the arithmetic, for torch's loss as for ours."""
    measured = [1e3 * second for second in seconds[WARM_UP_STEPS:]]
    return {f"{part}_ms_best": min(measured), f"{part}_ms_median": statistics.median(measured)}


def measure(trainee: Trainee) -> dict:
    peaks = [peak for peak in trainee.peak_bytes[WARM_UP_STEPS:] if peak is not None]
    return {
        **({} if trainee.is_fused else _milliseconds("loss", trainee.loss_seconds)),
        **_milliseconds("head", trainee.head_seconds),
        **_milliseconds("step", trainee.step_seconds),
        "peak_mib": statistics.median(peaks) / 2**20 if peaks else None,
        "losses": trainee.losses,
    }


def format_table(result: dict) -> str:
    copy_ms, logits_mib = result["copy_ms_best"], result["logits_mib"]
    header = (
        f"{'loss and gradient: best':>26}{'median':>10}{'head and loss: best':>22}{'median':>10}{'peak memory':>26}"
    )
    lines = [f"{'':<32}{header}"]
    for name, row in result["rows"].items():
        if "loss_ms_best" in row:
            copies = f"{row['loss_ms_best']:.1f} ms = {row['loss_ms_best'] / copy_ms:.1f} copies"
            median = f"{row['loss_ms_median']:.1f} ms"
        else:
            copies, median = "makes no logits", ""
        peak = row["peak_mib"]
        memory = "not measured here" if peak is None else f"{peak:.0f} MiB = {peak / logits_mib:.1f} x logits"
        head = f"{row['head_ms_best']:>19.0f} ms{row['head_ms_median']:>7.0f} ms"
        lines.append(f"{name:<32}{copies:>26}{median:>10}{head}{memory:>26}")
    lines += [
        "",
        f"The unit: a warm copy_ of the logits ({logits_mib:.0f} MiB), best {copy_ms:.1f} ms, median "
        f"{result['copy_ms_median']:.1f} ms; {len(result['rows'][TORCH]['losses']) - WARM_UP_STEPS} steps measured. "
        "Head and loss: forward and backward, with what they allocate at most.",
    ]
    return "\n".join(lines)


def run(num_rows: int, steps: int, device: torch.device) -> dict:
    tokens, num_tokens, files = read_tokens()
    counts = tokens.bincount(minlength=num_tokens).sort(descending=True).values
    print(
        f"Data: {files} modules of Python's standard library, {len(tokens):,} tokens. Of the vocabulary's "
        f"{num_tokens:,} tokens {int((counts > 0).sum()):,} occur; the 100 most frequent make up "
        f"{counts[:100].sum() / len(tokens):.0%} of the text."
    )
    print(f"Logits: {num_rows} x {num_tokens} float32 on {device}.")

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    torch.manual_seed(0)
    first = NextToken(num_tokens)
    losses = {
        TORCH: nn.functional.cross_entropy,
        OURS: ik.CrossEntropyLoss(),
        IN_PLACE: ik.CrossEntropyLoss(inplace=True),
    }
    trainees = {}
    for name in (*losses, FUSED):
        model = deepcopy(first).to(device)
        fused = ik.LinearLoss.from_linear(model.head, ik.CrossEntropyLoss(chunk_bytes=CHUNK_BYTES))
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        trainees[name] = Trainee(model, losses.get(name, fused), optimizer)

    memory = MemoryPeak(device)
    copy = WarmCopy(num_rows, num_tokens, device)
    windows = tokens.unfold(0, CONTEXT + 1, 1)  # (number of tokens - CONTEXT, CONTEXT + 1)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="four losses in turn", unit="step", dynamic_ncols=True, disable=None):
        batch = windows[torch.randint(len(windows), (num_rows,), generator=generator)].to(device)
        for trainee in trainees.values():
            trainee.step(batch[:, :-1], batch[:, -1], memory, now)
        copy.step(now)

    result = {
        "shape": [num_rows, num_tokens],
        "device": str(device),
        "chunk_mib": CHUNK_BYTES / 2**20,
        **_milliseconds("copy", copy.seconds),
        "logits_mib": num_rows * num_tokens * 4 / 2**20,
        "rows": {name: measure(trainee) for name, trainee in trainees.items()},
    }
    print("\n" + format_table(result))
    curve = torch.tensor(result["rows"][TORCH]["losses"])
    for name in (OURS, IN_PLACE, FUSED):
        row = result["rows"][name]
        row["largest_loss_difference"] = float((torch.tensor(row["losses"]) - curve).abs().max())
        print(
            f"{name}: over {steps} steps the loss went from {row['losses'][0]:.3f} to {row['losses'][-1]:.3f} "
            f"and differed from torch's by {row['largest_loss_difference']:.1e} at most."
        )
    return result
