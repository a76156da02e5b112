"""A rank that torchrun, deepspeed, mpirun or srun has started: its log, and who tells the user of an error.

Every rank writes a log of its own. Only rank 0 also writes to the console. Of the errors that the ranks end
with only the first that is a cause is shown there: who comes first takes a file in the folder of the logs.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from sfumato.errors import UserError

TOLD = ".told"
"""The file in the folder of the logs which the rank that shows its error makes."""
ECHO = 2.0
"""Seconds in which the rank that failed first may tell the cause, before an echo of that is shown."""
APART = 60.0
"""Seconds between the ranks of one start at most, where whoever starts them has been there for longer."""


@dataclass
class Log:
    """This rank's log."""

    rank: int
    file: TextIO
    console: int
    """What stderr was before."""


LOGS: list[Log] = []
"""This process's, if it has one."""


class Both:
    """A stream whose text also goes to a log."""

    def __init__(self, stream: Any, log: TextIO) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write to both; the console comes first."""
        count = self._stream.write(text)
        with contextlib.suppress(OSError, ValueError):
            self._log.write(text)
        return int(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def log_here(rank: int, logs: Path) -> None:
    """Have this rank write its log from here on; on others than rank 0 nothing else hears what it says.

    Raises UserError where the folder cannot be made.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        file = (logs / f"rank-{rank}.log").open("a", encoding="utf-8", buffering=1)
        remove_old(logs / TOLD)
    except OSError as error:
        raise UserError(
            f"the logs of the ranks in {logs}", f"{error.strerror}", "set another `output`"
        ) from None
    LOGS.append(Log(rank, file, os.dup(2)))
    if rank:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    else:
        # Not a pipe with a process behind it: that one would outlive a rank that dies.
        sys.stdout, sys.stderr = Both(sys.stdout, file), Both(sys.stderr, file)


def remove_old(mark: Path) -> None:
    """Remove the mark of an earlier start; a rank that has failed already may have made this start's."""
    with contextlib.suppress(FileNotFoundError):
        made, begun = mark.stat().st_mtime, psutil.Process().create_time() - APART
        with contextlib.suppress(psutil.Error):
            begun = max(begun, psutil.Process(os.getppid()).create_time())  # the launcher's
        if made < begun:
            mark.unlink()


def say(text: str, first: bool) -> None:
    """Write to the console if `first`, and to the log, whatever state the streams of Python are in."""
    content = f"{text}\n".encode(errors="replace")
    targets = [log.file.fileno() for log in LOGS]
    if first or not LOGS:
        targets.insert(0, LOGS[-1].console if LOGS else 2)
    for target in targets:
        with contextlib.suppress(OSError):
            os.write(target, content)


def tell(text: str, echo: bool) -> bool:
    """Tell why this rank ends; False if it has no log, so is no rank of several.

    echo: it is, or may be, only the consequence of another rank's end, which then comes first.
    """
    if not LOGS:
        return False
    log = LOGS[-1]
    mark = Path(log.file.name).with_name(TOLD)
    if echo:
        time.sleep(ECHO)
    last = f"rank {log.rank} failed; its log is {log.file.name}"
    say(text if text.startswith("asked:") else f"{text}\n{last}", claim(mark))
    return True


def claim(mark: Path) -> bool:
    """Whether this rank is the first that takes a file; where that cannot be told, it is."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
