"""Trained models, by the run directory that holds them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import gin
import torch
from torch import Tensor

from flowdistill.evaluation.blocks import BLOCK, collect
from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.metrics import measure, spread
from flowdistill.evaluation.references import Reference, reference_set, split
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.flow_maps import FlowMapTeacher
from flowdistill.interfaces import Condition, FlowMap, Teacher
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import find_device, rank_and_world
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.progress import Phase, progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.plumbing.registry import METRICS, NETWORKS, TEACHERS, unknown_name
from flowdistill.runs.checkpoints import checkpoint_paths, load_module, verify_checkpoint
from flowdistill.runs.pretrained import is_model, load_file, load_model, locate, save_model
from flowdistill.training.trainer import build_flow_map


def find_checkpoint(run: str | Path) -> tuple[Path, Path]:
    """The directory of a run and its newest checkpoint, or the one that ``run`` is.

    Raises:
        CheckpointError: there is no such run, or nothing has been saved in it yet.
    """
    path = Path(run)
    if (path / "meta.json").is_file():
        return path.resolve().parent.parent, path
    if not (path / "config.gin").is_file():
        raise CheckpointError(f"{path} is neither a run directory nor a checkpoint in one")
    saved = checkpoint_paths(path)
    if not saved:
        raise CheckpointError(f"{path} holds no checkpoint yet")
    return path, saved[-1]


def load_flow_map(run: str | Path) -> FlowMap:
    """The trained student of a run, with averaged weights where an average was kept, on the CPU.

    Args:
        run: a run directory, or a checkpoint in it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    workdir, checkpoint = find_checkpoint(run)
    meta = verify_checkpoint(checkpoint)
    with (
        torch.random.fork_rng(),
        config.parsed([workdir.absolute() / "config.gin"], []),
        config.errors_located(),
    ):
        flow_map = build_flow_map(config.value("train.flow_map"), config.value("train.teacher"))
    name = "ema.safetensors" if "ema.safetensors" in meta["sha256"] else "student.safetensors"
    load_module(flow_map, checkpoint / name)
    return flow_map.eval().requires_grad_(False)


def load_teacher(name_or_path: str | Path, **kwargs: Any) -> Teacher:
    """A registered teacher by its name, or one from a file.

    In a gin file it is ``train.teacher = @load_teacher()`` with bindings such as
    ``load_teacher.name_or_path = 'sit-xl/2-256'`` and ``load_teacher.checkpoint = 'SiT-XL-2-256x256.pt'``.

    Args:
        name_or_path: a name that ``flowdistill list teachers`` shows; a published architecture, such as
            ``sit-xl/2-256``, ``sit-xl/2-repa-256`` or ``edm2-s-512``, whose weights are the argument ``checkpoint``, a
            file of its authors or a model folder, here or on HuggingFace; a run directory or a checkpoint in it, of an
            objective such as ``flow_matching``; a model folder, as ``flowdistill convert`` writes it; a checkpoint file
            of the authors of SiT, REPA or EDM2; or ``hf://owner/repository`` of a model folder on HuggingFace.
        **kwargs: arguments of a registered teacher; for a model folder those of its decoder, such as ``vae``.

    Raises:
        ConfigError: neither a name (the nearest are listed) nor a path.
        CheckpointError: the weights are missing, damaged, or of another architecture.

    Examples:
        >>> load_teacher("ring").velocity(torch.zeros(3, 2), torch.ones(3)).shape
        torch.Size([3, 2])
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in TEACHERS:
        folder = locate(kwargs["checkpoint"]) if "checkpoint" in kwargs else None
        if folder is not None and is_model(folder):
            teacher: Teacher = load_model(folder, **{key: v for key, v in kwargs.items() if key != "checkpoint"})
            family = NETWORKS.name_of(type(teacher.network))
            if not name.startswith(family):
                raise CheckpointError(f"{folder} holds a network of {family}, not {name}")
        else:
            teacher = TEACHERS.build(name, **kwargs)
    elif not path.exists() and not name.startswith("hf://"):
        raise unknown_name("teacher", name, TEACHERS.all_names())
    else:
        path = locate(name_or_path)
        if path.is_file():
            teacher = load_file(path, **kwargs)
        elif is_model(path):
            teacher = load_model(path, **kwargs)
        elif kwargs:
            raise ConfigError(f"{path} takes no arguments, not {', '.join(kwargs)}")
        else:
            teacher = FlowMapTeacher(load_flow_map(path))
    return teacher.eval().requires_grad_(False)


gin.register("load_teacher", module="teachers")(load_teacher)


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    teacher: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    **kwargs: Any,
) -> Path:
    """Write a teacher as a model folder: safetensors and a JSON configuration, which load without anything else.

    Args:
        source: a checkpoint file of others, or a run whose student is a plain velocity field.
        folder: where to; it must not exist, or be empty.
        teacher: the architecture of a checkpoint file, such as ``sit-xl/2-256``; None is what the file itself says.
        dtype: in which weights are stored; they are always loaded as float32.
        **kwargs: further arguments of the teacher that reads the file.

    Returns:
        The folder.

    Raises:
        CheckpointError: the source cannot be read, or the folder not be written.
        ConfigError: the source is not a velocity network alone, or the folder is taken.
    """
    loaded = load_teacher(source, **kwargs) if teacher is None else load_teacher(teacher, checkpoint=source, **kwargs)
    return save_model(loaded, folder, dtype)


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


def sample(
    run: str | Path,
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
        run: a run directory, or a checkpoint in it.
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
    flow_map = load_flow_map(run)
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance)
    noise, fresh = _noise(flow_map, num_samples, steps, seed, 0, renoise)
    with progress("drawing samples", num_samples) as phase:
        return torch.cat(_draw(flow_map, noise, fresh, condition, steps, batch_size or num_samples, phase))


def check_counts(**counts: int | None) -> None:
    """ConfigError unless all counts that are given are at least 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")


