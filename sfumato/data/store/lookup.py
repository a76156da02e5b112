"""The table of a store: which record lies at which byte of which shard.

table-HASH.npy has a row a tensor, sorted by key; table-HASH.json has the shards and their tensors' names.
HASH stands for the shards' names and sizes, and both files follow from these: processes that make the same
table at once write the same bytes. A table is mapped into memory and never read as a whole.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sfumato.data.store.tensors import DTYPES, KEY_BYTES, ROW, Damaged, Lying, nbytes

VERSION = 1
CHUNK = 2**16  # keys that are looked up at a time
LEASE = 3600.0  # seconds that a table stays after it was last used


class Shard(NamedTuple):
    """A file of records."""

    name: str
    size: int
    """Bytes of the file."""
    rows: int
    names: tuple[str, ...]
    """Of its tensors, sorted."""


def fingerprint(sizes: Mapping[str, int]) -> str:
    """What the table of these shards, name -> bytes, is called."""
    text = json.dumps([VERSION, sorted(sizes.items())])
    return "table-" + blake2b(text.encode(), digest_size=16).hexdigest()


def as_keys(keys: np.ndarray) -> np.ndarray:
    """Keys (n, 16) uint8 as (n,) of 16 bytes each, ordered as numbers are that begin with the first byte."""
    good = keys.dtype == np.uint8 and keys.ndim == 2 and keys.shape[1] == KEY_BYTES
    assert good, f"keys are (n, {KEY_BYTES}) uint8, not {keys.shape} {keys.dtype}"
    return np.ascontiguousarray(keys).view(ROW["key"]).reshape(-1)


class Table:
    """A table that is open; of no shards, it is empty."""

    def __init__(self, folder: Path, shards: list[Shard], rows: np.ndarray, records: int) -> None:
        """rows: (n,) ROW, sorted by key, shard and name, memory-mapped."""
        self.folder, self.shards, self.rows, self.records = folder, shards, rows, records
        self.names = sorted({name for shard in shards for name in shard.names})
        self.sizes = {shard.name: shard.size for shard in shards}
        self.used = -LEASE

    @cached_property
    def stem(self) -> str:
        """The name of its files, without the ending."""
        return fingerprint(self.sizes)

    def touch(self) -> None:
        """Say that it is in use: a process that maps a file dies if another machine removes it."""
        if time.monotonic() - self.used > LEASE / 8:
            self.used = time.monotonic()
            with suppress(OSError):
                os.utime(self.folder / f"{self.stem}.npy")

    def find(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of (n, 16) uint8 keys, piece by piece: the first row (k,) of each, and whether it is there (k,).

        A key costs a few pages of the file.
        """
        self.touch()
        for start in range(0, len(keys), CHUNK):
            wanted = as_keys(keys[start : start + CHUNK])
            order = np.argsort(wanted)  # neighbours are looked up one after the other, on the same pages
            places = np.empty(len(wanted), np.int64)
            places[order] = np.searchsorted(self.rows["key"], wanted[order])
            there = places < len(self.rows)
            there[there] = self.rows["key"][places[there]] == wanted[there]
            yield places, there

    def record(self, key: bytes) -> Iterator[tuple[Shard, Lying]]:
        """Where a record's tensors lie, all in one shard; nothing if it is not there.

        Raises Damaged if the table cannot be true.
        """
        self.touch()
        assert len(key) == KEY_BYTES, f"a key of {len(key)} bytes"
        wanted = np.array(key, ROW["key"])
        first, end = (int(np.searchsorted(self.rows["key"], wanted, side)) for side in ("left", "right"))
        rows = self.rows[first:end]
        rows = rows[rows["shard"] == rows["shard"][:1]]
        for _, offset, shape, shard, name, dtype, dims in rows.tolist():
            if shard >= len(self.shards) or name >= len(self.names) or dtype >= len(DTYPES) or dims > 4:
                raise Damaged(f"a row of {key.hex()} in {self.stem}")
            # As Python's numbers: the product of numpy's would wrap at 4 GiB.
            tensor = Lying(key, self.names[name], dtype, tuple(shape[:dims].tolist()), offset)
            if offset + nbytes(tensor) > self.shards[shard].size:
                raise Damaged(f"the place of {key.hex()} in {self.stem}")
            yield self.shards[shard], tensor

    def remove(self) -> None:
        """Take its files away; who has them open keeps them."""
        for ending in (".json", ".npy"):
            (self.folder / f"{self.stem}{ending}").unlink(missing_ok=True)


def empty(folder: Path) -> Table:
    """The table of no shards."""
    return Table(folder, [], np.empty(0, ROW), 0)


def load(folder: Path, stem: str) -> Table | None:
    """A table that lies there; None if there is none, or it is damaged or of another version."""
    try:
        facts = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        shards = [Shard(name, size, rows, tuple(names)) for name, size, rows, names in facts["shards"]]
        rows: Any = np.load(folder / f"{stem}.npy", mmap_mode="r", allow_pickle=False)
        table = Table(folder, shards, np.asarray(rows), int(facts["records"]))
        good = facts["version"] == VERSION and table.stem == stem
        good = good and rows.dtype == ROW and rows.shape == (sum(shard.rows for shard in shards),)
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not good:
        return None
    table.touch()
    return table


def newest(folder: Path) -> Table:
    """The table that was used last; an empty one where there is none."""
    stems = []
    for path in folder.glob("table-*.npy"):
        with suppress(OSError):
            stems.append((path.stat().st_mtime, path.stem))
    found = (load(folder, stem) for _, stem in sorted(stems, reverse=True))
    return next((table for table in found if table is not None), empty(folder))


def retire(folder: Path, current: str) -> None:
    """Remove the tables that are not the current one and that nobody has used for an hour."""
    for path in folder.glob("table-*"):
        with suppress(OSError):
            data = path.with_suffix(".npy")
            last = data if data.exists() else path
            if path.stem != current and time.time() - last.stat().st_mtime > LEASE:
                path.unlink()
