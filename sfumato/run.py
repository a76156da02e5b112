"""A run's folder: what was asked, what it became, on what it runs, and where it can go on."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.changes import check_accepted, compared
from sfumato.config import Config
from sfumato.data.index import Index
from sfumato.engine import checkpoint, published
from sfumato.engine.content import versions
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError
from sfumato.models.folder import Facts, frozen_files, learned
from sfumato.models.identity import sampled
from sfumato.variables import recorded

LOCK = ".lock"
"""The file in a run's folder that the first rank of the run holds."""
PATIENCE = 30.0
"""Seconds that a start waits for the end of the run before it, which may have been killed just now."""


@contextlib.contextmanager
def alone(folder: Path, place: Ranks) -> Iterator[None]:
    """Within it no other run is trained in the folder; all ranks enter it together.

    The system lifts the lock with the first rank's end, whatever that is. Raises UserError if it is taken.
    """
    with contextlib.ExitStack() as held:
        together(place, lambda: take(folder, held) if place.first else None)
        yield


def take(folder: Path, held: contextlib.ExitStack) -> None:
    """Lock a run's folder until `held` is closed, where the disk knows locks."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not flock: loader workers would inherit that one, and may outlive a rank that is killed.
    file = held.enter_context((folder / LOCK).open("a+"))
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return
        if time.monotonic() > end:
            file.seek(0)
            do = f"wait for its end, or take another name; if it is gone for certain, remove {file.name}"
            raise UserError(f"to train in {folder}", f"{file.read()} does so", do)
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # a full disk holds the lock all the same
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


def write_records(config: Config, world: int, device: str, index: Index) -> None:
    """Write resolved.json, environment.json and the list of unusable records; called on one rank."""
    config.folder.mkdir(parents=True, exist_ok=True)
    told = config.folder / "faults" / "index.jsonl"
    told.unlink(missing_ok=True)
    if index.facts["faults"]:
        told.parent.mkdir(exist_ok=True)
        told.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in index.faults))
    packages = versions()
    environment = {
        "sfumato": packages.pop("sfumato"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "ranks": world,
        "device": device,
        "packages": packages,
        "variables": recorded(os.environ, config.environment),
    }
    write_json(config.folder / "resolved.json", config.model_dump(mode="json"))
    write_json(config.folder / "environment.json", environment)


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(path)


def latest(
    config: Config,
    fingerprint: str,
    place: Ranks,
    tell: Callable[[str], None],
    frozen: str | None = None,
) -> checkpoint.Saved | None:
    """The newest whole checkpoint of the run's folder, None before the first; all ranks call it together.

    Every file's sum is taken, each on one of the ranks. A damaged checkpoint is set aside, and the one before
    it is taken. fingerprint: of the data. tell: hears on the first rank what was mended, and which settings
    changed. frozen: as the function of that name says. Raises UserError if no checkpoint is whole, or the
    newest is another run's.
    """
    check_accepted(config)
    folder, averages = config.folder / "checkpoints", config.folder / "averages"
    say = tell if place.first else silent
    on_first(place, averages, lambda: [*published.tidy(folder), *published.tidy(averages)], say)
    saved = None
    while saved is None:
        newest = together(place, lambda: max(published.steps_in(folder), default=None))[0]
        if newest is None:
            if left := together(place, lambda: [path.name for path in published.damaged_in(folder)])[0]:
                raise nothing_whole(config, left)
            on_first(place, averages, lambda: aside(averages), say)
            return None
        saved = whole(published.path_of(folder, newest), place, say)
    for line in compared(config, fingerprint, frozen, saved):
        say(line)
    step = saved.step
    on_first(place, averages, lambda: published.forget_after(averages, step), say)
    return saved


def frozen(config: Config, facts: Facts, place: Ranks) -> str:
    """What tells whether what each start reads and none trains is the same; all ranks call it together."""
    learns = {learned(facts.components)} if config.method.kind == "full" else set[str]()
    if config.method.kind == "full" and config.learns_text:
        learns |= set(facts.needs)
    files = frozen_files(facts, config.model, learns)
    return str(together(place, lambda: sampled(files) if place.first else None)[0])


def on_first(place: Ranks, what: Path, act: Callable[[], list[str]], say: Callable[[str], None]) -> None:
    """Act on the first rank and tell what it says; a disk's refusal is a UserError on all of them."""

    def attempt() -> list[str]:
        try:
            return act() if place.first else []
        except OSError as error:
            do = "mend that, and start the same command again"
            raise UserError(f"to go on with the run in {what.parent}", str(error), do) from None

    for line in together(place, attempt)[0]:
        say(line)


def aside(averages: Path) -> list[str]:
    """Keep averages of a run whose checkpoints are gone from those of the one that begins."""
    if not published.steps_in(averages):
        return []
    return [f"averages of an earlier run were set aside as {published.set_aside(averages).name}"]


def silent(text: str) -> None:
    """Tell nobody."""


def together(place: Ranks, act: Callable[[], Any]) -> list[Any]:
    """What every rank found, on all of them; a mistake that one found is raised on all."""
    mine: Any = None
    try:
        mine = act()
    except UserError as error:
        mine = error
    every = place.gathered(mine)
    for found in every:
        if isinstance(found, UserError):
            raise found
    return every


def whole(path: Path, place: Ranks, say: Callable[[str], None]) -> checkpoint.Saved | None:
    """A checkpoint, if it is whole; else it is set aside, and None. All ranks together."""
    opened: list[checkpoint.Saved] = []

    def look() -> tuple[list[str], list[str], bool]:
        try:
            published.see(path)
            saved = checkpoint.Saved(path)
        except published.Damaged as error:
            return [error.wrong], [], False
        except OSError as error:
            raise UserError(f"the checkpoint {path}", str(error), "name a shared disk") from None
        opened.append(saved)
        named = int(path.name.removeprefix("step-"))
        renamed = [f"it holds step {saved.step}"] if saved.step != named else []
        share = place.rank, place.world
        there = (path / "export").is_dir()
        return renamed + saved.problems(*share), saved.export_problems(*share), there

    # From here on what all have seen decides: the first rank renames while another one may still look.
    seen = together(place, look)
    wrong, export = (sorted({text for found in seen for text in found[part]}) for part in (0, 1))
    if not wrong and not (export and any(there for *_, there in seen)):
        return opened[0]
    spoilt, said = (path, "; ".join(wrong)) if wrong else (path / "export", "; ".join(export))

    def move() -> str:
        try:
            return published.set_aside(spoilt).name if place.first else ""
        except OSError as error:
            do = "move it away, and start the same command again"
            raise UserError(f"to go on from {path}", f"{said}; it cannot be renamed: {error}", do) from None

    new = together(place, move)[0]
    what = f"the {'checkpoint' if wrong else 'export of the checkpoint'} {path.name}"
    say(f"{what} is not whole and was set aside as {new}: {said}")
    return None if wrong else opened[0]


def nothing_whole(config: Config, aside: list[str]) -> UserError:
    """What is said where every checkpoint was set aside: a run never begins anew by itself."""
    return UserError(
        f"to go on with the run in {config.folder}",
        f"none of its checkpoints is whole: {', '.join(aside)}",
        f"put a whole one into {config.folder / 'checkpoints'}, or begin at step 0: move that folder away",
    )
