"""Cross-entropy of other packages, each loaded if it is installed: logits (N, C) -> mean over rows, differentiable."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from candidates import BACKWARD, IN_PLACE, Formula
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """Where a package's function is, and whether its gradient takes the logits' memory."""

    name: str
    module: str
    function: str
    mode: str = BACKWARD


# None of them computes a focal loss or takes a prior: they are timed on cross-entropy alone.
PEERS = (
    Peer("liger", "liger_kernel.transformers.functional", "liger_cross_entropy", IN_PLACE),
    Peer("fla", "fla.modules.fused_cross_entropy", "cross_entropy_loss"),
    Peer("quack", "quack.cross_entropy", "cross_entropy"),
)

WITHOUT_LOGITS = "cut-cross-entropy never holds logits: it is a peer of the fused linear loss, not of this"


def load(peer: Peer) -> tuple[Formula | None, str]:
    """Return the peer's function of logits and target, or None and why."""
    try:
        function = getattr(importlib.import_module(peer.module), peer.function)
    except Exception as error:  # not installed, or not for this torch or device
        return None, f"{peer.name} not timed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def formula(logits: Tensor, target: Tensor) -> Tensor:
        loss = function(logits, target)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return loss.mean() if loss.dim() else loss

    return formula, ""
