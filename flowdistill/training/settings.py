"""The settings of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any, Literal, TypeAlias

import attrs
import gin
import torch
from attrs.validators import in_
from torch import nn

from flowdistill.ema import Averaging, Ema
from flowdistill.evaluation.comparison import Evaluation
from flowdistill.interfaces import FlowMap, Objective, StateSource, Teacher
from flowdistill.networks.compilation import check_backend
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import rank_and_world
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.fields import at_least, of_type, short
from flowdistill.states import Prior
from flowdistill.training.callbacks import Callback
from flowdistill.training.loggers import TensorBoard
from flowdistill.training.optimization import Schedule
from flowdistill.training.parallel import Parallel

OptimizerBuilder: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _clip(instance: Any, field: attrs.Attribute[Any], value: float | None) -> None:
    of_type(int, float, NoneType)(instance, field, value)
    if value is not None and not value > 0:
        raise ValueError(f"gradient_clip must be positive, or None for no limit, not {value}")


def _builder(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not callable(value):
        raise ValueError(f"{field.name} must build an optimiser, as @AdamW does, not {short(value)}")


def _callbacks(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(callback, Callback) for callback in value):
        raise ValueError(f"callbacks must be a list of callbacks, such as [@tensorboard()], not {short(value)}")


@gin.register("train")
@attrs.frozen(kw_only=True, eq=False)
class Training:
    """The settings of a training: the configurable ``train`` of gin files.

    Examples:
        >>> from flowdistill import OBJECTIVES, load_teacher
        >>> from flowdistill.flow_maps import NetworkFlowMap
        >>> from flowdistill.networks import MLP
        >>> from flowdistill.training import Loop
        >>> training = Training(
        ...     objective=OBJECTIVES.build("freeflow_prediction"),
        ...     flow_map=NetworkFlowMap(MLP(dim=2), "anchored"),
        ...     teacher=load_teacher("ring"),
        ...     steps=2,
        ...     batch_size=8,
        ... )
        >>> loop = Loop.build(training)
        >>> loop.train_step()
        >>> loop.step
        1
    """

    objective: Objective = attrs.field(default=gin.REQUIRED, validator=of_type(Objective))
    """What the student minimises."""
    flow_map: FlowMap | Callable[[Teacher | None], FlowMap] = attrs.field(default=gin.REQUIRED)
    """The student, or what builds it from the teacher (``@from_teacher``, without parentheses)."""
    teacher: Teacher | None = attrs.field(default=None, validator=of_type(Teacher, NoneType))
    """The teacher; None if the objective needs none."""
    states: StateSource | None = attrs.field(default=None, validator=of_type(StateSource, NoneType))
    """The state source; None is the macro ``data`` of the configuration for an objective that needs data, else the
    prior."""
    start: str | None = attrs.field(default=None, validator=of_type(str, NoneType))
    """A run, or a checkpoint in it, whose networks the first step begins with: the student, its average, and those of
    the objective that have the same name and architecture. The optimisers and the count of steps start afresh."""
    steps: int = attrs.field(default=gin.REQUIRED, validator=at_least(1))
    """Training steps in all."""
    batch_size: int = attrs.field(default=gin.REQUIRED, validator=at_least(1))
    """States of one backward pass."""
    accumulation: int = attrs.field(default=1, validator=at_least(1))
    """Backward passes of one step, which processes share out."""
    optimizer: OptimizerBuilder = attrs.field(default=torch.optim.AdamW, validator=_builder)
    """Builds the student's optimiser from its parameters: any torch optimiser, such as ``@AdamW``."""
    auxiliary_optimizer: OptimizerBuilder | None = attrs.field(default=None, validator=_builder)
    """The same for auxiliary networks; None is ``optimizer``."""
    schedule: Schedule = attrs.field(factory=Schedule, validator=of_type(Schedule))
    """The schedule of the learning rates."""
    gradient_clip: float | None = attrs.field(default=1.0, validator=_clip)
    """The largest norm of a gradient; None is no limit."""
    precision: Literal["float32", "bf16"] = attrs.field(default="float32", validator=in_(("float32", "bf16")))
    """"bf16" evaluates losses under autocast, with weights and times in float32; what stays in float32 is multiplied in
    TF32 on a GPU."""
    compile: str | None = attrs.field(default=None, validator=of_type(str, NoneType))
    """Compile the networks by this backend of ``torch.compile``, such as "inductor"; None compiles nothing."""
    parallel: Parallel = attrs.field(factory=lambda: gin.get_configurable(Parallel)(), validator=of_type(Parallel))
    """How several processes share the networks."""
    ema: Averaging | None = attrs.field(factory=Ema, validator=of_type(Averaging, NoneType))
    """The average of the student's weights that the run results in; None keeps none."""
    seed: int = attrs.field(default=0, validator=of_type(int))
    """The seed of all random numbers."""
    log_every: int = attrs.field(default=10, validator=at_least(1))
    """Steps between records."""
    sample_every: int = attrs.field(default=1000, validator=at_least(0))
    """Steps between pictures of samples; 0 is none."""
    checkpoint_every: int = attrs.field(default=1000, validator=at_least(1))
    """Steps between checkpoints."""
    keep_checkpoints: int = attrs.field(default=2, validator=at_least(1))
    """The newest checkpoints that are kept."""
    callbacks: Sequence[Callback] = attrs.field(factory=lambda: (TensorBoard(),), validator=_callbacks)
    """Whatever is told of the training as it goes, such as loggers."""
    evaluation: Evaluation | None = attrs.field(default=None, validator=of_type(Evaluation, NoneType))
    """What is measured at the end; None measures nothing, whatever is bound to ``evaluation``."""

    def check(self) -> None:
        """Check what no single field shows; ConfigError if the parts do not fit each other."""
        objective = self.objective
        self.check_shares(rank_and_world()[1])
        if self.parallel.precision == "bf16" and self.precision != "bf16":
            raise ConfigError("parallel.precision = 'bf16' is for trainings in bfloat16: set train.precision = 'bf16'")
        if self.compile is not None:
            check_backend(self.compile)
        if self.evaluation is not None:
            self.evaluation.check(self.teacher)
        if objective.needs_teacher and self.teacher is None:
            raise ConfigError(f"{type(objective).__name__} needs a teacher: set train.teacher")

    def check_shares(self, processes: int) -> None:
        """ConfigError unless so many processes can share out a step and the networks."""
        if self.accumulation % processes:
            raise ConfigError(
                f"train.accumulation = {self.accumulation} backward passes cannot be shared out evenly over "
                f"{processes} processes: set it to a multiple of {processes}"
            )
        self.parallel.copies(processes)

    def source(self) -> StateSource:
        """The states that are named, or those of the setting's data, or the prior."""
        objective, states = self.objective, self.states
        if states is None:
            states = config.macro("data") if objective.needs_data else Prior()
        name = type(objective).__name__
        if objective.needs_data and (states is None or not states.needs_data):
            raise ConfigError(f"{name} needs data: set train.states = @noised_data() and its dataset")
        if objective.needs_all_times and not states.knows_all_times:
            raise ConfigError(
                f"{name} needs states at all times, and this source has t = 1 alone: set train.states = @noised_data() "
                "or @teacher_trajectories()"
            )
        return states
