"""The order of samples: endless shuffled epochs of buckets and parts, cut into batches without loss."""

import pickle
import time
import tracemalloc
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache
from math import factorial, isqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import order as module
from sfumato.data.draws import BATCHES, MIXED, ORDER, bits
from sfumato.data.order import MOST_PARTS, Chosen, Order, permuted, slice_of

At = Callable[[int], Chosen]
Plan = tuple[np.ndarray, list[Fraction], int]  # counts, repeats, batch size

REPEATS = [Fraction(n) for n in ("1", "2", "5", "1/2", "3/2", "2/7", "1/30", "1.1", "12345/10007")]


@st.composite
def plans(draw: st.DrawFn, most: int = 12, repeats_of: Sequence[Fraction] = REPEATS) -> Plan:
    """A few buckets and parts, some cells empty."""
    buckets, parts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    cells = draw(st.lists(st.integers(0, most), min_size=buckets * parts, max_size=buckets * parts))
    cells[draw(st.integers(0, len(cells) - 1))] += 1
    repeats = draw(st.lists(st.sampled_from(repeats_of), min_size=parts, max_size=parts))
    return np.array(cells).reshape(buckets, parts), repeats, draw(st.integers(1, 9))


def share(plan: Plan, bucket: int, part: int, epochs: int) -> int:
    """Samples of a cell up to the end of so many epochs."""
    return int(epochs * plan[1][part] * int(plan[0][bucket, part]))


def stream(plan: Plan, bucket: int, epochs: int) -> int:
    """Samples of a bucket up to the end of so many epochs."""
    return sum(share(plan, bucket, part, epochs) for part in range(len(plan[1])))


