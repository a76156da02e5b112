"""Several processes and one index: one makes it, the others wait, and who is killed is in nobody's way."""

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sfumato.data import index
from sfumato.data.index import Index, scan, shelf
from sfumato.errors import UserError
from tests.engine.ranks import as_users_start_it, fork_server
from tests.unit.toy_source import Many, encoded, fill, indexed, opens, tell, toy

ROOT = Path(__file__).parents[2]
COUNT = 300
START = """
import contextlib, os, signal, sys
from pathlib import Path
from sfumato.data import index; from sfumato.data.index import draft, scan, shelf
from sfumato.data.index import open_index
from tests.unit.toy_source import data_of, install
install()
draft.BEAT = shelf.POLL = 0.05
place = Path(sys.argv[1])
def tell(line):
    print("told", line, flush=True)
"""
OPEN = """
print("began", flush=True)
made = open_index(data_of(place), tell=tell)
print("made", len(made), made.fingerprint, flush=True)
"""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "open_source", toy)
    monkeypatch.setattr(shelf, "POLL", 0.05)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", COUNT)


class Program:
    """A program on a folder, in a process of the fork server: it need not import what all of them import."""

    def __init__(self, code: str, place: Path) -> None:
        context = fork_server()
        reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(code, str(place), writer))
        self.process.start()
        writer.close()
        self.pid, self.stdout = self.process.pid, open(os.dup(reader.fileno()))
        reader.close()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode  # type: ignore[no-any-return]

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal and wait until it is gone."""
        if self.returncode is None:
            os.kill(self.pid, number)
        self.said(60)

    def said(self, timeout: float) -> str:
        """What it has yet to say until it ends."""
        self.process.join(timeout)
        assert self.returncode is not None, f"it did not end within {timeout} s"
        return self.stdout.read()


def run(code: str, place: str, writer: Connection) -> None:
    """What a program's process does."""
    as_users_start_it()
    for number in (1, 2):
        os.dup2(writer.fileno(), number)
    writer.close()
    sys.argv = ["-c", place]
    exec(code, {"__name__": "__main__"})


def code_of(between: str, end: str) -> str:
    return START + textwrap.dedent(between) + textwrap.dedent(end)


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Start a program on a folder; it does not outlive the test."""
    begun: list[Program] = []

    def program(place: Path, between: str = "", end: str = OPEN) -> Program:
        begun.append(Program(code_of(between, end), place))
        return begun[-1]

    yield program
    for each in begun:
        each.end()
        each.stdout.close()


def slow(place: Path, seconds: float) -> None:
    """Each open takes so long; 16 go on at once."""
    (place / ".slow").write_text(str(seconds))


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
    return found


def shelf_of(place: Path) -> Path:
    found = wait_for(lambda: list((place.parent / "store").glob("index/*")))
    assert len(found) == 1
    return found[0]


def recorded(place: Path) -> int:
    """Records that a living process says are safe."""
    return max((left.records for left in shelf.drafts(shelf_of(place))), default=0)


def last(process: Program) -> list[str]:
    """The words of a program's last line; it must have ended well."""
    out = process.said(250)
    assert process.returncode == 0, out
    return out.splitlines()[-1].split()


def check_whole(made: Index, place: Path, tmp_path: Path) -> None:
    """Fail unless an index is, byte by byte, the one that is made at one go."""
    slow(place, 0)
    other = indexed(place, store=tmp_path / "other store")
    for name in ("records.jsonl", "faults.jsonl", "sizes.npy", "part.npy", "offsets.npy", "index.json"):
        assert filecmp.cmp(made.folder / name, other.folder / name, shallow=False), name
    left = [path.name for path in made.folder.parent.iterdir() if path.name.startswith(".")]
    assert left == [".lock"], left


def opens_of_four(place: Path, start: Callable[..., Program], between: str = "") -> None:
    slow(place, 0.02)
    made = {tuple(last(each)) for each in [start(place, between) for _ in range(4)]}
    assert len(made) == 1 and ("made", str(COUNT)) == next(iter(made))[:2]
    assert len(opens(place)) == COUNT, "a file was opened twice"


def test_of_four_processes_one_makes_it(place: Path, start: Any) -> None:
    opens_of_four(place, start)


def test_no_lock_is_caught(place: Path, start: Any) -> None:
    with pytest.raises(AssertionError):
        opens_of_four(place, start, "index.locked = lambda *_: contextlib.nullcontext()")


def test_who_waits_says_for_whom(place: Path, start: Any) -> None:
    slow(place, 0.4)
    first = start(place)
    wait_for(lambda: recorded(place) > 20)
    second = start(place, "shelf.TOLD = 0.2")
    out = second.said(60)
    told = [line for line in out.splitlines() if line.startswith("told")]
    assert f"waiting for the index of {place}, which process {first.pid} of " in told[0], out
    assert " records) makes" in told[0]
    assert last(first) == out.splitlines()[-1].split()
    assert len(opens(place)) == COUNT


