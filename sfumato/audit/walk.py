"""Every picture decoded once, as a run decodes it, by several threads and in bounded memory."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sfumato.audit.findings import Findings
from sfumato.audit.pixels import Header, Pixels, Trait, header, pixels
from sfumato.data.index import Index, Record
from sfumato.data.index.headers import Unusable, quiet, size_of
from sfumato.data.samples import reductions
from sfumato.data.transforms import covering, decode
from sfumato.errors import UserError

THREADS = 32  # at most; Pillow decodes without Python's lock
AHEAD = 256  # records that are decoded or wait at once
ROOM = 2**27  # pixels that are decoded at once, unless a single picture has more
SHAPE = 0.02  # by which the aspects of a picture and of its conditioning image may differ
NONE = np.iinfo(np.uint16).max  # the bucket of a record without one


class Look(NamedTuple):
    """What was seen of one record."""

    header: Header = Header()
    pixels: Pixels | None = None
    hint: str = ""
    """What is odd about its conditioning image."""
    fault: str = ""
    """Why it is of no use."""


@dataclass
class Seen:
    """What was seen of all records, in 22 bytes each."""

    traits: np.ndarray
    """(N,) uint16: the bits of Trait."""
    hashes: np.ndarray
    """(N,) uint64: difference hashes."""
    colours: np.ndarray
    """(N, 12) uint8: mean colours of the quarters."""
    formats: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    """Names of colour profiles."""
    hints: int = 0
    """Records that have a conditioning image."""

    def count(self, header: Header, hint: bool) -> None:
        """Count a record that can be used."""
        self.formats[header.format] += 1
        if header.profile:
            self.profiles[header.profile] += 1
        self.hints += hint

    def has(self, trait: Trait) -> np.ndarray:
        """Whether each record (N,) has one of these traits."""
        return (self.traits & np.uint16(trait)) != 0


class Walk:
    """Looks at every record of an index."""

    def __init__(self, index: Index, most: int, targets: list[tuple[int, int]], bucket: np.ndarray) -> None:
        """most: pixels that a picture may have. targets: the buckets' sizes. bucket: (N,), each record's."""
        self.index, self.most, self.targets, self.bucket = index, most, targets, bucket

    def run(self, findings: Findings, done: Callable[[int, int], None]) -> Seen:
        """Decode everything. done is told how many more are done, and how many there are."""
        count = len(self.index)
        seen = Seen(np.zeros(count, np.uint16), np.zeros(count, np.uint64), np.zeros((count, 12), np.uint8))
        for number, look in self.looks():
            traits = look.header.traits
            if look.pixels is not None:
                traits |= look.pixels.traits
                seen.hashes[number] = look.pixels.hash
                seen.colours[number] = np.frombuffer(look.pixels.colours, np.uint8)
            if look.fault:
                traits |= Trait.FAULT
                findings.fault(self.index.name(number), look.fault, "pixels")
            else:
                seen.count(look.header, self.wanted(number))
            if look.hint:
                traits |= Trait.HINT_SHAPE
                findings.add("hint_shape", self.index.name(number), look.hint, number)
            seen.traits[number] = traits
            done(1, count)
        return seen

    def wanted(self, number: int) -> bool:
        """Whether a record is to have a conditioning image."""
        return bool(self.index.source(number).layout.conditioning_column)

    def looks(self) -> Iterator[tuple[int, Look]]:
        """What is seen of each record, in order."""
        waiting: deque[tuple[int, int, Future[Look]]] = deque()
        held = 0
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        with quiet(), ThreadPoolExecutor(threads) as pool:
            try:
                for number in range(len(self.index)):
                    size = int(self.index.sizes[number].astype(np.int64).prod())
                    while waiting and (len(waiting) >= AHEAD or held + size > ROOM):
                        first, room, look = waiting.popleft()
                        held -= room
                        yield first, look.result()
                    waiting.append((number, size, pool.submit(self.look, number)))
                    held += size
                for first, _, look in waiting:
                    yield first, look.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def look(self, number: int) -> Look:
        """Open and decode the files of one record."""
        record, bucket = self.index.record(number), self.bucket[number]
        covers = covering(record.size, self.targets[bucket]) if bucket != NONE else None
        told = Header()
        try:
            with self.index.open(number) as file:
                told = header(file)
                file.seek(0)
                picture = decode(file, record.name, covers, self.most)
            if (picture.height, picture.width) not in reductions(record.size):
                high, wide = record.size
                return Look(told, fault=f"it is of another size than the {high} x {wide} of its header")
            return Look(told, pixels(picture), self.hint(number, record, covers))
        except Exception as error:
            # Broken files make Pillow raise OSError, SyntaxError, TypeError, struct.error ...
            return Look(told, fault=reason(error))

    def hint(self, number: int, record: Record, covers: tuple[int, int] | None) -> str:
        """Decode the conditioning image, if there is to be one; what is odd about it."""
        if not self.wanted(number):
            return ""
        if record.hint is None:
            raise UserError(record.name, "it has no conditioning image", "give it one")
        try:
            with self.index.open_hint(number) as file:
                high, wide = size_of(file, self.most)
                file.seek(0)
                decode(file, record.name, covers, self.most)
        except Exception as error:
            raise UserError(record.name, f"the conditioning image: {reason(error)}", "mend it") from error
        aspect = high / wide * record.size[1] / record.size[0]
        if abs(aspect - 1) <= SHAPE:
            return ""
        return f"{wide} x {high} beside a picture of {record.size[1]} x {record.size[0]}"


def reason(error: Exception) -> str:
    """One line that says why a file cannot be used, without its path."""
    if isinstance(error, UserError):
        return error.found
    if isinstance(error, Unusable):
        return error.reason
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"it cannot be read: {type(error).__name__}: {told}"
