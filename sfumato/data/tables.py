"""Pictures and captions in the columns of tables: parquet files, a folder saved by `datasets`, the hub."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from sfumato.config import Data
from sfumato.data.sources import Source, decode, digest, need_captions, read_captions
from sfumato.errors import UserError

ROOM = 512 * 2**20  # bytes of row groups that a process keeps


def need_columns(columns: list[str], data: Data) -> None:
    """Raise UserError, with the columns there are, unless image and caption are among them."""
    for setting, column in (("image_column", data.image_column), ("caption_column", data.caption_column)):
        if column not in columns:
            raise UserError(
                f'data.{setting} = "{column}" in {data.source}',
                f"the columns are {', '.join(columns)}",
                f"set data.{setting} to one of them",
            )


def picture(cell: Any, place: Path, name: str) -> Image.Image:
    """Decode a cell: the file's bytes, a struct of bytes and path, or a path in the data's folder."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, str):
        data, path = None, data
    if isinstance(data, bytes) and data:
        return decode(data, name)
    if isinstance(path, str):
        return decode(place / path, f"{name} ({path})")
    raise UserError(
        f"the image of {name}", "neither bytes nor a path in its cell", "fill the cell or take the row away"
    )


class Parquet(Source):
    """Rows of parquet files, in the order of the files' names.

    Parquet is read by row groups: a process keeps the last of them, up to ROOM bytes. Data larger than that
    is read faster from a folder saved by `datasets`.
    """

    def __init__(self, place: Path, files: list[str], data: Data) -> None:
        """Raises UserError for an unreadable file, a missing column, no rows, or a row without caption.

        files are relative to place.
        """
        self.place, self.column = place, data.image_column
        self.texts: list[list[str]] = []
        self.groups: list[tuple[str, int, int]] = []  # file, row group in it, number of the file's first row
        rows = []
        for file in files:
            opened = self.open(file)
            need_columns(opened.schema_arrow.names, data)
            self.groups += [(file, group, len(self.texts)) for group in range(opened.num_row_groups)]
            rows += [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            cells = opened.read(columns=[data.caption_column]).column(0).to_pylist()
            self.texts += [
                read_captions(cell, f"row {row} of {place / file}", data.caption_column)
                for row, cell in enumerate(cells)
            ]
        self.ends = list(accumulate(rows))
        if not self.texts:
            raise UserError(
                f'data.source = "{data.source}"', "parquet files without a row", "name another folder"
            )
        need_captions(
            [self.name(n) for n, texts in enumerate(self.texts) if not texts], len(self.texts), str(place)
        )
        sizes = [(file, (place / file).stat().st_size) for file in files]
        self.fingerprint = digest([self.column, *sizes, *self.texts])
        self.kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": OrderedDict()}

    def open(self, file: str) -> pq.ParquetFile:
        """A file of this source. Raises UserError if it is not parquet."""
        try:
            return pq.ParquetFile(self.place / file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"the parquet file {self.place / file}", f"it cannot be read: {error}", "fetch it anew"
            ) from error

    def __len__(self) -> int:
        return len(self.texts)

    def locate(self, index: int) -> tuple[int, int]:
        """The row group, counted over all files, and the row in it."""
        group = bisect_right(self.ends, index)
        return group, index - (self.ends[group - 1] if group else 0)

    def name(self, index: int) -> str:
        file, _, first = self.groups[self.locate(index)[0]]
        return f"row {index - first} of {self.place / file}"

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def image(self, index: int) -> Image.Image:
        group, row = self.locate(index)
        return picture(self.cells(group)[row].as_py(), self.place, self.name(index))

    def cells(self, group: int) -> pa.ChunkedArray:
        """The image column of a row group."""
        if group not in self.kept:
            file, number, _ = self.groups[group]
            try:
                self.kept[group] = (
                    self.open(file).read_row_group(number, [self.column], use_threads=False).column(0)
                )
            except (OSError, pa.ArrowException) as error:
                where = f"row group {number} of {self.place / file}"
                raise UserError(where, f"it cannot be read: {error}", "fetch the file anew") from error
            while len(self.kept) > 1 and sum(cells.nbytes for cells in self.kept.values()) > ROOM:
                self.kept.popitem(last=False)
        self.kept.move_to_end(group)
        return self.kept[group]


class Table(Source):
    """A `datasets.Dataset`, which lies on disk and is mapped into memory."""

    def __init__(self, dataset: Any, place: Path, data: Data) -> None:
        """Raises UserError for a missing column, no rows, or a row without caption."""
        datasets = the_library(data)
        need_columns(dataset.column_names, data)
        if not len(dataset):
            raise UserError(f'data.source = "{data.source}"', "a data set without a row", "name another")
        self.place, self.asked, self.column = place, data.source, data.image_column
        dataset = dataset.with_format(None)  # a saved one may turn its cells into arrays
        cells = dataset.select_columns([data.caption_column])[:][data.caption_column]
        self.texts = [
            read_captions(cell, self.name(row), data.caption_column) for row, cell in enumerate(cells)
        ]
        need_captions(
            [self.name(n) for n, texts in enumerate(self.texts) if not texts], len(self.texts), data.source
        )
        pictures = dataset.select_columns([data.image_column])
        if isinstance(pictures.features[data.image_column], datasets.Image):
            # Pillow decodes here, so that every source shows a picture in the same way.
            pictures = pictures.cast_column(data.image_column, datasets.Image(decode=False))
        self.rows = pictures
        self.fingerprint = digest([self.column, *sizes(pictures, self.column), *self.texts])

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, index: int) -> str:
        return f"row {index} of {self.asked}"

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def image(self, index: int) -> Image.Image:
        return picture(self.rows[index][self.column], self.place, self.name(index))


