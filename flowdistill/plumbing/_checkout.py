"""Find ``algorithms/`` and ``teachers/`` beside the package in checkouts without symbolic links.

A wheel holds both folders inside ``flowdistill``, and a checkout holds links to them; there this
finder is never asked, because it comes after Python's own path finder.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent.parent.parent
_BESIDE = ("flowdistill.algorithms", "flowdistill.teachers")


class _BesideFinder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _BESIDE:
            return None
        init = _ROOT / name.rpartition(".")[2] / "__init__.py"
        return spec_from_file_location(name, init) if init.is_file() else None


sys.meta_path.append(_BesideFinder)
