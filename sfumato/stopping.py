"""Ending a run early, by a signal, a file or the clock, on all ranks at the same step.

    with Stopping(config.time_limit, config.folder / "stop", print) as stopping:
        ...                                             # a signal here raises Stopped at once
        with stopping.together(ranks, timeout):         # from here it is only noted
            while not stopping.agreed(step) and step < steps:
                ...
            (save)
        if stopping.reason:
            raise stopping.error(step)                  # exit code 75

Imports no torch until the ranks are together.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from sfumato import launch
from sfumato.errors import Stopped, UserError

if TYPE_CHECKING:
    from sfumato.engine.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK = 1.0  # seconds between two looks for the file, which may lie on a slow network
# Reasons beside the numbers of signals. The largest of all ranks' counts: a file that is there is removed.
TIME, FILE = 1001, 1002


class Stopping:
    """What asks this run to stop, from entering to leaving it; then the signals are as they were.

    SIGINT and SIGTERM ask, and once more end the process at once, which harms nothing that is published.
    SIGUSR1, Slurm's warning, asks too and may come often. Before and after `together` a signal raises
    Stopped. Outside the main thread no signal is heard, only the file and the time.
    """

    def __init__(
        self,
        minutes: float | None = None,
        file: Path | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """minutes: from entering on. file: its being there asks; it is removed when that is obeyed.

        tell: is given a line, on the first rank, when a signal was noted in the loop; from another thread.
        Where ranks were started by `launch`, that one speaks.
        """
        self.minutes, self.file = minutes, file
        self.tell = None if launch.supervised() else tell
        self.reason = 0
        """Why all ranks stop, once `agreed` or the end of `together` has said so; 0 until then."""
        self._own = 0
        self._hard = 0.0  # when the first SIGINT or SIGTERM came, time.monotonic()
        self._told = False
        self._together = False
        self._first = True
        self._begun: int | None = None
        self._step: int | None = None
        """The steps that `agreed` was first and last asked with."""
        self._saved: int | None = None
        """The step that was saved when `together` ended well."""
        self._failing = False
        """Whether it ended with an error, which no signal may hide."""
        self._looked = -LOOK
        self._group: Any = None
        self._work: Any = None
        self._flag: Any = None

    def __enter__(self) -> "Stopping":
        self._end = time.monotonic() + 60 * self.minutes if self.minutes is not None else float("inf")
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            self._put_back()
            self._reading.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._reading.close()
            self._writing.close()
            LISTENING.remove(self)

    @contextmanager
    def together(self, ranks: "Ranks", timeout: float) -> Iterator[None]:
        """Within it a signal is noted for `agreed`. All ranks enter and leave it together.

        timeout: seconds that a rank waits for the others' answers before it is an error.
        What asked for a stop too late for `agreed` is in `reason` afterwards.
        """
        self._first = ranks.first
        if ranks.world > 1:
            self._group = answers(timeout)
        self._together = True
        try:
            yield
            self.reason = self.reason or self._answer()
            if not self.reason:
                self._ask()
                self.reason = self._answer()
            if self.reason:
                self._obey()
            self._saved = self._step
        except BaseException:
            self._failing = True
            raise
        finally:
            self._together = False
            self._work = None

    def agreed(self, step: int) -> bool:
        """Whether the run stops here; the same on all ranks. Called by all, once for every turn of the loop.

        What a rank knows goes to the others while they work on, and is read at the next call: one turn
        later, without waiting. step: applied steps so far, for messages.
        """
        assert self._together, "agreed outside of together"
        self._begun = step if self._begun is None else self._begun
        self._step = step
        if self.reason:
            return True
        if self._group is None:
            self.reason = self._asked()
        else:
            self.reason = self._answer()
            if not self.reason:
                self._ask()
        if self.reason:
            self._obey()
        return bool(self.reason)

    def error(self, step: int) -> Stopped | UserError:
        """What to raise when `step` is saved."""
        if self.reason == TIME and step == self._begun:
            # Started again and again, the run would never come further.
            return UserError(
                f"time_limit = {self.minutes:g} (minutes)",
                f"they were over before one step was done; the run is at step {step}",
                "allow more: loading counts, too",
            )
        return Stopped(self.why, step)

    @property
    def why(self) -> str:
        """The reason in words."""
        reason = self.reason or self._own
        if reason == FILE:
            return f"{self.file} was there (it is removed)"
        if reason == TIME:
            return f"time_limit = {self.minutes:g} minutes are over" if self.minutes else "time_limit is over"
        return f"{signal.Signals(reason).name} came"

    def _asked(self) -> int:
        """What this rank knows: a reason, or 0."""
        now = time.monotonic()
        if self._own:
            return self._own
        if now >= self._end:
            return TIME
        if self._first and self.file is not None and now >= self._looked + LOOK:
            self._looked = now
            if os.path.isfile(self.file):  # False also where a network disk gives no answer
                return FILE
        return 0

    def _ask(self) -> None:
        """Send what this rank knows on its way to all; nothing waits."""
        import torch
        import torch.distributed as dist

        if self._group is None:
            return
        self._flag = torch.tensor([self._asked()])
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _answer(self) -> int:
        """What came of the last `_ask`: the largest reason of any rank."""
        if self._group is None:
            return self._asked()
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._flag.item())

    def _obey(self) -> None:
        if self.reason == FILE and self._first and self.file is not None:
            with suppress(OSError):
                self.file.unlink()

    def _listen(self) -> None:
        self._process = os.getpid()
        # Python runs handlers between two lines of the main thread only, and that one may wait for other
        # ranks for minutes. A thread that reads this socket hears a signal at once.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        LISTENING.append(self)
        self._thread = threading.Thread(target=self._hear, name="stopping", daemon=True)
        self._thread.start()
        for number in SIGNALS:
            # Ignored is what a shell makes of SIGINT for a command in the background, and nohup of others.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its lines."""
        self._own = self._own or number
        if not (self._together or self._failing):
            raise Stopped(self.why, self._saved)

    def _hear(self) -> None:
        """In a thread: note signals, and obey the second at once, whatever the main thread waits for."""
        with suppress(OSError):
            while content := self._reading.recv(64):
                for number in content:
                    if number in self._before:
                        self._heard(number)

    def _heard(self, number: int) -> None:
        now = time.monotonic()
        if self._together and self._first and self.tell is not None and not self._told:
            self._told = True
            self.tell(f"{signal.Signals(number).name}: saving, then stopping; once more stops at once")
        self._own = self._own or number
        if number == signal.SIGUSR1:
            return
        self._hard = self._hard or now
        # The launcher counts for its ranks, and ends them itself.
        if now > self._hard + launch.REPEATED and not launch.supervised():
            end_at_once(number)


LISTENING: list[Stopping] = []
"""Those that hear signals in this process, the innermost last."""


def forget() -> None:
    """In a forked child: have its signals no longer heard by its parent, and be what they were."""
    while LISTENING:
        with suppress(ValueError):
            LISTENING.pop()._put_back()


os.register_at_fork(after_in_child=forget)


def end_at_once(number: int) -> None:
    """End this process and its workers without another line of Python."""
    for worker in multiprocessing.active_children():
        worker.kill()
    with suppress(OSError):
        sys.stderr.flush()
        os.write(2, b"\nstopped at once; the last checkpoint is whole, and the same command goes on\n")
    os._exit(128 + number)


GROUPS: dict[tuple[int, float], Any] = {}


def answers(timeout: float) -> Any:
    """The process group over which ranks ask each other: gloo, whatever the run's own is, so no device."""
    from datetime import timedelta

    import torch.distributed as dist

    key = id(dist.group.WORLD), timeout
    if key not in GROUPS:
        GROUPS[key] = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return GROUPS[key]
