"""How a run goes: one line on the console that stays in place, and metrics.jsonl for everything else."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sfumato.device import peak_memory

LINE_SECONDS = 1.0  # between two plain lines
FRAME_SECONDS = 0.1  # between two pictures of the live line
RATE_LINES = 20  # the time left is judged by this many of the last intervals


class Lasting(Console):
    """A console whose reader may go, as a pager does: the run goes on, which its files tell as well."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Progress:
    """Tells the console and metrics.jsonl what the loop measured; silent on all ranks but the first.

    `path` is the run's metrics.jsonl: lines of steps after `start`, left by a run that was killed behind its
    last checkpoint, are cut off, so that no step is ever told twice. `batch_size` is the number of samples of
    one step over all ranks. It is called at log steps only, with numbers that are already on the CPU and mean
    over all ranks and micro-batches; between log steps it does nothing and waits for no device.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        batch_size: int,
        *,
        start: int = 0,
        first: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps, self.batch_size, self.first, self.clock = steps, batch_size, first, clock
        self.last_step, self.began = start, clock()
        self.last_time, self.outside = self.began, 0.0
        self.intervals: deque[tuple[int, float]] = deque(maxlen=RATE_LINES)
        self.shown_at = -math.inf
        self.waiting: str | None = None
        self.full = False
        """Whether the file took no more."""
        if not first:
            return
        cut_after(path, start)
        self.path, self.file = path, path.open("a", encoding="utf-8")
        self.console = console or Lasting()
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        # Refreshed by us alone: a thread of its own would be copied, half alive, into the loader's workers.
        self.live = Live(console=self.console, auto_refresh=False) if live else None
        if self.live is not None:
            self.live.start()

    def back_to(self, step: int) -> None:
        """Forget the steps after `step`, which were undone; nothing happens if there are none."""
        if not self.first or step >= self.last_step:
            return
        with self.writing():
            self.file.close()
        with self.writing():
            cut_after(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.last_step = step

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        derive: Callable[[int, float], Mapping[str, Any]] = lambda steps, seconds: {},
    ) -> dict[str, Any]:
        """Tell the metrics of `step`, the number of applied optimizer steps; each is one line of the file.

        Known to the console are loss, lr and grad_norm; others go to the file alone. From "data_seconds", the
        seconds since the last call in which the loop waited for data, the rate without that wait is found.
        derive: (steps, seconds of training since the last line) -> what follows from them. Gives the line.
        """
        if not self.first:
            return {}
        assert step > self.last_step, f"step {step} was told after step {self.last_step}"
        now = self.clock()
        seconds = now - self.last_time - self.outside
        done = step - self.last_step
        self.intervals.append((done, seconds))
        kind, memory = memory_in_use()
        record = {
            "step": step,
            "time": time.time(),
            "seconds": now - self.began,
            f"{kind}_memory_gib": memory,
            **metrics,
            **rates(done * self.batch_size, seconds, metrics.get("data_seconds")),
            "seconds_per_step": seconds / done,
            **derive(done, seconds),
        }
        self.last_step, self.last_time, self.outside = step, now, 0.0
        with self.writing():
            self.file.write(json.dumps({key: finite(value) for key, value in record.items()}) + "\n")
            self.file.flush()
        self.show(describe(record, kind, self.steps, self.seconds_left()), now)
        return record

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Writing to the file within it ends no run; what a full disk did not take is tried again later."""
        try:
            yield
            self.full = False
        except OSError as error:
            if not self.full:
                self.full = True
                self.note(f"{self.path} cannot be written: {error.strerror or error}; training goes on")

    def show(self, line: str, now: float) -> None:
        """Put a line on the console, unless one was put there a moment ago; the last step's always is."""
        pause = LINE_SECONDS if self.live is None else FRAME_SECONDS
        if now - self.shown_at < pause and self.last_step < self.steps:
            self.waiting = line
            return
        self.shown_at, self.waiting = now, None
        if self.live is None:
            self.console.print(Text(line), soft_wrap=True)
            return
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(ProgressBar(self.steps, self.last_step), f"{self.last_step / self.steps:.0%}")
        self.live.update(Group(bar, Text(line)), refresh=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the one that stays in place."""
        if self.first:
            self.console.print(Text(text), soft_wrap=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time within it (a checkpoint, previews) is not counted as training in rates and time left."""
        begun = self.clock()
        try:
            yield
        finally:
            self.outside += self.clock() - begun

    def seconds_left(self) -> float:
        """The time that the remaining steps take at the pace of the last ones."""
        done, seconds = (sum(column) for column in zip(*self.intervals, strict=True))
        return (self.steps - self.last_step) * seconds / done

    def close(self) -> None:
        """Show what was held back and release the console and the file; more than once does no harm."""
        if not self.first or self.file.closed:
            return
        if self.waiting is not None:
            self.show(self.waiting, math.inf)
        if self.live is not None:
            self.live.stop()
        with self.writing():
            self.file.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def cut_after(path: Path, step: int) -> None:
    """Leave only the lines up to `step` in a metrics file, which is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (told := step_of(line)) is not None and told <= step]
    if kept == lines[: len(kept)]:
        # What goes is the file's end, as a rule; a disk without room takes that too.
        if len(kept) < len(lines):
            os.truncate(path, sum(map(len, kept)))
        return
    # Replaced as a whole: a kill between two writes must not lose what was kept.
    scratch = path.with_name(path.name + ".new")
    try:
        scratch.write_bytes(b"".join(kept))
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def step_of(line: bytes) -> int | None:
    """The step of a line; None for one that a kill left torn."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def finite(value: Any) -> Any:
    """The value, or None in place of a number that JSON cannot say."""
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rates(images: int, seconds: float, data_seconds: float | None) -> dict[str, float]:
    """Images per second by the wall clock, and if known without the time that the loop waited for data.

    And "data_stall", the share of the time that it waited.
    """
    found = {"images_per_second": images / seconds if seconds > 0 else math.nan}
    if data_seconds is not None:
        busy = seconds - data_seconds
        found["images_per_second_without_data_wait"] = images / busy if busy > 0 else math.nan
        found["data_stall"] = min(1.0, data_seconds / seconds) if seconds > 0 else math.nan
    return found


def memory_in_use() -> tuple[str, float]:
    """GiB: "device", the most that tensors on it ever took in this process, or on the CPU "process", now."""
    peak = peak_memory()
    if peak is not None:
        return "device", peak / 2**30
    import psutil

    return "process", psutil.Process().memory_info().rss / 2**30


def describe(record: Mapping[str, float], kind: str, steps: int, seconds_left: float) -> str:
    """The console's line of a record."""
    words = [f"step {record['step']}/{steps}"]
    for key, name, form in (("loss", "loss", ".4g"), ("lr", "lr", ".3g"), ("grad_norm", "grad norm", ".3g")):
        if key in record:
            words.append(f"{name} {record[key]:{form}}")
    rate = f"{record['images_per_second']:.3g} images/s"
    if "images_per_second_without_data_wait" in record:
        rate += f" ({record['images_per_second_without_data_wait']:.3g} without data wait)"
    words += [rate, f"{kind} memory {record[f'{kind}_memory_gib']:.2f} GiB", f"{duration(seconds_left)} left"]
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m10s, 2h05m, 1d03h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for unit, size, part, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{part}"
    return f"{whole}s"
