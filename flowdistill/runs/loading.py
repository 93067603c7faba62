"""Loading trained models: students of runs, and teachers by name, from runs and from files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gin

from flowdistill.interfaces import FlowMap, Teacher
from flowdistill.plumbing.errors import CheckpointError, ConfigError, FlowDistillError
from flowdistill.plumbing.registry import FLOW_MAPS, NETWORKS, TEACHERS, register_flow_map, unknown_name
from flowdistill.runs.pretrained import is_model, load_file, load_model, locate, readers_of, save_model
from flowdistill.runs.run import Run
from flowdistill.runs.student_folders import is_student, load_student
from flowdistill.wrapped_teachers import FlowMapTeacher


def load_flow_map(name_or_path: str | Path | Run, **kwargs: Any) -> FlowMap:
    """A trained student, frozen, on the CPU: of a run, or one that others have released, from its authors' file.

    In a gin file ``train.flow_map = @sit_student()`` starts from a released one, which is trained further.

    Args:
        name_or_path: a run directory, or a checkpoint in it, whose averaged weights are taken where an average was
            kept; a `Run`, whose own student it is; a released family or architecture, such as ``dmf`` or
            ``dmf-xl/2-256``, whose weights are the argument ``checkpoint``, a file of its authors, here or on
            HuggingFace; such a file alone; a student folder, as `export` writes it; ``hf://owner/repository/file`` of
            such a file, or ``hf://owner/repository`` of such a folder.
        **kwargs: arguments of the class that reads the file, such as ``vae`` of its decoder, see
            ``flowdistill show flow_maps sit_student``; for a student folder those of its decoder.

    Raises:
        ConfigError: neither a name (the nearest are listed) nor a path.
        CheckpointError: there is no student, or it is damaged, hostile, or of another architecture.

    Examples:
        >>> student = load_flow_map("dmf-xl/2-256", checkpoint="dmf_xl_2_256.pt")  # doctest: +SKIP
        >>> flowdistill.sample(student, 4, labels=[207, 360, 387, 974]).shape  # doctest: +SKIP
        torch.Size([4, 4, 32, 32])
    """
    name, path = str(name_or_path), Path(str(name_or_path))
    if isinstance(name_or_path, Run):
        return _student(name_or_path, kwargs)
    released = released_students()
    if name.startswith("hf://"):
        path = locate(name)
    if name in released:
        student: FlowMap = FLOW_MAPS.build(name, **kwargs)
    elif is_student(path):
        student = load_student(path, **kwargs)
    elif is_released(str(path)):
        student = load_file(path, FLOW_MAPS, **kwargs)
    elif not path.exists() and "checkpoint" in kwargs:
        raise unknown_name("student", name, released)
    else:
        return _student(Run(path), kwargs)
    return student.eval().requires_grad_(False)


@register_flow_map("from_student")
def from_student(student: str) -> FlowMap:
    """A student to be trained further: of a student folder, or of a file that others have released.

    In a gin file ``train.flow_map = @from_student()``; a run is continued, or started from, by ``train.start``.

    Args:
        student: the folder, as `flowdistill.export` writes it, or the file, here or as ``hf://owner/repository``.

    Raises:
        ConfigError: the file leaves open what it is: take the class that reads it, such as ``@sit_student()``.
        CheckpointError: there is no student, or it is damaged, hostile, or of another architecture.
    """
    path = locate(student)
    loaded: FlowMap = load_student(path) if is_student(path) else load_file(path, FLOW_MAPS)
    return loaded


def is_released(source: str) -> bool:
    """Whether a source can be of a released student, here or on HuggingFace: a file, or a folder as of diffusers."""
    path = Path(source)
    folder = (path / "config.json").is_file() and not is_model(path)
    return folder or path.is_file() or source.startswith("hf://")


def released_students() -> list[str]:
    """The names of students that are read from files of others: of the classes, their families and architectures."""
    return [name for reader in readers_of(FLOW_MAPS) for name in (reader, *FLOW_MAPS.variants(reader))]


def _student(run: Run, arguments: Mapping[str, Any]) -> FlowMap:
    if arguments:
        raise ConfigError(f"{run.workdir} takes no arguments, not {', '.join(arguments)}")
    return run.student


def load_teacher(name_or_path: str | Path | Run, **kwargs: Any) -> Teacher:
    """A registered teacher by its name, or one from a file.

    In a gin file it is ``train.teacher = @load_teacher()`` with bindings such as
    ``load_teacher.name_or_path = 'sit-xl/2-256'`` and ``load_teacher.checkpoint = 'SiT-XL-2-256x256.pt'``.

    Args:
        name_or_path: a name that ``flowdistill list teachers`` shows; a published architecture, such as
            ``sit-xl/2-256``, ``sit-xl/2-repa-256`` or ``edm2-s-512``, whose weights are the argument ``checkpoint``, a
            file of its authors or a model folder, here or on HuggingFace; a run (see `Run`), or its directory, of an
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
    name, path = str(name_or_path), Path(str(name_or_path))
    if isinstance(name_or_path, Run):
        teacher: Teacher = _of_run(name_or_path, kwargs)
    elif name in TEACHERS:
        folder = locate(kwargs["checkpoint"]) if "checkpoint" in kwargs else None
        if folder is not None and is_model(folder):
            teacher = load_model(folder, **{key: v for key, v in kwargs.items() if key != "checkpoint"})
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
        elif is_student(path):
            teacher = FlowMapTeacher(load_student(path, **kwargs))
        elif is_model(path):
            teacher = load_model(path, **kwargs)
        else:
            teacher = _of_run(Run(path), kwargs)
    return teacher.eval().requires_grad_(False)


def _of_run(run: Run, arguments: Mapping[str, Any]) -> Teacher:
    return FlowMapTeacher(_student(run, arguments))


gin.register("load_teacher", module="teachers")(load_teacher)


def convert(
    source: Run | str | Path,
    folder: str | Path,
    *,
    teacher: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    **kwargs: Any,
) -> Path:
    """Write a teacher as a model folder: safetensors and a JSON configuration, which load without anything else.

    The file of a released student becomes a student folder, as by `flowdistill.export`, which also takes runs.

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
    if teacher is not None:
        return save_model(load_teacher(teacher, checkpoint=source, **kwargs), folder, dtype)
    try:
        loaded = load_teacher(source, **kwargs)
    except FlowDistillError:
        student = None if isinstance(source, Run) else _released(source, kwargs)
        if student is None:
            raise
        from flowdistill.runs.exporting import export

        export(student, folder, dtype=dtype)
        return Path(folder)
    return save_model(loaded, folder, dtype)


def _released(source: str | Path, arguments: Mapping[str, Any]) -> FlowMap | None:
    """The student of a released file; None if the file is of none."""
    with contextlib.suppress(FlowDistillError):
        return load_flow_map(source, **arguments) if is_released(str(source)) else None
    return None
