"""The store of tensors: what is written can be read, by anyone, after anything."""

import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.data.store import Store, Writer, key_of, lookup, merging, tensors, uses, writer
from sfumato.data.store.tensors import DTYPES, ROW
from sfumato.errors import UserError
from tests.engine.ranks import run_ranks

fork = multiprocessing.get_context("fork")


def keys(*numbers: int) -> np.ndarray:
    """The keys of some numbered records, (n, 16) uint8."""
    return np.frombuffer(b"".join(key_of(n) for n in numbers), np.uint8).reshape(-1, 16)


def record(number: int) -> dict[str, Tensor]:
    """A record that tells its number."""
    return {"moments": torch.full((2, 3), float(number)).bfloat16(), "number": torch.tensor(number)}


def fill(place: Path | Store, *numbers: int, shard_bytes: int = writer.SHARD_BYTES) -> Store:
    """A store with these records in one shard, unless shard_bytes says otherwise."""
    opened = place if isinstance(place, Store) else Store(place)
    with opened.writer("test", shard_bytes) as out:
        for number in numbers:
            out.add(key_of(number), record(number))
    opened.refresh()
    return opened


def check(opened: Store, *numbers: int) -> None:
    """Fail unless the store has these records."""
    assert opened.has(keys(*numbers)).all()
    for number in numbers:
        found = opened.get(key_of(number))
        assert found.keys() == {"moments", "number"} and found["number"] == number
        assert torch.equal(found["moments"], record(number)["moments"])


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.safetensors"))


def everything(folder: Path) -> set[str]:
    """Hidden files, too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def ended(target: Callable[..., None], *arguments: Any) -> int | None:
    """Run it in a real process of its own; its exit code."""
    process = fork.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


# Keys.


def test_keys_are_of_their_parts() -> None:
    parts: list[tuple[Any, ...]] = [
        ("ab", "c"), ("a", "bc"), ("abc",), (("ab", "c"),), (("ab",), "c"), ("ab", ("c",)), (b"ab", "c"),
        ("1",), (1,), (1.0,), (b"1",), (-1,), (10**30,), (0.0,), (-0.0,), (None,), ("",), ((),), (),
        ("None",), ("\udcff",), ("\xff",), (b"\xff",), (float("nan"),),
    ]  # fmt: skip
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert all(len(key_of(*each)) == 16 for each in parts)
    assert key_of("\udcff", 0.1 + 0.2, None) == key_of("\udcff", 0.30000000000000004, None)


def test_keys_stay_what_they_are() -> None:
    """What lies in stores is found by them, after years and on other machines."""
    assert key_of("a", -12, 2.5, b"x\0", None, ("y", (1,))).hex() == "008da954983a4848f6083ed2ff52dd46"


@pytest.mark.parametrize("part", [True, np.float64(1), np.int64(1), [1], {"a": 1}, Path("a"), (1, False)])
def test_a_key_of_anything_else_is_refused(part: object) -> None:
    with pytest.raises(AssertionError, match="key cannot depend on"):
        key_of("a", part)


PARTS = st.recursive(
    st.none() | st.text() | st.binary() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


@given(st.lists(PARTS, max_size=4).map(tuple), st.lists(PARTS, max_size=4).map(tuple))
def test_other_parts_have_another_key(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert (repr(one) == repr(other)) == (key_of(*one) == key_of(*other))


# What is written is what is read.


def zoo() -> dict[bytes, dict[str, Tensor]]:
    """Every dtype in every kind of shape, odd numbers of bytes among them."""
    made = torch.Generator().manual_seed(1)
    records: dict[bytes, dict[str, Tensor]] = {}
    for shape in ((), (0,), (3,), (2, 0, 3), (5, 7), (8, 3, 5), (1, 2, 3, 4)):
        for code, dtype in DTYPES:
            raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=made)
            raw = raw % 2 if dtype == torch.bool else raw
            tensor = raw.view(dtype).reshape(shape)
            records.setdefault(key_of(shape), {})[code] = tensor
            records[key_of(shape, code)] = {"only": tensor}
    records[key_of("strided")] = {"t": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[::2]}
    records[key_of("grad")] = {"t": torch.ones(3, requires_grad=True) * 2}
    return records


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return alike and torch.equal(*flat)


def test_the_safetensors_library_reads_the_same(tmp_path: Path) -> None:
    records, opened = zoo(), Store(tmp_path)
    with opened.writer("rank 0/x", shard_bytes=2000) as out:
        for key, named in records.items():
            out.add(key, named)
    opened.refresh()
    assert len(shards(tmp_path)) > 2
    theirs: dict[str, Tensor] = {}
    for path in shards(tmp_path):
        with safe_open(path, "pt") as file:
            theirs |= {name: file.get_tensor(name) for name in file.keys()}
    assert len(theirs) == sum(map(len, records.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none about memory that is not to be written to
        for key, named in records.items():
            ours = opened.get(key)
            assert ours.keys() == named.keys()
            for name, tensor in named.items():
                assert same(ours[name], tensor), (name, tensor.shape)
                assert same(ours[name], theirs[f"{key.hex()}.{name}"]), (name, tensor.shape)


def check_no_copies(folder: Path) -> None:
    """Fail unless what is read lies in the maps of the shards."""
    opened = Store(folder)
    with opened.writer("test") as out:
        for key, named in zoo().items():
            out.add(key, named)
    opened.refresh()
    for key in zoo():
        for tensor in opened.get(key).values():
            mapped = opened.mapped[shards(folder)[0].name]
            within = tensor.data_ptr() - mapped.data_ptr()
            assert not tensor.numel() or 0 <= within < len(mapped), "a copy was made"
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_reading_copies_nothing(tmp_path: Path) -> None:
    check_no_copies(tmp_path)


def test_a_shard_without_alignment_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "grain", lambda blob: 1)
    with pytest.raises(AssertionError, match="a copy was made"):
        check_no_copies(tmp_path)


def test_shards_of_other_programs(tmp_path: Path) -> None:
    """The library's own, with metadata; and one whose tensors lie at odd places."""
    (tmp_path / "shards").mkdir()
    named = {f"{key_of(n).hex()}.{name}": one for n in (1, 2) for name, one in record(n).items()}
    save_file(named, tmp_path / "shards" / "theirs.safetensors", metadata={"made": "by hand"})
    odd = {"a": ("U8", [1], b"\7"), "b": ("I64", [1], (5).to_bytes(8, "little"))}
    (tmp_path / "shards" / "odd.safetensors").write_bytes(raw_shard(odd))
    opened = Store(tmp_path, tell=pytest.fail)
    check(opened, 1, 2)
    found = opened.get(key_of("raw"))
    assert found["a"].tolist() == [7] and found["b"].tolist() == [5]


