import pytest
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


DATA_STDS = (0.5, 1.0, 2.0)


def pairs(data_std, n=9):
    g = torch.Generator().manual_seed(0)
    clean = data_std * torch.randn(n, 3, generator=g, dtype=torch.float64)
    return clean, torch.randn(n, 3, generator=g, dtype=torch.float64), torch.linspace(0, 1, n, dtype=torch.float64)


@pytest.mark.parametrize("data_std", DATA_STDS)
def test_trigflow_is_the_same_path_in_other_units(data_std):
    clean, noise, t = pairs(data_std)
    x = paths.interpolate(clean, noise, t)
    y, angle = paths.to_trigflow(x, t, data_std)
    wanted = torch.cos(angle)[:, None] * clean + torch.sin(angle)[:, None] * data_std * noise
    torch.testing.assert_close(y, wanted)
    assert float(angle[0]) == 0
    torch.testing.assert_close(float(angle[-1]), torch.pi / 2)
    for got, start in zip(paths.from_trigflow(y, angle, data_std), (x, t), strict=True):
        torch.testing.assert_close(got, start)


@pytest.mark.parametrize("data_std", DATA_STDS)
def test_trigflow_velocity_is_the_derivative_of_its_state(data_std):
    """Along one pair of data and noise; and the same jump to data from either side."""
    clean, noise, t = pairs(data_std)
    x = paths.interpolate(clean, noise, t)
    y, angle = paths.to_trigflow(x, t, data_std)
    got = paths.velocity_to_trigflow(x, t, noise - clean, data_std)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    torch.testing.assert_close(got, cos * data_std * noise - sin * clean)
    torch.testing.assert_close(cos * y - sin * got, clean)


def test_angles_and_times_of_the_literature():
    """Angles from which few-step samplers start or go on, for a unit and a half as the standard deviation."""
    assert abs(float(paths.noise_level_to_time(torch.tensor(80.0))) - 80 / 81) < 1e-6
    for angle, data_std, t in ((1.1, 0.5, 0.4956), (1.5, 1.0, 0.934), (1.0, 1.0, 0.609), (0.6, 1.0, 0.406)):
        _, got = paths.from_trigflow(torch.zeros(1, 2), torch.tensor([angle]), data_std)
        assert abs(float(got) - t) < 1e-3


def test_noise_levels():
    clean, noise, t = pairs(1.0)
    sigma = paths.time_to_noise_level(t[:-1])
    x = paths.interpolate(clean, noise, t)[:-1]
    torch.testing.assert_close(x / (1 - t[:-1, None]), clean[:-1] + sigma[:, None] * noise[:-1])
    torch.testing.assert_close(paths.noise_level_to_time(sigma), t[:-1])
    assert paths.time_to_noise_level(torch.ones(1)).isinf()


@pytest.mark.parametrize("data_std", DATA_STDS)
def test_standard_deviation_of_states(data_std):
    g = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(200_000, 1, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.full((1,), 0.3, dtype=torch.float64)
    states = paths.interpolate(data_std * clean, noise, t.expand(len(clean)))
    assert abs(float(paths.state_std(t, data_std)) / float(states.std()) - 1) < 0.01
