"""Images and captions in the columns of tables: what parquet files and the package `datasets` share."""

import io
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from sfumato.data.sources import Entry, Source, Span
from sfumato.data.sources.files import below, inside, open_file, present
from sfumato.data.sources.texts import Texts, Unusable, of_row, shown
from sfumato.errors import UserError

IMAGE, HINT = 0, 1
"""What a span's length says here: which of a row's images it is. Its start is the row's number."""
ROWS = 64  # that are read at once; their images may be among them

BYTES = {"binary": pa.binary(), "large_binary": pa.large_binary(), "binary_view": pa.large_binary()}
TEXT = {"string", "large_string", "string_view"}

Cell = bytes | str | None
"""What a cell holds: a file's bytes (or some, to say that they are there), a path, or neither."""


class Table(Source):
    """Rows that hold an image, or the path of one below the place."""

    place: Path
    roots: tuple[Path, ...] = ()
    """Folders below which absolute paths are allowed."""

    @abstractmethod
    def cell(self, file: str, row: int, column: str) -> Any:
        """What a cell holds."""

    def column(self, which: int) -> str:
        """The name of the column of an image or a conditioning image."""
        name = self.layout.image_column if which == IMAGE else self.layout.conditioning_column
        assert name is not None, "a conditioning image is asked for that no setting names"
        return name

    def text_columns(self, columns: Sequence[str]) -> list[str]:
        """The columns of captions and weights. Raises UserError if a column that is wanted is not there."""
        layout, texts = self.layout, []
        for setting in ("image_column", "caption_column", "caption_weight_column", "conditioning_column"):
            name = getattr(layout, setting)
            if name is None or (
                setting == "caption_column" and layout.prompt is not None and name not in columns
            ):
                continue
            if name not in columns:
                raise UserError(
                    f'data.{setting} = "{name}" in {layout.source}',
                    f"the columns are {', '.join(columns)}",
                    f"set data.{setting} to one of them",
                )
            if setting.startswith("caption"):
                texts.append(name)
        return texts

    def told(self, file: str, first: int, count: int, columns: dict[str, Any], stamp: str) -> Iterator[Entry]:
        """The entries of `count` rows from `first` on.

        columns: arrow arrays by name; an image's that is not among them holds bytes in every row.
        """
        texts = {name: column.to_pylist() for name, column in columns.items() if name in self.texts_names()}
        wanted = (self.layout.image_column, self.layout.conditioning_column)
        images = [cells(columns[name]) if name in columns else [b"?"] * count for name in wanted if name]
        for n in range(count):
            name = self.row_name(file, first + n)
            spans = [Span(file, first + n, which) for which in range(len(images))]
            try:
                stamps = [self.there(each[n], which) for which, each in enumerate(images)]
                read = self.texts({name: values[n] for name, values in texts.items()})
            except Unusable as error:
                yield Entry(name, spans[0], fault=str(error))
            else:
                hint = spans[1] if len(spans) > 1 else None
                yield Entry(name, spans[0], read.captions, read.weights, hint, " ".join([stamp, *stamps]))

    def texts_names(self) -> tuple[str | None, ...]:
        """The columns that may hold texts."""
        return self.layout.caption_column, self.layout.caption_weight_column

    def row_name(self, file: str, row: int) -> str:
        """What messages call a row."""
        return f"row {row} of {file}"

    def texts(self, row: dict[str, Any]) -> Texts:
        """The captions of a row. Raises Unusable."""
        found = of_row(row, self.layout)
        if found.captions or self.layout.prompt is not None:
            return found if found.captions else Texts((self.layout.prompt or "",))
        raise Unusable(f'no caption: "{self.layout.caption_column}" is empty, and data.prompt is not set')

    def there(self, cell: Cell, which: int) -> str:
        """The stamp of a file that a cell names, "" for bytes. Raises Unusable."""
        if isinstance(cell, str):
            folder, file = self.located(cell)
            return present(folder, file)
        if not cell:
            raise Unusable(f'no image: "{self.column(which)}" holds neither bytes nor a path')
        return ""

    def located(self, path: Any) -> tuple[Path, str]:
        """The folder and the path in it of a file that a cell names. Raises Unusable if it may not."""
        if isinstance(path, str) and os.path.isabs(path):
            real = os.path.normpath(path)
            for root in self.roots:
                if real.startswith(str(root).rstrip(os.sep) + os.sep):
                    return root, os.path.relpath(real, root)
        return self.place, inside("", path)

    def open(self, span: Span) -> BinaryIO:
        where = self.row_name(span.file, span.start)
        assert span.length in (IMAGE, HINT), f"{where}: no image is number {span.length} of a row"
        cell = self.cell(span.file, span.start, self.column(span.length))
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes) and data:
            return io.BytesIO(data)
        try:
            folder, file = self.located(path)
        except Unusable as error:
            raise UserError(
                f"the image of {where}", str(error), "fill the cell, or take the row away"
            ) from None
        return open_file(below(folder, file))


def cells(column: Any) -> list[Cell]:
    """What each cell of an arrow array holds; of bytes only whether there are some."""
    if pa.types.is_struct(column.type):
        names = [column.type.field(n).name for n in range(column.type.num_fields)]
        parts = [cells(pc.struct_field(column, name)) for name in ("bytes", "path") if name in names]
        return [next(filter(None, each), None) for each in zip(*parts, strict=True)]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = str(column.type)
    if kind in BYTES:
        return [b"?" if length else None for length in pc.binary_length(column.cast(BYTES[kind])).to_pylist()]
    return list(column.to_pylist()) if kind in TEXT else [None] * len(column)


def unread(where: str, error: Exception) -> UserError:
    """The error for a table that cannot be read."""
    found = f"it cannot be read: {type(error).__name__}: {shown(' '.join(str(error).split()))}"
    return UserError(where, found, "fetch or save it anew")
