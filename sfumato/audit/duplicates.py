"""Pictures that are there more than once: the same bytes, or nearly the same picture.

Nearly the same are pictures whose 64-bit hashes differ in at most 3 bits, and whose four quarters have nearly
the same colours. Of four bands of 16 bits one must then be equal, and of the other 48 bits one of four bands
of 12: sixteen sortings find every pair. Memory stays below 64 bytes a record, whatever there is to find.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BITS = 3
"""Of the 64, by which two hashes of nearly the same picture may differ."""
LEVELS = 16
"""Of 256, by which the mean colours of their quarters may differ."""
PLAIN = 8
"""Hashes of fewer bits than this that are set, or that are not, are compared only where they are equal:
soft grounds without anything on them are much alike."""
STEPS = 1024
"""Among more records than this of one key and colour, each is compared with the next ones only."""
CHUNK = 2**18  # records that are reckoned with at once


@dataclass(frozen=True)
class Groups:
    """Groups of two or more records."""

    members: np.ndarray
    """Record numbers, group after group; groups come by their first records, and members ascend."""
    starts: np.ndarray
    """(groups + 1,): where a group begins in `members`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            yield self.members[start:end]

    @property
    def extra(self) -> int:
        """Records that would go if one of each group stayed."""
        return len(self.members) - len(self)


def groups_of(firsts: np.ndarray) -> Groups:
    """The groups of records (N,) int32, each told by the first record of its group."""
    later = firsts != np.arange(len(firsts), dtype=np.int32)
    later[firsts[later]] = True  # the first one of a group of several
    members = np.flatnonzero(later).astype(np.int32)
    firsts = firsts[members]
    order = np.argsort(firsts, kind="stable").astype(np.int32)
    starts = np.flatnonzero(np.diff(firsts[order], prepend=-1))
    return Groups(members[order], np.r_[starts, len(members)])


def united(order: np.ndarray, same: np.ndarray, firsts: np.ndarray) -> None:
    """Make the first record of each run of equal ones, of a stable sorting, the first of their group.

    order: (n,) int32 record numbers, sorted. same: (n,) bool, equal to the one before. firsts: (N,) int32.
    """
    begins = np.arange(len(order), dtype=np.int32)
    begins[same] = 0
    np.maximum.accumulate(begins, out=begins)
    firsts[order] = order[begins]


