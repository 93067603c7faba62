"""Laws of the pairs (t, s); the conformance tests check what all of them share."""

import math

import pytest
import torch

from flowdistill.pairs import (
    Below,
    Diagonal,
    Durations,
    Dyadic,
    Grouped,
    Joined,
    Short,
    SortedPair,
    ToData,
    WithDiagonal,
    rows_of,
)
from flowdistill.times import Always, LogitNormal, Uniform, WithPointMass

LEVELS = torch.linspace(0.05, 0.95, 19)


def generator():
    return torch.Generator().manual_seed(0)


def shares(values, of):
    """The fraction of the values that equals each of some numbers."""
    found = torch.stack([(values - number).abs() < 1e-6 for number in of])
    assert found.any(0).all()
    return found.float().mean(1).tolist()


def test_sorted_pairs_of_meanflow():
    """The quantiles of t that the MeanFlow recipe is known for: the larger of two logit-normal(-0.4, 1) draws."""
    t, _ = SortedPair(first=LogitNormal(mean=-0.4, std=1.0)).sample(100_000, generator())
    wanted = torch.tensor([0.24, 0.40, 0.54, 0.67, 0.83])
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t.quantile(levels), wanted, rtol=0, atol=0.01)


def test_sorted_pairs_of_two_laws():
    """Of U(0, 0.5) and U(0.5, 1) the larger is always the second."""
    t, s = SortedPair(first=Uniform(high=0.5), second=Uniform(low=0.5)).sample(20_000, generator())
    torch.testing.assert_close(t.quantile(LEVELS), 0.5 + LEVELS / 2, rtol=0, atol=0.01)
    torch.testing.assert_close(s.quantile(LEVELS), LEVELS / 2, rtol=0, atol=0.01)


def test_ends_below_starts():
    """U(0, 1) on the condition s <= t is U(0, t)."""
    t, s = Below(starts=Uniform(low=0.2)).sample(20_000, generator())
    torch.testing.assert_close(t.quantile(LEVELS), 0.2 + 0.8 * LEVELS, rtol=0, atol=0.01)
    torch.testing.assert_close((s / t).quantile(LEVELS), LEVELS, rtol=0, atol=0.01)


def test_durations_are_parts_of_the_way_to_data():
    t, s = Durations(law=WithPointMass(law=Uniform(), value=1.0, fraction=0.25)).sample(40_000, generator())
    assert (t == 1).all()
    assert float((s == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    t, s = Durations(law=Always(value=0.25), starts=Uniform()).sample(1000, generator())
    torch.testing.assert_close(s, 0.75 * t)


def test_jumps_to_data_and_none_at_all():
    t, s = ToData(starts=Uniform(low=0.5)).sample(1000, generator())
    assert t.min() >= 0.5
    assert not s.any()
    t, s = Diagonal(times=Uniform(low=0.5)).sample(1000, generator())
    assert t.min() >= 0.5
    assert torch.equal(t, s)


@pytest.mark.parametrize("steps", [1, 4])
def test_short_jumps_have_a_uniform_length_and_then_a_uniform_place(steps):
    """Of the n-th power the mean of U(0, 1) is 1/(n + 1); length and place are independent."""
    t, s = (times.double() for times in Short(steps=steps).sample(200_000, generator()))
    length = (t - s) * steps
    place = s / (1 - t + s)
    for one, other in ((length, place), (length**2, place), (length, place**2)):
        both = float((one * other).mean())
        assert both == pytest.approx(float(one.mean()) * float(other.mean()), abs=2e-3)
    torch.testing.assert_close(length[:20_000].quantile(LEVELS.double()), LEVELS.double(), rtol=0, atol=0.01)
    torch.testing.assert_close(place[:20_000].quantile(LEVELS.double()), LEVELS.double(), rtol=0, atol=0.01)


def test_short_jumps_from_the_grid():
    """Each start but the last has probability E[1/(1 - d)]/N; a jump from 1/N to data may not be longer than 1/N."""
    t, s = Short(steps=4, from_grid=True).sample(100_000, generator())
    likely = math.log(4 / 3)  # 4 times the integral of 1/(1 - d) over (0, 1/4), over 4
    assert shares(t, (0.25, 0.5, 0.75, 1.0)) == pytest.approx([1 - 3 * likely, likely, likely, likely], abs=0.01)
    assert s.min() >= 0
    torch.testing.assert_close(((t - s) * 4)[:20_000].quantile(LEVELS), LEVELS, rtol=0, atol=0.01)


def test_dyadic_jumps_are_a_uniform_level_and_a_uniform_step_of_it():
    t, s = Dyadic(levels=4).sample(64_000, generator())
    level = torch.log2(1 / (t - s))
    assert torch.equal(level, level.round())
    assert shares(level, range(4)) == pytest.approx([0.25] * 4, abs=0.01)
    for number in range(4):
        ends = s[level == number] * 2**number
        assert shares(ends, range(2**number)) == pytest.approx([0.5**number] * 2**number, abs=0.02)


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.25, 25), (0.5, 50), (1.0, 100)])
def test_a_share_of_rows_on_the_diagonal(share, rows):
    law = WithDiagonal(pairs=Durations(law=Uniform(high=0.9)), share=share)
    t, s = law.sample(100, generator())
    assert law.on_diagonal(100) == rows
    assert torch.equal(t == s, torch.arange(100) < rows)


def test_times_on_the_diagonal():
    """The other law's t, its s, or a law of their own."""
    jumps = Below(starts=Uniform(low=0.6), ends=Uniform(high=0.4))
    for law, low, high in (
        (WithDiagonal(pairs=jumps), 0.6, 1.0),
        (WithDiagonal(pairs=jumps, at_ends=True), 0.0, 0.4),
        (WithDiagonal(pairs=jumps, times=Uniform(low=0.45, high=0.55)), 0.45, 0.55),
    ):
        t, s = law.sample(1000, generator())
        assert ((t[:500] >= low) & (t[:500] <= high)).all()
        assert (t[500:] >= 0.6).all()
        assert (s[500:] <= 0.4).all()


def test_groups_share_their_times():
    t, s = Grouped(pairs=Below(), size=4).sample(10, generator())
    once = Below().sample(3, generator())
    for times, drawn in zip((t, s), once, strict=True):
        assert torch.equal(times, drawn.repeat_interleave(4)[:10])


def test_two_laws_in_one_batch():
    t, s = Joined(first=Diagonal(), others=ToData(), share=0.3).sample(10, generator())
    assert torch.equal(t[:3], s[:3])
    assert not s[3:].any()
    assert [rows_of(share, 10) for share in (0.0, 0.3, 1.0)] == [1, 3, 9]


@pytest.mark.parametrize(
    ("law", "wrong"), [(Dyadic, {"levels": 0}), (Grouped, {"size": 0}), (WithDiagonal, {"share": 2.0})]
)
def test_wrong_ranges(law, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        law(**wrong)
