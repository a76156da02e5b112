"""When the run's process groups began and ended, and how much of that time went into steps that stand.

starts.jsonl has one line when a group starts, {"time", "step", "world", "device"}, and one when it ends,
{"time", "step", "seconds", "end": "done" | "stopped" | "failed"}; times are unix seconds, and "seconds" how
long the group lasted. A group that was killed leaves no second line.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "starts.jsonl"


class Starts:
    """This start among those before it, on the first rank."""

    def __init__(self, folder: Path, began: float, tell: Callable[[str], None] = print) -> None:
        """began: when this group started. tell: hears of a file that cannot be written."""
        self.path, self.began, self.tell = folder / FILE, began, tell
        # A clock that is set while a run goes on makes the run neither longer nor shorter.
        self.origin = time.monotonic() - max(0.0, time.time() - began)
        self.before = counted(read(self.path), began)
        """Seconds that count of earlier starts."""
        self.step = 0
        """The applied steps that stand by now."""

    def start(self, step: int, world: int, device: str) -> None:
        """Write the line of this start."""
        self.write({"time": self.began, "step": step, "world": world, "device": device})

    def end(self, step: int, how: str) -> None:
        """Write how it ended."""
        seconds = round(time.monotonic() - self.origin, 3)
        self.write({"time": time.time(), "step": step, "seconds": seconds, "end": how})

    def elapsed(self) -> float:
        """Seconds of the whole run until now."""
        return self.before + time.monotonic() - self.origin

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; a disk that takes it not ends no run."""
        try:
            # A kill in the middle of a line must not spoil the next one.
            torn = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + json.dumps(line) + "\n")
        except OSError as error:
            self.tell(f"{self.path} cannot be written: {error.strerror or error}; training goes on")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a starts.jsonl; [] if there is none."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("time"), int | float):
            found.append(values)
    return found


def counted(lines: list[dict[str, Any]], until: float) -> float:
    """Seconds of a run's earlier starts that count in its wall clock.

    A start counts until it ended. One that failed or was killed counts until the next one began, as the time
    that it took to come back was lost; the pause after one that was stopped, or was done, was asked for.
    Where a clock went back, a start counts as long as it lasted by its own account.
    """
    total, begun, lasted = 0.0, None, 0.0
    for line in lines:
        if "end" not in line:
            total += max(lasted, line["time"] - begun) if begun is not None else 0.0
            begun, lasted = line["time"], 0.0
        elif begun is not None:
            told = line.get("seconds")
            lasted = float(told) if isinstance(told, int | float) else max(0.0, line["time"] - begun)
            if line["end"] in ("stopped", "done"):
                total, begun = total + lasted, None
    return total + (max(lasted, until - begun) if begun is not None else 0.0)
