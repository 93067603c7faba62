import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from packaged import packaged

from flowdistill import TIME_SAMPLERS, ConfigError
from flowdistill.interfaces import TimeSampler
from flowdistill.times import Always, EndSampler, Grid, LogitNormal, Uniform, WithPointMass

LAWS = [Uniform(), Uniform(low=0.2, high=0.7), LogitNormal(mean=-0.4, std=1.0), LogitNormal(mean=0.8, std=1.6)]


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", packaged(TIME_SAMPLERS))
def test_every_law_draws_float32_times_in_the_unit_interval(name):
    times = TIME_SAMPLERS.build(name).sample(1000, generator())
    assert times.shape == (1000,)
    assert times.dtype == torch.float32
    assert ((times >= 0) & (times <= 1)).all()
    assert torch.equal(times, TIME_SAMPLERS.build(name).sample(1000, generator()))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_draws_follow_the_distribution_function(law):
    """Kolmogorov-Smirnov distance below 1.95 / sqrt(n), which one law in a thousand exceeds by chance."""
    draws = law.sample(20_000, generator()).sort().values.double()
    empirical = (torch.arange(20_000) + 0.5) / 20_000
    assert (law.cdf(draws) - empirical).abs().max() < 1.95 / 20_000**0.5


@pytest.mark.parametrize("law", LAWS, ids=str)
@given(p=st.floats(0.001, 0.999))
def test_quantile_inverts_the_distribution_function(law, p):
    assert float(law.cdf(law.quantile(torch.tensor([p], dtype=torch.float64)))) == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_draws_below_the_larger_of_two_have_the_law_of_the_smaller(law):
    """MeanFlow's sorted pairs: t = max and s = min of two draws, made from t and a draw conditioned on s <= t."""
    g = generator()
    t = torch.maximum(law.sample(40_000, g), law.sample(40_000, g))
    s = law.sample_below(t, g)
    assert (s <= t).all()
    a, b = law.sample(40_000, g), law.sample(40_000, g)
    levels = torch.linspace(0.05, 0.95, 19)
    for ours, theirs in ((t, torch.maximum(a, b)), (s, torch.minimum(a, b)), (t - s, (a - b).abs())):
        torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.015)


def test_point_mass():
    times = WithPointMass(fraction=0.25).sample(100_000, generator())
    assert float((times == 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert (WithPointMass(fraction=1.0, value=0.3).sample(10, generator()) == 0.3).all()


ENDS = [name for name in packaged(TIME_SAMPLERS) if isinstance(TIME_SAMPLERS.build(name), EndSampler)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENDS)
def test_ends_lie_below_any_time(name, dtype):
    """Of the dtype of t, in [0, t], at the ends of the interval and off every grid as well."""
    t = torch.cat([torch.tensor([0.0, 1.0, 0.5, 1 / 128, 1e-4]), torch.rand(200, generator=generator())]).to(dtype)
    s = TIME_SAMPLERS.build(name).sample_below(t, generator())
    assert s.dtype == dtype
    assert ((s >= 0) & (s <= t)).all()
    assert torch.equal(s, TIME_SAMPLERS.build(name).sample_below(t, generator()))


def test_always():
    assert torch.equal(Always(value=0.3).sample(3, generator()), torch.full((3,), 0.3))
    assert torch.equal(
        Always(value=0.25).sample_below(torch.tensor([1.0, 0.1, 0.25]), generator()), torch.tensor([0.25, 0.1, 0.25])
    )


def shares(values, of):
    """The fraction of the values that equals each of some numbers."""
    found = torch.stack([(values - number).abs() < 1e-6 for number in of])
    assert found.any(0).all()
    return found.float().mean(1).tolist()


@pytest.mark.parametrize("steps", [1, 3, 4, 49])
def test_grid(steps):
    """Starts are the steps' own, all equally likely; so are the ends among the steps below, 0 included."""
    grid = torch.arange(steps + 1) / steps
    t = Grid(steps=steps).sample(50_000, generator())
    assert shares(t, grid[1:]) == pytest.approx([1 / steps] * steps, abs=0.01)
    for k in {1, (steps + 1) // 2, steps}:
        s = Grid(steps=steps).sample_below(torch.full((20_000,), k / steps), generator())
        assert (s < k / steps - 1e-3).all()
        assert shares(s, grid[:k]) == pytest.approx([1 / k] * k, abs=0.015)


def test_grid_from_a_time_between_its_steps():
    s = Grid(steps=4).sample_below(torch.full((20_000,), 0.6), generator())
    assert shares(s, [0.0, 0.25, 0.5]) == pytest.approx([1 / 3] * 3, abs=0.015)


def test_point_mass_below_a_time():
    """The value where it is below t, else t; the other draws are those of the other law below t."""
    law = WithPointMass(value=0.25, fraction=0.4)
    t = torch.full((50_000,), 0.5)
    s = law.sample_below(t, generator())
    assert float((s == 0.25).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(s[s != 0.25].mean()) == pytest.approx(0.25, abs=0.005)
    assert s.max() <= 0.5
    s = law.sample_below(torch.full((50_000,), 0.125), generator())
    assert float((s == 0.125).float().mean()) == pytest.approx(0.4, abs=0.01)


def test_a_law_that_cannot_be_drawn_from_below_a_time():
    class Half(TimeSampler):
        def sample(self, n, generator):
            return torch.full((n,), 0.5)

    with pytest.raises(ConfigError, match="Half"):
        WithPointMass(law=Half()).sample_below(torch.ones(3), generator())


@pytest.mark.parametrize(
    ("law", "kwargs"),
    [
        (Uniform, {"low": 0.7, "high": 0.3}),
        (Uniform, {"low": -0.1}),
        (LogitNormal, {"std": 0.0}),
        (WithPointMass, {"value": 2.0}),
        (Always, {"value": -0.5}),
        (Grid, {"steps": 0}),
    ],
)
def test_wrong_ranges(law, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        law(**kwargs)
