"""Those who are told the same as metrics.jsonl: TensorBoard, W&B, trackio, MLflow; one file each.

They work in a thread of their own, so that no step waits for a network or a disk, and their fault is one line
on the console. None is imported that a run does not name.
"""

import importlib.util
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.report import public

NEEDED = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Tracker -> the package that it needs, which is the extra's name too."""
QUIET = ("offline", "disabled")
"""Values of WANDB_MODE that need no key."""
STEP = re.compile(r"step-[0-9]{1,15}")
KEPT = "trackers.json"
"""The file in a run's folder that says under which number each tracker knows the run."""
WAITING = 10_000  # things to tell before more are dropped
PATIENCE = 60.0
"""Seconds that the end of a run waits for the trackers to take the rest."""


class Tracker(Protocol):
    """One of them, once it was begun; whatever it raises is its end and not the run's."""

    id: str
    """How it knows the run, so that the next start goes on with it."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one line."""
        ...

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The previews of a step."""
        ...

    def back_to(self, step: int) -> None:
        """What was told of later steps is void."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


def check(config: Config) -> None:
    """Raise UserError for a tracker that cannot begin: its package is not there, or W&B knows no user."""
    for name in config.log.trackers:
        if importlib.util.find_spec(NEEDED[name]) is None:
            raise UserError(
                f'log.trackers with "{name}"',
                f"the package {NEEDED[name]} is not installed",
                f"pip install 'sfumato[{name}]', or leave it out",
            )
        if name == "wandb" and not config.log.offline and os.environ.get("WANDB_MODE") not in QUIET:
            import wandb

            # It would ask for one, and a run has nobody to answer.
            if wandb.api.api_key is None:
                do = "log in with `wandb login`, set WANDB_API_KEY, or set log.offline = true"
                raise UserError('log.trackers with "wandb"', "no key of W&B on this machine", do)


class Trackers:
    """All of a run's trackers, on the first rank."""

    def __init__(self, config: Config, tell: Callable[[str], None], step: int = 0) -> None:
        """tell: hears, in the calling thread, of a tracker that failed. step: where this start begins."""
        self.config, self.tell, self.step = config, tell, step
        self.faults: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.work: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self.shown = {folder for folder in folders(config.folder) if number_of(folder) <= step}
        self.thread: threading.Thread | None = None
        self.dropped = False

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl. It is told later, and nothing is waited for."""
        if self.config.log.trackers:
            self._put("log", int(record["step"]), scalars(record))

    def back_to(self, step: int) -> None:
        """The steps after `step` were undone."""
        if self.config.log.trackers:
            self._put("back_to", step)

    def close(self) -> None:
        """Wait until all is told, at most PATIENCE seconds."""
        if self.thread is None:
            return
        with suppress(queue.Full):
            self.work.put(("close", ()), timeout=PATIENCE)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.tell(f"the trackers did not take all within {PATIENCE:.0f} s; the run ends without them")
        self._tell()

    def _put(self, what: str, *told: Any) -> None:
        self._tell()
        if self.thread is None:  # not before: the loader's workers are copies of this process
            self.thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self.thread.start()
        try:
            self.work.put_nowait((what, told))
        except queue.Full:
            if not self.dropped:
                self.tell("the trackers are too slow; they are not told of every step")
            self.dropped = True

    def _tell(self) -> None:
        while not self.faults.empty():
            self.tell(self.faults.get())

    def _work(self) -> None:
        trackers = dict[str, Tracker]()
        for name in self.config.log.trackers:
            self._try(name, trackers, "begin", self.config, self.step)
        with suppress(OSError):
            keep(self.config.folder, {name: tracker.id for name, tracker in trackers.items()})
        while True:
            what, told = self.work.get()
            if what == "back_to":
                self.shown = {folder for folder in self.shown if number_of(folder) <= told[0]}
            # A step's previews are drawn behind its line, so those of earlier steps are whole.
            if what != "back_to":
                self._show(trackers, told[0] if what == "log" else None)
            for known in [*trackers]:
                self._try(known, trackers, what, *told)
            if what == "close":
                return

    def _show(self, trackers: dict[str, Tracker], before: int | None) -> None:
        """The previews of the steps before one that were not shown yet; None: all."""
        for folder in folders(self.config.folder):
            step = number_of(folder)
            if folder in self.shown or (before is not None and step >= before):
                continue
            self.shown.add(folder)
            files = sorted(folder.glob("*.png"))
            for name in [*trackers] if files else []:
                self._try(name, trackers, "images", step, files)

    def _try(self, name: str, trackers: dict[str, Tracker], what: str, *told: Any) -> None:
        """Call a tracker; whatever goes wrong in others' packages ends this one, and nothing else."""
        try:
            if what == "begin":
                trackers[name] = begin(name, *told)
            else:
                getattr(trackers[name], what)(*told)
        except Exception as error:
            if what == "images" and not all(file.exists() for file in told[1]):
                return  # the step was undone meanwhile
            trackers.pop(name, None)
            said = str(error).strip().split("\n")[0] or type(error).__name__
            self.faults.put(f"{name} failed and is told no more; training goes on: {said}")


def begin(name: str, config: Config, step: int) -> Tracker:
    """Begin a tracker, or go on with the run that it knows; step: the applied steps that stand."""
    tracker: Tracker = import_module(f"sfumato.report.trackers.{name}").begin(
        config, kept(config.folder).get(name), step
    )
    return tracker


def kept(folder: Path) -> dict[str, str]:
    """Under which number each tracker knows the run; {} before the first start."""
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(folder: Path, numbers: Mapping[str, str]) -> None:
    """Remember them for the next start."""
    part = folder / f".{KEPT}.part"
    part.write_text(json.dumps(kept(folder) | dict(numbers)) + "\n", encoding="utf-8")
    os.replace(part, folder / KEPT)


def folders(run: Path) -> list[Path]:
    """The folders of a run's previews, by step; what else lies there, such as a copy, is none."""
    found = [path for path in (run / "images").glob("step-*") if STEP.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(folder: Path) -> int:
    """The step of such a folder."""
    return int(folder.name.removeprefix("step-"))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by their names; those of lists and tables as name/part."""
    found = dict[str, float]()
    for key, value in record.items():
        parts = {key: value}
        if isinstance(value, Mapping):
            parts = {f"{key}/{part}": inner for part, inner in value.items()}
        elif key == "loss_by_timestep":
            parts = {f"{key}/{part}": inner for part, inner in enumerate(value, 1)}
        found |= {name: float(number) for name, number in parts.items() if isinstance(number, int | float)}
    return found


def settings(config: Config) -> dict[str, Any]:
    """The run's settings as hyperparameters, without this machine's paths and variables."""
    table = config.model_dump(mode="json", exclude={"environment"})
    return {name: public.shared(value, name) for name, value in public.flat(table)}
