"""How ranks ended, and what that makes of the whole: the exit code, and what the user is told."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.errors import CONTINUE


@dataclass(frozen=True)
class Ending:
    """How a rank ended by itself: its exit code (negative: a signal), when (time.time), and what it told.

    `echo`: it only says that another rank hung up. `text` is None where it told nothing; then `tail` may hold
    the last lines of its log. `beat`: what it did last, "" if it had not begun. host: "" where there is one.
    """

    number: int
    code: int
    when: float
    log: str
    text: str | None = None
    echo: bool = False
    beat: str = ""
    tail: Sequence[str] = ()
    host: str = ""


def verdict(
    endings: Sequence[Ending],
    ranks: int,
    stop: int | None,
    again: int | None,
    hung: str | None = None,
    lost: str | None = None,
    patience: float = 0,
) -> tuple[int, str | None, Ending | None]:
    """The shell's exit code, what is told, and the rank whose failure that is.

    stop: the signal that asked for an end; again: a second one. hung, lost: what to tell of a hang, of
    machines that are gone. patience: seconds that ranks had to stop.
    """
    if again:
        return 128 + again, "all ranks are ended; the last checkpoint is whole", None
    stopped = any(each.code == CONTINUE for each in endings)
    failures = [each for each in endings if each.code not in (0, CONTINUE)]
    if stopped or stop or lost:
        # What a signal that we have passed on does to a rank that does not listen for it.
        passed = (-signal.SIGTERM, -signal.SIGUSR1)
        failures = [each for each in failures if not each.echo and each.code not in passed]
    if hung is not None or (lost is not None and not failures):
        said = [text for text in (lost, hung) if text is not None]
        return CONTINUE if stopped and hung is None else 1, "\n".join(said), None
    if failures:
        cause = min(failures, key=lambda each: (each.echo, each.when))
        return cause.code if cause.code > 0 else 128 - cause.code, told(cause, ranks), cause
    if stopped:
        return CONTINUE, None, None
    if len(endings) == ranks and not any(each.code for each in endings):
        return 0, None, None
    late = f"; not all ranks stopped within {patience:g} s" if len(endings) < ranks else ""
    return 128 + (stop or signal.SIGUSR1), f"ended by a signal{late}", None


def told(cause: Ending, ranks: int) -> str:
    """What the user sees of a failure."""
    if cause.text is not None:
        # A mistake of the user's is the same on every rank; a defect has a place.
        return cause.text if cause.code == 2 else f"{cause.text}\n{placed(cause, ranks)}"
    return "\n".join([*cause.tail, placed(cause, ranks)])


def placed(cause: Ending, ranks: int) -> str:
    """One line: which rank failed, how and where."""
    last = f" {cause.beat}" if cause.beat else ""
    log = f"its log is {cause.log}" + (f" on {cause.host}" if cause.host else "")
    if cause.text is not None:
        how = "failed"
    elif cause.code >= 0:
        how = f"ended with exit code {cause.code}"
    else:
        how = f"was killed by {signal.Signals(-cause.code).name}"
        how += " (often: the machine was out of memory)" if cause.code == -signal.SIGKILL else ""
    return f"rank {cause.number} of {ranks} {how}{last}; {log}"
