"""Ranks on this machine start, fail and end together: real processes, no mock."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PROGRAM = Path(__file__).with_name("launch_program.py")
MARK = "SFUMATO_TEST_OF"
"""In the environment of all that a test starts: the id of the process that tests; there may be several."""
ROOT = PROGRAM.parents[2]


def begin(case: str, logs: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """The supervisor of a case."""
    free = {"OMP_NUM_THREADS", "MALLOC_TOP_PAD_", "SFUMATO_TUNED", "RANK", "WORLD_SIZE"}
    env = {name: value for name, value in os.environ.items() if name not in free}
    env |= {"PYTHONPATH": str(ROOT), MARK: str(os.getpid())}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(ranks), case, str(logs)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; no process of this test is left."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    check_nothing_left()
    return process.returncode, out, err


def ours() -> list[psutil.Process]:
    """All processes that this test has started, wherever they hang in the tree; zombies too."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            zombie = process.ppid() == os.getpid() and process.status() == psutil.STATUS_ZOMBIE
            mine = zombie or process.environ().get(MARK) == str(os.getpid())
        except psutil.Error:
            continue
        found += [process, *process.children(recursive=True)] if mine else []
    return found


def check_nothing_left() -> None:
    end = time.monotonic() + 60
    while ours() and time.monotonic() < end:
        time.sleep(0.1)
    assert not ours(), f"left over: {ours()}"


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for process in ours():
        process.kill()


def sleeping(process: subprocess.Popen[str], logs: Path) -> None:
    """Wait until rank 0, whose output is the supervisor's, and rank 1 are at work."""
    assert process.stdout is not None
    assert process.stdout.readline() == "sleeping\n"
    end = time.monotonic() + 120
    while "sleeping" not in (logs / "rank-1.log").read_text():
        assert time.monotonic() < end, "rank 1 does not come to work"
        time.sleep(0.05)


def test_all_is_well(tmp_path: Path) -> None:
    code, out, err = finish(begin("fine", tmp_path))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (code, err) == (0, "")
    assert out == f"rank 0 OMP {threads} 268435456\n"
    assert (tmp_path / "rank-0.log").read_text() == out
    assert (tmp_path / "rank-1.log").read_text() == out.replace("rank 0", "rank 1")


def test_an_exit_code_is_kept_and_the_other_rank_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    code, _, err = finish(begin("exit-7", tmp_path))
    assert code == 7
    assert "rank 1 of 2 ended with exit code 7" in err
    assert time.monotonic() - start < 120


def test_a_users_mistake_is_shown_once_without_traceback(tmp_path: Path) -> None:
    code, out, err = finish(begin("user-error", tmp_path))
    assert code == 2
    assert err == "asked: a thing\nfound: another\n   do: choose\n"
    assert out == ""
    assert "asked: a thing" in (tmp_path / "rank-0.log").read_text()


def test_only_the_cause_of_a_crash_is_shown(tmp_path: Path) -> None:
    """Rank 0 fails too, in gloo's barrier; what it says is an echo."""
    code, _, err = finish(begin("defect", tmp_path))
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.count("the wheel came off") == 2  # the line of the source and the message
    assert f"rank 1 of 2 failed; its log is {tmp_path / 'rank-1.log'}" in err
    assert "the wheel came off" in (tmp_path / "rank-1.log").read_text()


def test_a_crash_in_native_code_shows_its_stack(tmp_path: Path) -> None:
    code, _, err = finish(begin("segfault", tmp_path))
    assert code == 128 + signal.SIGSEGV
    assert "Segmentation fault" in err and "in work" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    process = begin("sleep", tmp_path)
    sleeping(process, tmp_path)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "passed"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1,) * 2])
def test_ranks_may_save_before_they_end(tmp_path: Path, number: int, passed: int) -> None:
    """They are told once, even if we are told twice at once, as a rank of Slurm's is; their 75 is ours."""
    process = begin("saves", tmp_path)
    sleeping(process, tmp_path)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (75, f"saved {passed}\n")
    assert f"saved {passed}" in (tmp_path / "rank-1.log").read_text()
    assert ("they have 600 s to save" in err) == (number == signal.SIGTERM)


