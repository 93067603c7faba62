"""Distil flow and diffusion models into one-step generators, without data."""

import importlib
import pkgutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import flowdistill.plumbing._checkout  # noqa: F401, before anything looks for algorithms or teachers
from flowdistill import testing
from flowdistill.interfaces import (
    NULL_LABEL,
    Condition,
    Decoder,
    ExactTeacher,
    FlowMap,
    GeneratingVelocity,
    Guidance,
    Jump,
    Jumps,
    NoisingVelocity,
    Objective,
    ObjectiveOutput,
    Pairs,
    Part,
    States,
    StateSource,
    Step,
    TargetVelocity,
    Teacher,
    TimeSampler,
    VelocityEstimator,
    Verifier,
)
from flowdistill.plumbing.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigError,
    DataError,
    DistributedError,
    FlowDistillError,
    NonFiniteError,
    TrainingInterrupted,
)
from flowdistill.plumbing.registry import (
    CALLBACKS,
    DATASETS,
    DECODERS,
    FEATURES,
    FLOW_MAPS,
    METRICS,
    NETWORKS,
    OBJECTIVES,
    PAIRS,
    PROTOCOLS,
    SEARCH_STRATEGIES,
    SOLVERS,
    STATE_SOURCES,
    TARGET_VELOCITIES,
    TEACHERS,
    TIME_SAMPLERS,
    VELOCITY_ESTIMATORS,
    VERIFIERS,
    register_callback,
    register_dataset,
    register_decoder,
    register_features,
    register_flow_map,
    register_metric,
    register_network,
    register_objective,
    register_pairs,
    register_protocol,
    register_search_strategy,
    register_solver,
    register_state_source,
    register_target_velocity,
    register_teacher,
    register_time_sampler,
    register_velocity_estimator,
    register_verifier,
)
from flowdistill.runs.loading import convert, load_flow_map, load_teacher
from flowdistill.runs.run import Run
from flowdistill.runs.sampling import sample

if TYPE_CHECKING:
    from flowdistill.data import Dataset
    from flowdistill.ema import Averaging
    from flowdistill.evaluation.features import FeatureExtractor
    from flowdistill.networks import VelocityNetwork
    from flowdistill.runs.evaluating import evaluate
    from flowdistill.runs.exporting import export
    from flowdistill.runs.writing import write_samples
    from flowdistill.searching import SearchResult, SearchStrategy, search
    from flowdistill.solvers import Solver
    from flowdistill.training import Training
    from flowdistill.training.callbacks import Callback, Logger
    from flowdistill.training.planning import Plan, plan
    from flowdistill.training.trainer import TrainResult, train

__version__ = "0.1.0"

# These are imported when they are first asked for: loading a model needs none of them.
_HOMES = {
    "Averaging": "flowdistill.ema",
    "Callback": "flowdistill.training.callbacks",
    "Dataset": "flowdistill.data",
    "FeatureExtractor": "flowdistill.evaluation.features",
    "Logger": "flowdistill.training.callbacks",
    "Plan": "flowdistill.training.planning",
    "SearchResult": "flowdistill.searching",
    "SearchStrategy": "flowdistill.searching",
    "Solver": "flowdistill.solvers",
    "TrainResult": "flowdistill.training.trainer",
    "Training": "flowdistill.training",
    "VelocityNetwork": "flowdistill.networks",
    "evaluate": "flowdistill.runs.evaluating",
    "export": "flowdistill.runs.exporting",
    "plan": "flowdistill.training.planning",
    "search": "flowdistill.searching",
    "train": "flowdistill.training.trainer",
    "write_samples": "flowdistill.runs.writing",
}

__all__ = [
    "Averaging",
    "CALLBACKS",
    "Callback",
    "CheckpointError",
    "CheckpointWriteError",
    "Condition",
    "ConfigError",
    "DATASETS",
    "DECODERS",
    "DataError",
    "Dataset",
    "Decoder",
    "DistributedError",
    "ExactTeacher",
    "FEATURES",
    "FLOW_MAPS",
    "FeatureExtractor",
    "FlowDistillError",
    "FlowMap",
    "GeneratingVelocity",
    "Guidance",
    "Jump",
    "Jumps",
    "Logger",
    "METRICS",
    "NETWORKS",
    "NULL_LABEL",
    "NoisingVelocity",
    "NonFiniteError",
    "OBJECTIVES",
    "Objective",
    "ObjectiveOutput",
    "PAIRS",
    "Pairs",
    "Part",
    "Plan",
    "Run",
    "SEARCH_STRATEGIES",
    "PROTOCOLS",
    "SOLVERS",
    "STATE_SOURCES",
    "SearchResult",
    "SearchStrategy",
    "Solver",
    "StateSource",
    "States",
    "Step",
    "TARGET_VELOCITIES",
    "TEACHERS",
    "TIME_SAMPLERS",
    "TargetVelocity",
    "Teacher",
    "TimeSampler",
    "TrainResult",
    "Training",
    "TrainingInterrupted",
    "VELOCITY_ESTIMATORS",
    "VERIFIERS",
    "VelocityEstimator",
    "VelocityNetwork",
    "Verifier",
    "convert",
    "evaluate",
    "export",
    "load_flow_map",
    "load_teacher",
    "plan",
    "register_callback",
    "register_dataset",
    "register_decoder",
    "register_features",
    "register_flow_map",
    "register_metric",
    "register_network",
    "register_objective",
    "register_pairs",
    "register_search_strategy",
    "register_protocol",
    "register_solver",
    "register_state_source",
    "register_target_velocity",
    "register_teacher",
    "register_time_sampler",
    "register_velocity_estimator",
    "register_verifier",
    "sample",
    "search",
    "testing",
    "train",
    "write_samples",
]

if not TYPE_CHECKING:  # a type checker knows the names from above, and objects to others

    def __getattr__(name: str) -> object:
        """A name or a module of the package that is imported when it is first asked for."""
        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})
