"""Seeing that all ranks are alive and go on, and saying which one does not.

    with Watch(ranks, config.engine.timeout) as watch:
        watch.beat(step, "waiting for data")
        watch.beat(step, "training")

Where `launch` has started the ranks it watches them from outside, and this only tells it. Elsewhere every
rank has a thread that tells its beats to the others through the store in which they found each other, and
that ends this process when one of them hangs. Imports no torch where it only tells.
"""

import faulthandler
import itertools
import json
import os
import tempfile
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sfumato import launch
from sfumato.errors import Lost, Stopped
from sfumato.launch.pulse import Beat, Pulse, Stillness, hang

if TYPE_CHECKING:
    from sfumato.engine.ranks import Ranks

MARGIN = 30.0
"""Seconds that the process group's own timeout should be longer than `limit`: its errors name no rank."""
LATE = 3  # rounds of signs of life that a rank may miss before it counts as dead, once a connection broke
RUNS = itertools.count()


class Watch:
    """Beats of this rank, and an end of the run if one rank's stay away for `limit` seconds.

    All ranks enter it together. A rank that raises what is only the echo of another's end leaves with Lost
    in its place, which names that rank and its last step.
    """

    def __init__(self, ranks: "Ranks", limit: float) -> None:
        """limit: seconds between two beats, by each rank's own clock, that are allowed."""
        self.ranks, self.limit = ranks, limit
        self.every = min(max(limit / 20, 0.1), 1 + ranks.world / 100)
        self.board: Board | None = None

    def __enter__(self) -> "Watch":
        self.pulse = launch.pulse_here() or Pulse()
        self.last = self.pulse.read()
        self.leaving = threading.Event()
        self.beat(max(self.last.step, 0), "starting")
        if not launch.supervised():
            self.board = Board(self.ranks, self.every, self.pulse)
            self.thread = threading.Thread(target=self._judge, name="watch", daemon=True)
            self.thread.start()
        return self

    def beat(self, step: int, doing: str) -> None:
        """Say that this rank goes on: applied steps so far, and what it does next. Some microseconds."""
        self.last = Beat(self.limit, self.last.count + 1, step, doing)
        self.pulse.write(self.last)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leaving.set()
        self.pulse.write(Beat(0, self.last.count, self.last.step, self.last.doing))
        if self.board is None:
            return
        self.thread.join()
        try:
            if error is None or isinstance(error, Stopped):
                self.board.leave("done")
            elif not launch.is_echo(error):
                self.board.leave(f"{type(error).__name__}: {error}")
            else:
                self.board.leave("echo")
                found = self.board.culprit(self.every * LATE)
                if found:
                    raise Lost(found) from error
        finally:
            self.board.close()

    def _judge(self) -> None:
        """In a thread: until the loop is left, see whether this rank and the others go on."""
        assert self.board is not None, "nobody to judge"
        own = Stillness()
        while not self.leaving.wait(self.every):
            still = own.look(self.pulse.read().count) > self.limit
            silent = self.board.silent(self.limit)
            if (still or silent or self.board.stacks()) and not self.leaving.is_set():
                self._end()

    def _end(self) -> None:
        """Tell where everyone is, and end this process; the others do the same."""
        assert self.board is not None, "nobody to tell"
        self.board.mine["stack"] = mine = stacks()
        # The others answer within a round when they see this; one that cannot is to blame.
        time.sleep(LATE * self.every + 1)
        beats, found = self.board.beats(), self.board.stacks() | {self.ranks.rank: mine}
        # Without the store nobody can answer; the first rank hosts it, or its launcher does.
        text = self.board.failed() or hang(beats, found, self.limit, guilty=[0] if self.board.mute else None)
        first = self.ranks.rank == min(found)
        launch.say(mine, first=False)
        launch.say(text if first else f"rank {self.ranks.rank} ends too: {text.splitlines()[0]}", first)
        os._exit(1)


