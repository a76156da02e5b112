"""The order of samples: every epoch a new permutation, cut into batches without loss, at any step at once."""

from collections.abc import Callable
from itertools import pairwise
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data.order import batch_at, permuted, slice_of

BatchAt = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]


def epoch(count: int, number: int, seed: int = 1) -> np.ndarray:
    """The whole order of an epoch."""
    return permuted(np.arange(count), np.full(count, number), count, seed)


def ids_of_ranks(
    at: BatchAt, count: int, batch_size: int, world: int, micro: int, steps: range
) -> np.ndarray:
    """What `world` ranks read in these steps, rank by rank within a micro-batch."""
    read = []
    for step in steps:
        ids, _ = at(count, batch_size, 1, step)
        for m in range(batch_size // (world * micro)):
            read += [ids[slice_of(rank, world, m, micro)] for rank in range(world)]
    return np.concatenate(read)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's rank correlation of two orders of the same samples."""
    a, b = np.argsort(a), np.argsort(b)
    signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return float(signs.sum() / (len(a) * (len(a) - 1)))


def check_epochs(at: BatchAt, count: int = 240, batch_size: int = 8, world: int = 2) -> None:
    """T5: over the ranks each epoch is a permutation without duplicates, and the orders are unrelated."""
    steps = count // batch_size
    orders = [
        ids_of_ranks(at, count, batch_size, world, 2, range(e * steps, (e + 1) * steps)) for e in range(3)
    ]
    for order in orders:
        assert sorted(order) == list(range(count)), "an epoch is not a permutation"
    spread = np.sqrt(2 * (2 * count + 5) / (9 * count * (count - 1)))  # of tau under independence
    for a, b in [*pairwise(orders), (orders[0], orders[2]), (orders[0], np.arange(count))]:
        assert abs(kendall(a, b)) < 4 * spread, "two epochs have related orders"


def test_epochs() -> None:
    check_epochs(batch_at)


def test_epochs_catches_a_seed_that_stays() -> None:
    def broken(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return batch_at(count, batch_size, seed, step % (count // batch_size))

    with pytest.raises(AssertionError, match="related"):
        check_epochs(broken)


def test_epochs_catches_sampling_with_replacement() -> None:
    def broken(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return np.random.default_rng(step).integers(0, count, batch_size), np.zeros(batch_size, np.int64)

    with pytest.raises(AssertionError, match="permutation"):
        check_epochs(broken)


def test_epochs_catches_an_order_that_only_turns() -> None:
    def broken(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        visits, places = np.divmod(step * batch_size + np.arange(batch_size), count)
        return (places + visits * 31) % count, visits

    with pytest.raises(AssertionError, match="related"):
        check_epochs(broken)


def check_visits(at: BatchAt, count: int = 37, batch_size: int = 8, steps: int = 23) -> None:
    """T6: after any number of steps the visits of two samples differ by one at most, and each is numbered."""
    histogram = np.zeros(count, int)
    for step in range(steps):
        ids, visits = at(count, batch_size, 1, step)
        assert len(ids) == batch_size, "a batch is not full"
        for number, visit in zip(ids, visits, strict=True):
            assert visit == histogram[number], "a visit has the wrong number"
            histogram[number] += 1
    whole, rest = divmod(steps * batch_size, count)
    expected = {whole: count - rest, whole + 1: rest}
    assert {n: int((histogram == n).sum()) for n in expected} == expected, f"visits {np.bincount(histogram)}"


def test_visits() -> None:
    check_visits(batch_at)
    check_visits(batch_at, count=3, batch_size=8)
    check_visits(batch_at, count=1, batch_size=4)


def test_visits_catches_a_dropped_tail() -> None:
    def broken(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        number, place = divmod(step, count // batch_size)
        order = np.random.default_rng(number).permutation(count)
        return order[place * batch_size :][:batch_size], np.full(batch_size, number)

    with pytest.raises(AssertionError, match="visit"):
        check_visits(broken)


def test_visits_catches_a_short_tail() -> None:
    def broken(count: int, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        number, place = divmod(step, -(-count // batch_size))
        ids = np.random.default_rng(number).permutation(count)[place * batch_size :][:batch_size]
        return ids, np.full(len(ids), number)

    with pytest.raises(AssertionError, match="full"):
        check_visits(broken)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 250),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 8),
    start=st.integers(0, 10**12),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_order(count: int, micro: int, accumulation: int, world: int, start: int, seed: int) -> None:
    """From any step on: the ranks make up the batch, and an epoch is a permutation."""
    batch_size = micro * accumulation * world
    steps = range(start, start + -(-2 * count // batch_size))
    ids, visits = map(
        np.concatenate, zip(*(batch_at(count, batch_size, seed, s) for s in steps), strict=True)
    )
    assert ids.dtype == visits.dtype == np.int64
    places = start * batch_size + np.arange(len(ids))
    assert np.array_equal(visits, places // count)
    for number in np.unique(visits):
        part = np.sort(ids[visits == number])
        assert len(np.unique(part)) == len(part) and part[0] >= 0 and part[-1] < count
        if (visits == number).sum() == count:
            assert np.array_equal(part, np.arange(count))
    parts = [slice_of(r, world, m, micro) for m in range(accumulation) for r in range(world)]
    covered = np.concatenate([np.arange(batch_size)[part] for part in parts])
    assert np.array_equal(covered, np.arange(batch_size))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2**61), step=st.integers(0, 2**40), seed=st.integers(0, 2**63 - 1))
def test_any_count_stays_inside(count: int, step: int, seed: int) -> None:
    ids, _ = batch_at(count, 16, seed, step)
    assert ids.min() >= 0 and ids.max() < count


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 19))
def test_resumed_order(count: int, batch_size: int, kill: int) -> None:
    """T7: a step's batch does not depend on the steps before it."""
    whole = [batch_at(count, batch_size, 5, step)[0].tolist() for step in range(20)]
    assert [batch_at(count, batch_size, 5, step)[0].tolist() for step in range(kill, 20)] == whole[kill:]


def test_one_batch_on_more_ranks() -> None:
    """The samples of a step are the same for 1, 2, 4 and 8 ranks, with and without accumulation."""
    whole = ids_of_ranks(batch_at, 100, 16, 1, 16, range(9))
    for world, micro in ((1, 2), (2, 8), (2, 1), (4, 4), (8, 2)):
        assert np.array_equal(ids_of_ranks(batch_at, 100, 16, world, micro, range(9)), whole)


def check_even(orders: np.ndarray) -> None:
    """Chi-square: all orders of few samples are equally likely, one-sided at 5 standard deviations."""
    count = orders.shape[1]
    _, seen = np.unique(orders @ count ** np.arange(count), return_counts=True)
    cells, expected = factorial(count), len(orders) / factorial(count)
    chi = ((seen - expected) ** 2 / expected).sum() + (cells - len(seen)) * expected
    assert chi < cells - 1 + 5 * np.sqrt(2 * (cells - 1)), f"chi-square {chi:.0f} of {cells} orders"


def epochs_of(count: int, number: int, seed: int = 1) -> np.ndarray:
    """Many epochs' orders, (number, count)."""
    positions, epochs = np.tile(np.arange(count), number), np.repeat(np.arange(number), count)
    return permuted(positions, epochs, count, seed).reshape(number, count)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_orders_are_equally_likely(count: int) -> None:
    check_even(epochs_of(count, 40 * factorial(count)))


def test_orders_over_seeds_are_equally_likely() -> None:
    check_even(np.stack([epoch(4, 0, seed) for seed in range(480)]))


def test_orders_catches_a_turning_order() -> None:
    turns = (np.arange(4) + np.random.default_rng(0).integers(0, 4, (960, 1))) % 4
    with pytest.raises(AssertionError, match="chi-square"):
        check_even(turns)


def check_places(orders: np.ndarray) -> None:
    """Chi-square: a sample is at every place, and before every other one, as often."""
    number, count = orders.shape
    seen = np.zeros((count, count))
    np.add.at(seen, (np.tile(np.arange(count), number), orders.ravel()), 1)
    following = np.zeros((count, count))
    np.add.at(following, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    pairs = following[~np.eye(count, dtype=bool)]
    for cells, freedom in ((seen, (count - 1) ** 2), (pairs, count * (count - 1) - 1)):
        chi = ((cells - cells.mean()) ** 2 / cells.mean()).sum()
        assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom), f"chi-square {chi:.0f}, {freedom} expected"


@pytest.mark.parametrize("count", [16, 25, 50, 100])
def test_places_are_equally_likely(count: int) -> None:
    check_places(epochs_of(count, 2000))


def test_places_catches_a_shuffle_in_a_window() -> None:
    rng = np.random.default_rng(0)
    blocks = np.arange(100).reshape(10, 10)
    near = np.stack([rng.permuted(blocks, axis=1).ravel() for _ in range(2000)])
    with pytest.raises(AssertionError, match="chi-square"):
        check_places(near)


def test_order_is_that_of_the_first_release() -> None:
    """A run that is resumed with a newer numpy or Sfumato must walk on in its order."""
    ids, visits = batch_at(10, 16, 42, 3)
    assert ids.tolist() == [3, 2, 7, 4, 5, 2, 1, 9, 0, 3, 8, 6, 1, 8, 2, 7]
    assert visits.tolist() == [4] * 2 + [5] * 10 + [6] * 4
