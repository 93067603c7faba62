"""Balls that reach to the k-th nearest neighbour, and which points lie in one, for large sets and in bounded memory.

Squared distances |x|^2 + |y|^2 - 2 x.y are products, in float32 and by blocks. Their error is bounded, and wherever it
could change a decision, float64 decides. So the results are those of differences in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2048  # points, whose mutual distances take 16 MiB
_NUMBERS = 1 << 18  # of features whose differences are taken at a time, 2 MiB


def squared_radii(points: Tensor, k: int) -> Tensor:
    """The squared distance of each of some points (N, D) to its k-th nearest other, (N,), float64.

    Examples:
        >>> squared_radii(torch.tensor([[0.0], [1.0], [3.0]]), 1)
        tensor([1., 1., 4.], dtype=torch.float64)
    """
    n, device = len(points), points.device
    count = min(k + 2, n - 1)
    centred = _Centred(points, _mean(points))
    dtype = _dtype(centred, centred)
    nearest = torch.full((n, count), torch.inf, dtype=dtype, device=device)
    others = torch.zeros((n, count), dtype=torch.long, device=device)

    def see(rows: Tensor, columns: Tensor, distances: Tensor) -> None:
        found, places = distances.topk(min(count, len(columns)), largest=False)
        found, places = torch.cat([nearest[rows], found], 1), torch.cat([others[rows], columns[places]], 1)
        nearest[rows], chosen = found.topk(count, largest=False)
        others[rows] = places.gather(1, chosen)

    # The candidates: some more than k, by products. Distances are symmetric, so each block serves two.
    for rows, columns, distances in _distances(centred, centred, dtype, halved=True):
        see(rows, columns, distances)
        if rows[0] != columns[0]:
            see(columns, rows, distances.T.contiguous())
    radii = _kth(points, others, k)

    # A point whose next candidate is not surely farther than its k-th takes products in float64.
    error = _error(centred, centred, dtype)
    unsure = (nearest[:, -1] - error < radii) & (radii > 0)
    if count < n - 1 and dtype is torch.float32 and unsure.any():
        some = unsure.nonzero()[:, 0]
        nearest, others = nearest[some].double().fill_(torch.inf), others[some]
        for rows, columns, distances in _distances(_Centred(points[some], centred.mean), centred, torch.float64):
            distances[some[rows][:, None] == columns] = torch.inf
            see(rows, columns, distances)
        radii[some] = _kth(points, others, k, some)
    return radii


def covered(a: Tensor, a_radii: Tensor, b: Tensor, b_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Which points of a (N, D) lie in a ball around one of b (M, D), and which of b in one around a; boolean.

    Args:
        a: points (N, D).
        a_radii: the squared radii of the balls around them (N,), float64.
        b: points (M, D).
        b_radii: the squared radii of the balls around them (M,), float64.

    Examples:
        >>> covered(torch.tensor([[0.0], [5.0]]), torch.ones(2), torch.tensor([[2.0]]), torch.tensor([4.0]))
        (tensor([ True, False]), tensor([False]))
    """
    mean = _mean(a, b)
    first, second = _Centred(a, mean), _Centred(b, mean)
    dtype = _dtype(first, second)
    depths = [torch.full((len(points),), torch.inf, dtype=dtype, device=a.device) for points in (a, b)]
    radii = [a_radii.to(dtype), b_radii.to(dtype)]
    for rows, columns, distances in _distances(first, second, dtype):
        depths[0][rows] = torch.minimum(depths[0][rows], (distances - radii[1][columns]).amin(1))
        depths[1][columns] = torch.minimum(depths[1][columns], (distances - radii[0][rows, None]).amin(0))
    return _decided(first, second, b_radii, depths[0]), _decided(second, first, a_radii, depths[1])


