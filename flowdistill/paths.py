"""The linear path between data and noise.

    x_t = (1 - t) x_0 + t n,   n ~ N(0, I),   t in [0, 1],

with conditional velocity n - x_0 and marginal velocity u(x, t) = E[n - x_0 | x_t = x]. Since x_0 and n are
linear in (x_t, u), one of velocity, denoised sample and score gives the others.
"""

from torch import Tensor


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape times (B,) so that they multiply x (B, ...), in the dtype of x."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


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
