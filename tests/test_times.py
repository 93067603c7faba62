import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flowdistill import TIME_SAMPLERS
from flowdistill.times import LogitNormal, Maximum, Uniform, WithPointMass

LAWS = [Uniform(), Uniform(low=0.2, high=0.7), LogitNormal(mean=-0.4, std=1.0), LogitNormal(mean=0.8, std=1.6)]


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", TIME_SAMPLERS.names())
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
    t = Maximum(law=law).sample(40_000, g)
    s = law.sample_below(t, g)
    assert (s <= t).all()
    a, b = law.sample(40_000, g), law.sample(40_000, g)
    levels = torch.linspace(0.05, 0.95, 19)
    for ours, theirs in ((t, torch.maximum(a, b)), (s, torch.minimum(a, b)), (t - s, (a - b).abs())):
        torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.015)


def test_logit_normal_quantiles_of_meanflow():
    """The quantiles of t that the MeanFlow recipe is known for: the larger of two logit-normal(-0.4, 1) draws."""
    t = Maximum(law=LogitNormal(mean=-0.4, std=1.0)).sample(100_000, generator())
    wanted = torch.tensor([0.24, 0.40, 0.54, 0.67, 0.83])
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t.quantile(levels), wanted, rtol=0, atol=0.01)


def test_point_mass():
    times = WithPointMass(fraction=0.25).sample(100_000, generator())
    assert float((times == 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert (WithPointMass(fraction=1.0, value=0.3).sample(10, generator()) == 0.3).all()


@pytest.mark.parametrize(
    ("law", "kwargs"),
    [
        (Uniform, {"low": 0.7, "high": 0.3}),
        (Uniform, {"low": -0.1}),
        (LogitNormal, {"std": 0.0}),
        (WithPointMass, {"value": 2.0}),
    ],
)
def test_wrong_ranges(law, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        law(**kwargs)
