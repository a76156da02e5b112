"""Start ranks on this machine and see them end together.

    code = run([sys.executable, "-m", "sfumato", "train", "my.toml"], 8, Path("runs/my/logs"))

The supervisor is our own, not torch.distributed.elastic: that one takes seconds to import, reports one
crash in three places, and waits half a minute for ranks that hang in a collective. Here the parent imports
no torch, every rank is the leader of its own session (so that its loader workers end with it, and Ctrl-C
reaches it once, through us), and of all that the ranks say when one breaks only the cause is shown.

Rank 0's output goes to our own streams and to its log, the other ranks' to their logs only. A rank
tells its error through a file (`report`), because only the supervisor knows which error came first.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from sfumato import tuning
from sfumato.errors import UserError

ERROR_FILE = "SFUMATO_ERROR_FILE"
LIFELINE = "SFUMATO_LIFELINE"
POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 1.0  # seconds from a rank's failure to the others' end, in which one may still tell the true cause
PATIENCE = 300.0  # seconds from the user's signal to SIGKILL: a checkpoint may be being written
TAIL = 20  # lines of a log that are shown for a rank that died without telling why


@dataclass
class Rank:
    """One started process, where its words go, and the threads that carry them."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    errors: Path
    copies: Sequence[threading.Thread] = ()


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: its exit code (negative: a signal), when (time.time), and what it told.

    `echo`: it only says that another rank hung up. `text` is None where it told nothing.
    """

    rank: Rank
    code: int
    when: float
    text: str | None = None
    echo: bool = False


def run(command: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `command` as ranks 0 .. ranks - 1 of this machine until all have ended; the shell's exit code.

    logs: folder for rank-N.log; a log that is there is continued.
    One rank's failure ends the others; its error is shown and its exit code kept (128 + n for signal n).
    SIGINT, SIGTERM and SIGHUP reach the ranks as SIGTERM, a second one ends them at once; then it is 128 + n.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {logs}", f"it cannot be made: {error.strerror}", "set another `output`"
        ) from None
    with (
        tempfile.TemporaryDirectory(prefix="sfumato-") as scratch,
        signals() as asked,
        held_port() as port,
        pipe() as lifeline,
    ):
        env = {**os.environ, **tuning.missing(os.environ, ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), LIFELINE: str(lifeline)}
        started: list[Rank] = []
        try:
            for number in range(ranks):
                errors = Path(scratch) / f"rank-{number}.json"
                place = {"RANK": str(number), "LOCAL_RANK": str(number), ERROR_FILE: str(errors)}
                started.append(start(command, number, env | place, logs / f"rank-{number}.log", errors))
            failures = watch(started, asked)
        finally:
            for rank in started:
                kill(rank)
                rank.process.wait()
                for thread in rank.copies:
                    thread.join(1)
    if asked:
        return 128 + asked[0]
    if not failures:
        return 0
    cause = min(failures, key=lambda failure: (failure.echo, failure.when))
    print(told(cause, ranks), file=sys.stderr, flush=True)
    return cause.code if cause.code > 0 else 128 - cause.code


def start(command: Sequence[str], number: int, env: Mapping[str, str], log: Path, errors: Path) -> Rank:
    """Start one rank in a session of its own."""
    file = log.open("ab", buffering=0)
    outputs = [(-1, file.fileno())] * 2 if number else [channel(sys.stdout), channel(sys.stderr)]
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=outputs[0][1],
        stderr=outputs[1][1],
        pass_fds=[int(env[LIFELINE])],
        start_new_session=True,
    )
    if number:
        file.close()
        return Rank(number, process, log, errors)
    copies = []
    for (reading, writing), ours in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        os.close(writing)
        copies.append(threading.Thread(target=copy, args=(reading, ours, file), daemon=True))
        copies[-1].start()
    return Rank(number, process, log, errors, copies)


def channel(ours: TextIO) -> tuple[int, int]:
    """Where to read what rank 0 writes, and where it writes: a terminal if ours is one, else a pipe."""
    if not ours.isatty():
        return os.pipe()
    reading, writing = os.openpty()
    with contextlib.suppress(termios.error):
        termios.tcsetwinsize(writing, termios.tcgetwinsize(ours.fileno()))
        # Without this the terminal would turn each "\n" into "\r\n" twice, and the log's lines with it.
        modes = termios.tcgetattr(writing)
        modes[1] &= ~termios.OPOST
        termios.tcsetattr(writing, termios.TCSANOW, modes)
    return reading, writing


def copy(reading: int, ours: TextIO, log: BinaryIO) -> None:
    """Hand on what rank 0 says until it ends; a closed terminal or pipe of ours must not block the rank."""
    heard = True
    with contextlib.suppress(OSError):  # a pseudo-terminal ends with an OSError
        while content := os.read(reading, 65536):
            log.write(content)
            try:
                if heard:
                    ours.buffer.write(content)
                    ours.buffer.flush()
            except (OSError, ValueError):
                heard = False
    os.close(reading)


def watch(ranks: Sequence[Rank], asked: Sequence[int]) -> list[Failure]:
    """Wait until all ranks have ended. A failure, or a signal in `asked`, ends those that are left."""
    failures: list[Failure] = []
    left = list(ranks)
    kill_at = math.inf
    passed_on = False
    while left:
        now = time.time()
        for rank in [rank for rank in left if rank.process.poll() is not None]:
            left.remove(rank)
            kill(rank)  # its loader workers, which would wait for ever
            if rank.process.returncode and not asked:
                failures.append(failure(rank))
                kill_at = min(kill_at, now + SETTLE)
        if asked and not passed_on:
            passed_on = True
            kill_at = min(kill_at, now + PATIENCE)
            for rank in left:
                rank.process.terminate()
        if now >= kill_at or len(asked) > 1:
            for rank in left:
                kill(rank)
        time.sleep(POLL)
    return failures


def kill(rank: Rank) -> None:
    """End a rank and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signal.SIGKILL)


