"""What a rank tells the supervisor that has started it, and hears from it."""

import faulthandler
import json
import os
import signal
import threading
import time
import traceback
from pathlib import Path

from sfumato.errors import Lost, UserError
from sfumato.launch.pulse import Pulse

ERROR_FILE = "SFUMATO_ERROR_FILE"
PULSE_FILE = "SFUMATO_PULSE_FILE"
STACK_FILE = "SFUMATO_STACK_FILE"
LIFELINE = "SFUMATO_LIFELINE"
NETWORK = ("DistBackendError", "DistNetworkError")


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
    os.kill(os.getpid(), signal.SIGTERM)


def pulse_here() -> Pulse | None:
    """Where this rank writes its beats for the supervisor; None where there is none."""
    return Pulse(Path(os.environ[PULSE_FILE])) if supervised() else None


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank hung up, or did not come."""
    if isinstance(error, UserError | Lost):
        return False
    text = str(error)
    return type(error).__name__ in NETWORK or "gloo/transport" in text or "Connection closed by peer" in text


def report(error: BaseException) -> bool:
    """In a rank: tell the supervisor why it ends. False where there is none, so that the caller shows it."""
    if not supervised():
        return False
    plain = isinstance(error, UserError | Lost)
    text = str(error) if plain else "".join(traceback.format_exception(error)).rstrip()
    code = 2 if isinstance(error, UserError) else 1
    said = {"text": text, "when": time.time(), "echo": is_echo(error), "code": code}
    path = Path(os.environ[ERROR_FILE])
    try:
        path.with_suffix(".part").write_text(json.dumps(said), encoding="utf-8")
        path.with_suffix(".part").rename(path)
    except OSError:
        return False
    return True
