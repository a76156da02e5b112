"""Files of JSON lines that grow: each line is read once, and none that is torn."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK = 2**18  # bytes that are read at once
LONGEST = 2**24  # bytes of a line; of a longer one nothing is kept
LARGEST = 2**24  # bytes of a file that is read as a whole
KNOWN = 64  # bytes by which it is seen that a file only grew


class Growing:
    """A file of JSON objects, one a line, which another process may be writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = 0
        """Bytes that were read, up to the end of a line."""
        self.tail = b""
        """The last of them."""
        self.broken = 0
        """Lines that are no JSON object."""
        self.wrong = ""
        """Why the file cannot be read, if so."""

    def forget(self) -> None:
        """The file is another one: what was read of it counts no more."""
        self.place, self.tail, self.broken = 0, b"", 0

    def take(self, records: list[dict[str, Any]]) -> None:
        """Hear of the next records."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Read what is new; all of it anew where the file does not begin as it did. Never raises OSError."""
        self.wrong = ""
        try:
            with self.path.open("rb") as file:
                if not self.goes_on(file):
                    self.forget()
                file.seek(self.place)
                for block in self.blocks(file):
                    self.take(self.parsed(block))
                    time.sleep(0)  # others may want the interpreter more
        except FileNotFoundError:
            self.forget()
        except OSError as error:
            self.wrong = error.strerror or str(error)

    def goes_on(self, file: BinaryIO) -> bool:
        """Whether the file begins with what was read of it."""
        file.seek(max(0, self.place - KNOWN))
        return file.read(min(KNOWN, self.place)) == self.tail

    def blocks(self, file: BinaryIO) -> Iterator[bytes]:
        """Whole lines from where the last reading ended."""
        rest = b""
        while block := file.read(BLOCK):
            rest += block
            cut = rest.rfind(b"\n") + 1
            if not cut and len(rest) > LONGEST:
                cut = len(rest)
            if cut:
                self.place += cut
                self.tail = (self.tail + rest[max(0, cut - KNOWN) : cut])[-KNOWN:]
                yield rest[:cut]
                rest = rest[cut:]

    def parsed(self, block: bytes) -> list[dict[str, Any]]:
        """The objects of some lines."""
        lines = [line for line in block.decode("utf-8", "replace").split("\n") if line and not line.isspace()]
        try:
            # As one list they are read twice as fast as one by one.
            found = json.loads(f"[{','.join(lines)}]")
        except (ValueError, RecursionError):
            found = [parsed(line) for line in lines]
        good = [record for record in found if isinstance(record, dict)]
        self.broken += len(lines) - len(good)
        return good


class Rows(Growing):
    """All records of a short file, the newest MOST of them."""

    MOST = 5000

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.all: list[dict[str, Any]] = []
        self.count = 0

    def forget(self) -> None:
        super().forget()
        self.all, self.count = [], 0

    def take(self, records: list[dict[str, Any]]) -> None:
        self.all, self.count = [*self.all, *records][-self.MOST :], self.count + len(records)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is none that can be read."""
    try:
        if os.stat(path).st_size > LARGEST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parsed(line: str) -> Any:
    """What a line says; None if it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def column(values: Sequence[Any]) -> np.ndarray | None:
    """Values as float64 with nan for what is no number; None if none is."""
    kinds = set(map(type, values))
    if not kinds & {int, float}:
        return None
    if kinds <= {int, float, type(None)}:
        try:
            return np.array(values, np.float64)
        except OverflowError:
            pass
    return np.array([number(value) for value in values], np.float64)


def number(value: Any) -> float:
    """A value as a number; nan if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def step_of(record: dict[str, Any]) -> int | None:
    """The step of a record, None if it has none that a run can have."""
    step = record.get("step")
    good = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53
    return step if good else None
