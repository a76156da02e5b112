"""Worker processes: whatever goes wrong in one reaches the user in time, and none outlives its run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sfumato.config import Config
from sfumato.data.batch import Fault
from sfumato.data.loader import Loader
from sfumato.data.sources import Span
from sfumato.errors import UserError
from tests.unit.batches import make, samples, steps
from tests.unit.pictures import config_of, text_folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_is_replaced_and_told(tmp_path: Path, workers: int) -> None:
    """Its header is whole: it is found out while training. Another stands in for it, with its randomness."""
    text_folder(tmp_path / "set", 6)
    whole = (tmp_path / "set" / "004.png").read_bytes()
    config = config_of(tmp_path / "set", workers=workers, max_faults=0.2, batch_size=6)
    config = config.model_copy(update={"output": tmp_path / "runs"})
    before = samples(steps(make(config), 0, 3))
    (tmp_path / "set" / "004.png").write_bytes(whole[: len(whole) // 2])
    loader = make(config)
    batches = steps(loader, 0, 3)
    told = [fault for step in batches for batch in step for fault in batch.faults]
    assert len(told) == 3 and {fault.name for fault in told} == {"004.png"}
    assert "truncated" in told[0].reason
    lines = (config.folder / "faults" / "rank-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["name"] == "004.png", "told more than once"
    assert make(config).bad == loader.bad == 1, "a second start forgets it"
    check_half_a_line(config)
    after = samples(batches)
    assert after.keys() == before.keys(), "the order has moved"
    bad = [name for name in after if name[0] == 4]
    assert all(after[name] == before[name] for name in after.keys() - set(bad)), "others have changed"
    assert all(after[name] != before[name] for name in bad)
    strict = config.model_copy(update={"data": config.data.model_copy(update={"max_faults": 0.1})})
    (config.folder / "faults" / "rank-0.jsonl").unlink()
    with pytest.raises(UserError, match=r"(?s)1 could not be read; the last is 004\.png.*max_faults"):
        steps(make(strict), 0, 3)
    assert not active_children()


def check_half_a_line(config: Config) -> None:
    """A start that was killed in the middle of a line spoils neither the ones before nor the next."""
    file = config.folder / "faults" / "rank-0.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:9])
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"max_faults": 1.0})})
    loader = make(lenient)
    loader.note([Fault("005.png", "another")])
    assert make(lenient).bad == loader.bad == 2
    file.unlink()
    file.mkdir()  # a list that cannot be written
    loader.note([Fault("003.png", "a third")])
    assert loader.bad == 3
    file.rmdir()
    file.write_text(whole)


def test_a_folder_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    loader = make(config_of(text_folder(tmp_path / "set", 6), max_faults=1.0))
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(UserError, match="neither it nor the 5 records"):
        steps(loader, 0, 1)


def odd(place: Path, trouble: Callable[[], None], **settings: Any) -> Loader:
    """A loader of a source in which one picture is trouble."""
    loader = make(config_of(place, **settings))
    source = loader.samples.index.sources[0]

    class Odd(type(source)):  # type: ignore[misc]
        def open(self, span: Span) -> BinaryIO:
            if span.file == "004.png":
                trouble()
            return super().open(span)

    source.__class__ = Odd
    return loader


def test_hanging_worker_ends_in_an_error(tmp_path: Path) -> None:
    loader = odd(text_folder(tmp_path, 6), lambda: time.sleep(3600), workers=2, worker_timeout=1.0)
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(islice(loader.steps_from(0), 3))
    assert time.monotonic() - begin < 30
    for word in ("the data of step 0", "004.png", "timed out after 1", "data.worker_timeout"):
        assert word in str(caught.value)
    assert not active_children(), "the stuck worker is still there"


def test_killed_worker_ends_in_an_error(tmp_path: Path) -> None:
    """What the kernel does when memory runs out."""
    loader = odd(text_folder(tmp_path, 6), lambda: os.kill(os.getpid(), signal.SIGKILL), workers=2)
    with pytest.raises(UserError, match=r"(?s)the data of step 0.*DataLoader worker"):
        list(islice(loader.steps_from(0), 3))
    assert not active_children()


def test_a_worker_that_is_killed_while_the_run_trains_is_told(tmp_path: Path) -> None:
    """torch raises that out of whatever line is run at this moment."""
    loader = make(config_of(text_folder(tmp_path, 6), workers=2))
    stream = loader.steps_from(0)
    next(stream)
    with pytest.raises(UserError, match=r"(?s)the data on rank 0.*is killed by signal.*memory is short"):
        with loader.watched():
            active_children()[0].kill()
            for _ in range(100):
                time.sleep(0.1)
    stream.close()
    assert not active_children()


def test_defect_in_a_worker_keeps_its_traceback(tmp_path: Path) -> None:
    def defect() -> None:
        raise KeyError("ours")

    loader = odd(text_folder(tmp_path, 6), defect, workers=1)
    with pytest.raises(KeyError, match="test_data_workers.py"):
        list(islice(loader.steps_from(0), 3))


def test_workers_outlive_the_signals_of_a_run(tmp_path: Path) -> None:
    """Slurm and Ctrl-C signal every process of the run; the main process still gets its batches."""
    caught: list[int] = []
    before = {number: signal.signal(number, lambda n, _: caught.append(n)) for number in (2, 10, 12, 15)}
    stream = make(config_of(text_folder(tmp_path, 6), workers=2)).steps_from(0)
    try:
        next(stream)
        workers = active_children()
        assert len(workers) == 2
        for worker in workers:
            for number in (2, 10, 12, 15):
                os.kill(worker.pid or 0, number)
        assert len(list(islice(stream, 6))) == 6
        assert all(worker.is_alive() for worker in workers)
    finally:
        stream.close()  # type: ignore[attr-defined]
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not caught and not active_children()


ENDINGS = {
    "falls off the end": ("", 0),
    "raises": ("raise SystemExit(3)", 3),
    "is ended by SIGTERM": ("time.sleep(60)", -signal.SIGTERM),
    "is killed": ("time.sleep(60)", -signal.SIGKILL),
}
"""What a process does once its workers are there, and its exit code."""
RUNS = """
import json, os, sys, time
from multiprocessing import active_children
from tests.unit.batches import make
from tests.unit.pictures import config_of

