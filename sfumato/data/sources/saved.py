"""Data sets of the package `datasets`: folders that it saved, and the hub."""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub.constants import HF_HUB_CACHE

from sfumato.config import Layout
from sfumato.data.sources import Entry, digest
from sfumato.data.sources.files import stamp_of
from sfumato.data.sources.kinds import is_saved
from sfumato.data.sources.tables import ROWS, Table, unread
from sfumato.errors import UserError


class Saved(Table):
    """A folder that `Dataset.save_to_disk` wrote; its split "train", if it has splits."""

    def __init__(self, layout: Layout) -> None:
        """Raises UserError for what cannot be read, has no rows, or lacks a column."""
        super().__init__(layout)
        library = the_library(layout)
        dataset = split_of(self.loaded(library), layout)
        columns = self.text_columns(dataset.column_names)
        if not len(dataset):
            raise UserError(f'data.source = "{layout.source}"', "a data set without a row", "name another")
        images = [name for name in (layout.image_column, layout.conditioning_column) if name is not None]
        for name in images:
            if isinstance(dataset.features[name], library.Image):
                dataset = dataset.cast_column(name, library.Image(decode=False))
        self.rows = dataset.select_columns(list(dict.fromkeys([*columns, *images]))).with_format("arrow")
        self.files = sorted(file["filename"] for file in dataset.cache_files)

    def loaded(self, library: Any) -> Any:
        """What lies there: a data set, or several by the names of their splits. Raises UserError."""
        self.place = Path(self.layout.source).expanduser()
        if not is_saved(self.place):
            found, do = "no data set that `datasets` saved", "name its folder, or another data.kind"
            raise UserError(f'data.source = "{self.layout.source}"', found, do)
        try:
            return library.load_from_disk(str(self.place))
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            raise unread(f"the saved data set {self.place}", error) from error

    def stamp(self) -> str:
        return digest((os.path.basename(file), stamp_of(file)) for file in self.files)

    def entries(self) -> Iterator[Entry]:
        stamp, row = self.stamp(), 0
        try:
            for table in self.rows.iter(ROWS):
                named = {name: table.column(name).combine_chunks() for name in table.column_names}
                yield from self.told("", row, table.num_rows, named, stamp)
                row += table.num_rows
        except (OSError, pa.ArrowException) as error:
            raise unread(f"the data set {self.layout.source}", error) from error

    def row_name(self, file: str, row: int) -> str:
        return f"row {row}"

    def cell(self, file: str, row: int, column: str) -> Any:
        if not 0 <= row < len(self.rows):
            found, do = f"the data set has {len(self.rows)} rows", "make the index again"
            raise UserError(f"row {row} of {self.layout.source}", found, do)
        return self.rows[row : row + 1].column(column)[0].as_py()


class Hub(Saved):
    """A data set of the hub, from the local cache if it is there. Code that comes with it is never run."""

    def loaded(self, library: Any) -> Any:
        # Cells of image files hold the paths that they have in the caches.
        caches = [library.config.HF_DATASETS_CACHE, library.config.HF_CACHE_HOME, HF_HUB_CACHE]
        self.roots = tuple(Path(os.path.abspath(os.path.expanduser(cache))) for cache in caches)
        self.place = self.roots[0]
        asks = "trust_remote_code" in inspect.signature(library.load_dataset).parameters
        try:
            return library.load_dataset(self.layout.source, **{"trust_remote_code": False} if asks else {})
        except (OSError, ValueError, LookupError, RuntimeError, pa.ArrowException) as error:
            said = " ".join(str(error).split())[:400]
            raise UserError(
                f'data.source = "{self.layout.source}"',
                f"no such folder, and from the hub: {type(error).__name__}: {said}",
                "correct the folder's name or the hub id; without a network, fetch the data set before",
            ) from error


def the_library(layout: Layout) -> Any:
    """The package `datasets`. Raises UserError, with the pip line, if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f'data.source = "{layout.source}"',
            f"the package `datasets` reads it and cannot be imported: {error}",
            "pip install 'sfumato[hub]'",
        ) from error
    return datasets


def split_of(dataset: Any, layout: Layout) -> Any:
    """The data set itself, or of several splits "train", or the only one. Raises UserError."""
    if not isinstance(dataset, dict):
        return dataset
    if "train" in dataset or len(dataset) == 1:
        return dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    found = f"the splits {', '.join(map(str, dataset))}"
    raise UserError(f'data.source = "{layout.source}"', found, 'name a data set with the split "train"')