def test_one_rank_that_stops_stops_all(tmp_path: Path) -> None:
    code, out, _ = finish(begin("one-stops", tmp_path))
    assert (code, out) == (75, f"sleeping\nsaved {signal.SIGTERM}\n")


def test_a_save_that_fails_is_not_hidden_by_the_stop(tmp_path: Path) -> None:
    process = begin("cannot-save", tmp_path)
    sleeping(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 2
    assert "found: no room" in err


def test_a_rank_that_dies_is_told_with_its_last_step(tmp_path: Path) -> None:
    code, _, err = finish(begin("dies", tmp_path))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 2 was killed by SIGKILL" in err
    assert "at step 2, waiting for data; its log is" in err and "Traceback" not in err


def test_a_rank_that_failed_and_does_not_leave_is_ended(tmp_path: Path) -> None:
    code, _, err = finish(begin("lingers", tmp_path))
    assert code == 1, "the code is that of its error, not of its end"
    assert "the wheel came off" in err and "rank 1 of 2" in err


def test_a_rank_that_hangs_ends_all(tmp_path: Path) -> None:
    """It is named with its step and its place in the code, though rank 0 is as still as it."""
    code, _, err = finish(begin("hangs", tmp_path))
    assert code == 1
    assert "rank 1 of 2 hangs at step 2, waiting for data: it is in stuck, " in err
    assert "others wait: rank 0 at step 2, training" in err
    assert "engine.timeout = 2 s are over" in err
    assert "in stuck" in (tmp_path / "rank-1.log").read_text()
    assert "in train" in (tmp_path / "rank-0.log").read_text()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    """Before the loop there are no beats, and who waits for it ends by the group's own timeout."""
    code, _, err = finish(begin("late", tmp_path))
    assert code == 1
    assert err.startswith("rank 1 of 2 hangs before its first step: it is in stuck, ")
    assert "rank 0 gave up waiting: RuntimeError: [gloo/transport" in err and "Traceback" not in err
    assert "in stuck" in (tmp_path / "rank-1.log").read_text()


def test_a_stopped_process_ends_all(tmp_path: Path) -> None:
    code, _, err = finish(begin("frozen", tmp_path))
    assert code == 1
    assert "rank 1 of 2 hangs at step 2, waiting for data: its process is stopped (SIGSTOP)" in err


def test_a_second_signal_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    process = begin("deaf", tmp_path)
    sleeping(process, tmp_path)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    for _ in range(4):  # two that come before it looks are one
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
            break
    assert finish(process)[0] == 128 + signal.SIGINT


def test_ranks_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    process = begin("saves", tmp_path)
    sleeping(process, tmp_path)
    (guard,) = [each for each in psutil.Process(process.pid).children() if "RANK" not in each.environ()]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        guard.send_signal(number)  # as Slurm tells every process of a step
    process.kill()
    process.wait(60)
    end = time.monotonic() + 60
    while time.monotonic() < end and "saved" not in (tmp_path / "rank-1.log").read_text():
        time.sleep(0.1)
    assert "saved" in (tmp_path / "rank-1.log").read_text()
    check_nothing_left()


def test_a_closed_pipe_does_not_stop_a_run(tmp_path: Path) -> None:
    process = begin("saves", tmp_path)
    sleeping(process, tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(60) == 75
    assert "saved" in (tmp_path / "rank-0.log").read_text()
    check_nothing_left()


def test_rank_0_writes_to_a_terminal_if_we_have_one(tmp_path: Path) -> None:
    reading, writing = os.openpty()
    code = "import sys; print(sys.stdout.isatty(), end='\\n')"
    program = (
        "import sys; from pathlib import Path; from sfumato import launch\n"
        f"sys.exit(launch.run([sys.executable, '-c', {code!r}], 2, Path({str(tmp_path)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing
    )
    os.close(writing)
    assert process.wait(30) == 0
    assert os.read(reading, 1000) == b"True\r\n"
    assert (tmp_path / "rank-0.log").read_text() == "True\n"
    assert (tmp_path / "rank-1.log").read_text() == "False\n"
