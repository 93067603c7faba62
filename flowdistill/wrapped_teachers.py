"""Networks and flow maps made into teachers."""

from __future__ import annotations

from torch import Tensor, nn

from flowdistill.interfaces import Condition, Decoder, FlowMap, Teacher
from flowdistill.networks import VelocityNetwork
from flowdistill.plumbing.errors import ConfigError


class NetworkTeacher(Teacher):
    """A velocity network as a teacher.

    Args:
        network: the network; its parameters are frozen.
        decoder: turns samples into images.
        null_label: whether the network has learnt from dropped labels, see `Teacher`.
    """

    def __init__(self, network: VelocityNetwork, decoder: Decoder | None = None, null_label: bool = True) -> None:
        super().__init__()
        self.decoder, self.null_label = decoder, null_label and network.null_label
        self.network = network.eval().requires_grad_(False)
        self.sample_shape, self.num_classes = network.sample_shape, network.num_classes

    @property
    def backbone(self) -> nn.Module:
        """The network."""
        return self.network

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The network's velocity."""
        return self.network.velocity(x, t, None if condition is None else condition.labels)


class FlowMapTeacher(Teacher):
    """The diagonal u(x, t) = F(x, t, t) of a trained flow map as a teacher.

    Args:
        flow_map: a map that is not anchored; its parameters are frozen.
    """

    def __init__(self, flow_map: FlowMap) -> None:
        super().__init__()
        if not flow_map.has_velocity:
            raise ConfigError("an anchored flow map has no velocity at t < 1 and cannot be a teacher")
        self.flow_map = flow_map.eval().requires_grad_(False)
        self.decoder = flow_map.decoder
        self.sample_shape, self.num_classes = flow_map.sample_shape, flow_map.num_classes

    @property
    def backbone(self) -> nn.Module | None:
        """The flow map's network, if it is the velocity without further embeddings."""
        return self.flow_map.backbone

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The flow map's instantaneous velocity."""
        return self.flow_map.velocity(x, t, condition)
