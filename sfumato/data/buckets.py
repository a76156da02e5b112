"""Buckets: which records are trained on at which size, and what the order's numbers mean.

A bucket is one size of one base resolution. Its records of one part of the data are a cell; the order counts
in cells, and a memory-mapped file says which records they hold. Sizes are (height, width) in pixels.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sfumato.config import Data
from sfumato.data.aspects import assign, merged, reason, sizes, targets
from sfumato.errors import UserError

__all__ = ["Cells", "Described", "assign", "reason", "sizes", "targets"]

FORMAT = 1
CHUNK = 2**18  # records at a time: about 50 MB
SHARE = 2**20  # shares are summed as whole numbers of 1 / SHARE, so that their order is of no matter
SIDE = 2**20  # more than any side
STALE = 86400.0  # seconds; nothing is built for so long
NONE = np.zeros(0, np.int64)


class Described(NamedTuple):
    """A bucket for people; cropped is the mean share of a picture that is cut away."""

    height: int
    width: int
    records: int
    cropped: float


class Cells:
    """Which records the cells hold, on disk. Cheap to pickle: the memory map is opened again."""

    sizes: list[tuple[int, int]]
    """(height, width) of each bucket."""
    resolution: list[int]
    """Which of data.resolutions each bucket is of."""
    counts: np.ndarray
    """(buckets, parts) int64: how many records a cell holds."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if the folder is not whole."""
        self.folder = folder
        try:
            facts = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
            self.counts = np.load(folder / "counts.npy")
            length = (folder / "members").stat().st_size
        except (OSError, ValueError) as error:
            raise broken(folder, str(error)) from None
        self.sizes = [(height, width) for height, width in facts["sizes"]]
        self.resolution, self.resolutions = facts["resolution"], facts["resolutions"]
        self.cropped, self.dtype = facts["cropped"], np.dtype(facts["dtype"])
        ends = np.cumsum(self.counts).reshape(self.counts.shape)
        self.starts = ends - self.counts
        if length != ends[-1, -1] * self.dtype.itemsize:
            raise broken(folder, f"members has {length} bytes, not {ends[-1, -1] * self.dtype.itemsize}")
        self.members = np.memmap(folder / "members", self.dtype, "r")

    @staticmethod
    def open(folder: Path) -> "Cells":
        """The cells that `build` made; folder is theirs. Raises UserError if they are not whole."""
        return Cells(folder)

    @staticmethod
    def build(
        folder: Path,
        data: Data,
        sizes: np.ndarray,
        part: np.ndarray,
        parts: int,
        chunk: int = CHUNK,
        without: np.ndarray = NONE,
    ) -> "Cells":
        """Make the cells of these settings in a folder of their own below `folder`, or open them.

        sizes: (N, 2), height and width. part: (N,), < parts. Both are files that are replaced, never changed;
        of arrays in memory only the length is looked at to tell whether finished cells are theirs.
        without: (k,) int64, ascending: numbers of records that are left out of all cells.
        Raises UserError if no record has a bucket, or if they cannot be written.
        """
        assert len(sizes) == len(part) > 0, f"{len(sizes)} sizes, {len(part)} parts of records"
        settings = data.buckets.model_dump(mode="json") if data.buckets else None
        files = [array.filename for array in (sizes, part) if isinstance(array, np.memmap) and array.filename]
        made = [os.stat(file).st_mtime_ns for file in files]
        told = json.dumps([FORMAT, data.resolutions, settings, len(sizes), parts, made])
        if len(without):
            told += hashlib.sha256(without.tobytes()).hexdigest()
        name = f"cells-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        if (folder / name).is_dir():
            return Cells(folder / name)
        for old in folder.glob(f".{name}-*.part"):
            if time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
        draft = folder / f".{name}-{uuid.uuid4().hex}.part"
        try:
            draft.mkdir()
            Draft(draft, data, sizes, part, parts, chunk, without).write()
            draft.rename(folder / name)
        except OSError as error:
            # Another process may have been faster; its cells are the same.
            if not (folder / name).is_dir():
                found = str(error)
                raise UserError(
                    f"room for the buckets in {folder}", found, "free or move data.store"
                ) from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return Cells(folder / name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cells, (self.folder,)

    @property
    def unplaced(self) -> np.ndarray:
        """The numbers of the records without any bucket, ascending; read anew from disk."""
        return np.fromfile(self.folder / "unplaced", self.dtype)

    def record(self, bucket: int, part: np.ndarray, member: np.ndarray) -> np.ndarray:
        """The record numbers (B,) int64 of members (B,) of parts (B,)."""
        inside = (member >= 0) & (member < self.counts[bucket, part])
        assert inside.all(), f"bucket {bucket} has no members {member[~inside]} of parts {part[~inside]}"
        return self.members[self.starts[bucket, part] + member].astype(np.int64)

    def visits(self, bucket: int, visit: np.ndarray) -> np.ndarray:
        """A record's visits (B,) from those in one bucket: no two of all its buckets are the same."""
        return visit * self.resolutions + self.resolution[bucket]

    def describe(self) -> list[Described]:
        """The buckets for people."""
        records = self.counts.sum(1).tolist()
        shares = [cut / SHARE / held for cut, held in zip(self.cropped, records, strict=True)]
        return [Described(*row) for row in zip(*zip(*self.sizes, strict=True), records, shares, strict=True)]


class Draft:
    """Writes the cells of some settings into an empty folder, in two walks through the records."""

    def __init__(
        self,
        folder: Path,
        data: Data,
        sizes: np.ndarray,
        part: np.ndarray,
        parts: int,
        chunk: int,
        without: np.ndarray,
    ) -> None:
        self.folder, self.data, self.sizes, self.part, self.parts = folder, data, sizes, part, parts
        self.chunk, self.without = chunk, without
        self.dtype = np.dtype("<u4" if len(sizes) <= 2**32 else "<u8")
        self.buckets: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each resolution: the codes of the sizes that records have, ascending, and their buckets."""

    def write(self) -> None:
        """Write everything. Raises UserError if no record has a bucket."""
        held = self.count()
        shapes: list[tuple[int, int]] = []
        resolution: list[int] = []
        for number, cells in enumerate(held):
            totals = Counter[int]()
            for (code, _), records in cells.items():
                totals[code] += records
            codes = sorted(totals)
            among = [divmod(code, SIDE) for code in codes]
            goes = merged(among, [totals[code] for code in codes], self.data.buckets)
            left = sorted(set(goes))
            self.buckets.append((np.array(codes, np.int64), len(shapes) + np.searchsorted(left, goes)))
            shapes += [among[bucket] for bucket in left]
            resolution += [number] * len(left)
        if not shapes:
            found = f"{reason(self.data)}, in all of them"
            raise UserError(
                f"buckets for {len(self.sizes):,} pictures", found, "lower it, or allow upscaling"
            )
        counts = np.zeros((len(shapes), self.parts), np.int64)
        for cells, (known, buckets) in zip(held, self.buckets, strict=True):
            for (code, part), records in cells.items():
                counts[buckets[np.searchsorted(known, code)], part] += records
        np.save(self.folder / "counts.npy", counts)
        facts = {
            "sizes": shapes,
            "resolution": resolution,
            "resolutions": len(held),
            "cropped": self.place(counts, np.array(shapes)),
            "dtype": self.dtype.str,
        }
        (self.folder / "cells.json").write_text(json.dumps(facts), encoding="utf-8")
        for path in self.folder.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The records in turn: the first one's number, pictures' sizes (n, 2) and parts (n,), both int64."""
        for start in range(0, len(self.sizes), self.chunk):
            pictures = np.asarray(self.sizes[start : start + self.chunk]).astype(np.int64)
            part = np.asarray(self.part[start : start + self.chunk]).astype(np.int64)
            assert pictures.min() > 0 and pictures.max() < SIDE, (
                f"sizes {pictures.min()} to {pictures.max()} from {start} on"
            )
            assert part.max() < self.parts, f"part {part.max()} of {self.parts} from {start} on"
            yield start, pictures, part

    def coded(self, start: int, pictures: np.ndarray, base: int) -> np.ndarray:
        """What `pictures` (n, 2) are trained at, as height * SIDE + width (n,); 0: no bucket."""
        found = targets(pictures[:, 0], pictures[:, 1], self.data, base)
        code = found[:, 0] * SIDE + found[:, 1]
        code[self.left_out(start, len(pictures))] = 0
        return code

    def left_out(self, start: int, count: int) -> np.ndarray:
        """Which of `count` records from `start` on are in no cell by wish, counted from there."""
        first, end = np.searchsorted(self.without, [start, start + count])
        return self.without[first:end] - start

    def count(self) -> list[Counter[tuple[int, int]]]:
        """The records of each (code of a size, part), for each resolution."""
        held = [Counter[tuple[int, int]]() for _ in self.data.resolutions]
        for start, pictures, part in self.chunks():
            for cells, base in zip(held, self.data.resolutions, strict=True):
                code = self.coded(start, pictures, base)
                pairs, records = np.unique((code * self.parts + part)[code > 0], return_counts=True)
                for pair, number in zip(pairs.tolist(), records.tolist(), strict=True):
                    cells[divmod(pair, self.parts)] += number
        return held

    def place(self, counts: np.ndarray, shapes: np.ndarray) -> list[int]:
        """Write each cell's records, ascending; returns each bucket's sum of the shares cut away."""
        ends = np.cumsum(counts)
        free = (ends - counts.ravel()).tolist()  # each cell's next place
        cropped = np.zeros(len(shapes), np.int64)
        with (self.folder / "members").open("wb") as members, (self.folder / "unplaced").open("wb") as others:
            for start, pictures, part in self.chunks():
                lost = np.ones(len(pictures), bool)
                for base, (codes, buckets) in zip(self.data.resolutions, self.buckets, strict=True):
                    code = self.coded(start, pictures, base)
                    rows = np.flatnonzero(code)
                    lost[rows] = False
                    bucket = buckets[np.searchsorted(codes, code[rows])]
                    aspect = pictures[rows, 0] * shapes[bucket, 1] / (pictures[rows, 1] * shapes[bucket, 0])
                    cut = np.rint((1 - np.minimum(aspect, 1 / aspect)) * SHARE).astype(np.int64)
                    np.add.at(cropped, bucket, cut)
                    cell = bucket * self.parts + part[rows]
                    order = np.argsort(cell, kind="stable")
                    for run in np.split(order, np.flatnonzero(np.diff(cell[order])) + 1):
                        if len(run):
                            members.seek(free[cell[run[0]]] * self.dtype.itemsize)
                            members.write((start + rows[run]).astype(self.dtype).tobytes())
                            free[cell[run[0]]] += len(run)
                lost[self.left_out(start, len(pictures))] = False
                others.write((start + np.flatnonzero(lost)).astype(self.dtype).tobytes())
        assert free == ends.tolist(), "the records of a second walk are not those of the first"
        return cropped.tolist()


def broken(folder: Path, found: str) -> UserError:
    return UserError(f"the buckets in {folder}", found, "delete that folder; the next start makes it again")
