"""Images that a list names: metadata.jsonl, metadata.csv or train.jsonl in a folder, or one such file."""

import posixpath
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.config import Layout
from sfumato.data.sources import Entry, Span
from sfumato.data.sources.files import (
    IMAGES,
    PICTURES,
    hashed,
    inside,
    present,
    stamp_of,
    stamps,
    suffix,
    walk,
)
from sfumato.data.sources.folder import SIDECARS, Folder, no_images
from sfumato.data.sources.known import Known
from sfumato.data.sources.rows import Row, Rows
from sfumato.data.sources.texts import HALVES, Texts, Unusable, merged, of_row, shown
from sfumato.errors import UserError

LISTS = ("metadata.jsonl", "metadata.csv", "train.jsonl")
NESTED = LISTS[:2]  # the list of a folder below: train.jsonl may be anything there
KINDS = {".jsonl", ".csv"}


@dataclass(frozen=True)
class Line:
    """What a line of a list says."""

    image: str
    """Relative to the place, as the hint is."""
    hint: str | None
    stamp: str
    texts: Texts


class Lists(Folder):
    """The images that lists name, in the order of the lines, then those of the folder that none names.

    Lines for the same image and conditioning image are one record, with the captions of all. What is held
    in memory grows by 32 bytes a line: see Known. A list's paths are relative to its own folder and may not
    leave the source's. An image that no line names needs a caption beside it, unless a line names it as
    another thing. Of a source that is a list file itself nothing counts but its lines.
    """

    def __init__(self, layout: Layout) -> None:
        """Raises UserError if the folder or the list is not there."""
        path = Path(layout.source).expanduser()
        self.only = path.name if path.is_file() else None
        if self.only is not None and suffix(self.only) not in KINDS:
            found, do = (
                "it is a file of another kind",
                "name a .jsonl or .csv file, or a folder that holds one",
            )
            raise UserError(f'data.source = "{layout.source}" as a list', found, do)
        super().__init__(layout, path.parent if self.only is not None else path)
        own = layout.image_column
        self.image_keys = ("file_name", own) if own == "image" else (own, "file_name")

    def find_hints(self, name: str) -> None:
        """Nothing to find: the lines name them."""

    def lists(self) -> list[str]:
        """The lists, relative to the place. Raises UserError for two of one folder, and for none."""
        if self.only is not None:
            return [self.only]
        found: dict[str, str] = {}
        for listing, name in walk(self.place):
            if name not in (NESTED if listing.path else LISTS):
                continue
            if listing.path in found:
                asked = f"one list in {self.place / listing.path}"
                found_two = f"{posixpath.basename(found[listing.path])} and {name}"
                raise UserError(asked, found_two, "take one away, or name the other one as data.source")
            found[listing.path] = listing.path + name
        if not found:
            asked = f'data.source = "{self.layout.source}" as a list'
            raise UserError(asked, f"none of {', '.join(LISTS)}", "write one, or name another data.kind")
        return list(found.values())

    def opened(self) -> list[Rows]:
        """The lists. Raises UserError for a .csv file without the columns that are wanted."""
        opened = [Rows(self.place, name) for name in self.lists()]
        for rows in (rows for rows in opened if rows.csv):
            caption = [] if self.layout.prompt is not None else [self.layout.caption_column]
            more = [self.layout.caption_weight_column, self.layout.conditioning_column]
            wanted = [*caption, *(column for column in more if column is not None)]
            lacking = [column for column in wanted if column not in rows.columns]
            if not any(key in rows.columns for key in self.image_keys):
                lacking.append(" or ".join(self.image_keys))
            if lacking:
                found, do = (
                    f"the columns are {', '.join(rows.columns)}",
                    "set data.caption_column, ..._column",
                )
                raise UserError(f"the column {lacking[0]} of {rows.path}", found, f"{do} to one of them")
        return opened

    def stamps(self) -> Iterator[tuple[str, str]]:
        if self.only is None:
            yield from stamps(self.place, "", PICTURES | SIDECARS | KINDS)
            return
        # The folder may be anything, such as a home: only what the lines name is looked at.
        yield self.only, stamp_of(self.place / self.only)
        for row in Rows(self.place, self.only):
            for key in (*self.image_keys, self.layout.conditioning_column):
                try:
                    file = inside("", row.values.get(key or ""))
                except Unusable:
                    continue
                yield file, stamp_of(f"{self.place}/{file}")

    def entries(self) -> Iterator[Entry]:
        lists = self.opened()
        known = self.known(lists)
        number = told = 0
        for rows, row in ((each, row) for each in lists for row in each):
            image = line = None
            try:
                image = self.image(rows, row)
                line = self.line(rows, row, image)
            except Unusable as error:
                yield Entry(f"line {row.number} of {rows.name}", Span(rows.name), fault=str(error))
            told += 1
            if image is None:
                continue
            key = hashed(image)
            if number == len(known.keys) or known.keys[number] != key:
                found, do = "it was changed while it was read", "start again when it is whole"
                raise UserError(f"the list {rows.path}", found, do)
            first, *further = known.lines(key)
            if first == number:
                yield from self.together([line, *(self.again(lists, known, each) for each in further)])
            number += 1
        for entry in self.unlisted(known) if self.only is None else ():
            told += 1
            yield entry
        if not told:
            raise no_images(self.layout, len(lists))

    def known(self, lists: list[Rows]) -> Known:
        """Read the lists for the files that their lines name."""
        keys, offsets, others, firsts = array("Q"), array("Q"), array("Q"), []
        for rows in lists:
            firsts.append(len(keys))
            for row in rows:
                image = None
                try:
                    image = self.image(rows, row)
                    keys.append(hashed(image))
                    offsets.append(row.offset)
                except Unusable:
                    pass  # told as a fault when the entries are
                if self.only is None:
                    others.extend(hashed(other) for other in mentioned(rows, row) if other != image)
        return Known.of(keys, offsets, firsts, others)

    def image(self, rows: Rows, row: Row) -> str:
        """The path of a row's image, relative to the place. Raises Unusable."""
        if row.fault:
            raise Unusable(row.fault)
        for key in self.image_keys:
            if row.values.get(key) not in (None, ""):
                return inside(folder_of(rows), row.values[key])
        wanted = " or ".join(f'"{key}"' for key in dict.fromkeys(self.image_keys))
        raise Unusable(f"no {wanted}: its keys are {shown(', '.join(row.values))}")

    def line(self, rows: Rows, row: Row, image: str) -> Line:
        """What a row says, its files looked for. Raises Unusable."""
        hint, stamp = None, self.there(image)
        if (column := self.layout.conditioning_column) is not None:
            if row.values.get(column) in (None, ""):
                raise Unusable(f'no conditioning image: no "{column}"')
            hint = inside(folder_of(rows), row.values[column])
            stamp += f" {self.there(hint)}"
        texts = of_row(row.values, self.layout)
        return Line(image, hint, stamp, texts if texts.captions else self.unsaid(row, image))

    def there(self, file: str) -> str:
        """The stamp of an image. Raises Unusable if it is not there or is none."""
        if suffix(file) not in IMAGES:
            raise Unusable(f'"{shown(file)}" is not of a format that is read: {" ".join(sorted(IMAGES))}')
        # The stamp of a whole folder does not see them.
        if self.only is None and any(part.startswith(".") for part in file.split("/")):
            raise Unusable(f'"{shown(file)}" is hidden: its path has a part that begins with "."')
        return present(self.place, file)

    def unsaid(self, row: Row, image: str) -> Texts:
        """The captions of an image whose line holds none. Raises Unusable if it has none elsewhere."""
        token = self.grouping(image)[2]
        fallback = self.layout.prompt if token is None else token
        lacking = f'its line holds no "{self.layout.caption_column}", but {shown(", ".join(row.values))}'
        if self.only is None:
            folder, name = posixpath.split(image)
            try:
                return self.texts(f"{folder}/" if folder else "", name, fallback)
            except Unusable as error:
                raise Unusable(f"{error}; {lacking}") from None
        if fallback is None:
            raise Unusable(f"no caption: {lacking}; and data.prompt is not set")
        return Texts((fallback,))

    def again(self, lists: list[Rows], known: Known, number: int) -> Line | None:
        """What a line further down says, if it can be used."""
        rows = lists[bisect_right(known.firsts, number) - 1]
        row = rows.at(int(known.offsets[number]))
        try:
            return self.line(rows, row, self.image(rows, row))
        except Unusable:
            return None

    def together(self, lines: list[Line | None]) -> Iterator[Entry]:
        """The records of all lines for an image: one for each of its conditioning images."""
        several: dict[tuple[str, str | None], list[Line]] = {}
        for line in lines:
            if line is not None:
                several.setdefault((line.image, line.hint), []).append(line)
        named = set()
        for (image, hint), same in several.items():
            texts = merged([line.texts for line in same])
            group, repeats, _ = self.grouping(image)
            yield Entry(
                name=f"{image} with {hint}" if image in named else image,
                image=Span(image),
                captions=texts.captions,
                weights=texts.weights,
                hint=None if hint is None else Span(hint),
                stamp=same[0].stamp,
                group=group,
                repeats=repeats,
            )
            named.add(image)

    def unlisted(self, known: Known) -> Iterator[Entry]:
        """The images that no line names."""
        for listing, name in walk(self.place):
            file = listing.path + name
            if suffix(name) in PICTURES and (HALVES.search(file) or not known.names(hashed(file))):
                entry = self.entry(listing, name)
                yield replace(entry, fault=entry.fault and f"no line of a list names it, and: {entry.fault}")

    def hint(self, relative: str) -> tuple[Span | None, str]:
        if self.layout.conditioning_column is not None:
            raise Unusable("no conditioning image")
        return None, ""


def folder_of(rows: Rows) -> str:
    """The folder that a list's paths are relative to."""
    return rows.name[: rows.name.rfind("/") + 1]


def mentioned(rows: Rows, row: Row) -> Iterator[str]:
    """Every image file that a row names, under any key."""
    for value in row.values.values():
        if isinstance(value, str) and suffix(value) in PICTURES:
            try:
                yield inside(folder_of(rows), value)
            except Unusable:
                continue
