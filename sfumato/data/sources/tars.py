"""Tar shards as WebDataset writes them: files of one name that stand side by side are one record."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sfumato.config import Layout
from sfumato.data.sources import Entry, Source, Span, digest, remote
from sfumato.data.sources.files import UNREAD, hashed, open_file, open_window, stamp_of, walk
from sfumato.data.sources.members import DAMAGED, Files, records
from sfumato.data.sources.patterns import expand
from sfumato.data.sources.texts import Texts, Unusable, beside, shown, sidecars
from sfumato.errors import UserError

TAR = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst|tar\.\w+)$", re.IGNORECASE)
PACKED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.\w+)$", re.IGNORECASE)


class Tars(Source):
    """The records of tar files, in the order of the files' names and in each as they stand.

    While a shard is told a hash of each of its records' names is held: one that comes again is told apart.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises UserError for shards that are not there, and for compressed ones."""
        super().__init__(layout)
        places = found(layout.source)
        for place in places:
            if PACKED.search(remote.public(place)):
                told = "it is compressed: its images cannot be read one by one"
                raise UserError(f"the shard {remote.public(place)}", told, "unpack it to a .tar file")
        self.shards = dict(zip(names(places), places, strict=True))
        """Name -> path or URL."""
        if not places or len(self.shards) < len(places):
            told = "the same shard twice" if places else "no .tar file"
            raise UserError(f'data.source = "{remote.public(layout.source)}"', told, "correct the name")

    def stamps(self) -> dict[str, str]:
        """The stamp of each shard. Raises UserError for a remote one that is not there."""
        urls = {name: place for name, place in self.shards.items() if remote.is_url(place)}
        marks = dict(zip(urls, remote.marks(urls.values()), strict=True)) if urls else {}
        return {
            name: marks[name] if name in marks else stamp_of(place) for name, place in self.shards.items()
        }

    def stamp(self) -> str:
        return digest(self.stamps().items())

    def entries(self) -> Iterator[Entry]:
        told = False
        for name, stamp in self.stamps().items():
            place = self.shards[name]
            with remote.reaching(place):
                opened = remote.open_url(place) if remote.is_url(place) else open_file(Path(place))
                with opened as file:
                    for entry in self.of_shard(name, file, stamp):
                        told = True
                        yield entry
        if not told:
            found, do = f"{len(self.shards)} tar files without a record", "name others"
            raise UserError(f'data.source = "{remote.public(self.layout.source)}"', found, do)

    def of_shard(self, shard: str, file: BinaryIO, stamp: str) -> Iterator[Entry]:
        """The records of one shard; at its end a fault if it is damaged."""
        keys: set[int] = set()
        try:
            for files in records(file, sidecars(self.layout)):
                key = hashed(files.key)
                yield self.entry(shard, files, stamp, again=key in keys)
                keys.add(key)
        except Unusable as error:
            yield Entry(shard, Span(shard), fault=str(error))

    def entry(self, shard: str, files: Files, stamp: str, again: bool) -> Entry:
        """What is to be told of a record; again: another one of this name came before."""
        key = files.key.encode("utf-8", "backslashreplace").decode()
        name = f"{shard}/{key.removeprefix('./')}" + (f" at byte {files.start}" if again else "")
        try:
            if files.fault:
                raise Unusable(files.fault)
            image, hint, texts = self.image(files), self.hint(files), self.texts(files)
        except Unusable as error:
            apart = "; files of this name stand apart: sort the tar by name" if again else ""
            return Entry(name, Span(shard), fault=f"{error}{apart}")
        spans = [Span(shard, *files.spans[kind]) if kind else None for kind in (image, hint)]
        assert spans[0] is not None, "an image was found without its place"
        return Entry(name, spans[0], texts.captions, texts.weights, spans[1], stamp)

    def texts(self, files: Files) -> Texts:
        """The captions of a record. Raises Unusable."""
        texts = beside(self.layout, files.texts.get)
        if texts.captions or self.layout.prompt is not None:
            return texts if texts.captions else Texts((self.layout.prompt or "",))
        wanted = f"no {' or '.join(sidecars(self.layout))} beside it in the tar"
        if "json" in files.texts:
            wanted = f'its json has no "{self.layout.caption_column}"'
        raise Unusable(f"no caption: {wanted}, and data.prompt is not set")

    def image(self, files: Files) -> str:
        """Which kind of file is the image. Raises Unusable."""
        others = files.images(self.layout.conditioning_column)
        images = files.images(self.layout.image_column)
        images = images or [kind for kind in files.images() if "." not in kind and kind not in others]
        if len(images) == 1:
            return images[0]
        if images:
            raise Unusable(f"several images, {' and '.join(images)}: name one in data.image_column")
        kinds = shown(", ".join(files.spans))
        unread = any(f".{kind.rpartition('.')[2]}" in UNREAD for kind in files.spans)
        raise Unusable(f"{'a format that is not read' if unread else 'no image'}: its files are {kinds}")

    def hint(self, files: Files) -> str | None:
        """Which kind of file is the conditioning image, if one is wanted. Raises Unusable."""
        column = self.layout.conditioning_column
        if column is None:
            return None
        images = files.images(column)
        if len(images) != 1:
            raise Unusable(f'no conditioning image "{column}": its files are {shown(", ".join(files.spans))}')
        return images[0]

    def open(self, span: Span) -> BinaryIO:
        place = self.shards.get(span.file)
        if place is None:
            found = f"it is none of {remote.public(self.layout.source)}"
            raise UserError(f"the shard {shown(span.file)}", found, "make the index again")
        if remote.is_url(place):
            return remote.open_part(place, span.start, span.length)
        return open_window(Path(place), span.start, span.length)


