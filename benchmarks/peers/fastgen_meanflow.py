"""MeanFlow with a teacher in NVlabs/FastGen, on our student, our teacher and our states.

flowdistill bench speed --only meanflow_distillation --peer benchmarks/peers/fastgen_meanflow.py CHECKOUT

Their loss takes the derivative of all rows of a batch, ours of those whose times differ.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from flowdistill.interfaces import Condition
from flowdistill.training import Loop

METHOD = "meanflow_distillation"  # the method beside which it is measured

# What its modules import beside the loss, which uses none of them.
_UNUSED = ("boto3", "einops", "ftfy", "imageio", "imageio.v3", "loguru", "omegaconf")


def _stand_in() -> None:
    """Let packages that are not installed be imported."""
    packages = {name.partition(".")[0] for name in _UNUSED}
    missing = {name for name in packages if name not in sys.modules and find_spec(name) is None}
    for name in _UNUSED:
        if name.partition(".")[0] in missing:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def step(loop: Loop, checkout: Path) -> Callable[[], None]:
    """A loss of theirs and its gradients, with the settings that they have by default."""
    sys.path.insert(0, str(checkout))
    _stand_in()
    from fastgen.methods.consistency_model.mean_flow import MeanFlowModel  # type: ignore[import-not-found]
    from fastgen.networks.noise_schedule import get_noise_schedule  # type: ignore[import-not-found]

    states = loop.draw(torch.Generator(loop.device).manual_seed(0))
    condition: Condition = states.condition
    teacher = loop.teacher
    assert teacher is not None

    # Their networks are called as (x, t, r=r, condition=condition).
    def student(x: Tensor, t: Tensor, *, r: Tensor, **_: Any) -> Tensor:
        return loop.student.average_velocity(x, t, r, condition)

    def velocity(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return teacher.velocity(x, t, condition)

    student.noise_scheduler = get_noise_schedule("rf")  # type: ignore[attr-defined]
    model = SimpleNamespace(
        net=student,
        teacher=velocity,
        device=loop.device,
        precision_amp_jvp=None,
        loss_config=SimpleNamespace(
            use_cd=True,
            use_jvp_finite_diff=False,
            norm_method="poly_1.0",
            norm_const=0.1,
            tangent_warmup_steps=0,
            tangent_spatial_invariance=False,
            loss_type="opt_grad",
        ),
        config=SimpleNamespace(guidance_scale=None),
    )
    for name in ("_get_velocity", "_jvp", "_compute_weight", "_mf_pred_to_loss"):
        setattr(model, name, functools.partial(getattr(MeanFlowModel, name), model))

    def call() -> None:
        with loop.autocast():
            loss, *_ = MeanFlowModel._compute_mf_loss(model, states.x, states.t, states.s, 0)
        loss.mean().backward()
        loop.student.zero_grad()

    return call
