"""How long the loop waited for data."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Adds up the seconds that are spent within `waiting`."""

    def __init__(self) -> None:
        self.waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it time counts as waited."""
        start = perf_counter()
        try:
            yield
        finally:
            self.waited += perf_counter() - start

    def take(self) -> float:
        """The seconds since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited
