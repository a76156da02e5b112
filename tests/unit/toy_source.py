"""Sources for the tests of the index: a folder whose opens are counted, and any number of made-up records."""

import io
import json
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from sfumato.config import Data, Layout
from sfumato.data import index
from sfumato.data.index import Index, open_index
from sfumato.data.sources import Entry, Source, Span, digest, file_stamp

OPENS = ".opens"


class Toy(Source):
    """The files of a folder that end in .img, in the order of their names.

    NAME.more, if there, holds other values of the entry's fields; NAME.hint is the conditioning image. Each
    open is a line of the file .opens, from whatever process. `.slow` holds seconds that an open takes.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.place = Path(layout.source)

    def files(self) -> list[Path]:
        return sorted(self.place.rglob("*.img"))

    def stamps(self, path: Path) -> str:
        return file_stamp(path.stat())

    def stamp(self) -> str:
        paths = sorted(path for path in self.place.rglob("*") if not path.name.startswith("."))
        return digest((str(path.relative_to(self.place)), self.stamps(path)) for path in paths)

    def entries(self) -> Iterator[Entry]:
        for path in self.files():
            name = path.relative_to(self.place).as_posix()
            hint, more = path.with_suffix(".hint"), path.with_suffix(".more")
            stamp = self.stamps(path) + (self.stamps(hint) if hint.exists() else "")
            told: dict[str, Any] = {"captions": (f"caption of {name}",), "stamp": stamp}
            if hint.exists():
                told["hint"] = Span(hint.relative_to(self.place).as_posix())
            if more.exists():
                told |= {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in pickle.loads(more.read_bytes()).items()
                }
            if "_" in path.parent.name and self.layout.folder_repeats:
                told |= {"group": path.parent.name, "repeats": int(path.parent.name.partition("_")[0])}
            yield Entry(name=name, image=Span(name), **told)

    def open(self, span: Span) -> BinaryIO:
        with (self.place / OPENS).open("a") as log:
            log.write(json.dumps(span.file) + "\n")
        if (slow := self.place / ".slow").exists():
            time.sleep(float(slow.read_text()))
        return (self.place / span.file).open("rb")


class Many(Source):
    """Made-up records, all of one picture: source = "FIRST:END:STATE", records by number."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        first, end, self.state = layout.source.split(":")
        self.numbers = range(int(first), int(end))
        self.bytes = encoded((3, 2), "PPM")
        self.opens = 0

    def stamp(self) -> str:
        return self.layout.source + os.environ.get("MANY_STATE", "")

    def entries(self) -> Iterator[Entry]:
        for number in self.numbers:
            yield Entry(
                f"{number:012}", Span("all.tar", number * 512, 100), (f"a picture {number}",), stamp="-"
            )

    def open(self, span: Span) -> BinaryIO:
        self.opens += 1
        return io.BytesIO(self.bytes)


class AtOnce(ThreadPoolExecutor):
    """A pool that does its work in the caller's thread."""

    def submit(self, work: Any, /, *told: Any) -> Any:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_result(work(*told))
        return future


def toy(layout: Layout) -> Source:
    """In place of open_source."""
    if layout.source.count(":") == 2:
        return Many(layout)
    assert Path(layout.source).is_dir(), f"no folder {layout.source}"
    return Toy(layout)


def install(kind: Any = toy) -> None:
    """Let the index of this process open toy sources."""
    index.open_source = kind


def encoded(size: tuple[int, int], kind: str = "PNG", colour: str = "red", **settings: Any) -> bytes:
    """The bytes of a picture of (height, width)."""
    file = io.BytesIO()
    Image.new("RGB", size[::-1], colour).save(file, kind, **settings)
    return file.getvalue()


def fill(place: Path, count: int, kind: str = "PNG") -> Path:
    """A folder of pictures, the n-th of (10 + n, 20)."""
    place.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (place / f"{number:03}.img").write_bytes(encoded((10 + number, 20), kind))
    return place


def tell(place: Path, name: str, **values: Any) -> None:
    """Give a record other fields."""
    (place / f"{name}.more").write_bytes(pickle.dumps(values))


def opens(place: Path) -> list[str]:
    """The files that were opened since the last call."""
    log = place / OPENS
    names = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def data_of(place: Path, store: Path | None = None, **settings: Any) -> Data:
    """The data table of a toy folder; its store lies beside it."""
    return Data(source=str(place), store=store or place.parent / "store", **settings)


def indexed(place: Path, digests: bool = False, verify: bool = True, **settings: Any) -> Index:
    """The index of a toy folder."""
    return open_index(data_of(place, **settings), digests, verify)


def names(of: Index) -> list[str]:
    return [of.name(number) for number in range(len(of))]
