"""The disks where a run writes: room, speed, renames, locks, and whether all machines see the same one."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.doctor.lines import Line, bad, good, warning

BYTES = 32 << 20  # written to measure the speed
PART = 4 << 20
SLOW = 50e6
"""Bytes/s below which checkpoints of some GB take minutes."""
LITTLE = 20e9
"""Bytes below which a disk is soon full of checkpoints and caches."""
SECONDS = 4.0  # of writing, at most
ASK = """
import errno, fcntl, sys
for lock in (fcntl.lockf, fcntl.flock):
    try:
        with open(sys.argv[1], "r+") as file:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("free")
    except OSError as error:
        print("held" if error.errno in (errno.EACCES, errno.EAGAIN) else error.strerror)
"""
"""Another process's look at a lock: a line for lockf, one for flock."""


def places(config: Config | None) -> dict[str, Path]:
    """What is written where: name -> the folder, or the nearest that is there."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    wanted = {"hub cache": Path(hub).expanduser(), "temporary": Path(tempfile.gettempdir())}
    if config is not None:
        wanted = {"output": config.folder, "store": config.data.store} | wanted
    else:
        wanted = {"here": Path.cwd()} | wanted
    return {name: nearest(path) for name, path in wanted.items()}


def nearest(path: Path) -> Path:
    """The folder, or the first above it that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def lines(config: Config | None) -> list[Line]:
    """A line for each disk."""
    disks: dict[int, list[str]] = {}
    found = places(config)
    for name, path in found.items():
        disks.setdefault(path.stat().st_dev, []).append(name)
    return [line(names, found[names[0]]) for names in disks.values()]


def line(names: list[str], folder: Path) -> Line:
    """What is said of one disk."""
    name = f"disk {names[0]}"[:12]
    where = f"{', '.join(names)} in {folder}"
    free = shutil.disk_usage(folder).free
    try:
        with scratch(folder) as own:
            speed = writing(own, min(BYTES, free // 2))
            renamed, locked = renames(own), locks(own)
    except OSError as error:
        if set(names) == {"hub cache"}:
            return warning(name, f"{where}: {error.strerror}", "nothing, if the weights are there already")
        return bad(
            name,
            f"{where}: nothing can be written: {error.strerror}",
            "set `output` and data.store elsewhere",
        )
    text = f"{where}: {free / 1e9:,.0f} GB free, {speed / 1e6:,.0f} MB/s with fsync"
    figures = {"free": free, "speed": speed, "locks": locked, "rename": renamed}
    if not renamed:
        return bad(
            name,
            f"{text}; a rename does not replace a file",
            "take a local disk or NFS, not an object store",
            **figures,
        )
    faults = [f"{kind} {what}" for kind, what in locked.items() if what != "held"]
    if faults:
        do = "take another disk for `output` and data.store, or start no two runs at once in one folder"
        return warning(name, f"{text}; file locks do not work: {', '.join(faults)}", do, **figures)
    if free < LITTLE:
        return warning(name, text, "make room: checkpoints and caches need more", **figures)
    if speed < SLOW:
        return warning(
            name, text, "a faster disk, or checkpoint.every larger: saving may hold up the run", **figures
        )
    return good(name, f"{text}; renames and locks work", **figures)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new hidden folder in it, which is gone afterwards."""
    own = folder / f".sfumato-doctor-{uuid.uuid4().hex[:8]}"
    own.mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def writing(folder: Path, size: int) -> float:
    """Bytes/s of writing numbers that no disk can press together, with fsync at the end."""
    part = os.urandom(min(PART, max(1, size)))
    began, written = time.perf_counter(), 0
    with (folder / "speed").open("wb", buffering=0) as file:
        while written < size and time.perf_counter() < began + SECONDS:
            written += file.write(part)
        os.fsync(file.fileno())
    return written / (time.perf_counter() - began)


def renames(folder: Path) -> bool:
    """Whether a rename puts a file in another's place, and a folder of files into its own."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    parts = folder / "parts"
    parts.mkdir()
    (parts / "file").write_text("file")
    parts.rename(folder / "whole")
    return old.read_text() == "new" and not new.exists() and (folder / "whole" / "file").read_text() == "file"


def locks(folder: Path) -> dict[str, Any]:
    """What another process finds of locks that this one holds: "held", as it should be, or what else."""
    path = folder / "lock"
    path.touch()
    kinds = {"lockf": fcntl.lockf, "flock": fcntl.flock}
    found = {}
    for row, (name, lock) in enumerate(kinds.items()):
        with path.open("r+") as file:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                found[name] = error.strerror
                continue
            done = subprocess.run(
                [sys.executable, "-S", "-c", ASK, str(path)], capture_output=True, text=True, timeout=10
            )
            found[name] = (done.stdout.splitlines() or ["?", "?"])[row]
    return found
