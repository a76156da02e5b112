"""Numbers over steps in little memory: of each stretch of steps the mean, the least and the most."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 4096
"""Stretches at most; a curve has half as many at least, once it has had this many steps."""
COLUMNS = 256
"""Names at most; others are passed over."""


class Curve(NamedTuple):
    """Points in the order of their steps, each (N,)."""

    steps: np.ndarray
    mean: np.ndarray
    least: np.ndarray
    most: np.ndarray


class Columns:
    """Curves by their names. Where steps grow beyond BINS stretches, each two become one."""

    def __init__(self) -> None:
        self.width = 1
        """Steps of a stretch."""
        self.held: dict[str, np.ndarray] = {}  # (4, BINS): count, sum, least, most

    def add(self, steps: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take numbers: steps (N,) whole and not negative, values (N,) each, nan where there is none."""
        if not len(steps):
            return
        while int(steps.max()) // self.width >= BINS:
            self.halve()
        places = steps // self.width
        with np.errstate(over="ignore", invalid="ignore"):
            for name, found in {"step": steps.astype(np.float64), **values}.items():
                good = np.isfinite(found)
                if not good.any() or (name not in self.held and len(self.held) >= COLUMNS):
                    continue
                held = self.held.setdefault(name, empty())
                at, what = places[good], found[good]
                np.add.at(held[0], at, 1.0)
                np.add.at(held[1], at, what)
                np.minimum.at(held[2], at, what)
                np.maximum.at(held[3], at, what)

    def halve(self) -> None:
        """Make one stretch of each two."""
        self.width *= 2
        half = BINS // 2
        for name, held in self.held.items():
            new, pairs = empty(), held.reshape(4, half, 2)
            with np.errstate(over="ignore", invalid="ignore"):
                new[:2, :half] = pairs[:2].sum(2)
            new[2, :half], new[3, :half] = pairs[2].min(1), pairs[3].max(1)
            self.held[name] = new

    def curve(self, name: str) -> Curve | None:
        """A curve; None where nothing was told under that name."""
        held = self.held.get(name)
        if held is None:
            return None
        with np.errstate(all="ignore"):
            mean, steps = held[1] / held[0], self.held["step"][1] / self.held["step"][0]
        there = (held[0] > 0) & np.isfinite(mean)
        return Curve(np.round(steps[there]).astype(np.int64), mean[there], held[2][there], held[3][there])


def empty() -> np.ndarray:
    """A column of nothing."""
    held = np.zeros((4, BINS))
    held[2], held[3] = np.inf, -np.inf
    return held
