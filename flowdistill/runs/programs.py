"""Students for those who do not have this library: programs of `torch.export` and ONNX, pipelines of diffusers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.interfaces import Condition, FlowMap, Jumps
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import write_json


class _Jump(nn.Module):
    """The jump X(x, t, s) of a student as a function of tensors: labels of a conditional one, and guidance scales."""

    def __init__(self, student: FlowMap) -> None:
        super().__init__()
        self.student = student
        self.names = ["x", "t", "s"]
        self.names += [] if student.num_classes is None else ["labels"]
        self.names += [] if student.guidance is None else ["guidance"]

    def forward(self, x: Tensor, t: Tensor, s: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(self.names[3:], rest, strict=True))
        return self.result(x, t, s, Condition(given.get("labels"), given.get("guidance")))

    def result(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """What is computed."""
        jump: Tensor = self.student(x, t, s, condition)
        return jump

    def inputs(self) -> tuple[Tensor, ...]:
        """An example of two jumps."""
        like = next(self.student.parameters())
        ones = torch.ones(2, dtype=like.dtype, device=like.device)
        values = {
            "x": torch.zeros((2, *self.student.sample_shape), dtype=like.dtype, device=like.device),
            "t": ones,
            "s": 0 * ones,
            "labels": torch.zeros(2, dtype=torch.long, device=like.device),
            "guidance": ones * (self.student.guidance or 1.0),
        }
        return tuple(values[name] for name in self.names)


class _AverageVelocity(_Jump):
    """The average velocity F(x, t, s), as `_Jump` the jump."""

    def result(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """What is computed."""
        return self.student.average_velocity(x, t, s, condition)


def _exported(student: FlowMap, function: type[_Jump] = _Jump) -> tuple[torch.export.ExportedProgram, list[str]]:
    jump = function(student)
    batch = torch.export.Dim("batch", max=2**31 - 1)  # PyTorch 2.5 needs a limit
    rest = tuple({0: batch} for _ in jump.names[3:])
    sizes: Any = (*({0: batch} for _ in range(3)), *((rest,) if rest else ()))
    try:
        with torch.no_grad():
            return torch.export.export(jump, jump.inputs(), dynamic_shapes=sizes, strict=False), jump.names
    except Exception as error:  # of whatever a network does
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(f"PyTorch cannot write {type(student).__name__} as a program: {reason}") from error


def _torch(student: FlowMap, folder: Path) -> None:
    program, _ = _exported(student)
    torch.export.save(program, folder / "student.pt2")


def _onnx(student: FlowMap, folder: Path) -> None:
    try:
        import onnxscript  # noqa: F401, which PyTorch's exporter needs
    except ImportError:
        raise ConfigError("writing ONNX needs onnxscript: pip install 'flowdistill[onnx]'") from None
    program, names = _exported(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        written: Any = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["sample"], verbose=False
        )
        written.save(folder / "student.onnx")


def _diffusers(student: FlowMap, folder: Path) -> None:
    """A pipeline: the average velocity as a program, a scheduler, the autoencoder of latents, and what joins them."""
    if not torch.allclose(student.grid(4), FlowMap.grid(student, 4)):
        raise ConfigError(f"the times of a {type(student).__name__} are not those of diffusers' scheduler")

    # What the pipeline is to know of the decoder.
    images: dict[str, Any] = {"scale": 1.0, "bias": 0.0, "black": -1.0, "white": 1.0, "crop": None, "needs_vae": False}
    decoder = student.decoder
    if isinstance(decoder, Pixels):
        images |= {"scale": 1 / decoder.scale, "crop": decoder.crop}
    elif isinstance(decoder, StableDiffusionVae):
        black, white = decoder.pixel_range
        images |= {"scale": decoder.scale, "bias": decoder.bias, "black": black, "white": white, "needs_vae": True}
    elif decoder is not None:
        raise ConfigError(f"a pipeline of diffusers does not know how {type(decoder).__name__} decodes")

    # The parts.
    program, _ = _exported(student, _AverageVelocity)
    for part in ("flow_map", "scheduler"):
        (folder / part).mkdir()
    torch.export.save(program, folder / "flow_map" / "flow_map.pt2")
    network = {
        "_class_name": "FlowMap",
        "sample_shape": list(student.sample_shape),
        "num_classes": student.num_classes,
        "guidance_scale": student.guidance,
        "start": student.first_time,
        "anchored": not student.has_velocity,
        "renoise": student.jumps is Jumps.TO_DATA,
    }
    scheduler = {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000}
    scheduler["shift"] = student.time_shift
    write_json(folder / "flow_map" / "config.json", network)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    vae: list[str | None] = [None, None]
    if isinstance(decoder, StableDiffusionVae) and decoder.ready:
        decoder.autoencoder().save_pretrained(folder / "vae")
        vae = ["diffusers", "AutoencoderKL"]

    # What joins them.
    pipeline = {
        "_class_name": ["pipeline", "FlowMapPipeline"],
        "flow_map": ["flow_map", "FlowMap"],
        "scheduler": ["diffusers", "FlowMapEulerDiscreteScheduler"],
        "vae": vae,
        "images": images,
    }
    write_json(folder / "model_index.json", pipeline)
    shutil.copy(_FILES / "pipeline.py", folder)
    shutil.copy(_FILES / "flow_map.py", folder / "flow_map")


_FILES = Path(__file__).parent / "pipeline_files"

PROGRAMS: Mapping[str, Callable[[FlowMap, Path], None]] = {"torch": _torch, "onnx": _onnx, "diffusers": _diffusers}
"""What writes a student into a folder, in evaluation mode, for batches of any size."""
