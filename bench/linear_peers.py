"""Fused linear cross-entropy of other packages, each loaded if it is installed: (input, weight, target) -> mean."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Where a package's function is, and how it takes input (N, D), weight (C, D) and target (N,)."""

    name: str
    module: str
    attribute: str
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor]


PEERS = (
    Peer("liger", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", lambda f, x, w, t: f()(w, x, t)),
    Peer("cut cross-entropy", "cut_cross_entropy", "linear_cross_entropy", lambda f, x, w, t: f(x, w, t)),
    Peer("quack", "quack.linear_cross_entropy", "chunked_linear_cross_entropy", lambda f, x, w, t: f(x, w, t)),
    Peer("fla", "fla.modules", "FusedLinearCrossEntropyLoss", lambda f, x, w, t: f()(x, t, w)),
)


def load(peer: Peer) -> tuple[Step | None, str]:
    """Return the peer's step, or None and why."""
    try:
        function = getattr(importlib.import_module(peer.module), peer.attribute)
    except Exception as error:  # not installed, or not for this torch or device
        return None, f"{peer.name} not timed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return lambda input, weight, target: peer.call(function, input, weight, target), ""
