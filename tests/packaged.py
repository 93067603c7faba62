"""What the library itself registers: other tests may have registered more before."""

from flowdistill.plumbing.registry import Preset, Registry


def packaged(registry: Registry) -> list[str]:
    """The names of a registry whose entries are the library's own."""
    entries = {name: registry.get(name) for name in registry.names()}
    kinds = {name: entry.entry if isinstance(entry, Preset) else entry for name, entry in entries.items()}
    return [name for name, kind in kinds.items() if kind.__module__.startswith("flowdistill.")]
