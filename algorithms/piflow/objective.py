"""The objective of pi-Flow."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, instance_of, lt

from flowdistill.algorithms.identities import Residual, pull
from flowdistill.algorithms.piflow.flow_map import PolicyFlowMap
from flowdistill.interfaces import (
    FlowMap,
    Jumps,
    Objective,
    ObjectiveOutput,
    OneStep,
    Pairs,
    States,
    Step,
    Teacher,
    TimeSampler,
)
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import Uniform


@register_objective("piflow")
@attrs.define(kw_only=True, slots=False)
class PiFlow(Objective):
    """The policy's velocity is the teacher's at states that the policy itself reaches.

    From x_src at t_src the policy is followed, without a graph, to a random time t of its segment, and

        1/2 |pi(x_t, t) - u(x_t, t)|^2

    is minimised through the parameters of pi alone, at fixed x_t. The student must be a `PolicyFlowMap`.
    """

    citation = bibtex("chen2025piflow")
    trains = Jumps.ONE_STEP
    flow_map = "policy"

    pairs: Pairs = attrs.field(factory=OneStep, validator=instance_of(Pairs))
    """The law of t_src; ``@to_data()`` with ``to_data.starts = @grid()`` are the edges of the segments."""
    sequence: bool = True
    """Begin with noise at t = 1 and train all segments in turn, each from where the policy of the one before has ended;
    no data are needed. False trains the segment below the time of each state."""
    states_per_segment: int = attrs.field(default=2, validator=ge(1))
    """How many times t are drawn for each evaluation of the student."""
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of t in its segment: 1 is the start and 0 the end."""
    dropout: float = attrs.field(default=0.05, validator=[ge(0.0), lt(1.0)])
    """The probability with which the followed policy, but not the trained one, misses each component of a Gaussian
    mixture."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; ConfigError for a student that follows no policy."""
        if not isinstance(student, PolicyFlowMap):
            raise ConfigError(f"piflow trains a policy, not {type(student).__name__}: set train.flow_map = @policy")
        super().setup(student, teacher)

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The mean over the segments, each with one evaluation of the student and a few of the teacher."""
        student, generator = self.student, step.generator
        assert isinstance(student, PolicyFlowMap)
        start = states.at_prior() if self.sequence else states
        x, t, condition = start.x, start.t, start.condition
        velocities, targets = [], []
        for remaining in reversed(range(student.segments if self.sequence else 1)):
            policy, end = student.policy(x, t, condition), student.segment_end(t)
            leader = policy.dropout(self.dropout, generator)
            for _ in range(self.states_per_segment):
                position = self.times.sample(len(t), generator).to(t.dtype)
                with torch.no_grad():
                    now = student.between(t, end, position)
                    reached = x - expand_time(t - now, x) * student.average(leader, x, t, now)
                    targets.append(self.teacher.velocity(reached, now, condition))
                velocities.append(policy.velocity(reached, now))
            if remaining:
                with torch.no_grad():
                    x, t = x - expand_time(t - end, x) * student.average(leader, x, t, end), end
        velocity, target = torch.cat(velocities), torch.cat(targets)
        half = velocity.new_full((len(velocity),), 0.5)
        return pull(Residual(velocity, velocity.detach() - target), scale=half)
