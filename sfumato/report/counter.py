"""How far work has come that is counted in things: how many, how many a second, and the time left."""

import sys
import time
from types import TracebackType

from sfumato.report.progress import duration

TERMINAL_SECONDS, FILE_SECONDS = 0.2, 10.0  # between two lines


class Counter:
    """Tells the first rank's console; on a terminal the line stays in place."""

    def __init__(self, what: str, first: bool) -> None:
        self.what, self.first = what, first
        self.done, self.total, self.began, self.told = 0, 0, time.perf_counter(), 0.0
        self.untold = True
        """Whether there is news since the last line, or none was told."""
        self.pause = TERMINAL_SECONDS if sys.stdout.isatty() else FILE_SECONDS

    def add(self, count: int, total: int) -> None:
        """So many more are done, out of so many in all."""
        self.done, self.total = min(self.done + count, total), total
        self.untold = True
        if time.perf_counter() - self.told > self.pause:
            self.tell()

    def tell(self) -> None:
        """One line."""
        if not self.first:
            return
        self.told, self.untold = time.perf_counter(), False
        rate = self.done / max(self.told - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        line = (
            f"{self.what}: {self.done:,} of {self.total:,}, {rate_of(rate)} a second, {duration(left)} left"
        )
        end = "" if sys.stdout.isatty() else "\n"
        print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, end=end, flush=True)

    def __enter__(self) -> "Counter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.untold:
            self.tell()
        if self.first and sys.stdout.isatty():
            print()


def rate_of(rate: float) -> str:
    """A rate in three digits, or all that it has before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
