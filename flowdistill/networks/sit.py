"""SiT, the transformer of scalable interpolant transformers (Ma et al. 2024, arXiv 2401.08740)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.networks.attention import attention
from flowdistill.networks.base import VelocityNetwork, check_sizes, widened
from flowdistill.networks.embeddings import LabelEmbedding, ScalarEmbedding, position_table
from flowdistill.networks.linear import Linear
from flowdistill.paths import expand_time, state_std
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_network

SIZES = {
    "s": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "b": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "l": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""The published sizes, as arguments of `SiT`; patches are of 2, 4 or 8."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The tokens x (B, T, D), scaled by 1 + scale and shifted, (B, D) each."""
    return x * (1 + scale[:, None]) + shift[:, None]


QkNorm = Literal["rms"] | bool


class _RmsNorm(nn.Module):
    """Features over their root mean square, times a learned scale if there is one."""

    def __init__(self, size: int, learned: bool = True) -> None:
        super().__init__()
        self.size, self.scale = size, nn.Parameter(torch.ones(size)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """X (..., n size), each ``size`` of whose features are normalised for themselves."""
        groups = x.reshape(*x.shape[:-1], -1, self.size)
        unit = groups * (groups.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (unit if self.scale is None else unit * self.scale).reshape(x.shape)


def _norm(size: int, rms: bool) -> nn.Module:
    return _RmsNorm(size, learned=False) if rms else nn.LayerNorm(size, eps=1e-6, elementwise_affine=False)


def _modulation(size: int, parts: int, rms: bool) -> nn.Sequential:
    """The layer that makes shifts, scales and gates of the conditioning vector."""
    return nn.Sequential(nn.SiLU(), Linear(size, parts * size), *([_RmsNorm(size, learned=False)] if rms else []))


_NORMS: dict[QkNorm, Callable[[int], nn.Module]] = {False: nn.Identity, True: nn.LayerNorm, "rms": _RmsNorm}


class _Attention(nn.Module):
    def __init__(self, size: int, heads: int, qk_norm: QkNorm) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(size, 3 * size)
        self.q_norm, self.k_norm = (_NORMS[qk_norm](size // heads) for _ in range(2))
        self.proj = Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, size = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, size // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = attention(self.q_norm(q), self.k_norm(k), v)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, tokens, size))
        return projected


class _Mlp(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(size, hidden), Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return projected


class _Block(nn.Module):
    """Attention and perceptron, each modulated and gated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, size: int, heads: int, mlp_ratio: float, qk_norm: QkNorm, rms_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(size, rms_norm), _norm(size, rms_norm)
        self.attn = _Attention(size, heads, qk_norm)
        self.mlp = _Mlp(size, int(size * mlp_ratio))
        self.adaLN_modulation = _modulation(size, 6, rms_norm)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        result: Tensor = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return result


class _FinalLayer(nn.Module):
    def __init__(self, size: int, out: int, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = _norm(size, rms_norm)
        self.linear = Linear(size, out)
        self.adaLN_modulation = _modulation(size, 2, rms_norm)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        projected: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return projected


class _PatchEmbedding(nn.Module):
    def __init__(self, patch_size: int, channels: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


@register_network("sit")
class SiT(VelocityNetwork):
    """SiT on square images or latents (C, input_size, input_size).

    `forward` is the authors' function of their own time (t = 1 is data) and sign (data - noise), under their state-dict
    names; `velocity` is this library's. REPA (Yu et al. 2024, arXiv 2410.06940) trains the same network with the time
    and the sign of this library, without ``learn_sigma``. A fresh network outputs exactly 0.

    Args:
        input_size: height and width of the input.
        patch_size: height and width of a patch; divides ``input_size``.
        in_channels: channels of the input.
        hidden_size: size of a token; divisible by 4 and by ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden size of the perceptrons over ``hidden_size``.
        num_classes: number of classes.
        learn_sigma: output twice the channels, of which the second half is dropped, as in the published weights.
        qk_norm: normalise queries and keys of each head, by a layer norm, or by the root mean square ("rms").
        noise_time: the time of the noise in `forward`, 0 (SiT) or 1 (REPA).
        time_factor: of times and durations before they are embedded.
        rms_norm: normalise by the root mean square in place of the mean and the deviation, and each shift, scale and
            gate too.
        unit_input: divide x by sqrt((1 - t)^2 + t^2), the deviation of a state whose data have unit variance.
        null_label: whether the table of labels has a row for no class; without one there is no classifier-free
            guidance.

    Raises:
        ConfigError: sizes that do not divide as they must, or are not positive.

    Examples:
        >>> net = SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10)
        >>> net.velocity(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, -1])).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        qk_norm: QkNorm = False,
        noise_time: Literal[0, 1] = 0,
        null_label: bool = True,
        time_factor: float = 1.0,
        unit_input: bool = False,
        rms_norm: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        if input_size % patch_size:
            raise ConfigError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(f"hidden_size {hidden_size} is not divisible by 4 and by num_heads {num_heads}")
        self.sample_shape = (in_channels, input_size, input_size)
        self.num_classes, self.null_label = num_classes, null_label
        self.embedding_size = hidden_size
        self.patch_size, self.learn_sigma, self.noise_time = patch_size, learn_sigma, noise_time
        self.time_factor, self.unit_input, self.only_embeds_time = time_factor, unit_input, not unit_input
        self.early_blocks = round(depth * 2 / 3)
        self.x_embedder = _PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = ScalarEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size, null_label)
        table = position_table(input_size // patch_size, hidden_size)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, mlp_ratio, qk_norm, rms_norm) for _ in range(depth))
        out_channels = 2 * in_channels if learn_sigma else in_channels
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * out_channels, rms_norm)
        self._initialize()

    def _initialize(self) -> None:
        for block in self.blocks:
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
        assert patches.bias is not None
        nn.init.zeros_(patches.bias)
        modulations = [m for name, m in self.named_modules() if name.endswith("adaLN_modulation.1")]
        for layer in (*modulations, self.final_layer.linear):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    @property
    def layer_modules(self) -> list[nn.Module]:
        """The transformer's blocks."""
        return list(self.blocks)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all parameters but the position table, which is never trained."""
        super().requires_grad_(requires_grad)
        self.pos_embed.requires_grad_(False)
        return self

    def _output(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        constant = self.y_embedder(labels)
        if embedding is not None:
            constant = constant + embedding
        early = late = self.t_embedder(t) + constant
        if late_time is not None:
            late = self.t_embedder(late_time) + constant
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, early if i < self.early_blocks else late)
        patches = self.final_layer(tokens, late)
        grid, p = x.shape[-1] // self.patch_size, self.patch_size
        image: Tensor = patches.reshape(x.shape[0], grid, grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        image = image.reshape(x.shape[0], -1, *x.shape[-2:])
        return image[:, : x.shape[1]] if self.learn_sigma else image

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The authors' velocity: x (B, C, H, W) at their time t (B,), labels y (B,) with num_classes for none."""
        return self._output(x, t, y)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        """u(x, t) = -forward(x, 1 - t), or forward(x, t) where the authors' noise is at 1.

        ``embedding`` is added to the vector that conditions the blocks.
        """
        if labels is None:
            labels = torch.full((x.shape[0],), self.num_classes or 0, device=x.device)
        if self.unit_input:
            x = x / expand_time(state_std(t, 1.0), x)
        late = None if late_time is None else self.own_time(late_time)
        output = self._output(x, self.own_time(t), labels, embedding, late)
        return output if self.noise_time == 1 else -output

    def own_time(self, t: Tensor) -> Tensor:
        """See `VelocityNetwork.own_time`."""
        return super().own_time(t if self.noise_time == 1 else 1 - t)

    def widen_output(self, velocities: int, extra: int = 0) -> None:
        """See `VelocityNetwork.widen_output`; the half that ``learn_sigma`` drops is not kept."""
        kept, linear = self.sample_shape[0], self.final_layer.linear
        channels = linear.out_features // self.patch_size**2
        self.final_layer.linear = widened(linear, channels, kept, velocities, extra)
        self.learn_sigma = False
