"""How much each step's weights count in an average of them, and how one average is made of others.

Only numbers, no torch. A profile of exponent g counts a moment s of a run of length t like s^g, which is the
density (g + 1) s^g / t^(g+1) on 0..t. The weights after step s hold from s - 1 to s, so they count

    p(s) = (s/t)^(g+1) - ((s-1)/t)^(g+1),  s = 1..t.

One more step multiplies all of these by the same ((t-1)/t)^(g+1), so the average can be kept by a recursion
(arXiv:2312.02696, section 3). Relative to t the density is Beta(g + 1, 1), whose standard deviation is the
profile's width. Averages mix as their profiles do, which is how another width is made afterwards.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sfumato.config import Ema

DECAYING = "ema"
"""The kind of the one average that follows `decay`."""
FINE = 0.001
"""The smallest share that is given to new weights, within a factor of two."""
GOOD = 0.02
"""The largest error of a mixture that is of use, see `Mixture`."""
ENOUGH = 0.001
"""An error of a mixture that need not be smaller."""
MOST = 32
"""Kept averages that are mixed at most."""
POINTS = 1 << 14
"""Places of a run at which profiles are compared; each step of a shorter one."""
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Kept:
    """An average that was kept: its profile's width, and the applied step at which it was copied."""

    width: float
    step: int


@dataclass(frozen=True)
class Mixture:
    """Kept averages and how much of each makes another one; the shares' sum is 1."""

    shares: dict[Kept, float]
    error: float
    """Distance from the average that is meant over that average's distance from the weights at its end, for
    weights that move as a random walk."""


def kind_of(width: float) -> str:
    """What a profile's average is called in a checkpoint."""
    return f"{DECAYING}_{width:g}"


def width_of(kind: str) -> float | None:
    """The width that a kind's name says; None if it is no profile's."""
    return float(kind.removeprefix(f"{DECAYING}_")) if kind.startswith(f"{DECAYING}_") else None


def is_average(kind: str) -> bool:
    """Whether a kind of tensor in a checkpoint is an average."""
    return kind == DECAYING or kind.startswith(f"{DECAYING}_")


def kinds(ema: Ema) -> tuple[str, ...]:
    """The averages that a run keeps, the first of them its usual one; none if it keeps none."""
    if not ema.enabled:
        return ()
    return tuple(dict.fromkeys(map(kind_of, ema.profiles))) or (DECAYING,)


def shares(ema: Ema, step: int) -> dict[str, float]:
    """For each average, how much the weights count in it that the applied step `step` (from zero) leads to.

    0 leaves it as it is. A pure function of the step: no counter that a resume could forget.
    """
    return {kind: share(width_of(kind), ema, step) for kind in kinds(ema)}


def share(width: float | None, ema: Ema, step: int) -> float:
    """How much the weights after the applied step `step` (from zero) count, in a profile or under `decay`.

    They count for all steps since the average moved last, see `pause`.
    """
    count, old = step + 1, 0.0
    if count % pause(width, ema, count):
        return 0.0
    while True:
        if (one := fresh(width, ema, count)) >= 1:
            return 1.0
        old += math.log1p(-one)
        count -= 1
        if count == 0 or count % pause(width, ema, count) == 0:
            return -math.expm1(old)


def pause(width: float | None, ema: Ema, count: int) -> int:
    """Steps from one move of an average to the next, around the applied step number `count` (from one).

    Where each step's weights count less than FINE, several steps go together: in fp32 a smaller share of what
    is between the average and the weights would be rounded off, the same way at every step.
    """
    one = fresh(width, ema, count)
    return 1 << int(math.log2(FINE / one)) if one < FINE else 1


def fresh(width: float | None, ema: Ema, count: int) -> float:
    """How much the weights after the applied step number `count` (from one) count by the law alone."""
    if width is None:
        return 1 - (min(ema.decay, count / (9 + count)) if ema.warmup else ema.decay)
    if count == 1:
        return 1.0
    # 1 - ((t-1) / t)^(g+1), without the digits that the subtraction would lose late in a run.
    return -math.expm1((exponent(width) + 1) * math.log1p(-1 / count))