# Each run is a process of its own that ends as this script does; its parent only waits.
runs = []
for ending in json.loads(sys.argv[2]):
    if not (pid := os.fork()):
        break
    runs.append(pid)
else:
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runs}
    print("codes", *[codes[pid] for pid in runs], flush=True)
    sys.exit()
stream = make(config_of(sys.argv[1], workers=2)).steps_from(0)
next(stream)
number, workers = len(runs), [child.pid for child in active_children()]
os.write(1, " ".join(map(str, ["run", number, os.getpid(), *workers, chr(10)])).encode())
exec(ending)
"""


def test_nothing_outlives_the_run(tmp_path: Path) -> None:
    """A process whose loader is still open ends in seconds, however it ends, and its workers with it."""
    make(config_of(text_folder(tmp_path / "set", 6)))  # the four need not wait for one another's index
    root = Path(__file__).parents[2]
    endings = json.dumps([ending for ending, _ in ENDINGS.values()])
    with subprocess.Popen(
        [sys.executable, "-c", RUNS, str(tmp_path / "set"), endings],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().split() for _ in ENDINGS]
        pids = {int(number): list(map(int, of_run)) for _, number, *of_run in told}
        assert all(len(of_run) == 3 for of_run in pids.values()), "a run and its two workers"
        for (_, code), of_run in zip(ENDINGS.values(), (pids[n] for n in range(4)), strict=True):
            if code < 0:
                os.kill(of_run[0], -code)
        said = process.communicate(timeout=60)[0].split()
        assert said == ["codes", *[str(int(code)) for _, code in ENDINGS.values()]]
    end = time.monotonic() + 60
    for how, number in zip(ENDINGS, range(4), strict=True):
        while any(Path(f"/proc/{pid}").exists() for pid in pids[number]):
            assert time.monotonic() < end, f"a worker of a run that {how} is still there"
            time.sleep(0.2)


def test_many_micro_batches_do_not_use_up_files(tmp_path: Path) -> None:
    """A worker's tensor holds an open file: two lists of 64 micro-batches would need more than 1024."""
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    stream = make(config_of(text_folder(tmp_path, 6), batch_size=64, micro=1, workers=2)).steps_from(0)
    held = [next(stream), next(stream)]
    assert len(held[0]) == 64
    assert len(list(descriptors.iterdir())) - before < 700  # those that came before their turn
    stream.close()  # type: ignore[attr-defined]
