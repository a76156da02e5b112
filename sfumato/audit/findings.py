"""What was found, kind by kind: all of it in a file, the counts and the worst examples in memory."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import heappush, heappushpop
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from sfumato.errors import UserError

EXAMPLES = 100  # of each kind, that reports hold
REASONS = 50  # different ones that are counted
NUMBER = re.compile(r"\d[\d,]*")  # by which reasons differ that are the same


class Kind(NamedTuple):
    """A kind of finding, for people."""

    level: str
    """"fault": it is set aside. "look": it may spoil what is learned. "note": it is dealt with."""
    title: str
    do: str
    """What happens to such a record, and what to do."""


KINDS = {
    "fault": Kind(
        "fault",
        "Cannot be used",
        "A run sets these aside, and other records take their place. Fetch or export the files again, or "
        "take them away.",
    ),
    "damaged_shard": Kind(
        "fault",
        "Shards of which a part is lost",
        "What follows the damage is lost, however much that is. Fetch or write them again: each counts whole "
        "where data.max_faults is compared with the share of all shards.",
    ),
    "too_small": Kind(
        "fault",
        "Smaller than every bucket",
        "Not trained on. Lower data.buckets.min, set data.buckets.upscale = true, or take larger pictures.",
    ),
    "hint_shape": Kind(
        "look",
        "A conditioning image of another shape",
        "It is cut as its picture is, so that the two do not lie on one another. Make both of one aspect.",
    ),
    "blank": Kind("look", "One colour only", "Nothing is to be seen there. Take them away."),
    "dark": Kind("look", "Nearly black", "See whether they show what their captions say."),
    "bright": Kind("look", "Nearly white", "See whether they show what their captions say."),
    "exact_duplicate": Kind(
        "look",
        "The same file again",
        "They are trained on as often as they are there. Keep one of each, or say how often with repeats.",
    ),
    "near_duplicate": Kind(
        "look",
        "Nearly the same picture again",
        "Saved again, or made smaller. They are learned by heart first. Keep the best one of each.",
    ),
    "enlarged": Kind(
        "look",
        "Smaller than what is trained at",
        "They are enlarged, and the model learns their blur. Lower data.resolution, turn "
        "data.buckets.upscale off, or take larger pictures.",
    ),
    "cropped": Kind(
        "look",
        "A quarter or more is cut away",
        "What the caption names may be cut off. Set data.buckets = true, or give buckets that fit better.",
    ),
    "small_bucket": Kind(
        "look",
        "Buckets of fewer pictures than a batch",
        "A batch then shows some of them twice. Raise data.buckets.smallest, or lower batch_size.",
    ),
    "empty_caption": Kind(
        "look",
        "An empty caption",
        "It trains the unconditional model. Write a caption, or leave the record out; to drop captions on "
        "purpose there is data.caption_dropout.",
    ),
    "long_caption": Kind(
        "look",
        "A caption longer than the model reads",
        "Its end is cut off. Put what matters first, shorten it, or set model.prompt_window = 150 or 225.",
    ),
    "odd_caption": Kind(
        "look",
        "A caption with characters that cannot be printed",
        "Often a wrong encoding. Write the file as UTF-8.",
    ),
    "alpha": Kind(
        "look",
        "Transparent",
        "Laid over white, which is learned with them. If that is not wanted, lay them over something else.",
    ),
    "animated": Kind("look", "Several frames or pages", "The first alone is trained on."),
    "repeated_caption": Kind(
        "note",
        "A caption of several records",
        "As it should be where one phrase names them all; else the model cannot tell them apart.",
    ),
    "rotated": Kind("note", "Turned by an EXIF tag", "Turned upright, as viewers show them."),
    "cmyk": Kind(
        "note",
        "CMYK",
        "Changed to sRGB by their own profile; without one colours are a guess, and it is better to convert "
        "them with a program for prints.",
    ),
    "sixteen_bit": Kind("note", "16 bits a channel", "Rounded to 8."),
    "palette": Kind("note", "With a palette", "Changed to RGB."),
    "profile": Kind("note", "With another colour profile than sRGB", "Changed to sRGB."),
    "grey": Kind(
        "note", "Grey", 'Trained as they are. Captions should say so, as "a black and white photograph".'
    ),
}
"""In the order in which they are told."""


class Example(NamedTuple):
    """A finding that reports show."""

    severity: float
    turn: int
    """Minus its place among all of its kind: of equally bad ones the first stay."""
    name: str
    detail: str
    number: int | None
    """Of the record, if it can be shown."""


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within it files are written to the folder `out`; UserError if that cannot be done."""
    try:
        yield
    except OSError as error:
        do = "name a folder that can be written to, on a disk with space"
        raise UserError(f"a report in {out}", str(error), do) from error


class Findings:
    """Collects findings; a context. What is written appears under its name when all has gone well."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.paths = {name: out / f"{name}.jsonl" for name in ("findings", "faults")}
        self.files: dict[str, TextIO] = {}
        self.counts: Counter[str] = Counter()
        self.worst: dict[str, list[Example]] = {kind: [] for kind in KINDS}  # heaps
        self.reasons: Counter[str] = Counter()

    def add(
        self, kind: str, name: str, detail: str = "", number: int | None = None, severity: float = 0.0
    ) -> None:
        """One finding. number: the record's, if pages may show it. severity: of many the worst are shown."""
        assert kind in KINDS, f"no kind of finding is called {kind}"
        self.counts[kind] += 1
        self.write("findings", {"kind": kind, "name": name, "detail": detail})
        heap, told = self.worst[kind], Example(severity, -self.counts[kind], name, detail, number)
        (heappush if len(heap) < EXAMPLES else heappushpop)(heap, told)

    def fault(self, name: str, reason: str, found_in: str) -> None:
        """A record that cannot be used. found_in: "scan" or "pixels"."""
        self.add("fault", name, reason)
        self.write("faults", {"name": name, "reason": reason, "found_in": found_in})
        like = NUMBER.sub("N", reason)
        self.reasons[like if like in self.reasons or len(self.reasons) < REASONS else "other reasons"] += 1

    def write(self, file: str, told: dict[str, Any]) -> None:
        """A line of one of the files."""
        with writing(self.out):
            self.files[file].write(json.dumps(told) + "\n")

    def __enter__(self) -> "Findings":
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for name, path in self.paths.items():
                self.files[name] = path.with_name(f".{path.name}.new").open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self.out):
            for name, file in self.files.items():
                file.close()
                if error is None:
                    os.replace(file.name, self.paths[name])
                else:
                    os.unlink(file.name)

    def examples(self, kind: str) -> list[Example]:
        """The worst of a kind, or the first of those that are all alike."""
        return sorted(self.worst[kind], reverse=True)

    def problems(self) -> list[dict[str, Any]]:
        """What was found, kind by kind, with advice and examples."""
        return [
            {
                "kind": kind,
                **told._asdict(),
                "count": self.counts[kind],
                "examples": [{"name": each.name, "detail": each.detail} for each in self.examples(kind)],
            }
            for kind, told in KINDS.items()
            if self.counts[kind]
        ]