@cache
def exponent(width: float) -> float:
    """The exponent g > 0 of the profile of a width, 0 < width < 12^-1/2.

    The variance of Beta(g + 1, 1), (g + 1) / ((g + 2)^2 (g + 3)), falls from 1/12 to 0 as g grows from 0.
    """
    assert 0 < width < 12**-0.5, f"no profile has the width {width}"
    low, high = 0.0, 1 / width  # the variance is less than 1 / (g + 2)^2
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wide else (low, middle)
        if high - low <= 1e-15 * high:
            break
    return (low + high) / 2


def mixture(width: float, step: int, kept: Iterable[Kept]) -> Mixture:
    """The average of a profile over the first `step` applied steps, from those that were kept by then.

    Each of them is a whole model to read, so no more are taken than make an error of ENOUGH.
    """
    usable = those_until(step, kept)
    table = triangle([*usable, Kept(width, step)])
    everything = range(len(usable))
    chosen: list[int] = []
    shares, error = np.zeros(0), math.inf
    while error > ENOUGH and len(chosen) < min(MOST, len(usable)):
        tried = [(*fit(table, [*chosen, one], -1), one) for one in everything if one not in chosen]
        shares, error, best = min(tried, key=lambda one: one[1])
        chosen.append(best)
    if error > GOOD:
        chosen = [*everything]
        shares, error = fit(table, chosen, -1)
    return Mixture({usable[one]: float(part) for one, part in zip(chosen, shares, strict=True)}, error)


def makeable(step: int, kept: Iterable[Kept]) -> list[float]:
    """The widths, in hundredths, whose average over the first `step` steps can be made from those kept."""
    usable, widths = those_until(step, kept), [number / 100 for number in range(1, 29)]
    table = triangle([*usable, *(Kept(width, step) for width in widths)])
    errors = [fit(table, range(len(usable)), len(usable) + place)[1] for place in range(len(widths))]
    return [width for width, error in zip(widths, errors, strict=True) if error <= GOOD]


def those_until(step: int, kept: Iterable[Kept]) -> list[Kept]:
    """Averages that were kept by a step, the newest first."""
    found = sorted((one for one in set(kept) if one.step <= step), key=lambda one: (-one.step, one.width))
    assert found, f"no average was kept by step {step}"
    return found


def triangle(averages: Sequence[Kept]) -> Numbers:
    """A small matrix whose columns lie to one another as the averages' cumulative profiles do.

    What an average lacks of the weights at its end is the sum over all steps k of the move from k to k + 1
    times the share of the weights up to k. So for weights that move as a random walk, the distance between
    two averages is that of their profiles' sums up to k, (k/t)^(g+1). It weighs a slow drift as it deserves;
    the distance of the profiles themselves suits weights that jitter about one place.
    """
    last = max(one.step for one in averages)
    places = np.linspace(0, last, min(last, POINTS) + 1)[1:]
    sums = [np.minimum(places / one.step, 1) ** (exponent(one.width) + 1) for one in averages]
    return np.asarray(np.linalg.qr(np.stack(sums, 1), mode="r"), np.float64)


def fit(table: Numbers, chosen: Sequence[int], goal: int) -> tuple[Numbers, float]:
    """Shares of the chosen columns, of sum 1, that come nearest to the column `goal`; the relative distance.

    The sum matters more than the profile's shape: it multiplies the weights themselves, which may hardly move
    in training.
    """
    first, wanted = table[:, chosen[0]], table[:, goal]
    others = np.linalg.lstsq(table[:, chosen[1:]] - first[:, None], wanted - first, rcond=None)[0]
    shares = np.concatenate([[1 - others.sum()], others])
    return shares, float(np.linalg.norm(table[:, chosen] @ shares - wanted) / np.linalg.norm(wanted))