def sizes(pictures: Any, column: str) -> Iterator[int | None]:
    """The bytes of every picture of a data set, None for one that lies elsewhere; reads no picture."""
    for rows in pictures.with_format("arrow").iter(1000):
        cells = rows.column(column).combine_chunks()
        if pa.types.is_struct(cells.type) and cells.type.get_field_index("bytes") >= 0:
            cells = pc.struct_field(cells, "bytes")
        binary = pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)
        yield from pc.binary_length(cells).to_pylist() if binary else [None] * len(cells)


def the_library(data: Data) -> Any:
    """The package `datasets`. Raises UserError, with the pip line, if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f'data.source = "{data.source}"',
            f"the package `datasets` reads it and cannot be imported: {error}",
            "pip install 'sfumato[hub]'",
        ) from error
    return datasets


def saved(place: Path, data: Data) -> Source:
    """The data set that Dataset.save_to_disk wrote to a folder; its split "train", if it has splits."""
    datasets = the_library(data)
    try:
        dataset = datasets.load_from_disk(str(place))
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise UserError(
            f"the saved data set {place}", f"it cannot be read: {error}", "save it anew"
        ) from error
    return Table(training_split(dataset, data), place, data)


def hub(data: Data) -> Source:
    """A data set of the hub, from the local cache if it is there."""
    datasets = the_library(data)
    try:
        dataset = datasets.load_dataset(data.source)
    except (OSError, ValueError, LookupError, RuntimeError, pa.ArrowException) as error:
        said = " ".join(str(error).split())[:400]
        raise UserError(
            f'data.source = "{data.source}"',
            f"no such folder, and from the hub: {type(error).__name__}: {said}",
            "correct the folder's name or the hub id; without a network, fetch the data set before",
        ) from error
    return Table(training_split(dataset, data), Path(), data)


def training_split(dataset: Any, data: Data) -> Any:
    """The data set itself, or of several splits "train", or the only one. Raises UserError."""
    if not isinstance(dataset, dict):
        return dataset
    if "train" in dataset or len(dataset) == 1:
        return dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    found = f"the splits {', '.join(map(str, dataset))}"
    raise UserError(f'data.source = "{data.source}"', found, 'name a data set with the split "train"')
