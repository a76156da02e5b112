"""All that a run's folder tells, read again and again while it grows."""

import json
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.engine.published import steps_in
from sfumato.report.page.columns import Columns
from sfumato.report.page.lines import Growing, Rows, column, number, read_json, step_of

PARTS = tuple(f"loss_by_timestep.{n}" for n in range(4))
LAST = 100  # lines that stand for the end of a run
SHAPES = 200  # buckets that are told apart
TOLD = 200  # spikes and bad batches that are shown
READ = 100_000  # records of lists of faults that are counted
FILES = ("metrics.jsonl", "resolved.json", "environment.json", "starts.jsonl", "images")
"""What makes a folder a run's."""


class Metrics(Growing):
    """The run's numbers as curves, and what is not a curve."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reset()

    def reset(self) -> None:
        """Know nothing."""
        self.columns = Columns()
        self.count = 0
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.ends: deque[dict[str, Any]] = deque(maxlen=LAST)
        self.spikes: deque[tuple[int, float]] = deque(maxlen=TOLD)
        self.spiked = 0
        self.shapes: Counter[str] = Counter()

    def forget(self) -> None:
        super().forget()
        self.reset()

    def flat(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record's numbers by the names of their curves."""
        parts = record.get("loss_by_timestep")
        if isinstance(parts, list):
            record.update(zip(PARTS, parts, strict=False))
        return record

    def take(self, records: list[dict[str, Any]]) -> None:
        good = [self.flat(record) for record in records if step_of(record) is not None]
        self.broken += len(records) - len(good)
        if not good:
            return
        # Most lines have the same keys, so that their values are turned into columns at once.
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in good:
            groups.setdefault(tuple(record), []).append(record)
        for names, alike in groups.items():
            told = dict(zip(names, zip(*map(dict.values, alike), strict=True), strict=True))
            steps = np.array(told.pop("step"), np.int64)
            found = {name: values for name, rows in told.items() if (values := column(rows)) is not None}
            self.columns.add(steps, found)
        self.count += len(good)
        self.first, self.last = self.first or good[0], good[-1]
        self.ends.extend(good[-LAST:])
        for record in good:
            self.note(record)

    def note(self, record: dict[str, Any]) -> None:
        """Keep what is not a curve."""
        if record.get("spike") is True:
            self.spiked += 1
            self.spikes.append((record["step"], number(record.get("loss"))))
        shapes = record.get("bucket")
        if isinstance(shapes, dict):
            for shape, steps in shapes.items():
                if 0 < number(steps) < 2**53 and (shape in self.shapes or len(self.shapes) < SHAPES):
                    self.shapes[shape] += int(steps)

    @property
    def end(self) -> list[dict[str, Any]]:
        """The last tenth of the lines, LAST at most."""
        return [*self.ends][-max(1, min(LAST, self.count // 10)) :]

    def mean(self, name: str) -> float | None:
        """The mean of the last lines."""
        values = column([record.get(name) for record in self.end])
        values = np.empty(0) if values is None else values[np.isfinite(values)]
        with np.errstate(over="ignore"):
            mean = float(values.mean()) if len(values) else np.nan
        return mean if np.isfinite(mean) else None


NAMES = ("loss", "null_loss", "gap", "hint_loss", "hint_gap")


class Validation(Metrics):
    """Losses on what is held out, as curves named "loss/WEIGHTS", "gap/WEIGHTS", "hint_gap/WEIGHTS" (of a
    ControlNet) and "t/T/WEIGHTS"."""

    def flat(self, record: dict[str, Any]) -> dict[str, Any]:
        weights = str(record.get("weights", "live"))[:40]
        found = {"step": record["step"], "samples": record.get("samples")}
        found |= {f"{name}/{weights}": record.get(name) for name in NAMES}
        parts = record.get("quantiles")
        for part in parts[:32] if isinstance(parts, list) else ():
            if isinstance(part, dict) and np.isfinite(number(part.get("t"))):
                found[f"t/{part['t']}/{weights}"] = part.get("loss")
        return found

    @property
    def kinds(self) -> list[str]:
        """The weights that were looked at, the live ones first."""
        kinds = [name.removeprefix("loss/") for name in self.columns.held if name.startswith("loss/")]
        return sorted(kinds, key=lambda kind: (kind != "live", kind))


class Record:
    """What is known of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.validation = Validation(folder / "validation.jsonl")
        self.starts = Rows(folder / "starts.jsonl")

    def refresh(self) -> None:
        """Read what is new."""
        for file in (self.metrics, self.validation, self.starts):
            file.refresh()
        self.resolved = read_json(self.folder / "resolved.json")
        self.environment = read_json(self.folder / "environment.json")
        self.summary = read_json(self.folder / "summary.json")
        self.now = time.time()

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.resolved.get("name") or self.folder.resolve().name)

    @property
    def step(self) -> int:
        """The last step that was told of."""
        # That of the newest start or end: what an older end tells may have been undone.
        told = [step_of(row) for row in self.starts.all[-1:]]
        return max(0, self.metrics.last.get("step", 0), *(step or 0 for step in told))

    @property
    def steps(self) -> int | None:
        """The steps of the whole run."""
        return step_of({"step": self.resolved.get("steps")})

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """Starts but the first."""
        return [row for row in self.starts.all if "end" not in row][1:]

    def export(self) -> tuple[str, dict[str, Any]]:
        """Where the newest export lies in the folder, and what it says of itself; ("", {}) if none does."""
        places = ["export"]
        try:
            places += [
                f"checkpoints/step-{n:06d}/export" for n in steps_in(self.folder / "checkpoints")[::-1]
            ]
        except OSError:
            pass
        for place in places:
            if told := read_json(self.folder / place / "sfumato.json"):
                return place, told
        return "", {}

    def faults(self) -> list[dict[str, str]]:
        """Records that turned out to be of no use, with reasons."""
        found: dict[tuple[str, str], None] = {}
        for path in sorted(entries(self.folder / "faults", "*.jsonl")):
            rows = Rows(path)
            rows.MOST = READ
            rows.refresh()
            found |= {(str(row.get("name")), str(row.get("reason"))): None for row in rows.all}
        return [{"name": name, "reason": reason} for name, reason in found]

    def bad(self) -> list[dict[str, Any]]:
        """Batches whose numbers were not finite, oldest first."""
        found = []
        for path in sorted(entries(self.folder / "bad", "step-*"))[:TOLD]:
            told = read_json(path / "batch.json")
            samples = told.get("samples")
            samples = [row for row in samples if isinstance(row, dict)] if isinstance(samples, list) else []
            found.append({"folder": path.name, "step": told.get("step"), "samples": samples})
        return found


def entries(folder: Path, pattern: str) -> list[Path]:
    """What lies in a folder; [] where it cannot be read."""
    try:
        return [*folder.glob(pattern)]
    except OSError:
        return []


def one_line(value: Any, most: int = 2000) -> str:
    """A value of a file in words."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else text[:most] + " …"
