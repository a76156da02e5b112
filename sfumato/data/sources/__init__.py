"""Where records lie: the contract of a source, and which one a layout means.

A source tells its records without reading their pixels, always in the same order, and gives an image's
bytes when it is asked for them. Everything else (sizes, faults, order, caches) is done alike for all of
them by the index. A new layout is a new class here and a line in CLASSES.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, BinaryIO

from sfumato.config import Layout

CLASSES = {
    "folder": "folder.Folder",
    "list": "lists.Lists",
    "tar": "tars.Tars",
    "parquet": "parquet.Parquet",
    "datasets": "saved.Saved",
    "hub": "saved.Hub",
}


@dataclass(frozen=True)
class Span:
    """Where an image's bytes lie; what start and length mean is the source's matter."""

    file: str
    """Relative to the source's place, with "/"."""
    start: int = 0
    length: int = -1
    """-1: the whole file."""


@dataclass(frozen=True)
class Entry:
    """What a source tells of one record, without reading its pixels."""

    name: str
    """What messages call it: unique in its source, the same on every machine."""
    image: Span
    captions: tuple[str, ...] = ()
    """At least one, unless there is a fault; "" is an empty caption."""
    weights: tuple[float, ...] = ()
    """Of the captions, each more than 0; () where all count alike."""
    hint: Span | None = None
    """The conditioning image."""
    stamp: str = ""
    """Another text when the bytes of the image or the hint may have changed; means nothing elsewhere."""
    group: str = ""
    """The part of the source that it is in, where parts have repeats of their own, as folder 10_dog."""
    repeats: int = 1
    """Visits of each record of that group in an epoch."""
    fault: str = ""
    """Why it cannot be trained on; it is then set aside and named."""


class Source(ABC):
    """Records of one layout, in one place. It is sent to loader processes by pickle."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def stamp(self) -> str:
        """Hash of all that lies there, from names, sizes and times; reads no content."""

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Every record, in an order that is the same on every machine, in memory that does not grow.

        Raises UserError where the whole cannot be read; a fault of one record is told in its entry.
        """

    @abstractmethod
    def open(self, span: Span) -> BinaryIO:
        """The bytes of an image as a file that can be read and sought. Raises OSError or UserError."""


def open_source(layout: Layout) -> Source:
    """The source that a layout means. Raises UserError if nothing is there that could be one."""
    # Imported where needed: these modules use this one's names, and pyarrow costs time.
    from sfumato.data.sources.kinds import check_settings, found

    kind = found(layout) if layout.kind == "auto" else layout.kind
    check_settings(layout, kind)
    module, name = CLASSES[kind].split(".")
    source: Source = getattr(import_module(f"{__name__}.{module}"), name)(layout)
    return source


def file_stamp(status: os.stat_result) -> str:
    """A text that changes with a file's content: also the change time, which no program can set."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 over the representations of parts, one by one."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()
