"""Files below a folder: walked in a fixed order, stamped, and opened whole or in part."""

import errno
import hashlib
import io
import os
import posixpath
import re
import stat
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sfumato.data.sources import file_stamp
from sfumato.data.sources.texts import HALVES, LONGEST, TOO_LONG, Unusable, shown
from sfumato.errors import UserError

IMAGES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
# Pictures to the user, but not read here.
UNREAD = {
    *(".heic", ".heif", ".jxl", ".psd", ".svg", ".jp2", ".tga", ".ppm", ".pgm", ".exr", ".hdr", ".xcf"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}
PICTURES = IMAGES | UNREAD


@dataclass(frozen=True)
class Listing:
    """The names in one folder."""

    path: str
    """Of the folder, relative to the place; "" or with "/" at its end."""
    names: list[str]
    """Sorted; those of folders end with "/"."""

    def __contains__(self, name: str) -> bool:
        at = bisect_left(self.names, name)
        return at < len(self.names) and self.names[at] == name


def suffix(file: str) -> str:
    """What follows the last dot of a file's name, with the dot, in small letters."""
    return posixpath.splitext(file)[1].lower()


def hashed(file: str) -> int:
    """64 bits that tell one path from another."""
    data = file.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def walk(place: Path, top: str = "") -> Iterator[tuple[Listing, str]]:
    """Every file below place/top, as its folder and its name, in the order of the whole paths.

    Hidden files and folders are left out. Links are followed; one to a folder that is walked anyway is not,
    so no file comes twice and no circle is walked. At any time the names of one folder and of those above
    it are held. top is "" or ends with "/". Raises UserError for a folder that cannot be listed.
    """
    root, seen = os.path.realpath(place / top), set[str]()

    def below(path: str, linked: bool) -> Iterator[tuple[Listing, str, bool]]:
        listing, links = listed(place, path)
        return ((listing, name, linked or name in links) for name in listing.names)

    stack = [below(top, False)]
    while stack:
        for listing, name, linked in stack[-1]:
            if not name.endswith("/"):
                yield listing, name
            elif not linked or is_new(os.path.realpath(place / listing.path / name), root, seen):
                stack.append(below(listing.path + name, linked))
                break
        else:
            stack.pop()


def is_new(real: str, root: str, seen: set[str]) -> bool:
    """Whether a folder that a link leads to is walked through no other path; it is then among the seen."""
    if real in seen or walked(real, root):
        return False
    seen.add(real)
    return True


def walked(real: str, root: str) -> bool:
    """Whether a path lies in a folder or below it, and is not hidden there."""
    if os.path.splitdrive(real)[0] != os.path.splitdrive(root)[0]:
        return False
    inner = os.path.relpath(real, root)
    return inner == "." or not any(part.startswith(".") for part in inner.split(os.sep))


def listed(place: Path, path: str) -> tuple[Listing, set[str]]:
    """The names in a folder, and those among them that are links to folders."""
    names, links = [], set()
    try:
        with os.scandir(place / path) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                name = entry.name + "/" if is_folder(entry) else entry.name
                names.append(name)
                if name.endswith("/") and entry.is_symlink():
                    links.add(name)
    except OSError as error:
        where = f"the folder {shown(str(place / path))}"
        raise UserError(
            where, f"it cannot be listed: {error}", "allow reading it, or take it away"
        ) from error
    names.sort()
    return Listing(path, names), links


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder or a link to one; a link that goes round in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def stamps(place: Path, top: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Path and stamp of every file below place/top that has one of these suffixes."""
    for listing, name in walk(place, top):
        if suffix(name) in wanted:
            file = listing.path + name
            yield file, stamp_of(f"{place}/{file}")


def stamp_of(path: Path | str) -> str:
    """The file's stamp, or why it has none."""
    try:
        return file_stamp(os.stat(path))
    except OSError as error:
        return f"errno {error.errno}"


def present(place: Path, file: str) -> str:
    """The stamp of a file that is there. Raises Unusable."""
    try:
        # Not with Path, which costs more than the system's answer.
        status = os.stat(f"{place}/{file}")
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable(f'no such file: "{shown(file)}"') from None
    except OSError as error:
        raise Unusable(f'"{shown(file)}" cannot be read: {error.strerror}') from None
    if not stat.S_ISREG(status.st_mode):
        raise Unusable(f'"{shown(file)}" is not a file')
    return file_stamp(status)


def inside(base: str, path: Any) -> str:
    """A path that stands in data, relative to the place, with "/"; a "\\" counts as "/".

    base is the folder of the file that says so, relative to the place, "" or with "/" at its end. Raises
    Unusable for what is no path, and for one that leaves the place.
    """
    if not isinstance(path, str) or not path or "\0" in path or HALVES.search(path):
        raise Unusable(f"no path of a file: {shown(path)}")
    file = posixpath.normpath(base + path.replace("\\", "/"))
    absolute = path[0] in "/\\~" or re.match(r"[A-Za-z]:", path)
    if absolute or file == "." or file.split("/")[0] == "..":
        raise Unusable(f"path leaves the data folder: {shown(path)}")
    return file


def below(place: Path, file: str) -> Path:
    """The file of a span. Raises UserError if it does not lie below the place."""
    drive, rest = os.path.splitdrive(file)
    if drive or not rest or os.path.isabs(rest) or ".." in re.split(r"[/\\]", rest):
        do = "make the index again: one that others wrote may name any file"
        raise UserError(f"the file {shown(file)}", f"it does not lie below {place}", do)
    return place / file


def open_file(path: Path | str) -> BinaryIO:
    """A file to read. Raises OSError, also for a pipe, which would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return open(path, "rb")


def read_text(file: BinaryIO) -> bytes:
    """The content of a caption file. Raises Unusable if it is too large to be one."""
    if os.fstat(file.fileno()).st_size > LONGEST:
        raise Unusable(TOO_LONG)
    return file.read()


def open_window(path: Path, start: int, length: int) -> BinaryIO:
    """The bytes [start, start + length) of a file, as a file. Raises OSError, also if it ends before."""
    file = open_file(path)
    if os.fstat(file.fileno()).st_size < start + length:
        file.close()
        raise OSError(errno.EIO, f"it ends before byte {start + length}", str(path))
    return io.BufferedReader(Window(file, start, length), 2**16)


class Window(io.RawIOBase):
    """A part of a file, which is closed with it."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte of the window. Raises OSError for one before its first."""
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "there is nothing before the first byte")
        self.at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Read on from where it stands; 0 at the end."""
        count = max(0, min(len(buffer), self.length - self.at))
        data = self.fetch(self.at, count) if count else b""
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def fetch(self, at: int, count: int) -> bytes:
        """Some bytes of the window, at most `count` of them."""
        self.file.seek(self.start + at)
        return self.file.read(count)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
