"""Trains a small causal transformer over 131,072 tokens, with any of the losses, fused with the head or on its logits.

    python examples/language_model.py --loss logit_adjusted --head fused --steps 200
    python examples/language_model.py --checkpoint run.pt --steps 100     # then, to go on from there:
    python examples/language_model.py --checkpoint run.pt --steps 200

Prints throughput, peak memory, and accuracy on text that was held out: over all tokens, and the mean over the tokens'
recalls, which is what losses for imbalance are for. The same on a CPU and a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from corpus import read_tokens
from memory_peak import MemoryPeak
from torch import Tensor, nn
from tqdm import tqdm

import imbalance_kernels as ik

HELD_OUT = 0.1  # of the tokens, the last
EVALUATED_ROWS = 4096
EVALUATED_AT_ONCE = 256
WARM_UP_STEPS = 2  # left out of throughput and memory

# By name: from the tokens' counts (V,) and the shared keywords to the loss. Margins on cosines need normalised layers.
LOSSES: dict[str, Callable[..., ik.SoftmaxLoss]] = {
    "cross_entropy": lambda counts, **shared: ik.CrossEntropyLoss(**shared),
    "logit_adjusted": lambda counts, **shared: ik.LogitAdjustedLoss(counts, **shared),
    "balanced_softmax": lambda counts, **shared: ik.BalancedSoftmaxLoss(counts, **shared),
    "focal": lambda counts, **shared: ik.FocalLoss(**shared),
    "hard_truncation": lambda counts, **shared: ik.HardTruncationLoss(**shared),
    "soft_truncation": lambda counts, **shared: ik.SoftTruncationLoss(**shared),
    "poly": lambda counts, **shared: ik.PolyLoss(**shared),
    "generalized_cross_entropy": lambda counts, **shared: ik.GeneralizedCrossEntropyLoss(**shared),
    "smooth_accuracy": lambda counts, **shared: ik.SmoothAccuracyLoss(**shared),
    "vs": lambda counts, **shared: ik.VSLoss(counts, **shared),
    "radius_margin": lambda counts, **shared: ik.RadiusMarginLoss(0.1, **shared),
    "ldam": lambda counts, **shared: ik.LDAMLoss(counts, **shared),
    "cosface": lambda counts, **shared: ik.CosFaceLoss(**shared),
    "arcface": lambda counts, **shared: ik.ArcFaceLoss(**shared),
    "circle": lambda counts, **shared: ik.CircleLoss(**shared),
}
ON_COSINES = ("ldam", "cosface", "arcface", "circle")
FUSED_ALONE = ("radius_margin",)

# What a run must have in common with the checkpoint that it goes on from.
OF_THE_RUN = ("loss", "width", "layers", "context", "batch", "rate", "seed")


class LanguageModel(nn.Module):
    """Tokens (B, T) to hidden states (B, T, D): embeddings of tokens and places, and transformer layers."""

    def __init__(self, num_tokens: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width)
        self.places = nn.Embedding(context, width)
        heads = next(heads for heads in range(max(1, width // 32), 0, -1) if width % heads == 0)
        layer = nn.TransformerEncoderLayer(
            width, nhead=heads, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)

    def forward(self, context: Tensor) -> Tensor:
        embedded = self.tokens(context) + self.places.weight
        return self.layers(embedded, mask=self.mask, is_causal=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--loss", choices=LOSSES, default="logit_adjusted")
    parser.add_argument("--head", choices=("fused", "plain"), default="fused", help="plain makes the logits")
    parser.add_argument("--steps", type=int, default=200, help="in all, those before a checkpoint included")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--context", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-mib", type=int, default=64, help="logits that the fused head makes at a time")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="float16 on a GPU, with a gradient scaler")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--checkpoint", type=Path, help="file: written as training goes, and gone on from if it exists")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--output", type=Path, help="JSON file for losses and measurements")
    arguments = parser.parse_args(argv)
    for name in ("steps", "batch", "context", "width", "layers", "chunk_mib", "checkpoint_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.head == "plain" and arguments.loss in FUSED_ALONE:
        parser.error(f"--loss {arguments.loss} needs the head's weight: use --head fused")
    return arguments


class Training:
    """Model, loss, optimizer and the order of the data: all that a checkpoint holds."""

    def __init__(self, arguments: argparse.Namespace, counts: Tensor, device: torch.device) -> None:
        torch.manual_seed(arguments.seed)
        self.settings = {name: getattr(arguments, name) for name in OF_THE_RUN}
        self.model = LanguageModel(len(counts), arguments.width, arguments.layers, arguments.context).to(device)
        loss = LOSSES[arguments.loss](counts, class_dim=-1, chunk_bytes=arguments.chunk_mib << 20)
        output = nn.Linear(arguments.width, len(counts), bias=False, device="meta")
        output.weight = self.model.tokens.weight  # tied
        self.head = ik.LinearLoss.from_linear(output, loss.to(device), cosine=arguments.loss in ON_COSINES)
        self.is_fused = arguments.head == "fused"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), arguments.rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=arguments.autocast == "float16")
        self.order = torch.Generator().manual_seed(arguments.seed)
        self.losses: list[float] = []

    def loss_of(self, context: Tensor, target: Tensor) -> Tensor:
        hidden = self.model(context)
        return self.head(hidden, target) if self.is_fused else self.head.loss(self.head.logits(hidden), target)

    def step(self, context: Tensor, target: Tensor, autocast: torch.autocast) -> None:
        with autocast:
            loss = self.loss_of(context, target)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all."""
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "losses": self.losses,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path, device: torch.device) -> None:
        state = torch.load(path, map_location=device, weights_only=True)
        other = {name: value for name, value in state["settings"].items() if value != self.settings[name]}
        if other:
            asked = {name: self.settings[name] for name in other}
            raise SystemExit(f"{path} is of another run, with {other} and not {asked}: name another file")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"].cpu())
        self.losses = state["losses"]


