"""A hook of mkdocs: what a page links outside of docs/, such as ../bench/README.md, the site carries a copy of.

So one link serves the repository's pages and the site. Copies are text, whatever they were.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<=\]\()(?:\.\./)[^)#\s]+")
COPIES = "repository"  # the site's folder of them


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to a copy of the file, which is added to the site."""
    root, folder = Path(config.docs_dir).parent, posixpath.dirname(page.file.src_uri)

    def copied(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("docs", folder, link[0]))  # from the repository's root
        if place.startswith("docs/") or not (root / place).is_file():
            return link[0]  # mkdocs checks it
        name = posixpath.join(COPIES, place + ("" if place.endswith(".txt") else ".txt"))
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(root / place)))
        return posixpath.relpath(name, folder or ".")

    return LINK.sub(copied, markdown)
