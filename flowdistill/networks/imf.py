"""The transformer of improved MeanFlow's students, conditioned by tokens (Geng et al. 2025, arXiv 2512.02012)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.attention import attention
from flowdistill.networks.base import check_sizes
from flowdistill.networks.embeddings import LabelEmbedding, ScalarEmbedding
from flowdistill.networks.linear import Linear
from flowdistill.plumbing.errors import ConfigError


class RmsNorm(nn.Module):
    """Features over their root mean square, times a learned weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., size), normalised."""
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: of token i of x (..., tokens, size) the pair k of neighbours is turned by i 10000^(-2k/size).

    Examples:
        >>> rotated(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    tokens, size = x.shape[-2:]
    steps = torch.arange(size // 2, device=x.device, dtype=torch.float32)
    angles = torch.arange(tokens, device=x.device)[:, None] * torch.exp(steps * (-2 * math.log(10000.0) / size))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(size, size, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = RmsNorm(size // heads), RmsNorm(size // heads)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for p in projections)
        attended = attention(rotated(self.q_norm(q)), rotated(self.k_norm(k)), v)
        projected: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return projected


class _Mlp(nn.Module):
    """SwiGLU: w2(silu(w1 x) w3 x)."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = Linear(size, hidden, bias=False), Linear(size, hidden, bias=False)
        self.w2 = Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return projected


class _Block(nn.Module):
    def __init__(self, size: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(size), RmsNorm(size)
        self.attn, self.mlp = _Attention(size, heads), _Mlp(size, hidden)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_scale * self.attn(self.norm1(x))
        result: Tensor = x + self.mlp_scale * self.mlp(self.norm2(x))
        return result


class _PatchEmbedding(nn.Module):
    def __init__(self, patch_size: int, channels: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class _FinalLayer(nn.Module):
    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.norm, self.linear = RmsNorm(size), Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.linear(self.norm(x))
        return projected


class IMFTransformer(nn.Module):
    """U(x, t - s, omega, interval, label): average velocities of improved MeanFlow, with the noise at t = 1.

    Learned tokens, to which embeddings are added, stand before the patches: of the label, of omega = 1 - 1/gamma, of
    the two ends of the guidance interval, and of the duration. The time t itself is not seen.

    Args:
        input_size: height and width of the input.
        patch_size: height and width of a patch.
        in_channels: channels of the input.
        hidden_size: size of a token.
        shared_depth: blocks that the head of v shared in training.
        head_depth: blocks of the head of u, which follow.
        num_heads: attention heads.
        mlp_size: hidden size of the perceptrons.
        num_classes: number of classes; the table has one row more, for none.
        tokens: how many there are for the label, for omega, for each end of the interval, and for the duration.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        shared_depth: int,
        head_depth: int,
        num_heads: int,
        mlp_size: int,
        num_classes: int,
        tokens: tuple[int, int, int, int] = (8, 4, 2, 4),
    ) -> None:
        super().__init__()
        check_sizes(input_size=input_size, patch_size=patch_size, hidden_size=hidden_size, num_heads=num_heads)
        if input_size % patch_size or hidden_size % (2 * num_heads):
            raise ConfigError("patch_size must divide input_size, and twice num_heads hidden_size")
        self.patch_size, self.num_classes = patch_size, num_classes
        self.x_embedder = _PatchEmbedding(patch_size, in_channels, hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        self.h_embedder, self.omega_embedder = ScalarEmbedding(hidden_size), ScalarEmbedding(hidden_size)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = ScalarEmbedding(hidden_size), ScalarEmbedding(hidden_size)
        label, omega, end, time = tokens
        for name, count in (("class", label), ("omega", omega), ("t_min", end), ("t_max", end), ("time", time)):
            setattr(self, f"{name}_tokens", nn.Parameter(0.02 * torch.randn(count, hidden_size)))
        self.shared_blocks, self.u_heads = (
            nn.ModuleList(_Block(hidden_size, num_heads, mlp_size) for _ in range(depth))
            for depth in (shared_depth, head_depth)
        )
        self.u_final_layer = _FinalLayer(hidden_size, patch_size**2 * in_channels)

    def forward(self, x: Tensor, duration: Tensor, omega: Tensor, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
        """The average velocity (B, C, H, W); all conditions are of shape (B,)."""
        prefix = [
            self.class_tokens + self.y_embedder(labels)[:, None],
            self.omega_tokens + self.omega_embedder(omega)[:, None],
            self.t_min_tokens + self.cfg_t_start_embedder(low)[:, None],
            self.t_max_tokens + self.cfg_t_end_embedder(high)[:, None],
            self.time_tokens + self.h_embedder(duration)[:, None],
        ]
        patches = self.x_embedder(x)
        tokens = torch.cat([*prefix, patches], dim=1)
        for block in (*self.shared_blocks, *self.u_heads):
            tokens = block(tokens)
        grid, p = x.shape[-1] // self.patch_size, self.patch_size
        image: Tensor = self.u_final_layer(tokens[:, -patches.shape[1] :])
        return image.reshape(x.shape[0], grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