def chunks(count: int) -> Iterator[slice]:
    """The numbers below `count` in portions."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def sorted_by(key: np.ndarray, records: np.ndarray) -> np.ndarray:
    """The records (n,) int32 in the order of their keys (n,), equal ones as they come."""
    found: np.ndarray = records[np.argsort(key, kind="stable")]
    return found


def exact(digests: np.ndarray, usable: np.ndarray) -> Groups:
    """Records with the same bytes. digests: (N, 16) uint8. usable: (N,) bool, those that count."""
    firsts = np.arange(len(digests), dtype=np.int32)
    halves = digests.view(np.uint64)  # (N, 2)
    order = np.flatnonzero(usable).astype(np.int32)
    order = sorted_by(halves[order, 0], order)
    same = np.zeros(len(order), bool)
    for some in chunks(len(order) - 1):
        left, right = order[some], order[some.start + 1 : some.stop + 1]
        same[some.start + 1 : some.stop + 1] = (halves[left] == halves[right]).all(1)
    united(order, same, firsts)
    return groups_of(firsts)


def near(hashes: np.ndarray, colours: np.ndarray, usable: np.ndarray) -> Groups:
    """Records that show nearly the same, directly or by way of others.

    hashes: (N,) uint64. colours: (N, 12) uint8. usable: (N,) bool, those that are compared: not the blank
    ones, whose hashes are all alike, and only one of those with the same bytes.
    """
    firsts = np.arange(len(hashes), dtype=np.int32)
    apart = merge_equal(firsts, hashes, colours, usable)
    for band in range(16):
        key = np.empty(len(apart), np.uint64)
        for some in chunks(len(apart)):
            # Close pictures have close colours: of those with equal bits only neighbours are compared.
            green = colours[apart[some], 1].astype(np.uint64)
            key[some] = bits_of(hashes[apart[some]], band) << np.uint64(8) | green
        order = sorted_by(key, apart)
        key.sort()
        for left, right in candidates(key):
            one, other = order[left], order[right]
            close = distance(hashes[one], hashes[other]) <= BITS
            one, other = one[close], other[close]
            gap = np.abs(colours[one].astype(np.int16) - colours[other]).max(1, initial=0)
            unite(firsts, one[gap <= LEVELS], other[gap <= LEVELS])
    for some in chunks(len(firsts)):
        firsts[some] = roots(firsts, firsts[some])
    return groups_of(firsts)


def merge_equal(
    firsts: np.ndarray, hashes: np.ndarray, colours: np.ndarray, usable: np.ndarray
) -> np.ndarray:
    """Unite those of one hash and nearly one colour, which there may be thousands of.

    The first of each (n,) int32, ascending, without those that are too plain to be compared further.
    """
    order = np.flatnonzero(usable).astype(np.int32)
    mixed = np.empty(len(order), np.uint64)
    for some in chunks(len(order)):
        shade = np.ascontiguousarray(colours[order[some]] // LEVELS)
        halves = shade[:, :6] << 4 | shade[:, 6:]  # (n, 6)
        wide = np.zeros((len(halves), 8), np.uint8)
        wide[:, :6] = halves
        mixed[some] = hashes[order[some]] ^ wide.view(np.uint64)[:, 0] * np.uint64(0x9E3779B97F4A7C15)
    order = sorted_by(mixed, order)
    del mixed
    same = np.zeros(len(order), bool)
    for some in chunks(len(order) - 1):
        left, right = order[some], order[some.start + 1 : some.stop + 1]
        alike = (colours[left] // LEVELS == colours[right] // LEVELS).all(1)
        same[some.start + 1 : some.stop + 1] = alike & (hashes[left] == hashes[right])
    united(order, same, firsts)
    order = np.sort(order[~same])
    held = np.zeros(len(order), bool)
    for some in chunks(len(order)):
        bits = distance(hashes[order[some]], np.uint64(0))
        held[some] = (bits >= PLAIN) & (bits <= 64 - PLAIN)
    return order[held]


def bits_of(hashes: np.ndarray, band: int) -> np.ndarray:
    """28 bits of hashes (n,) uint64; those at a distance of 3 or less share them for one of the 16 bands."""
    outer, inner = divmod(band, 4)
    at = np.uint64(16 * outer)
    first = hashes >> at & np.uint64(0xFFFF)
    low = hashes & np.uint64((1 << 16 * outer) - 1)
    rest = hashes >> at >> np.uint64(16) << at | low  # the other 48 bits
    return first << np.uint64(12) | rest >> np.uint64(12 * inner) & np.uint64(0xFFF)


def candidates(key: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of places whose keys are at most LEVELS apart, in portions; up to STEPS places apart.

    key: (n,) uint64, sorted. Of keys with other bits above the lowest 8 some are that near too, and do no
    harm.
    """
    for some in chunks(len(key)):
        places = np.arange(some.start, some.stop, dtype=np.int32)
        for step in range(1, STEPS + 1):
            places = places[places < len(key) - step]
            places = places[key[places + step] - key[places] <= LEVELS]
            if not len(places):
                break
            yield places, places + step


def distance(one: np.ndarray, other: np.ndarray | np.uint64) -> np.ndarray:
    """How many bits of two (n,) uint64 differ, (n,) uint64: sums of 2, 4 and 8 bits, then of the bytes."""
    rest = one ^ other
    rest = rest - (rest >> np.uint64(1) & np.uint64(0x5555555555555555))
    rest = (rest & np.uint64(0x3333333333333333)) + (rest >> np.uint64(2) & np.uint64(0x3333333333333333))
    rest = rest + (rest >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return rest * np.uint64(0x0101010101010101) >> np.uint64(56)


def roots(firsts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first record of each place's group."""
    found = firsts[places]
    while (found != (above := firsts[found])).any():
        found = above
    return found


def unite(firsts: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Make one group of the groups of each pair; a group is named by its first record."""
    while len(one):
        one, other = roots(firsts, one), roots(firsts, other)
        apart = one != other
        one, other = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        np.minimum.at(firsts, other, one)
