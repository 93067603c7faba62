"""The papers behind algorithms and teachers, by their keys in ``references.bib``."""

from __future__ import annotations

import functools
import re
from pathlib import Path


@functools.cache
def _entries() -> dict[str, str]:
    text = (Path(__file__).parents[1] / "references.bib").read_text(encoding="utf-8")
    return {match[1]: match[0] for match in re.finditer(r"^@\w+\{(\w+),\n.*?^\}", text, re.MULTILINE | re.DOTALL)}


def bibtex(*keys: str) -> str:
    """The BibTeX of papers.

    Examples:
        >>> bibtex("tong2025freeflow").splitlines()[0]
        '@article{tong2025freeflow,'
    """
    return "\n\n".join(_entries()[key] for key in keys)
