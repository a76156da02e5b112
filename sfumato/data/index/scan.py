"""Making an index: every entry of the sources once, the headers of what is new, and files as a stream.

Memory does not grow with the records, but for what finds them in an older index: see Known.
"""

import hashlib
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sfumato.data.index.draft import COLUMNS, HEADER, Draft, unline
from sfumato.data.index.headers import Unusable, quiet, size_of, unread
from sfumato.data.index.shelf import DRAFTS, FORMAT, TOLD, Left, drafts, facts_of, publish, published, tidy
from sfumato.data.sources import Entry, Source, Span
from sfumato.errors import UserError

THREADS = 16
AHEAD, AHEAD_TEXT = 256, 8 * 2**20  # records, and characters of their captions, that are held at once
BLOCK = 2**20  # bytes of a file that are read at once


class Wish(NamedTuple):
    """What an index is to hold."""

    digests: bool
    most: int
    """Pixels that a picture may have."""


class Look(NamedTuple):
    """What was seen of a record's files."""

    height: int = 0
    width: int = 0
    digest: bytes = b""
    reason: str = ""
    """Why it is of no use."""
    passing: bool = False
    """That may change while the files do not."""


def look(source: Source, entry: Entry, wish: Wish) -> Look:
    """Open a record's files."""
    total = hashlib.blake2b(digest_size=16) if wish.digests else None
    what = ""
    try:
        height, width = seen(source, entry.image, wish.most, total)
        if entry.hint is not None:
            what = "the conditioning image: "
            seen(source, entry.hint, wish.most, total)
    except Unusable as error:
        return Look(reason=what + error.reason, passing=error.passing)
    return Look(height, width, total.digest() if total else b"")


def seen(source: Source, span: Span, most: int, total: Any) -> tuple[int, int]:
    """The (height, width) of one file, its bytes added to a hash. Raises Unusable."""
    try:
        with source.open(span) as file:
            size = size_of(file, most)
            if total is not None:
                file.seek(0)
                while block := file.read(BLOCK):
                    total.update(block)
            return size
    except UserError as error:
        raise Unusable(error.found, passing=True) from error
    except OSError as error:
        raise unread(error) from error


def fault_of(entry: Entry) -> str:
    """What is wrong with a record before its files are opened; "" if nothing is."""
    if entry.fault:
        return entry.fault
    if not entry.captions:
        return "it has no caption"
    if entry.weights and len(entry.weights) != len(entry.captions):
        return f"it has {len(entry.captions)} captions, but {len(entry.weights)} weights"
    wrong = [weight for weight in entry.weights if not (isfinite(weight) and weight > 0)]
    return f"a caption's weight is {wrong[0]}, not a number above 0" if wrong else ""


def key_of(layout: int, entry: Entry) -> bytes:
    """16 bytes that are equal only where a record's files are: they need not be opened again."""
    if not entry.stamp:
        return os.urandom(16)  # a record without a stamp is opened each time
    told = repr((layout, entry.name, entry.stamp, entry.image, entry.hint))
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Column:
    """The first rows of a file of an index, finished or not, memory-mapped."""

    def __init__(self, folder: Path, name: str, records: int) -> None:
        """Raises OSError or ValueError if the file is missing, or shorter than that."""
        dtype, width = COLUMNS[name]
        with (folder / f"{name}.npy").open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = np.frombuffer(self.map, dtype, records * int(np.prod(width, dtype=int)), HEADER)
        self.rows = rows.reshape(records, *width)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Some rows; what was read of the file does not stay in the process's memory."""
        found = self.rows[numbers]
        self.forget()
        return found

    def forget(self) -> None:
        """Give back the memory; the system keeps the file's pages as long as it has room."""
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)


class Known:
    """What an older index, or the draft of a killed process, knows of files that have not changed.

    It holds 12 bytes of memory for each record, and for a moment 36.
    """

    def __init__(self, folder: Path, records: int, digests: bool) -> None:
        """Raises OSError or ValueError if files are missing or shorter than they should be."""
        self.keys, self.sizes = (Column(folder, name, records) for name in ("keys", "sizes"))
        self.digests = Column(folder, "digests", records) if digests else None
        halves = self.keys.rows[:, 0]
        self.order = np.argsort(halves).astype(np.uint32 if records < 2**32 else np.int64)  # (N,)
        self.halves = halves[self.order]  # (N,) the first half of each key, sorted
        self.keys.forget()

    def find(self, keys: Sequence[bytes]) -> list[Look | None]:
        """What is known under each key."""
        wanted = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        places = np.searchsorted(self.halves, wanted[:, 0]).clip(max=len(self.halves) - 1)
        rows = self.order[places]
        sizes = self.sizes.take(rows)
        equal = ((self.keys.take(rows) == wanted).all(1) & (sizes > 0).all(1)).tolist()
        digests = [row.tobytes() for row in self.digests.take(rows)] if self.digests else [b""] * len(rows)
        return [
            Look(size[0], size[1], digest) if same else None
            for same, size, digest in zip(equal, sizes.tolist(), digests, strict=True)
        ]


