"""The measurements of data: every row is there, unequal sides are refused, and nothing stays behind.

No speed is tested; the memory of a process is.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sfumato.bench import data, decode, reads, scale
from sfumato.bench.decode import decoding
from sfumato.bench.reads import Shape, reading
from sfumato.bench.sides import Distance, Side, compare, side_by_side, timed
from sfumato.errors import UserError

SMALL = Shape(side=64, tokens=5, width=8, pooled=6)
TINY = data.Plan(
    ((96, 128), (48, 64)), bucket=16, count=2, shape=SMALL, records=8, rounds=2, scale=(200, 400), room=1
)
MOST = 64  # bytes of memory for each record


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    (place := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(data.tempfile, "tempdir", str(place))
    return place


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON document, with its place."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def test_every_row_is_there(
    tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "QUICK", TINY)
    out = tmp_path / "found.json"
    found = data.run(out, quick=True)
    assert json.loads(out.read_text()) == found
    assert not list(empty.iterdir()), "something was left behind"

    said = {"format", "made", "quick", "seconds", "notes", "machine", "comparisons", "scale"}
    assert found.keys() == said and found["format"] == 1 and found["quick"] is True
    facts = {"cpu", "cores", "memory", "load", "system", "python", "versions"}
    assert found["machine"].keys() == facts and {"torch", "datasets"} <= found["machine"]["versions"].keys()
    *decoded, read = found["comparisons"]
    assert [[side["name"].partition(" ")[0] for side in rows["sides"]] for rows in decoded] == [
        ["Pillow", "datasets", "Sfumato,", "Sfumato"]
    ] * 2
    assert [side["name"] for side in read["sides"]] == [
        "datasets, nested lists (fp32)",
        *(f"Sfumato, {what} ({kind})" for kind in ("fp32", "bf16") for what in ALONE_AND_WHOLE),
    ]
    for rows in found["comparisons"]:
        assert rows.keys() == {"what", "samples", "rounds", "sides"}
        for side in rows["sides"]:
            assert side.keys() == {"name", "median", "low", "high", "ratio", "cpu", "mean", "most"}
            assert side["low"] <= side["median"] <= side["high"]
        assert rows["sides"][0]["ratio"] == 1
    assert [row["records"] for row in found["scale"]] == [200, 400]
    assert found["scale"][0]["own_per_record"] is None and found["scale"][1]["own_per_record"] is not None
    for place, number in numbers(found):
        assert math.isfinite(number), place
        free = place.endswith((".mean", ".most", "_per_record", ".load"))
        assert number > 0 or free, f"{place} is {number}"
    shown = capsys.readouterr().out
    assert all(side["name"] in shown for rows in found["comparisons"] for side in rows["sides"])


ALONE_AND_WHOLE = "tensors alone", "whole batches"


def test_reduced_scale_is_told(tmp_path: Path) -> None:
    """The photo that is far larger than its bucket is decoded smaller, the other is not."""
    found = [decoding(tmp_path, size, 16, 1, 1)["sides"][-1]["name"] for size in TINY.photos]
    assert found == ["Sfumato (JPEG at 1/2)", "Sfumato (full scale is needed)"]


# Unequal sides.


def mirrored(*told: Any, **settings: Any) -> dict[str, torch.Tensor]:
    return {"pixels": OURS(*told, **settings)["pixels"].flip(-1)}


def darker(*told: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """In [0, 1] in place of [-1, 1]."""
    return {"pixels": OURS(*told, **settings)["pixels"] / 2 + 0.5}


OURS = decode.ours


@pytest.mark.parametrize("broken", [mirrored, darker])
def test_other_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(decode, "ours", broken)
    with pytest.raises(AssertionError, match="Sfumato.*pixels is not equal"):
        decoding(tmp_path, (96, 128), 16, 1, 1)


def others(samples: Any, numbers: list[int]) -> dict[str, torch.Tensor]:
    """The right records in another order."""
    return ALONE(samples, numbers[::-1])


def later(samples: Any, numbers: list[int]) -> Any:
    """Another visit, with other noise."""
    batch = WHOLE(samples, numbers)
    return replace(batch, moments=batch.moments + batch.draws.noise.repeat(1, 2, 1, 1))


def silent(samples: Any, numbers: list[int]) -> Any:
    """The unconditional text."""
    batch = WHOLE(samples, numbers)
    return replace(batch, text={name: torch.zeros_like(rows) for name, rows in batch.text.items()})


ALONE, WHOLE = reads.tensors_alone, reads.whole


@pytest.mark.parametrize(("name", "broken"), [("tensors_alone", others), ("whole", later), ("whole", silent)])
def test_other_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any
) -> None:
    monkeypatch.setattr(reads, name, broken)
    with pytest.raises(AssertionError, match="Sfumato.* is not equal"):
        reading(tmp_path, SMALL, 8, 1)


@pytest.mark.parametrize(
    ("result", "match"),
    [
        ({"x": torch.tensor([0.0, 1.2])}, "x is not equal"),
        ({"x": torch.tensor([0.1, 1.1])}, "x is not equal"),
        ({"x": torch.tensor([0.0, math.nan])}, "x is not equal"),
        ({"x": torch.zeros(1)}, "of torch.Size"),
        ({"x": torch.tensor([0.0, 1.0]), "y": torch.zeros(1)}, "y"),
        ({}, "x"),
    ],
)
def test_compare_refuses(result: dict[str, torch.Tensor], match: str) -> None:
    """Too far at most, too far on average, no number, another shape, too many tensors, too few."""
    right = Side("right", lambda item: {"x": torch.tensor([0.0, 1.0])})
    with pytest.raises(AssertionError, match=match):
        compare([right, Side("other", lambda item: result, mean=0.06, most=0.15)], [0])


def test_compare_tells_how_far() -> None:
    near = [Side("near", lambda item: {"x": torch.tensor([0.0, 1.0 + item / 8])}, mean=1, most=1)]
    found = compare([Side("right", lambda item: {"x": torch.tensor([0.0, 1.0])}), *near], [1, 2])
    assert found == [Distance(0, 0), Distance(0.125, 0.25)]


def test_sides_take_turns() -> None:
    """A B A B: a machine that slows down meets both."""
    log: list[str] = []
    sides = [Side(name, lambda item, name=name: log.append(f"{name}{item}")) for name in "ab"]
    spent = timed(sides, [0, 1], rounds=2)
    assert log == ["a0", "a1", "b0", "b1"] * 2
    assert [len(each) for each in spent] == [2, 2]


def test_one_thread_and_the_others_back() -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        work = lambda item: seen.append(torch.get_num_threads()) or {}  # noqa: E731
        found = side_by_side("threads", [Side("one", work), Side("two", work)], [0], 1, 1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        assert [side["name"] for side in found["sides"]] == ["one", "two"]
    finally:
        torch.set_num_threads(before)


# Sizes.

FAST = """
import sys
from sfumato.bench import records
from sfumato.data.index import scan
from tests.unit.toy_source import AtOnce
# What the headers hold is not of interest here.
scan.size_of, scan.ThreadPoolExecutor = lambda file, most: (600, 800), AtOnce
"""
HOARD = """
real = records.opened
def opened(count, store):
    found = real(count, store)
    found.names = {found.name(number): number for number in range(len(found))}
    return found