@torch.no_grad()
def accuracies(training: Training, windows: Tensor, num_tokens: int, device: torch.device) -> tuple[float, float]:
    """Accuracy over the next tokens of held-out text, and the mean of the recalls of the tokens that occur there."""
    right, seen = torch.zeros(2, num_tokens, device=device)
    rows = 0
    for window in windows:  # (T + 1,)
        hidden = training.model(window[None, :-1].to(device))[0]
        for part, target in zip(
            hidden.split(EVALUATED_AT_ONCE), window[1:].to(device).split(EVALUATED_AT_ONCE), strict=True
        ):
            predicted = training.head.logits(part).argmax(dim=-1)
            seen.index_add_(0, target, torch.ones_like(target, dtype=seen.dtype))
            right.index_add_(0, target, (predicted == target).to(right.dtype))
        rows += len(window) - 1
        if rows >= EVALUATED_ROWS:
            break
    occurs = seen > 0
    return float(right.sum() / seen.sum()), float((right[occurs] / seen[occurs]).mean())


def main(argv: list[str] | None = None) -> dict:
    arguments = parse_arguments(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokens, num_tokens, files = read_tokens()
    learned, held_out = tokens.split([len(tokens) - int(HELD_OUT * len(tokens)), int(HELD_OUT * len(tokens))])
    counts = learned.bincount(minlength=num_tokens) + 1  # Laplace's rule: most tokens never occur
    print(
        f"{files} modules of Python's standard library: {len(learned):,} tokens to learn from, of {num_tokens:,} kinds"
    )

    training = Training(arguments, counts, device)
    if arguments.checkpoint:
        arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if arguments.checkpoint and arguments.checkpoint.exists():
        training.load(arguments.checkpoint, device)
        print(f"going on from step {len(training.losses)} of {arguments.steps}, {arguments.checkpoint}")

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    dtype = getattr(torch, arguments.autocast or "bfloat16")
    autocast = torch.autocast(device.type, dtype, enabled=arguments.autocast is not None)
    memory, peaks, seconds = MemoryPeak(device), [], []
    windows = learned.unfold(0, arguments.context + 1, 1)  # (number of tokens - T, T + 1)
    bar = tqdm(total=arguments.steps, initial=len(training.losses), unit="step", dynamic_ncols=True, disable=None)
    while len(training.losses) < arguments.steps:
        batch = windows[torch.randint(len(windows), (arguments.batch,), generator=training.order)].to(device)
        memory.start()
        begin = now()
        training.step(batch[:, :-1], batch[:, 1:], autocast)
        seconds.append(now() - begin)
        peaks.append(memory.stop())
        bar.set_postfix(loss=f"{training.losses[-1]:.3f}", refresh=False)
        bar.update()
        if arguments.checkpoint and len(training.losses) % arguments.checkpoint_every == 0:
            training.save(arguments.checkpoint)
    bar.close()
    if arguments.checkpoint:
        training.save(arguments.checkpoint)

    overall, balanced = accuracies(
        training, held_out.unfold(0, arguments.context + 1, arguments.context), num_tokens, device
    )
    measured = [peak for peak in peaks[WARM_UP_STEPS:] if peak is not None]
    rows = arguments.batch * arguments.context
    result = {
        **vars(arguments),
        "losses": training.losses,
        "tokens_per_second": rows / statistics.median(seconds[WARM_UP_STEPS:]) if seconds[WARM_UP_STEPS:] else None,
        "peak_mib": statistics.median(measured) / 2**20 if measured else None,
        "logits_mib": rows * num_tokens * 4 / 2**20,
        "accuracy": overall,
        "balanced_accuracy": balanced,
    }
    print(report(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result


def report(result: dict) -> str:
    throughput, peak, logits_mib = result["tokens_per_second"], result["peak_mib"], result["logits_mib"]
    speed = "too few steps" if throughput is None else f"{throughput:.0f} tokens a second"
    memory = "not measured here" if peak is None else f"{peak:.0f} MiB; float32 logits alone are {logits_mib:.0f} MiB"
    first, last = result["losses"][0], statistics.mean(result["losses"][-10:])
    few = min(10, len(result["losses"]))
    return f"""\
{result["loss"]}, {result["head"]} head: loss {first:.3f} at the first step, {last:.3f} over the last {few}
throughput: {speed}
peak memory of a step: {memory}
held-out text: {result["accuracy"]:.1%} of all tokens right, {result["balanced_accuracy"]:.1%} as the mean over kinds"""


if __name__ == "__main__":
    main()
