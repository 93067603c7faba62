"""Sampling the students of runs, in batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from flowdistill.interfaces import Condition, FlowMap, Jumps
from flowdistill.paths import shifted
from flowdistill.plumbing.distributed import find_device
from flowdistill.plumbing.errors import ConfigError, in_one_line
from flowdistill.plumbing.progress import Phase, progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.runs.blocks import BLOCK
from flowdistill.runs.run import Run, on_device

Labels = int | str | Sequence[int] | Tensor | None
"""The classes of samples: one of all, one of each, or how they are chosen."""
LABELS = ("in_turn", "balanced", "random")
"""How classes can be chosen."""
Steps = int | Sequence[float]
"""The jumps from noise to data: their number, or the decreasing times between which they go."""


def sample(
    run: Run | FlowMap | str | Path,
    num_samples: int = 64,
    *,
    steps: Steps = 1,
    labels: Labels = None,
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
        steps: jumps from noise to data, or the times between which they go, such as (1.0, 0.55, 0.0); an anchored
            student, as FreeFlow trains it, takes 1.
        labels: class of all samples or of each; ``"in_turn"`` (as None) is all classes one after another,
            ``"balanced"`` each of them equally often in random order, ``"random"`` a class at random for each sample.
        guidance: guidance scale, for a student trained over a range of scales; None is the student's own.
        seed: of the noise, and of random labels.
        batch_size: samples at a time; None is 100 on a CPU, else 500. It does not change the samples, up to rounding.
        renoise: jump to data at every step and noise the result to the next time; None is what the student needs: only
            consistency models and their like are sampled so.
        device: where they are computed; by default the first GPU, else the CPU.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: arguments that do not fit the student.

    Warns:
        RuntimeWarning: the student was not trained with this guidance scale.
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    run = Run.of(run)
    check_guidance(run, guidance)
    flow_map = on_device(run.student, find_device(device))
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance, seed)
    drawn = batches(flow_map, condition, num_samples, batch_size, steps=steps, seed=seed, renoise=renoise)
    return torch.cat([samples.cpu() for samples in drawn])


def batches(
    flow_map: FlowMap,
    condition: Condition,
    num_samples: int,
    batch_size: int | None,
    *,
    steps: Steps,
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


def make_condition(num_classes: int | None, n: int, labels: Labels, guidance: float | None, seed: int = 0) -> Condition:
    """The condition of ``n`` samples: labels as `sample` takes them, and one guidance scale.

    Labels of the first samples are the same however many there are.

    Raises:
        ConfigError: labels of an unconditional model, of the wrong number, out of range, or chosen in an unknown way.
    """
    condition = Condition.in_turn(num_classes, n, guidance)
    if labels is None:
        return condition
    if num_classes is None:
        raise ConfigError("the model is unconditional and takes no labels")
    if isinstance(labels, str):
        return attrs.evolve(condition, labels=_chosen(labels, num_classes, n, seed))
    try:
        chosen = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of any other object, or of huge numbers
        raise ConfigError(f"labels must be {n} integers (or one) in [0, {num_classes})") from None
    chosen = chosen.expand(n) if chosen.ndim == 0 else chosen
    if chosen.shape != (n,) or bool(((chosen < 0) | (chosen >= num_classes)).any()):
        raise ConfigError(f"labels must be {n} integers (or one) in [0, {num_classes})")
    return attrs.evolve(condition, labels=chosen.long())


def _chosen(how: str, num_classes: int, n: int, seed: int) -> Tensor:
    """The labels (n,) that are chosen in a named way."""
    generator = step_generator(seed, 0, "labels")
    if how == "in_turn":
        return torch.arange(n) % num_classes
    if how == "balanced":
        rounds = [torch.randperm(num_classes, generator=generator) for _ in range(math.ceil(n / num_classes))]
        return torch.cat(rounds)[:n]
    if how == "random":
        return torch.randint(num_classes, (n,), generator=generator)
    raise ConfigError(f"labels are classes, or one of {', '.join(LABELS)}, not {how!r}")


def read_labels(path: Path) -> list[int]:
    """The classes in a text file, with blanks or lines between them, or in a ``.npy`` file.

    Raises:
        ConfigError: there is no such file, or it holds anything else.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"an array {array.shape} of {array.dtype}")
            labels = [int(label) for label in array]
        else:
            labels = [int(label) for label in path.read_text(encoding="utf-8").split()]
        if not labels:
            raise ValueError("it is empty")
        return labels
    except FileNotFoundError:
        raise ConfigError(f"labels are classes, {', '.join(LABELS)}, or a file: there is no file {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} holds no list of classes: {in_one_line(error)}") from None