def _noise(
    flow_map: FlowMap, n: int, steps: int, seed: int, block: int, renoise: bool | None
) -> tuple[Tensor, Tensor | None]:
    """The noise (n, ...) of a block of samples and, for renoising, that of the times between (steps - 1, n, ...)."""
    dtype = next(flow_map.parameters()).dtype
    shape = (n, *flow_map.sample_shape)
    noise = torch.randn(shape, generator=step_generator(seed, block, "sample"), dtype=dtype)
    if not (flow_map.to_data if renoise is None else renoise):
        return noise, None
    times = (max(steps - 1, 0), *shape)
    return noise, torch.randn(times, generator=step_generator(seed, block, "renoise"), dtype=dtype)


@torch.no_grad()
def _draw(
    flow_map: FlowMap, noise: Tensor, fresh: Tensor | None, condition: Condition, steps: int, size: int, phase: Phase
) -> list[Tensor]:
    """Samples of a flow map in batches of ``size``, where the map lies."""
    if condition.guidance is not None and getattr(flow_map, "guidance", None) is None:
        raise ConfigError("this student was not trained with guidance scales: leave guidance out")
    device = next(flow_map.parameters()).device
    samples = []
    for part in (slice(i, i + size) for i in range(0, len(noise), size)):
        again = None if fresh is None else fresh[:, part].to(device)
        samples.append(flow_map.sample(noise[part].to(device), steps, condition[part].to(device), renoise=again))
        phase.advance(len(samples[-1]))
    return samples


