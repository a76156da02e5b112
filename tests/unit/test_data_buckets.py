"""Buckets: their sizes, which picture goes to which, and the cells on disk."""

import json
import os
import pickle
import shutil
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.config import Buckets, Data
from sfumato.data import buckets as module
from sfumato.data.aspects import limits, merged
from sfumato.data.buckets import Cells, assign, sizes, targets
from sfumato.data.order import Order
from sfumato.errors import UserError

Assign = Callable[[np.ndarray, np.ndarray, list[tuple[int, int]]], np.ndarray]
SIDES = st.integers(1, 4000)
PICTURES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=40)


def data(resolution: int | tuple[int, ...] = 1024, **buckets: Any) -> Data:
    """A config's data with buckets."""
    return Data(source="x", resolution=resolution, buckets=Buckets(**buckets))


def pictures(number: int, seed: int = 0, shortest: int = 40) -> np.ndarray:
    """Sizes as photos have them, uint32: a few usual ones, and any."""
    rng = np.random.default_rng(seed)
    usual = np.array([(1024, 1024), (1080, 1920), (1920, 1080), (3000, 2000), (600, 800)])
    found = usual[rng.integers(0, len(usual), number)]
    odd = rng.random(number) < 0.6
    found[odd] = np.exp(rng.uniform(np.log(shortest), np.log(4000), (odd.sum(), 2)))
    return found.astype(np.uint32)


def test_the_33_of_1024() -> None:
    """As another program makes them of 512 to 2048 in steps of 64."""
    found = sizes(data(), 1024)
    assert len(found) == 33 and found == sorted(set(found))
    assert (found[0], found[-1], (1024, 1024) in found) == ((512, 1856), (2048, 512), True)
    assert sizes(data(min=512, max=2048, step=64, area=1024**2), 1024) == found


def test_one_square_without_buckets() -> None:
    assert sizes(Data(source="x", resolution=1000), 1000) == [(1000, 1000)]


def test_given_sizes_are_width_and_height() -> None:
    assert sizes(data(sizes=((640, 512), (512, 640), (640, 512))), 1024) == [(512, 640), (640, 512)]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(8, 2048),
    st.integers(8, 128),
    st.none() | st.integers(8, 1024),
    st.none() | st.integers(8, 4096),
    st.none() | st.integers(64, 2**22),
)
def test_sizes_keep_to_the_settings(
    base: int, step: int, short: int | None, long: int | None, area: int | None
) -> None:
    settings_of = data(base, step=step, min=short, max=long, area=area)
    try:
        found = sizes(settings_of, base)
    except UserError as error:
        assert "data.buckets" in str(error)
        bounds = limits(settings_of.buckets, base)
        assert bounds.shortest > bounds.longest or bounds.shortest**2 > bounds.area
        return
    for height, width in found:
        assert height % step == width % step == 0
        assert (width, height) in found
        assert min(height, width) >= (short or step) and max(height, width) <= (long or 2 * base + step)
        assert height * width <= (area or base**2)
        larger = height + step, width + step
        fits = max(larger) <= limits(settings_of.buckets, base).longest
        assert not fits or larger[0] * larger[1] > (area or base**2), "there is room for a larger one"


