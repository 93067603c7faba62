"""The linear path between data and noise.

    x_t = (1 - t) x_0 + t n,   n ~ N(0, I),   t in [0, 1],

with conditional velocity n - x_0 and marginal velocity u(x, t) = E[n - x_0 | x_t = x]. Since x_0 and n are
linear in (x_t, u), one of velocity, denoised sample and score gives the others.

Other paths differ by the scale of their states and by what they call time. For data of standard deviation sd:

    EDM       y = x_0 + sigma n              y = x_t / (1 - t)    sigma = t / (1 - t)
    TrigFlow  y = cos(a) x_0 + sin(a) sd n   y = x_t sd / S_t     tan(a) = t / ((1 - t) sd)

with S_t = sqrt((1 - t)^2 sd^2 + t^2), the standard deviation of x_t.
"""

import torch
from torch import Tensor


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) so that they multiply x (B, ...), in the dtype of x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def shifted(t: Tensor, shift: float) -> Tensor:
    """The time m t/(1 + (m - 1) t), by which m > 1 gives more of the steps to high noise; 1/m inverts it."""
    return shift * t / (1 + (shift - 1) * t)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The state x_t = (1 - t) x_0 + t n of the linear path at times t (B,)."""
    t = expand_time(t, clean)
    return (1 - t) * clean + t * noise


def velocity_to_denoised(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """E[x_0 | x_t = x] = x - t u(x, t)."""
    return x - expand_time(t, x) * velocity


def denoised_to_velocity(x: Tensor, t: Tensor, denoised: Tensor) -> Tensor:
    """u(x, t) = (x - E[x_0 | x_t = x]) / t, for t > 0."""
    return (x - denoised) / expand_time(t, x)


def velocity_to_score(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """The score of the marginal, -(x + (1 - t) u(x, t)) / t, for t > 0."""
    t = expand_time(t, x)
    return -(x + (1 - t) * velocity) / t


def time_to_noise_level(t: Tensor) -> Tensor:
    """EDM's sigma = t / (1 - t), infinite at t = 1."""
    return t / (1 - t)


def noise_level_to_time(sigma: Tensor) -> Tensor:
    """T = sigma / (1 + sigma) of EDM's sigma >= 0."""
    return sigma / (1 + sigma)


def state_std(t: Tensor, data_std: float) -> Tensor:
    """S_t = sqrt((1 - t)^2 sd^2 + t^2), the standard deviation of x_t for data of standard deviation sd."""
    return ((1 - t).square() * data_std**2 + t.square()).sqrt()


def to_trigflow(x: Tensor, t: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    """TrigFlow's state x sd / S_t and angle atan2(t, (1 - t) sd) in [0, pi/2]."""
    return x * expand_time(data_std / state_std(t, data_std), x), torch.atan2(t, (1 - t) * data_std)


def from_trigflow(x: Tensor, angle: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    """The inverse of `to_trigflow`: x / c and t = sd sin(angle) / c, with c = cos(angle) + sd sin(angle)."""
    scale = torch.cos(angle) + data_std * torch.sin(angle)
    return x / expand_time(scale, x), data_std * torch.sin(angle) / scale


def velocity_to_trigflow(x: Tensor, t: Tensor, velocity: Tensor, data_std: float) -> Tensor:
    """The derivative of TrigFlow's state with respect to its angle, S_t u - S_t' x, where dx/dt = u at (x, t).

    An average velocity F(x, t, 0) in place of u gives sd times TrigFlow's network, for which the jump to data is
    cos(angle) y - sin(angle) sd network.
    """
    std = state_std(t, data_std)
    rate = (t - (1 - t) * data_std**2) / std
    return expand_time(std, x) * velocity - expand_time(rate, x) * x
