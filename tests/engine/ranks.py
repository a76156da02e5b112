"""Run a function on several real gloo ranks, each its own process, and get what each of them returned.

    losses = run_ranks(train_two_steps, 2, config, timeout=60)      # [rank 0's value, rank 1's value]

`function` must be importable (defined at the top of a module); arguments and values travel by pickle.
In the ranks RANK, LOCAL_RANK and WORLD_SIZE are set and the process group exists, unless `init=False`.
"""

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A fork server imports these once; a rank then starts in milliseconds and still inherits nothing of the test.
PRELOAD = [
    *("sfumato.train", "sfumato.models.sd", "sfumato.models.sdxl", "peft", "tests.engine.ranks"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported late, with all of inductor
    "tests.engine.warm",  # the last
]
GRACE = 1.0  # seconds in which the rank that failed first may still report it


class RankError(RuntimeError):
    """A rank raised, died or hung; the text holds its traceback, or the stack that it hung in.

    `rank` is the first rank that failed, `error` what it raised (None if it died or hung).
    """

    def __init__(self, rank: int, text: str, error: BaseException | None = None) -> None:
        self.rank, self.error = rank, error
        super().__init__(text)


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    init: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` on ranks 0 .. world - 1 at once; their values, in order of rank.

    Raises RankError as soon as one rank fails, or after `timeout` seconds; no process is left either way.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = fork_server()
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        ranks: list[Any] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                # A call that cannot be pickled fails here, in the test, with a plain message.
                call = pickle.dumps((function, args, kwargs))
                place = (rank, world, port, scratch, timeout, init)
                process = context.Process(target=_rank, args=(theirs, call, place), name=f"rank {rank}")
                process.start()
                theirs.close()
                ranks.append(process)
                pipes.append(ours)
            return _collect(
                ranks, pipes, timeout, Path(scratch), getattr(function, "__name__", str(function))
            )
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
            for pipe in pipes:
                pipe.close()


def fork_server() -> Any:
    """Starts processes that have the libraries at hand, and nothing else of ours."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _collect(
    ranks: list[Any], pipes: list[Connection], timeout: float, scratch: Path, name: str
) -> list[Any]:
    """Wait for every rank's value; the first failure ends the wait."""
    values: dict[int, Any] = {}
    failures: dict[int, tuple[float, str, BaseException | None]] = {}
    end = time.monotonic() + timeout
    while len(values) + len(failures) < len(ranks):
        waiting = [rank for rank in range(len(ranks)) if rank not in values and rank not in failures]
        ready = wait([pipes[rank] for rank in waiting], max(0.0, end - time.monotonic()))
        if not ready:
            break
        for rank in waiting:
            if pipes[rank] in ready:
                _take(rank, ranks[rank], pipes[rank], values, failures)
        if failures:
            end = min(end, time.monotonic() + GRACE)
    if failures:
        rank = min(failures, key=lambda rank: (_is_echo(failures[rank][2]), failures[rank][0]))
        raise RankError(
            rank, f"rank {rank} of {len(ranks)} failed in {name}:\n{failures[rank][1]}", failures[rank][2]
        )
    hung = [rank for rank in range(len(ranks)) if rank not in values]
    if hung:
        stacks = "\n".join(f"--- rank {rank} is in:\n{_stack(ranks[rank], scratch, rank)}" for rank in hung)
        done = f"; finished: {sorted(values)}" if values else ""
        raise RankError(hung[0], f"{name} hung: ranks {hung} had no value after {timeout} s{done}\n{stacks}")
    return [values[rank] for rank in range(len(ranks))]


def _take(
    rank: int, process: Any, pipe: Connection, values: dict[int, Any], failures: dict[int, Any]
) -> None:
    try:
        kind, when, content, text = pipe.recv()
    except (EOFError, ConnectionError):
        process.join(5)
        failures[rank] = (time.time(), f"it died without a word, exit code {process.exitcode}", None)
        return
    if kind == "value":
        values[rank] = pickle.loads(content)
    else:
        failures[rank] = (when, text, pickle.loads(content) if content else None)


def _is_echo(error: BaseException | None) -> bool:
    """Whether a rank only says that another one hung up on it."""
    return isinstance(error, RuntimeError) and "gloo" in str(error) and "onnection" in str(error)


def _stack(process: Any, scratch: Path, rank: int) -> str:
    """Ask a hanging rank for its Python stacks."""
    file = scratch / f"stack-{rank}"
    try:
        os.kill(process.pid, signal.SIGUSR2)
    except ProcessLookupError:
        return "(the process is gone)"
    end = time.monotonic() + 2
    while time.monotonic() < end and not (file.exists() and file.stat().st_size):
        time.sleep(0.05)
    time.sleep(0.1)
    return file.read_text() if file.exists() else "(no stack: it had not started yet)"


def _rank(pipe: Connection, call: bytes, place: tuple[int, int, int, str, float, bool]) -> None:
    """What one rank does: take its place, call, send the value or the error."""
    rank, world, port, scratch, timeout, init = place
    as_users_start_it()
    with open(Path(scratch) / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
        threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            message = (
                "value",
                time.time(),
                pickle.dumps(_call(call, rank, world, scratch, timeout, init)),
                "",
            )
        except BaseException as error:
            message = ("error", time.time(), _pickled(error), traceback.format_exc())
        pipe.send(message)
    # A rank that waits for a failed one in a destructor would only delay the test.
    os._exit(0)


def as_users_start_it() -> None:
    """In a process of the fork server: start others as a process does that was not made by one."""
    multiprocessing.set_start_method(None, force=True)


def _call(call: bytes, rank: int, world: int, scratch: str, timeout: float, init: bool) -> Any:
    import torch

    torch.set_num_threads(1)
    function, args, kwargs = pickle.loads(call)
    if init:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/group",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout + 60),
        )
    value = function(*args, **kwargs)
    if init and torch.distributed.is_initialized():
        # Nobody leaves while another still reads from it.
        torch.distributed.barrier()
    return value


def _end_with_parent(pipe: Connection) -> None:
    """End this rank when the test process is gone, however it went."""
    wait([pipe])
    os._exit(1)


def _pickled(error: BaseException) -> bytes:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
        return content
    except Exception:
        return b""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
