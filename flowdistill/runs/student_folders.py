"""Students in folders of their own, which load without their run and without their teacher.

A student folder holds ``model.safetensors`` and ``config.json``, and for people a model card with a picture.
``config.json`` names what builds the flow map. Its arguments are plain values, and networks and decoders by their own
names and arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from flowdistill.interfaces import Decoder, FlowMap
from flowdistill.networks import VelocityNetwork
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import DECODERS, FLOW_MAPS, NETWORKS
from flowdistill.runs.pretrained import FORMAT, described, is_model, with_weights


def description(student: FlowMap) -> dict[str, Any]:
    """What ``config.json`` says of a student.

    Raises:
        ConfigError: nothing registered builds it from plain arguments, networks and decoders; or its parts were changed
            afterwards, as by low-rank updates.
    """
    config = {"format": FORMAT, **_described(student)}
    with torch.device("meta"):
        again = _built(json.loads(json.dumps(config)), {})
    if _shapes(again) != _shapes(student):
        odd = sorted(_shapes(again).items() ^ _shapes(student).items())[0][0]
        raise ConfigError(
            f"{odd} of the student is not what its arguments build: its network was changed after it was made"
        )
    return config


def load_student(folder: str | Path, **decoder_arguments: Any) -> FlowMap:
    """The student of a folder, in evaluation mode, whose weights may be trained further.

    Args:
        folder: the folder.
        **decoder_arguments: in place of those that are stored, such as ``vae`` of latents.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are of another architecture.
        ConfigError: arguments that its decoder does not have.
    """
    folder = Path(folder)
    with described(folder, "student") as config:
        unknown = decoder_arguments.keys() - _decoder(config).keys()
        given = {} if unknown else decoder_arguments
        with torch.device("meta"):  # whose weights cost neither time nor memory
            student = _built(config, given)
    if unknown:
        raise ConfigError(f"the decoder of {folder} takes no {', '.join(sorted(unknown))}")
    return with_weights(student, lambda: _built(config, given), folder).eval()


def is_student(path: Path) -> bool:
    """Whether a path is a student folder."""
    if not is_model(path):
        return False
    try:
        return "flow_map" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def trained_scales(folder: Path) -> tuple[float, float] | None:
    """The range of guidance scales that the student of a folder was trained with, where the folder tells it."""
    try:
        return as_range(json.loads((folder / "config.json").read_text(encoding="utf-8"))["origin"]["guidance"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def as_range(value: Any) -> tuple[float, float] | None:
    """A guidance scale, or the lowest and the highest of several, as a range; None of anything else.

    Examples:
        >>> as_range(1.5), as_range([1, 2]), as_range("much")
        ((1.5, 1.5), (1.0, 2.0), None)
    """
    try:
        low, high = value if isinstance(value, (list, tuple)) else (value, value)
        return float(low), float(high)
    except (TypeError, ValueError, OverflowError):  # None, or a file that was altered
        return None


def _described(value: Any) -> Any:
    """A value as JSON can say it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _described(part) for key, part in value.items()}
    if isinstance(value, FlowMap):
        name, arguments = value.built_by()
        return {"flow_map": name, "arguments": _described(arguments)}
    if isinstance(value, VelocityNetwork):
        try:
            name = NETWORKS.name_of(type(value))
        except ConfigError as error:
            raise ConfigError(
                f"{error}: a student of it, as one that begins as an exact teacher, needs its run"
            ) from None
        return {"network": name, "arguments": _described(value.arguments)}
    if isinstance(value, Decoder):
        name = DECODERS.name_of(type(value))
        return {"decoder": name, "arguments": _described(attrs.asdict(value))}  # type: ignore[arg-type]
    raise ConfigError(f"a student with a {type(value).__name__} cannot be described without its run")


def _built(config: Mapping[str, Any], decoder_arguments: Mapping[str, Any]) -> FlowMap:
    """The flow map that a description is of."""
    arguments = {name: _part(value, decoder_arguments) for name, value in config["arguments"].items()}
    entry = FLOW_MAPS.get(config["flow_map"])
    if "built_by" not in vars(entry):  # it builds students from files, or from teachers
        raise ValueError(f"{config['flow_map']} is not built by such arguments")
    student: FlowMap = FLOW_MAPS.build(config["flow_map"], **arguments)
    return student


def _part(value: Any, decoder_arguments: Mapping[str, Any]) -> Any:
    """An argument of a flow map."""
    kind = next((kind for kind in ("flow_map", "network", "decoder") if isinstance(value, dict) and kind in value), "")
    if kind == "flow_map":
        return _built(value, decoder_arguments)
    if kind == "network":
        return NETWORKS.build(value["network"], **value["arguments"])
    if kind == "decoder":
        return DECODERS.build(value["decoder"], **value["arguments"] | decoder_arguments)
    return value


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the decoder that a description has, or one of the flow maps in it."""
    for value in config["arguments"].values():
        if isinstance(value, dict) and "decoder" in value:
            return dict(value["arguments"])
        if isinstance(value, dict) and "flow_map" in value:
            return _decoder(value)
    return {}


def _shapes(student: FlowMap) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in student.state_dict().items()}