class Board:
    """What each rank tells all others: its beats, and that its process runs at all."""

    def __init__(self, ranks: "Ranks", every: float, pulse: Pulse) -> None:
        self.ranks, self.every, self.pulse = ranks, every, pulse
        self.mine: dict[str, Any] = {"tick": 0}
        self.told: dict[int, dict[str, Any]] = {}
        self.rounds = 0
        self.still = {rank: Stillness() for rank in range(ranks.world)}
        self.answering = Stillness()
        self.mute = False
        """Whether the store itself gives no answer."""
        self.closed = threading.Event()
        run = next(RUNS)
        self.keys = [f"sfumato/watch/{run}/{rank}" for rank in range(ranks.world)]
        if ranks.world > 1:
            from torch.distributed.distributed_c10d import _get_default_store

            store = _get_default_store()
            # A store's connection serves one thread at a time, and the main one may wait in it.
            self.store: Any = store.clone() if hasattr(store, "clone") else store
            self.thread = threading.Thread(target=self._talk, name="board", daemon=True)
            self.thread.start()

    def _talk(self) -> None:
        """In a thread, because an answer may never come: the store lives in the first rank's process."""
        while True:
            last = self.closed.is_set()
            self._round()
            if last:
                return
            self.closed.wait(self.every)

    def _round(self) -> None:
        beat = self.pulse.read()
        self.mine |= {"tick": self.mine["tick"] + 1, "beat": [beat.limit, beat.count, beat.step, beat.doing]}
        try:
            self.store.set(self.keys[self.ranks.rank], json.dumps(self.mine))
            if self.told or self.store.check(self.keys):
                values = self.store.multi_get(self.keys)
                self.told = {rank: json.loads(value) for rank, value in enumerate(values)}
            self.rounds += 1
        except RuntimeError:
            return  # the store is gone: `rounds` stands still

    def silent(self, limit: float) -> list[int]:
        """The ranks whose process gives no sign for more than `limit` seconds, though it has not left."""
        if self.ranks.world == 1 or not self.told:
            return []
        ages = {rank: self.still[rank].look(told["tick"]) for rank, told in self.told.items()}
        self.mute = self.answering.look(self.rounds) > limit
        if self.mute:
            return [0]
        return [rank for rank, age in ages.items() if age > limit and "end" not in self.told[rank]]

    def stacks(self) -> dict[int, str]:
        """The stacks that ranks have told, as far as they were asked."""
        return {rank: told["stack"] for rank, told in self.told.items() if "stack" in told}

    def beats(self) -> dict[int, Beat]:
        """Every rank's last beat, as known here."""
        known = {rank: Beat(*told["beat"]) for rank, told in self.told.items() if "end" not in told}
        return known | {self.ranks.rank: self.pulse.read()}

    def leave(self, end: str) -> None:
        """Tell the others why this rank leaves the loop, within a round."""
        self.mine["end"] = end
        if self.ranks.world > 1:
            seen, until = self.rounds, time.monotonic() + 2 * self.every + 1
            while self.rounds < seen + 2 and time.monotonic() < until:
                time.sleep(self.every / 4)

    def failed(self) -> str | None:
        """Which rank left with an error of its own, and which; None if none did."""
        for rank, told in self.told.items():
            if told.get("end", "echo") not in ("echo", "done"):
                return f"rank {rank} of {self.ranks.world} failed {Beat(*told['beat'])}: {told['end']}"
        return None

    def culprit(self, limit: float) -> str | None:
        """After a connection broke: who left first, and how; None if that is not to be found out."""
        if self.ranks.world == 1:
            return None
        until = time.monotonic() + 2 * limit + 5
        while time.monotonic() < until:
            if found := self.failed():
                return found
            for rank in self.silent(limit):
                beat = Beat(*self.told[rank]["beat"])
                return f"rank {rank} of {self.ranks.world} died; it was last seen {beat}"
            time.sleep(self.every / 4)
        return None

    def close(self) -> None:
        """End the thread."""
        self.closed.set()
        if self.ranks.world > 1:
            self.thread.join(self.every + 1)


def stacks() -> str:
    """The Python stacks of this process's threads, the main one last."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
