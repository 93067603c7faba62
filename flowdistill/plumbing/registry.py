"""Names for the parts of a run: registries, their gin names, and plug-ins.

Registering a class gives it a name that works everywhere: ``OBJECTIVES.build("freeflow")`` in Python,
``@freeflow()`` in a gin file, ``flowdistill list`` on the command line. What ships with the library in
`flowdistill.algorithms` and `flowdistill.teachers` is registered when a registry is first asked, and so are the
modules that other distributions announce under the entry-point group ``flowdistill.plugins``. Metrics, feature
extractors, verifiers and search strategies are registered when theirs is asked: models need none of them.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import attrs
import gin

from flowdistill.plumbing.errors import ConfigError

_T = TypeVar("_T", bound=Callable[..., Any])

_PARTS = (
    "flowdistill.data",
    "flowdistill.decoders",
    "flowdistill.flow_maps",
    "flowdistill.guidance",
    "flowdistill.networks",
    "flowdistill.pairs",
    "flowdistill.runs.loading",
    "flowdistill.solvers",
    "flowdistill.states",
    "flowdistill.students",
    "flowdistill.times",
    "flowdistill.velocities",
    "flowdistill.algorithms",
    "flowdistill.teachers",
)
_TOOLS = ("flowdistill.evaluation", "flowdistill.searching", "flowdistill.training")
PLUGIN_GROUP = "flowdistill.plugins"


@functools.cache
def load_plugins() -> None:
    """Register the parts of models and objectives that ship with the library, then what installed plug-ins add; once.

    A plug-in that fails to import is reported by a warning and skipped.
    """
    for module in _PARTS:
        importlib.import_module(module)
    for plugin in entry_points(group=PLUGIN_GROUP):
        try:
            plugin.load()
        except Exception as error:
            warnings.warn(f"plug-in {plugin.value} skipped: {error!r}", RuntimeWarning, stacklevel=2)


def load_all() -> None:
    """Register everything: also the trainer, and what evaluations and searches are made of."""
    load_plugins()
    for module in _TOOLS:
        importlib.import_module(module)


def unknown_name(kind: str, name: str, known: list[str]) -> ConfigError:
    """The error for a name that is not known, which lists the nearest matches, or the first of those that are known."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    first, more = ", ".join(sorted(known)[:_MOST_NAMES]) or "none", len(known) - _MOST_NAMES
    others = f" and {more} more, which flowdistill list shows" if more > 0 else ""
    missing = ", and there is no such file" if Path(name).suffix else ""
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {first}{others}"
    return ConfigError(f"unknown {kind} {name!r}{missing}: {hint}")


_MOST_NAMES = 10  # in one message


def _plural(kind: str) -> str:
    name = kind.replace(" ", "_")
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


class Registry:
    """Classes (or functions that build objects) of one kind, by name.

    Examples:
        >>> shapes = Registry("shape")
        >>> @shapes.register("square")
        ... class Square:
        ...     def __init__(self, side=1.0):
        ...         self.side = side
        >>> shapes.build("square", side=2.0).side
        2.0

    Args:
        kind: what the entries are, in the singular.
        gin_suffix: ends their names in gin files, where other kinds of things have the same.
        home: the module that registers those of the library; "" for the parts of models and objectives.
    """

    def __init__(self, kind: str, gin_suffix: str = "", home: str = "") -> None:
        self.kind, self.gin_suffix, self._home = kind, gin_suffix, home
        self._entries: dict[str, Callable[..., Any]] = {}
        self._variants: dict[str, str] = {}

    def register(
        self,
        name: str,
        variants: Iterable[str] = (),
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Callable[[_T], _T]:
        """Decorator that registers a class under ``name``, for gin too; the class itself is unchanged.

        Args:
            name: an identifier.
            variants: further names for `build`, such as published sizes; each builds the class with itself as the
                argument ``variant``.
            presets: further entries by name, each the same class with other defaults; an `attrs.Factory` makes a
                default anew for each object.

        Raises:
            ConfigError: the name is taken; the message names both places.
        """

        def decorator(entry: _T) -> _T:
            self._add(name, entry)
            self._variants |= dict.fromkeys(variants, name)
            for preset, defaults in (presets or {}).items():
                self._add(preset, Preset(preset, entry, defaults))
            return entry

        return decorator

    def _add(self, name: str, entry: Callable[..., Any]) -> None:
        if name in self._entries:
            places = f"{_place(self._entries[name])} and {_place(entry)}"
            raise ConfigError(f"{self.kind} {name!r} is registered twice: {places}")
        gin.register(name + self.gin_suffix, module=_plural(self.kind))(_for_gin(entry))
        self._entries[name] = entry

    def _load(self) -> None:
        load_plugins()
        if self._home:
            importlib.import_module(self._home)

    def get(self, name: str) -> Callable[..., Any]:
        """The class registered under ``name``; ConfigError with the nearest matches if there is none."""
        self._load()
        name = self._variants.get(name, name)
        if name not in self._entries:
            raise unknown_name(self.kind, name, self.all_names())
        return self._entries[name]

    def build(self, name: str, **kwargs: Any) -> Any:
        """An instance of the class registered under ``name``."""
        entry = self.get(name)
        if name in self._variants:
            kwargs = {"variant": name, **kwargs}
        try:
            inspect.signature(entry).bind(**kwargs)
        except TypeError as error:
            raise ConfigError(f"{self.kind} {name!r}: {error}") from None
        return entry(**kwargs)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._entries)

    def all_names(self) -> list[str]:
        """All registered names and their variants."""
        return [*self.names(), *self._variants]

    def __contains__(self, name: str) -> bool:
        """Whether `build` knows a name."""
        self._load()
        return name in self._entries or name in self._variants

    def variants(self, name: str) -> list[str]:
        """The variants of the class registered under ``name``, as they were given."""
        self._load()
        return [variant for variant, owner in self._variants.items() if owner == name]

    def name_of(self, entry: object) -> str:
        """The name under which a class is registered; ConfigError if it is not."""
        self._load()
        for name, registered in self._entries.items():
            if registered is entry:
                return name
        raise ConfigError(f"{entry!r} is not a registered {self.kind}")


