"""What the loop tells of itself: one object that measures, writes and shows; no arithmetic of training.

    with Telling(config, engine, starts, sizes, factor) as told:
        with told.waiting(): …              for data
        told.trained(batches)               a step was applied
        told.step({"faults": 0})            a line of metrics.jsonl, on all ranks together
        told.back_to(step)                  the steps after it were undone

docs/metrics.md has every key.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.device import name_of
from sfumato.engine.engine import Engine
from sfumato.engine.profiles import kinds
from sfumato.report import tally
from sfumato.report.clock import Clock
from sfumato.report.flops import Flops, peak_of
from sfumato.report.profile import Profile
from sfumato.report.progress import Progress, memory_in_use
from sfumato.report.refresh import Refresh
from sfumato.report.spikes import Spikes, losses_in
from sfumato.report.starts import Starts
from sfumato.report.trackers import Trackers


class Telling:
    """Metrics, console, trackers, profilers and the report of one start, from the loop's point of view."""

    def __init__(
        self, config: Config, engine: Engine, starts: Starts, sizes: Sequence[tuple[int, int]], factor: int
    ) -> None:
        """sizes: (height, width) in pixels of all buckets; factor: pixels of a side of the VAE's latents."""
        self.config, self.engine, self.starts, self.factor = config, engine, starts, factor
        self.sizes, self.place = sizes, engine.ranks
        self.lines = config.folder / "metrics.jsonl"
        self.clock = Clock()
        self.seen: dict[int, tuple[tuple[int, int], list[int]]] = {}
        """Applied step -> its size, and the samples of this rank."""
        self.flops: Flops | None = None
        peak = peak_of(name_of(self.place.device), config.engine.precision)
        self.peak = peak if self.place.first else None

    def __enter__(self) -> "Telling":
        config, step = self.config, self.engine.step_count
        self.progress = Progress(
            self.lines, config.steps, config.batch_size, start=step, first=self.place.first
        )
        self.spikes = Spikes(config.bad_numbers.spike, losses_in(self.lines))
        self.useful = useful_until(self.lines, step) if self.place.first else 0.0
        self.starts.step = step
        self.trackers = Trackers(config, self.note, step)
        self.profile = Profile(config, self.engine, self.note)
        self.refresh = Refresh(config.folder, config.log.report_seconds, self.note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.starts.step = self.engine.step_count
        self.profile.close()
        self.trackers.close()
        if self.flops is not None:
            self.flops.close()
        self.refresh.close()
        self.progress.close()

    def note(self, text: str) -> None:
        """A line of its own on the console."""
        self.progress.note(text)

    def aside(self) -> AbstractContextManager[None]:
        """Time within it (a checkpoint, previews) is not counted as training."""
        return self.progress.aside()

    def waiting(self) -> AbstractContextManager[None]:
        """Time within it is a wait for data."""
        return self.clock.waiting()

    def back_to(self, step: int) -> None:
        """Forget the steps after `step`, which were undone."""
        self.seen = {number: seen for number, seen in self.seen.items() if number <= step}
        if step >= self.progress.last_step:
            return
        self.progress.back_to(step)
        self.spikes = Spikes(self.config.bad_numbers.spike, losses_in(self.lines))
        if self.place.first:
            self.useful = useful_until(self.lines, step)
            self.trackers.back_to(step)

    def trained(self, batches: Sequence[Batch]) -> None:
        """The engine's step was applied on these micro-batches of this rank, on any device."""
        height, width = (side * self.factor for side in batches[0].draws.noise.shape[-2:])
        asked = batches if self.config.log.samples else ()
        samples = [number for batch in asked for number in batch.ids.tolist()]
        self.seen[self.engine.step_count] = (height, width), samples
        with self.progress.aside():
            self.profile.step()

    def step(self, more: Mapping[str, Any]) -> None:
        """A line of the log, on all ranks together; waits for the device."""
        metrics = self.measured() | dict(more)
        if self.spikes.take(metrics["loss"]):
            self.note(self.spikes.describe(self.engine.step_count, metrics["loss"]))
        if self.config.log.samples:
            own = [*chain(*(samples for _, samples in self.seen.values()))]
            metrics["samples"] = sorted(chain(*self.place.gathered(own)))
        sizes = [size for size, _ in self.seen.values()]
        bucket = {size: sizes.count(size) for size in dict.fromkeys(sizes)}
        self.seen = {}
        metrics["bucket"] = {f"{height}x{width}": steps for (height, width), steps in bucket.items()}
        metrics["spike"] = self.spikes.now

        def derive(steps: int, seconds: float) -> dict[str, Any]:
            # An attempt that was undone took as long as another, and was of no use.
            used = (1 - metrics["skipped"]) * (seconds - metrics["data_seconds"])
            return self.earned(used) | self.arithmetic(bucket, seconds)

        record = self.progress.step(self.engine.step_count, metrics, derive)
        self.starts.step = self.engine.step_count
        if record:
            self.trackers.log(record)
            self.refresh.soon()

    def measured(self) -> dict[str, Any]:
        """The engine's metrics with those of the tally, over all ranks in one sum."""
        engine, place, world = self.engine, self.place, self.place.world
        kind, memory = memory_in_use()
        own = torch.zeros(2, world)  # a column for each rank: the sum over ranks is all of them
        own[:, place.rank] = torch.tensor([self.clock.take(), memory])
        vector = own.flatten().to(place.device)
        weighed = engine.step_count % self.config.log.weights_every < self.config.log.every
        if weighed:
            vector = torch.cat([vector, tally.weights(engine)])
        found = engine.metrics(vector)
        sums, others = found.pop("sums"), found.pop("more")
        waited, memories = others[:world], others[world : 2 * world]
        found |= tally.told(sums)
        if weighed:
            found |= tally.weights_told(others[2 * world :], bool(kinds(self.config.ema)))
        if engine.scale.dynamic:
            found["loss_scale"] = float(engine.scale.scaler.cur_scale)
        # All wait for the one that waits longest.
        found |= {"data_seconds": max(waited), f"{kind}_memory_gib": max(memories)}
        if world > 1:
            found["data_rank"] = waited.index(max(waited))
        return found | {"images": engine.step_count * self.config.batch_size}

    def earned(self, seconds: float) -> dict[str, float]:
        """How much of the run's wall clock went into steps that stand, as so many more seconds did."""
        self.useful += max(0.0, seconds)
        share = self.useful / max(self.starts.elapsed(), 1e-9)
        return {"useful_seconds": self.useful, "goodput": min(1.0, share)}

    def arithmetic(self, bucket: Mapping[tuple[int, int], int], seconds: float) -> dict[str, float]:
        """FLOP/s of each device for the model itself, and its share of the peak, where that is known."""
        if self.peak is None or seconds <= 0:
            return {}
        if self.flops is None:
            rest = (size for size in self.sizes if size not in bucket)
            self.flops = Flops(self.config, [*bucket, *rest])
        done = self.flops.of({size: steps * self.config.batch_size for size, steps in bucket.items()})
        if done is None:
            return {}
        rate = done / self.place.world / seconds
        return {"flops_per_second": rate, "mfu": rate / self.peak}


def useful_until(lines: Path, step: int) -> float:
    """Seconds that went into the steps up to `step`, from the file's last line.

    Steps behind that line, which a checkpoint holds and no line tells, are taken to have gone at its pace.
    """
    if not lines.is_file():
        return 0.0
    last = ""
    with lines.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            last = line if line.endswith("\n") else last
    try:
        told = json.loads(last)
        each = told["seconds_per_step"] * (1 - told.get("data_stall", 0.0))
        return float(told["useful_seconds"] + max(0, step - told["step"]) * each)
    except (ValueError, KeyError, TypeError):
        return 0.0