def _decided(points: _Centred, centres: _Centred, radii: Tensor, depths: Tensor) -> Tensor:
    """Whether points lie in balls, from the smallest of their squared distances less squared radii."""
    error = _error(points, centres, depths.dtype)
    inside = depths < -error
    unsure = (depths.abs() <= error).nonzero()[:, 0]
    error = _error(points, centres, torch.float64)
    for rows, columns, distances in _distances(_Centred(points.exact[unsure], points.mean), centres, torch.float64):
        rows = unsure[rows]
        depth = distances - radii[columns]
        inside[rows] |= (depth < -error[rows, None]).any(1)
        pairs = ((depth.abs() <= error[rows, None]) & ~inside[rows, None]).nonzero()
        for part in torch.split(pairs, _at_a_time(points.exact)):
            row, column = rows[part[:, 0]], columns[part[:, 1]]
            within = _exact(points.exact[row], centres.exact[column]) <= radii[column]
            inside[row[within]] = True
    return inside


# ---- distances


class _Centred:
    """Points less a mean: squared distances by products are the more exact, the closer the points lie to the origin."""

    def __init__(self, points: Tensor, mean: Tensor) -> None:
        self.exact, self.mean = points, mean
        blocks = [self._block(start) for start in range(0, len(points), _BLOCK)]
        self._float32 = [(values.float(), norms.float()) for values, norms in blocks]
        self.norms = torch.cat([mean.new_zeros(0), *(norms for _, norms in blocks)])

    def _block(self, start: int) -> tuple[Tensor, Tensor]:
        values = self.exact[start : start + _BLOCK].double() - self.mean
        return values, values.square().sum(1)

    def blocks(self, dtype: torch.dtype, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The row numbers, the points and their squared norms, block by block."""
        for first in range(start, len(self.exact), _BLOCK):
            values, norms = self._float32[first // _BLOCK] if dtype is torch.float32 else self._block(first)
            yield torch.arange(first, first + len(values), device=values.device), values, norms


def _distances(
    a: _Centred, b: _Centred, dtype: torch.dtype, halved: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers of a, row numbers of b, and their squared distances by products, block by block.

    Args:
        a: N points.
        b: M points.
        dtype: of the products.
        halved: whether a is b, each pair of blocks is wanted once, and points are infinitely far from themselves.
    """
    for rows, x, x_norms in a.blocks(dtype):
        for columns, y, y_norms in b.blocks(dtype, int(rows[0]) if halved else 0):
            distances = torch.addmm(y_norms, x, y.T, alpha=-2).add_(x_norms[:, None])
            if halved and rows[0] == columns[0]:
                distances.fill_diagonal_(torch.inf)
            yield rows, columns, distances


def _mean(*sets: Tensor) -> Tensor:
    """The middle of the sets, (D,), float64."""
    return torch.stack([points.mean(0, dtype=torch.float64) for points in sets]).mean(0)


def _error(points: _Centred, others: _Centred, dtype: torch.dtype) -> Tensor:
    """A bound of the error of a squared distance by products, for each point and all others, (N,), float64.

    A product of D terms is wrong by at most D u |x| |y|, where u is half an epsilon (Higham 2002, section 3.1). The
    rest is for rounding the points, their norms and the sum.
    """
    scale = points.norms + others.norms.max()
    return (points.exact.shape[1] / 2 + 8) * torch.finfo(dtype).eps * scale


def _dtype(a: _Centred, b: _Centred) -> torch.dtype:
    """Float32 for products, unless PyTorch takes them in less, such as TF32, which some of them show."""
    x, y = (_Centred(points.exact[: min(256, _BLOCK)], points.mean) for points in (a, b))
    (_, _, got), (_, _, wanted) = (next(_distances(x, y, dtype)) for dtype in (torch.float32, torch.float64))
    close = (got - wanted).abs() <= _error(x, y, torch.float32)[:, None]
    return torch.float32 if bool(close.all()) else torch.float64


def _kth(points: Tensor, others: Tensor, k: int, rows: Tensor | None = None) -> Tensor:
    """The k-th smallest squared distance of points, or those of some rows, to their candidates (N, count)."""
    rows = torch.arange(len(points), device=points.device) if rows is None else rows
    parts = zip(*(torch.split(numbers, _at_a_time(points, others.shape[1])) for numbers in (rows, others)), strict=True)
    return torch.cat([_exact(points[row][:, None], points[other]).kthvalue(k, 1).values for row, other in parts])


def _exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square_().sum(-1)


def _at_a_time(points: Tensor, count: int = 1) -> int:
    return max(_NUMBERS // (points.shape[1] * count), 1)
