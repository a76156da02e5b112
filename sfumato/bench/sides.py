"""Several ways to the same result: first compared, then timed in turn, so that all meet the same machine.

A machine that is busy for a while slows them alike, and the ratio of the medians stays; how far single
rounds lie apart is told beside it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def same(item: Any, result: Any) -> Tensors:
    """For a side that gives what is compared."""
    found: Tensors = result
    return found


@dataclass(frozen=True)
class Side:
    """One way. `work` takes an item, such as a batch's numbers, and is timed."""

    name: str
    work: Callable[[Any], Any]
    seen: Callable[[Any, Any], Tensors] = same
    """What is compared with the others of (item, result): tensors by name; not timed."""
    mean: float = 0.0
    """How far a tensor's values may be from the first side's, on average."""
    most: float = 0.0
    """How far any single one may be."""


class Distance(NamedTuple):
    """How far a side's values were from the first one's."""

    mean: float
    most: float


def compare(sides: Sequence[Side], items: Sequence[Any]) -> list[Distance]:
    """Every side's results beside the first one's, the largest distances; AssertionError if not equal.

    Afterwards all that the sides read lies in the system's page cache.
    """
    distances = [Distance(0.0, 0.0) for _ in sides]
    for item in items:
        wanted = sides[0].seen(item, sides[0].work(item))
        for number, side in enumerate(sides[1:], 1):
            found = distance(side, wanted, side.seen(item, side.work(item)), f"{side.name}, item {item}")
            distances[number] = Distance(*map(max, distances[number], found))
    return distances


def distance(side: Side, wanted: Tensors, found: Tensors, where: str) -> Distance:
    """How far a result is from what it should be; AssertionError if that is more than the side may."""
    assert found.keys() == wanted.keys(), f"{where}: {sorted(found)}, not {sorted(wanted)}"
    worst = Distance(0.0, 0.0)
    for name, tensor in found.items():
        right = wanted[name]
        assert tensor.shape == right.shape, f"{where}: {name} of {tensor.shape}, not {right.shape}"
        apart = (tensor.float() - right.float()).abs()
        mean, most = apart.mean().item(), apart.max().item()
        # Written so that a NaN fails too.
        good = mean <= side.mean and most <= side.most
        assert good, f"{where}: {name} is not equal: {mean:.3g} away on average, {most:.3g} at most"
        worst = Distance(max(worst.mean, mean), max(worst.most, most))
    return worst


class Spent(NamedTuple):
    """Seconds for all items in one round."""

    wall: float
    cpu: float
    """Of the processor: it does not count what other programs take of a busy machine."""


def timed(sides: Sequence[Side], items: Sequence[Any], rounds: int) -> list[list[Spent]]:
    """What each side takes in each of the rounds: A B C, A B C, ..."""
    seconds: list[list[Spent]] = [[] for _ in sides]
    for _ in range(rounds):
        for spent, side in zip(seconds, sides, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            for item in items:
                side.work(item)
            spent.append(Spent(time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def side_by_side(
    what: str, sides: Sequence[Side], items: Sequence[Any], samples: int, rounds: int
) -> dict[str, Any]:
    """Compare and time; the first side is the one that the others' speeds are told in.

    samples: that all items hold. Gives {"what", "samples", "rounds", "sides": [{"name", "median", "low",
    "high" (samples a second), "ratio" (to the first side's median), "cpu" (seconds of the processor for a
    sample, the median), "mean", "most" (distances)}]}.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loader's worker has it
    try:
        distances = compare(sides, items)
        seconds = timed(sides, items, rounds)
    finally:
        torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for side, spent, apart in zip(sides, seconds, distances, strict=True):
        rates = [samples / each.wall for each in spent]
        row = {"name": side.name, "median": median(rates), "low": min(rates), "high": max(rates)}
        row |= {"ratio": row["median"] / rows[0]["median"] if rows else 1.0}
        row |= {"cpu": median([each.cpu for each in spent]) / samples}
        rows.append(row | apart._asdict())
    return {"what": what, "samples": samples, "rounds": rounds, "sides": rows}
