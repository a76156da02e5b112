"""Sizes of several aspects, and which a picture is trained at. A size is (height, width) in pixels."""

from fractions import Fraction
from itertools import pairwise
from math import isqrt, nextafter, sqrt
from typing import NamedTuple

import numpy as np

from sfumato.config import Buckets, Data
from sfumato.errors import UserError


class Limits(NamedTuple):
    """What a bucket's size may be; sides in multiples of step."""

    shortest: int
    longest: int
    area: int
    step: int


def limits(buckets: Buckets, base: int) -> Limits:
    """The bounds of a base resolution: as set, or half and twice the resolution, in multiples of step."""
    step, given = buckets.step, [side for size in buckets.sizes for side in size]
    half, twice = min([base // 2, *given]), max(given, default=2 * base)
    shortest = -(-buckets.min // step) if buckets.min else max(1, (2 * half + step) // (2 * step))
    longest = buckets.max // step if buckets.max else max(1, (2 * twice + step) // (2 * step))
    area = buckets.area or max((w * h for w, h in buckets.sizes), default=base**2)
    return Limits(shortest * step, longest * step, area, step)


def sizes(data: Data, base: int) -> list[tuple[int, int]]:
    """The (height, width) of a base resolution, sorted; one square without buckets.

    Raises UserError if the settings leave none, or if a size of data.buckets.sizes contradicts the others.
    """
    buckets = data.buckets
    if buckets is None:
        return [(base, base)]
    if buckets.sizes:
        for width, height in buckets.sizes:
            check_given(buckets, width, height)
        return sorted({(height, width) for width, height in buckets.sizes})
    bounds = limits(buckets, base)
    step, found = bounds.step, set()
    for side in range(bounds.shortest, bounds.longest + 1, step):
        other = min(bounds.longest, bounds.area // side // step * step)
        if other >= bounds.shortest:
            found |= {(side, other), (other, side)}
    square = isqrt(bounds.area) // step * step
    if bounds.shortest <= square <= bounds.longest:
        found.add((square, square))
    if not found:
        raise UserError(
            f"data.buckets for resolution {base}: sides of {bounds.shortest} (min) to {bounds.longest} (max) "
            f"pixels in steps of {step}, of at most {bounds.area:,} pixels (area)",
            "no size meets all of that",
            "lower data.buckets.min or step, or raise max, area or data.resolution",
        )
    return sorted(found)


def check_given(buckets: Buckets, width: int, height: int) -> None:
    """Raise UserError for one of data.buckets.sizes that the other settings do not allow."""
    short, long = min(width, height), max(width, height)
    for setting, wrong in (
        (f"min = {buckets.min or 8}", short < (buckets.min or 8)),
        (f"max = {buckets.max}", buckets.max is not None and long > buckets.max),
        (f"area = {buckets.area}", buckets.area is not None and width * height > buckets.area),
    ):
        if wrong:
            raise UserError(
                f"{width} x {height} in data.buckets.sizes",
                f"data.buckets.{setting} does not allow it",
                "change one of them",
            )


def assign(heights: np.ndarray, widths: np.ndarray, among: list[tuple[int, int]]) -> np.ndarray:
    """The number (n,) in `among` of each picture's size: its own, else the nearest in log aspect ratio.

    Of equally near ones the larger, then the first. heights, widths: (n,), at least 1.
    """
    best: dict[Fraction, int] = {}  # of each aspect
    for number, size in enumerate(among):
        rival = best.setdefault(Fraction(*size), number)
        if rank(among, number) > rank(among, rival):
            best[Fraction(*size)] = number
    edges = []
    for low, high in pairwise(sorted(best)):
        edge = sqrt(low * high)
        # A picture on the edge counts as below it.
        upper = rank(among, best[high]) > rank(among, best[low])
        edges.append(nextafter(edge, 0) if upper else edge)
    numbers = np.array([best[aspect] for aspect in sorted(best)])
    found: np.ndarray = numbers[np.searchsorted(np.array(edges), heights / widths)]
    for number in sorted(set(range(len(among))) - set(best.values()), reverse=True):
        height, width = among[number]
        found[(heights == height) & (widths == width)] = number
    return found


def rank(among: list[tuple[int, int]], number: int) -> tuple[int, int]:
    """What decides between equally near sizes: the larger area, then the first."""
    return among[number][0] * among[number][1], -number


def targets(heights: np.ndarray, widths: np.ndarray, data: Data, base: int) -> np.ndarray:
    """The size (n, 2) int64 that each picture is trained at; (0, 0) where it has none, for a `reason`.

    Without data.buckets.upscale a picture that does not cover its bucket is trained at its own size, cut down
    to multiples of step and data.buckets.max; where that is over the area it is first made smaller.
    """
    among = sizes(data, base)
    found = np.array(among, np.int64)[assign(heights, widths, among)]
    if data.buckets is None or data.buckets.upscale:
        return found
    short = (heights < found[:, 0]) | (widths < found[:, 1])
    bounds = limits(data.buckets, base)
    own = np.minimum(np.stack([heights[short], widths[short]], 1), bounds.longest)  # (k, 2)
    over = (own // bounds.step * bounds.step).prod(1) > bounds.area
    own[over] = np.sqrt(own[over] / own[over][:, ::-1] * bounds.area)
    own = own // bounds.step * bounds.step
    own[own.min(1) < bounds.shortest] = 0
    found[short] = own
    return found


def reason(data: Data) -> str:
    """Why a picture has no bucket."""
    assert data.buckets is not None, "without buckets every picture has a place"
    least = min(limits(data.buckets, base).shortest for base in data.resolutions)
    return f"a side is shorter than {least} pixels (data.buckets.min), and data.buckets.upscale is off"


def merged(among: list[tuple[int, int]], records: list[int], buckets: Buckets | None) -> list[int]:
    """The bucket that each one's records go to in the end, itself where it stays.

    Those of fewer than data.buckets.smallest records are dissolved, smallest first, into the nearest of those
    that are left; without upscaling only into a size that theirs covers. The last one stays.
    """
    smallest, upscale = (buckets.smallest, buckets.upscale) if buckets else (1, True)
    goes, held, shape = np.arange(len(among)), np.array(records), np.array(among, np.int64)
    alive, settled = np.ones(len(among), bool), held >= smallest
    while alive.sum() > 1 and not settled.all():
        number = int(np.where(settled, held.max() + 1, held).argmin())
        settled[number] = True
        across, down = shape[number, 1] * shape[:, 0], shape[number, 0] * shape[:, 1]
        near = np.maximum(across / down, down / across)
        fits = alive if upscale else alive & (shape <= shape[number]).all(1)
        others = np.flatnonzero(fits & (goes != number))
        if len(others) == 0:
            continue
        target = others[np.lexsort((others, -shape[others].prod(1), near[others]))[0]]
        alive[number] = False
        goes[goes == number] = target
        held[target] += held[number]
        settled[target] |= held[target] >= smallest
    return goes.tolist()
