"""Where the pictures and captions lie: the contract of a source, and which one a config means.

Every source keeps its captions in memory and reads a picture when it is asked for it. It may be sent to
loader processes by pickle. All that can be wrong with the user's data is a UserError that names the place.
"""

import hashlib
import io
import os
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from sfumato.config import Data
from sfumato.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Record:
    """One sample as it lies on disk."""

    image: Image.Image
    captions: list[str]
    name: str
    """What messages call it."""


class Source(ABC):
    """Pictures with captions, numbered from 0."""

    fingerprint: str
    """Hexadecimal hash of names, sizes and captions: the same on every machine, another for other data."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call a sample, without reading it."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """The captions of a sample, at least one, without reading its picture."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """A sample's picture, decoded. Raises UserError with its name if it cannot be read."""

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return Record(self.image(index), self.captions(index), self.name(index))


def open_source(data: Data) -> Source:
    """The source that `data.source` means: saved by `datasets`, parquet files, image files, or a hub id."""
    # Imported where needed: these modules use this one's names, and pyarrow costs time.
    place = Path(data.source).expanduser()
    asked = f'data.source = "{data.source}"'
    if place.is_dir():
        return open_folder(place, data)
    if place.exists():
        raise UserError(asked, "it is a file", "name the folder that it lies in")
    if HUB_ID.fullmatch(data.source):
        from sfumato.data import tables

        return tables.hub(data)
    raise UserError(
        asked, f"no such folder (from {Path.cwd()})", "name a folder, or the hub id of a data set"
    )


def open_folder(place: Path, data: Data) -> Source:
    """The source in a local folder."""
    if is_saved(place):
        from sfumato.data import tables

        return tables.saved(place, data)
    files = files_under(place)
    if parquet := parquet_among(files):
        from sfumato.data import tables

        return tables.Parquet(place, parquet, data)
    from sfumato.data.folder import Folder

    return Folder(place, files, data)


def files_under(place: Path) -> list[str]:
    """Paths of all files below, relative with "/", sorted; hidden ones are left out, links are followed.

    Raises UserError for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"the folder {error.filename}", str(error), "allow reading it, or take it away"
        ) from error

    found, seen = [], set()
    for top, folders, names in os.walk(place, onerror=refuse, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:
            folders.clear()  # a link to a folder above would go round for ever
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(top).relative_to(place)
        found += [(base / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def parquet_among(files: list[str]) -> list[str]:
    """The parquet files among these; only those of a path "train...", if there are such."""
    files = [file for file in files if file.endswith(".parquet")]
    train = [file for file in files if any(part.startswith("train") for part in PurePosixPath(file).parts)]
    return train or files


def is_saved(place: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (place / "dataset_dict.json").is_file() or (
        (place / "state.json").is_file() and (place / "dataset_info.json").is_file()
    )


def decode(data: bytes | Path, name: str) -> Image.Image:
    """Decode a picture wholly, from bytes or a file. Raises UserError with its name."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            image.load()
            return image
    except (
        Exception
    ) as error:  # broken files make Pillow raise OSError, SyntaxError, TypeError, struct.error ...
        raise UserError(
            f"the image {name}",
            f"it cannot be read: {type(error).__name__}: {error}",
            "mend the file, or take it and its caption away",
        ) from error


def read_captions(value: Any, name: str, key: str) -> list[str]:
    """The captions of a sample from a cell or metadata value: a text or a list of texts; [] for none."""
    values = [value] if isinstance(value, str) else value
    if values is None:
        return []
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise UserError(
            f"the caption of {name}", f'"{key}" holds {reprlib.repr(value)}', "give a text or a list of texts"
        )
    return [text.strip() for text in values]


def need_captions(missing: list[str], total: int, where: str) -> None:
    """Raise UserError if some of `total` samples have no caption."""
    if missing:
        raise UserError(
            f"a caption for each of the {total} images of {where}",
            f"{len(missing)} without one; the first is {missing[0]}",
            "write NAME.txt beside NAME.png, or a line of metadata.jsonl, or fill the column; an empty file "
            "is an empty caption",
        )


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 over the representations of parts, one by one."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()