def test_waiting_lasts_as_long_as_there_is_progress(place: Path, start: Any) -> None:
    slow(place, 0.4)  # some 8 seconds in all
    first = start(place)
    wait_for(lambda: recorded(place) > 0)
    second = start(place, "shelf.PATIENCE = 4.0")
    begun = time.monotonic()
    assert last(second) == last(first)
    assert time.monotonic() - begun > 4.0, "the test's first process was too quick to be waited for"


def test_a_hanging_holder_ends_in_an_error(place: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(place)
    tell(place, "000", captions=["another"])
    hold = """
    with index.locked(next(iter((place.parent / "store" / "index").iterdir())), "it", tell):
        print("held", flush=True)
        sys.stdin.read() or __import__("time").sleep(60)
    """
    holder = start(place, end=hold)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(shelf, "PATIENCE", 0.3)
    with pytest.raises(UserError) as caught:
        indexed(place)
    assert str(shelf_of(place) / ".lock") in str(caught.value) and "no progress" in str(caught.value)
    assert len(indexed(place, verify=False)) == COUNT, "who does not verify needs no lock"
    holder.end()
    assert indexed(place).record(0).captions == ["another"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_is_followed_by_the_next(
    place: Path, start: Any, tmp_path: Path, number: signal.Signals
) -> None:
    slow(place, 0.05)
    first = start(place)
    safe = wait_for(lambda: recorded(place) >= 100 and recorded(place))
    first.end(number)
    assert first.returncode != 0
    assert not shelf.published(shelf_of(place)), "half an index was published"
    done = opens(place)
    made = indexed(place)
    again = opens(place)
    assert len(made) == COUNT and len(again) <= COUNT - safe, "what was seen already is opened again"
    assert set(done) | set(again) == {f"{number:03}.img" for number in range(COUNT)}
    check_whole(made, place, tmp_path)


def test_while_it_is_made_the_older_one_is_there(place: Path, start: Any) -> None:
    before = indexed(place)
    for number in range(100):
        (place / f"{number:03}.img").write_bytes(encoded((5, 5)))
    slow(place, 0.1)
    process = start(place)
    wait_for(lambda: recorded(place) > 10)
    unseen = indexed(place, verify=False)
    assert unseen.folder == before.folder and unseen.fingerprint == before.fingerprint
    assert last(process)[2] == indexed(place).fingerprint == indexed(place, verify=False).fingerprint
    assert indexed(place).fingerprint != before.fingerprint


def test_two_drafts_of_killed_processes(place: Path, start: Any, tmp_path: Path) -> None:
    """The second is killed before it is as far as the first; what the first saw is not lost."""
    slow(place, 0.05)
    for least in (150, 1):
        process = start(place, "" if least > 1 else "scan.known = lambda *_: []")
        wait_for(lambda least=least: any(left.records >= least for left in shelf.drafts(shelf_of(place))))
        if least == 1:
            wait_for(lambda: len(shelf.drafts(shelf_of(place))) == 2)
        process.end()
    opens(place)
    made = indexed(place)
    assert len(opens(place)) <= COUNT - 150
    check_whole(made, place, tmp_path)


def killed_draft(place: Path, start: Any) -> Path:
    """What a process leaves that is killed just before it publishes."""
    kill = "index.build.__globals__['publish'] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    process = start(place, kill)
    process.said(60)
    assert process.returncode == -signal.SIGKILL
    return shelf.drafts(shelf_of(place))[0].folder


def zeroed(path: Path, first: int) -> None:
    """What a machine without power may leave of a file's end."""
    with path.open("r+b") as file:
        file.seek(first)
        file.write(bytes(path.stat().st_size - first))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: None,
    "sizes of zeros": lambda folder: zeroed(folder / "sizes.npy", 128 + 8 * 30),
    "keys of zeros": lambda folder: zeroed(folder / "keys.npy", 128 + 16 * 30),
    "fewer sizes": lambda folder: os.truncate(folder / "sizes.npy", 128 + 8 * 30),
    "no keys": lambda folder: (folder / "keys.npy").unlink(),
    "more records than there are": lambda folder: (folder / "progress").write_text("999 records x"),
    "an empty progress": lambda folder: (folder / "progress").write_text(""),
    "a progress of zeros": lambda folder: (folder / "progress").write_bytes(bytes(200)),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_killed_process_leaves_misleads_nobody(tmp_path: Path, start: Any, damage: str) -> None:
    place = fill(tmp_path / "photos", 40)
    DAMAGES[damage](killed_draft(place, start))
    opens(place)
    made = indexed(place)
    assert len(opens(place)) in {"none": [0], "sizes of zeros": [10], "keys of zeros": [10]}.get(damage, [40])
    check_whole(made, place, tmp_path)


MOMENTS = ("before", "after")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", [1, 2])
def test_killed_while_it_publishes(tmp_path: Path, start: Any, call: int, moment: str) -> None:
    """Of the same state as one that is there, which is put aside first."""
    place = fill(tmp_path / "photos", 20)
    whole = indexed(place)
    (whole.folder / "sizes.npy").unlink()  # damaged, so that it is made again under the same name
    kill = f"""
    replace, calls = os.replace, []
    def replaced(*told):
        calls.append(told)
        if (len(calls), "before") == ({call}, "{moment}"): os.kill(os.getpid(), signal.SIGKILL)
        replace(*told)
        if (len(calls), "after") == ({call}, "{moment}"): os.kill(os.getpid(), signal.SIGKILL)
    shelf.os.replace = replaced
    """
    process = start(place, kill)
    process.said(60)
    assert process.returncode == -signal.SIGKILL
    opens(place)
    made = indexed(place, verify=random.random() < 0.5)
    assert len(made) == 20 and made.fingerprint == whole.fingerprint
    assert not opens(place)
    if (call, moment) != (2, "after"):
        check_whole(made, place, tmp_path)


def test_killed_at_any_moment(tmp_path: Path, start: Any) -> None:
    """Again and again: what is found then is whole, and of the older or the present state."""
    place = fill(tmp_path / "photos", 60)
    slow(place, 0.01)
    first = indexed(place)
    known, rest = {first.fingerprint}, first.sizes[30:].tolist()
    chance = random.Random(5)
    for turn in range(6):
        for number in range(30):
            (place / f"{number:03}.img").write_bytes(encoded((5 + turn, 5 + number)))
        process = start(place)
        assert process.stdout.readline() == "began\n"
        time.sleep(chance.random() * 0.08)
        process.end()
        unseen = indexed(place, verify=False)
        present = [[5 + turn, 5 + number] for number in range(30)] + rest
        assert unseen.fingerprint in known or unseen.sizes.tolist() == present
        now = indexed(place)
        assert now.sizes.tolist() == present
        known.add(now.fingerprint)
    check_whole(indexed(place), place, tmp_path)


MEMORY = """
import gc, json, threading, time
import numpy as np, psutil
from sfumato.config import Data
from sfumato.data.index.scan import Known, Look
from tests.unit.toy_source import AtOnce
# What each record costs in time is not of interest here; how many are held at once has a test of its own.
scan.size_of, scan.ThreadPoolExecutor = lambda file, most: (3, 2), AtOnce
me, count = psutil.Process(), 40_000

def made(state, records=count):
    os.environ["MANY_STATE"] = state
    index = open_index(Data(source=f"0:{records}:x", store=place), digests=True)
    assert len(index) == records
    return index.folder

def most(make):
    '''Bytes that something takes at its peak, beyond what the process had.'''
    gc.collect()
    before, peak, end = me.memory_full_info().uss, 0, threading.Event()
    def watch():
        nonlocal peak
        while not end.wait(0.005):
            peak = max(peak, me.memory_full_info().uss)
    thread = threading.Thread(target=watch)
    thread.start()
    kept = make()
    time.sleep(0.1)
    end.set()
    thread.join()
    return (peak - before) / count

class Table(Known):
    '''A dict in place of the sorted halves.'''
    def __init__(self, *told):
        super().__init__(*told)
        pairs = zip(self.keys.rows, self.sizes.rows.tolist())
        self.table = {row.tobytes(): tuple(size) for row, size in pairs}

for state in "ab":
    made(state, 3000)  # what is imported and allocated once
told = {"new": most(lambda: made("a")), "again": most(lambda: made("b"))}
told |= {kind.__name__: most(lambda: kind(made("b"), count, True)) for kind in (Known, Table)}
print(json.dumps(told))
"""


def test_memory_for_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 64 bytes while it is made; a table of all records in memory is caught."""
    # An array's memory goes back at once: what one step has freed would hide what the next one takes.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    command = [sys.executable, "-c", code_of("", MEMORY), str(tmp_path)]
    told = json.loads(subprocess.run(command, cwd=ROOT, stdout=-1, check=True, timeout=250).stdout)
    assert max(told["new"], told["again"], told["Known"]) < 64 < told["Table"], told


def test_the_synthetic_source_is_opened_once_for_each_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Many] = []

    def kept(layout: Any) -> Many:
        made.append(Many(layout))
        return made[-1]

    monkeypatch.setattr(index, "open_source", kept)
    index.open_index(index.Data(source="0:1000:x", store=tmp_path))
    index.open_index(index.Data(source="0:1000:x", store=tmp_path))
    assert [each.opens for each in made] == [1000, 0]
    assert scan.AHEAD < 1000
