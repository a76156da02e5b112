"""Which kind of source lies in a place, where the config does not say."""

import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.config import Layout
from sfumato.data.sources.files import IMAGES, PICTURES, suffix, walk, walked
from sfumato.data.sources.lists import KINDS as LIST_KINDS
from sfumato.data.sources.lists import LISTS, NESTED
from sfumato.data.sources.remote import is_url, public
from sfumato.data.sources.tars import TAR
from sfumato.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Seen:
    """What files a folder holds."""

    images: int = 0
    tars: int = 0
    lists: int = 0
    others: int = 0
    parquet: list[str] = field(default_factory=list)


def found(layout: Layout) -> str:
    """The kind of a source, as data.kind calls it. Raises UserError if there is none, or two that may be."""
    asked = f'data.source = "{public(layout.source)}"'
    if is_url(layout.source):
        return "tar"
    place = Path(layout.source).expanduser()
    if place.is_dir():
        return in_folder(place, layout)
    if place.is_file():
        kinds = {".jsonl": "list", ".csv": "list", ".parquet": "parquet"}
        kind = kinds.get(suffix(place.name)) or ("tar" if TAR.search(place.name) else "")
        if not kind:
            raise UserError(asked, "it is a file", "name the folder that it lies in")
        return kind
    if TAR.search(layout.source) or any(letter in layout.source for letter in "{*"):
        return "tar"
    if HUB_ID.fullmatch(layout.source) and suffix(layout.source) not in {*LIST_KINDS, ".parquet"}:
        return "hub"
    do = "name a folder, or the hub id of a data set"
    raise UserError(asked, f"no such folder or file (from {Path.cwd()})", do)


def in_folder(place: Path, layout: Layout) -> str:
    """The kind of what lies in a folder: what has a description of itself goes before single files."""
    if is_saved(place):
        return "datasets"
    if any((place / name).is_file() for name in LISTS):
        return "list"
    seen = look(place)
    if seen.parquet and holds_images(layout):
        return "parquet"
    if seen.tars and seen.images:
        raise UserError(
            f'data.source = "{layout.source}"',
            f"{seen.tars} tar files and {seen.images} images",
            'say with data.kind whether it is a "folder" of images or of "tar" files',
        )
    kinds = {"tar": seen.tars, "list": seen.lists, "folder": seen.images, "parquet": len(seen.parquet)}
    for kind, count in kinds.items():
        if count:
            return kind
    files = f"{seen.others} files, none of them an image, a parquet file or a tar"
    raise UserError(
        f'data.source = "{layout.source}"',
        files if seen.others else "an empty folder",
        f"put images there: {' '.join(sorted(IMAGES))}",
    )


def is_saved(place: Path) -> bool:
    """Whether the package `datasets` saved this folder."""
    return (place / "dataset_dict.json").is_file() or (
        (place / "state.json").is_file() and (place / "dataset_info.json").is_file()
    )


def look(place: Path) -> Seen:
    """Count the files below a folder by their names."""
    seen = Seen()
    for listing, name in walk(place):
        kind = posixpath.splitext(name)[1].lower()
        if kind in PICTURES:
            seen.images += 1
        elif kind == ".parquet":
            seen.parquet.append(listing.path + name)
        elif TAR.search(name):
            seen.tars += 1
        elif name in NESTED:
            seen.lists += 1
        else:
            seen.others += 1
    return seen


def holds_images(layout: Layout) -> bool:
    """Whether parquet files have the column of images; those beside an img2dataset's files do not."""
    from sfumato.data.sources.parquet import Parquet

    try:
        Parquet(layout)
    except UserError as error:
        return f'data.image_column = "{layout.image_column}"' not in error.asked
    return True


def check_outside(place: Path, layouts: Iterable[Layout], asked: str, do: str) -> None:
    """Raise UserError where pictures that are written to a place would be taken for those of a source.

    asked, do: of the error. A source with a description of itself takes no others.
    """
    for layout in layouts:
        source = Path(layout.source).expanduser()
        # Links are followed here and there, and a link within a folder is walked as a part of it.
        ways = (os.path.abspath, os.path.realpath)
        if source.is_dir() and any(walked(way(place), way(source)) for way in ways) and takes_any(layout):
            found = f'it lies within the source "{layout.source}", whose pictures they would be taken for'
            raise UserError(asked, found, do)


def takes_any(layout: Layout) -> bool:
    """Whether every picture below a folder is its record, or leaves its kind open."""
    try:
        return layout.kind in ("auto", "folder") and found(layout) in ("folder", "tar")
    except UserError:  # it is of no kind, or already of two
        return True


def check_settings(layout: Layout, kind: str) -> None:
    """Raise UserError for a setting that means nothing to this kind of source."""
    tables = kind in ("parquet", "datasets", "hub")
    wrong = ""
    if layout.folder_repeats and kind not in ("folder", "list"):
        wrong = "data.folder_repeats = true"
    elif layout.caption_file != "auto" and tables:
        wrong = f'data.caption_file = "{layout.caption_file}"'
    elif layout.caption_weight_column is not None and layout.caption_file == "txt":
        wrong, kind = f'data.caption_weight_column = "{layout.caption_weight_column}"', "text"
    if wrong:
        asked = f'{wrong} for "{public(layout.source)}"'
        raise UserError(asked, f"it is of the kind {kind}, where that means nothing", "take the setting out")
