"""Sampling the students of runs, in batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from flowdistill.interfaces import Condition, FlowMap, Jumps
from flowdistill.plumbing.distributed import find_device
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.progress import Phase, progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.runs.blocks import BLOCK
from flowdistill.runs.run import Run, on_device


def sample(
    run: Run | FlowMap | str | Path,
    num_samples: int = 64,
    *,
    steps: int = 1,
    labels: int | Sequence[int] | Tensor | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    renoise: bool | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """Samples of a run's student, ``(num_samples, *sample_shape)``, on the CPU.

    They are the first of those that `flowdistill.evaluate` measures with the same seed.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`; or a student, as `load_flow_map` gives it.
        num_samples: how many.
        steps: jumps from noise to data; an anchored student, as FreeFlow trains it, takes 1.
        labels: class of all samples or of each; None takes all classes in turn.
        guidance: guidance scale, for a student trained over a range of scales; None is the student's own.
        seed: of the noise.
        batch_size: samples at a time; None is 100 on a CPU, else 500. It does not change the samples, up to rounding.
        renoise: jump to data at every step and noise the result to the next time; None is what the student needs: only
            consistency models and their like are sampled so.
        device: where they are computed; by default the first GPU, else the CPU.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: arguments that do not fit the student.
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    flow_map = on_device(Run.of(run).student, find_device(device))
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance)
    drawn = batches(flow_map, condition, num_samples, batch_size, steps=steps, seed=seed, renoise=renoise)
    return torch.cat([samples.cpu() for samples in drawn])


def batches(
    flow_map: FlowMap,
    condition: Condition,
    num_samples: int,
    batch_size: int | None,
    *,
    steps: int,
    seed: int,
    renoise: bool | None,
) -> Generator[Tensor, None, None]:
    """Samples as `sample` describes them, in batches, where the map lies."""
    size = batch_size or default_batch_size(next(flow_map.parameters()).device)
    with progress("drawing samples", num_samples) as phase:
        for block, start in enumerate(range(0, num_samples, BLOCK)):
            n = min(BLOCK, num_samples - start)
            rows = condition[start:][:n]
            yield from draw(flow_map, n, rows, block, size, phase, steps=steps, seed=seed, renoise=renoise)


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


@torch.no_grad()
def draw(
    flow_map: FlowMap,
    n: int,
    condition: Condition,
    block: int,
    size: int,
    phase: Phase,
    *,
    steps: int,
    seed: int,
    renoise: bool | None,
) -> list[Tensor]:
    """The first ``n`` samples of a block, in batches of ``size``, where the map lies.

    Their noise depends on the seed and the block's number alone.
    """
    if condition.scale is not None and flow_map.guidance is None:
        raise ConfigError("this student was not trained with guidance scales: leave guidance out")
    like = next(flow_map.parameters())
    shape, fresh = (BLOCK, *flow_map.sample_shape), None
    noise = torch.randn(shape, generator=step_generator(seed, block, "sample"), dtype=like.dtype)
    if flow_map.jumps is Jumps.TO_DATA if renoise is None else renoise:
        times = (max(steps - 1, 0), *shape)
        fresh = torch.randn(times, generator=step_generator(seed, block, "renoise"), dtype=like.dtype)
    samples = []
    for part in (slice(i, min(i + size, n)) for i in range(0, n, size)):
        again = None if fresh is None else fresh[:, part].to(like.device)
        samples.append(
            flow_map.sample(noise[part].to(like.device), steps, condition[part].to(like.device), renoise=again)
        )
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
