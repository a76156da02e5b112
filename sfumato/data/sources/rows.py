"""The rows of a list: objects of a .jsonl file, or lines of a .csv file under the names of its first."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sfumato.data.sources.files import open_file, suffix
from sfumato.data.sources.texts import shown
from sfumato.errors import UserError

LONGEST = 2**24  # bytes of a line


@dataclass(frozen=True)
class Row:
    """One row, and where in the file it begins."""

    number: int
    """Of its first line, from 1, or from where reading began."""
    offset: int
    """In bytes."""
    values: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    """Why it could not be read."""


class Lines:
    """The lines of a text file, and how far it has been read."""

    def __init__(self, file: BinaryIO, name: str, offset: int = 0) -> None:
        self.file, self.name, self.offset, self.number = file, name, offset, 0
        file.seek(offset)

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        """Raises UnicodeDecodeError, having read the line, and UserError for one that is too long."""
        line = self.file.readline(LONGEST)
        if not line:
            raise StopIteration
        encoding = "utf-8" if self.offset else "utf-8-sig"
        self.offset += len(line)
        self.number += 1
        if len(line) == LONGEST and not line.endswith(b"\n"):
            where = f"line {self.number} of {shown(self.name)}"
            raise UserError(where, f"longer than {LONGEST:,} bytes", "write one record a line")
        return line.decode(encoding)


class Rows:
    """A list file's rows, one by one."""

    def __init__(self, place: Path, name: str) -> None:
        """name is relative to the place. Raises UserError if a .csv file has no line."""
        self.path, self.name, self.csv = place / name, name, suffix(name) == ".csv"
        self.columns: list[str] = []
        if self.csv:
            with self.opened() as file:
                self.columns = next(iter(self.cells(Lines(file, name))), Row(1, 0)).values.get("", [])
            if not self.columns:
                asked = f"the names of columns in the first line of {self.path}"
                raise UserError(asked, "none that can be read", 'begin it with "file_name,text"')

    def opened(self) -> BinaryIO:
        """The file. Raises UserError if it cannot be read."""
        try:
            return open_file(self.path)
        except OSError as error:
            raise UserError(
                f"the list {self.path}", f"it cannot be read: {error}", "mend the file"
            ) from error

    def __iter__(self) -> Iterator[Row]:
        with self.opened() as file:
            yield from self.read(Lines(file, self.name))

    def at(self, offset: int) -> Row:
        """The row that begins at a byte."""
        with self.opened() as file:
            return next(self.read(Lines(file, self.name, offset)), Row(0, offset, fault="it is gone"))

    def read(self, lines: Lines) -> Iterator[Row]:
        """The rows from there on that hold something."""
        if not self.csv:
            yield from objects(lines)
            return
        header = lines.offset == 0
        for row in self.cells(lines):
            cells = row.values.get("", [])
            if row.fault:
                yield row
            elif header:
                header = False
            elif len(cells) != len(self.columns):
                fault = f"{len(cells)} cells under {len(self.columns)} columns"
                yield Row(row.number, row.offset, fault=fault)
            else:
                yield Row(row.number, row.offset, dict(zip(self.columns, cells, strict=True)))

    def cells(self, lines: Lines) -> Iterator[Row]:
        """The rows of a csv file, their cells under the key ""."""
        reader = csv.reader(lines, strict=True)
        while True:
            number, offset = lines.number + 1, lines.offset
            try:
                cells = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                yield Row(number, offset, fault=f"it is not UTF-8: {error.reason} at byte {error.start}")
            except csv.Error as error:
                yield Row(number, offset, fault=f"it is not csv: {error}")
            else:
                if cells:
                    yield Row(number, offset, {"": cells})


def objects(lines: Lines) -> Iterator[Row]:
    """The rows of a file with one JSON object a line."""
    while True:
        number, offset = lines.number + 1, lines.offset
        try:
            line = next(lines)
            if not line.strip():
                continue
            values = json.loads(line)
        except StopIteration:
            return
        except UserError:
            raise  # it is a ValueError too
        except UnicodeDecodeError as error:
            yield Row(number, offset, fault=f"it is not UTF-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            yield Row(number, offset, fault=f"it is not JSON: {shown(str(error))}")
        else:
            keyed = isinstance(values, dict)
            fault = "" if keyed else f"it is no object with keys: {shown(values)}"
            yield Row(number, offset, values if keyed else {}, fault)
