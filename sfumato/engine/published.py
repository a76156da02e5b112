"""Which checkpoints a folder holds, and whether one is whole. Imports no torch.

step-000500 is a published checkpoint: a folder with manifest.json and what that lists. step-000500.damaged
was set aside. Hidden names are of work that was not finished: .step-000500.part is being written,
.step-000500.old is being deleted, .step-000500.before gives way to another one of the same step.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfumato.errors import UserError

FORMAT = 3
MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{6}|[1-9]\d{6,})")
RANK = re.compile(r"rank-\d{5}\.safetensors")
CODE = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".py", ".pyc", ".so"}
"""Endings of files that run code when something loads them. No checkpoint and no export has one."""
MAGIC = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|\(?c[\w.]+\n[\w.]+\n")
"""How a pickle begins, and the zip that torch puts one into."""

SEEN = 10.0
"""Seconds after which a folder made on the first rank is seen by the others, if they share the disk."""


class Damaged(UserError):
    """A checkpoint that is not what was written."""

    def __init__(self, path: Path, wrong: str) -> None:
        do = "start the run again, which sets it aside and takes the one before it"
        super().__init__(f"the checkpoint {path}", f"it is damaged: {wrong}", do)
        self.wrong = wrong


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of an applied step."""
    return folder / f"step-{step:06d}"


def steps_in(folder: Path) -> list[int]:
    """Steps that have a published checkpoint, oldest first."""
    found = [(STEP.fullmatch(entry.name), entry) for entry in folder.glob("step-*")]
    return sorted(int(match[1]) for match, entry in found if match and entry.is_dir())


def checkpoints_in(run: Path) -> list[Path]:
    """The published checkpoints of a run's folder, oldest first."""
    folder = run / "checkpoints"
    return [path_of(folder, step) for step in steps_in(folder)]


def checkpoint_of(path: Path) -> Path | None:
    """The checkpoint that a path stands for: itself, or the newest of a run; None if it is neither.

    Of another format it is also itself, so that what reads it can say so.
    """
    if (path / MANIFEST).is_file() or (path / "state.json").is_file():
        return path
    return next(reversed(checkpoints_in(path)), None)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write a folder's manifest with its own sum, so that a reader sees the old or the new one; sync it."""
    part, file = folder / f".{MANIFEST}.part", folder / MANIFEST
    told = {"format": FORMAT} | values
    part.write_text(json.dumps(told | {"sha256": sum_of(told)}, indent=1) + "\n", encoding="utf-8")
    sync(part)
    part.replace(file)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises Damaged, or another UserError for another format."""
    file, older = path / MANIFEST, path / "state.json"
    if not file.is_file():
        if older.is_file():
            raise other_format(path, table(older).get("format", 1))
        raise Damaged(path, f"{MANIFEST} is missing")
    told = table(file)
    said, number = told.pop("sha256", None), told.get("format")
    if said != sum_of(told) and number == FORMAT or not isinstance(number, int):
        raise Damaged(path, f"{MANIFEST} is not as it was written")
    if number != FORMAT:
        raise other_format(path, number)
    if strange := [name for name in told["files"] if not RANK.fullmatch(name)]:
        raise Damaged(path, f"{MANIFEST} lists {strange[0]}, which is no rank's file")
    return told


def table(file: Path) -> dict[str, Any]:
    """A checkpoint's JSON. Raises Damaged."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(file.parent, f"{file.name} cannot be read: {error}") from None
    return told if isinstance(told, dict) else {}


def other_format(path: Path, found: Any) -> UserError:
    """What is said of a checkpoint that another version wrote."""
    newer = isinstance(found, int) and found > FORMAT
    return UserError(
        f"the checkpoint {path}",
        f"its format is {found}, this version reads {FORMAT}",
        f"go on with the {'newer' if newer else 'older'} version of Sfumato that wrote it, "
        "or start a run of another name",
    )


