"""A run that is asked to stop does so at one step on all ranks, and says that it can go on."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfumato import launch
from sfumato.errors import CONTINUE, Stopped, UserError
from sfumato.stopping import Stopping
from tests.engine.ranks import run_ranks

ROOT = Path(__file__).parents[2]
ALONE: Any = SimpleNamespace(rank=0, world=1, first=True)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_the_loop_a_signal_ends_at_once_and_in_it_at_the_next_turn(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="before its first step: SIG.* came; the same command goes on"):
        with Stopping():
            send(number)
            time.sleep(5)
    assert signal.getsignal(number) == before

    said: list[str] = []
    with Stopping(tell=said.append) as stopping:
        with stopping.together(ALONE, 60):
            assert not stopping.agreed(1)
            send(number)
            send(number)  # twice at once is once
            assert stopping.agreed(2) and stopping.agreed(2)
            time.sleep(0.1)
        error = stopping.error(2)
    assert str(
        error
    ) == f"stopped at step 2, which is saved: {number.name} came; the same command goes on " + (
        f"(exit code {CONTINUE})"
    )
    assert len(said) == 1 and said[0].startswith(number.name)
    assert signal.getsignal(number) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "stopping"]


def test_a_signal_in_the_last_turn_is_not_lost() -> None:
    with Stopping() as stopping, stopping.together(ALONE, 60):
        assert not stopping.agreed(7)
        send(signal.SIGTERM)
    assert stopping.reason == signal.SIGTERM and "at step 7, which is saved" in str(stopping.error(7))


def test_a_signal_after_the_loop_tells_what_is_saved() -> None:
    with pytest.raises(Stopped, match="at step 7, which is saved: SIGTERM"), Stopping() as stopping:
        with stopping.together(ALONE, 60):
            assert not stopping.agreed(7)
        send(signal.SIGTERM)
        time.sleep(5)


def test_an_error_of_the_loop_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), Stopping() as stopping, stopping.together(ALONE, 60):
        send(signal.SIGTERM)
        assert 1 / 0


def test_a_signal_hides_no_error_that_is_on_its_way() -> None:
    """torchrun sends one to all ranks when one of them has failed."""
    with pytest.raises(ZeroDivisionError), Stopping() as stopping:
        try:
            with stopping.together(ALONE, 60):
                assert 1 / 0
        finally:
            send(signal.SIGTERM)
            time.sleep(0.1)


def test_a_file_asks_and_is_removed_when_that_is_obeyed(tmp_path: Path) -> None:
    with Stopping(file=tmp_path / "stop") as stopping, stopping.together(ALONE, 60):
        assert not stopping.agreed(0)
        (tmp_path / "stop").mkdir()  # somebody's folder is none
        stopping._looked -= 10
        assert not stopping.agreed(0)
        (tmp_path / "stop").rmdir()
        (tmp_path / "stop").touch()
        stopping._looked -= 10
        assert stopping.agreed(1)
        assert stopping.why == f"{tmp_path / 'stop'} was there (it is removed)"
    assert not (tmp_path / "stop").exists()


def test_the_time_is_up_whatever_the_clock_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stopping(minutes=1.5) as stopping, stopping.together(ALONE, 60):
        monkeypatch.setattr(time, "time", lambda: 1e12)  # somebody sets the clock
        assert not stopping.agreed(0)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 91)
        assert stopping.agreed(1)
    assert stopping.why == "time_limit = 1.5 minutes are over"
    assert isinstance(stopping.error(1), Stopped)


def test_a_limit_that_loading_takes_whole_is_no_call_to_go_on() -> None:
    """Else whatever starts the run again on exit code 75 would do so for ever."""
    with Stopping(minutes=1e-9) as stopping, stopping.together(ALONE, 60):
        assert stopping.agreed(4)
    error = stopping.error(4)
    assert isinstance(error, UserError) and "before one step was done" in str(error)


def test_what_is_ignored_stays_ignored() -> None:
    """A shell gives a command in the background an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping():
            send(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_forked_childs_signals_are_its_own() -> None:
    """The terminal and Slurm signal every process; a loader's worker must not make a second signal of it."""
    with Stopping() as stopping, stopping.together(ALONE, 60):
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.1)
        assert not stopping.agreed(0)


WAITS = """
import ctypes
from types import SimpleNamespace
from sfumato.stopping import Stopping
with Stopping(tell=print) as stopping, stopping.together(SimpleNamespace(first=True, world=1), 60):
    print("at work", flush=True)
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never comes back to Python's handlers, as a collective may not
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


def test_a_second_signal_ends_at_once_whatever_the_process_waits_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGUSR1)
        time.sleep(launch.REPEATED + 0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(launch.REPEATED + 0.5)
        assert process.poll() is None, "the first signal only asks, and a warning is none"
        for _ in range(4):  # two that come before it looks are one
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the last checkpoint is whole" in err


def turns(folder: Path, agree: bool) -> tuple[int, str, bool]:
    """Ten turns of a loop, the third with a signal to rank 1: the last turn, why, and whether 0 was first.

    Rank 1 does not ask before rank 0 has its first answer, unless it waits for that in vain.
    """
    from sfumato.engine import ranks

    place, answered, first = ranks.start(60), folder / f"answered-{agree}", True
    with Stopping() as stopping, stopping.together(place if agree else ALONE, 60):
        for step in range(10):
            end = time.monotonic() + 20
            while place.rank == 1 and not answered.exists() and time.monotonic() < end:
                time.sleep(0.05)
            first = first and (place.rank == 0 or answered.exists())
            if stopping.agreed(step):
                return step, stopping.why, first
            if place.rank == 0:
                answered.touch()
            if step == 2 and place.rank == 1:
                send(signal.SIGUSR1)
    return -1, "", first


def both(folder: Path) -> list[tuple[int, str, bool]]:
    """As it is, and broken: each rank asks only itself."""
    return [turns(folder, True), turns(folder, False)]


def check_one_step(results: Sequence[tuple[int, str, bool]]) -> None:
    """Fail unless all ranks stopped, at the same step."""
    steps = {step for step, _, _ in results}
    assert len(steps) == 1 and steps != {-1}, f"the ranks stopped at {steps}"


def test_one_ranks_signal_stops_all_at_one_step_and_none_waits_to_be_asked(tmp_path: Path) -> None:
    right, broken = zip(*run_ranks(both, 2, tmp_path, timeout=200), strict=True)
    check_one_step(right)
    step, why, _ = right[0]
    assert step == 4 and why == right[1][1] == "SIGUSR1 came", "asked at turn 3, read at turn 4"
    assert right[1][2], "rank 0 waited for rank 1, which was late"
    with pytest.raises(AssertionError, match="the ranks stopped at"):
        check_one_step(broken)
