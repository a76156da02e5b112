"""How long the loop waited for data."""

from collections.abc import Iterator
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Adds up the seconds in which an iterator kept its reader waiting."""

    def __init__(self) -> None:
        self.waited = 0.0

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items."""
        while True:
            start = perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self.waited += perf_counter() - start
            yield item

    def take(self) -> float:
        """The seconds since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited
