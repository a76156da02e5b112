"""What is written into a store: whole files, which appear by one rename, so that a kill leaves no half."""

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from uuid import uuid4

import psutil
from torch import Tensor

from sfumato.data.store.tensors import KEY_BYTES, NAME, Blob, blob, encode
from sfumato.errors import UserError

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 4096
SHARD_TENSORS = 2**15  # keeps the header far below what is read of one
RECORD_TENSORS = 4096
DAY = 24 * 3600.0  # seconds
SHARDS = "shards"
SUFFIX = ".safetensors"


@cache
def here() -> str:
    """Names the machine and the table of processes: a pid means nothing in another container."""
    names = [platform.node()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return blake2b("\n".join(names).encode(), digest_size=6).hexdigest()


@contextmanager
def room(folder: Path, needed: int) -> Iterator[None]:
    """Turn what goes wrong while `needed` bytes are written below a folder into a UserError."""
    try:
        yield
    except OSError as error:
        free = "an unknown number of"
        with suppress(OSError):
            there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
            free = f"{shutil.disk_usage(there).free:,}"
        raise UserError(
            f"{needed:,} bytes in the folder {folder}",
            f"{free} bytes are free there, and writing says: {error.strerror or error}",
            "make room, or see that you may write there, or set data.store to another folder; "
            "what was published before stays good",
        ) from error


@contextmanager
def published(path: Path, needed: int) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends well, and leaves nothing when it does not.

    Raises UserError, with the needed bytes and those that are free, if it cannot be written.
    """
    part = path.with_name(f".{here()}-{os.getpid()}-{uuid4().hex[:12]}.part")
    with room(path.parent, needed):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system knows how."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def sweep(folder: Path) -> None:
    """Remove the unfinished files of processes that are dead, or that are a day old."""
    for part in folder.glob(".*.part"):
        match = re.fullmatch(r"\.(\w+)-(\d+)-\w+\.part", part.name)
        if match is None:
            continue
        # Another rank may be quicker, and another user's files are theirs to remove.
        with suppress(OSError):
            dead = match[1] == here() and not psutil.pid_exists(int(match[2]))
            if dead or time.time() - part.stat().st_mtime > DAY:
                part.unlink()


class Writer:
    """Gathers records in memory and publishes them, a shard at a time. A context manager, for one thread.

    A kill loses the records of one shard, those that were not published. On an exception what is complete is
    published all the same.
    """

    def __init__(self, folder: Path, owner: str, shard_bytes: int = SHARD_BYTES) -> None:
        """folder: of the shards; owner: who writes, such as "rank3", a part of the files' names."""
        self.folder, self.shard_bytes = folder, shard_bytes
        self.owner = re.sub(r"\W+", "-", owner, flags=re.ASCII)[:40]
        self.records: dict[bytes, dict[str, Blob]] = {}
        self.gathered = self.tensors = 0
        self.written = 0
        """Bytes of the shards that it published."""
        self.failed = False
        sweep(folder)
        sweep(folder.parent)

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Copy a record's tensors, of up to four dimensions; a full shard is published at once.

        Names are letters, digits and _ . - /. Raises UserError if the shard cannot be written.
        """
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        assert 0 < len(tensors) <= RECORD_TENSORS, f"a record of {len(tensors)} tensors"
        for name in tensors:
            assert NAME.fullmatch(f".{name}"), f"a tensor named {name!r}"
        if key not in self.records:
            record = {name: blob(tensor) for name, tensor in tensors.items()}
            self.records[key] = record
            self.gathered += sum(len(one.data) for one in record.values())
            self.tensors += len(record)
        many = len(self.records) >= SHARD_RECORDS or self.tensors >= SHARD_TENSORS
        if many or self.gathered >= self.shard_bytes:
            self.publish()

    def publish(self) -> None:
        """Write what is gathered as a shard. Raises UserError if that fails; it is then still gathered."""
        if not self.records:
            return
        header, pieces = encode(self.records)
        size = len(header) + self.gathered
        self.failed = False
        try:
            with published(self.folder / f"{self.owner}-{uuid4().hex}{SUFFIX}", size) as file:
                file.write(header)
                for piece in pieces:
                    file.write(piece)
        except UserError:
            self.failed = True
            raise
        self.records, self.gathered, self.tensors = {}, 0, 0
        self.written += size

    def close(self) -> None:
        """Publish the rest. Raises UserError if that fails."""
        self.publish()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self.failed:
            # What went wrong first is what the user must hear of.
            with suppress(UserError):
                self.close()
