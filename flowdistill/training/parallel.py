"""Networks that several processes share, by PyTorch's fully sharded data parallelism.

Each process holds a part of every weight, gradient and optimiser state. Before a layer is evaluated its weights are
gathered, and afterwards they are freed; its gradients are added up and cut again (ZeRO-3, Rajbhandari et al. 2020,
arXiv 1910.02054). The networks know nothing of it but their layers.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType, NoneType
from typing import Any, Literal

import attrs
import gin
import torch
import torch.distributed as dist
from attrs.validators import in_, instance_of, optional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdistill.duals import register_rule
from flowdistill.interfaces import FlowMap, Teacher
from flowdistill.networks import ForcedWeight, VelocityNetwork
from flowdistill.plumbing.distributed import answered, check_together, local, rank_and_world
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.fields import at_least
from flowdistill.plumbing.files import json_fingerprint
from flowdistill.runs.tensor_files import is_sharded

_NEEDED = (2, 13)  # of PyTorch, whose hooks of sharded modules a forward derivative can pass


@gin.register("parallel", module="training")
@attrs.frozen(kw_only=True)
class Parallel:
    """How several processes share the networks of a training: ``train.parallel``, and ``parallel.NAME`` in gin files.

    The results do not depend on it, up to rounding. One process shards nothing.
    """

    shard: int | None = attrs.field(default=None, validator=optional(at_least(1)))
    """The processes that share one copy of the networks; None is all. 8 on machines of 8 GPUs each is hybrid sharding,
    with a copy on each machine, and 1 is plain data parallelism."""
    precision: Literal["float32", "bf16"] = attrs.field(default="float32", validator=in_(("float32", "bf16")))
    """The precision in which the weights of trained networks travel; they are kept, and their gradients added up, in
    float32. "bf16" halves the traffic of a training in "bf16" whose objective evaluates nothing in float32, as finite
    differences do. The teacher's weights travel, and are kept, in the precision of the training."""
    reshard_after_forward: bool = attrs.field(default=True, validator=instance_of(bool))
    """Whether the weights of a layer are freed after its evaluation and gathered again for the backward pass. Without,
    the teacher's travel once for all and those of trained networks once for each backward pass, and all take their
    memory."""
    checkpoint_activations: bool = attrs.field(default=False, validator=instance_of(bool))
    """Whether the activations of trained layers are computed again in the backward pass in place of being kept, also in
    one process. Derivatives with a graph keep theirs."""

    def copies(self, world: int) -> int:
        """The copies of the networks that so many processes hold; ConfigError if they cannot be shared out so."""
        shard = world if self.shard is None or world == 1 else self.shard
        if world % shard:
            raise ConfigError(
                f"parallel.shard = {shard} processes to a copy do not divide {world} processes: set it to a divisor "
                f"of {world}"
            )
        return world // shard

    def lowers(self, module: nn.Module, frozen: bool) -> bool:
        """Whether the weights of a module travel in bfloat16 in a training that is in it.

        Args:
            module: the module.
            frozen: whether it is never trained.
        """
        trained = any(p.requires_grad for p in module.parameters())
        exact = any(p.dtype == torch.float64 for p in module.parameters())
        return (frozen or (trained and self.precision == "bf16")) and not exact

    def leaves(self, module: nn.Module, frozen: bool) -> bool:
        """Whether the weights of a module stay where they were gathered.

        Those that change by other ways than a backward pass, as averages do, must not.
        """
        return not self.reshard_after_forward and (frozen or any(p.requires_grad for p in module.parameters()))


def recompute(module: nn.Module) -> None:
    """Let the layers of the networks in a module compute their activations again in the backward pass."""
    for layer in layers(module):
        layer.forward = MethodType(_recomputed, layer)  # a bound method, of which a copy of the layer has its own


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def layers(module: nn.Module) -> list[nn.Module]:
    """The layers of all networks in a module."""
    networks = [part for part in module.modules() if isinstance(part, VelocityNetwork)]
    return list(dict.fromkeys(layer for network in networks for layer in network.layer_modules))


def units(module: nn.Module) -> list[nn.Module]:
    """The modules each of whose weights are gathered together, the inner ones first.

    They are the layers of networks, but for those that have a parameter in common with others, then the networks with
    what is left of them, and of all else the smallest modules that are evaluated as a whole. What a module gives must
    be tensors, whose gradients tell when it is needed again.
    """
    if not _has_parameters(module):
        return []
    shared = _occurrences(module)
    inner = [layer for layer in layers(module) if (own := _occurrences(layer)) and own.items() <= shared.items()]
    networks = any(isinstance(part, VelocityNetwork) for part in module.modules())
    evaluated = isinstance(module, (VelocityNetwork, nn.Sequential)) or (isinstance(module, _MODELS) and not networks)
    if evaluated or any(True for _ in module.parameters(recurse=False)):
        return [*inner, module]
    return [unit for child in module.children() for unit in units(child)]


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _occurrences(module: nn.Module) -> Counter[int]:
    """How often each parameter occurs in a module, by its identity."""
    return Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


