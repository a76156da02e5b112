"""Without a supervisor the ranks themselves say who has died or hangs: real processes and a real store."""

import datetime
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfumato.errors import Lost
from sfumato.launch.pulse import Beat, Pulse, Stillness, behind, hang
from sfumato.watch import Watch
from tests.engine.ranks import fork_server, free_port

LIMIT = 3.0


def stuck() -> None:
    time.sleep(600)


def rank_of(case: str, folder: Path, rank: int, port: int) -> None:
    """Three steps of a loop; in the last the odd rank ends in some way, and the other waits for it."""
    import torch.distributed as dist

    with open(folder / f"said-{rank}", "wb", buffering=0) as said:
        os.dup2(said.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    place: Any = SimpleNamespace(rank=rank, world=2)
    odd = rank == (0 if case == "first-frozen" else 1)  # rank 0 hosts the store
    try:
        # A death is found by the broken connection, and a failure is told, long before the limit.
        with Watch(place, 60 if case in ("dies", "fails") else LIMIT) as watch:
            for step in range(3):
                watch.beat(step, "waiting for data")
                watch.beat(step, "training")
                if step == 2 and odd:
                    time.sleep(2.5)  # what it said last is told within two rounds
                    (folder / "fault").touch()
                    end(case)
                dist.barrier()
    except Lost as error:
        os.write(2, str(error).encode())
        os._exit(7)
    os._exit(0)


def end(case: str) -> None:
    if case == "hangs":
        stuck()
    if case == "fails":
        raise ValueError("the wheel came off")
    if case != "well":
        os.kill(os.getpid(), signal.SIGKILL if case == "dies" else signal.SIGSTOP)


def ended(case: str, folder: Path, rank: int) -> tuple[int, str]:
    """How a rank ended, which it must within the limit and some seconds after the fault, and what it said."""
    port = free_port()
    ranks = [fork_server().Process(target=rank_of, args=(case, folder, each, port)) for each in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[rank].join(200)
        assert time.time() - (folder / "fault").stat().st_mtime < LIMIT + 60
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return ranks[rank].exitcode, (folder / f"said-{rank}").read_text()


@pytest.mark.timeout(400)
def test_a_rank_that_hangs_is_named_by_where_it_is(tmp_path: Path) -> None:
    """Both ranks have said the same; rank 0's stack shows that it waits for others."""
    code, text = ended("hangs", tmp_path, 0)
    assert code == 1
    assert "rank 1 of 2 hangs at step 2, training: it is in stuck, " in text
    assert "others wait: rank 0 at step 2, training" in text
    assert f"engine.timeout = {LIMIT:g} s are over" in text
    assert "in barrier" in text, "its own stack"


def test_a_rank_that_waits_for_its_device_is_not_to_blame() -> None:
    """NCCL's collectives return at once: the host waits later, for what they leave on the device."""
    beat = Beat(LIMIT, 7, 2, "training")
    calls = {
        "gradients.py:step": 'File "/x/sfumato/engine/gradients.py", line 9 in step',
        "engine.py:_clip": 'File "/x/sfumato/engine/engine.py", line 9 in _clip',
        "synchronize": 'File "/x/torch/cuda/__init__.py", line 9 in synchronize',
    }
    for waits in calls.values():
        told = [waits, 'File "/x/diffusers/vae.py", line 9 in encode', waits]
        stacks = {rank: f"Current thread 0x1:\n  {line}\n" for rank, line in enumerate(told)}
        assert behind(dict.fromkeys(stacks, beat), stacks) == [1], waits


def test_a_stopped_process_is_named(tmp_path: Path) -> None:
    code, text = ended("frozen", tmp_path, 0)
    assert code == 1
    assert "rank 1 of 2 hangs at step 2, training: it does not answer" in text


def test_the_rank_that_hosts_the_store_may_be_the_one(tmp_path: Path) -> None:
    code, text = ended("first-frozen", tmp_path, 1)
    assert code == 1
    assert "rank 0 of 2 hangs at step 2, training: it does not answer" in text


def test_a_rank_that_dies_is_named_with_its_last_step(tmp_path: Path) -> None:
    code, text = ended("dies", tmp_path, 0)
    assert code == 7
    assert "rank 1 of 2 died; it was last seen at step 2, training" in text


def test_the_error_of_the_rank_that_failed_is_told_by_all(tmp_path: Path) -> None:
    code, text = ended("fails", tmp_path, 0)
    assert (code, text) == (7, "rank 1 of 2 failed at step 2, training: ValueError: the wheel came off")


def test_a_run_that_is_well_ends_well(tmp_path: Path) -> None:
    assert ended("well", tmp_path, 0) == (0, "")


def test_a_beat_takes_microseconds() -> None:
    with Watch(SimpleNamespace(rank=0, world=1), 600) as watch:  # type: ignore[arg-type]
        watch.beat(0, "training")
        best = min(timed(watch) for _ in range(20))
    assert best < 50e-6, f"{best * 1e6:.1f} us"
    assert not [thread for thread in threading.enumerate() if thread.name == "watch"]


def timed(watch: Watch) -> float:
    begun = time.perf_counter()
    for step in range(100):
        watch.beat(step, "waiting for data")
    return (time.perf_counter() - begun) / 100


def test_what_a_pulse_says_is_read_elsewhere(tmp_path: Path) -> None:
    theirs = Pulse.make(tmp_path / "pulse")
    assert theirs.read() == Beat(0, 0, 0, "") and str(theirs.read()) == "before its first step"
    beat = Beat(1800.0, 7, 123, "waiting for data")
    Pulse(tmp_path / "pulse").write(beat)
    assert theirs.read() == beat


def test_time_in_which_the_observer_slept_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm suspends whole jobs; after that nobody hangs."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    still = Stillness(awake=5)
    ages = []
    for passed, value in ((1, 1), (2, 1), (3600, 1), (2, 1), (1, 2)):
        now[0] += passed
        ages.append(still.look(value))
    assert ages == [0, 2, 7, 9, 0]


FIRST = "Thread 0x1 (most recent call first):\n"
WAITS = FIRST + '  File "/x/torch/distributed/distributed_c10d.py", line 5 in barrier\n'
WORKS = FIRST + '  File "/x/loop.py", line 7 in stuck\n'


def test_who_is_behind() -> None:
    same = {rank: Beat(9, 4, 2, "training") for rank in range(3)}
    assert behind(same, {0: WAITS, 1: WORKS, 2: WAITS}) == [1]
    assert behind(same, {0: WAITS, 1: WAITS, 2: WAITS}) == [0, 1, 2], "a collective itself is stuck"
    assert behind(same, {0: WAITS, 1: WORKS}) == [2], "one that does not even tell its stack"
    late = same | {2: Beat(9, 3, 2, "waiting for data")}
    assert behind(late, {0: WAITS, 1: WORKS, 2: WAITS}) == [2], "the one with the fewest beats"
    assert "it is in stuck, /x/loop.py:7" in hang(same, {0: WAITS, 1: WORKS, 2: WAITS}, 9)
