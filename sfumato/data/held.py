"""The records that validation looks at, which no step trains on: a pure function of the data's names.

They are those whose names have the smallest hashes, among the records that have a bucket. So neither seed nor
order nor number of ranks moves them, and where records are added to the data, one that was trained on is
never held out thereby. Imports no torch.
"""

import hashlib
import heapq
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sfumato.config import Data, Validation
from sfumato.data.aspects import targets
from sfumato.data.buckets import CHUNK, NONE
from sfumato.data.index import Index, located, open_index
from sfumato.data.sources.tars import damage
from sfumato.errors import UserError

FORMAT = 1
"""Another number when the same data give other records."""


class Point(NamedTuple):
    """A record and a noise level, by their places among those of the validation."""

    record: int
    level: int


@dataclass(frozen=True)
class Held:
    """Records that are looked at and never trained on, in the order of their names' hashes."""

    data: Data
    """Of the index."""
    index: Index
    numbers: np.ndarray
    """(k,) int64: which records of the index they are."""
    keys: np.ndarray
    """(k,) uint64: the hash of each name, which names its random numbers."""
    sizes: np.ndarray
    """(k, 2) int64: the height and width that each is looked at."""
    out_of: Index | None
    """The index of the training data, where they are taken out of it; None: their source is their own."""

    @property
    def left_out(self) -> np.ndarray:
        """The numbers of the training data's records that are in no cell, ascending."""
        return NONE if self.out_of is None else np.sort(self.numbers)

    @property
    def name(self) -> str:
        """Of the training data without them: more than the index's fingerprint."""
        told = [str(number) for number in self.left_out.tolist()]
        return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16] if told else ""

    def groups(self, levels: int, most: int) -> list[list[Point]]:
        """Every record at every level, in forward passes of at most `most`, each of pictures of one size."""
        sizes = [tuple(size) for size in self.sizes.tolist()]
        order = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
        found: list[list[Point]] = []
        for _, alike in groupby(order, key=lambda place: sizes[place]):
            points = [Point(place, level) for place in alike for level in range(levels)]
            found += [points[first : first + most] for first in range(0, len(points), most)]
        return found


def left_out(held: Held | None) -> np.ndarray:
    """The numbers of the training data's records that are in no cell, ascending."""
    return NONE if held is None else held.left_out


def held_out(
    asked: Validation | None, data: Data, index: Index, verify: bool, tell: Callable[[str], None] | None
) -> Held | None:
    """The records of a validation, if one is asked for. data, index: what is trained on.

    verify, tell: see open_index. Raises UserError if there are too few of them, and where their source is the
    data's.
    """
    if asked is None:
        return None
    if asked.source is None:
        return chosen(asked, data, index, index)
    check_apart(asked.source, data)
    own = own_data(asked.source, data)
    try:
        found = open_index(own, verify=verify, tell=tell)
        check_faults(found, own)
    except UserError as error:
        said = error.asked.replace("data.source", "validation.source")
        raise UserError(said, error.found, error.do) from error
    return chosen(asked, own, found, None)


def check_faults(index: Index, data: Data) -> None:
    """Raise UserError if more records, or more shards, are of no use than data.max_faults allows."""
    index.check_faults(data)
    damaged = damage(index.sources, index.fault_lines())
    if damaged and (refused := damaged.refusal(data.max_faults)):
        raise refused


def own_data(source: str, data: Data) -> Data:
    """The data of a validation with a source of its own, told apart as those that are trained on are."""
    return data.model_copy(update={"source": source, "parts": (), "prior": None})


def chosen(asked: Validation, data: Data, index: Index, out_of: Index | None) -> Held:
    """Those of an index, found once and then read from its folder."""
    shape = data.buckets.model_dump(mode="json") if data.buckets else None
    told = json.dumps([FORMAT, asked.samples, max(data.resolutions), shape, index.prior])
    path = index.folder / f"held-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = look(asked.samples, data, index)
        publish(path, json.dumps(facts))
    rows, usable = facts["rows"], facts["usable"]
    if 2 * len(rows) > usable if out_of is not None else not rows:
        where = asked.source or ", ".join(layout.source for layout in data.layouts)
        do = f"set validation.samples = {usable // 4 or 1}, or " if usable > 1 and out_of else ""
        raise UserError(
            f"validation.samples = {asked.samples} of {where}",
            f"{usable:,} records have a size there" + (", at most half of which are held out" * bool(out_of)),
            f"{do}name a place of their own in validation.source",
        )
    keys, numbers = (np.array([row[place] for row in rows], kind) for place, kind in enumerate(KINDS))
    heights, widths = index.sizes[numbers].astype(np.int64).T
    sizes = targets(heights, widths, data, max(data.resolutions))
    return Held(data, index, numbers, keys, sizes, out_of)


KINDS = (np.uint64, np.int64)


def look(count: int, data: Data, index: Index) -> dict[str, object]:
    """Hash and number of the records to take, and how many could be."""
    usable = 0

    def candidates() -> Iterator[tuple[int, int]]:
        nonlocal usable
        for first in range(0, len(index), CHUNK):
            heights, widths = np.asarray(index.sizes[first : first + CHUNK]).astype(np.int64).T
            fits = targets(heights, widths, data, max(data.resolutions)).all(1)
            fits &= np.asarray(index.part[first : first + CHUNK]) != index.prior
            for number in (first + np.flatnonzero(fits)).tolist():
                usable += 1
                yield hash_of(index.name(number)), number

    rows = heapq.nsmallest(count, candidates())
    return {"rows": rows, "usable": usable}


def hash_of(name: str) -> int:
    """A number in [0, 2**64) from a record's name."""
    told = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def publish(path: Path, text: str) -> None:
    """Write a file that others may read or write at the same time; one that cannot be written is not kept."""
    part = path.with_name(f".{path.name}-{uuid.uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)


def check_apart(source: str, data: Data) -> None:
    """Raise UserError where a validation's source is one that is trained on, lies within it or around it."""
    mine = real(source)
    for layout in data.layouts:
        theirs = real(layout.source)
        if f"{mine}/".startswith(f"{theirs}/") or f"{theirs}/".startswith(f"{mine}/"):
            raise UserError(
                f'validation.source = "{source}"',
                f'it is not apart from the data that are trained on, "{layout.source}"',
                "move it to a place outside, or unset it: then records are held out of the data",
            )


def real(source: str) -> str:
    """Where a source lies in truth: without links, and without a slash at its end."""
    place = located(os.path.expanduser(source))
    return os.path.realpath(place) if os.path.isabs(place) else place.rstrip("/")
