"""The files of an index while it is made: a stream into a hidden folder, whatever the number of records."""

import hashlib
import json
import os
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.data.index.shelf import FACTS, FORMAT, PROGRESS
from sfumato.data.sources import Entry, Span
from sfumato.errors import UserError

BEAT = 5.0  # seconds between two signs of life
HEADER = 128  # bytes of a .npy file before its rows
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "offsets": ("<u8", ()),
    "sizes": ("<u4", (2,)),
    "part": ("<u2", ()),
    "keys": ("<u8", (2,)),
    "digests": ("|u1", (16,)),
}
MOST_PARTS = 2**16
COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Rows:
    """A .npy file that grows by rows; only its end says how many there are."""

    def __init__(self, path: Path, dtype: str, width: tuple[int, ...]) -> None:
        self.dtype, self.width, self.file = np.dtype(dtype), width, path.open("wb")
        self.write_header(0)

    def write_header(self, rows: int) -> None:
        """NumPy's own header, padded to a length that does not depend on the number of rows."""
        told = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.width)}
        text = repr(told).ljust(HEADER - 11) + "\n"
        self.file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii"))

    def finish(self) -> None:
        """Write the number of rows at the front."""
        row = self.dtype.itemsize * int(np.prod(self.width, dtype=int))
        rows, rest = divmod(self.file.tell() - HEADER, row)
        assert not rest, f"{self.file.name} ends within a row"
        self.file.seek(0)
        self.write_header(rows)


@dataclass
class PartCount:
    """The records of one group of one layout."""

    layout: int
    group: str
    repeats: int
    number: int
    """Its place among all parts."""
    count: int = 0
    faults: int = 0


@dataclass
class Draft:
    """An index that is being made, in a hidden folder."""

    folder: Path
    digests: bool
    parts: dict[tuple[int, str], PartCount] = field(default_factory=dict)
    records: int = 0
    passing: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.rows = {
            name: Rows(self.folder / f"{name}.npy", *form)
            for name, form in COLUMNS.items()
            if self.digests or name != "digests"
        }
        self.text, self.list = ((self.folder / f"{name}.jsonl").open("wb") for name in ("records", "faults"))
        self.progress = (self.folder / PROGRESS).open("wb", buffering=0)
        self.total, self.end = hashlib.sha256(), 0
        self.rows["offsets"].file.write(struct.pack("<Q", self.end))
        self.beaten = -BEAT
        self.beat()

    @property
    def files(self) -> list[Any]:
        """Every open file but that of the progress."""
        return [self.text, self.list, *(rows.file for rows in self.rows.values())]

    def beat(self) -> None:
        """A sign of life, at most every BEAT seconds: what it counts is on the disk, for whoever follows."""
        if (now := time.monotonic()) - self.beaten < BEAT:
            return
        self.flush()
        told = f"{self.records} records process {os.getpid()} of {socket.gethostname()}"
        os.pwrite(self.progress.fileno(), told.ljust(200).encode() + b"\n", 0)
        self.beaten = now

    def flush(self) -> None:
        """Put all that was written on the disk."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())

    def part_of(self, layout: int, entry: Entry) -> PartCount:
        """An entry's part, a new one if it is the first of it."""
        key = layout, entry.group
        if key not in self.parts:
            if len(self.parts) == MOST_PARTS:
                do = "join some of them, or unset folder_repeats"
                raise UserError("an index", f"the data has more than {MOST_PARTS:,} parts", do)
            self.parts[key] = PartCount(layout, entry.group, entry.repeats, len(self.parts))
        part = self.parts[key]
        assert part.repeats == entry.repeats > 0, f"{entry.name}: {entry.repeats} repeats, not {part.repeats}"
        return part

    def set_aside(self, layout: int, entry: Entry, reason: str, passing: bool) -> None:
        """Write a fault; one that may pass with the spans of its files, to try them again."""
        part = self.part_of(layout, entry)
        part.faults += 1
        self.passing += passing
        spans = [packed(entry.image), packed(entry.hint)] if passing else None
        self.list.write(line([entry.name, reason, part.number, spans]))

    def add(self, layout: int, entry: Entry, key: bytes, size: tuple[int, int], digest: bytes) -> None:
        """Write a record. size: height and width."""
        part = self.part_of(layout, entry)
        weights = [float(weight) for weight in entry.weights]
        text = line([entry.name, packed(entry.image), entry.captions, weights, packed(entry.hint)])
        told = {"sizes": struct.pack("<II", *size), "part": struct.pack("<H", part.number)}
        self.total.update(text + told["sizes"] + told["part"])
        self.end += len(text)
        told |= {"keys": key, "digests": digest, "offsets": struct.pack("<Q", self.end)}
        self.text.write(text)
        for name, rows in self.rows.items():
            rows.file.write(told[name])
        part.count += 1
        self.records += 1

    def finish(self) -> None:
        """Write what the index is as a whole; it can then be published."""
        for rows in self.rows.values():
            rows.finish()
        self.beaten = -BEAT
        self.beat()
        facts = {
            "format": FORMAT,
            "records": self.records,
            "faults": sum(part.faults for part in self.parts.values()),
            "passing": self.passing,
            "content": self.total.hexdigest(),
            "parts": [vars(part) for part in self.parts.values()],
        }
        with (self.folder / FACTS).open("wb") as file:
            file.write(json.dumps(facts, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; what stands in them, finished or not, is there for whoever follows."""
        self.beaten = -BEAT
        with suppress(OSError):  # a full disk is told by what met it first
            self.beat()
        for file in (*self.files, self.progress):
            file.close()


def packed(span: Span | None) -> str | list[str | int] | None:
    """A span as it is written: the name of a whole file, or file, start and length."""
    if span is None:
        return None
    return span.file if (span.start, span.length) == (0, -1) else [span.file, span.start, span.length]


def unpacked(told: Any) -> Span | None:
    """The span that `packed` wrote."""
    return None if told is None else Span(told) if isinstance(told, str) else Span(*told)


def line(values: list[Any]) -> bytes:
    """One line of compact JSON; lone surrogates, which file names may hold, come back as they were."""
    return (COMPACT.encode(values) + "\n").encode("utf-8", "surrogatepass")


def unline(told: bytes) -> Any:
    """What `line` wrote."""
    return json.loads(told.decode("utf-8", "surrogatepass"))
