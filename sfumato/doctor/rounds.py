"""One check after the other on all ranks, each within its time, and nobody is waited for in vain.

    answers = rounds.ask(work, limit=10, together=True)      # on every rank the same call

A rank does its work in a thread, which is given up when its time is over; what came of it goes to the first
rank through the store in which the ranks found each other, not through the process group, which may be
just what is broken. Work that is `together` has collectives in it: after one that did not end well on all
ranks, no other is tried.
"""

import itertools
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.doctor.lines import Line, bad
from sfumato.engine.ranks import Ranks
from sfumato.errors import Lost, UserError

GRACE = 4.0
"""Seconds that a rank's word may take beyond its work."""
POLL = 0.01
RUNS = itertools.count()
LEAST = 1.0
"""Seconds below which a check is not begun."""


@dataclass(frozen=True)
class Answer:
    """What came of a rank's work: what it said, or why it said nothing."""

    rank: int
    said: Any = None
    error: str = ""
    do: str = ""
    late: bool = False
    """It had not ended in its time, or the rank gave no sign of life."""


class Rounds:
    """The ranks' way through the checks. `first` is the rank that hears the answers."""

    def __init__(self, place: Ranks, store: Any, until: float, enter: Callable[[], None] = lambda: None):
        """store: of the process group. until: time.monotonic() at which all must be over. enter: is called
        first in each thread that works."""
        self.place, self.store, self.until, self.enter = place, store, until, enter
        self.run, self.number = next(RUNS), 0
        self.apart = ""
        """Why no check with collectives can follow; the same on all ranks."""
        self.over = False
        """Whether there is no time for another check; the same on all ranks."""
        self.gone: set[int] = set()
        """Ranks that gave no sign of life."""
        self.stuck = False
        """Whether a thread of this process was given up."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that hears the answers."""
        return self.place.first

    def ask(self, work: Callable[[], Any], limit: float, together: bool = False) -> list[Answer]:
        """Let every rank do its work; on the first rank their answers, by rank, elsewhere an empty list.

        limit: seconds. What the work returns must be fit for JSON. All ranks call it equally often. Raises
        Lost where the first rank gives no sign of life.
        """
        self.number += 1
        limit = max(LEAST, min(limit, self.until - time.monotonic()))
        end = time.monotonic() + limit + GRACE
        mine = self._attempt(work, limit)
        if self.place.world == 1:
            answers = [Answer(0, **mine)]
            self._decide(answers, together)
        elif self.first:
            answers = self._gather(mine, end)
            self._decide(answers, together)
            self.store.set(self._key("go"), json.dumps([self.apart, self.over]))
        else:
            answers = []
            self.store.set(self._key(self.place.rank), json.dumps(mine))
            self._await(self._key("go"), end + 2 * GRACE)
            self.apart, self.over = json.loads(self.store.get(self._key("go")))
        return answers

    def leave(self) -> None:
        """The last thing that ranks do together: the first one, whose process may hold the store, waits."""
        self.number += 1
        if self.place.world > 1 and not self.first:
            self.store.set(self._key(self.place.rank), "{}")
        elif self.place.world > 1:
            self._gather({}, time.monotonic() + GRACE)

    def _attempt(self, work: Callable[[], Any], limit: float) -> dict[str, Any]:
        """Do it in a thread; what is told of it."""
        told: dict[str, Any] = {}

        def body() -> None:
            try:
                self.enter()
                said = work()
                json.dumps(said)
                told["said"] = said
            except UserError as error:
                told.update(error=f"{error.asked}: {error.found}", do=error.do)
            except Exception as error:
                text = (str(error).strip().splitlines() or [""])[0]
                told.update(error=f"{type(error).__name__}: {text} ({where(error)})")

        thread = threading.Thread(target=body, name="check", daemon=True)
        thread.start()
        thread.join(limit)
        if not told:
            self.stuck = True
            frame = sys._current_frames().get(thread.ident or 0)
            stack = [] if frame is None else traceback.extract_stack(frame)
            return {"late": True, "error": f"still in {place_of(stack)} after {limit:.0f} s"}
        return told

    def _key(self, who: object) -> str:
        return f"sfumato/doctor/{self.run}/{self.number}/{who}"

    def _gather(self, mine: dict[str, Any], end: float) -> list[Answer]:
        """Every rank's word, on the first rank."""
        told = {self.place.rank: mine}
        waiting = [rank for rank in range(self.place.world) if rank not in told and rank not in self.gone]
        while waiting:
            for rank in [rank for rank in waiting if self.store.check([self._key(rank)])]:
                told[rank] = json.loads(self.store.get(self._key(rank)))
                waiting.remove(rank)
            if waiting and time.monotonic() > end:
                self.gone.update(waiting)
                break
            time.sleep(POLL if waiting else 0)
        nothing = {"late": True, "error": "it gives no sign of life: its process is gone, or stands still"}
        return [Answer(rank, **told.get(rank, nothing)) for rank in range(self.place.world)]

    def _decide(self, answers: Sequence[Answer], together: bool) -> None:
        """What all ranks must know alike, on the first one."""
        failed = [answer.rank for answer in answers if answer.error]
        if failed and together and not self.apart:
            self.apart = f"{named(failed)} did not come through a check before"
        if self.gone and not self.apart:
            self.apart = f"{named(sorted(self.gone))} gave no sign of life"
        self.over = self.over or time.monotonic() + LEAST > self.until

    def _await(self, key: str, end: float) -> None:
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise Lost("rank 0 gives no sign of life: its process is gone, or stands still")
            time.sleep(POLL)


def trouble(name: str, answers: Iterable[Answer]) -> list[Line]:
    """A bad line for every way in which ranks did not come through a check; none where all did."""
    several: dict[tuple[str, str], list[int]] = {}
    for answer in answers:
        if answer.error:
            several.setdefault((answer.error, answer.do), []).append(answer.rank)
    do = "see docs/doctor.md, and the line above that is bad, if there is one"
    return [bad(name, f"{named(ranks)}: {error}", said or do) for (error, said), ranks in several.items()]


def named(ranks: Sequence[int]) -> str:
    """Ranks in words."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def where(error: BaseException) -> str:
    """The place that raised an error."""
    return place_of(traceback.extract_tb(error.__traceback__))


def place_of(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost place of ours in a stack, as people say it."""
    ours = [frame for frame in stack if "sfumato" in frame.filename] or [*stack]
    return f"{ours[-1].name} of {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "its work"