def sum_of(values: dict[str, Any]) -> str:
    """The sha256 of JSON values, however they are laid out."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def entry(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with file.open("rb") as content:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below a folder with its entry, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): entry(path) for path in files}


def shallow(path: Path, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What is wrong with a folder's files as far as names, sizes and first bytes tell."""
    yield from code_in(path)
    for name, told in files.items():
        file = path / name
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != told["size"]:
            yield f"{name} has {file.stat().st_size:,} of its {told['size']:,} bytes"


def deep(path: Path, files: dict[str, dict[str, Any]], share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """Which files do not hold what they held when they were written; share: (this rank, of so many)."""
    rank, world = share
    for name in sorted(files)[rank::world]:
        try:
            if entry(path / name)["sha256"] != files[name]["sha256"]:
                yield f"{name} does not hold what was written (its sha256 differs)"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"


def code_in(path: Path) -> Iterator[str]:
    """Files below a checkpoint that would run code if something loaded them."""
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(path).as_posix()
        try:
            with file.open("rb") as content:
                begin = content.read(64)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror or error}"
            continue
        # A safetensors file may begin with the same bytes: they are its header's length, and a table follows.
        pickled = MAGIC.match(begin) and not (file.suffix == ".safetensors" and begin[8:9] == b"{")
        if pickled or file.suffix.lower() in CODE:
            kind = "a pickle" if pickled else f"a {file.suffix} file"
            yield f"{name} is {kind}, which could run code; no checkpoint holds one, nothing loaded it"


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that no start takes it; its new path. OSError if that cannot be."""
    number, to = 1, path.with_name(f"{path.name}.damaged")
    while to.exists():
        number += 1
        to = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(to)
    return to


def damaged_in(folder: Path) -> list[Path]:
    """What was set aside, in the order of the steps."""
    return sorted(folder.glob("step-*.damaged*"))


def tidy(folder: Path) -> list[str]:
    """Finish or undo what a kill left half done, and say what was done, a line each."""
    said = []
    for path in sorted(folder.glob(".step-*.before")):
        final = path.with_name(path.name[1:].removesuffix(".before"))
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(final)
            said.append(f"{final.name} was put back: a stop came while it was being replaced")
    for ending, what in (("part", "half written"), ("old", "half deleted")):
        for path in sorted(folder.glob(f".step-*.{ending}")):
            shutil.rmtree(path, ignore_errors=True)
            left = "could not be removed" if path.exists() else "was removed"
            name = path.name[1:].removesuffix(f".{ending}")
            said.append(f"{folder.name}/{name}, {what} when the run was stopped, {left}")
    return said


def forget_after(folder: Path, step: int) -> list[str]:
    """Delete what was kept of steps after the one that a run goes on from, and say so. OSError if it cannot.

    The run may come to other numbers there, and nobody could tell the two apart.
    """
    later = [at for at in steps_in(folder) if at > step]
    for at in later:
        remove(path_of(folder, at))
    return [f"{folder.name} of step {', '.join(map(str, later))} were removed: made anew"] if later else []


def remove(path: Path) -> None:
    """Delete a published checkpoint, whose name is gone before its first file is. OSError if it cannot be."""
    old = path.with_name(f".{path.name}.old")
    path.rename(old)
    shutil.rmtree(old)


def begin(part: Path, needed: int) -> None:
    """Make the hidden folder, if its disk has room. OSError if it has not."""
    for left in part.parent.glob(".step-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    free = room_at(part)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, "the disk is full", str(part.parent))


def see(part: Path) -> None:
    """Wait until this machine sees the folder too. OSError if it does not."""
    end = time.monotonic() + SEEN
    while not part.is_dir():
        if time.monotonic() > end:
            raise OSError(errno.ENOENT, "all ranks need one shared disk, this one does not see", str(part))
        time.sleep(0.05)


def room_at(folder: Path) -> int | None:
    """Free bytes on a folder's disk; None if they cannot be known."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def publish(part: Path, final: Path) -> None:
    """Give a finished folder its name; a checkpoint that has it gives way only then."""
    before = final.with_name(f".{final.name}.before")
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    part.rename(final)
    sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the file system keep a file's or a folder's content through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
