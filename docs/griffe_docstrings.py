"""An extension of griffe, which reads docstrings for the API's pages: examples and tables become code.

Google's style has a section Examples, shown as code; ours is Example, of which griffe would make text. A table drawn
with = is shown as it is drawn.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
RULE = r"=+(?: +=+)+"
TABLE = re.compile(rf"^{RULE}\n(?:.*\n)+?{RULE}\n(?:.*\n)+?{RULE}$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Name the section Examples and fence tables."""
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = TABLE.sub(r"```text\n\g<0>\n```", text)
