"""Parquet files as the hub has them: one file, or a folder of them."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sfumato.config import Layout
from sfumato.data.sources import Entry, digest
from sfumato.data.sources.files import below, stamp_of, walk
from sfumato.data.sources.tables import BYTES, ROWS, Table, cells, unread
from sfumato.data.sources.texts import Unusable, shown
from sfumato.errors import UserError

ROOM = 512 * 2**20  # bytes of row groups that a process keeps


class Parquet(Table):
    """Rows of parquet files, in the order of the files' names.

    Images are read by row groups: a process keeps the last of them, up to ROOM bytes. Data larger than that
    is read faster from a folder saved by `datasets`, or from tar shards.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises UserError if there is no such file, for one that cannot be read, or lacks a column."""
        super().__init__(layout)
        self.place = Path(layout.source).expanduser()
        if self.place.is_file():
            self.place, self.files = self.place.parent, [self.place.name]
        else:
            files = (listing.path + name for listing, name in walk(self.place))
            self.files = for_training([file for file in files if file.endswith(".parquet")])
        if not self.files:
            raise UserError(f'data.source = "{layout.source}"', "no parquet file", "name another folder")
        self.text_columns(self.opened(self.files[0]).schema_arrow.names)
        self.forget()

    def forget(self) -> None:
        """Keep nothing in memory."""
        self.lock = Lock()
        self.ends: dict[str, list[int]] = {}
        """File -> the number of the row after each of its row groups."""
        self.kept: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        """File, row group and column -> its cells, the last that was used at the end."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("lock", "ends", "kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    def opened(self, file: str) -> pq.ParquetFile:
        """A file of this source. Raises UserError if it is not parquet."""
        try:
            return pq.ParquetFile(below(self.place, file))
        except (OSError, pa.ArrowException) as error:
            raise unread(f"the parquet file {self.place / file}", error) from error

    def stamp(self) -> str:
        return digest(self.stamps())

    def stamps(self) -> Iterator[tuple[str, str]]:
        """The files, and those that cells of their rows name."""
        for file in self.files:
            yield file, stamp_of(self.place / file)
            opened = self.opened(file)
            self.text_columns(opened.schema_arrow.names)
            for group in range(opened.num_row_groups):
                for name in self.to_read(opened, group):
                    yield from self.named(opened, group, name)

    def named(self, opened: pq.ParquetFile, group: int, name: str) -> Iterator[tuple[str, str]]:
        """Path and stamp of the files that the cells of an image column name; no image is read."""
        leaf = f"{name}.path" if pa.types.is_struct(opened.schema_arrow.field(name).type) else name
        if leaf == name and holds_bytes(opened.schema_arrow.field(name).type):
            return
        for batch in opened.iter_batches(ROWS, [group], [leaf], use_threads=False):
            for path in cells(batch.column(0)) if batch.num_columns else ():
                try:
                    folder, file = self.located(path)
                except Unusable:
                    continue
                yield file, stamp_of(folder / file)

    def entries(self) -> Iterator[Entry]:
        told = False
        for file in self.files:
            for entry in self.of_file(file):
                told = True
                yield entry
        if not told:
            asked = f'data.source = "{self.layout.source}"'
            raise UserError(asked, "parquet files without a row", "name another folder")

    def of_file(self, file: str) -> Iterator[Entry]:
        """The rows of one file. Raises UserError."""
        opened, stamp, row = self.opened(file), stamp_of(self.place / file), 0
        texts = self.text_columns(opened.schema_arrow.names)
        try:
            for group in range(opened.num_row_groups):
                columns = [*texts, *self.to_read(opened, group)]
                for batch in opened.iter_batches(ROWS, [group], columns, use_threads=False):
                    named = dict(zip(batch.schema.names, batch.columns, strict=True))
                    yield from self.told(file, row, batch.num_rows, named, stamp)
                    row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unread(f"the parquet file {self.place / file}", error) from error

    def to_read(self, opened: pq.ParquetFile, group: int) -> list[str]:
        """The image columns of which not every cell of a row group is known to hold bytes."""
        layout, found = self.layout, []
        facts = opened.metadata.row_group(group)
        leaves = {facts.column(n).path_in_schema: facts.column(n) for n in range(facts.num_columns)}
        for name in (layout.image_column, layout.conditioning_column):
            if name is None:
                continue
            leaf = leaves.get(f"{name}.bytes") or leaves.get(name)
            nulls = leaf.statistics.null_count if leaf is not None and leaf.statistics else None
            if nulls != 0 or not holds_bytes(opened.schema_arrow.field(name).type):
                found.append(name)
        return found

    def cell(self, file: str, row: int, column: str) -> Any:
        if file not in self.files:
            do = "make the index again"
            raise UserError(f"the file {shown(file)}", f"it is none of {self.layout.source}", do)
        with self.lock:
            if file not in self.ends:
                facts = self.opened(file).metadata
                rows = (facts.row_group(group).num_rows for group in range(facts.num_row_groups))
                self.ends[file] = list(accumulate(rows))
            ends = self.ends[file]
            group = bisect_right(ends, row)
            if group == len(ends):
                do = "make the index again"
                raise UserError(self.row_name(file, row), f"the file has {ends[-1] if ends else 0} rows", do)
            return self.column_of(file, group, column)[row - (ends[group - 1] if group else 0)].as_py()

    def column_of(self, file: str, group: int, column: str) -> pa.ChunkedArray:
        """A column of a row group. Raises UserError."""
        key = file, group, column
        if key not in self.kept:
            try:
                # In batches: arrow reads no structs of more than 2 GB at once.
                batches = self.opened(file).iter_batches(ROWS, [group], [column], use_threads=False)
                self.kept[key] = pa.chunked_array([batch.column(0) for batch in batches])
            except (OSError, pa.ArrowException) as error:
                raise unread(f"row group {group} of {self.place / file}", error) from error
            while len(self.kept) > 1 and sum(each.nbytes for each in self.kept.values()) > ROOM:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


def for_training(files: list[str]) -> list[str]:
    """Of these files those of a path "train...", if there are such."""
    train = [file for file in files if any(part.startswith("train") for part in PurePosixPath(file).parts)]
    return train or files


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether the cells of a type are bytes, or bytes with a path."""
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and holds_bytes(kind.field(at).type)
    return str(kind) in BYTES
