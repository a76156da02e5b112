"""What a rank tells the supervisor that has started it, or else the user, and what it hears."""

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from pathlib import Path

from sfumato import place
from sfumato.errors import Lost, UserError
from sfumato.launch import alone
from sfumato.launch.pulse import Pulse

ERROR_FILE = "SFUMATO_ERROR_FILE"
PULSE_FILE = "SFUMATO_PULSE_FILE"
STACK_FILE = "SFUMATO_STACK_FILE"
LOG_FILE = "SFUMATO_LOG_FILE"
LIFELINE = "SFUMATO_LIFELINE"
NETWORK = ("DistBackendError", "DistNetworkError", "DistStoreError")
HUNG_UP = ("gloo/transport", "Connection closed by peer", "failed to pass monitoredBarrier")
"""What an error says that only tells of another rank, which left or did not come."""


def supervised() -> bool:
    """Whether this process is a rank that `run` has started."""
    return ERROR_FILE in os.environ


def follow_supervisor() -> None:
    """In a rank: get a SIGTERM when the supervisor dies, however it dies, and tell it the stacks if asked."""
    faulthandler.enable()
    # Written by a signal's handler in C, so also while the main thread never comes back to Python.
    stacks = open(os.environ[STACK_FILE], "w")  # noqa: SIM115  open as long as this process lives
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)
    threading.Thread(target=wait_for_its_end, args=(int(os.environ[LIFELINE]),), daemon=True).start()


def wait_for_its_end(lifeline: int) -> None:
    """Read a pipe that nobody writes to: it ends when its other end is closed, so with the supervisor."""
    os.read(lifeline, 1)
    # Nobody reads what rank 0 says from here on; a broken pipe must not keep it from saving.
    with contextlib.suppress(OSError):
        log = os.open(os.environ[LOG_FILE], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    os.kill(os.getpid(), signal.SIGTERM)


def pulse_here() -> Pulse | None:
    """Where this rank writes its beats for the supervisor; None where there is none."""
    return Pulse(Path(os.environ[PULSE_FILE])) if supervised() else None


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank hung up, or did not come."""
    if isinstance(error, UserError) and isinstance(error.__cause__, Exception):
        return is_echo(error.__cause__)  # as a checkpoint's that the others did not come to
    if isinstance(error, UserError | Lost):
        return False
    text = str(error)
    return type(error).__name__ in NETWORK or any(words in text for words in HUNG_UP)


def report(error: BaseException) -> bool:
    """In a rank: tell why it ends. False where this is no rank, so that the caller shows it.

    The supervisor is told; without one the rank that comes first shows its error, and the others only log it.
    """
    plain = isinstance(error, UserError | Lost)
    text = str(error) if plain else "".join(traceback.format_exception(error)).rstrip()
    if not supervised():
        told = alone.tell(text, echo=isinstance(error, Lost) or is_echo(error))
        # A faulty config is met before there are logs, by all ranks alike: one of each machine says so.
        return told or (isinstance(error, UserError) and place.is_further(os.environ))
    code = 2 if isinstance(error, UserError) and not is_echo(error) else 1
    said = {"text": text, "when": time.time(), "echo": is_echo(error), "code": code}
    path = Path(os.environ[ERROR_FILE])
    try:
        path.with_suffix(".part").write_text(json.dumps(said), encoding="utf-8")
        path.with_suffix(".part").rename(path)
    except OSError:
        return False
    return True


def say(text: str, first: bool = True) -> None:
    """Write to the user's console, also from a rank whose output goes to its log, and from any thread.

    first: whether it is this rank that tells; else only its log hears it.
    """
    alone.say(text, first)