@dataclass(frozen=True)
class Damage:
    """Shards of which an unknown part is lost: each counts as one fault, whatever it held."""

    shards: int
    """All there are."""
    damaged: int
    first: str
    """One of them, and what is wrong with it."""

    def __str__(self) -> str:
        told = f"{self.damaged:,} of {self.shards:,} shards damaged, by how much is unknown"
        return f"{told}: {self.first}"

    def refusal(self, allowed: float) -> UserError | None:
        """The error where they are a larger share of the shards than `allowed`: they count as lost whole."""
        if self.damaged <= allowed * self.shards:
            return None
        asked = f"at most {allowed:.2%} of {self.shards:,} shards damaged (data.max_faults)"
        return UserError(asked, str(self), "fetch or write them again, or allow more")


def damage(sources: Iterable[Source], faults: Iterable[Sequence[Any]]) -> Damage | None:
    """The damage of the shards of some sources, None if they are whole; faults: each with name and reason."""
    wrong = [f"{name} is {reason}" for name, reason, *_ in faults if reason.startswith(DAMAGED)]
    shards = sum(len(source.shards) for source in sources if isinstance(source, Tars))
    return Damage(shards, len(wrong), wrong[0]) if wrong else None


def found(source: str) -> list[str]:
    """The paths or URLs of all shards, in order. Raises UserError for one that is not there."""
    asked = f'data.source = "{remote.public(source)}"'
    if remote.is_url(source):
        return [url for each in expand(source) for url in remote_shards(each)]
    place = Path(source).expanduser()
    if place.is_dir():
        return shards((place / listing.path / name).as_posix() for listing, name in walk(place))
    several = []
    for path in [place.as_posix()] if place.is_file() else expand(place.as_posix()):
        # A folder's own order differs from machine to machine.
        here = [path] if os.path.exists(path) else shards(sorted(glob.glob(path, recursive=True)))
        if not here:
            raise UserError(asked, f"no file {path} (from {Path.cwd()})", "correct the name, or fetch it")
        several += here
    return several


def remote_shards(url: str) -> list[str]:
    """The URLs that one URL stands for: a shard, a pattern, or a folder of shards."""
    if "*" in remote.public(url):
        return shards(remote.matching(url))
    return shards([url]) or shards(remote.below(url))


def shards(places: Iterable[str]) -> list[str]:
    """Those that are tars, also compressed ones."""
    return [place for place in places if TAR.search(remote.public(place))]


def names(places: list[str]) -> list[str]:
    """What the shards are called: their paths without what all have in front."""
    paths = [remote.public(place) for place in places]
    shared = os.path.commonprefix([path[: path.rfind("/") + 1] for path in paths])
    return [path[shared.rfind("/") + 1 :] for path in paths]
