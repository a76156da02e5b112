"""Start ranks on this machine and see them end together.

    code = run([sys.executable, "-m", "sfumato", "train", "my.toml"], 8, Path("runs/my/logs"))

The supervisor is our own, not torch.distributed.elastic: that one takes seconds to import, reports one
crash in three places, and waits half a minute for ranks that hang in a collective. Here the parent imports
no torch, every rank is the leader of its own session (so that its loader workers end with it, and Ctrl-C
reaches it once, through us), and of all that the ranks say when one breaks only the cause is shown.

Rank 0's output goes to our own streams and to its log, the other ranks' to their logs only. A rank
tells its error through a file (`report`), because only the supervisor knows which error came first, and its
steps through memory that both see (`pulse_here`), so that one that dies or hangs is told with its last step.
"""

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato import tuning
from sfumato.errors import CONTINUE, UserError
from sfumato.launch.inside import (
    ERROR_FILE,
    LIFELINE,
    follow_supervisor,
    is_echo,
    pulse_here,
    report,
    supervised,
)
from sfumato.launch.process import Rank, held_port, kill, pipe, stacks, start
from sfumato.launch.pulse import hang

__all__ = ["ERROR_FILE", "follow_supervisor", "is_echo", "pulse_here", "report", "run", "supervised"]


POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 1.0  # seconds from a rank's failure to the others' end, in which one may still tell the true cause
LEAVING = 20.0  # seconds from a rank's word that it failed to its end; a library's farewell may hang
PATIENCE = 600.0  # seconds from the user's signal to SIGKILL: a checkpoint may be being written
REPEATED = 0.5  # seconds in which one wish may come twice, as from `timeout`, which tells its group as well
TAIL = 20  # lines of a log that are shown for a rank that died without telling why


@dataclass(frozen=True)
class Ending:
    """How a rank ended by itself: its exit code (negative: a signal), when (time.time), and what it told.

    `echo`: it only says that another rank hung up. `text` is None where it told nothing.
    """

    rank: Rank
    code: int
    when: float
    text: str | None = None
    echo: bool = False


@dataclass
class Asked:
    """The signals that asked us for an end so far."""

    warnings: int = 0
    """SIGUSR1, passed on as it is; it may come often."""
    first: int | None = None
    again: int | None = None
    """The first other signal, and one that came when that was not just repeated."""
    at: float = math.inf

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
        if text:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())


