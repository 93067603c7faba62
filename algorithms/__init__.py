"""The algorithms that ship with flowdistill; importing this package registers them all."""

import importlib
import pkgutil

if __name__ != "flowdistill.algorithms":  # a second copy would register everything twice
    raise ImportError(f"import flowdistill.algorithms, not {__name__}")

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
