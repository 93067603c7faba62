"""Distribution matching by the difference of two velocities, alone or with a discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from attrs.validators import ge, in_, instance_of, is_callable, optional
from torch import Tensor, nn

from flowdistill.algorithms.corrections import CorrectionObjective, one_step_samples
from flowdistill.algorithms.identities import pull
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Condition, FlowMap, ObjectiveOutput, States, Teacher
from flowdistill.networks import Linear, VelocityNetwork
from flowdistill.paths import expand_time, interpolate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import TimeSampler, Uniform

VSD_CITATION = """\
@inproceedings{wang2023prolificdreamer,
  title     = {{ProlificDreamer}: High-Fidelity and Diverse Text-to-{3D} Generation
               with Variational Score Distillation},
  author    = {Wang, Zhengyi and Lu, Cheng and Wang, Yikai and Bao, Fan and Li, Chongxuan and Su, Hang and Zhu, Jun},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  note      = {arXiv:2305.16213},
}

@inproceedings{yin2024dmd,
  title     = {One-step Diffusion with Distribution Matching Distillation},
  author    = {Yin, Tianwei and Gharbi, Micha{\\"e}l and Zhang, Richard and Shechtman, Eli and Durand, Fr{\\'e}do
               and Freeman, William T. and Park, Taesung},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024},
  note      = {arXiv:2311.18828},
}"""

DMD2_CITATION = """\
@inproceedings{yin2024dmd2,
  title     = {Improved Distribution Matching Distillation for Fast Image Synthesis},
  author    = {Yin, Tianwei and Gharbi, Micha{\\"e}l and Park, Taesung and Zhang, Richard and Shechtman, Eli
               and Durand, Fr{\\'e}do and Freeman, William T.},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2405.14867},
}"""


@register_objective("vsd")
@attrs.define(kw_only=True)
class VSD(CorrectionObjective):
    """The fake score minus the teacher's, by denoised samples, as in distribution matching distillation.

    DMD moves a one-step sample x against the difference of two denoised samples,

        (x_fake - x_teacher) / W,   x_fake = x_r - r v_N,   x_teacher = x_r - r u,   W = mean |x - x_teacher|,

    which is (u - v_N) / mean |u - (n - x)|: the time cancels. The fake score is that of the online network.

    Attributes:
        noising: the estimator of v_N, in DMD's words the fake score.
        times: law of r.
        guidance_interval: see `CorrectionObjective`.
        weighting: see `CorrectionObjective`.
    """

    citation = VSD_CITATION

    times: TimeSampler = attrs.field(factory=lambda: Uniform(low=0.02, high=0.98), validator=instance_of(TimeSampler))
    weighting: Literal["none", "dmd"] = attrs.field(default="dmd", validator=in_(("none", "dmd")))


class _Discriminator(nn.Module):
    """The logit of a noised sample: a linear layer on the output of a network."""

    def __init__(self, network: VelocityNetwork, guidance: float | None) -> None:
        super().__init__()
        self.features = NetworkFlowMap(network, "instantaneous", guidance)
        self.logit = Linear(math.prod(network.sample_shape), 1)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network."""
        return self.features.evaluations

    def forward(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """The logits (B,) of samples x at times r (B,)."""
        logits: Tensor = self.logit(self.features.velocity(x, r, condition).flatten(1))
        return logits[:, 0]


@register_objective("dmd2")
@attrs.define(kw_only=True)
class DMD2(VSD):
    """VSD with several updates of the fake score for each of the student and, if asked for, a discriminator D.

    The student adds w softplus(-D(x_r, r)) to its loss; the discriminator, which sees data, minimises

        softplus(D(x_r, r)) + softplus(-D(y_r, r))

    with x the student's samples and y the data, both noised to times of the law ``times``.

    Attributes:
        noising: see `VSD`.
        times: see `VSD`.
        guidance_interval: see `VSD`.
        weighting: see `VSD`.
        auxiliary_updates: updates of fake score and discriminator for each of the student.
        discriminator: builds the network under the discriminator's linear layer; None is no discriminator, and no
            need of data.
        discriminator_weight: w.
    """

    citation = DMD2_CITATION

    auxiliary_updates: int = attrs.field(default=5, validator=ge(1))
    discriminator: Callable[[], VelocityNetwork] | None = attrs.field(default=None, validator=optional(is_callable()))
    discriminator_weight: float = attrs.field(default=3e-3, validator=ge(0.0))
    _judge: _Discriminator | None = attrs.field(default=None, init=False, repr=False, eq=False)

    @property
    def needs_data(self) -> bool:
        """Whether there is a discriminator."""
        return self.discriminator is not None

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Set the fake score up and build the discriminator; ConfigError for a network of another shape."""
        super().setup(student, teacher)
        if self.discriminator is None:
            return
        network = self.discriminator()
        if network.sample_shape != student.sample_shape:
            raise ConfigError(
                f"the discriminator's samples have shape {network.sample_shape}, the student's {student.sample_shape}"
            )
        self._judge = _Discriminator(network, getattr(student, "guidance", None))

    def modules(self) -> Mapping[str, nn.Module]:
        """The fake score as ``online``, and ``discriminator`` where there is one."""
        return {**super().modules(), **({} if self._judge is None else {"discriminator": self._judge})}

    def _noised(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        r = self.times.sample(len(x), generator).to(x.dtype)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return interpolate(x, noise, r), r

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """That of VSD, and the adversarial loss through a discriminator whose parameters are held."""
        start = states.at_prior()
        average, residual = self.residual(student, teacher, start, generator=generator)
        output = pull(average, residual)
        if self._judge is None:
            return output
        samples = start.x - expand_time(start.t, start.x) * average
        held = {name: p.detach() for name, p in self._judge.named_parameters()}
        arguments = (*self._noised(samples, generator), start.condition)
        adversarial = F.softplus(-torch.func.functional_call(self._judge, held, arguments)).mean()
        return ObjectiveOutput(
            output.loss + self.discriminator_weight * adversarial,
            {**output.metrics, "adversarial": adversarial.detach()},
            output.residual_norm,
        )

    def auxiliary_loss(
        self,
        name: str,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput | None:
        """That of VSD for the fake score, that of telling samples from data for the discriminator."""
        if name != "discriminator":
            return super().auxiliary_loss(name, student, teacher, states, step=step, generator=generator)
        assert self._judge is not None
        assert states.clean is not None
        samples = one_step_samples(student, states.at_prior())
        fake = self._judge(*self._noised(samples, generator), states.condition)
        real = self._judge(*self._noised(states.clean, generator), states.condition)
        return ObjectiveOutput((F.softplus(fake) + F.softplus(-real)).mean())
