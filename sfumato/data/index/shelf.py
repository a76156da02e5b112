"""The shelf of the indexes of the same wish: the published ones, drafts, and a lock."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from sfumato.errors import UserError

FORMAT = 1
"""Another number when the files of an index mean something else."""
DRAFTS, GONE, PROGRESS, FACTS, LOCK = ".draft-", ".gone-", "progress", "index.json", ".lock"
KEPT = 2  # indexes
TOLD = 5.0  # seconds between two lines for people
PATIENCE = 600.0  # seconds without a sign of life after which a process hangs
POLL = 1.0  # seconds between two looks


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What an index says of itself; None if there is none in this folder, or one of another format."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        return facts if facts["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def published(shelf: Path) -> list[Path]:
    """The folders of the finished indexes, the newest first."""
    times = {}
    for folder in shelf.glob("[!.]*"):
        try:
            times[folder] = (folder / FACTS).stat().st_mtime_ns
        except OSError:
            continue  # another process removed it
    return sorted(times, key=times.__getitem__, reverse=True)


def freshen(folder: Path) -> None:
    """Make an index the newest of its shelf, whatever the clocks of several machines say."""
    newest = published(folder.parent)[:1]
    if newest == [folder]:
        return
    with suppress(OSError):  # a store that others write
        times = [(each / FACTS).stat().st_mtime_ns + 1 for each in newest]
        now = max(time.time_ns(), *times)
        os.utime(folder / FACTS, ns=(now, now))


class Left(NamedTuple):
    """What a draft tells of itself, whether its process lives or was killed."""

    changed: int = 0
    """Nanoseconds since 1970."""
    records: int = 0
    """So many are safe on the disk."""
    folder: Path = Path()
    who: str = ""


def drafts(shelf: Path) -> list[Left]:
    """The drafts of this format."""
    found = []
    for folder in shelf.glob(f"{DRAFTS}{FORMAT}-*"):
        file = folder / PROGRESS
        try:
            records, _, who = file.read_text(encoding="utf-8").strip().partition(" records ")
            found.append(Left(file.stat().st_mtime_ns, int(records), folder, who))
        except (OSError, ValueError):
            continue  # it holds nothing yet, or nothing any more
    return found


def discard(folder: Path) -> None:
    """Remove an index; nobody opens what is half gone."""
    gone = folder.with_name(GONE + folder.name)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def publish(draft: Path, folder: Path) -> None:
    """Give a finished draft its name, and remove what it makes superfluous; under the lock."""
    if folder.exists():
        discard(folder)
    os.replace(draft, folder)
    entry = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
    freshen(folder)
    for old in published(folder.parent)[KEPT:]:
        discard(old)
    tidy(folder.parent, keep=None)


def tidy(shelf: Path, keep: Path | None) -> None:
    """Remove drafts but one, and what is gone already; under the lock."""
    for folder in (*shelf.glob(f"{DRAFTS}*"), *shelf.glob(f"{GONE}*")):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(shelf: Path, names: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a shelf. Raises UserError when its holder shows no sign of life for long.

    The system frees the lock of a process that ends in any way; one that hangs keeps it.
    """
    lock = FileLock(shelf / LOCK)
    sign, since, told = Left(), time.monotonic(), time.monotonic() - TOLD
    while True:
        try:
            lock.acquire(timeout=POLL)
            break
        except Timeout:
            newest, now = max(drafts(shelf), default=Left()), time.monotonic()
            if newest != sign:
                sign, since = newest, now
            who = f"{newest.who} ({newest.records:,} records)" if newest.who else "another process"
            if now - since > PATIENCE:
                raise UserError(
                    f"an index of {names}",
                    f"{who} holds {lock.lock_file}, and has made no progress for {PATIENCE:.0f} seconds",
                    "see whether it hangs and end it; if it is gone remove that file",
                ) from None
            if now - told >= TOLD:
                told = now
                tell(f"waiting for the index of {names}, which {who} makes")
    try:
        yield
    finally:
        lock.release()
