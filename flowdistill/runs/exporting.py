"""Students that leave the house: folders with weights, a description, a model card and a picture."""

from __future__ import annotations

import contextlib
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from flowdistill.interfaces import FlowMap, Objective
from flowdistill.plumbing import config
from flowdistill.plumbing.errors import CheckpointWriteError, ConfigError, in_one_line
from flowdistill.plumbing.files import replaced_folder, write_json, write_text
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import OBJECTIVES, TEACHERS
from flowdistill.plumbing.statements import Statement
from flowdistill.runs.loading import is_released, load_flow_map, released_students
from flowdistill.runs.pretrained import check_free, write_weights
from flowdistill.runs.programs import PROGRAMS
from flowdistill.runs.records import read_evaluation
from flowdistill.runs.run import Run
from flowdistill.runs.student_folders import description, load_student

_CARD = """\
---
library_name: flowdistill
pipeline_tag: {tag}
tags: [flow-map, distillation]
---

# {title}

{what}
{picture}
## Use

```python
import flowdistill

student = flowdistill.load_flow_map({place!r})
samples = flowdistill.sample(student, 16{arguments})
```

`load_flow_map("hf://OWNER/NAME")` takes the same folder from HuggingFace.
Samples have the shape {shape}.
{pipeline}{facts}
## Where it comes from

{origin}
{citation}"""

_PIPELINE = """
Without flowdistill, by diffusers 0.39 or later, which runs the files `pipeline.py` and `flow_map/flow_map.py`:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({place!r}, trust_remote_code=True)
samples = pipeline({arguments}, num_inference_steps=1).images
```

"""


def export(
    source: Run | FlowMap | str | Path,
    folder: str | Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    programs: Sequence[str] = (),
    private: bool = False,
) -> Path | str:
    """Write a student as a folder that loads without its run, its teacher, or a gin file.

    ``model.safetensors`` holds the weights, the averaged ones of a run. ``config.json`` describes the student, and its
    entry ``origin`` what it was distilled from and how. ``README.md`` is a model card with the picture ``samples.png``,
    where samples can be drawn.

    Args:
        source: a run directory, a checkpoint in it, or a `Run`; a student, as `load_flow_map` gives it; or the file of
            a released one.
        folder: where to; it must not exist, or be empty. ``"hf://OWNER/NAME"`` is a repository of the HuggingFace hub,
            which is made if it is not there; it needs the user to be logged in there.
        dtype: in which weights are stored; they are always loaded as float32.
        programs: for those who do not have this library, write the student's jump X(x, t, s) also as a program:
            "torch" as ``student.pt2`` of `torch.export`, "onnx" as ``student.onnx``. Further inputs are the labels of a
            conditional student, and the scales of one that takes guidance. "diffusers" makes the folder a pipeline of
            diffusers as well, with a copy of the autoencoder that was named. Weights are in float32.
        private: whether a repository that is made is private.

    Returns:
        The folder, or the name of the repository as it was given.

    Raises:
        CheckpointError: the source cannot be read.
        ConfigError: nothing registered builds such a student, the folder is taken, or there is no such program.
        CheckpointWriteError: the disk or the hub refused; nothing half-written is left, but for an empty repository.

    Examples:
        >>> flowdistill.export("runs/digits", "digits-one-step")  # doctest: +SKIP
        PosixPath('digits-one-step')
        >>> flowdistill.load_flow_map("digits-one-step").sample_shape  # doctest: +SKIP
        (1, 8, 8)
    """
    if (repository := str(folder)).startswith("hf://"):
        return _pushed(source, repository, private, dtype=dtype, programs=programs)
    return _written(source, Path(folder), str(folder), dtype=dtype, programs=programs)


def _written(
    source: Run | FlowMap | str | Path,
    folder: Path,
    place: str,
    *,
    dtype: Literal["float32", "float16"],
    programs: Sequence[str],
) -> Path:
    """Write the folder; ``place`` is where its card says that it is loaded from."""
    check_free(folder)
    if unknown := set(programs) - PROGRAMS.keys():
        raise ConfigError(f"programs are {', '.join(PROGRAMS)}, not {', '.join(sorted(map(str, unknown)))}")
    if isinstance(source, (str, Path)) and (is_released(str(source)) or str(source) in released_students()):
        source = load_flow_map(source)
    run = Run.of(source)
    student = run.student
    described = {**description(student), "origin": _origin(run)}
    try:
        with replaced_folder(folder) as partial:
            write_weights(student, partial, dtype)
            write_json(partial / "config.json", described)
            again = load_student(partial).requires_grad_(False)
            drawn = _picture(again, partial / "samples.png")
            for name in programs:
                PROGRAMS[name](again, partial)
            card = _card(
                folder.name, place, student, described["origin"], run.objective, drawn, "diffusers" in programs
            )
            write_text(partial / "README.md", card)
    except OSError as error:
        raise CheckpointWriteError(f"cannot write {folder}: {error}; nothing was left there") from error
    return folder


