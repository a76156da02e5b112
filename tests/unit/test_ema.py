"""Laws of averages: widths, shares, and what can be mixed from what; the sums are checked in float64."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

from sfumato.config import Ema
from sfumato.engine import profiles
from sfumato.engine.profiles import Kept

WIDTHS = (0.01, 0.05, 0.1, 0.25, 0.279)


def weights_of(width: float, step: int) -> np.ndarray:
    """How much each of the steps 1 .. step counts, from the roots of the cubic that the width asks for."""
    # (g + 1) / ((g + 2)^2 (g + 3)) = width^2, multiplied out.
    u = width**-2
    roots = np.roots([1, 7, 16 - u, 12 - u])
    power = max(root.real for root in roots if abs(root.imag) < 1e-9) + 1
    return np.diff((np.arange(step + 1) / step) ** power)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_profile_has_its_width(width: float) -> None:
    """The spread of the moments that an average counts, over its length."""
    shares = weights_of(width, 20_000)
    times = (np.arange(20_000) + 0.5) / 20_000
    mean = (shares * times).sum()
    assert (shares * (times - mean) ** 2).sum() ** 0.5 == pytest.approx(width, rel=1e-4)
    assert profiles.exponent(width) == pytest.approx((2 * mean - 1) / (1 - mean), rel=1e-2)


def unrolled(shares: list[float]) -> np.ndarray:
    """How much each step counts in the end, if at each step the new weights count so much."""
    found = np.zeros(len(shares))
    for step, share in enumerate(shares):
        found *= 1 - share
        found[step] += share
    return found


def check_profile(shares: list[float], width: float) -> None:
    wanted = weights_of(width, len(shares))
    assert np.abs(unrolled(shares) - wanted).max() < 1e-12, "another profile"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_recursion_makes_the_profile(width: float) -> None:
    ema = Ema(enabled=True, profiles=(width,))
    shares = [profiles.shares(ema, step)[f"ema_{width:g}"] for step in range(500)]
    check_profile(shares, width)
    for broken in (shares[1:], shares[:250] + shares[:250], [1 - share for share in shares]):
        with pytest.raises(AssertionError, match="another profile"):
            check_profile(broken, width)


@pytest.mark.parametrize("count", [20_480, 10_240_000])
def test_late_in_a_run_several_steps_go_together(count: int) -> None:
    """Against 40 digits: the share is that of all steps since the average moved last."""
    steps = range(count - 1024, count)
    moves = [step + 1 for step in steps if profiles.share(0.05, Ema(), step)]
    gap = moves[-1] - moves[-2]
    assert moves[-1] == count and gap == (1 if count < 30_000 else 512)
    with localcontext(prec=40):
        power = Decimal(profiles.exponent(0.05) + 1)
        exact = 1 - (power * (Decimal(count - gap) / Decimal(count)).ln()).exp()
    assert profiles.share(0.05, Ema(), count - 1) == pytest.approx(float(exact), rel=1e-9)


def followed(shares: list[float]) -> float:
    """How far an average in fp32 is from one in fp64, over the way from there to the weights."""
    draw = np.random.default_rng(0)
    weights, drift = draw.uniform(0.5, 1.5, 500), draw.normal(size=500) * 1e-7
    low, high = weights.astype(np.float32), weights.copy()
    for share in shares:
        weights = (weights + drift + draw.normal(size=500) * 1e-6).astype(np.float32).astype(np.float64)
        low += np.float32(share) * (weights.astype(np.float32) - low)
        high += 1e-4 * (weights - high)
    return float(np.linalg.norm(low - high) / np.linalg.norm(high - weights))


def test_t14_small_moves_are_not_rounded_off() -> None:
    ema = Ema(enabled=True, decay=0.9999, warmup=False)
    ours = [profiles.shares(ema, step)["ema"] for step in range(8000)]
    assert followed(ours) < 0.03
    assert followed([1e-4] * 8000) > 0.1, "moved at every step, an average does not fall behind"


def test_which_averages_are_kept() -> None:
    assert profiles.kinds(Ema()) == profiles.kinds(Ema(profiles=(0.1,))) == ()
    assert profiles.kinds(Ema(enabled=True)) == ("ema",)
    assert profiles.kinds(Ema(enabled=True, profiles=(0.1, 0.05, 0.1))) == ("ema_0.1", "ema_0.05")
    warming = [profiles.shares(Ema(enabled=True, decay=0.9), step)["ema"] for step in (0, 9, 1000)]
    assert warming == pytest.approx([0.9, 9 / 19, 0.1])
    assert profiles.width_of("ema_0.05") == 0.05 and profiles.width_of("ema") is None
    assert all(map(profiles.is_average, ("ema", "ema_0.1"))) and not profiles.is_average("exp_avg")


STEPS = 600


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
    """Weights that begin large and move little, as in fine-tuning: a drift, and a random walk, (600, 300)."""
    draw = np.random.default_rng(0)
    drift = draw.normal(size=300) * 2e-3
    return 10 + np.cumsum(drift + draw.normal(size=(STEPS, 300)) * 1e-2, 0)


def mixed(walk: np.ndarray, shares: dict[Kept, float]) -> np.ndarray:
    return sum(share * (weights_of(k.width, k.step) @ walk[: k.step]) for k, share in shares.items())


def gap(walk: np.ndarray, shares: dict[Kept, float], width: float) -> float:
    """Distance of a mixture from its average, over that one's from the last weights."""
    wanted = weights_of(width, STEPS) @ walk
    return float(np.linalg.norm(mixed(walk, shares) - wanted) / np.linalg.norm(wanted - walk[-1]))