def failure(rank: Rank) -> Failure:
    """What an ended rank told, which also goes to its log."""
    code = rank.process.returncode
    try:
        said = json.loads(rank.errors.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Failure(rank, code, time.time())
    with rank.log.open("a", encoding="utf-8") as log:
        log.write(said["text"] + "\n")
    return Failure(rank, code, said["when"], said["text"], said["echo"])


def told(cause: Failure, ranks: int) -> str:
    """What the user sees of a failure."""
    number, log = cause.rank.number, cause.rank.log
    if cause.text is not None:
        # A mistake of the user's is the same on every rank; a defect has a place.
        return (
            cause.text
            if cause.code == 2
            else f"{cause.text}\nrank {number} of {ranks} failed; its log is {log}"
        )
    if cause.code >= 0:
        how = f"ended with exit code {cause.code}"
    else:
        how = f"was killed by {signal.Signals(-cause.code).name}"
        how += " (often: the machine was out of memory)" if cause.code == -signal.SIGKILL else ""
    # Rank 0's words were seen as they came, and SIGKILL leaves no time for any.
    silent = number == 0 or cause.code == -signal.SIGKILL
    lines = [] if silent else log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([*lines, f"rank {number} of {ranks} {how}; its log is {log}"])


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """The list of the signals that asked for an end so far."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) == 1:
            with contextlib.suppress(OSError):
                os.write(2, b"\nending all ranks; once more ends them without saving\n")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # A hang-up that nohup has taken away stays away.
    mine = [number for number in before if number != signal.SIGHUP or before[number] != signal.SIG_IGN]
    for number in mine:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free port of this machine that nobody else is given meanwhile; rank 0 can listen on it."""
    with socket.socket() as holder:
        # Two sockets with this option may be bound to one port as long as only one of them listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@contextlib.contextmanager
def pipe() -> Iterator[int]:
    """The reading end of a pipe whose writing end closes with this block, or with this process."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb"), os.fdopen(writing, "wb"):
        yield reading


def supervised() -> bool:
    """Whether this process is a rank that `run` has started."""
    return ERROR_FILE in os.environ


def follow_supervisor() -> None:
    """In a rank: get a SIGTERM when the supervisor dies, however it dies."""
    faulthandler.enable()
    threading.Thread(target=wait_for_its_end, args=(int(os.environ[LIFELINE]),), daemon=True).start()


def wait_for_its_end(lifeline: int) -> None:
    """Read a pipe that nobody writes to: it ends when its other end is closed, so with the supervisor."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def report(error: BaseException) -> bool:
    """In a rank: tell the supervisor why it ends. False where there is none, so that the caller shows it."""
    if not supervised():
        return False
    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    network = type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in text
    said = {"text": text, "when": time.time(), "echo": network and not isinstance(error, UserError)}
    path = Path(os.environ[ERROR_FILE])
    with contextlib.suppress(OSError):
        path.with_suffix(".part").write_text(json.dumps(said), encoding="utf-8")
        path.with_suffix(".part").rename(path)
    return True