def steps_of(plan: Plan, epochs: int) -> int:
    """Steps of so many epochs."""
    return sum(stream(plan, bucket, epochs) // plan[2] for bucket in range(len(plan[0])))


def one(count: int, batch_size: int, seed: int = 1) -> Order:
    """One bucket of one part."""
    return Order(np.array([[count]]), [Fraction(1)], batch_size, seed)


def seen(at: At, steps: Iterable[int]) -> Counter[tuple[int, int, int, int]]:
    """How often each (bucket, part, member, visit) comes."""
    rows: Counter[tuple[int, int, int, int]] = Counter()
    for step in steps:
        it = at(step)
        rows.update(
            (it.bucket, *row)
            for row in zip(it.part.tolist(), it.member.tolist(), it.visit.tolist(), strict=True)
        )
    return rows


@cache
def keys_of(seed: int, first: int, second: int, stream_number: int) -> list[int]:
    """The keys of one shuffle."""
    return [int(key) for key in bits(seed, first, second, stream_number).random_raw(8)]


def plainly(position: int, count: int, name: tuple[int, int], seed: int, stream_number: int) -> int:
    """`permuted` for one position, in whole numbers of any size."""
    mask = 2**64 - 1
    keys = keys_of(seed, *name, stream_number)
    half = max(isqrt(count - 1) + 1, 8)
    while True:
        left, right = divmod(position, half)
        for key in keys:
            value = right ^ key
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
            left, right = right, (left + (value ^ (value >> 31)) % half) % half
        position = left * half + right
        if position < count:
            return position


def written_down(plan: Plan, seed: int, epochs: int) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
    """Every step of so many epochs as (epoch, bucket, [(part, member, visit)]): the order in full."""
    counts, repeats, batch_size = plan
    streams: list[list[tuple[int, int, int]]] = [[] for _ in counts]
    taken = [0 for _ in counts]
    steps = []
    for epoch in range(epochs):
        full = []
        for bucket, row in enumerate(counts.tolist()):
            plain = []
            for part, count in enumerate(row):
                for y in range(share(plan, bucket, part, epoch), share(plan, bucket, part, epoch + 1)):
                    name = bucket * MOST_PARTS + part, y // count
                    plain.append((part, plainly(y % count, count, name, seed, ORDER), y // count))
            streams[bucket] += [
                plain[plainly(i, len(plain), (bucket, epoch), seed, MIXED)] for i in range(len(plain))
            ]
            while taken[bucket] + batch_size <= len(streams[bucket]):
                full.append((epoch, bucket, streams[bucket][taken[bucket] :][:batch_size]))
                taken[bucket] += batch_size
        steps += [full[plainly(i, len(full), (0, epoch), seed, BATCHES)] for i in range(len(full))]
    return steps


@settings(max_examples=20, deadline=None)
@given(plans(), st.integers(0, 2**63 - 1))
def test_the_order_is_the_written_one(plan: Plan, seed: int) -> None:
    """Computed at any step, it is what a list of all samples would say."""
    order = Order(*plan, seed)
    steps = written_down(plan, seed, 4)
    assert len(steps) == steps_of(plan, 4)
    for step, (epoch, bucket, rows) in enumerate(steps):
        it = order.batch_at(step)
        found = list(zip(it.part.tolist(), it.member.tolist(), it.visit.tolist(), strict=True))
        assert (order.epoch_of(step), it.bucket, found) == (epoch, bucket, rows)
        assert it.part.dtype == it.member.dtype == it.visit.dtype == np.int64


def check_shown(at: At, plan: Plan, epochs: int) -> None:
    """T6: every visit comes once; fewer than a batch of each bucket waits, and comes in the next epochs."""
    counts, _, batch_size = plan
    shown = seen(at, range(steps_of(plan, epochs)))
    assert set(shown.values()) <= {1}, "a visit came twice"
    for bucket, row in enumerate(counts.tolist()):
        waiting = stream(plan, bucket, epochs) - sum(1 for key in shown if key[0] == bucket)
        assert 0 <= waiting < batch_size, (
            f"{waiting} samples of bucket {bucket} are missing, a tail is dropped"
        )
        for part, count in enumerate(row):
            passes = Counter(key[3] for key in shown if key[:2] == (bucket, part))
            assert all(n <= count for n in passes.values())
            assert sum(passes.values()) <= share(plan, bucket, part, epochs), "a part has too large a share"
            assert all(v * count < share(plan, bucket, part, epochs) for v in passes), (
                "a visit came too early"
            )
    waits = [stream(plan, bucket, epochs) for bucket in range(len(counts))]
    later = epochs
    while any(stream(plan, b, later) // batch_size * batch_size < number for b, number in enumerate(waits)):
        later += 1
    shown += seen(at, range(steps_of(plan, epochs), steps_of(plan, later)))
    assert set(shown.values()) <= {1}, "a visit came twice"
    visits = defaultdict(set)
    for *record, visit in shown:
        visits[tuple(record)].add(visit)
    for bucket, part in np.argwhere(counts).tolist():
        whole = share(plan, bucket, part, epochs) // int(counts[bucket, part])
        for member in range(counts[bucket, part]):
            assert visits[bucket, part, member] >= set(range(whole)), "a visit is missing"


def check_shares(at: At, plan: Plan, epochs: int) -> None:
    """With batches of one nothing waits: shares are whole and visits without gaps at each epoch's end."""
    counts, repeats, batch_size = plan
    assert batch_size == 1
    shown = seen(at, range(steps_of(plan, epochs)))
    for bucket, part in np.ndindex(*counts.shape):
        count = int(counts[bucket, part])
        mine = sorted((key[2], key[3]) for key in shown.elements() if key[:2] == (bucket, part))
        exact = epochs * repeats[part] * count
        assert 0 <= exact - len(mine) < 1, f"{len(mine)} of {float(exact)} samples of cell {bucket}, {part}"
        for member in range(count):
            visits = [visit for number, visit in mine if number == member]
            assert visits == list(range(len(visits))), "the visits of a record have gaps"
            assert len(visits) - len(mine) // count in (0, 1), "a record comes too often"


FEW: Plan = np.array([[7, 3], [0, 11], [1, 0]]), [Fraction(3, 2), Fraction(2)], 4


@settings(max_examples=20, deadline=None)
@given(plans(repeats_of=REPEATS[:6]), st.integers(1, 5), st.integers(0, 2**63 - 1))
def test_nothing_is_lost_or_repeated(plan: Plan, epochs: int, seed: int) -> None:
    check_shown(Order(*plan, seed).batch_at, plan, epochs)


@settings(max_examples=12, deadline=None)
@given(plans(most=5), st.integers(1, 12))
def test_shares_are_exact(plan: Plan, epochs: int) -> None:
    plan = plan[0], plan[1], 1
    check_shares(Order(*plan, 3).batch_at, plan, epochs)


def test_few_are_shown() -> None:
    check_shown(Order(*FEW, 1).batch_at, FEW, 3)


def test_shown_catches_a_dropped_tail() -> None:
    """Each epoch anew from its own batches."""
    plan: Plan = np.array([[7, 3], [5, 0]]), [Fraction(1)] * 2, 4
    per_epoch = steps_of(plan, 1)
    check_shown(Order(*plan, 1).batch_at, plan, 3)

    def broken(step: int) -> Chosen:
        epoch, number = divmod(step, per_epoch)
        it = Order(*plan, epoch).batch_at(number)
        return Chosen(it.bucket, it.part, it.member, it.visit + epoch)

    with pytest.raises(AssertionError, match="tail"):
        check_shown(broken, plan, 3)


def test_shown_catches_a_tail_that_is_filled_up() -> None:
    """The last batch of an epoch takes samples of its beginning."""
    whole = one(10, 4)

    def broken(step: int) -> Chosen:
        epoch, number = divmod(step, 3)
        places = (np.arange(4) + number * 4) % 10
        return Chosen(0, np.zeros(4, int), places, np.full(4, epoch))

    check_shown(whole.batch_at, (np.array([[10]]), [Fraction(1)], 4), 3)
    with pytest.raises(AssertionError, match="twice"):
        check_shown(broken, (np.array([[10]]), [Fraction(1)], 4), 3)


def test_shown_catches_shuffles_per_rank() -> None:
    """Two ranks that shuffle for themselves and each take their half of a batch."""
    ranks = [Order(*FEW, seed) for seed in (1, 2)]

    def broken(step: int) -> Chosen:
        first, second = (rank.batch_at(step) for rank in ranks)
        halves = slice(0, 2), slice(2, 4)
        return Chosen(
            first.bucket,
            *(
                np.concatenate([getattr(first, name)[halves[0]], getattr(second, name)[halves[1]]])
                for name in ("part", "member", "visit")
            ),
        )

    with pytest.raises(AssertionError):
        check_shown(broken, FEW, 3)


def test_shares_catch_rounding_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = np.array([[7, 3], [5, 11]]), [Fraction(3, 2), Fraction(2, 7)], 1
    check_shares(Order(*plan, 1).batch_at, plan, 5)

    def up(cell: module.Cell, epochs: int) -> int:
        return -(-epochs * cell.numerator // cell.denominator)

    monkeypatch.setattr(module.Cell, "total", up)
    monkeypatch.setattr(
        Order, "total", lambda self, bucket, epochs: sum(up(cell, epochs) for cell in self.cells[bucket])
    )
    monkeypatch.setattr(module, "epoch_at", lambda total, rate, slack, place: search(total, place))
    with pytest.raises(AssertionError, match="cell"):
        check_shares(Order(*plan, 1).batch_at, plan, 5)


def search(total: Callable[[int], int], place: int) -> int:
    """The last e with total(e) <= place."""
    return bisect_right(range(10_000), place, key=total) - 1


@settings(max_examples=40, deadline=None)
@given(plans(), st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 10**12))
def test_a_step_does_not_depend_on_others(plan: Plan, steps: list[int], start: int) -> None:
    """T7: in any order of calls, and after pickling; no answer can be changed by who has it."""
    used = Order(*plan, 5)
    for step in [start + step for step in steps]:
        it, fresh = used.batch_at(step), Order(*plan, 5)
        other = fresh.batch_at(step)
        assert it.bucket == other.bucket and used.epoch_of(step) == fresh.epoch_of(step)
        for name in ("part", "member", "visit"):
            assert np.array_equal(getattr(it, name), getattr(other, name))
            assert not getattr(it, name).flags.writeable
        used = pickle.loads(pickle.dumps(used)) if step % 2 else used


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 8))
def test_ranks_and_micro_batches_make_up_a_batch(micro: int, accumulation: int, world: int) -> None:
    parts = [slice_of(r, world, m, micro) for m in range(accumulation) for r in range(world)]
    batch = np.arange(micro * accumulation * world)
    assert np.array_equal(np.concatenate([batch[part] for part in parts]), batch)


@settings(max_examples=40, deadline=None)
@given(plans(most=10**10), st.integers(0, 10**9), st.integers(0, 2**63 - 1))
def test_many_stay_inside(plan: Plan, step: int, seed: int) -> None:
    plan = plan[0], plan[1], plan[2] * 500
    order = Order(*plan, seed)
    it = order.batch_at(step)
    assert len(it.part) == len(it.member) == len(it.visit) == plan[2]
    assert (it.member >= 0).all() and (it.member < plan[0][it.bucket, it.part]).all()
    epoch = order.epoch_of(step)
    assert steps_of(plan, epoch) <= step < steps_of(plan, epoch + 1)
    for part in set(it.part.tolist()):
        last = share(plan, it.bucket, part, epoch + 1) - 1
        assert 0 <= it.visit[it.part == part].min()
        assert it.visit[it.part == part].max() <= last // int(plan[0][it.bucket, part])


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4096), (3, 4096), (10**9, 4096), (2**59, 16)])
def test_far_visits(count: int, batch_size: int) -> None:
    """One part, once an epoch: the visit is place // count, also where it passes 32 bits."""
    for step in (0, 10**6, 10**9, 10**12):
        places = [(step * batch_size + i) // count for i in range(batch_size)]
        assert sorted(one(count, batch_size).batch_at(step).visit.tolist()) == places


def test_empty_epochs_are_passed_over() -> None:
    """One record in a thousand epochs: a batch of 4 is full at the end of the 4000th."""
    order = Order(np.array([[1]]), [Fraction(1, 1000)], 4, 0)
    assert [order.epoch_of(step) for step in range(3)] == [3999, 7999, 11999]
    assert order.batch_at(2).visit.tolist() == [8, 9, 10, 11]
    assert order.samples_per_epoch == Fraction(1, 1000)


def test_what_is_asked_for_must_make_sense() -> None:
    for counts, repeats, batch_size in (
        (np.zeros((2, 2), int), [Fraction(1)] * 2, 1),
        (np.ones((2, 2), int), [Fraction(1)], 1),
        (np.ones((2, 2), int), [Fraction(1), Fraction(0)], 1),
        (np.ones((2, 2), int), [Fraction(1)] * 2, 0),
        (np.full((2, 2), 2**60), [Fraction(1)] * 2, 1),
    ):
        with pytest.raises(AssertionError, match="."):
            Order(counts, repeats, batch_size, 0)
    for step in (-1, 2**60):
        with pytest.raises(AssertionError, match="no batch"):
            one(10, 2).batch_at(step)


def orders(order: Order, count: int, epochs: int) -> list[np.ndarray]:
    """The members of one bucket and part as they come, epoch by epoch; the batch size divides count."""
    steps = count // order.batch_size
    return [
        np.concatenate([order.batch_at(epoch * steps + step).member for step in range(steps)])
        for epoch in range(epochs)
    ]


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's rank correlation of two orders of the same samples."""
    a, b = np.argsort(a), np.argsort(b)
    signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return float(signs.sum() / (len(a) * (len(a) - 1)))


def check_unrelated(orders: list[np.ndarray]) -> None:
    """T5: each order is a permutation without duplicates, and no two of them are related."""
    count = len(orders[0])
    for order in orders:
        assert sorted(order) == list(range(count)), "an epoch is not a permutation"
    spread = np.sqrt(2 * (2 * count + 5) / (9 * count * (count - 1)))  # of tau under independence
    everyone = [*orders, np.arange(count)]
    for number, a in enumerate(everyone):
        for b in everyone[:number]:
            assert abs(kendall(a, b)) < 4.5 * spread, "two epochs have related orders"


def test_epochs_and_seeds_are_unrelated() -> None:
    check_unrelated(orders(one(240, 8, seed=1), 240, 3) + orders(one(240, 8, seed=2), 240, 3))


def test_unrelated_catches_the_same_order_in_each_epoch() -> None:
    first = orders(one(240, 8), 240, 1)
    with pytest.raises(AssertionError, match="related"):
        check_unrelated(first * 2)


def test_unrelated_catches_an_order_that_only_turns() -> None:
    with pytest.raises(AssertionError, match="related"):
        check_unrelated([(np.arange(240) + 31 * epoch) % 240 for epoch in range(3)])


def test_unrelated_catches_sampling_with_replacement() -> None:
    with pytest.raises(AssertionError, match="permutation"):
        check_unrelated([np.random.default_rng(0).integers(0, 240, 240)] * 2)


def check_spread(labels: np.ndarray) -> None:
    """Each label is spread over the whole sequence: its mean place is in the middle, to 5 standard errors."""
    count = len(labels)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        error = np.sqrt((count + 1) * (count - len(places)) / (12 * len(places)))  # drawn without replacement
        assert abs(places.mean() - (count - 1) / 2) < 5 * error, f"{label} comes in a heap"


def check_blended(batches: np.ndarray) -> None:
    """Chi-square: the parts (n, B) of n batches, 0 or 1, as if each sample's were drawn for itself."""
    number, size = batches.shape
    rate = batches.mean()
    chi = ((batches.sum(1) - size * rate) ** 2).sum() / (size * rate * (1 - rate))
    assert chi < number + 5 * np.sqrt(2 * number), f"chi-square {chi:.0f} of {number} batches: parts apart"


MIXTURE: Plan = np.array([[300, 500], [40, 60], [2000, 20]]), [Fraction(2), Fraction(1, 2)], 4


def an_epoch(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The buckets (n,) of an epoch's steps, and the parts (m, B) of the batches of bucket 0."""
    order = Order(*plan, 1)
    steps = [order.batch_at(step) for step in range(steps_of(plan, 1))]
    return np.array([it.bucket for it in steps]), np.stack([it.part for it in steps if it.bucket == 0])


def test_buckets_and_parts_are_spread_over_the_epoch() -> None:
    buckets, parts = an_epoch(MIXTURE)
    check_spread(buckets)
    check_spread(parts.ravel())
    check_blended(parts)


def in_turn(monkeypatch: pytest.MonkeyPatch, stream_number: int) -> None:
    """Break one stream: nothing is shuffled."""

    def broken(positions: np.ndarray, *others: Any) -> np.ndarray:
        return positions if others[-1] == stream_number else permuted(positions, *others)

    monkeypatch.setattr(module, "permuted", broken)


def test_spread_catches_one_bucket_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn(monkeypatch, BATCHES)
    with pytest.raises(AssertionError, match="heap"):
        check_spread(an_epoch(MIXTURE)[0])


def test_blended_catches_one_part_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn(monkeypatch, MIXED)
    with pytest.raises(AssertionError, match="apart"):
        check_blended(an_epoch(MIXTURE)[1])


def counts_of_a_billion() -> np.ndarray:
    """33 buckets of 3 parts, a billion records in all."""
    counts = np.random.default_rng(0).integers(1, 10**9, (33, 3))
    counts = counts * 10**9 // counts.sum()
    counts[0, 0] += 10**9 - counts.sum()
    return counts


def test_a_seek_is_as_good_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 10**9 of a billion records: a few permutations of a batch, a few sums, and no memory."""
    order = Order(counts_of_a_billion(), [Fraction(1), Fraction(3, 2), Fraction(1, 7)], 256, 1)
    shuffled, sums = [], []

    def feistel(values: np.ndarray, keys: np.ndarray, half: np.ndarray) -> np.ndarray:
        shuffled.append(len(values))
        return real(values, keys, half)

    def total(self: Order, bucket: int, epochs: int) -> int:
        sums.append(bucket)
        return real_total(self, bucket, epochs)

    real, real_total = module.feistel, Order.total
    monkeypatch.setattr(module, "feistel", feistel)
    monkeypatch.setattr(Order, "total", total)
    order.batch_at(0)
    shuffled.clear()
    sums.clear()
    tracemalloc.start()
    begun = time.process_time()
    it = order.batch_at(10**9)
    seconds = time.process_time() - begun
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(it.member) == 256 and order.epoch_of(10**9) > 200
    assert sum(shuffled) < 2.5 * 256 + 64, f"{shuffled} values were shuffled"
    assert len(sums) < 10 * 33, f"{len(sums)} sums over a bucket's parts"
    assert peak < 10**6, f"{peak} bytes"
    assert seconds < 0.5, f"{seconds:.3f} s"


def test_a_bisection_sees_few_epochs_however_far() -> None:
    for place in (0, 10**6, 10**18):
        asked = []

        def total(epochs: int) -> int:
            asked.append(epochs)  # noqa: B023
            return epochs * 10**9 // 7 + epochs * 5 // 3

        found = module.epoch_at(total, Fraction(10**9, 7) + Fraction(5, 3), 2, place)
        assert len(asked) <= 2 and total(found) <= place < total(found + 1)


def shuffles(count: int, number: int, seed: int = 1) -> np.ndarray:
    """Many shuffles of range(count), (number, count)."""
    positions, which = np.tile(np.arange(count), number), np.repeat(np.arange(number), count)
    names = [(0, name) for name in range(number)]
    return permuted(positions, which, [count] * number, names, seed, ORDER).reshape(number, count)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2**64 - 1)), min_size=1, max_size=6),
    st.integers(0, 2**63 - 1),
)
def test_shuffles_together_are_those_apart(groups: list[tuple[int, int]], seed: int) -> None:
    """Small and large ones in one call, whole: each is a permutation, and what plain numbers say."""
    counts, names = [count for count, _ in groups], [(3, name) for _, name in groups]
    positions = np.concatenate([np.arange(count) for count in counts])
    which = np.repeat(np.arange(len(groups)), counts)
    found = permuted(positions, which, counts, names, seed, MIXED)
    for number, (count, name) in enumerate(zip(counts, names, strict=True)):
        mine = found[which == number]
        assert sorted(mine) == list(range(count))
        for position in {0, count // 2, count - 1}:
            assert mine[position] == plainly(position, count, name, seed, MIXED)


def check_even(orders: np.ndarray) -> None:
    """Chi-square: all orders of few samples are equally likely, one-sided at 5 standard deviations."""
    count = orders.shape[1]
    _, seen = np.unique(orders @ count ** np.arange(count), return_counts=True)
    cells, expected = factorial(count), len(orders) / factorial(count)
    chi = ((seen - expected) ** 2 / expected).sum() + (cells - len(seen)) * expected
    assert chi < cells - 1 + 5 * np.sqrt(2 * (cells - 1)), f"chi-square {chi:.0f} of {cells} orders"


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_orders_are_equally_likely(count: int) -> None:
    check_even(shuffles(count, 40 * factorial(count)))


def test_orders_over_seeds_are_equally_likely() -> None:
    check_even(np.concatenate([shuffles(4, 1, seed) for seed in range(480)]))


def test_orders_of_an_epoch_are_equally_likely() -> None:
    """Through both shuffles, of the places and of the records."""
    check_even(np.stack([one(4, 4).batch_at(step).member for step in range(960)]))


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


@pytest.mark.parametrize("count", [16, 25, 50, 65, 100])
def test_places_are_equally_likely(count: int) -> None:
    check_places(shuffles(count, 2000))


def test_places_catches_a_shuffle_in_a_window() -> None:
    rng = np.random.default_rng(0)
    blocks = np.arange(100).reshape(10, 10)
    near = np.stack([rng.permuted(blocks, axis=1).ravel() for _ in range(2000)])
    with pytest.raises(AssertionError, match="chi-square"):
        check_places(near)


def test_the_order_stays() -> None:
    """A run that is resumed with a newer numpy or Sfumato must walk on in its order."""
    places = np.arange(48, 64)
    names = [(0, epoch) for epoch in (4, 5, 6)]
    ids = permuted(places % 10, places // 10 - 4, [10] * 3, names, 42, ORDER)
    assert ids.tolist() == [3, 2, 7, 4, 5, 2, 1, 9, 0, 3, 8, 6, 1, 8, 2, 7]
    it = Order(np.array([[100, 7], [30, 9]]), [Fraction(1), Fraction(5, 2)], 12, 42).batch_at(201)
    assert (it.bucket, it.part.tolist()) == (1, [0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0])
    assert it.member.tolist() == [19, 9, 5, 5, 5, 17, 6, 26, 0, 28, 29, 18]
    assert it.visit.tolist() == [14, 14, 36, 37, 35, 14, 35, 14, 36, 14, 14, 14]
