"""Profilers by setting: torch's over some steps, DeepSpeed's wall-clock breakdown, and a place for its FLOPs.

DeepSpeed's flops profiler is switched on by engine/ds_config.py; all three write into the run's folder, in
`profile`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from sfumato.config import Config
from sfumato.engine.engine import Engine


class Profile:
    """What is profiled of a run, on the first rank."""

    def __init__(self, config: Config, engine: Engine, tell: Callable[[str], None]) -> None:
        """tell: hears where a trace lies, and why one could not be written."""
        self.wanted, self.engine, self.tell = config.profile, engine, tell
        self.folder = config.folder / "profile"
        self.torch: Any = None
        self.until = 0
        self.lines: Any = None
        if not engine.ranks.first or self.wanted == type(self.wanted)():
            return
        if self.wanted.breakdown or self.wanted.flops:  # which both make it print at each step
            engine.deepspeed.timers.log = self.tell_breakdown
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.wanted.breakdown:
                self.lines = (self.folder / "breakdown.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            tell(f"{self.folder} cannot be written: {error.strerror or error}; nothing is profiled")
            self.wanted = type(self.wanted)()
        self.step()

    def step(self) -> None:
        """Begin or end torch's profiler where its step has come; called between steps."""
        start, now = self.wanted.start, self.engine.step_count
        if start is None or not self.engine.ranks.first:
            return
        if self.torch is not None and now >= self.until:
            self.end()
        elif self.torch is None and not self.until and now >= start:
            from torch.profiler import profile

            self.began, self.until = now, now + self.wanted.steps
            self.torch = profile(record_shapes=True)
            self.torch.__enter__()

    def end(self) -> None:
        """Write the trace of the steps so far."""
        found, self.torch = self.torch, None
        found.__exit__(None, None, None)
        path = self.folder / f"step-{self.began:06d}.json.gz"
        try:
            found.export_chrome_trace(str(path))
            self.tell(f"the trace of steps {self.began + 1} to {self.engine.step_count} is {path}")
        except (OSError, RuntimeError) as error:
            self.tell(f"the trace could not be written to {path}: {error}")

    def close(self) -> None:
        """End what is still going on."""
        if self.torch is not None:
            self.end()
        if self.lines is not None:
            self.lines.close()
            self.lines = None

    def tell_breakdown(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """In place of DeepSpeed's, which prints: a line of milliseconds for each part that has a timer."""
        timers = self.engine.deepspeed.timers
        spent = {name: timers(name).elapsed(reset=reset) for name in names if name in timers.timers}
        if self.lines is not None and spent:
            try:
                line = {"step": self.engine.step_count, "milliseconds": spent}
                self.lines.write(json.dumps(line) + "\n")
                self.lines.flush()
            except OSError as error:
                self.tell(f"{self.folder} cannot be written: {error.strerror or error}; training goes on")
                self.lines = None