def raw_shard(named: dict[str, tuple[str, Any, bytes]]) -> bytes:
    """A shard with one record, as it comes: tensors are dtype, shape and bytes."""
    header, data = {}, b""
    for name, (dtype, shape, content) in named.items():
        span = [len(data), len(data) + len(content)]
        header[f"{key_of('raw').hex()}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_is_added_is_copied_and_views_write_to_no_file(tmp_path: Path) -> None:
    opened, tensor = Store(tmp_path), torch.ones(4)
    with opened.writer("test") as out:
        out.add(key_of(1), {"t": tensor})
        tensor.zero_()
    opened.refresh()
    opened.get(key_of(1))["t"].fill_(7)
    assert Store(tmp_path).get(key_of(1))["t"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (b"short", {"a": torch.ones(1)}),
        (key_of(1), {}),
        (key_of(1), {"a b": torch.ones(1)}),
        (key_of(1), {"a": torch.ones(1, 1, 1, 1, 1)}),
        (key_of(1), {"a": torch.ones(1, dtype=torch.complex64)}),
    ],
)
def test_what_a_store_cannot_hold(tmp_path: Path, key: bytes, named: dict[str, Tensor]) -> None:
    with Store(tmp_path).writer("test") as out, pytest.raises(AssertionError):
        out.add(key, named)
    assert not everything(tmp_path)


def test_an_empty_store(tmp_path: Path) -> None:
    opened = Store(tmp_path / "none")
    assert not opened.has(keys(1, 2)).any() and opened.has(keys()).shape == (0,)
    assert opened.size() == (0, 0) and opened.prune([keys(1)]) == (0, 0) and list(opened.uses()) == []
    with pytest.raises(KeyError, match=key_of(1).hex()):
        opened.get(key_of(1))
    assert not pickle.loads(pickle.dumps(opened)).has(keys(1)).any()
    assert not (tmp_path / "none").exists()
    (tmp_path / "shards").write_text("a file")
    with pytest.raises(UserError, match="data.store"):
        Store(tmp_path)


def test_a_key_that_ends_with_zeros(tmp_path: Path) -> None:
    """Numpy's strings end at the first of their last zeros; keys do not."""
    many = [b"\0" * n + b"\1" * (16 - n) for n in range(17)] + [
        b"\1" * n + b"\0" * (16 - n) for n in range(1, 16)
    ]
    opened = Store(tmp_path)
    with opened.writer("test") as out:
        for number, key in enumerate(many):
            out.add(key, record(number))
    opened.refresh()
    assert opened.has(np.frombuffer(b"".join(many), np.uint8).reshape(-1, 16)).all()
    assert [int(opened.get(key)["number"]) for key in many] == list(range(len(many)))
    assert not opened.has(np.frombuffer(b"\2" + b"\0" * 15, np.uint8)[None]).any()


def test_a_full_shard_is_published_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path).writer("test", shard_bytes=60) as out:  # a record has 20 bytes
        for number in range(7):
            out.add(key_of(number), record(number))
            assert len(shards(tmp_path)) == (number + 1) // 3
    assert len(shards(tmp_path)) == 3
    monkeypatch.setattr(writer, "SHARD_RECORDS", 10)
    fill(tmp_path / "b", *range(25), 24, 24)  # what is gathered already counts once
    assert len(shards(tmp_path / "b")) == 3
    monkeypatch.setattr(writer, "SHARD_TENSORS", 10)
    fill(tmp_path / "c", *range(25))
    assert len(shards(tmp_path / "c")) == 5


