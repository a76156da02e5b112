"""Which losses stick out of those before them."""

import json
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from statistics import median

WINDOW = 100  # losses that one is compared with
ENOUGH = 20  # of them, before any is compared
NORMAL = 1.4826  # a normal law's standard deviation over its median absolute deviation
FLAT = 0.05  # the deviation of losses that hardly differ


class Spikes:
    """A rule that flags losses far above the last ones, by their logarithms.

    A loss is a spike if its logarithm lies more than `limit` robust standard deviations (1.4826 times the
    median absolute deviation, at least 0.05) above the median of the last 100. Losses of diffusion are
    skewed, as timesteps differ by orders of magnitude; their logarithms are nearly normal, so that a law with
    a heavy tail raises no alarm while one loss that is off by far does. Spikes count among the last ones too:
    a level that has changed for good is flagged for 50 losses at most.
    """

    def __init__(self, limit: float, before: Iterable[float] = ()) -> None:
        """limit: deviations; 0 flags nothing. before: losses of an earlier start."""
        self.limit = limit
        self.logarithms: deque[float] = deque(maxlen=WINDOW)
        self.now = False
        """Whether the last loss was one."""
        for loss in before:
            self.take(loss)

    def take(self, loss: float) -> bool:
        """Whether a loss is a spike; it is among those that the next ones are compared with.

        One that is not finite is a spike, and is not compared with; of one that is not positive nothing can
        be said.
        """
        self.now = self.limit > 0 and not math.isfinite(loss)
        if not math.isfinite(loss) or loss <= 0:
            return self.now
        logarithm = math.log(loss)
        if self.limit and len(self.logarithms) >= ENOUGH:
            middle = median(self.logarithms)
            spread = NORMAL * median(abs(other - middle) for other in self.logarithms)
            self.now = logarithm - middle > self.limit * max(spread, FLAT)
        self.logarithms.append(logarithm)
        return self.now

    def describe(self, step: int, loss: float) -> str:
        """The console's words on a spike."""
        last = f"the median of the last {len(self.logarithms)} is {self.median:.4g}"
        return f"step {step}: the loss jumped to {loss:.4g}; {last}"

    @property
    def median(self) -> float:
        """The median of the last losses; nan before the first."""
        return math.exp(median(self.logarithms)) if self.logarithms else math.nan


def losses_in(metrics: Path) -> list[float]:
    """The last losses of a metrics.jsonl, oldest first; [] if there is none. Torn lines are passed over."""
    if not metrics.is_file():
        return []
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        ends = deque(lines, maxlen=2 * WINDOW)  # more, as some may tell none
    found = []
    for line in ends:
        try:
            loss = json.loads(line).get("loss")
        except (ValueError, AttributeError):
            continue
        if isinstance(loss, int | float):
            found.append(float(loss))
    return found[-WINDOW:]
