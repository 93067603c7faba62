"""The pictures of a run: samples of the student, and student and teacher side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flowdistill.evaluation.comparison import Sampler, device_of, in_words
from flowdistill.evaluation.plots import image_grid, scatter_side_by_side, side_by_side
from flowdistill.interfaces import Condition, FlowMap, Jumps, Teacher
from flowdistill.plumbing.distributed import gathered, rank_and_world_together
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import step_generator


def save_picture(samples: Tensor, path: Path, labels: Tensor | None = None) -> bool:
    """A picture of images (a grid, with their classes) or points in the plane (a scatter plot); False for all else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_picture(samples):
        image_grid(samples, path, captions=None if labels is None else [str(int(label)) for label in labels])
    elif samples.ndim == 2 and samples.shape[1] == 2:
        scatter_side_by_side({"samples": samples}, path)
    else:
        return False
    return True


@torch.no_grad()
def save_samples(student: FlowMap, path: Path, seed: int) -> None:
    """A picture of what the student makes of the same noises and labels every time, if it can be drawn.

    Several processes, which call this at once, draw a part each, and the first one writes the picture.
    """
    if not gathered(_drawable(student))[0]:  # the first one alone may have the decoder
        return
    n = 1000 if len(student.sample_shape) == 1 else 60
    device, (rank, world) = device_of(student), rank_and_world_together()
    noise = torch.randn((n, *student.sample_shape), generator=step_generator(seed, 0, "pictures"))
    part = -(-n // world)  # as many in each process, since they evaluate the student together
    rows = torch.arange(rank * part, (rank + 1) * part) % n
    condition = Condition.in_turn(student.num_classes, n)[rows].to(device)
    steps = 64 if student.jumps is Jumps.NONE else 1
    before = student.evaluations
    with progress("drawing a picture", part * steps, lambda: student.evaluations - before):
        samples = student.sample(noise[rows].to(device), steps, condition)
    samples = torch.cat(gathered(samples.cpu()))[:n].to(device)
    if rank == 0:
        save_picture(images_of(samples, student).cpu(), path)


def save_comparison(
    student: FlowMap | None,
    teacher: Teacher | None,
    path: Path,
    *,
    guidance: float | None = None,
    seed: int = 0,
    most: int = 64,
) -> bool:
    """A picture of what the teacher and then the student make of the same noises and labels.

    Args:
        student: None draws the teacher alone.
        teacher: None draws the student alone.
        path: of the picture.
        guidance: scale of both; None is their own.
        seed: of the noise.
        most: steps of the teacher, which is also drawn at one step.

    Returns:
        Whether there is a picture: samples are points in the plane, or images, or decode to images.
    """
    model = student if teacher is None else teacher
    assert model is not None
    if not _drawable(model):
        return False
    n, device = pictured(model), device_of(student, teacher)
    noise = torch.randn((n, *model.sample_shape), generator=step_generator(seed, 0, "pictures")).to(device)
    condition = Condition.in_turn(model.num_classes, n, guidance).to(device)
    samplers: dict[str, Sampler] = {}
    if teacher is not None:
        samplers = {f"teacher, {in_words(steps)}": Sampler(teacher, steps) for steps in dict.fromkeys((most, 1))}
    if student is not None:
        samplers["student, 1 step"] = Sampler(student, 1)
    panels: dict[str, Tensor] = {}
    for title, sampler in samplers.items():
        total, before = n * sampler.cost(guidance)[0], sampler.model.evaluations
        with progress(f"drawing a picture ({title})", total, partial(_since, sampler.model, before)):
            panels[title] = images_of(sampler(noise, condition), model).cpu()
    if model.sample_shape == (2,):
        scatter_side_by_side(panels, path)
    else:
        side_by_side(panels, path)
    return True


def pictured(model: FlowMap | Teacher) -> int:
    """How many samples a comparison draws: points are many, images few."""
    return 2000 if len(model.sample_shape) == 1 else 40


def _since(model: FlowMap | Teacher, before: int) -> int:
    return model.evaluations - before


@torch.no_grad()
def _drawable(model: FlowMap | Teacher) -> bool:
    """Whether samples are points in the plane, or are or decode to images of one or three channels."""
    blank = images_of(torch.zeros((1, *model.sample_shape), device=device_of(model)), model)
    return model.sample_shape == (2,) or _is_picture(blank)


def images_of(samples: Tensor, model: FlowMap | Teacher) -> Tensor:
    """The images of a model's samples, or the samples themselves where nothing decodes them."""
    if model.decoder is None or not model.decoder.ready:
        return samples
    with progress("decoding images", None):
        return model.decoder.decode(samples)


def _is_picture(samples: Tensor) -> bool:
    """Whether samples are images of one or three channels."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)