def known(shelf: Path, digests: bool) -> list[Known]:
    """All that is known already: of the newest index, and of the longest draft of a process that died."""
    left = max(drafts(shelf), key=lambda draft: draft.records, default=Left())
    tidy(shelf, keep=left.folder)
    counts = {folder: facts["records"] for folder in published(shelf)[:1] if (facts := facts_of(folder))}
    counts[left.folder] = left.records
    found = []
    for folder, records in counts.items():
        try:
            found += [Known(folder, records, digests)] if records else []
        except (OSError, ValueError):
            continue  # damaged: the files are opened again
    return found


def blocks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries, some hundred at once, fewer where their captions are long."""
    block: list[Entry] = []
    text = 0
    for entry in entries:
        block.append(entry)
        text += length(entry)
        if len(block) == AHEAD or text > AHEAD_TEXT:
            yield block
            block, text = [], 0
    if block:
        yield block


def length(entry: Entry) -> int:
    return sum(map(len, entry.captions))


Seen = tuple[Entry, bytes, Look]


def looked(
    pool: ThreadPoolExecutor, source: Source, layout: int, wish: Wish, older: list[Known]
) -> Iterator[Seen]:
    """Every entry of a source with its key and what was seen of its files, in order."""
    waiting: deque[tuple[Entry, bytes, Look | Future[Look]]] = deque()
    held = 0

    def first() -> Seen:
        entry, key, found = waiting.popleft()
        return entry, key, found.result() if isinstance(found, Future) else found

    for block in blocks(source.entries()):
        keys = [key_of(layout, entry) for entry in block]
        finds = [each.find(keys) for each in older]
        for number, (entry, key) in enumerate(zip(block, keys, strict=True)):
            reason = fault_of(entry)
            found: Look | Future[Look] | None = Look(reason=reason) if reason else None
            found = found or next((find[number] for find in finds if find[number]), None)
            waiting.append((entry, key, found or pool.submit(look, source, entry, wish)))
            held += length(entry)
        while waiting and (len(waiting) > AHEAD or held > AHEAD_TEXT):
            held -= length(waiting[0][0])
            yield first()
    while waiting:
        yield first()


def build(folder: Path, sources: Sequence[Source], wish: Wish, say: Callable[[str], None]) -> None:
    """Make the index `folder`; to be called under the lock.

    say is told how far it is, every few seconds. Raises UserError for a part without a record of use, and
    where a source cannot be read; what was seen until then is not looked at again.
    """
    shelf = folder.parent
    older = known(shelf, wish.digests)
    draft = Draft(shelf / f"{DRAFTS}{FORMAT}-{time.time_ns()}", wish.digests)
    try:
        with quiet(), ThreadPoolExecutor(THREADS) as pool:
            try:
                for layout, source in enumerate(sources):
                    scan(draft, looked(pool, source, layout, wish, older), layout, source.layout.source, say)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        check_parts(draft, [source.layout.source for source in sources])
        draft.finish()
    finally:
        draft.close()
    publish(draft.folder, folder)


def scan(draft: Draft, seen: Iterable[Seen], layout: int, name: str, say: Callable[[str], None]) -> None:
    """Write what was seen of one source."""
    begun = told = time.monotonic()
    for number, (entry, key, found) in enumerate(seen, 1):
        if found.reason:
            draft.set_aside(layout, entry, found.reason, found.passing)
        else:
            draft.add(layout, entry, key, (found.height, found.width), found.digest)
        draft.beat()
        if (now := time.monotonic()) - told >= TOLD:
            told = now
            say(f"indexing {name}: {number:,} records, {number / (now - begun):,.0f} a second")


def check_parts(draft: Draft, names: Sequence[str]) -> None:
    """Raise UserError for a part in which nothing can be trained on."""
    told = {part.layout for part in draft.parts.values()}
    for layout, name in enumerate(names):
        if layout not in told:
            do = "put images there, or name another place"
            raise UserError(f'records of "{name}"', "there is none", do)
    for part in draft.parts.values():
        if part.count:
            continue
        name = part_name(names[part.layout], part.group)
        draft.list.flush()
        with (draft.folder / "faults.jsonl").open("rb") as lines:
            mine = (fault for fault in map(unline, lines) if fault[2] == part.number)
            faults = [f"{fault[0]}: {fault[1]}" for fault in islice(mine, 3)]
        found = f"none of its {part.faults:,} can be used: {'; '.join(faults)}"
        raise UserError(f'records of "{name}"', found, "mend them, or leave this part out")


def part_name(source: str, group: str) -> str:
    return f"{source}/{group}" if group else source
