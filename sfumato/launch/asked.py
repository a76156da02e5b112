"""The signals that ask a supervisor for an end."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

PATIENCE = 600.0  # seconds from the user's signal to SIGKILL: a checkpoint may be being written
REPEATED = 0.5  # seconds in which one wish may come twice, as from `timeout`, which tells its group as well


@dataclass
class Asked:
    """The signals that asked us for an end so far."""

    warnings: int = 0
    """SIGUSR1, passed on as it is; it may come often."""
    first: int | None = None
    again: int | None = None
    """The first other signal, and one that came when that was not just repeated."""
    at: float = math.inf
    noted: list[int] = field(default_factory=list)
    """All of these, in their order."""

    def note(self, number: int) -> None:
        """Count one, and say what it does."""
        text = ""
        if number == signal.SIGUSR1:
            self.warnings += 1
            text = "SIGUSR1: all ranks are asked to save and stop"
        elif self.first is None:
            self.first, self.at = number, time.monotonic()
            text = f"stopping all ranks; they have {PATIENCE:g} s to save, and once more stops them at once"
        elif time.monotonic() > self.at + REPEATED:
            self.again = number
        else:
            return
        self.noted.append(number)
        if text:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())

    @property
    def any(self) -> bool:
        """Whether one came at all."""
        return bool(self.noted)


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Note the signals that ask for an end."""
    asked = Asked()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    # A hang-up that nohup has taken away stays away.
    mine = [number for number in before if number != signal.SIGHUP or before[number] != signal.SIG_IGN]
    for number in mine:
        signal.signal(number, lambda number, frame: asked.note(number))
    try:
        yield asked
    finally:
        for number in mine:
            signal.signal(number, before[number])
