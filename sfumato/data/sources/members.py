"""The records in a tar file, told from its headers; images are not read."""

import os
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from sfumato.data.sources.files import IMAGES
from sfumato.data.sources.texts import LONGEST, TOO_LONG, Unusable, shown

# A record's name ends at the first dot of the last part of the path; what follows is the kind of file.
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own
BLOCK = 512  # bytes: a header is one, and the first of zeros is the end
HEADER = 2**20  # bytes of a member's header, which may hold a long name
DAMAGED = "damaged from byte"
"""What the fault of a shard begins with of which an unknown part is lost."""
BEHIND = 2**20  # bytes after a tar's end that are looked at: programs fill up their last block with zeros


@dataclass
class Files:
    """The files of one record."""

    key: str
    start: int
    """The byte where the first of them begins."""
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Kind, such as "jpg" -> first byte and length."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Kind -> content, of those that may be captions."""
    fault: str = ""

    def images(self, column: str | None = "") -> list[str]:
        """The kinds that are images, or of a column those of its name, as "hint.png" is of "hint"."""
        kinds = [kind for kind in self.spans if f".{kind.rpartition('.')[2]}" in IMAGES]
        if column == "":
            return kinds
        return [kind for kind in kinds if column and column.lower() in (kind, kind.rpartition(".")[0])]


class Headers:
    """A tar file as `tarfile` may read it: only headers, so that a forged length takes no memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, count: int) -> bytes:
        """Some bytes. Raises Unusable for more than a header has."""
        if count > HEADER:
            raise Unusable(f"a header of {count:,} bytes")
        return self.file.read(count)


def records(file: BinaryIO, kinds: Collection[str]) -> Iterator[Files]:
    """The records of a tar file: neighbours of one name. Files of these kinds are read, for captions.

    Raises Unusable where the tar is damaged, after what stands before. Then a last record is left out
    that lacks an image or a caption, because it would be told with a wrong fault, or with data.prompt.
    """
    current: Files | None = None
    try:
        for member in members(file):
            found = MEMBER.fullmatch(member.name)
            if found is None or member.isdir() or META.match(member.name):
                continue
            if current is None or found[1] != current.key:
                if current is not None:
                    yield current
                current = Files(found[1], member.offset)
            add(current, member, found[2].lower(), file, kinds)
    except Unusable:
        if current is not None and current.images() and current.texts:
            yield current
        raise
    if current is not None:
        yield current


def add(files: Files, member: tarfile.TarInfo, kind: str, file: BinaryIO, kinds: Collection[str]) -> None:
    """Add a member to its record."""
    if kind in files.spans:
        files.fault = f"two files {shown(member.name)}"
    if not member.isreg() or member.issparse():
        files.fault = f"{shown(member.name)} is a link, or stored in pieces: write the tar with whole files"
    files.spans[kind] = member.offset_data, member.size
    if kind in kinds and member.size > LONGEST:
        files.fault = TOO_LONG
    elif kind in kinds and not files.fault:
        file.seek(member.offset_data)
        files.texts[kind] = file.read(member.size)


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file. Raises Unusable where it is damaged.

    Not `TarFile` itself: it takes a damaged header in the middle for the end.
    """
    size = file.seek(0, os.SEEK_END)
    headers = Headers(file)
    offset = 0
    tar: tarfile.TarFile | None = None
    while True:
        file.seek(offset)
        block = file.read(BLOCK)
        if not block:  # which also is how a tar ends that was never closed, with nothing lost
            raise Unusable(f"no end is marked: what may have followed byte {offset:,} is lost")
        if not block.strip(b"\0"):
            break
        try:
            if tar is None:
                file.seek(0)
                tar = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
            file.seek(offset)
            member = tarfile.TarInfo.fromtarfile(tar)
        except (tarfile.TarError, ValueError, LookupError, OverflowError, Unusable) as error:
            raise damaged(offset, f"{shown(str(error))}, or it is no tar") from None
        end = member.offset_data + member.size
        whole = member.isreg() and not member.issparse()
        if tar.offset <= offset or (whole and end > size):
            raise damaged(offset, f"{shown(member.name)} ends beyond the file, or before its beginning")
        offset = tar.offset
        yield member
    file.seek(offset)
    if file.read(BEHIND).strip(b"\0"):
        raise damaged(offset, "more follows after its end, perhaps another tar")


def damaged(offset: int, why: str) -> Unusable:
    """The error for a tar that cannot be read from a byte on."""
    return Unusable(f"{DAMAGED} {offset:,} on, what follows in it is lost: {why}")
