"""Kernel distance and nearest neighbours against loops in float64."""

import pytest
import torch

from sfumato.demo.measure import coarse, kernel_distance, nearest, own_neighbours


def by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate of MMD^2 (Gretton et al. 2012, eq. 3), written as sums over pairs."""
    x, y = x.double(), y.double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize(("n", "m", "shift"), [(7, 5, 0.0), (6, 6, 0.7), (2, 9, 0.2)])
def test_kernel_distance_by_hand(n: int, m: int, shift: float) -> None:
    draw = torch.Generator().manual_seed(n * m)
    x, y = torch.randn(n, 11, generator=draw), torch.randn(m, 11, generator=draw) + shift
    assert kernel_distance(x, y) == pytest.approx(by_hand(x, y), rel=1e-12, abs=1e-12)


def test_kernel_distance_has_no_bias() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [
            kernel_distance(torch.randn(6, 8, generator=draw), torch.randn(9, 8, generator=draw))
            for _ in range(4000)
        ]
    )
    assert abs(float(values.mean())) < 4 * float(values.std()) / 4000**0.5


def test_kernel_distance_needs_two() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(torch.zeros(1, 4), torch.zeros(5, 4))


def test_nearest_by_hand() -> None:
    draw = torch.Generator().manual_seed(1)
    points, pool = torch.randn(9, 6, generator=draw), torch.randn(13, 6, generator=draw)
    table = [[float((p.double() - q.double()).square().sum()) for q in pool] for p in points]
    assert nearest(points, pool).tolist() == [row.index(min(row)) for row in table]


def test_own_neighbours_counts() -> None:
    pool = torch.eye(5)
    found, own = own_neighbours(pool[[3, 1, 0]] + 0.1, [3, 1, 4], pool)
    assert found.tolist() == [3, 1, 0]
    assert own == 2
    with pytest.raises(ValueError, match="one for each"):
        own_neighbours(pool, [0], pool)


def test_coarse_is_the_mean_of_blocks() -> None:
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    blocks = images.double().reshape(2, 3, 16, 2, 16, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(coarse(images).double(), blocks)
