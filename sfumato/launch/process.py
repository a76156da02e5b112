"""One started rank: its process, where its words go, and what becomes of both."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import psutil

from sfumato.errors import UserError
from sfumato.launch.asked import PATIENCE
from sfumato.launch.inside import ERROR_FILE, LIFELINE, LOG_FILE, PULSE_FILE, STACK_FILE
from sfumato.launch.pulse import Pulse, Stillness

ANSWER = 3.0  # seconds in which a rank writes its stacks; it does so in milliseconds


@dataclass
class Rank:
    """One started process, its files, and the threads that carry its words."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    scratch: Path
    pulse: Pulse
    copies: Sequence[threading.Thread] = ()
    still: Stillness = field(default_factory=lambda: Stillness(awake=1.0))
    killed: bool = False
    """Whether we have ended it before it ended."""

    @property
    def error(self) -> Path:
        """Where it tells why it ends."""
        return self.scratch / f"error-{self.number}.json"

    @property
    def hangs(self) -> bool:
        """Whether its beats stay away for longer than it said itself; looked at often."""
        beat = self.pulse.read()
        still = self.still.look(beat.count)
        return 0 < beat.limit < still


def start(
    command: Sequence[str], number: int, local: int, env: Mapping[str, str], log: Path, scratch: Path
) -> Rank:
    """Start rank `number`, the `local`-th of this machine, in a session of its own.

    scratch: a folder for what it tells us.
    """
    files = {ERROR_FILE: scratch / f"error-{number}.json", STACK_FILE: scratch / f"stack-{number}"}
    files |= {PULSE_FILE: scratch / f"pulse-{number}", LOG_FILE: log}
    pulse = Pulse.make(files[PULSE_FILE])
    try:
        file = log.open("ab", buffering=0)
    except OSError as error:
        found = f"it cannot be written: {error.strerror}"
        raise UserError(f"the log {log}", found, "make it yours, or set another `output`") from None
    outputs = [(-1, file.fileno())] * 2 if number else [channel(sys.stdout), channel(sys.stderr)]
    process = subprocess.Popen(
        command,
        env={**env, "RANK": str(number), "LOCAL_RANK": str(local)}
        | {name: str(path) for name, path in files.items()},
        stdin=subprocess.DEVNULL,
        stdout=outputs[0][1],
        stderr=outputs[1][1],
        pass_fds=[int(env[LIFELINE])],
        start_new_session=True,
    )
    if number:
        file.close()
        return Rank(number, process, log, scratch, pulse)
    copies = []
    for (reading, writing), ours in zip(outputs, (sys.stdout, sys.stderr), strict=True):
        os.close(writing)
        copies.append(threading.Thread(target=copy, args=(reading, ours, file), daemon=True))
        copies[-1].start()
    return Rank(number, process, log, scratch, pulse, copies)


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


def kill(rank: Rank) -> None:
    """End a rank and all that it has started."""
    rank.killed = rank.killed or rank.process.poll() is None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signal.SIGKILL)


def stacks(ranks: Sequence[Rank]) -> tuple[dict[int, str], dict[int, str]]:
    """The Python stacks of ranks that can tell them, and a word on those that cannot, by number.

    The stacks go to the ranks' logs too.
    """
    notes, found = {}, {}
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(rank.process.pid).status() == psutil.STATUS_STOPPED:
                notes[rank.number] = "its process is stopped (SIGSTOP)"
        if rank.number not in notes:
            rank.process.send_signal(signal.SIGUSR2)
    end = time.monotonic() + ANSWER
    for rank in ranks:
        file = rank.scratch / f"stack-{rank.number}"
        while rank.number not in notes and time.monotonic() < end and not has_text(file):
            time.sleep(0.05)
        time.sleep(0.05)  # it writes line by line
        if has_text(file):
            found[rank.number] = text = file.read_text(encoding="utf-8", errors="replace")
            with rank.log.open("a", encoding="utf-8") as log:
                log.write(f"rank {rank.number} hangs, or waits for one that does:\n{text}")
    return found, notes


def has_text(file: Path) -> bool:
    """Whether a file is there and not empty."""
    with contextlib.suppress(OSError):
        return file.stat().st_size > 0
    return False


@contextlib.contextmanager
def guarded() -> Iterator[Callable[[Rank], None]]:
    """A process that ends what ranks leave behind if this one is killed; it is told of each rank."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(PATIENCE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None, "it has a pipe"

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(guard.stdin.fileno(), f"{text}\n".encode())  # type: ignore[union-attr]

    try:
        yield lambda rank: tell(str(rank.process.pid))
    finally:
        tell("done")
        guard.stdin.close()
        try:
            guard.wait(5)
        except subprocess.TimeoutExpired:  # such as one that was stopped
            guard.kill()
            guard.wait()


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