def test_a_record_that_is_gathered_counts_once(tmp_path: Path) -> None:
    with Store(tmp_path).writer("test", shard_bytes=60) as out:
        for _ in range(10):
            out.add(key_of(1), record(1))
    (shard,) = shards(tmp_path)
    assert out.written == shard.stat().st_size


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves a name without content."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(opened: int) -> None:
        done.append("folder" if os.path.isdir(f"/dev/fd/{opened}") else "file")
        fsync(opened)

    def named(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    with Store(tmp_path).writer("test") as out:
        out.add(key_of(1), record(1))
    assert done == ["file", "name", "folder"]


# Several processes, and their ends.


def write_some(folder: Path, start: int) -> None:
    """Half of what one process writes is written by the other, too; both make the table at the end."""
    opened = fill(folder, *range(start, start + 400), shard_bytes=500)
    check(opened, *range(start, start + 400))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    processes = [fork.Process(target=write_some, args=(tmp_path, start)) for start in (0, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    opened = Store(tmp_path, tell=pytest.fail)
    check(opened, *range(600))
    assert opened.size() == (600, sum(path.stat().st_size for path in shards(tmp_path)))
    assert not [name for name in everything(tmp_path) if name.endswith(".part")]


def test_many_refresh_at_once(tmp_path: Path) -> None:
    readers = [Store(tmp_path) for _ in range(6)]
    fill(tmp_path / "b", *range(300), shard_bytes=500)
    (tmp_path / "b" / "shards").rename(tmp_path / "shards")
    threads = [threading.Thread(target=reader.refresh) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for reader in readers:
        check(reader, *range(300))
    tables = [name for name in everything(tmp_path) if name.startswith(("table", "."))]
    assert len(tables) == 2


def write_and_hang(folder: Path) -> None:
    """Publish records 0 to 2, then stand still in the middle of the next shard."""

    def encode(records: Any, really: Any = writer.encode) -> tuple[bytes, Iterator[bytes]]:
        header, pieces = really(records)
        return header, halting(pieces) if shards(folder) else iter(pieces)

    def halting(pieces: list[bytes]) -> Iterator[bytes]:
        yield pieces[0]
        (folder / "standing").touch()
        time.sleep(600)

    writer.encode = encode  # type: ignore[assignment]
    fill(folder, *range(9), shard_bytes=60)


def write_in_place(folder: Path) -> None:
    """As a writer that knows no hidden files."""
    names = iter(("a", "b", "c"))
    Path.with_name = lambda self, name: self.parent / f"{next(names)}.safetensors"  # type: ignore[method-assign]
    write_and_hang(folder)


def check_kill(folder: Path, target: Callable[[Path], None]) -> None:
    """Kill a writer in the middle, and fail unless what it had published is there, and nothing else."""
    process = fork.Process(target=target, args=(folder,))
    process.start()
    until = time.monotonic() + 60
    while not (folder / "standing").exists() and time.monotonic() < until:
        time.sleep(0.01)
    try:
        assert len(shards(folder)) == 1, "something is visible that was not published"
        Store(folder).writer("other")  # does not touch what a living one is at
        assert len([name for name in everything(folder) if name.endswith(".part")]) == 1
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL and len(shards(folder)) == 1
    opened = Store(folder, tell=pytest.fail)
    assert opened.has(keys(*range(9))).tolist() == [True] * 3 + [False] * 6
    fill(opened, *range(3, 9))
    check(opened, *range(9))
    assert not [name for name in everything(folder) if name.endswith(".part")]


def test_a_killed_writer_loses_one_shard(tmp_path: Path) -> None:
    check_kill(tmp_path, write_and_hang)


def test_a_writer_without_hidden_files_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not published"):
        check_kill(tmp_path, write_in_place)


def test_only_what_is_dead_or_old_is_swept(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    dead = fork.Process(target=int)
    dead.start()
    dead.join()
    alive, gone = os.getpid(), dead.pid
    assert gone is not None and not psutil.pid_exists(gone)
    names = {
        f".{writer.here()}-{alive}-a.part": False,
        f".{writer.here()}-{gone}-b.part": True,
        f".elsewhere-{gone}-c.part": False,
        f".elsewhere-{gone}-old.part": True,
        f".{writer.here()}-{alive}-old.part": True,
        ".mine.part": False,
    }
    for name in names:
        for folder in (tmp_path, tmp_path / "shards"):
            (folder / name).touch()
            if "old" in name:
                os.utime(folder / name, (time.time() - 2 * writer.DAY,) * 2)
    Store(tmp_path).writer("test")
    for name, swept in names.items():
        assert (tmp_path / name).exists() != swept and (tmp_path / "shards" / name).exists() != swept, name


def test_an_exception_publishes_what_is_complete(tmp_path: Path) -> None:
    opened = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), opened.writer("test") as out:
        out.add(key_of(1), record(1))
        out.add(key_of(2), {"a": torch.ones(1), "b": torch.ones(int(1 / 0))})
    opened.refresh()
    check(opened, 1)
    assert opened.size()[0] == 1


def read_elsewhere(pickled: bytes) -> None:
    Store.listing = None  # type: ignore[assignment, method-assign]
    check(pickle.loads(pickled), *range(20))


def test_pickled_to_another_process(tmp_path: Path) -> None:
    """It opens the same table, without looking at the shards' folder."""
    opened = fill(tmp_path, *range(20), shard_bytes=100)
    check(opened, *range(20))
    pickled = pickle.dumps(opened)
    assert len(pickled) < 500
    run_ranks(read_elsewhere, 1, pickled, init=False)  # raises what it raises there
    for path in tmp_path.glob("table*"):
        path.unlink()
    check(pickle.loads(pickled), *range(20))  # made again


# No room.


def check_refusal(error: UserError, folder: Path) -> None:
    """Fail unless the message has what the user needs, and the folder no half file."""
    assert str(folder) in error.asked and re.search(r"\d[\d,]+ bytes", error.asked)
    assert re.search(r"\d[\d,]* bytes are free", error.found)
    left = everything(folder)
    assert not [name for name in left if name.endswith(".part")] and len(shards(folder)) == 1


def overfill(folder: Path) -> None:
    """Write one shard that fits into a megabyte and one that does not."""
    opened = fill(folder, 1)
    big = {"moments": torch.ones(2**19)}
    with pytest.raises(UserError) as caught, opened.writer("test") as out:
        out.add(key_of(2), record(2))
        out.add(key_of(3), big)
        out.close()
    check_refusal(caught.value, folder)
    with pytest.raises(ZeroDivisionError), opened.writer("test") as out:
        out.add(key_of(3), big)
        raise ZeroDivisionError
    assert len(shards(folder)) == 1
    fill(opened, 4)
    check(opened, 1, 4)


def overfill_limited(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    overfill(folder)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    assert ended(overfill_limited, tmp_path) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    overfill(small_disk)


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = fill(tmp_path, 1)
    really = Path.open

    def refuse(self: Path, mode: str = "r", **options: Any) -> Any:
        if "x" in mode:
            raise PermissionError(13, "Permission denied")
        return really(self, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied") as caught:
        fill(opened, 2)
    check_refusal(caught.value, tmp_path)


# The table.


def files_of(opened: Store) -> list[bytes]:
    return [(opened.folder / f"{opened.table.stem}{ending}").read_bytes() for ending in (".npy", ".json")]


def test_a_merged_table_is_one_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, whatever came first: so processes that make it at once do each other no harm."""
    monkeypatch.setattr(merging, "BLOCK", 50)
    monkeypatch.setattr(merging, "RUN", 90)
    opened = Store(tmp_path)
    other: list[bytes] = []
    for turn in range(6):
        with opened.writer("test", shard_bytes=700) as out:
            for number in range(turn * 60, turn * 60 + 90):  # a third comes twice
                out.add(key_of(number), record(number) | ({f"also{turn}": torch.ones(1)} if turn % 2 else {}))
        if turn == 4:
            for path in shards(tmp_path)[::3]:
                path.unlink()
        opened.refresh()
        made = files_of(opened)
        for path in tmp_path.glob("table*"):
            path.unlink()
        anew = Store(tmp_path)
        assert files_of(anew) == made != other
        other = made
    every = range(6 * 60 + 30)
    there = np.array([name[:32] for path in shards(tmp_path) for name in safe_open(path, "pt").keys()])
    wanted = np.array([key_of(number).hex() for number in every])
    assert np.array_equal(opened.has(keys(*every)), np.isin(wanted, there))
    assert opened.size()[0] == len(set(there.tolist()))


def test_one_record_in_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key to cut the table at; and a shard with no record at all."""
    monkeypatch.setattr(merging, "BLOCK", 8)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "none.safetensors").write_bytes(framed({}, b""))
    opened = Store(tmp_path, tell=pytest.fail)
    assert opened.size() == (0, 10) and not opened.has(keys(1)).any()
    for _ in range(20):
        fill(opened, 1)
    check(Store(tmp_path), 1)
    assert opened.size()[0] == 1 and len(opened.table.rows) == 40
    assert opened.prune([keys(1)])[0] == 0
    check(opened, 1)
    assert len(shards(tmp_path)) == 1


def test_a_record_is_of_one_shard(tmp_path: Path) -> None:
    """Of two that have the same key and other tensors, which a wrong key would make."""
    opened = Store(tmp_path)
    for name in ("a", "b"):
        with opened.writer("test") as out:
            out.add(key_of(1), {name: torch.ones(1), "same": torch.ones(1)})
    opened.refresh()
    assert opened.get(key_of(1)).keys() in ({"a", "same"}, {"b", "same"})


def test_a_shard_that_vanished(tmp_path: Path) -> None:
    """What was in it alone is missing; what was also elsewhere is found there."""
    opened = fill(fill(tmp_path, 1, 2, 3), 3, 4)
    name_of(opened, 1).unlink()
    with pytest.raises(KeyError):
        opened.get(key_of(1))
    check(opened, 3, 4)
    assert opened.has(keys(1, 2, 3, 4)).tolist() == [False, False, True, True]
    assert opened.size() == (2, shards(tmp_path)[0].stat().st_size)


def spoil_rows(path: Path) -> None:
    """A table whose form is right and whose content is not."""
    rows = np.load(path, mmap_mode="r+")
    rows["shard"] = 77
    rows.flush()


def spoil_places(path: Path) -> None:
    rows = np.load(path, mmap_mode="r+")
    rows["offset"] = 2**40
    rows.flush()


@pytest.mark.parametrize(
    ("ending", "spoil"),
    [
        (".npy", lambda path: path.write_bytes(path.read_bytes()[:-10])),
        (".npy", lambda path: path.write_bytes(b"")),
        (".npy", lambda path: path.write_bytes(os.urandom(500))),
        (".npy", lambda path: np.save(path, np.zeros((3, 16), np.uint8))),
        (".npy", lambda path: path.unlink()),
        (".npy", spoil_rows),
        (".npy", spoil_places),
        (".json", lambda path: path.write_text("[]")),
        (".json", lambda path: path.write_text("{")),
        (".json", lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 0'))),
        (".json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_table_is_made_again(tmp_path: Path, ending: str, spoil: Callable[[Path], None]) -> None:
    opened = fill(tmp_path, *range(10))
    made = files_of(opened)
    spoil(tmp_path / f"{opened.table.stem}{ending}")
    check(Store(tmp_path), *range(10))
    assert files_of(opened) == made
    fill(Store(tmp_path), 10)
    check(Store(tmp_path), *range(11))


def spoil_order(path: Path) -> None:
    rows = np.load(path)
    np.save(path, rows[::-1])


def spoil_halves(path: Path) -> None:
    rows = np.load(path)
    np.save(path, np.roll(rows, 10))


@pytest.mark.parametrize("spoil", [spoil_rows, spoil_order, spoil_halves])
def test_a_damaged_table_is_no_base(
    tmp_path: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK", 4)
    opened = fill(tmp_path, *range(10))
    spoil(tmp_path / f"{opened.table.stem}.npy")
    check(fill(Store(tmp_path), *range(10, 15)), *range(15))


def test_a_table_with_other_rows_than_its_shards_is_not_published(tmp_path: Path) -> None:
    opened = fill(tmp_path, *range(4))
    table, rows = opened.table, opened.table.rows
    table.remove()
    for wrong in ([rows[:-1]], [rows, rows[-1:]], [rows[4:], rows[:4]]):
        with pytest.raises(tensors.Damaged):
            merging.write(table, wrong)
        assert lookup.load(tmp_path, table.stem) is None and len(everything(tmp_path)) == 1
    merging.write(table, [rows[:3], rows[3:]])
    check(Store(tmp_path), *range(4))


def test_tables_stay_while_they_are_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = fill(tmp_path, 1)
    reader, first = Store(tmp_path), opened.table.stem

    def age() -> None:
        for path in tmp_path.glob("table*"):
            os.utime(path, (time.time() - 2 * lookup.LEASE,) * 2)

    age()
    monkeypatch.setattr(lookup, "LEASE", lookup.LEASE)
    reader.table.used = -2 * lookup.LEASE
    assert reader.has(keys(1)).all()  # says that it is in use
    fill(opened, 2)
    assert {path.stem for path in tmp_path.glob("table*")} == {first, opened.table.stem}
    age()
    fill(opened, 3)
    assert {path.stem for path in tmp_path.glob("table*")} == {opened.table.stem}
    check(reader, 1)  # mapped, and on this machine that is enough


# Size.


ROWS = 2**20
MEMORY = Path("/dev/shm")


def small_pages() -> bool:
    """Whether there is a file system on which a touch maps some pages of 4 KiB; elsewhere it may be 2 MiB."""
    told = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    small = told.is_file() and re.search(r"\[(never|advise)\]", told.read_text())
    return bool(small) and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**28


SMALL_PAGES = small_pages()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a million records in its table; their shard is a hole, which nobody may read.

    It lies in memory if it can.
    """
    folder = Path(tempfile.mkdtemp(dir=MEMORY)) if SMALL_PAGES else tmp_path_factory.mktemp("large")
    (folder / "shards").mkdir()
    with (folder / "shards" / "hole.safetensors").open("wb") as file:
        file.truncate(ROWS * 8 + 2**20)
    rows = np.zeros(ROWS, ROW)
    rows["key"] = np.sort(np.random.default_rng(0).integers(0, 256, (ROWS, 16), np.uint8).view("S16").ravel())
    rows["offset"] = np.arange(ROWS) * 8 + 2**20
    rows["shape"][:, 0] = 8
    rows["dtype"], rows["dims"] = tensors.NUMBERS["U8"], 1
    shard = lookup.Shard("hole.safetensors", ROWS * 8 + 2**20, ROWS, ("t",))
    merging.write(lookup.Table(folder, [shard], rows[:0], 0), [rows])
    del rows
    yield folder
    shutil.rmtree(folder)


def some(folder: Path, count: int) -> np.ndarray:
    """Keys that are there and as many that are not, (2 * count, 16) uint8."""
    rows = np.load(next(folder.glob("table*.npy")), mmap_mode="r")
    there = rows["key"][:: len(rows) // count][:count].copy().view(np.uint8).reshape(-1, 16)
    return np.concatenate([there, np.random.default_rng(1).integers(0, 256, (count, 16), np.uint8)])


def resident(path: str) -> int:
    """Bytes of a mapped file that this process has touched."""
    found = re.findall(rf"{path}.*\n(?:.*\n){{3}}Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert found, "it is not mapped"
    return 1024 * sum(map(int, found))


def check_pages(folder: Path, has: Callable[[Store, np.ndarray], np.ndarray]) -> None:
    """Fail if a few look-ups touch much of a large table, or put it into memory."""
    wanted = some(folder, 8)
    opened = Store(folder, tell=pytest.fail)
    size = ROWS * ROW.itemsize
    tracemalloc.start()
    try:
        found = has(opened, wanted)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == [True] * 8 + [False] * 8
    assert peak < size / 50, f"{peak:,} bytes of memory"
    assert resident("table-.*npy") < size / 4, "most of the table was read"


@pytest.mark.skipif(not SMALL_PAGES, reason="pages are larger here")
def test_a_look_up_touches_few_pages(large: Path) -> None:
    check_pages(large, Store.has)
    check_pages(large, lambda opened, wanted: np.array([bool(opened_get(opened, key)) for key in wanted]))


def opened_get(opened: Store, key: np.ndarray) -> dict[str, Tensor]:
    try:
        return opened.get(key.tobytes())
    except KeyError:
        return {}


@pytest.mark.skipif(not SMALL_PAGES, reason="pages are larger here")
def test_a_look_up_in_a_copy_is_caught(large: Path) -> None:
    def has(opened: Store, wanted: np.ndarray) -> np.ndarray:
        return np.isin(lookup.as_keys(wanted), opened.table.rows["key"])

    with pytest.raises(AssertionError, match="bytes of memory"):
        check_pages(large, has)


def test_memory_does_not_grow_with_the_table(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few records more, many look-ups and a prune, each in less than the table's 48 MiB."""
    monkeypatch.setattr(merging, "BLOCK", 2**15)
    wanted, opened = some(large, 50_000), Store(large, tell=pytest.fail)
    everyone = opened.table.rows["key"].copy().view(np.uint8).reshape(-1, 16)
    with opened.writer("test") as out:
        out.add(key_of(1), record(1))
    tracemalloc.start()
    try:
        opened.refresh()
        merge = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert opened.has(wanted).sum() == 50_000
        search = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        assert opened.prune([wanted, everyone[::2], everyone[ROWS // 2 :], keys(1)]) == (0, 0)
        prune = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"merge {merge:,}, search {search:,}, prune {prune:,}")
    assert max(merge, search, prune) < 12 * 2**20


def test_fifty_thousand_records_in_no_time(tmp_path: Path) -> None:
    """Bounds ten times what it takes (0.02 and 0.11 s), so that a search through all of them is seen."""
    opened, every = Store(tmp_path), keys(*range(50_000))
    with opened.writer("test") as out:
        for key, number in zip(every, torch.arange(50_000), strict=True):
            out.add(key.tobytes(), {"t": number})
    opened.refresh()
    began = time.process_time()
    assert opened.has(every).all()
    assert time.process_time() - began < 0.5
    began = time.process_time()
    assert all(opened.get(key_of(n))["t"] == n for n in range(0, 50_000, 25))
    assert time.process_time() - began < 1
    assert len(shards(tmp_path)) == 13


def test_maps_are_few_and_hold_no_descriptor(tmp_path: Path) -> None:
    fill(tmp_path, *range(30), shard_bytes=20)
    opened = Store(tmp_path, maps=3)
    files = psutil.Process().num_fds() if platform.system() == "Linux" else 0
    held = [opened.get(key_of(n)) for n in range(30)]
    assert len(opened.mapped) == 3
    assert not files or psutil.Process().num_fds() == files
    assert [int(one["number"]) for one in held] == list(range(30))  # also of those that were let go


# Damage.


def name_of(opened: Store, number: int) -> Path:
    """The shard that a record lies in."""
    shard, _ = next(opened.table.record(key_of(number)))
    return opened.folder / "shards" / shard.name


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[12] ^= 0x80
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, flip, lengthen, lambda path: os.truncate(path, 5)])
def test_a_damaged_shard_is_set_aside(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    opened = fill(fill(tmp_path, 1, 2), 3, 4)
    path = name_of(opened, 1)
    damage(path)
    for table in tmp_path.glob("table*"):
        table.unlink()
    told: list[str] = []
    anew = Store(tmp_path, tell=told.append)
    assert len(told) == 1 and str(path) in told[0] and f"{path.name}.damaged" in told[0]
    assert not path.exists() and (path.parent / f"{path.name}.damaged").exists()
    assert anew.has(keys(1, 2, 3, 4)).tolist() == [False, False, True, True]
    check(anew, 3, 4)
    fill(anew, 1, 2)
    check(Store(tmp_path, tell=pytest.fail), 1, 2, 3, 4)
    damaged = (path.parent / f"{path.name}.damaged").stat().st_size
    assert anew.prune([keys(1, 2, 3, 4)]) == (0, damaged)


def test_damage_that_comes_later(tmp_path: Path) -> None:
    """Until the next refresh it is an error that names the shard."""
    opened = fill(fill(tmp_path, 1), 2)
    path = name_of(opened, 1)
    truncate(path)
    with pytest.raises(UserError, match=path.name):
        opened.get(key_of(1))
    check(opened, 2)
    with pytest.warns(UserWarning, match=path.name):
        opened.refresh()
    assert opened.has(keys(1, 2)).tolist() == [False, True]
    with pytest.raises(KeyError):
        opened.get(key_of(1))


def entry(**changes: Any) -> dict[str, Any]:
    return {f"{key_of('raw').hex()}.t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | changes}


def framed(header: Any, data: bytes = b"abcd") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HOSTILE = {
    "beyond the file": framed(entry(shape=[40], data_offsets=[0, 40])),
    "before the data": framed(entry(data_offsets=[-4, 0])),
    "backwards": framed(entry(data_offsets=[4, 0])),
    "a hole": framed(entry(shape=[3], data_offsets=[1, 4])),
    "overlapping": framed(entry() | {f"{key_of('b').hex()}.t": entry().popitem()[1]}),
    "too little": framed(entry(shape=[3], data_offsets=[0, 3])),
    "another size": framed(entry(shape=[3])),
    "a negative shape": framed(entry(shape=[-2, -2])),
    "an overflowing shape": framed(entry(shape=[2**31, 2**31, 4])),
    "a shape that wraps to 4": framed(entry(shape=[2**32 + 4])),
    "a shape beyond 64 bits": framed(entry(shape=[10**30])),
    "offsets beyond 64 bits": framed(entry(data_offsets=[0, 2**64 + 4])),
    "offsets that wrap": framed(
        entry(shape=[2**31, 2**31, 2], data_offsets=[0, 2**63 - 1])
        | {f"{key_of('b').hex()}.t": entry(data_offsets=[-(2**63), 4]).popitem()[1]}
    ),
    "five dimensions": framed(entry(shape=[1, 1, 1, 1, 4])),
    "a fraction": framed(entry(data_offsets=[0, 4.0])),
    "a truth": framed(entry(data_offsets=[False, 4])),
    "not a number": framed(entry(shape=[float("nan")])),
    "words": framed(entry(shape="4", data_offsets="04")),
    "three offsets": framed(entry(data_offsets=[0, 4, 4])),
    "an unknown dtype": framed(entry(dtype="C64")),
    "a dtype that is a list": framed(entry(dtype=["U8"])),
    "no dtype": framed({next(iter(entry())): {"shape": [4], "data_offsets": [0, 4]}}),
    "no key": framed({"weight": entry().popitem()[1]}),
    "a key in capitals": framed({f"{'AB' * 16}.t": entry().popitem()[1]}),
    "a key with spaces": framed({f"{'ab ' * 10}ab.t": entry().popitem()[1]}),
    "a name with spaces": framed({f"{'ab' * 16}.t t": entry().popitem()[1]}),
    "a list": framed([1]),
    "a number": framed(b"12"),
    "no JSON": framed(b"{{"),
    "no UTF-8": framed(b"\xff\xfe"),
    "a long number": framed(b'{"a": ' + b"9" * 10_000 + b"}"),
    "deep": framed(b"[" * 10**6),
    "wide": framed(b"[" + b"{}," * 5 * 10**6 + b"0]"),
    "empty": b"",
    "a header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "a huge header": (2**63).to_bytes(8, "little") + b"{}",
    "a negative header": b"\xff" * 8 + b"{}",
    "zeros": bytes(100),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(tmp_path: Path, hostile: bytes) -> None:
    fill(tmp_path, 1)
    path = tmp_path / "shards" / "hostile.safetensors"
    path.write_bytes(hostile)
    told: list[str] = []
    opened = Store(tmp_path, tell=told.append)
    assert len(told) == 1 and "hostile.safetensors.damaged" in told[0] and len(told[0]) < 1000
    assert not path.exists()
    check(opened, 1)
    assert opened.size()[0] == 1


def test_a_sound_header_is_not_refused(tmp_path: Path) -> None:
    """What the hostile ones are made from is good by itself."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.safetensors").write_bytes(framed(entry()))
    (tmp_path / "shards" / "b.safetensors").write_bytes(framed({"__metadata__": {"a": "b"}}, b""))
    assert Store(tmp_path, tell=pytest.fail).get(key_of("raw"))["t"].tolist() == list(b"abcd")


def test_a_header_beyond_bounds_is_not_read(tmp_path: Path) -> None:
    """A file of 4 TiB whose header is said to be 3 TiB long, in little memory."""
    path = tmp_path / "shards" / "a.safetensors"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write((3 * 2**40).to_bytes(8, "little"))
        file.truncate(4 * 2**40)
    tracemalloc.start()
    try:
        opened = Store(tmp_path, tell=lambda message: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not opened.table.shards and not path.exists() and peak < 2**20


def test_a_tensor_of_four_gibibytes(tmp_path: Path) -> None:
    """In a file with a hole; its bytes are a number that does not fit into 32 bits."""
    path = tmp_path / "shards" / "a.safetensors"
    path.parent.mkdir()
    header = framed(entry(shape=[2**16, 2**16], data_offsets=[0, 2**32]), b"")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2**32)
    found = Store(tmp_path, tell=pytest.fail).get(key_of("raw"))["t"]
    assert found.shape == (2**16, 2**16) and found[-1, -1] == 0


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    """Hidden ones, others and folders are left alone."""
    opened = fill(tmp_path, 1)
    for name in (".hidden.safetensors", "notes.txt"):
        (tmp_path / "shards" / name).write_text("x")
    (tmp_path / "shards" / "folder.safetensors").mkdir()
    before = everything(tmp_path)
    opened = Store(tmp_path, tell=pytest.fail)
    assert opened.prune([keys(1)]) == (0, 0)
    assert everything(tmp_path) == before
    check(opened, 1)


# Pruning and uses.


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "shards").iterdir())


def test_prune(tmp_path: Path) -> None:
    opened = Store(tmp_path)
    for first in (0, 10, 20, 30):
        fill(opened, *range(first, first + 10))
    fill(opened, 3, 50, 51, 52)  # 3 lies in two shards
    paths = {number: name_of(opened, number) for number in (10, 20, 30)}
    reader, before = Store(tmp_path), on_disk(tmp_path)
    held = reader.get(key_of(21))["number"]
    # All of the first but its copy, none of the second, a third of the third, half of the fourth; twice.
    keep = [keys(*range(10), 20, 21), keys(21, 22, *range(30, 35)), keys(), keys(99)]
    records, freed = opened.prune(iter(keep))
    stays = [*range(10), 20, 21, 22, *range(30, 35)]
    goes = [*range(10, 20), *range(23, 30), 50, 51, 52]
    check(opened, *stays)
    assert records == len(goes) and not opened.has(keys(*goes)).any()
    assert freed == before - on_disk(tmp_path) > 0
    assert opened.size() == (43 - len(goes), on_disk(tmp_path))
    assert opened.has(keys(*range(35, 40))).all(), "half of the fourth is kept, so it stays as it is"
    assert not paths[10].exists() and not paths[20].exists() and paths[30].exists()
    assert held == 21
    check(reader, *stays)  # it looks again when a shard is gone
    with pytest.raises(KeyError):
        reader.get(key_of(50))
    check(Store(tmp_path), *stays)
    assert opened.prune(keep) == (0, 0)
    assert opened.prune([])[0] == 43 - len(goes) and opened.size() == (0, 0) and on_disk(tmp_path) == 0


def test_prune_takes_copies_for_what_they_are(tmp_path: Path) -> None:
    """A shard of which only one record is not also elsewhere becomes a shard of that one."""
    opened = Store(tmp_path)
    for owner, numbers in (("a", range(10)), ("b", range(1, 11))):
        with opened.writer(owner) as out:
            for number in numbers:
                out.add(key_of(number), record(number))
    freed = opened.prune([keys(*range(11))])
    assert freed[0] == 0 and freed[1] > 0
    check(opened, *range(11))
    assert sorted(shard.rows for shard in opened.table.shards) == [2, 20]


def test_a_prune_that_fails_has_lost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = fill(fill(tmp_path, *range(10)), *range(10, 20))

    def full(path: Path, needed: int) -> Any:
        raise UserError("room", "none", "make some")

    with monkeypatch.context() as patched, pytest.raises(UserError, match="make some"):
        patched.setattr(writer, "published", full)
        opened.prune([keys(1, 11)])
    check(Store(tmp_path), *range(20))
    opened.prune([keys(1, 11)])
    check(opened, 1, 11)
    assert opened.size()[0] == 2 and len(shards(tmp_path)) == 1


def prune_some(folder: Path, keep: np.ndarray) -> None:
    Store(folder, tell=pytest.fail).prune([keep])


def test_two_prune_at_once(tmp_path: Path) -> None:
    """What either needs and both leave is there; nothing is lost between them."""
    for turn in range(5):
        opened = fill(tmp_path, *range(300), shard_bytes=200)
        wanted = keys(*range(0, 300, 10))
        processes = [fork.Process(target=prune_some, args=(tmp_path, wanted)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0], turn
        opened.refresh()
        check(opened, *range(0, 300, 10))


def test_prune_writes_full_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards of which little is left become few, and each goes when its records are elsewhere."""
    opened = fill(tmp_path, *range(300), shard_bytes=200)  # ten records each
    monkeypatch.setattr(Store, "writer", lambda self, owner: Writer(self.folder / "shards", owner, 400))
    really, least, most = Path.unlink, [30], 0

    def unlink(self: Path, missing_ok: bool = False) -> None:
        nonlocal most
        most = max(most, len(shards(tmp_path)))
        really(self, missing_ok)
        if self.suffix == ".safetensors":
            least.append(int(Store(tmp_path).has(keys(*range(0, 300, 10))).sum()))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        assert opened.prune([keys(*range(0, 300, 10))])[0] == 270
    assert len(least) == 31 and min(least) == 30 and most < 33
    check(opened, *range(0, 300, 10))
    assert len(shards(tmp_path)) <= 4


def test_prune_meets_a_damaged_header(tmp_path: Path) -> None:
    """One that was read before it was damaged, and must now be written anew."""
    told: list[str] = []
    fill(tmp_path, *range(10))
    opened = Store(tmp_path, tell=told.append)
    flip(shards(tmp_path)[0])
    opened.prune([keys(1)])
    assert len(told) == 1 and "damaged" in told[0] and opened.size() == (0, 0)


def test_uses(tmp_path: Path) -> None:
    opened = fill(tmp_path, *range(10))
    odd = ["runs/a b", "a.b", "..", "ä", ".hidden", "A%2Fb"]
    for number, name in enumerate(odd):
        opened.note_use(name, keys(number), {"run": name})
    opened.note_use("a.b", keys(7, 8), {"run": "other"})
    found = {use.name: use for use in opened.uses()}
    assert found.keys() == set(odd)
    assert found["a.b"].facts == {"run": "other"} and found["a.b"].keys().tolist() == keys(7, 8).tolist()
    assert abs(found["a.b"].time - time.time()) < 60 and found["ä"].facts == {"run": "ä"}
    assert len(everything(tmp_path / "uses")) == 2 * len(odd)
    opened.note_use("a", keys(1), {})
    opened.note_use("a", keys(2), {})  # removes its own keys, not those of a.b
    opened.drop_use("a")
    found = {use.name: use.keys().tolist() for use in opened.uses()}
    assert found.keys() == set(odd) and found["a.b"] == keys(7, 8).tolist()
    opened.note_use("a.b", keys(7), {"run": "other"})
    assert opened.prune(use.keys() for use in list(opened.uses())[2:5])[0] == 7
    for name in odd:
        opened.drop_use(name)
        opened.drop_use(name)
    assert not list(opened.uses()) and not everything(tmp_path / "uses")
    opened.note_use("none", keys(), {})
    assert [use.keys().shape for use in opened.uses()] == [(0, 16)]


def test_a_use_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts with other keys would call a store complete that is not."""
    opened = Store(tmp_path)
    opened.note_use("a", keys(1), {"wish": 1})
    really = uses.published

    def killed(path: Path, needed: int) -> Any:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        return really(path, needed)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(uses, "published", killed)
        opened.note_use("a", keys(2, 3), {"wish": 2})
    (use,) = opened.uses()
    assert use.facts == {"wish": 1} and use.keys().tolist() == keys(1).tolist()
    opened.note_use("a", keys(2, 3), {"wish": 2})
    assert len(everything(tmp_path / "uses")) == 2


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_a_use_that_cannot_be_read_is_not_overlooked(tmp_path: Path, ending: str) -> None:
    """Else what it needs would be removed."""
    opened = fill(tmp_path, 1)
    opened.note_use("mine", keys(1), {})
    (path,) = (tmp_path / "uses").glob(f"*{ending}")
    os.truncate(path, 20)
    with pytest.raises(UserError, match="mine"):
        opened.prune(use.keys() for use in opened.uses())
    check(Store(tmp_path), 1)