_MODELS = (FlowMap, Teacher)


class Sharding:
    """The processes of a training, as they share networks; `share` makes a network theirs.

    Scalars become vectors of one element, since only vectors can be shared out; checkpoints hold them as scalars.

    Args:
        settings: how they share.
        device: of this process.
        low: whether the training is in bfloat16.

    Raises:
        ConfigError: the processes do not divide so, or PyTorch is too old.
    """

    def __init__(self, settings: Parallel, device: torch.device, low: bool) -> None:
        if torch.__version__ < _NEEDED:  # type: ignore[operator]
            wanted = ".".join(map(str, _NEEDED))
            raise ConfigError(f"training in several processes needs PyTorch {wanted} or later, not {torch.__version__}")
        from torch.distributed.device_mesh import init_device_mesh

        world = rank_and_world()[1]
        copies = settings.copies(world)
        self.settings, self.device, self._low = settings, device, low
        sizes, names = ((world,), ("shard",)) if copies == 1 else ((copies, world // copies), ("replicate", "shard"))
        with answered():
            self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
            self.saves = dist.new_group(backend="gloo")
        self._scalars: dict[str, dict[str, Any]] = {}
        _follow_hooks()

    def share(self, name: str, module: nn.Module, frozen: bool = False) -> None:
        """Give each process its part of a module, whose values the first process has.

        In the other processes the module may be without values.

        Args:
            name: of the module.
            module: the module; no process evaluates it alone afterwards.
            frozen: whether it is never trained, so that it may be kept in low precision.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        low = self._low and self.settings.lowers(module, frozen)
        scalars = [key for key, value in module.named_parameters() if value.ndim == 0]
        values = _emptied(module, torch.bfloat16 if low and frozen else None)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=torch.float32 if low else None,
            cast_forward_inputs=False,  # times keep their precision
        )
        reshard = not self.settings.leaves(module, frozen)
        if low:
            evaluate_low(module, self.device.type)
        for unit in units(module):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=reshard, mp_policy=policy)
            for method in entries(unit):
                register_fsdp_forward_method(unit, method)
                setattr(unit, method, _together(getattr(unit, method)))
            unit.register_forward_pre_hook(lambda *_: check_together(), prepend=True)
        for part in module.modules():
            if isinstance(part, ForcedWeight):
                part.replaced_before = True
        module.to_empty(device=self.device)
        self._fill(module, values)
        self._scalars[name] = {key: module.get_parameter(key) for key in scalars}

    @torch.no_grad()
    def _fill(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Give all processes their parts of the first one's values, one after another, which are forgotten."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        first = rank_and_world()[0] == 0
        for name, ours in [*module.named_parameters(), *module.named_buffers()]:
            value = values.pop(name)
            if not first:
                value = torch.empty(ours.shape, dtype=ours.dtype)
            value = value.detach().to(self.device, ours.dtype).reshape(ours.shape).contiguous()
            with answered():
                if isinstance(ours, DTensor):
                    part = distribute_tensor(value, self.mesh, ours.placements)
                    ours.to_local().copy_(part.to_local())
                else:
                    dist.broadcast(value, 0)
                    ours.copy_(value)

    def free(self, module: nn.Module) -> None:
        """Free the weights that were gathered and are still there, as an update is to leave none behind."""
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules() if not self.settings.reshard_after_forward else ():
            if isinstance(part, FSDPModule):
                part.reshard()

    def stored(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a module as checkpoints hold them; all processes ask at once."""
        tensors = module.state_dict()
        scalars = self._scalars[name]
        tensors.update(zip(scalars, self._as_scalars([tensors[key] for key in scalars]), strict=True))
        return tensors

    def targets(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of a module for stored ones to be put into; scalars are to be given to `take` then."""
        return module.state_dict() | {key: torch.empty((), dtype=v.dtype) for key, v in self._scalars[name].items()}

    @torch.no_grad()
    def take(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give the scalars of a module the values that they have among its stored tensors."""
        for key, vector in self._scalars[name].items():
            local(vector).fill_(tensors[key])

    def stored_state(self, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of a module's optimiser as checkpoints hold it; all processes ask at once."""
        state = optimizer.state_dict()
        ours = {id(vector) for vector in self._scalars[name].values()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = [
            (number, key)
            for number, parameter in enumerate(parameters)
            if id(parameter) in ours
            for key, value in state["state"].get(number, {}).items()
            if isinstance(value, Tensor) and is_sharded(value)
        ]
        scalars = self._as_scalars([state["state"][number][key] for number, key in found])
        states = {number: dict(own) for number, own in state["state"].items()}
        for (number, key), scalar in zip(found, scalars, strict=True):
            states[number][key] = scalar
        return {**state, "state": states}

    def _as_scalars(self, vectors: Sequence[Any]) -> list[Tensor]:
        """The scalars that vectors of one element stand for, of which one process to a copy has each."""
        if not vectors:
            return []
        values = torch.stack([local(vector.detach()).sum() for vector in vectors])
        with answered():
            dist.all_reduce(values, group=self.mesh.get_group("shard"))
        return [value.to(vector.dtype) for value, vector in zip(values.unbind(), vectors, strict=True)]


def _together(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that all processes call at once."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        check_together()
        return method(*args, **kwargs)

    return run


_ENTRIES: Mapping[type, str] = {VelocityNetwork: "velocity", FlowMap: "average_velocity", Teacher: "velocity"}


def entries(unit: nn.Module) -> list[str]:
    """The methods beside ``forward`` by which a unit is evaluated."""
    return [method for kind, method in _ENTRIES.items() if isinstance(unit, kind)]


def evaluate_low(module: nn.Module, kind: str) -> None:
    """Let a module whose weights come in bfloat16 run under autocast, a trained one where the loss does.

    Args:
        module: the module.
        kind: of its device.
    """
    within = set(layers(module))
    for unit in units(module):
        for name in ["forward", *entries(unit)] if unit not in within else ():
            setattr(unit, name, MethodType(functools.partial(_run_low, getattr(unit, name), kind), unit))


def _run_low(method: Callable[..., Any], kind: str, unit: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if unit.training and not torch.is_autocast_enabled(kind):
        raise ConfigError(
            "this objective evaluates the student in float32, as finite differences do: leave parallel.precision "
            "at 'float32'"
        )
    with torch.autocast(kind, torch.bfloat16):
        return method(*args, **kwargs)


def blueprint(modules: Mapping[str, nn.Module]) -> str:
    """A fingerprint of what modules are but for their values: their tensors, and the settings beside them."""
    parts = {
        f"{name}.{part_name}": [
            type(part).__name__,
            *(f"{key} {tuple(v.shape)} {v.dtype} {v.requires_grad}" for key, v in _own(part)),
            *(f"{key} {v!r}" for key, v in sorted(vars(part).items()) if key[0] != "_" and isinstance(v, _SETTINGS)),
        ]
        for name, module in modules.items()
        for part_name, part in module.named_modules()
    }
    return json_fingerprint(parts)


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((key, v) for store in (part._parameters, part._buffers) for key, v in store.items() if v is not None)


_SETTINGS = (bool, int, float, str, tuple, NoneType)


def forget(module: nn.Module) -> None:
    """Free the values of a module that another process will give; it keeps their shapes."""
    _emptied(module, None, scalars=True)


def _emptied(module: nn.Module, frozen: torch.dtype | None, scalars: bool = False) -> dict[str, Tensor]:
    """Take the values out of a module, by name; it keeps their shapes, on the meta device.

    Scalars become vectors of one element, unless they are to stay, and with ``frozen`` float32 becomes that dtype.
    """
    values = dict([*module.named_parameters(), *module.named_buffers()])
    empty: dict[int, Tensor] = {}
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for key, value in store.items():
                if value is None:
                    continue
                if id(value) not in empty:
                    is_parameter = isinstance(value, nn.Parameter)
                    dtype = frozen if frozen is not None and value.dtype == torch.float32 and is_parameter else None
                    shape = value.shape if scalars or not is_parameter else value.shape or (1,)
                    meta = torch.empty(shape, dtype=dtype or value.dtype, device="meta")
                    empty[id(value)] = nn.Parameter(meta, value.requires_grad) if is_parameter else meta
                store[key] = empty[id(value)]  # type: ignore[assignment]
    return values


def _follow_hooks() -> None:
    """Let dual numbers pass the function by which PyTorch learns that the gradients of a layer are there."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction

    @register_rule(RegisterPostBackwardFunction)
    def tangents_of(result: Any, tangents: Sequence[Any], group: Any, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(tangents[1:])

    # Networks here change none of their outputs in place, whose gradients PyTorch would lose.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
