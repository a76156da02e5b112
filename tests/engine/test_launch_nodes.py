"""Several supervisors on one machine, as on several: they end together and say the same.

How they meet is in tests/unit/test_meet.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.ranks import free_port
from tests.engine.test_launch import MARK, PROGRAM, ROOT, check_nothing_left, ours


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for process in ours():
        process.kill()


def begin(case: str, logs: Path, number: int, port: int, nodes: int = 2, limit: float = 60):  # type: ignore[no-untyped-def]
    """The supervisor of one rank of a case, as node `number`."""
    free = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in free}
    words = ["1", case, str(logs), str(number), str(nodes), str(port), str(limit)]
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *words],
        env=env | {"PYTHONPATH": str(ROOT), MARK: str(os.getpid())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(case: str, logs: Path, limit: float = 60) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [begin(case, logs, number, port, limit=limit) for number in range(2)]


def ends(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Code, stdout and stderr of each; nothing is left of them."""
    told = []
    for process in processes:
        out, error = process.communicate(timeout=timeout)
        told.append((process.returncode, out, error))
    check_nothing_left()
    return told


def at_work(logs: Path, *ranks: int) -> None:
    """Wait until the ranks sleep."""
    end = time.monotonic() + 120
    for rank in ranks:
        log = logs / f"rank-{rank}.log"
        while not (log.exists() and "sleeping" in log.read_text()):
            assert time.monotonic() < end, f"rank {rank} does not come to work"
            time.sleep(0.05)


def test_two_nodes_are_one_world(tmp_path: Path) -> None:
    (code, out, error), other = ends(pair("fine", tmp_path))
    assert (code, error) == (0, "") and out.startswith("rank 0 OMP ")
    assert other == (0, "", ""), "only rank 0 writes to the console"
    assert (tmp_path / "rank-1.log").read_text() == out.replace("rank 0", "rank 1")


def test_the_cause_is_told_once_and_its_code_is_everybodys(tmp_path: Path) -> None:
    """Rank 1, on node 1, breaks; rank 0's error, that the other has hung up, is an echo."""
    (code, _, whole), (other, _, brief) = ends(pair("breaks", tmp_path))
    assert (code, other) == (1, 1)
    assert whole.count("Traceback") == 1 and whole.count("the wheel came off") == 2
    name = socket.gethostname()
    line = f"rank 1 of 2 failed; its log is {tmp_path / 'rank-1.log'} on {name}"
    assert line in whole and brief == f"{line}; node 0 tells the rest\n"


def test_a_signal_to_one_node_has_all_save(tmp_path: Path) -> None:
    processes = pair("saves", tmp_path)
    at_work(tmp_path, 0, 1)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, *_ in ends(processes)] == [75, 75]
    assert all("saved 15" in (tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))


def test_a_killed_supervisor_is_named_and_all_ranks_save(tmp_path: Path) -> None:
    """Nothing is left of either, and no rank has been cut short."""
    processes = pair("saves", tmp_path)
    at_work(tmp_path, 0, 1)
    processes[1].kill()
    (code, _, error), _ = ends(processes)
    assert code == 75
    assert "rank 1 of 2 is lost: node 1 (" in error and "hung up: its `sfumato` was killed" in error
    assert all("saved 15" in (tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))


def test_node_0_killed_ends_the_others(tmp_path: Path) -> None:
    processes = pair("saves", tmp_path)
    at_work(tmp_path, 0, 1)
    processes[0].kill()
    _, (code, _, error) = ends(processes)
    assert code == 75 and "rank 0 of 2 is lost: node 0 (" in error


def test_a_hang_is_blamed_on_the_right_node(tmp_path: Path) -> None:
    (code, _, error), (other, _, brief) = ends(pair("hangs", tmp_path))
    assert (code, other) == (1, 1)
    assert "rank 1 of 2 hangs at step 2, waiting for data: it is in stuck, " in error
    assert "others wait: rank 0 at step 2, training" in error
    assert brief == error


def test_a_machine_that_sleeps_is_lost(tmp_path: Path) -> None:
    """A stopped supervisor says nothing, as one behind a cut cable; its ranks then end with it."""
    processes = pair("saves", tmp_path, limit=4)
    at_work(tmp_path, 0, 1)
    processes[1].send_signal(signal.SIGSTOP)
    _, error = processes[0].communicate(timeout=120)
    assert processes[0].returncode in (1, 75), "its own ranks may have saved"
    assert "rank 1 of 2 is lost: node 1 (" in error and "gave no sign of life for 4 s" in error
    processes[1].send_signal(signal.SIGCONT)
    assert ends(processes[1:])[0][0] == processes[0].returncode


def test_a_signal_ends_the_waiting(tmp_path: Path) -> None:
    port = free_port()
    process = begin("fine", tmp_path, 0, port)
    end = time.monotonic() + 120
    while True:  # until it listens; a stranger does no harm
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < end, "node 0 does not listen"
            time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    ((code, _, error),) = ends([process])
    assert code == 75 and "stopped before all nodes had come" in error
