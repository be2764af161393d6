"""Text with a large vocabulary that needs no download: Python's own standard library, in the tokens of tekken.

The tokenizer comes with the package mistral-common.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import mistral_common
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

SOURCE_CHARACTERS = 1_500_000


def read_tokens() -> tuple[Tensor, int, int]:
    """The standard library's modules as one row of token numbers, the vocabulary's size, and the number of files."""
    data_folder = Path(mistral_common.__file__).parent / "data"
    tokenizer = Tekkenizer.from_file(sorted(data_folder.glob("tekken_*.json"))[-1])
    tokens: list[int] = []
    characters = files = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        tokens += tokenizer.encode(text, bos=True, eos=False)
        characters += len(text)
        files += 1
        if characters > SOURCE_CHARACTERS:
            break
    return torch.tensor(tokens), tokenizer.n_words, files
