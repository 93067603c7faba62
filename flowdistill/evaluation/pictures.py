"""The pictures of a run: samples of the student, and student and teacher side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flowdistill.evaluation.comparison import device_of, euler, in_words
from flowdistill.evaluation.plots import image_grid, scatter_side_by_side, side_by_side
from flowdistill.interfaces import Condition, FlowMap, Teacher
from flowdistill.plumbing.randomness import step_generator


def save_picture(samples: Tensor, path: Path) -> bool:
    """A picture of images (a grid) or of points in the plane (a scatter plot); False for anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_picture(samples):
        image_grid(samples, path)
    elif samples.ndim == 2 and samples.shape[1] == 2:
        scatter_side_by_side({"samples": samples}, path)
    else:
        return False
    return True


@torch.no_grad()
def save_samples(student: FlowMap, path: Path, seed: int) -> None:
    """A picture of what the student makes of the same noises and labels every time."""
    n = 1000 if len(student.sample_shape) == 1 else 60
    device = device_of(student)
    noise = torch.randn((n, *student.sample_shape), generator=step_generator(seed, 0, "pictures")).to(device)
    steps = 64 if getattr(student, "instantaneous", False) else 1
    samples = student.sample(noise, steps, Condition.in_turn(student.num_classes, n).to(device))
    save_picture(images_of(samples, student).cpu(), path)


def save_comparison(
    student: FlowMap | None, teacher: Teacher | None, guidance: float | None, seed: int, path: Path
) -> bool:
    """A picture of what teacher and student make of the same noises and labels; False where neither can be drawn."""
    model = student if teacher is None else teacher
    assert model is not None
    points = len(model.sample_shape) == 1
    n = 2000 if points else 40
    noise = torch.randn((n, *model.sample_shape), generator=step_generator(seed, 0, "pictures"))
    device = device_of(student, teacher)
    noise, condition = noise.to(device), Condition.in_turn(model.num_classes, n, guidance).to(device)
    panels: dict[str, Tensor] = {}
    if teacher is not None:
        panels = {f"teacher, {in_words(k)}": euler(teacher, k)(noise, condition) for k in (64, 1)}
    if student is not None:
        panels["student, 1 step"] = student.sample(noise, 1, condition)
    panels = {title: images_of(samples, model).cpu() for title, samples in panels.items()}
    if points and model.sample_shape == (2,):
        scatter_side_by_side(panels, path)
    elif all(_is_picture(samples) for samples in panels.values()):
        side_by_side(panels, path)
    else:
        return False
    return True


def images_of(samples: Tensor, model: FlowMap | Teacher) -> Tensor:
    """The images of a model's samples, or the samples themselves where nothing decodes them."""
    return samples if model.decoder is None or not model.decoder.ready else model.decoder.decode(samples)


def _is_picture(samples: Tensor) -> bool:
    """Whether samples are images of one or three channels."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)
