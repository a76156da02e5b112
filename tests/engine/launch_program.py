"""A supervisor and its ranks for test_launch.py: `RANKS CASE LOGS [NODE NODES PORT LIMIT [MASTER]]`.

Its ranks run `rank CASE`. Ranks that others start run `alone CASE LOGS`; `hosts FILE CASE LOGS` starts
machines with `node CASE LOGS`.
"""

import ctypes
import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sfumato import launch, place
from sfumato.errors import UserError
from sfumato.launch import alone, supervise


def barrier() -> None:
    """Join a real gloo group over the supervisor's port and wait there, for ever if others do not come."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    dist.barrier()


def meet(rank: int) -> socket.socket:
    """Rank 0 listens where MASTER_PORT says, and rank 1 finds it there: a group of two without torch."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.create_server(("", where[1])) as server:
            server.settimeout(60)
            return server.accept()[0]
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(where, timeout=60)
        except OSError:
            assert time.monotonic() < end, "rank 0 does not listen"
            time.sleep(0.05)


def sleep_for_ever(ready: Callable[[], object] = int) -> None:
    """ready: called once all that is to come before the sleep has happened."""
    # A loader worker stands for everything that a rank starts and that must end with it.
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", deaf, __file__])
    print("sleeping", flush=True)
    ready()
    time.sleep(600)


def save(number: int) -> None:
    time.sleep(0.5)
    print("saved", number, flush=True)
    os._exit(75)


def fail_to_save(rank: int) -> None:
    if rank == 1:
        raise UserError("to save", "no room", "make some")
    os._exit(75)


def stuck() -> None:
    time.sleep(600)


def train(case: str, rank: int) -> None:
    """Beat as the loop does; rank 1 ends its third step in some way, and rank 0 waits for it."""
    from sfumato.watch import Watch

    ranks: Any = SimpleNamespace(rank=rank, world=2)  # the real one would import torch
    with Watch(ranks, 600 if case == "dies" else 2) as watch:
        for step in range(3):
            watch.beat(step, "waiting for data")
            if step == 2 and rank == 1:
                if case == "hangs":
                    stuck()
                os.kill(os.getpid(), signal.SIGSTOP if case == "frozen" else signal.SIGKILL)
            watch.beat(step, "training")
        time.sleep(600)


def work(case: str, rank: int) -> int:
    """What one rank of a case does; every case has rank 1 as the odd one."""
    if case == "fine":
        meet(rank).close()
        print(f"rank {rank} OMP {os.environ['OMP_NUM_THREADS']} {os.environ.get('MALLOC_TOP_PAD_')}")
    elif case == "exit-7" and rank == 1:
        return 7
    elif case == "user-error":
        raise UserError("a thing", "another", "choose")
    elif case == "defect":
        barrier()
        if rank == 1:
            raise RuntimeError("the wheel came off")
        barrier()
    elif case == "breaks":
        other = meet(rank)
        if rank == 1:
            raise RuntimeError("the wheel came off")
        other.recv(1)
        raise RuntimeError("Connection closed by peer")  # as gloo says it
    elif case == "late":
        meet(rank)
        if rank == 1:
            stuck()
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms")
    elif case == "segfault" and rank == 1:
        ctypes.string_at(0)
    elif case == "saves" or case == "one-stops" and rank == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: save(number))
        sleep_for_ever(int if case == "saves" else lambda: meet(rank))
    elif case == "one-stops":
        meet(rank)
        return 75
    elif case == "cannot-save":
        signal.signal(signal.SIGTERM, lambda *_: fail_to_save(rank))
        sleep_for_ever()
    elif case in ("hangs", "frozen", "dies"):
        train(case, rank)
    elif case == "lingers" and rank == 1:
        launch.report(RuntimeError("the wheel came off"))
        stuck()  # as NCCL's teardown may be
    elif case == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleep_for_ever()
    else:
        sleep_for_ever()
    return 0


def wait_for_all(logs: Path, world: int, text: str) -> None:
    """Until every rank has written a text into its log: torchrun ends the others when one of them leaves."""
    end = time.monotonic() + 120
    files = [logs / f"rank-{rank}.log" for rank in range(world)]
    while not all(file.exists() and text in file.read_text() for file in files):
        assert time.monotonic() < end, f"not every rank has said {text!r}"
        time.sleep(0.05)


def guarded(work: Callable[[], int]) -> int:
    """As the command line does it, which a process with few imports goes without."""
    try:
        return work()
    except UserError as error:
        if not launch.report(error):
            print(error, file=sys.stderr)
        return 2
    except Exception as error:
        if launch.report(error):
            return 1
        raise


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        launch.follow_supervisor()
        sys.exit(guarded(lambda: work(sys.argv[2], int(os.environ["RANK"]))))
    if sys.argv[1] == "alone":  # a rank of another launcher
        found = place.adopt(os.environ)
        assert found is not None, "nobody has made this a rank"
        number = found.rank
        alone.log_here(number, Path(sys.argv[3]))
        code = guarded(lambda: work(sys.argv[2], number))
        if sys.argv[2] == "user-error":
            wait_for_all(Path(sys.argv[3]), found.world, "asked: a thing")
        sys.exit(code)
    if sys.argv[1] == "hosts":
        from sfumato.launch import hosts

        words = [sys.executable, __file__, "node", *sys.argv[3:]]
        sys.exit(guarded(lambda: hosts.run(Path(sys.argv[2]), words, None)))
    if sys.argv[1] == "node":  # what DeepSpeed's launcher has started for a hostfile
        from sfumato.launch import become

        options = Namespace(gpus=None, hostfile=None)
        here = become.where(options, os.environ)
        command = [sys.executable, __file__, "rank", sys.argv[2]]
        sys.exit(launch.run(command, options.gpus, Path(sys.argv[3]), at=here))
    count, case, logs, *node = sys.argv[1:]
    supervise.LEAVING = 1.0 if case == "lingers" else supervise.LEAVING
    master = node[4] if len(node) == 5 else "127.0.0.1"
    at = launch.At(int(node[0]), int(node[1]), master, int(node[2]), float(node[3])) if node else None
    command = [sys.executable, __file__, "rank", case]
    facts = {"the case": case.removesuffix("-here")}
    sys.exit(guarded(lambda: launch.run(command, int(count), Path(logs), at=at, facts=facts)))
