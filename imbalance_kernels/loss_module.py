"""What every loss's module shares: its options, and constants of its classes that no change of precision touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.ops.checks import check_reduction

__all__ = ["LossModule"]


class LossModule(torch.nn.Module):
    """A loss with constants (C,): a prior, margins, a gamma of each class.

    They are kept in float64 and as non-persistent float32 buffers, which are made again from the float64 ones after
    .half(), .to() or to_empty().
    """

    _constants: dict[str, Tensor | None]

    def __init__(self, *, ignore_index: int, reduction: str, class_dim: int, inplace: bool, impl: str | None) -> None:
        super().__init__()
        check_reduction(reduction)
        if not isinstance(ignore_index, int):
            raise TypeError(
                f"ignore_index is {ignore_index!r}, but it must be an int (-100, no label, ignores nothing)"
            )
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.class_dim = class_dim
        self.inplace = inplace
        self.impl = impl

    def _register_constants(self, **exact: Tensor | None) -> None:
        """Register a buffer ``_name`` for each constant ``name``, given exactly; None is absent."""
        self._constants = {
            name: None if vector is None else vector.to(torch.device("cpu"), torch.float64)
            for name, vector in exact.items()
        }
        for name in self._constants:
            self.register_buffer(f"_{name}", None, persistent=False)
        self._make_buffers(torch.get_default_device())

    def _make_buffers(self, device: torch.device) -> None:
        for name, vector in self._constants.items():
            setattr(self, f"_{name}", None if vector is None else vector.to(device, torch.float32))

    def _constant(self, name: str, input: Tensor) -> Tensor | None:
        """Return the constant in float64 for an input of float64, else in float32, or None."""
        exact = self._constants[name]
        if exact is None or input.dtype == torch.float64:
            return None if exact is None else exact.to(input.device)
        found = getattr(self, f"_{name}")
        assert isinstance(found, Tensor)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossModule:
        before = torch.empty(0, device=self._device())
        super()._apply(fn, recurse)
        self._make_buffers(fn(before).device)
        return self

    def _shown(self, *first: str, **options: Any) -> str:
        """Return what a module's repr shows: `options` that are not None, and the reduction if it is not "mean"."""
        options["reduction"] = None if self.reduction == "mean" else self.reduction
        return ", ".join([*first, *(f"{name}={value}" for name, value in options.items() if value is not None)])

    def _device(self) -> torch.device:
        for buffer in self.buffers():
            return buffer.device
        return torch.get_default_device()
