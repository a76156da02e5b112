"""What the doctor says: a line for each thing that it looked at, with a verdict and what to do."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

WIDTH = 80
NAME = 12
"""Columns of a line's name, and before its text besides the verdict's."""


class Verdict(StrEnum):
    """How a thing stands."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    UNSEEN = "not looked at"


STYLES = {
    Verdict.GOOD: "green",
    Verdict.WARNING: "yellow",
    Verdict.BAD: "bold red",
    Verdict.UNSEEN: "dim",
}
ORDER = (Verdict.UNSEEN, Verdict.GOOD, Verdict.WARNING, Verdict.BAD)
"""From the least to the most that asks for attention."""


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    text: str
    do: str = ""
    """What to do about it; empty where there is nothing."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, for --json."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"verdict": self.verdict.value}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Line":
        """The line that `plain` described."""
        return cls(**{**plain, "verdict": Verdict(plain["verdict"])})


def good(name: str, text: str, **figures: Any) -> Line:
    """All is well."""
    return Line(name, Verdict.GOOD, text, figures=figures)


def warning(name: str, text: str, do: str, **figures: Any) -> Line:
    """A run works, but not as well as it could, or not for long."""
    return Line(name, Verdict.WARNING, text, do, figures)


def bad(name: str, text: str, do: str, **figures: Any) -> Line:
    """A run would fail, or give wrong numbers."""
    return Line(name, Verdict.BAD, text, do, figures)


def unseen(name: str, why: str) -> Line:
    """It was not looked at."""
    return Line(name, Verdict.UNSEEN, why)


def judged(fine: bool, name: str, text: str, do: str, grave: bool = False, **figures: Any) -> Line:
    """Good where it is fine; else bad where that is grave, or a warning."""
    if fine:
        return good(name, text, **figures)
    return bad(name, text, do, **figures) if grave else warning(name, text, do, **figures)


def show(line: Line, file: TextIO | None = None) -> None:
    """Print a line, and below it what to do."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    # A terminal's width may be used; a pipe and a narrow one get 80 columns.
    room = max(WIDTH, min(console.width, 120)) if console.is_terminal else WIDTH
    word = "-" if line.verdict is Verdict.UNSEEN else line.verdict.value
    text = f"not looked at: {line.text}" if line.verdict is Verdict.UNSEEN else line.text
    indent = " " * (8 + NAME + 1)
    rows = [row for part in text.splitlines() for row in wrapped(part, room - len(indent))]
    if line.do and line.verdict is not Verdict.GOOD:
        rows += wrapped(f"-> {line.do}", room - len(indent))
    head = Text(f"{word:<8}", STYLES[line.verdict]) + Text(f"{line.name:<{NAME}} ", "bold") + Text(rows[0])
    console.print(head)
    for row in rows[1:]:
        console.print(Text(indent + row))


def wrapped(text: str, width: int) -> list[str]:
    """A text in rows; paths are not broken."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def summary(lines: Iterable[Line], seconds: float) -> str:
    """The last line: how many of each verdict."""
    told = [*lines]
    counts = {verdict: sum(line.verdict is verdict for line in told) for verdict in Verdict}
    parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
    return f"{', '.join(parts)}; {seconds:.0f} s"
