import torch

from flowdistill import paths
from flowdistill.teachers.gaussian import GaussianTeacher


def test_conversions_agree_with_each_other_and_with_autograd():
    teacher = GaussianTeacher(torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 1.5]).double())
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.linspace(0.1, 1.0, 7, dtype=torch.float64)
    velocity = teacher.velocity(x, t)
    denoised = paths.velocity_to_denoised(x, t, velocity)
    torch.testing.assert_close(paths.denoised_to_velocity(x, t, denoised), velocity)
    variance = (1 - t[:, None]) ** 2 * teacher.variances + t[:, None] ** 2
    score = -(x - (1 - t[:, None]) * teacher.mean) / variance
    torch.testing.assert_close(paths.velocity_to_score(x, t, velocity), score)
    posterior = teacher.mean + (1 - t[:, None]) * teacher.variances / variance * (x - (1 - t[:, None]) * teacher.mean)
    torch.testing.assert_close(denoised, posterior)


def test_interpolation_ends_at_data_and_noise():
    clean, noise = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    assert torch.equal(paths.interpolate(clean, noise, torch.zeros(4)), clean)
    assert torch.equal(paths.interpolate(clean, noise, torch.ones(4)), noise)