class Preset:
    """A registered class with other defaults, under a name of its own.

    Args:
        name: its name.
        entry: the class.
        defaults: values, or `attrs.Factory`, by the names of arguments.
    """

    def __init__(self, name: str, entry: Callable[..., Any], defaults: Mapping[str, Any]) -> None:
        self.entry, self.defaults = entry, dict(defaults)
        self.__name__ = self.__qualname__ = name
        self.__module__, self.__doc__ = entry.__module__, entry.__doc__
        known = inspect.signature(entry)
        if unknown := self.defaults.keys() - known.parameters.keys():
            raise ConfigError(
                f"preset {name!r} sets {', '.join(sorted(unknown))}, which {entry.__name__} does not have"
            )
        self.__signature__ = known.replace(
            parameters=[p.replace(default=self.defaults.get(p.name, p.default)) for p in known.parameters.values()]
        )

    def __call__(self, **arguments: Any) -> Any:
        """Build the class."""
        defaults = {k: v.factory() if isinstance(v, attrs.Factory) else v for k, v in self.defaults.items()}  # type: ignore[arg-type]
        return self.entry(**{**defaults, **arguments})


def _for_gin(entry: Callable[..., Any]) -> Callable[..., Any]:
    """The entry itself, or a preset as the function that gin asks for."""
    if not isinstance(entry, Preset):
        return entry

    @functools.wraps(entry)
    def build(**arguments: Any) -> Any:
        return entry(**arguments)

    del build.__wrapped__  # lest gin look for arguments there
    build.__signature__ = entry.__signature__  # type: ignore[attr-defined]
    build.entry = entry.entry  # type: ignore[attr-defined]
    return build


def _place(entry: Callable[..., Any]) -> str:
    if isinstance(entry, Preset):
        return f"preset of {_place(entry.entry)}"
    module = sys.modules.get(entry.__module__)
    file = getattr(module, "__file__", None) or entry.__module__
    try:
        return f"{entry.__qualname__} ({file}:{inspect.getsourcelines(entry)[1]})"
    except (OSError, TypeError):
        return f"{entry.__qualname__} ({file})"


TEACHERS = Registry("teacher")
FLOW_MAPS = Registry("flow map")
OBJECTIVES = Registry("objective")
VELOCITY_ESTIMATORS = Registry("velocity estimator")
TARGET_VELOCITIES = Registry("target velocity")
STATE_SOURCES = Registry("state source")
TIME_SAMPLERS = Registry("time sampler")
PAIRS = Registry("pair law")
NETWORKS = Registry("network")
DATASETS = Registry("dataset")
METRICS = Registry("metric", home="flowdistill.evaluation.metrics")
PROTOCOLS = Registry("protocol", gin_suffix="_protocol", home="flowdistill.evaluation.protocols")
SOLVERS = Registry("solver")
DECODERS = Registry("decoder")
VERIFIERS = Registry("verifier", home="flowdistill.searching.verifiers")
SEARCH_STRATEGIES = Registry("search strategy", home="flowdistill.searching.strategies")
CALLBACKS = Registry("callback", home="flowdistill.training.loggers")
FEATURES = Registry(  # digits and mnist are data sets as well
    "feature extractor", gin_suffix="_features", home="flowdistill.evaluation.features"
)

REGISTRIES = {
    _plural(registry.kind): registry
    for registry in (
        TEACHERS, FLOW_MAPS, OBJECTIVES, VELOCITY_ESTIMATORS, TARGET_VELOCITIES, STATE_SOURCES,
        TIME_SAMPLERS, PAIRS, NETWORKS, DATASETS, METRICS, PROTOCOLS, SOLVERS, DECODERS, FEATURES, VERIFIERS,
        SEARCH_STRATEGIES, CALLBACKS,
    )
}  # fmt: skip
"""All registries by the plural of their kind, as the command line names them."""

register_teacher = TEACHERS.register
register_flow_map = FLOW_MAPS.register
register_objective = OBJECTIVES.register
register_velocity_estimator = VELOCITY_ESTIMATORS.register
register_target_velocity = TARGET_VELOCITIES.register
register_state_source = STATE_SOURCES.register
register_time_sampler = TIME_SAMPLERS.register
register_pairs = PAIRS.register
register_network = NETWORKS.register
register_dataset = DATASETS.register
register_metric = METRICS.register
register_protocol = PROTOCOLS.register
register_solver = SOLVERS.register
register_decoder = DECODERS.register
register_features = FEATURES.register
register_verifier = VERIFIERS.register
register_search_strategy = SEARCH_STRATEGIES.register
register_callback = CALLBACKS.register