def evaluate(
    run: str | Path,
    *,
    metrics: Sequence[str] = ("fid",),
    num_samples: int = 10_000,
    steps: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    features: str | FeatureExtractor | None = None,
    reference: Reference | None = None,
    renoise: bool | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    noise_floor: bool = True,
    bootstrap: int = 0,
) -> dict[str, float]:
    """Metrics of a run's student against the truth.

    Samples are drawn in blocks of 500, each from noise of its own. What features say of a block is kept in
    ``RUN/evaluations``, so that an interrupted evaluation continues, and one with more samples or other metrics begins
    with what is there. Under torchrun the ranks share the blocks out; rank 0 measures, and the others return nothing.

    Args:
        run: a run directory, or a checkpoint in it.
        metrics: names that ``flowdistill list metrics`` shows.
        num_samples: samples of the student, exactly.
        steps: see `sample`.
        guidance: see `sample`.
        seed: of the noise.
        features: a feature extractor or its name, as ``flowdistill list feature_extractors`` shows; None is the one of
            the run's own evaluation, or the samples themselves beside those of an exact teacher.
        reference: a folder of images, an ``.npz`` file of images or of their mean and covariance, or a data set; None
            is that of the run's own evaluation, or the features of real data that come with the extractor.
        renoise: see `sample`.
        batch_size: samples at a time; None is 100 on a CPU, else 500. It does not change the figures, up to rounding.
        device: where samples and features are computed; by default the first GPU (of each rank its own), else the CPU.
        noise_floor: measure also a second true set of as many samples: the best that a student can look.
        bootstrap: estimate the spread of each metric over other seeds, from so many random halves of the samples; 0
            does not.

    Returns:
        The metrics by their names; under ``NAME_noise_floor`` the same between two sets of true samples, one of
        ``num_samples``, where the reference has as many again, else a warning says why it is not there; and under
        ``NAME_std`` the spread.

    Raises:
        CheckpointError: the run, or the extractor's weights, cannot be read.
        ConfigError: an unknown metric, nothing to compare with, or a metric that the reference does not allow.
        DataError: the reference is not what it should be.

    Examples:
        >>> flowdistill.evaluate("runs/ring", metrics=("w2",), num_samples=2000)  # doctest: +SKIP
        {'w2': 0.09, 'w2_noise_floor': 0.05}
    """
    check_counts(num_samples=num_samples, batch_size=batch_size, bootstrap=bootstrap or None)
    for name in metrics:
        METRICS.get(name)
    workdir, checkpoint = find_checkpoint(run)
    with config.parsed([workdir.absolute() / "config.gin"], []), config.errors_located():
        evaluation, teacher = config.value("train.evaluation"), config.value("train.teacher")
    if evaluation is not None:
        features = evaluation.features if features is None else features
        reference = evaluation.reference if reference is None else reference
    extractor = None if features is None else load_features(features)
    place = find_device(device)
    flow_map = load_flow_map(checkpoint).to(place)
    condition = make_condition(flow_map.num_classes, num_samples, None, guidance)
    truth = None
    if rank_and_world()[0] == 0:
        truth = reference_set(extractor, teacher, num_samples, seed, reference, flow_map.decoder, place)

    def draw(block: int, n: int) -> SampleSet:
        phase.completed = block * BLOCK
        noise, fresh = _noise(flow_map, BLOCK, steps, seed, block, renoise)
        rows = condition[block * BLOCK :][:n]
        size = batch_size or (100 if place.type == "cpu" else BLOCK)
        batches = _draw(flow_map, noise[:n], None if fresh is None else fresh[:, :n], rows, steps, size, phase)
        return sample_set(torch.cat(batches), rows.labels, extractor, flow_map.decoder)

    measured = {
        "format": 1,
        "weights": verify_checkpoint(checkpoint)["sha256"],
        "config": hashlib.sha256((workdir / "config.gin").read_bytes()).hexdigest(),
        "features": None if extractor is None else extractor.fingerprint(),
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "renoise": flow_map.to_data if renoise is None else renoise,
    }
    key = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
    with progress("drawing samples", num_samples) as phase:
        generated = collect(SampleSet, workdir / "evaluations" / key, num_samples, draw)
    if generated is None or truth is None:
        return {}
    figures = measure(metrics, generated, truth)
    if noise_floor:
        again = None if extractor is not None else reference_set(None, teacher, num_samples, seed + 1)
        figures |= _noise_floors(metrics, num_samples, truth, again)
    if bootstrap:
        figures |= {f"{name}_std": v for name, v in spread(metrics, generated, truth, bootstrap, seed).items()}
    return figures


def _noise_floors(metrics: Sequence[str], n: int, truth: SampleSet, again: SampleSet | None) -> dict[str, float]:
    """The metrics between two true sets: ``again`` and all of the truth, or n and the others of a reference."""
    pair = split(truth, n) if again is None else (again, truth)
    floors: dict[str, float] = {}
    if pair is not None:
        for name in metrics:
            with contextlib.suppress(ConfigError):  # of a metric that needs what true samples lack, such as labels
                floors[f"{name}_noise_floor"] = measure([name], *pair)[name]
    missing = [name for name in metrics if f"{name}_noise_floor" not in floors]
    if missing:
        if pair is not None:
            why = "true samples do not have what it is measured on"
        elif len(truth):
            why = f"the reference holds {len(truth)} samples, and {2 * n} are needed"
        else:
            why = "the reference holds a mean and a covariance alone"
        warnings.warn(f"no noise floor of {', '.join(missing)}: {why}", RuntimeWarning, stacklevel=3)
    return floors
