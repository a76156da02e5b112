"""A folder of image files, also in folders below, with captions in the files beside them."""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sfumato.config import Layout
from sfumato.data.sources import Entry, Source, Span, digest
from sfumato.data.sources.files import (
    IMAGES,
    PICTURES,
    UNREAD,
    Listing,
    below,
    inside,
    open_file,
    present,
    read_text,
    stamps,
    suffix,
    walk,
)
from sfumato.data.sources.texts import HALVES, Texts, Unusable, beside, shown, sidecars
from sfumato.errors import UserError

SIDECARS = {".txt", ".json"}
REPEATS = re.compile(r"(\d{1,6})_(.+)")  # 20240131_walk is a date


class Folder(Source):
    """Image files below a folder, in the order of their paths.

    NAME.txt or NAME.json beside an image holds its captions. A conditioning image is the file of the same
    relative path in the folder that data.conditioning_column names, in the source or beside it.
    """

    def __init__(self, layout: Layout, place: Path | None = None) -> None:
        """place: if it is not data.source. Raises UserError if it or a folder of hints is not there."""
        super().__init__(layout)
        self.place, self.top = place or Path(layout.source).expanduser(), ""
        self.hints = ""  # the folder of conditioning images, relative to the place, with "/" at its end
        if not self.place.is_dir():
            found = "it is a file" if self.place.exists() else f"no such folder (from {Path.cwd()})"
            raise UserError(f'data.source = "{layout.source}"', found, "name a folder of images")
        if layout.conditioning_column is not None:
            self.find_hints(layout.conditioning_column)

    def find_hints(self, name: str) -> None:
        """Set place, top and hints. Raises UserError if there is no such folder."""
        try:
            hints = inside("", name) + "/"
        except Unusable:
            hints = ""
        real = Path(os.path.abspath(self.place))
        if hints and (self.place / hints).is_dir():
            self.hints = hints
        elif hints and (real.parent / hints).is_dir() and real.parent != real:
            self.place, self.top, self.hints = real.parent, f"{real.name}/", hints
        else:
            raise UserError(
                f'data.conditioning_column = "{name}" of the folder {self.place}',
                "no folder of this name in it or beside it",
                "put each conditioning image there under the relative path of its image; or write "
                f'metadata.jsonl, with "file_name", "{self.layout.caption_column}" and "{name}" in each line',
            )

    def stamp(self) -> str:
        return digest(self.stamps())

    def stamps(self) -> Iterator[tuple[str, str]]:
        """Path and stamp of all files that matter."""
        yield from stamps(self.place, self.top, PICTURES | SIDECARS)
        if self.top:
            yield from stamps(self.place, self.hints, IMAGES)

    def entries(self) -> Iterator[Entry]:
        pictures = files = 0
        for listing, name in walk(self.place, self.top):
            files += 1
            if suffix(name) in PICTURES and not self.is_hint(listing):
                pictures += 1
                yield self.entry(listing, name)
        if not pictures:
            raise no_images(self.layout, files)

    def is_hint(self, listing: Listing) -> bool:
        """Whether a folder holds conditioning images."""
        return bool(self.hints) and not self.top and listing.path.startswith(self.hints)

    def entry(self, listing: Listing, name: str) -> Entry:
        """What is to be told of an image file."""
        file = listing.path + name
        relative = file.removeprefix(self.top)
        if HALVES.search(file):
            escaped = relative.encode("utf-8", "backslashreplace").decode()
            return Entry(escaped, Span(escaped), fault="its name is not UTF-8")
        group, repeats, token = self.grouping(relative)
        try:
            if suffix(name) in UNREAD:
                raise Unusable(f"{suffix(name)} is a format that is not read: convert it to png or jpg")
            stamp = present(self.place, file)
            texts = self.texts(listing.path, name, self.layout.prompt if token is None else token)
            hint, hint_stamp = self.hint(relative)
        except Unusable as error:
            return Entry(relative, Span(file), fault=str(error), group=group, repeats=repeats)
        return Entry(
            name=relative,
            image=Span(file),
            captions=texts.captions,
            weights=texts.weights,
            hint=hint,
            stamp=stamp + hint_stamp,
            group=group,
            repeats=repeats,
        )

    def texts(self, folder: str, name: str, fallback: str | None) -> Texts:
        """The captions beside an image, or what stands for them if it has none. Raises Unusable."""
        stem = posixpath.splitext(name)[0]
        there = []

        def read(kind: str) -> bytes | None:
            file = f"{stem}.{kind}"
            try:
                with open_file(f"{self.place}/{folder}{file}") as opened:
                    there.append(file)
                    return read_text(opened)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise Unusable(f"{shown(file)} cannot be read: {error.strerror}") from None

        texts = beside(self.layout, read)
        if texts.captions or fallback is not None:
            return texts if texts.captions else Texts((fallback or "",))
        if there:
            raise Unusable(f'no caption: {shown(there[-1])} has no "{self.layout.caption_column}"')
        files = shown(" or ".join(f"{stem}.{kind}" for kind in sidecars(self.layout)))
        raise Unusable(f"no caption: no {files} beside it, and data.prompt is not set")

    def grouping(self, relative: str) -> tuple[str, int, str | None]:
        """The group of an image, its repeats, and the caption that the folder's name gives.

        Raises UserError for a folder "0_name".
        """
        first, slash, _ = relative.partition("/")
        found = REPEATS.fullmatch(first) if self.layout.folder_repeats and slash else None
        if found is None:
            return "", 1, None
        if int(found[1]) == 0:
            asked, do = f"the folder {first}, with data.folder_repeats", "move it away, or give it a number"
            raise UserError(asked, "no visits in an epoch", do)
        return first, int(found[1]), found[2].strip()

    def hint(self, relative: str) -> tuple[Span | None, str]:
        """The conditioning image of an image, and its stamp. Raises Unusable if it is not there."""
        if not self.hints:
            return None, ""
        file = self.hints + relative
        stem = posixpath.splitext(file)[0]
        for each in (file, *(stem + kind for kind in sorted(IMAGES))):
            try:
                return Span(each), f" {present(self.place, each)}"
            except Unusable:
                continue
        raise Unusable(f"no conditioning image: {shown(file)}")

    def open(self, span: Span) -> BinaryIO:
        return open_file(below(self.place, span.file))


def no_images(layout: Layout, files: int) -> UserError:
    """The error for a source without a record."""
    found = f"{files} files, none of them an image" if files else "an empty folder"
    do = f"put images there: {' '.join(sorted(IMAGES))}"
    return UserError(f'data.source = "{layout.source}"', found, do)
