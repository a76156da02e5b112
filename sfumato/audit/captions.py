"""The captions: empty ones, those that are too long or repeated, and characters that nobody can read."""

import unicodedata
from collections.abc import Callable
from hashlib import blake2b
from heapq import heappush, heappushpop
from typing import Any

import numpy as np

from sfumato.audit.findings import Findings
from sfumato.audit.words import Ruler
from sfumato.config import Data
from sfumato.data.index import Index

CHUNK = 1024  # records whose captions are measured at once
SHOWN = 12  # longest captions, and most frequent ones
LONGEST = 2000  # characters of a caption that reports show
MOST = 2**16 - 1  # longer captions count as this long
MANY = 64  # captions of a record; more count as this many
# Cc, Cf and so on that are at home in captions: line ends, and what joins letters of some scripts and emoji.
AT_HOME = {*"\n\r\t", *"\u200c\u200d\u00ad", *map(chr, range(0xE0020, 0xE0080))}
REPLACED = "\ufffd"  # what a decoder writes for bytes that are no text
STRANGE = ("Cc", "Cf", "Cs", "Co", "Cn")  # categories of characters that are not to be seen


class Captions:
    """Reads the captions of an index; remembers 12 bytes of each."""

    def __init__(self, data: Data, ruler: Ruler, findings: Findings) -> None:
        self.data, self.ruler, self.findings = data, ruler, findings
        self.hashes: list[np.ndarray] = []  # of every text that is not empty, once for each record
        self.records: list[np.ndarray] = []  # whose it is
        self.lengths = np.zeros(MOST + 1, np.int64)  # captions of each length
        self.per_record = np.zeros(MANY + 1, np.int64)  # records with so many captions
        self.longest: list[tuple[int, int, str]] = []  # a heap: length, minus the record's number, text

    def run(self, index: Index, usable: np.ndarray, done: Callable[[int, int], None]) -> dict[str, Any]:
        """Read all captions of the usable records (N,); the figures that the report holds."""
        numbers = np.flatnonzero(usable)
        for start in range(0, len(numbers), CHUNK):
            chunk = numbers[start : start + CHUNK].tolist()
            self.add(index, chunk)
            done(len(chunk), len(numbers))
        counts, limit = self.findings.counts, self.ruler.limit
        return {
            "count": int(self.lengths.sum()),
            "per_record": {str(n): held for n, held in enumerate(self.per_record.tolist()) if held},
            "empty": counts["empty_caption"],
            "odd": counts["odd_caption"],
            "unit": self.ruler.unit,
            "why_words": self.ruler.why,
            "limit": limit,
            "over_limit": None if limit is None else counts["long_caption"],
            "length": self.figures(),
            "longest": [
                {"name": index.name(-minus), "length": length, **self.split(text)}
                for length, minus, text in sorted(self.longest, reverse=True)
            ],
            **self.repeated(index),
        }

    def add(self, index: Index, numbers: list[int]) -> None:
        """Look at some records' captions."""
        records = [index.record(number) for number in numbers]
        flat = [
            (number, record.name, text)
            for number, record in zip(numbers, records, strict=True)
            for text in record.captions
        ]
        lengths = self.ruler.lengths([self.whole(text) for _, _, text in flat])
        for (number, name, text), length in zip(flat, lengths, strict=True):
            self.look(number, name, text, length)
        np.add.at(self.lengths, np.minimum(np.array(lengths, np.int64), MOST), 1)
        held = [min(len(record.captions), MANY) for record in records]
        np.add.at(self.per_record, np.array(held, np.int64), 1)
        texts = {(number, hashed(text)) for number, _, text in flat if text.strip()}
        self.records.append(np.array([number for number, _ in texts], np.uint32))
        self.hashes.append(np.array([told for _, told in texts], np.uint64))

    def whole(self, text: str) -> str:
        """A caption with what is put around it, as it is trained on."""
        return f"{self.data.caption_prefix}{text}{self.data.caption_suffix}"

    def look(self, number: int, name: str, text: str, length: int) -> None:
        """Note what is odd about one caption."""
        if not text.strip():
            self.findings.add("empty_caption", name, "", number)
        if strange := unprintable(text):
            self.findings.add("odd_caption", name, ", ".join(strange), number)
        limit = self.ruler.limit
        if limit is not None and length > limit:
            told = f"{length} tokens, of which {limit} are read"
            self.findings.add("long_caption", name, told, number, length)
        (heappush if len(self.longest) < SHOWN else heappushpop)(self.longest, (length, -number, text))

    def split(self, text: str) -> dict[str, str]:
        """What the model reads of a caption, and what is cut off; each at most LONGEST characters."""
        whole = self.whole(text)
        read = self.ruler.read(whole)
        return {"read": read[:LONGEST], "cut": whole[len(read) :][:LONGEST]}

    def figures(self) -> dict[str, Any]:
        """How long captions are."""
        sums = np.cumsum(self.lengths)
        total = int(sums[-1])
        marks = {"median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
        found: dict[str, Any] = {
            name: int(np.searchsorted(sums, share * total)) if total else 0 for name, share in marks.items()
        }
        return found | {"counts": np.trim_zeros(self.lengths, "b").tolist()}

    def repeated(self, index: Index) -> dict[str, Any]:
        """The captions that several records have, the most frequent first."""
        hashes = np.concatenate([np.zeros(0, np.uint64), *self.hashes])
        records = np.concatenate([np.zeros(0, np.uint32), *self.records])
        self.hashes, self.records = [], []
        order = np.lexsort((records, hashes))
        hashes, records = hashes[order], records[order]
        starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]][: len(hashes)])
        counts = np.diff(np.r_[starts, len(hashes)])
        several = np.flatnonzero(counts > 1)
        several = several[np.lexsort((records[starts[several]], -counts[several]))]
        shown: list[dict[str, Any]] = []
        for place in several.tolist():
            record = index.record(int(records[starts[place]]))
            told = hashes[starts[place]]
            text = next(text for text in record.captions if hashed(text) == told)
            self.findings.add("repeated_caption", record.name, f"{counts[place]} records: {text[:LONGEST]}")
            if len(shown) < SHOWN:
                shown.append({"text": text[:LONGEST], "records": int(counts[place]), "first": record.name})
        return {
            "different": len(starts),
            "repeated": len(several),
            "records_with_repeated": int(counts[several].sum()),
            "most_frequent": shown,
        }


def hashed(text: str) -> int:
    """64 bits of a text."""
    told = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(told, "little")


def unprintable(text: str) -> list[str]:
    """The code points of a text that are not to be seen, such as U+0007, and U+FFFD; each once."""
    if text.isprintable() and REPLACED not in text:
        return []
    strange = {
        character
        for character in text
        if character == REPLACED or (character not in AT_HOME and unicodedata.category(character) in STRANGE)
    }
    return [f"U+{ord(character):04X}" for character in sorted(strange)]
