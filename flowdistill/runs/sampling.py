"""Sampling the students of runs, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from flowdistill.interfaces import Condition, FlowMap, Jumps
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.progress import Phase, progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.runs.run import Run


def sample(
    run: Run | str | Path,
    num_samples: int = 64,
    *,
    steps: int = 1,
    labels: int | Sequence[int] | Tensor | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    renoise: bool | None = None,
) -> Tensor:
    """Samples of a run's student, ``(num_samples, *sample_shape)``, on the CPU.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`.
        num_samples: how many.
        steps: jumps from noise to data; an anchored student, as FreeFlow trains it, takes 1.
        labels: class of all samples or of each; None takes all classes in turn.
        guidance: guidance scale, for a student trained over a range of scales; None is the student's own.
        seed: of the noise.
        batch_size: samples at a time; None is all at once. It does not change the samples.
        renoise: jump to data at every step and noise the result to the next time; None is what the student needs: only
            consistency models and their like are sampled so.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: arguments that do not fit the student.
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    flow_map = Run.of(run).student
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance)
    noise, fresh = draw_noise(flow_map, num_samples, steps, seed, 0, renoise)
    with progress("drawing samples", num_samples) as phase:
        return torch.cat(draw(flow_map, noise, fresh, condition, steps, batch_size or num_samples, phase))


def make_condition(
    num_classes: int | None, n: int, labels: int | Sequence[int] | Tensor | None, guidance: float | None
) -> Condition:
    """The condition of ``n`` samples: given labels, or all classes in turn, and one guidance scale.

    Raises:
        ConfigError: labels of an unconditional model, of the wrong number, or out of range.
    """
    condition = Condition.in_turn(num_classes, n, guidance)
    if labels is None:
        return condition
    if num_classes is None:
        raise ConfigError("the model is unconditional and takes no labels")
    chosen = torch.as_tensor(labels)
    chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
    if chosen.shape != (n,) or bool(((chosen < 0) | (chosen >= num_classes)).any()):
        raise ConfigError(f"labels must be {n} integers (or one) in [0, {num_classes})")
    return attrs.evolve(condition, labels=chosen.long())


def draw_noise(
    flow_map: FlowMap, n: int, steps: int, seed: int, block: int, renoise: bool | None
) -> tuple[Tensor, Tensor | None]:
    """The noise (n, ...) of a block of samples and, for renoising, that of the times between (steps - 1, n, ...)."""
    dtype = next(flow_map.parameters()).dtype
    shape = (n, *flow_map.sample_shape)
    noise = torch.randn(shape, generator=step_generator(seed, block, "sample"), dtype=dtype)
    if not (flow_map.jumps is Jumps.TO_DATA if renoise is None else renoise):
        return noise, None
    times = (max(steps - 1, 0), *shape)
    return noise, torch.randn(times, generator=step_generator(seed, block, "renoise"), dtype=dtype)


@torch.no_grad()
def draw(
    flow_map: FlowMap, noise: Tensor, fresh: Tensor | None, condition: Condition, steps: int, size: int, phase: Phase
) -> list[Tensor]:
    """Samples of a flow map in batches of ``size``, where the map lies."""
    if condition.scale is not None and flow_map.guidance is None:
        raise ConfigError("this student was not trained with guidance scales: leave guidance out")
    device = next(flow_map.parameters()).device
    samples = []
    for part in (slice(i, i + size) for i in range(0, len(noise), size)):
        again = None if fresh is None else fresh[:, part].to(device)
        samples.append(flow_map.sample(noise[part].to(device), steps, condition[part].to(device), renoise=again))
        phase.advance(len(samples[-1]))
    return samples


def default_batch_size(device: torch.device) -> int:
    """Samples to evaluate at a time; fewer on a CPU, where batches that fit its caches are faster."""
    return 100 if device.type == "cpu" else 500


def check_counts(**counts: int | None) -> None:
    """ConfigError unless all counts that are given are at least 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
