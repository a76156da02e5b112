"""The laws of timesteps: their probabilities, and histograms of draws."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sfumato.config import BiasedTimesteps, UniformTimesteps
from sfumato.errors import UserError
from sfumato.objective.timesteps import Law

LAWS = {
    "uniform": UniformTimesteps(),
    "earlier": BiasedTimesteps(kind="earlier", multiplier=3.0, portion=0.25),
    "later": BiasedTimesteps(kind="later", multiplier=0.2, portion=0.4),
    "range": BiasedTimesteps(kind="range", multiplier=5.0, begin=200, end=300),
}
# The chosen part and its multiplier, written out by hand.
PARTS = {
    "uniform": (0, 1000, 1.0),
    "earlier": (0, 250, 3.0),
    "later": (600, 1000, 0.2),
    "range": (200, 300, 5.0),
}


def expected(name: str) -> Tensor:
    """The law's probabilities, (1000,) float64."""
    begin, end, multiplier = PARTS[name]
    inside = torch.tensor([multiplier if begin <= t < end else 1.0 for t in range(1000)], dtype=torch.float64)
    return inside / inside.sum()


def check_histogram(draw: Callable[[Tensor], Tensor], name: str) -> None:
    """Pearson's chi-square of 400 000 draws over all 1000 timesteps lies within 5 of its deviations."""
    uniform = torch.rand(400_000, generator=torch.Generator().manual_seed(3))
    t = draw(uniform)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t, minlength=1000).double()
    wanted = expected(name) * len(uniform)
    chi = ((counts - wanted) ** 2 / wanted).sum().item()
    freedom = 999
    assert abs(chi - freedom) < 5 * math.sqrt(2 * freedom), (
        f"chi-square {chi:.0f} over {freedom} degrees of freedom"
    )


@pytest.mark.parametrize("name", LAWS)
def test_probabilities(name: str) -> None:
    torch.testing.assert_close(Law(LAWS[name], 1000).weights, expected(name))


@pytest.mark.parametrize("name", LAWS)
def test_histogram(name: str) -> None:
    check_histogram(Law(LAWS[name], 1000).draw, name)


@pytest.mark.parametrize("name", ["earlier", "later", "range"])
def test_histogram_catches_an_ignored_bias(name: str) -> None:
    with pytest.raises(AssertionError, match="chi-square"):
        check_histogram(Law(UniformTimesteps(), 1000).draw, name)


def test_histogram_catches_the_other_end() -> None:
    other = LAWS["earlier"].model_copy(update={"kind": "later"})
    with pytest.raises(AssertionError, match="chi-square"):
        check_histogram(Law(other, 1000).draw, "earlier")


def test_histogram_catches_timesteps_in_bf16() -> None:
    law = Law(UniformTimesteps(), 1000)
    with pytest.raises(AssertionError, match="chi-square"):
        check_histogram(lambda uniform: law.draw(uniform).bfloat16().long().clamp(max=999), "uniform")


@pytest.mark.parametrize("name", LAWS)
def test_draw_is_the_inverse_of_the_distribution(name: str) -> None:
    law = Law(LAWS[name], 1000)
    middles = expected(name).cumsum(0) - expected(name) / 2
    assert torch.equal(law.draw(middles.float()), torch.arange(1000))
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert law.draw(ends).tolist() == [0, 999]


def test_draw_depends_on_its_own_number_only() -> None:
    law = Law(LAWS["range"], 1000)
    uniform = torch.rand(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(law.draw(uniform), torch.cat([law.draw(one[None]) for one in uniform]))


@pytest.mark.parametrize(
    "law",
    [
        BiasedTimesteps(kind="range", begin=0, end=1001),
        BiasedTimesteps(kind="range", begin=500, end=500),
        BiasedTimesteps(kind="earlier", portion=0.0005),
    ],
)
def test_a_part_that_does_not_fit_is_refused(law: BiasedTimesteps) -> None:
    with pytest.raises(UserError):
        Law(law, 1000)