records.opened = opened
"""
CALL = """
import json, pathlib
verb, count, store = sys.argv[1:]
print(json.dumps(getattr(records, verb)(int(count), pathlib.Path(store))))
"""


def own_bytes(store: Path, count: int, extra: str = "") -> float:
    """Memory of its own that a process has with so many records."""
    return float(scale.told("use", count, store, (sys.executable, "-c", FAST + extra + CALL))["own"])


def test_memory_of_each_record(tmp_path: Path) -> None:
    """At most 64 bytes, in truth none; a process that knows every name is caught."""
    both = "from pathlib import Path; records.make(1000, Path(sys.argv[3]))\n"
    scale.told("make", 20_000, tmp_path, (sys.executable, "-c", FAST + both + CALL))
    least = own_bytes(tmp_path, 1000)  # the same to 50,000 bytes each time, and so are the others
    assert (own_bytes(tmp_path, 20_000) - least) / 19_000 < MOST / 4
    assert (own_bytes(tmp_path, 20_000, HOARD) - least) / 19_000 > MOST


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "STARTING", 1.0)
    program = (sys.executable, "-c", "import time; time.sleep(1000)")
    before = psutil.Process().children()
    with pytest.raises(UserError, match="made-up records within 1 seconds"):
        scale.told("make", 10, tmp_path, program)
    assert psutil.Process().children() == before, "it goes on"


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended with 1: (.|\n)*ZeroDivisionError"):
        scale.told("make", 10, tmp_path, (sys.executable, "-c", "1 / 0"))


INTERRUPTED = """
from dataclasses import replace
from sfumato.bench import data
from tests.unit.test_bench_data import TINY
data.QUICK = replace(TINY, photos=(), scale=(100, 200_000))
try:
    data.run(None, quick=True)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the largest index is made: its process ends too, and its files are removed."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("indexing 200,000" in line for line in lines), "it never came so far"
        try:
            end = time.monotonic() + 200
            # Only the largest has so many bytes: a process that is just being started may miss a signal.
            while not any(file.stat().st_size > 10**5 for file in tmp_path.rglob("records.jsonl")):
                assert time.monotonic() < end, "no index is being made"
                time.sleep(0.05)
            children = psutil.Process(process.pid).children()
            os.killpg(process.pid, signal.SIGINT)
            shown, complaints = process.communicate(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert shown == "interrupted\n" and "Traceback" not in complaints
    assert not list(tmp_path.iterdir())
    left = psutil.wait_procs(children, timeout=60)[1]
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]


# What is refused before anything is measured.


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="datasets is not installed"):
        data.run(None, quick=True)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "missing" / "found.json"):
        with pytest.raises(UserError, match="no such file can be written"):
            data.run(out, quick=True)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "QUICK", replace(TINY, room=10**18))
    with pytest.raises(UserError, match="are free"):
        data.run(None, quick=True)
