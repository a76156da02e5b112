"""Files that lie elsewhere, as fsspec reaches them by their URL."""

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

from sfumato.data.sources.files import Window
from sfumato.data.sources.texts import Unusable, shown
from sfumato.errors import UserError

THREADS = 16
HEAD = 2**16  # bytes that are read first: enough for most pictures' sizes
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
# What may change with a file's content, under the names that file systems give it.
MARKS = (
    *(
        "size",
        "ETag",
        "etag",
        "mtime",
        "LastModified",
        "last_modified",
        "Last-Modified",
        "updated",
        "created",
    ),
    *("md5Hash", "Content-MD5", "generation", "blob_id"),
)


def is_url(source: str) -> bool:
    """Whether a source is reached by fsspec."""
    return "://" in source or "::" in source


def system(url: str) -> Any:
    """The file system of a URL. Raises UserError, with the pip line, if a package for it is missing."""
    import fsspec  # type: ignore[import-untyped]  # here, because importing it costs time

    protocol = url.partition(":")[0]
    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        package = PACKAGES.get(protocol, f"the package that fsspec needs for {protocol}")
        raise UserError(public(url), f"it cannot be reached: {error}", f"pip install {package}") from error
    except ValueError as error:
        do = f"use one of fsspec's protocols, such as {', '.join(PACKAGES)}"
        raise UserError(public(url), str(error), do) from error


def public(url: str) -> str:
    """A URL for messages, without what may be a secret: a password, or a signature behind "?"."""
    scheme, slashes, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return scheme + slashes + host.rpartition("@")[2] + slash + path.partition("?")[0]


@contextmanager
def reaching(place: str) -> Iterator[None]:
    """Turn what a file system raises into a UserError."""
    try:
        yield
    except (UserError, Unusable, AssertionError):
        raise
    except Exception as error:
        # Each protocol's package has errors of its own; a local file has only one kind.
        if not is_url(place) and not isinstance(error, OSError):
            raise
        said = shown(str(error).replace(place, public(place)))
        found = f"it cannot be read: {type(error).__name__}: {said}"
        do = "correct the name, or see that the disk, the network and the keys are there"
        raise UserError(public(place), found, do) from error


def below(url: str) -> list[str]:
    """The URLs of all files in a folder. Raises UserError."""
    files = system(url)
    with reaching(url):
        return sorted(files.unstrip_protocol(path) for path in files.find(url))


def matching(url: str) -> list[str]:
    """The URLs that a pattern with "*" matches. Raises UserError."""
    files = system(url)
    with reaching(url):
        return sorted(files.unstrip_protocol(path) for path in files.glob(url))


def marks(urls: Iterable[str]) -> list[str]:
    """A text for each file that changes with its content. Raises UserError for one that is not there."""

    def mark(url: str) -> str:
        with reaching(url):
            info = system(url).info(url)
        told = " ".join(f"{name}={info[name]}" for name in MARKS if info.get(name) is not None)
        if not told:
            found = "it tells no size, time or hash, so that a change could not be seen"
            raise UserError(public(url), found, "fetch the files, and name the local ones")
        return told

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(mark, urls))


def open_url(url: str) -> BinaryIO:
    """A whole file that can be sought in. Raises UserError."""
    with reaching(url):
        file: BinaryIO = system(url).open(url, "rb")
    return file


def open_part(url: str, start: int, length: int) -> BinaryIO:
    """The bytes [start, start + length) of a file, fetched when they are read."""
    return io.BufferedReader(Part(url, start, length), HEAD)


class Part(Window):
    """A part of a remote file. Its head is fetched alone, all the rest at once."""

    def __init__(self, url: str, start: int, length: int) -> None:
        super().__init__(io.BytesIO(), start, length)
        self.url, self.head, self.rest = url, b"", b""

    def fetch(self, at: int, count: int) -> bytes:
        """Some bytes, at most `count` of them. Raises UserError."""
        if at < HEAD:
            self.head = self.head or self.bytes_of(0, min(HEAD, self.length))
            return self.head[at : at + count]
        self.rest = self.rest or self.bytes_of(HEAD, self.length)
        return self.rest[at - HEAD : at - HEAD + count]

    def bytes_of(self, begin: int, end: int) -> bytes:
        """The bytes [begin, end) of the part."""
        with reaching(self.url):
            files = system(self.url)
            data: bytes = files.cat_file(self.url, start=self.start + begin, end=self.start + end)
        if len(data) != end - begin:
            found = f"{len(data):,} bytes came, not {end - begin:,}: it ended, or the server gives no parts"
            raise UserError(public(self.url), found, "fetch the files, and name the local ones")
        return data
