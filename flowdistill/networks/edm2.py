"""EDM2, the magnitude-preserving U-Net of Karras et al. 2024 (arXiv 2312.02696)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.attention import attention
from flowdistill.networks.base import VelocityNetwork, check_sizes
from flowdistill.networks.forced_weight import ForcedWeight
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_network

SIZES = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
"""``model_channels`` of the published networks; everything else is the default of `EDM2`."""

_LABEL_BALANCE = _CONCAT_BALANCE = 0.5
_RESIDUAL_BALANCE = _ATTENTION_BALANCE = 0.3
_LARGEST_ACTIVATION = 256.0


def normalize(x: Tensor, dim: Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """X over eps + its root mean square along some dimensions, by default all but the first."""
    dims = list(range(1, x.ndim)) if dim is None else list(dim)
    dtype = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return x / (eps + length * math.sqrt(1 / math.prod(x.shape[d] for d in dims))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over the root mean square of its output for normal inputs, 0.596 (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The weighted sum (1 - t) a + t b, scaled to the magnitude of uncorrelated a and b (equation 88)."""
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and of b, scaled such that b contributes by t whatever their numbers (equation 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


def resample(x: Tensor, direction: str | None, kernel: Sequence[float] = (1, 1)) -> Tensor:
    """Halve ("down") or double ("up") height and width by a separable filter; None leaves x as it is."""
    if direction is None:
        return x
    if tuple(kernel) == (1, 1):  # the published filter, by faster means
        return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2)
    line = torch.tensor(kernel, dtype=x.dtype, device=x.device)
    weight = (line.outer(line) / line.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    padding = (len(kernel) - 1) // 2
    if direction == "down":
        return F.conv2d(x, weight, groups=x.shape[1], stride=2, padding=padding)
    return F.conv_transpose2d(x, 4 * weight, groups=x.shape[1], stride=2, padding=padding)


class MPFourier(nn.Module):
    """sqrt(2) cos(f_k v + p_k) of a scalar v, with fixed random frequencies and phases (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(size))
        self.register_buffer("phases", 2 * math.pi * torch.rand(size))

    def forward(self, value: Tensor) -> Tensor:
        """Features (B, size) of scalars (B,)."""
        angles = value.to(self.freqs.dtype)[:, None] * self.freqs + self.phases
        return math.sqrt(2) * angles.cos()


class MPConv(ForcedWeight):
    """A convolution (or, without a kernel, a linear layer) of which only the directions of the weights count.

    Each output's weights are scaled to unit length (equation 47), so that the layer preserves magnitudes. In training
    mode the stored weights are replaced by the scaled ones, once after each change (forced weight normalisation,
    equation 66): a parameter that grew would turn ever more slowly.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self._normalized_version = -1
        self._frozen: dict[tuple[torch.device, torch.dtype], Tensor] | None = None

    def replace_weight(self) -> None:
        """Store the scaled weights, in training mode and where they have changed."""
        compiling = torch.compiler.is_compiling()  # a compiler cannot tell, and scales them each time
        if not self.training:
            return
        if compiling or self.weight._version != self._normalized_version:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))
            if not compiling:
                self._normalized_version = self.weight._version

    def freeze(self) -> None:
        """Scale the weights once for all calls, each with the same gain."""
        self._frozen = {}

    def __getstate__(self) -> dict[str, Any]:
        """The attributes of a copy, which may be trained."""
        return {**self.__dict__, "_frozen": None}

    def _scaled(self, dtype: torch.dtype, gain: Tensor | float) -> Tensor:
        """The scaled weights times ``gain``, in a dtype."""
        key = (self.weight.device, dtype)
        if self._frozen is not None and key in self._frozen:
            return self._frozen[key]
        weight = (normalize(self.weight) * (gain / math.sqrt(self.weight[0].numel()))).to(dtype)
        if self._frozen is None or weight.requires_grad or torch.compiler.is_compiling():
            return weight
        # What is made within a transformation or in inference mode is of no use outside.
        if not (torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active()):
            self._frozen[key] = weight
        return weight

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """The layer's output times ``gain``, in the dtype of x."""
        if not self.replaced_before:
            self.replace_weight()
        weight = self._scaled(x.dtype, gain)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class _Block(nn.Module):
    """A residual block, with attention if it has heads; the two flavours differ in where a change of width comes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_size: int,
        *,
        decoder: bool,
        heads: int = 0,
        direction: str | None = None,
        kernel: Sequence[float] = (1, 1),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.decoder, self.heads, self.direction, self.kernel = decoder, heads, direction, kernel
        self.dropout = dropout
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(embedding_size, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = resample(x, self.direction, self.kernel)
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), dim=[1])
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(embedding, self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, _RESIDUAL_BALANCE)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), _ATTENTION_BALANCE)
        return x.clamp(-_LARGEST_ACTIVATION, _LARGEST_ACTIVATION)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Cosine attention over the pixels; output channels of ``qkv`` are ordered (head, channel, q|k|v)."""
        batch, channels, height, width = qkv.shape
        parts = qkv.reshape(batch, self.heads, channels // (3 * self.heads), 3, height * width)
        # Fused kernels want the channels of a head next to each other.
        q, k, v = normalize(parts, dim=[2]).transpose(2, 4).contiguous().unbind(3)
        attended = attention(q, k, v)
        return attended.transpose(2, 3).reshape(batch, channels // 3, height, width)


class _UNet(nn.Module):
    """The raw network F of the preconditioner."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_noise: int | None,
        channel_mult_emb: int | None,
        num_blocks: int,
        attn_resolutions: Sequence[int],
        channels_per_head: int,
        resample_filter: Sequence[float],
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        noise_size = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        self.embedding_size = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(noise_size)
        self.emb_noise = MPConv(noise_size, self.embedding_size)
        self.emb_label = MPConv(label_dim, self.embedding_size) if label_dim else None

        def block(
            n_in: int, n_out: int, decoder: bool, attention: bool = False, direction: str | None = None
        ) -> _Block:
            return _Block(
                n_in,
                n_out,
                self.embedding_size,
                decoder=decoder,
                heads=n_out // channels_per_head if attention else 0,
                direction=direction,
                kernel=resample_filter,
                dropout=dropout,
            )

        self.enc = nn.ModuleDict()
        width, skips = img_channels + 1, []
        for level, n in enumerate(widths):
            resolution = img_resolution >> level
            name, attention = f"{resolution}x{resolution}", resolution in attn_resolutions
            if level == 0:
                self.enc[f"{name}_conv"] = MPConv(width, n, (3, 3))
                width = n
            else:
                self.enc[f"{name}_down"] = block(width, width, decoder=False, direction="down")
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(width, n, decoder=False, attention=attention)
                width = n
                skips.append(width)
        self.dec = nn.ModuleDict()
        for level, n in reversed(list(enumerate(widths))):
            resolution = img_resolution >> level
            name, attention = f"{resolution}x{resolution}", resolution in attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(width, width, decoder=True, attention=True)
                self.dec[f"{name}_in1"] = block(width, width, decoder=True)
            else:
                self.dec[f"{name}_up"] = block(width, width, decoder=True, direction="up")
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = block(width + skips.pop(), n, decoder=True, attention=attention)
                width = n
        self.out_conv = MPConv(width, img_channels, (3, 3))

    def embed(self, c_noise: Tensor, labels: Tensor | None, embedding: Tensor | None) -> Tensor:
        """The vector that conditions the blocks, from noise levels (B,), labels (B, label_dim), and what is added."""
        result = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            labels = labels.to(result.dtype) * math.sqrt(labels.shape[1])
            result = mp_sum(result, self.emb_label(labels), _LABEL_BALANCE)
        return mp_silu(result if embedding is None else result + embedding)

    def forward(self, x: Tensor, early: Tensor, late: Tensor, early_blocks: int) -> Tensor:
        """The output for x (B, C, H, W); the first ``early_blocks`` blocks see ``early``, the others ``late``."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions: a tenth of a step on a CPU
        skips = []
        for i, (name, layer) in enumerate(self.enc.items()):
            x = layer(x) if name.endswith("_conv") else layer(x, early if i <= early_blocks else late)
            skips.append(x)
        for i, (name, layer) in enumerate(self.dec.items(), len(self.enc)):
            if "_block" in name:
                x = mp_cat(x, skips.pop(), _CONCAT_BALANCE)
            x = layer(x, early if i <= early_blocks else late)
        result: Tensor = self.out_conv(x, self.out_gain)
        return result


@register_network("edm2")
class EDM2(VelocityNetwork):
    """EDM2 with its preconditioner, on square images or latents (C, img_resolution, img_resolution).

    The authors' denoiser of z = y + sigma n, with the preconditioner of EDM (Karras et al. 2022, arXiv 2206.00364),

        D(z; sigma) = sd^2/(sigma^2 + sd^2) z + sigma sd/sqrt(sigma^2 + sd^2) F(z/sqrt(sigma^2 + sd^2), ln(sigma)/4),

    is `denoise`, under their state-dict names. `velocity` is the same network on this library's linear path of
    x_0 = y/S, with S = ``data_scale`` and sigma = S t/(1 - t). With k = sd/S and r^2 = k^2 (1 - t)^2 + t^2,

        u(x, t) = (t - k^2 (1 - t))/r^2 x - k/r F(x/r, ln(sigma)/4),

    which divides by neither t nor 1 - t. Only the noise level that F is told is cut to the range in which the authors
    use it: outside, its derivative by way of the noise level is 0, and u goes on to both ends. A fresh network has
    F = 0.

    Args:
        img_resolution: height and width.
        img_channels: channels of the input.
        label_dim: number of classes; 0 for an unconditional network.
        model_channels: width of the first level; `SIZES` has the published ones.
        channel_mult: width of each level over ``model_channels``.
        channel_mult_noise: size of the noise level's features over ``model_channels``; None is the first level's width.
        channel_mult_emb: size of the embedding over ``model_channels``; None is the largest width.
        num_blocks: blocks of each level of the encoder; the decoder has one more.
        attn_resolutions: resolutions at which blocks attend.
        channels_per_head: of attention. A block narrower than this has no heads, hence no attention, as in the
            authors' code.
        sigma_data: standard deviation sd of the data y.
        logvar_channels: features of `log_variance`.
        resample_filter: of the changes of resolution.
        dropout: in training mode. The authors use 0.1 from size m on, and 0 below.
        use_fp16: evaluate F in float16 on a GPU, as the authors do.
        data_scale: S, the unit in which `velocity` sees the data; None is ``sigma_data``, for which x_0 has unit
            variance.
        noise_levels: smallest and largest noise level that F is told by `velocity`.

    Raises:
        ConfigError: a resolution that cannot be halved as often as there are levels.

    Examples:
        >>> net = EDM2(8, img_channels=1, label_dim=10, model_channels=8, channel_mult=(1, 2), num_blocks=1)
        >>> net.velocity(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 2, -1])).shape
        torch.Size([3, 1, 8, 8])
        >>> z, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 80.0])
        >>> net.denoise(z, sigma).shape, net.log_variance(sigma).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 1, 1]))
    """

    only_embeds_time = False

    def __init__(
        self,
        img_resolution: int = 64,
        img_channels: int = 4,
        label_dim: int = 1000,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        resample_filter: Sequence[float] = (1, 1),
        dropout: float = 0.0,
        use_fp16: bool = False,
        data_scale: float | None = None,
        noise_levels: tuple[float, float] = (0.002, 80.0),
    ) -> None:
        super().__init__()
        check_sizes(
            img_resolution=img_resolution,
            img_channels=img_channels,
            label_dim=label_dim or None,
            model_channels=model_channels,
            num_blocks=num_blocks,
            channels_per_head=channels_per_head,
            logvar_channels=logvar_channels,
        )
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ConfigError(f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        self.sample_shape = (img_channels, img_resolution, img_resolution)
        self.num_classes = label_dim or None
        self.sigma_data, self.noise_levels, self.use_fp16 = sigma_data, noise_levels, use_fp16
        self.data_scale = sigma_data if data_scale is None else data_scale
        self.unet = _UNet(
            img_resolution,
            img_channels,
            label_dim,
            model_channels,
            channel_mult,
            channel_mult_noise,
            channel_mult_emb,
            num_blocks,
            attn_resolutions,
            channels_per_head,
            resample_filter,
            dropout,
        )
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)
        self.embedding_size = self.unet.embedding_size
        self.early_blocks = len(self.unet.enc) - 1

    @property
    def layer_modules(self) -> list[nn.Module]:
        """The blocks of encoder and decoder."""
        return [*self.unet.enc.values(), *self.unet.dec.values()]

    def _raw(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None,
        embedding: Tensor | None = None,
        late_c_noise: Tensor | None = None,
    ) -> Tensor:
        """F for an input of unit variance, in the dtype of x."""
        dtype = self.unet.out_gain.dtype
        if labels is None and self.num_classes is not None:
            labels = x.new_zeros(x.shape[0], self.num_classes)
        early = late = self.unet.embed(c_noise, labels, embedding)
        if late_c_noise is not None:
            late = self.unet.embed(late_c_noise, labels, embedding)
        inner = torch.float16 if self.use_fp16 and x.is_cuda else dtype
        result: Tensor = self.unet(x.to(inner), early, late, self.early_blocks)
        return result.to(x.dtype)

    def denoise(self, z: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The authors' D(z; sigma), an estimate of E[y | z].

        Args:
            z: data plus noise of standard deviation sigma, (B, C, H, W).
            sigma: noise levels, a scalar or (B,), positive.
            class_labels: one-hot rows (B, label_dim), a row of zeros for no class; None is no class for all.
        """
        sigma = sigma.reshape(-1).expand(len(z))
        total = sigma.square() + self.sigma_data**2
        raw = self._raw(z / expand_time(total.sqrt(), z), sigma.log() / 4, class_labels)
        skip, out = self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt()
        return expand_time(skip, z) * z + expand_time(out, z) * raw

    def log_variance(self, sigma: Tensor) -> Tensor:
        """The authors' uncertainty u(sigma), (B, 1, 1, 1), by which they weight the loss at noise levels (B,).

        Their loss is the mean of lambda/exp(u) (D - y)^2 + u with lambda = (sigma^2 + sd^2)/(sigma sd)^2.
        """
        features = self.logvar_fourier(sigma.reshape(-1).log() / 4)
        result: Tensor = self.logvar_linear(features)
        return result.reshape(-1, 1, 1, 1)

    def _c_noise(self, t: Tensor) -> Tensor:
        low, high = (sigma / (sigma + self.data_scale) for sigma in self.noise_levels)
        t = t.clamp(low, high)
        return (math.log(self.data_scale) + t.log() - torch.log1p(-t)) / 4

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        """u(x, t), with ``embedding`` added to the vector that conditions the blocks."""
        one_hot = None
        if labels is not None and self.num_classes is not None:
            one_hot = (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).to(x.dtype)
        k = self.sigma_data / self.data_scale
        r = (k**2 * (1 - t).square() + t.square()).sqrt()
        late = None if late_time is None else self._c_noise(late_time)
        raw = self._raw(x / expand_time(r, x), self._c_noise(t), one_hot, embedding, late)
        skip, out = expand_time((t - k**2 * (1 - t)) / r.square(), x), expand_time(k / r, x)
        if self._velocities == 1:
            return skip * x - out * raw
        count = self._velocities * x.shape[1]
        velocities = skip * x.repeat(1, self._velocities, 1, 1) - out * raw[:, :count]
        return torch.cat([velocities, raw[:, count:]], dim=1)

    _velocities: int = 1

    def widen_output(self, velocities: int, extra: int = 0) -> None:
        """See `VelocityNetwork.widen_output`; each output has a gain of its own, 0 for the further channels."""
        weight, gain = self.unet.out_conv.weight.detach(), self.unet.out_gain.detach()
        count = velocities * len(weight)
        wide = MPConv(weight.shape[1], count + extra, weight.shape[2:]).to(weight)
        wide.weight.data[:count] = weight.repeat(velocities, 1, 1, 1)
        gains = torch.cat([gain.expand(count), gain.new_zeros(extra)])
        self.unet.out_conv, self.unet.out_gain = wide, nn.Parameter(gains.reshape(-1, 1, 1, 1))
        self._velocities = velocities