def kept(count: int, *widths: float) -> list[Kept]:
    return [Kept(width, STEPS * (n + 1) // count) for width in widths for n in range(count)]


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15, 0.25])
def test_a_mixture_is_as_near_as_it_says(walk: np.ndarray, width: float) -> None:
    for count in (4, 8, 24):
        made = profiles.mixture(width, STEPS, kept(count, 0.05, 0.1))
        assert sum(made.shares.values()) == pytest.approx(1, abs=1e-12)
        assert gap(walk, made.shares, width) < 2 * made.error
        assert len(made.shares) <= profiles.MOST or made.error > profiles.GOOD
    assert made.error < 2 * profiles.ENOUGH


def free_sum(width: float, of: list[Kept]) -> dict[Kept, float]:
    """The mixture whose profile is nearest, whatever its sum is."""
    columns = [np.pad(weights_of(one.width, one.step), (0, STEPS - one.step)) for one in of]
    found = np.linalg.lstsq(np.stack(columns, 1), weights_of(width, STEPS), rcond=None)[0]
    return dict(zip(of, found, strict=True))


def test_a_sum_that_is_not_one_is_caught(walk: np.ndarray) -> None:
    """Large weights that move little: a sum of 1.001 costs more than the profile's shape gains."""
    of = kept(8, 0.05, 0.1)
    assert abs(sum(free_sum(0.15, of).values()) - 1) < 0.02
    assert gap(walk, free_sum(0.15, of), 0.15) > 20 * gap(
        walk, profiles.mixture(0.15, STEPS, of).shares, 0.15
    )


def test_later_averages_and_single_ones() -> None:
    of = [*kept(4, 0.05, 0.1), Kept(0.07, STEPS + 1)]
    assert all(one.step <= STEPS for one in profiles.mixture(0.07, STEPS, of).shares)
    exact = profiles.mixture(0.05, STEPS, of)
    assert exact.error < 1e-12 and [*exact.shares] == [Kept(0.05, STEPS)]
    assert profiles.mixture(0.02, STEPS, kept(1, 0.05, 0.1)).error > profiles.GOOD


def test_widths_that_can_be_made() -> None:
    few, many = (profiles.makeable(STEPS, kept(count, 0.05, 0.1)) for count in (2, 32))
    assert {0.05, 0.1} <= set(few) and 0.07 not in few
    assert set(few) | {0.03, 0.07, 0.25} <= set(many) and 0.01 not in many
    assert profiles.mixture(min(many), STEPS, kept(32, 0.05, 0.1)).error <= profiles.GOOD