def labels_as_json(labels: Labels) -> Any:
    """Labels as `sample` takes them, as JSON can say them."""
    return labels if labels is None or isinstance(labels, str) else torch.as_tensor(labels).tolist()


def check_guidance(run: Run, guidance: float | None) -> None:
    """ConfigError for a scale that the student does not take; a warning for one that its training did not draw."""
    if guidance is None:
        return
    if not math.isfinite(guidance):
        raise ConfigError(f"a guidance scale is a finite number, not {guidance}")
    if run.student.guidance is None:
        raise ConfigError("this student was not trained with guidance scales: leave guidance out")
    low, high = run.scales or (-math.inf, math.inf)
    if not low <= guidance <= high:
        warnings.warn(
            f"the student was trained with guidance scales from {low:g} to {high:g}, not with {guidance:g}",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.no_grad()
def draw(
    flow_map: FlowMap,
    n: int,
    condition: Condition,
    block: int,
    size: int,
    phase: Phase,
    *,
    steps: Steps,
    seed: int,
    renoise: bool | None,
    shift: float | None = None,
) -> Generator[Tensor, None, None]:
    """The first ``n`` samples of a block, in batches of ``size``, where the map lies.

    The noise of a sample depends on the seed and its place alone.
    """
    like = next(flow_map.parameters())
    shape, fresh = (BLOCK, *flow_map.sample_shape), None
    noise = torch.randn(shape, generator=step_generator(seed, block, "sample"), dtype=like.dtype)
    times = times_of(flow_map, steps, shift)
    if flow_map.jumps is Jumps.TO_DATA if renoise is None else renoise:
        fresh = torch.randn(
            (len(times) - 2, *shape), generator=step_generator(seed, block, "renoise"), dtype=like.dtype
        )
    for part in (slice(i, min(i + size, n)) for i in range(0, n, size)):
        told = condition[part].to(like.device)
        renoised = None if fresh is None else fresh[:, part].to(like.device)
        yield flow_map.sample(noise[part].to(like.device), condition=told, times=times, renoise=renoised)
        phase.advance(part.stop - part.start)


def times_of(flow_map: FlowMap, steps: Steps, shift: float | None = None) -> Tensor:
    """The times between which a student jumps: its own grid of a number of steps, or those that are given.

    Args:
        flow_map: the student.
        steps: a number, or times from 1 (or the first time of the student's own grid) to 0.
        shift: of the times of several steps, in place of the student's own; None is its own.

    Raises:
        ConfigError: no step at all, or times that do not decrease to 0 from there.
    """
    if isinstance(steps, Integral) and not isinstance(steps, bool):
        check_counts(steps=int(steps))
        if shift is None or steps == 1:
            return flow_map.grid(int(steps))
        return shifted(flow_map.first_time * torch.linspace(1.0, 0.0, int(steps) + 1), shift)
    try:
        times = torch.tensor([float(time) for time in steps])  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise ConfigError(f"steps are a whole number, or times from 1 to 0, not {steps!r}") from None
    if len(times) < 2 or not bool((times.diff() < 0).all()) or times[-1] != 0:
        raise ConfigError(f"steps are a number, or at least two times that decrease from 1 to 0, not {times.tolist()}")
    if not flow_map.first_time - 1e-6 <= times[0] <= 1:
        raise ConfigError(f"samples of this student begin at {flow_map.first_time:g}, not at {float(times[0]):g}")
    return times


def default_batch_size(device: torch.device) -> int:
    """Samples to evaluate at a time; fewer on a CPU, where batches that fit its caches are faster."""
    return 100 if device.type == "cpu" else 500


def check_counts(**counts: int | None) -> None:
    """ConfigError unless all counts that are given are whole numbers of at least 1."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral)):
            raise ConfigError(f"{name} must be a whole number, not {count!r}")
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