@pytest.mark.parametrize(
    ("settings_of", "told"),
    [
        ({"min": 640, "max": 512}, "640 (min) to 512 (max)"),
        ({"min": 512, "area": 250_000}, "250,000 pixels (area)"),
        ({"max": 32}, "to 0 (max)"),
        ({"sizes": ((512, 4),)}, "512 x 4"),
        ({"sizes": ((512, 512),), "min": 576}, "min = 576"),
        ({"sizes": ((512, 512), (900, 512)), "max": 800}, "900 x 512"),
        ({"sizes": ((512, 512),), "area": 70_000}, "area = 70000"),
    ],
)
def test_settings_that_leave_no_size(settings_of: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        sizes(data(**settings_of), 1024)
    assert told in str(caught.value)


def check_nearest(how: Assign, shapes: list[tuple[int, int]], among: list[tuple[int, int]]) -> None:
    """Each picture has its own size, or none is nearer in log aspect ratio; then the largest, the first."""
    heights, widths = np.array(shapes).T
    for (height, width), number in zip(shapes, how(heights, widths, among).tolist(), strict=True):
        if (height, width) in among:
            assert among[number] == (height, width), "its own size is there"
            continue
        apart = [abs(log(height / width) - log(h / w)) for h, w in among]
        assert apart[number] < min(apart) + 1e-12, f"{height} x {width}: another one is nearer"
        for other, (h, w) in enumerate(among):
            if same_distance(height, width, among[other], among[number]):
                area = among[number][0] * among[number][1]
                assert (area, -number) >= (h * w, -other), "a larger or earlier one is as near"


def same_distance(height: int, width: int, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two sizes are exactly as far from a picture in log aspect ratio."""
    aspect, one, other = Fraction(height, width), Fraction(*a), Fraction(*b)
    return one == other or one * other == aspect**2


@settings(max_examples=100, deadline=None)
@given(PICTURES, st.integers(1, 4))
def test_the_nearest_is_assigned(shapes: list[tuple[int, int]], sort: int) -> None:
    among = [
        sizes(data(), 1024),
        [(512, 512), (1024, 1024), (512, 1024)],
        [(600, 600)],
        [(256, 512), (1024, 512), (512, 256), (512, 1024), (300, 100), (100, 300), (200, 600)],
    ][sort - 1]
    check_nearest(assign, [*shapes, (512, 512), (700, 700), (256, 512), (1000, 1000)], among)


def test_nearest_catches_the_difference_of_ratios() -> None:
    """As kohya's trainer picks: |w/h - W/H|, which prefers high pictures."""

    def broken(heights: np.ndarray, widths: np.ndarray, among: list[tuple[int, int]]) -> np.ndarray:
        ratios = np.array([w / h for h, w in among])
        return np.abs((widths / heights)[:, None] - ratios).argmin(1)

    with pytest.raises(AssertionError, match="nearer"):
        check_nearest(broken, [tuple(size) for size in pictures(300).tolist()], sizes(data(), 1024))


@settings(max_examples=100, deadline=None)
@given(PICTURES, st.integers(1, 3))
def test_without_upscaling_a_bucket_is_covered(shapes: list[tuple[int, int]], sort: int) -> None:
    settings_of = data(
        **[{}, {"min": 64, "max": 1000, "area": 500_000}, {"sizes": ((2048, 512), (640, 640))}][sort - 1],
        upscale=False,
    )
    bounds = limits(settings_of.buckets, 1024)
    among = sizes(settings_of, 1024)
    heights, widths = np.array(shapes).T
    usual = np.array(among)[assign(heights, widths, among)].tolist()
    for size, found, aspect in zip(
        shapes, targets(heights, widths, settings_of, 1024).tolist(), usual, strict=True
    ):
        covered = size[0] >= aspect[0] and size[1] >= aspect[1]
        if found == [0, 0]:
            assert min(size) < bounds.shortest or not covered
            # Only one much longer than wide may lose more than its longest side allows.
            assert min(size) < bounds.shortest or max(size) * bounds.shortest > bounds.area
            continue
        assert found == aspect if covered else found[0] % 64 == found[1] % 64 == 0
        assert found[0] <= size[0] and found[1] <= size[1], "it is enlarged"
        assert min(found) >= bounds.shortest and found[0] * found[1] <= bounds.area
        if not covered and size[0] // 64 * (size[1] // 64) * 64**2 <= bounds.area:
            assert found == [min(side, bounds.longest) // 64 * 64 for side in size], "it is cut too much"


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((600, 700), (576, 640)),
        ((1000, 1000), (960, 960)),
        ((1100, 1100), (1024, 1024)),
        ((511, 900), (0, 0)),
        ((513, 2030), (512, 1984)),
        ((520, 5000), (512, 2048)),
        ((63, 63), (0, 0)),
    ],
)
def test_own_sizes(size: tuple[int, int], found: tuple[int, int]) -> None:
    one = np.array([size[0]]), np.array([size[1]])
    assert targets(*one, data(upscale=False), 1024).tolist() == [list(found)]


def test_an_own_size_keeps_its_aspect_within_the_area() -> None:
    """2000 x 1900 does not cover 512 x 2048; at most as many pixels as that, in its own shape."""
    settings_of = data(sizes=((2048, 512),), upscale=False)
    assert targets(np.array([1900]), np.array([2000]), settings_of, 1024).tolist() == [[960, 1024]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12, unique=True),
    st.integers(1, 30),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_small_buckets_are_dissolved(
    shapes: list[tuple[int, int]], smallest: int, upscale: bool, random: Any
) -> None:
    among = sorted(shapes)
    records = [random.randint(1, 20) for _ in among]
    goes = merged(among, records, Buckets(smallest=smallest, upscale=upscale))
    left = set(goes)
    held = {bucket: sum(n for n, b in zip(records, goes, strict=True) if b == bucket) for bucket in left}
    assert all(goes[bucket] == bucket for bucket in left)
    if upscale:
        assert len(left) == 1 or min(held.values()) >= smallest, "a bucket is too small"
    for bucket, target in enumerate(goes):
        covered = among[target][0] <= among[bucket][0] and among[target][1] <= among[bucket][1]
        assert upscale or covered, "a picture is enlarged"
        assert bucket == target or records[bucket] < smallest, "a large one was dissolved"


def test_the_smallest_goes_first_and_to_the_nearest() -> None:
    among = [(512, 1024), (640, 832), (768, 768), (1024, 512)]  # 0.5, 0.77, 1, 2
    # The third to the second, then the first (3 of 3) to the second, which is large enough with 6.
    assert merged(among, [3, 2, 1, 50], Buckets(smallest=5)) == [1, 1, 1, 3]
    assert merged(among, [3, 1, 9, 2], Buckets(smallest=4)) == [2, 2, 2, 2]
    assert merged(among, [1, 1, 1, 1], Buckets(smallest=99)) == [1, 1, 1, 1]
    # Without upscaling only the last two, of which neither covers another, could be enlarged: they stay.
    alone = [(512, 1024), (640, 1024), (1024, 512), (1088, 512)]
    assert merged(alone, [1, 1, 1, 1], Buckets(smallest=9, upscale=False)) == [0, 0, 2, 2]


def test_many_sizes_are_dissolved_in_time() -> None:
    """Thousands of sizes, as pictures of any size have them in steps of 8: seconds, not hours."""
    rng = np.random.default_rng(0)
    among = sorted({(h * 8, w * 8) for h, w in rng.integers(64, 256, (2000, 2)).tolist()})
    begun = time.process_time()
    goes = merged(among, [1] * len(among), Buckets(smallest=4, step=8))
    assert time.process_time() - begun < 20
    assert min(np.bincount(goes)[sorted(set(goes))]) >= 4


def members(cells: Cells, bucket: int, part: int) -> list[int]:
    """The records of a cell."""
    number = np.arange(cells.counts[bucket, part])
    return cells.record(bucket, np.full(len(number), part), number).tolist()


def check_cells(cells: Cells, settings_of: Data, shapes: np.ndarray, part: np.ndarray, parts: int) -> None:
    """Every record is once in each resolution that it reaches, in a cell of its part, in order."""
    homes: list[dict[int, int]] = [{} for _ in settings_of.resolutions]
    for bucket, part_of in np.ndindex(*cells.counts.shape):
        records = members(cells, bucket, part_of)
        assert records == sorted(records), "the sort is not stable"
        assert all(part[record] == part_of for record in records), "a record is in a foreign part"
        for record in records:
            assert record not in homes[cells.resolution[bucket]], "a record is in two buckets of a resolution"
            homes[cells.resolution[bucket]][record] = bucket
    assert cells.counts.shape == (len(cells.sizes), parts) == (len(cells.resolution), parts)
    heights, widths = shapes.astype(np.int64).T
    for base, home in zip(settings_of.resolutions, homes, strict=True):
        wanted = targets(heights, widths, settings_of, base).tolist()
        assert sorted(home) == [n for n, size in enumerate(wanted) if size != [0, 0]], "a record is lost"
        if settings_of.buckets is None or settings_of.buckets.smallest == 1:
            assert all(cells.sizes[bucket] == tuple(wanted[record]) for record, bucket in home.items())
    lost = set(range(len(shapes))) - set().union(*homes)
    assert cells.unplaced.tolist() == sorted(lost)


SETTINGS = {
    "square": Data(source="x", resolution=512),
    "buckets": data(),
    "two resolutions": data((512, 1024)),
    "no upscaling": data((256, 768), upscale=False, step=32),
    "smallest": data(smallest=40),
    "smallest, no upscaling": data(768, smallest=40, upscale=False),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_cells(name: str, tmp_path: Path) -> None:
    shapes, part = pictures(3000), np.random.default_rng(1).integers(0, 5, 3000).astype(np.uint16)
    part[part == 3] = 4  # one part has no records
    cells = Cells.build(tmp_path, SETTINGS[name], shapes, part, 6)
    check_cells(cells, SETTINGS[name], shapes, part, 6)
    check_cells(Cells.open(cells.folder), SETTINGS[name], shapes, part, 6)
    assert not list(tmp_path.glob(".*")), "a draft was left"


def test_cells_check_catches() -> None:
    """A record of a foreign part, one that is lost, and one that is in two buckets."""
    shapes, part = np.array([[512, 512], [512, 512], [512, 1024]]), np.array([0, 1, 0])

    class Broken:
        def __init__(self, rows: list[list[int]], lost: list[int]) -> None:
            self.rows, self.unplaced = rows, np.array(lost)
            self.sizes, self.resolution = [(512, 512), (512, 1024)], [0, 0]
            self.counts = np.array([[len(rows[0]), len(rows[1])], [len(rows[2]), len(rows[3])]])

        def record(self, bucket: int, part: np.ndarray, member: np.ndarray) -> np.ndarray:
            return np.array(self.rows[2 * bucket + int(part[0])] if len(part) else [], int)

    settings_of = data(512, sizes=((512, 512), (1024, 512)))
    check_cells(Broken([[0], [1], [2], []], []), settings_of, shapes, part, 2)  # type: ignore[arg-type]
    for rows, lost, told in (
        ([[1], [0], [2], []], [], "foreign"),
        ([[0], [1], [], []], [2], "lost"),
        ([[0], [1], [0, 2], []], [], "two buckets"),
    ):
        with pytest.raises(AssertionError, match=told):
            check_cells(Broken(rows, lost), settings_of, shapes, part, 2)  # type: ignore[arg-type]


def test_a_bucket_of_fewer_records_than_smallest_is_gone(tmp_path: Path) -> None:
    shapes, part = pictures(1000), np.zeros(1000, np.uint16)
    small = Cells.build(tmp_path, data(), shapes, part, 1)
    cells = Cells.build(tmp_path, data(smallest=30), shapes, part, 1)
    assert small.counts.sum(1).min() < 30 <= cells.counts.sum(1).min()
    assert cells.counts.sum() == small.counts.sum() == 1000
    assert set(cells.sizes) < set(small.sizes) and small.folder != cells.folder


@pytest.mark.parametrize("name", ["two resolutions", "smallest, no upscaling"])
@pytest.mark.parametrize("chunk", [1, 7, 399])
def test_chunks_make_no_difference(name: str, chunk: int, tmp_path: Path) -> None:
    shapes, part = pictures(400), np.arange(400).astype(np.uint16) % 3
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder, size in ((whole, 400), (cut, chunk)):
        folder.mkdir()
        Cells.build(folder, SETTINGS[name], shapes, part, 3, chunk=size)
    (one,), (other,) = whole.iterdir(), cut.iterdir()
    assert one.name == other.name
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_visits_are_unique_over_all_buckets(tmp_path: Path) -> None:
    """T6 through the cells: (record, visit) comes once; each record as often as others, but for tails."""
    settings_of = data((256, 512), min=128, step=64)
    shapes = pictures(90)
    cells = Cells.build(tmp_path, settings_of, shapes, np.zeros(90, np.uint16), 1)
    order = Order(cells.counts, [Fraction(1)], 3, 7)
    names: list[tuple[int, int]] = []
    plain: list[tuple[int, int]] = []
    epochs = 3
    step = 0
    while order.epoch_of(step) < epochs:
        it = order.batch_at(step)
        records = cells.record(it.bucket, it.part, it.member)
        names += zip(records.tolist(), cells.visits(it.bucket, it.visit).tolist(), strict=True)
        plain += zip(records.tolist(), it.visit.tolist(), strict=True)
        step += 1
    assert len(set(names)) == len(names), "a visit came twice"
    assert set(names) <= {(record, visit) for record in range(90) for visit in range(2 * epochs)}
    assert len(names) > 2 * epochs * 90 - 3 * len(cells.sizes)
    assert len(set(plain)) < len(plain), "the check would not see it"


def test_cells_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, part = pictures(50), np.zeros(50, np.uint16)
    first = Cells.build(tmp_path, data(), shapes, part, 1)

    def refuse(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(module.Draft, "write", refuse)
    assert Cells.build(tmp_path, data(), shapes, part, 1).folder == first.folder
    for other in (data(step=32), data(512), Data(source="x", resolution=1024)):
        with pytest.raises(AssertionError, match="made again"):
            Cells.build(tmp_path, other, shapes, part, 1)


def test_replaced_files_make_new_cells(tmp_path: Path) -> None:
    """The same number of records with other sizes: the finished cells are not theirs."""
    part = np.zeros(50, np.uint16)
    made = []
    for seed in range(2):
        np.save(tmp_path / "draft.npy", pictures(50, seed))
        os.utime(tmp_path / "draft.npy", (seed, seed))
        (tmp_path / "draft.npy").rename(tmp_path / "sizes.npy")
        shapes = np.load(tmp_path / "sizes.npy", mmap_mode="r")
        made.append(Cells.build(tmp_path, data(), shapes, part, 1))
        check_cells(made[-1], data(), np.array(shapes), part, 1)
    assert made[0].folder != made[1].folder


def test_two_processes_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the finished cells in its place, and takes them."""
    shapes, part = pictures(50), np.zeros(50, np.uint16)
    write = module.Draft.write

    def late(draft: module.Draft) -> None:
        write(draft)
        monkeypatch.setattr(module.Draft, "write", write)
        Cells.build(tmp_path, data(), shapes, part, 1)

    monkeypatch.setattr(module.Draft, "write", late)
    cells = Cells.build(tmp_path, data(), shapes, part, 1)
    check_cells(cells, data(), shapes, part, 1)
    assert [path.name for path in tmp_path.iterdir()] == [cells.folder.name]


def test_an_interrupted_build_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, part = pictures(50), np.zeros(50, np.uint16)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Draft, "place", stop)
        with pytest.raises(KeyboardInterrupt):
            Cells.build(tmp_path, data(), shapes, part, 1)
    assert not list(tmp_path.iterdir())
    name = Cells.build(tmp_path, data(), shapes, part, 1).folder.name
    killed = [tmp_path / f".{name}-{number}.part" for number in range(2)]
    for draft, age in zip(killed, (0, 200_000), strict=True):
        draft.mkdir()
        os.utime(draft, (time.time() - age,) * 2)
    shutil.rmtree(tmp_path / name)
    check_cells(Cells.build(tmp_path, data(), shapes, part, 1), data(), shapes, part, 1)
    assert killed[0].exists() and not killed[1].exists(), (
        "an old draft is cleared away, a new one may be alive"
    )


def test_no_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Draft, "place", full)
    with pytest.raises(UserError, match="No space left"):
        Cells.build(tmp_path, data(), pictures(9), np.zeros(9, np.uint16), 1)


@pytest.mark.parametrize("file", ["members", "counts.npy", "cells.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_folder_is_told(file: str, cut: bool, tmp_path: Path) -> None:
    cells = Cells.build(tmp_path, data(), pictures(50), np.zeros(50, np.uint16), 1)
    path = cells.folder / file
    if cut:
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.raises(UserError, match="delete that folder"):
        Cells.open(cells.folder)


def test_pictures_that_are_all_too_small(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="512 pixels"):
        Cells.build(tmp_path, data(upscale=False), np.full((9, 2), 300), np.zeros(9, np.uint16), 1)
    assert not list(tmp_path.iterdir())


def test_what_people_are_told(tmp_path: Path) -> None:
    """One picture of the bucket's shape and one of half its height: a quarter is cut on average."""
    shapes = np.array([(512, 512), (512, 1024), (100, 800), (800, 800)], np.uint32)
    settings_of = data(512, sizes=((512, 512), (1024, 512)))
    cells = Cells.build(tmp_path, settings_of, shapes, np.zeros(4, np.uint16), 1)
    assert [row[:3] for row in cells.describe()] == [(512, 512, 2), (512, 1024, 2)]
    assert [row.cropped for row in cells.describe()] == pytest.approx([0, 0.375], abs=1e-6)


def test_cells_are_cheap_to_send(tmp_path: Path) -> None:
    shapes, part = pictures(5000), np.arange(5000).astype(np.uint16) % 3
    cells = Cells.build(tmp_path, data(), shapes, part, 3)
    sent = pickle.dumps(cells)
    assert len(sent) < 1000
    check_cells(pickle.loads(sent), data(), shapes, part, 3)


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    cells = Cells.build(tmp_path, data(), pictures(50), np.zeros(50, np.uint16), 2)
    for part, member in ((0, cells.counts[0, 0]), (0, -1), (1, 0)):
        with pytest.raises(AssertionError, match="members"):
            cells.record(0, np.array([part]), np.array([member]))


def test_a_billion_records_take_no_memory(tmp_path: Path) -> None:
    """Opened and sought in, from a file that is almost all hole."""
    counts = np.random.default_rng(0).integers(1, 10**9, (33, 3))
    counts = counts * 10**9 // counts.sum()
    number = int(counts.sum())
    shapes = sizes(data(), 1024)
    facts = {"sizes": shapes, "resolution": [0] * 33, "resolutions": 1, "cropped": [0] * 33, "dtype": "<u4"}
    (tmp_path / "cells.json").write_text(json.dumps(facts))
    np.save(tmp_path / "counts.npy", counts)
    with (tmp_path / "members").open("wb") as file:
        file.truncate(4 * number)
        # The last cell's first member is record 7.
        file.seek(4 * (number - int(counts[32, 2])))
        file.write(np.array([7], "<u4").tobytes())
    tracemalloc.start()
    cells = Cells.open(tmp_path)
    order = Order(cells.counts, [Fraction(1)] * 3, 256, 0)
    for step in range(10**9, 10**9 + 5):
        it = order.batch_at(step)
        cells.record(it.bucket, it.part, it.member)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cells.record(32, np.array([2]), np.array([0])).tolist() == [7]
    assert peak < 2 * 10**6, f"{peak} bytes"


def test_building_takes_constant_memory(tmp_path: Path) -> None:
    """Six times the records, the same peak: a third of a byte for each of them would be seen."""
    peaks = []
    for number in (50_000, 300_000):
        shapes, part = pictures(number), np.zeros(number, np.uint16)
        tracemalloc.start()
        Cells.build(tmp_path, data(), shapes, part, 1, chunk=10_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 250_000 / 3, f"{peaks} bytes"  # measured: equal to 20,000
