"""The page of a run: report.html, one file that loads nothing. Imports no torch.

It is written from what lies in the run's folder alone, whatever of it is missing, torn or still growing.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from sfumato.errors import UserError
from sfumato.report.page.compare import side_by_side
from sfumato.report.page.paper import MARK, publish
from sfumato.report.page.record import FILES, Record
from sfumato.report.page.single import Story, alone

NAME, TOGETHER = "report.html", "compare.html"
REMEMBERED = 2
"""Runs of which this process remembers what it read, so that the next page costs what is new only."""
known: OrderedDict[Path, Story] = OrderedDict()
turn = threading.Lock()


def write(folder: Path, tell: Callable[[str], None] = print) -> Path:
    """Write or refresh a run's report.html, in one rename; its path.

    It may be called from a thread beside the training, as often as one likes: only what is new is read. A
    disk that refuses is told, and raises nothing.
    """
    path = folder / NAME
    with turn:
        story = known.pop(folder.resolve(), None) or Story(folder)
        known[folder.resolve()] = story
        while len(known) > REMEMBERED:
            known.popitem(last=False)
        try:
            publish(alone(story), path)
        except OSError as error:
            tell(f"{path} cannot be written: {error.strerror or error}")
    return path


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one run's page, or for several the page that compares them; its path.

    out: the file; unset: RUN/report.html, or compare.html beside the first run. Raises UserError for a folder
    that is no run's, and for a file that is no page of ours or cannot be written.
    """
    folders = [check(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        found = ", ".join(map(str, runs))
        raise UserError("sfumato report", f"a run is named twice: {found}", "name each run once")
    path = out or (folders[0] / NAME if len(folders) == 1 else folders[0].resolve().parent / TOGETHER)
    stories = [Story(folder) for folder in folders]
    try:
        check_page(path)
        publish(alone(stories[0]) if len(stories) == 1 else side_by_side(stories), path)
    except OSError as error:
        do = "make room, or name another file: --out"
        raise UserError(f"the page {path}", f"it cannot be written: {error.strerror or error}", do) from None
    return path


def check(run: Path) -> Path:
    """A run's folder; UserError if it is none."""
    if run.name in FILES or run.name == NAME:
        run = run.parent
    if not run.is_dir():
        raise UserError(f"a report of {run}", "there is no such folder", "name a run's: runs/NAME")
    if not any((run / name).exists() for name in FILES):
        inside = sorted(path.parent for path in run.glob("*/resolved.json"))[:5]
        do = (
            f"name one of the runs in it: {' '.join(map(str, inside))}"
            if inside
            else "name a run's: runs/NAME"
        )
        raise UserError(f"a report of {run}", f"it holds none of {', '.join(FILES)}", do)
    return run


def check_page(path: Path) -> None:
    """Raise UserError where something lies that is no page of ours; OSError where it cannot be read."""
    if path.is_dir() or (path.exists() and MARK.encode() not in path.read_bytes()[:4096]):
        raise UserError(f"the page {path}", "something else lies there", "name another file: --out")


__all__ = ["Record", "report", "write"]
