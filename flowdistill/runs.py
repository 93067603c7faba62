"""Trained models, by the run directory that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import gin
import torch
from torch import Tensor

from flowdistill import config
from flowdistill.errors import CheckpointError, ConfigError
from flowdistill.evaluation.measure import measure, reference_set, sample_set
from flowdistill.flow_maps import FlowMapTeacher
from flowdistill.interfaces import Condition, FlowMap, Teacher
from flowdistill.pretrained import is_model, load_file, load_model, locate, save_model
from flowdistill.registry import METRICS, NETWORKS, TEACHERS, unknown_name
from flowdistill.training.checkpoints import checkpoint_paths, load_module, verify_checkpoint
from flowdistill.training.randomness import step_generator
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
    return _draw(load_flow_map(run), num_samples, steps, labels, guidance, seed, batch_size, renoise)[0]


@torch.no_grad()
def _draw(
    flow_map: FlowMap,
    num_samples: int,
    steps: int,
    labels: int | Sequence[int] | Tensor | None,
    guidance: float | None,
    seed: int,
    batch_size: int | None,
    renoise: bool | None,
) -> tuple[Tensor, Condition]:
    """Samples of a flow map, and what they were conditioned on."""
    if num_samples < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError("num_samples and batch_size must be at least 1")
    if guidance is not None and getattr(flow_map, "guidance", None) is None:
        raise ConfigError("this student was not trained with guidance scales: leave guidance out")
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance)
    dtype = next(flow_map.parameters()).dtype
    shape = (num_samples, *flow_map.sample_shape)
    noise = torch.randn(shape, generator=step_generator(seed, 0, "sample"), dtype=dtype)
    fresh = (
        torch.randn((max(steps - 1, 0), *shape), generator=step_generator(seed, 0, "renoise"), dtype=dtype)
        if (flow_map.to_data if renoise is None else renoise)
        else None
    )
    size = batch_size or num_samples
    parts = [slice(i, i + size) for i in range(0, num_samples, size)]
    samples = [
        flow_map.sample(noise[part], steps, condition[part], renoise=None if fresh is None else fresh[:, part])
        for part in parts
    ]
    return torch.cat(samples), condition


def evaluate(
    run: str | Path,
    *,
    metrics: Sequence[str] = ("fid",),
    num_samples: int = 10_000,
    steps: int = 1,
    guidance: float | None = None,
    seed: int = 0,
    features: str | None = None,
    renoise: bool | None = None,
) -> dict[str, float]:
    """Metrics of a run's student against the truth.

    Args:
        run: a run directory, or a checkpoint in it.
        metrics: names that ``flowdistill list metrics`` shows.
        num_samples: samples of the student.
        steps: see `sample`.
        guidance: see `sample`.
        seed: of the noise.
        features: the feature extractor whose stored features of real data are the truth; None is the one of the run's
            own evaluation, or no features and samples of an exact teacher.
        renoise: see `sample`.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: an unknown metric, or nothing to compare with.
    """
    for name in metrics:
        METRICS.get(name)
    workdir, _ = find_checkpoint(run)
    with config.parsed([workdir.absolute() / "config.gin"], []), config.errors_located():
        evaluation, teacher = config.value("train.evaluation"), config.value("train.teacher")
    if features is None and evaluation is not None:
        features = evaluation.features
    flow_map = load_flow_map(run)
    samples, condition = _draw(flow_map, num_samples, steps, None, guidance, seed, 500, renoise)
    generated = sample_set(samples, condition.labels, features, flow_map.decoder)
    return measure(metrics, generated, reference_set(features, teacher, num_samples, seed))
