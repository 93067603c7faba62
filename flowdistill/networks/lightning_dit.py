"""LightningDiT, a SiT with rotary positions and gated perceptrons (Yao et al. 2025, arXiv 2501.01423)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.attention import attention
from flowdistill.networks.base import check_sizes
from flowdistill.networks.imf import RmsNorm, rotated
from flowdistill.networks.linear import Linear
from flowdistill.networks.sit import SiT, modulate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_network


def rotated_in_the_plane(x: Tensor) -> Tensor:
    """Rotary positions of a square of tokens: half of x (..., tokens, size) tells the row, and half the column.

    Examples:
        >>> x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(4, 4)
        >>> rotated_in_the_plane(x)[1]  # row 0, column 1
        tensor([1.0000, 0.0000, 0.5403, 0.8415])
    """
    side = math.isqrt(x.shape[-2])
    rows, columns = x.reshape(*x.shape[:-2], side, side, -1).chunk(2, dim=-1)
    turned = [rotated(rows.transpose(-2, -3)).transpose(-2, -3), rotated(columns)]
    return torch.cat(turned, dim=-1).flatten(-3, -2)


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(size, 3 * size), Linear(size, size)
        self.q_norm, self.k_norm = RmsNorm(size // heads), RmsNorm(size // heads)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = attention(rotated_in_the_plane(self.q_norm(q)), rotated_in_the_plane(self.k_norm(k)), v)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class _Mlp(nn.Module):
    """SwiGLU: w3(silu(first half of w12 x) second half)."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = Linear(size, 2 * hidden), Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        projected: Tensor = self.w3(F.silu(gate) * value)
        return projected


class _Block(nn.Module):
    def __init__(self, size: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(size), RmsNorm(size)
        self.attn, self.mlp = _Attention(size, heads), _Mlp(size, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        result: Tensor = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return result


class _FinalLayer(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.norm_final, self.linear = RmsNorm(size), Linear(size, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(size, 2 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        projected: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return projected


@register_network("lightning_dit")
class LightningDiT(SiT):
    """LightningDiT on square latents: a SiT with learned norms by the root mean square, rotary positions, and SwiGLU.

    State-dict names are its authors'. Their noise is at the time 0, and their output is data - noise.

    Args:
        input_size: height and width of the input.
        patch_size: height and width of a patch.
        in_channels: channels of the input.
        hidden_size: size of a token; divisible by 4 ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden size of the perceptrons over ``hidden_size``, before the third that the gate costs.
        num_classes: number of classes.
        null_label: whether the table of labels has a row for no class.
        expanded: whether the times of velocities lie beyond those of jumps, as FACM counts: the network sees 1 + t of a
            velocity at t, and 1 - t of a jump to data, which `NetworkFlowMap` asks for by the time -t.

    Raises:
        ConfigError: sizes that do not divide as they must, or are not positive.

    Examples:
        >>> net = LightningDiT(input_size=4, in_channels=8, hidden_size=32, depth=2, num_heads=2)
        >>> net.velocity(torch.randn(3, 8, 4, 4), torch.rand(3), torch.tensor([1, 2, -1])).shape
        torch.Size([3, 8, 4, 4])
    """

    def __init__(
        self,
        input_size: int = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_label: bool = True,
        expanded: bool = False,
    ) -> None:
        check_sizes(depth=depth, num_heads=num_heads)
        if hidden_size % (4 * num_heads):
            raise ConfigError(f"hidden_size {hidden_size} is not divisible by 4 times num_heads {num_heads}")
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, 0, num_heads,
            num_classes=num_classes, null_label=null_label, learn_sigma=False,
        )  # fmt: skip
        self.expanded, self.early_blocks = expanded, round(depth * 2 / 3)
        hidden = int(2 / 3 * mlp_ratio * hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, hidden) for _ in range(depth))
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * in_channels)  # type: ignore[assignment]
        self._initialize()

    def own_time(self, t: Tensor) -> Tensor:
        """See `VelocityNetwork.own_time`."""
        return 1 + t if self.expanded else super().own_time(t)
