"""The student of pi-Flow: a flow map that follows a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowdistill.algorithms.piflow.policies import GMFlowHead, Policy, PolicyHead, head_of
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.interfaces import Condition, FlowMap, Jumps, Teacher
from flowdistill.paths import expand_time, shifted
from flowdistill.plumbing.dry import placed
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_flow_map

HeadBuilder: TypeAlias = Callable[[tuple[int, ...], int | None], PolicyHead]


@register_flow_map("policy_map")
class PolicyFlowMap(FlowMap):
    """A flow map X(x, t, s) that follows a policy from t to s, after one evaluation of a network at (x, t).

    The policy is integrated by Euler's method with ``substeps`` equal steps of the time before its shift. F is the mean
    of the policy's velocities along the way, weighted by the lengths of the steps: nothing is divided by t - s, and
    F(x, t, t) is the policy's velocity. ``evaluations`` counts the network, not the substeps.

    Args:
        velocity: a velocity field of one network, which is copied and gets a wider output.
        head: builds, from the shape of a sample and the number of classes, what makes the output a policy; or its name
            and arguments, as `PolicyHead.built_by` gives them.
        substeps: of a jump, however long.
        segments: jumps from noise to data for which the student is trained; times k/``segments``, before their shift,
            are where one policy ends and the next begins. One segment makes an anchored map.
        shift: of the times, see `shifted`.

    Raises:
        ConfigError: a flow map that is not a plain velocity field, or a network whose output cannot be widened.
    """

    def __init__(
        self,
        velocity: NetworkFlowMap,
        head: HeadBuilder | Mapping[str, Any] = GMFlowHead,
        substeps: int = 128,
        segments: int = 1,
        shift: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(head, Mapping):
            head = head_of(head)
        if velocity.jumps is not Jumps.NONE:
            raise ConfigError("a policy is made of a velocity field: set conditioning = 'instantaneous'")
        if substeps < 1 or segments < 1 or shift <= 0:
            raise ConfigError("substeps and segments must be at least 1, and shift positive")
        self.sample_shape, self.num_classes = velocity.sample_shape, velocity.num_classes
        self.decoder, self.guidance = velocity.decoder, velocity.guidance
        self.wide = copy.deepcopy(velocity)
        self.head = head(self.sample_shape, self.num_classes)
        self.wide.network.widen_output(self.head.velocities, self.head.extra)
        self.substeps, self.segments, self.shift = substeps, segments, shift
        self.jumps = Jumps.FROM_NOISE if segments == 1 else Jumps.ANY
        self.train(velocity.training)

    def built_by(self) -> tuple[str, dict[str, Any]]:
        """Its own arguments."""
        parts = {"velocity": self.wide, "head": self.head.built_by()}
        return "policy_map", {**parts, "substeps": self.substeps, "segments": self.segments, "shift": self.shift}

    @property
    def evaluations(self) -> int:
        """Evaluations of the network so far, counted per sample."""
        return self.wide.evaluations

    def policy(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Policy:
        """The policy of the segment that starts at x and t, by one evaluation of the network."""
        outputs = self.wide.average_velocity(x, t, t, condition).to(x.dtype)
        numbers = self.head(outputs, t, condition)
        return self.head.policy(x, t, self.segment_end(t), numbers, self.shift)

    def segment_end(self, t: Tensor) -> Tensor:
        """The end (B,) of the segment that starts at t: the next lower of the segments' edges."""
        edge = (shifted(t, 1 / self.shift) * self.segments - 1e-3).ceil() - 1
        return shifted(edge.clamp_min(0) / self.segments, self.shift)

    def between(self, t: Tensor, end: Tensor, position: Tensor) -> Tensor:
        """Times from ``end`` (position 0) to ``t`` (position 1), in proportion before their shift."""
        first, last = shifted(end, 1 / self.shift), shifted(t, 1 / self.shift)
        return shifted(first + position * (last - first), self.shift)

    def average(self, policy: Policy, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The average velocity of the policy's path from x at t to s."""
        first, last = shifted(t, 1 / self.shift), shifted(s, 1 / self.shift)
        times = [first + (last - first) * (i / self.substeps) for i in range(self.substeps + 1)]
        slopes = [1 + (self.shift - 1) * time for time in times]
        average = torch.zeros_like(x)
        for time, slope, following in zip(times[:-1], slopes[:-1], slopes[1:], strict=True):
            velocity = policy.velocity(x - expand_time(t - s, x) * average, shifted(time, self.shift))
            length = slopes[0] * slopes[-1] / (slope * following * self.substeps)  # of the step over t - s
            average = average + expand_time(length, x) * velocity
        return average

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, t, s) along the policy of (x, t)."""
        return self.average(self.policy(x, t, condition), x, t, s)

    def grid(self, steps: int) -> Tensor:
        """Jumps that are equal before the shift of the times."""
        return shifted(super().grid(steps), self.shift)


@register_flow_map("policy")
def policy(
    teacher: Teacher | None,
    velocity: NetworkFlowMap | Callable[[Teacher], NetworkFlowMap] | None = None,
    head: HeadBuilder = GMFlowHead,
    substeps: int = 128,
    segments: int = 1,
    shift: float = 1.0,
) -> PolicyFlowMap:
    """A `PolicyFlowMap`, from a fresh network or from the teacher's.

    In a gin file it is named without parentheses, ``train.flow_map = @policy``; the trainer calls it with the teacher.
    The head is named without parentheses too.

    Args:
        teacher: the teacher.
        velocity: a velocity field, of ``conditioning = 'instantaneous'``, or what builds it from the teacher; None is
            a copy of the teacher, with which all components or times of the policy start as the teacher's velocity.
        head: ``@gmflow`` or ``@dx``.
        substeps: see `PolicyFlowMap`.
        segments: see `PolicyFlowMap`.
        shift: see `PolicyFlowMap`.
    """
    if isinstance(velocity, NetworkFlowMap):
        field = velocity
    elif teacher is None:
        raise ConfigError("a policy without a teacher needs a velocity field: set policy.velocity = @network()")
    else:
        field = from_teacher(teacher, "instantaneous") if velocity is None else velocity(teacher)
    student = PolicyFlowMap(field, head, substeps, segments, shift)
    return student if teacher is None else placed(student, teacher.device)