def _pushed(source: Run | FlowMap | str | Path, repository: str, private: bool, **how: Any) -> str:
    """Write a student to a repository of the HuggingFace hub, as one commit."""
    name = repository.removeprefix("hf://")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"a repository is hf://OWNER/NAME, not {repository}")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError(f"writing to {repository} needs huggingface_hub: pip install 'flowdistill[hub]'") from None
    with tempfile.TemporaryDirectory() as place:
        folder = _written(source, Path(place) / name.partition("/")[2], repository, **how)
        try:
            with progress(f"sending {repository}", None):
                HfApi().create_repo(name, private=private, exist_ok=True)
                HfApi().upload_folder(
                    repo_id=name,
                    folder_path=folder,
                    commit_message="A student of flowdistill",
                    delete_patterns=[  # of another student, which this one may not have
                        *("student.*", "samples.png"),
                        *("model_index.json", "pipeline.py", "flow_map/*", "scheduler/*", "vae/*"),
                    ],
                )
        except Exception as error:  # of a name, of rights, or any of the libraries that speak HTTP for the hub's
            raise CheckpointWriteError(f"the hub does not take {repository}: {in_one_line(error)}") from error
    return repository


def _origin(run: Run) -> dict[str, Any]:
    """What a run tells of its student; of a student alone the versions."""
    known: dict[str, Any] = {}
    if run.objective is not None:
        bindings = config.statements(run.workdir / "config.gin")
        known = {
            "objective": _name_of(run.objective),
            "teacher": _teachers(bindings),
            "steps": run.meta.step,
            "guidance": run.scales,
            "evaluation": None if run.ema is not None else read_evaluation(run.workdir, run.meta.step),
            **({} if run.ema is None else {"ema": run.ema}),
        }
    versions = {"flowdistill": sys.modules["flowdistill"].__version__, "torch": torch.__version__}
    return {**known, "versions": {**versions, "python": platform.python_version()}}


def _name_of(objective: Objective) -> str:
    """The registered name of an objective, or that of its class."""
    with contextlib.suppress(ConfigError):
        return OBJECTIVES.name_of(type(objective))
    return type(objective).__name__


def _teachers(bindings: Sequence[Statement]) -> list[str]:
    """The teacher's registered name, then those of the teachers that it wraps."""
    known, found = set(TEACHERS.names()), list[str]()
    waiting = [reference.part for b in bindings if b.name == "train.teacher" for reference in b.references]
    while waiting:
        part = waiting.pop(0)
        if part not in found:
            found.append(part)
            waiting += [reference.part for b in bindings if b.part == part for reference in b.references]
    return [name for name in found if name in known]


def _picture(student: FlowMap, path: Path) -> bool:
    from flowdistill.evaluation.pictures import save_samples

    save_samples(student, path, seed=0)
    return path.is_file()


def _card(
    name: str,
    place: str,
    student: FlowMap,
    origin: Mapping[str, Any],
    objective: Objective | None,
    drawn: bool,
    pipeline: bool,
) -> str:
    """The model card."""
    from flowdistill.evaluation.report import table

    points = len(student.sample_shape) == 1
    labels = "" if student.num_classes is None else f" of {student.num_classes} classes"
    arguments = "" if student.num_classes is None else ", labels=0"
    facts = [f"It has {sum(p.numel() for p in student.parameters()):,} parameters."]
    if student.guidance is not None:
        scales = origin.get("guidance")
        trained = f", and was trained with scales from {scales[0]:g} to {scales[1]:g}" if scales else ""
        facts.append(f"It takes guidance scales (`guidance=`), by default {student.guidance:g}{trained}.")
    if student.decoder is not None and not student.decoder.ready:
        facts.append("Its samples are latents: give `load_flow_map` the autoencoder as `vae`.")
    told = "Nothing is recorded of its training. If others have released these weights, their licence applies."
    if objective is not None:
        teacher = f" from the teacher `{' of '.join(origin['teacher'])}`" if origin["teacher"] else ""
        told = f"It was distilled{teacher} by `{origin['objective']}` in {origin['steps']:,} steps."
        if measured := origin["evaluation"]:
            lines = [
                f"At the end of the training, {measured['num_samples']:,} samples a row:",
                "",
                *table(measured["rows"]),
            ]
            told = "\n".join([told, *lines])
    return _CARD.format(
        tag="other" if points else "unconditional-image-generation",
        title=name,
        what=f"A flow map{labels}, which makes samples of noise in one step, by the library flowdistill.",
        picture="\n![Samples of one step](samples.png)\n" if drawn else "",
        place=place if place.startswith("hf://") else name,
        arguments=arguments,
        shape=" x ".join(map(str, student.sample_shape)),
        pipeline=_PIPELINE.format(
            place=place.removeprefix("hf://") if place.startswith("hf://") else name,
            arguments="batch_size=16" if student.num_classes is None else "class_labels=[0] * 16",
        )
        if pipeline
        else "",
        facts="\n".join(facts) + "\n",
        origin=told,
        citation=f"\n```bibtex\n{objective.citation}\n```\n" if objective is not None and objective.citation else "",
    )
