"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from flowdistill.networks.base import check_sizes
from flowdistill.networks.linear import Linear
from flowdistill.plumbing.errors import ConfigError

_M = TypeVar("_M", bound=nn.Module)


class LoRALinear(nn.Module):
    """A frozen linear layer W plus a trainable update of low rank, (W + B A) x, with B = 0 at the start.

    Args:
        base: the layer to adapt.
        rank: of the update.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = Linear(base.in_features, rank, bias=False, **factory)
        self.up = Linear(rank, base.out_features, bias=False, **factory)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def add_lora(module: _M, rank: int) -> _M:
    """Freeze a module and give each of its linear layers a trainable update of low rank, in place.

    The function that the module computes is unchanged at first.

    Raises:
        ConfigError: the module has no linear layer, as a U-Net of convolutions, or the rank is not positive.

    Examples:
        >>> net = add_lora(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), rank=2)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['0.down.weight', '0.up.weight']
    """
    check_sizes(rank=rank)
    if not any(isinstance(child, nn.Linear) for child in module.modules()):
        raise ConfigError(
            f"{type(module).__name__} has no linear layers to update: train the whole copy (lora_rank = 0)"
        )
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(parent, LoRALinear):
                setattr(parent, name, LoRALinear(child, rank))
    return module