def run(command: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `command` as ranks 0 .. ranks - 1 of this machine until all have ended; the shell's exit code.

    logs: folder for rank-N.log; a log that is there is continued.
    One rank's failure ends the others; its error is shown and its exit code kept (128 + n for signal n). A
    rank that hangs ends all; then it is 1. SIGINT, SIGTERM and SIGHUP reach the ranks as SIGTERM, SIGUSR1 as
    it is; if they stop for it in good order it is their 75, else 128 + n. A second one ends them at once.
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
                log = logs / f"rank-{number}.log"
                started.append(start(command, number, env, log, Path(scratch)))
            endings, hung = watch(started, asked)
        finally:
            for rank in started:
                kill(rank)
                rank.process.wait()
                for thread in rank.copies:
                    thread.join(1)
    code, text = verdict(endings, hung, asked, ranks)
    if text:
        print(text, file=sys.stderr, flush=True)
    return code


def watch(ranks: Sequence[Rank], asked: Asked) -> tuple[list[Ending], str | None]:
    """Wait until all ranks have ended: those that ended by themselves, and what to tell of a hang.

    A failure, a hang, or a second signal ends those that are left; one that stops has the others stop too.
    """
    endings: list[Ending] = []
    hung = None
    left = list(ranks)
    kill_at = math.inf
    warned = 0
    failing: dict[int, float] = {}  # rank -> since when its error is known
    stopping = False
    while left:
        now = time.monotonic()
        for rank in [rank for rank in left if rank.process.poll() is not None]:
            left.remove(rank)
            kill(rank)  # its loader workers, which would wait for ever
            endings.append(ending(rank))
            if endings[-1].code not in (0, CONTINUE) and not rank.killed:
                kill_at = min(kill_at, now + SETTLE)
        for rank in left:
            if rank.error.exists() and now > failing.setdefault(rank.number, now) + LEAVING:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
        if warned < asked.warnings:
            warned = asked.warnings
            for rank in left:
                rank.process.send_signal(signal.SIGUSR1)
        if not stopping and (asked.first or any(each.code == CONTINUE for each in endings)):
            stopping = True
            kill_at = min(kill_at, now + PATIENCE)
            for rank in left:
                rank.process.terminate()
        if hung is None and kill_at > now + SETTLE and any([rank.hangs for rank in left]):
            hung, kill_at = hanging(left, len(ranks)), now
        if now >= kill_at or asked.again:
            for rank in left:
                kill(rank)
        time.sleep(POLL)
    return [each for each in endings if not each.rank.killed], hung


def hanging(left: Sequence[Rank], ranks: int) -> str:
    """What to tell where the beats of a rank stay away; the stacks go to the logs."""
    found, notes = stacks(left)
    beats = {rank.number: rank.pulse.read() for rank in left}
    text = hang(beats, found, max(beat.limit for beat in beats.values()), notes)
    return f"{text}\nthe stacks of all {ranks} ranks are in their logs, {left[0].log.parent}"


def ending(rank: Rank) -> Ending:
    """What an ended rank told, which also goes to its log."""
    code = rank.process.returncode
    try:
        said = json.loads(rank.error.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Ending(rank, code, time.time())
    with rank.log.open("a", encoding="utf-8") as log:
        log.write(said["text"] + "\n")
    # One that told why it ends, and had to be helped, has the code of its error.
    return Ending(rank, said["code"] if code < 0 else code, said["when"], said["text"], said["echo"])


def verdict(endings: Sequence[Ending], hung: str | None, asked: Asked, ranks: int) -> tuple[int, str | None]:
    """The shell's exit code, and what is told."""
    if asked.again:
        return 128 + asked.again, "all ranks are ended; the last checkpoint is whole"
    if hung is not None:
        return 1, hung
    stopped = any(each.code == CONTINUE for each in endings)
    failures = [each for each in endings if each.code not in (0, CONTINUE)]
    if stopped or asked.first or asked.warnings:
        # What a signal that we have passed on does to a rank that does not listen for it.
        passed = (-signal.SIGTERM, -signal.SIGUSR1)
        failures = [each for each in failures if not each.echo and each.code not in passed]
    if failures:
        cause = min(failures, key=lambda each: (each.echo, each.when))
        return cause.code if cause.code > 0 else 128 - cause.code, told(cause, ranks)
    if stopped:
        return CONTINUE, None
    if len(endings) == ranks and not any(each.code for each in endings):
        return 0, None
    late = f"; not all ranks stopped within {PATIENCE:g} s" if len(endings) < ranks else ""
    return 128 + (asked.first or signal.SIGUSR1), f"ended by a signal{late}"


def told(cause: Ending, ranks: int) -> str:
    """What the user sees of a failure."""
    number, log, beat = cause.rank.number, cause.rank.log, cause.rank.pulse.read()
    place = f"rank {number} of {ranks}"
    last = f" {beat}" if beat.count else ""
    if cause.text is not None:
        # A mistake of the user's is the same on every rank; a defect has a place.
        return cause.text if cause.code == 2 else f"{cause.text}\n{place} failed{last}; its log is {log}"
    if cause.code >= 0:
        how = f"ended with exit code {cause.code}"
    else:
        how = f"was killed by {signal.Signals(-cause.code).name}"
        how += " (often: the machine was out of memory)" if cause.code == -signal.SIGKILL else ""
    # Rank 0's words were seen as they came, and SIGKILL leaves no time for any.
    silent = number == 0 or cause.code == -signal.SIGKILL
    lines = [] if silent else log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([*lines, f"{place} {how}{last}; its log is {log}"])


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
