"""Triton's interpreter, made to round as devices do. Importing this is enough."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_fp_trunc = interpreter.InterpreterBuilder.create_fp_trunc


def _to_nearest_even(self, source, to):
    """Where the interpreter cuts the bits of a float32 that bfloat16 has no room for."""
    if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _fp_trunc(self, source, to)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), to.scalar)


interpreter.InterpreterBuilder.create_fp_trunc = _to_nearest_even
