"""Balls of the k-th neighbours against their plain definition in float64, on sets that are hard for float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdistill.evaluation import SampleSet, measure, metrics, neighbours, precision_recall
from flowdistill.evaluation.neighbours import covered, squared_radii


def plain(a, b):
    """Squared distances (N, M) by differences in float64."""
    return (a.double()[:, None] - b.double()).square().sum(2)


def plain_radii(points, k):
    return plain(points, points).fill_diagonal_(torch.inf).kthvalue(k, 1).values


def plain_covered(a, a_radii, b, b_radii):
    distances = plain(a, b)
    return (distances <= b_radii).any(1), (distances <= a_radii[:, None]).any(0)


KINDS = "normal far clusters far_clusters one_outlier duplicated copies one_point grid far_grid".split()  # noqa: SIM905


def cloud(kind, n, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator)
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(7))
    group = torch.randint(3, (n,), generator=generator)
    return {
        "normal": x,
        "features": x.relu() + 0.01 * x,
        "far": x + 3000.0,
        "clusters": 0.1 * x + centres[group],
        "far_clusters": x + 1e4 * centres[group],
        "one_outlier": torch.cat([x[:-1], 1e5 * x[-1:]]),
        "duplicated": x[torch.randint(n // 3 + 1, (n,), generator=generator)],
        "copies": centres[group],
        "one_point": torch.ones(n, dim),
        "grid": (2 * x).round(),
        "far_grid": (2 * x).round() / 4 + 512,
    }[kind]


@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    sizes=st.tuples(st.integers(6, 90), st.integers(6, 90)),
    dim=st.integers(1, 40),
    k=st.integers(1, 5),
    seed=st.integers(0, 1000),
    block=st.sampled_from((7, 32, 2048)),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)
def test_decisions_are_those_of_differences_in_float64(kinds, sizes, dim, k, seed, block, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_BLOCK", block)
        patch.setattr(neighbours, "_NUMBERS", 50 * dim)
        a, b = (cloud(kind, n, dim, seed + i).to(dtype) for i, (kind, n) in enumerate(zip(kinds, sizes, strict=True)))
        radii = [squared_radii(points, k) for points in (a, b)]
        for points, found in zip((a, b), radii, strict=True):
            torch.testing.assert_close(found, plain_radii(points, k), rtol=1e-12, atol=0)
        balls = a, radii[0], b, radii[1]
        for found, wanted in zip(covered(*balls), plain_covered(*balls), strict=True):
            assert torch.equal(found, wanted)


def test_points_on_the_very_edge_of_a_ball():
    """At float32's rounding on either side of it, where products in float32 cannot tell."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    radii = squared_radii(a, 3)
    direction = torch.nn.functional.normalize(torch.randn(200, 64, generator=generator, dtype=torch.float64))
    far = radii.max().sqrt() * 100 * direction.mean(0)
    for side in (1e-9, -1e-9):
        b = a + far + direction * radii.sqrt()[:, None] * (1 + side)
        inside, _ = covered(b, torch.zeros(200), a + far, radii)
        assert torch.equal(inside, plain_covered(b, torch.zeros(200), a + far, radii)[0])


def test_products_of_fewer_bits_are_noticed(monkeypatch):
    """As TF32 rounds them: then they are taken in float64."""
    addmm, dtypes = torch.addmm, []

    def rounded(norms, x, y, alpha):
        dtypes.append(x.dtype)
        if x.dtype == torch.float32:
            x, y = ((v.view(torch.int32) & ~0x1FFF).view(torch.float32) for v in (x, y.T))
            y = y.T
        return addmm(norms, x, y, alpha=alpha)

    points = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "addmm", rounded)
    torch.testing.assert_close(squared_radii(points, 3), plain_radii(points, 3), rtol=1e-12, atol=0)
    assert dtypes.count(torch.float32) == 1
    monkeypatch.setattr(torch, "addmm", addmm)
    assert neighbours._dtype(*[neighbours._Centred(points, points.mean(0).double())] * 2) is torch.float32


def test_float64_decides_few_points_of_ordinary_sets(monkeypatch):
    counted = {torch.float32: 0, torch.float64: 0}
    addmm = torch.addmm

    def counting(norms, x, y, alpha):
        counted[x.dtype] += len(x) * y.shape[1]
        return addmm(norms, x, y, alpha=alpha)

    a, b = (cloud("features", 1000, 512, seed) for seed in (0, 1))
    monkeypatch.setattr(torch, "addmm", counting)
    found = precision_recall(a, b)
    assert counted[torch.float64] < 0.1 * counted[torch.float32]
    assert 0 < found[0] < 1


def test_a_reference_says_where_neighbours_are_looked_for(monkeypatch):
    """And its radii are computed once, for all sets that are compared with it."""
    seen = []
    monkeypatch.setattr(metrics, "squared_radii", lambda points, k: seen.append(points) or squared_radii(points, k))
    features = torch.randn(40, 3)
    reference = SampleSet(features)
    assert reference[:20].device == "cpu"
    sets = [SampleSet(features + i) for i in range(3)]
    figures = [measure(["precision", "recall"], found, reference) for found in sets]
    assert len(seen) == 4
    for row, found in zip(figures, sets, strict=True):
        assert (row["precision"], row["recall"]) == precision_recall(features, found.features)
    nowhere = SampleSet(features, device="meta")[:20]
    with pytest.raises(RuntimeError, match="meta tensors"):
        measure(["precision"], sets[0], nowhere)
