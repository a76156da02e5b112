"""The records of a config's data on disk, memory-mapped: their sizes, parts, captions, and the faults.

An index lies in data.store under the hash of what was asked for, and is named for the state of the sources:
when that changes another one is made, and only what is new is opened for it.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from sfumato.config import Data
from sfumato.data.index.draft import unline, unpacked
from sfumato.data.index.headers import quiet
from sfumato.data.index.scan import Wish, build, look, part_name
from sfumato.data.index.shelf import FORMAT, facts_of, freshen, locked, published
from sfumato.data.sources import Entry, Source, Span, digest, open_source
from sfumato.errors import UserError

TRIED = 3  # faults that may have passed are tried again when an index is opened


@dataclass(frozen=True)
class Record:
    """One record of the data."""

    name: str
    image: Span
    captions: list[str]
    weights: list[float]
    """One for each caption, or none where all count alike."""
    hint: Span | None
    """The conditioning image."""
    size: tuple[int, int]
    """Height and width as a viewer shows the picture."""
    part: int


@dataclass(frozen=True)
class Fault:
    """A record that is of no use, and why."""

    name: str
    reason: str
    part: int


@dataclass(frozen=True)
class PartFacts:
    """A part of the data."""

    name: str
    repeats: Fraction
    """Samples of it in an epoch are so many times its records."""
    count: int
    """Records of use."""


class Index:
    """The records of a config's data, by number. It takes little memory and is cheap to pickle."""

    sizes: np.ndarray
    """(N, 2) uint32: height and width as a viewer shows the picture; memory-mapped."""
    part: np.ndarray
    """(N,) uint16: the part that a record is of; memory-mapped."""
    prior: int | None
    """The part that preserves the prior, if the index holds it."""
    digests: np.ndarray | None
    """(N, 16) uint8: BLAKE2b-128 of the image file's bytes, then the conditioning image's, if asked for."""

    def __init__(self, folder: Path, data: Data, sources: Sequence[Source], wish: Wish) -> None:
        """Raises OSError or ValueError if there is no sound index in the folder."""
        facts = facts_of(folder)
        if facts is None:
            raise ValueError(f"no index in {folder}")
        self.folder, self.sources, self.facts, self.wish = folder, list(sources), facts, wish
        self.parts = parts_of(data, facts["parts"])
        given = data.prior is not None and data.prior.source is not None
        self.prior = len(self.parts) - 1 if given else None
        groups = [(part["layout"], part["group"]) for part in facts["parts"]]
        visits = [(part.repeats, part.count) for part in self.parts]
        self.fingerprint = digest([facts["content"], *groups, *visits])
        """Of names, captions, sizes, order and parts: the same for the same data in another place."""
        self.map()

    def map(self) -> None:
        """Map the files into memory. Raises OSError or ValueError if they are not of one index."""
        count = len(self)

        def column(name: str, *shape: int) -> np.ndarray:
            rows = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if rows.shape != shape:
                raise ValueError(f"{self.folder}: {name} of {rows.shape}, not {shape}")
            return rows

        self.sizes, self.part = column("sizes", count, 2), column("part", count)
        self.digests = column("digests", count, 16) if self.wish.digests else None
        self.offsets = column("offsets", count + 1)  # (N + 1,) uint64: where a record's line begins
        with (self.folder / "records.jsonl").open("rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self.text) != self.offsets[-1]:
            raise ValueError(f"{self.folder}: {len(self.text)} bytes of records, not {self.offsets[-1]}")

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("sizes", "part", "digests", "offsets", "text")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        try:
            self.map()
        except (OSError, ValueError) as error:
            do = "start again: it is made anew"
            raise UserError(f"the index in {self.folder}", f"it is gone: {error}", do) from error

    def __len__(self) -> int:
        return int(self.facts["records"])

    def line(self, number: int) -> Any:
        """A record as it is written: name, image, captions, weights, hint."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        return unline(self.text[int(self.offsets[number]) : int(self.offsets[number + 1])])

    def record(self, number: int) -> Record:
        """One record. Raises IndexError for a number that is not in range(len(self))."""
        name, image, captions, weights, hint = self.line(number)
        span, (height, width) = unpacked(image), self.sizes[number].tolist()
        assert span is not None, f"record {number} has no image"
        return Record(name, span, captions, weights, unpacked(hint), (height, width), int(self.part[number]))

    def name(self, number: int) -> str:
        """What messages call a record."""
        return str(self.line(number)[0])

    def open(self, number: int) -> BinaryIO:
        """The image file of a record. Raises OSError or UserError."""
        return self.source(number).open(self.record(number).image)

    def open_hint(self, number: int) -> BinaryIO:
        """The conditioning image's file of a record that has one. Raises OSError or UserError."""
        record = self.record(number)
        assert record.hint is not None, f"{record.name} has no conditioning image"
        return self.source(number).open(record.hint)

    def source(self, number: int) -> Source:
        """The source of a record."""
        return self.sources[self.facts["parts"][int(self.part[number])]["layout"]]

    def fault_lines(self) -> Iterator[Any]:
        """The faults as they are written: name, reason, part, and the spans of one that may have passed."""
        with (self.folder / "faults.jsonl").open("rb") as lines:
            yield from map(unline, lines)

    @property
    def faults(self) -> list[Fault]:
        """What was set aside, in order; read when asked for."""
        return [Fault(*told[:3]) for told in self.fault_lines()]

    def check_faults(self, data: Data) -> None:
        """Raise UserError if more records are of no use than data.max_faults allows."""
        count, total = int(self.facts["faults"]), len(self) + int(self.facts["faults"])
        if count <= data.max_faults * total:
            return
        first = "; ".join(f"{told[0]}: {told[1]}" for told in islice(self.fault_lines(), 3))
        raise UserError(
            f"at most {data.max_faults:.2%} of {total:,} records unusable (data.max_faults)",
            f"{count:,} ({count / total:.2%}): {first}{'; ...' if count > 3 else ''}. "
            f"All are listed in {self.folder / 'faults.jsonl'}",
            "mend or remove them, or allow more",
        )

    def mended(self) -> bool:
        """Whether a file that the system did not give when the index was made can be read now."""
        if not self.facts["passing"]:
            return False
        passing = (told for told in self.fault_lines() if told[3])
        with quiet():
            return not all(self.passing(*told) for told in islice(passing, TRIED))

    def passing(self, name: str, reason: str, part: int, spans: Sequence[Any]) -> bool:
        """Whether the files of a fault cannot be had still."""
        source = self.sources[self.facts["parts"][part]["layout"]]
        image, hint = map(unpacked, spans)
        assert image is not None, f"{name} has no image"
        return look(source, Entry(name, image, hint=hint), self.wish).passing

    def where(self) -> str:
        """One line for people: how much there is, and in which folder the index lies."""
        faults = f", {self.facts['faults']:,} set aside" if self.facts["faults"] else ""
        parts = f" in {len(self.parts)} parts" if len(self.parts) > 1 else ""
        return f"{len(self):,} records{parts}{faults} (index in {self.folder})"


def parts_of(data: Data, told: Sequence[dict[str, Any]]) -> list[PartFacts]:
    """The parts with their repeats in an epoch: as the config says, or so that the weights are kept.

    The prior's are 1: it has an order of its own.
    """
    asked_for = len(data.parts) or 1
    total = sum(part["count"] for part in told if part["layout"] < asked_for)
    visits = [0] * len(data.layouts)  # of each layout, were its weight not asked for
    for part in told:
        visits[part["layout"]] += part["count"] * part["repeats"]
    weights = [Fraction(part.weight or 0) for part in data.parts]
    parts = []
    for part in told:
        layout = part["layout"]
        repeats = Fraction(part["repeats"])
        own = data.parts[layout] if layout < len(data.parts) else None
        if own is not None and any(weights):
            repeats *= weights[layout] / sum(weights) * total / visits[layout]
            repeats = max(repeats.limit_denominator(10**6), Fraction(1, 10**6))
        elif own is not None and (asked := own.repeats) is not None:
            repeats *= max(Fraction(asked).limit_denominator(1000), Fraction(1, 1000))
        name = part_name(data.layouts[layout].source, part["group"])
        parts.append(PartFacts(name, repeats, part["count"]))
    return parts


def open_index(
    data: Data, digests: bool = False, verify: bool = True, tell: Callable[[str], None] | None = None
) -> Index:
    """The index of a config's data, made first if there is none of the sources' present state.

    digests: also hash the files' bytes. verify: see whether the sources have changed; otherwise the newest
    index is taken, which is right just after another process verified it. tell is told how far it is, every
    few seconds. Of several processes one makes the index, and the others wait for it. Faults are no error
    here: see Index.check_faults. Raises UserError for a source that cannot be read or has no record of use,
    for a store that cannot be written, and where the process that makes the index hangs.
    """
    say = tell or (lambda line: None)
    sources = [open_source(layout) for layout in data.layouts]
    asked = [(located(layout.source), layout.model_dump()) for layout in data.layouts]
    wish = Wish(digests, data.max_pixels)
    shelf = data.store / "index" / digest([*asked, *wish])[:20]

    def opened(folder: Path) -> Index | None:
        try:
            return Index(folder, data, sources, wish)
        except (OSError, ValueError):
            return None

    if not verify:
        for folder in published(shelf):
            if index := opened(folder):
                return index
    # Another Pillow may read what this one does not.
    state = digest([FORMAT, PIL.__version__, *(source.stamp() for source in sources)])[:20]
    index = opened(shelf / state)
    if index is not None and not index.mended():
        freshen(index.folder)
        return index
    names = ", ".join(layout.source for layout in data.layouts)
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with locked(shelf, names, say):
            index = opened(shelf / state)  # another process may have made it while this one waited
            if index is None or index.mended():
                build(shelf / state, sources, wish, say)
                index = opened(shelf / state)
    except (OSError, NotImplementedError) as error:  # the latter where a file system knows no locks
        do = "see that data.store can be written to and has space, and that the source can be read"
        raise UserError(f"an index of {names} in {shelf}", f"{type(error).__name__}: {error}", do) from error
    assert index is not None, f"the index just made in {shelf / state} cannot be opened"
    return index


def located(source: str) -> str:
    """A source with its folder in full, so that one store serves runs that are started in several places."""
    head, brace, _ = source.partition("{")
    place = os.path.dirname(head) or "." if brace else source
    return os.path.abspath(source) if "://" not in source and os.path.exists(place) else source
