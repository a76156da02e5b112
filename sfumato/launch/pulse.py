"""A rank's signs of life: what it writes, and what others read from that. Imports no torch.

A rank writes its step and what it is about to do into a few bytes of memory, which its supervisor shares
through a file. They also stand there when the rank has died or hangs.
"""

import mmap
import re
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORM = struct.Struct("<dQq40s")
"""Seconds allowed between two beats (0: none are expected), beats so far, step, what is done."""
MOST = 8  # ranks that are told of by name
AWAKE = 5.0  # seconds; an observer that looks again after more was itself stopped or very busy
WAITING = re.compile(
    r"/(torch/distributed|deepspeed/comm)/"
    r"|/sfumato/engine/(gradients\.py:step|engine\.py:_clip)$|/torch/\w+/__init__\.py:synchronize$"
)
"""In a stack: files, or functions, in which a rank waits for others, or a device for what they send it."""
FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Beat:
    """What a rank last said."""

    limit: float
    count: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"at step {self.step}, {self.doing}" if self.count else "before its first step"


class Pulse:
    """The memory of one rank's beats: a file that the supervisor shares, or the process's own."""

    def __init__(self, file: Path | None = None) -> None:
        if file is None:
            self.memory: Any = bytearray(FORM.size)
            return
        with file.open("r+b") as opened:
            self.memory = mmap.mmap(opened.fileno(), FORM.size)

    @staticmethod
    def make(file: Path) -> "Pulse":
        """A new file of a rank that has said nothing."""
        file.write_bytes(bytes(FORM.size))
        return Pulse(file)

    def write(self, beat: Beat) -> None:
        """Say it, without a system call."""
        FORM.pack_into(self.memory, 0, beat.limit, beat.count, beat.step, beat.doing.encode()[:40])

    def read(self) -> Beat:
        """What was said last."""
        limit, count, step, doing = FORM.unpack_from(self.memory, 0)
        return Beat(limit, count, step, doing.rstrip(b"\0").decode(errors="replace"))


class Stillness:
    """For how many seconds something has not changed, while its observer was awake.

    A job that Slurm suspends, or a laptop that sleeps, has not been still for that time.
    """

    def __init__(self, awake: float = AWAKE) -> None:
        self.awake, self.seconds = awake, 0.0
        self.seen: object = None
        self.at = time.monotonic()

    def look(self, value: object) -> float:
        """Look at it: the seconds without a change."""
        now = time.monotonic()
        self.seconds = self.seconds + min(now - self.at, self.awake) if value == self.seen else 0.0
        self.seen, self.at = value, now
        return self.seconds


def behind(beats: Mapping[int, Beat], stacks: Mapping[int, str]) -> list[int]:
    """The ranks for which the others wait, as far as can be told.

    stacks: what faulthandler says of each rank; one without gave no answer at all, so it is to blame. Else
    those with the fewest beats are, and among them those that do not wait for others themselves.
    """
    dumb = [rank for rank in beats if rank not in stacks]
    if dumb:
        return dumb
    fewest = min(beat.count for beat in beats.values())
    late = [rank for rank, beat in beats.items() if beat.count == fewest]
    return [rank for rank in late if not waits(stacks[rank])] or late


def frames(stack: str) -> list[tuple[str, str, str]]:
    """File, line and function of the main thread, the innermost first; faulthandler names it last."""
    return FRAME.findall(re.split(r"^(?:Current thread|Thread) .*$", stack, flags=re.M)[-1])


def waits(stack: str) -> bool:
    """Whether a rank's main thread waits for other ranks."""
    return any(WAITING.search(f"{file}:{name}") for file, _, name in frames(stack)[:4])


def where(stack: str) -> str:
    """The innermost line of a rank's main thread, in words."""
    found = frames(stack)
    return "it is in {2}, {0}:{1}".format(*found[0]) if found else "it is in no line of Python"


def guilty_lines(
    guilty: Sequence[int],
    beats: Mapping[int, Beat],
    stacks: Mapping[int, str],
    notes: Mapping[int, str],
    world: int,
) -> list[str]:
    """A line for each rank that is to blame: when and where it hangs, as far as that is known."""
    lines = []
    for rank in guilty[:MOST]:
        found = notes.get(rank) or (where(stacks[rank]) if rank in stacks else "it does not answer")
        lines.append(f"rank {rank} of {world} hangs {beats[rank]}: {found}")
    if len(guilty) > MOST:
        lines.append(f"{len(guilty) - MOST} more ranks hang like them")
    return lines


def hang(
    beats: Mapping[int, Beat],
    stacks: Mapping[int, str],
    limit: float,
    notes: Mapping[int, str] | None = None,
    guilty: Sequence[int] | None = None,
    world: int | None = None,
) -> str:
    """What the user is told when ranks have not beaten for `limit` seconds.

    notes: what else is known of a rank, such as that its process is stopped. guilty: the ranks to blame where
    that is known otherwise than by `behind`. world: how many ranks there are, if not all have beats.
    """
    guilty = guilty or behind(beats, stacks)
    lines, most = guilty_lines(guilty, beats, stacks, notes or {}, world or len(beats)), MOST
    others = [f"rank {rank} {beat}" for rank, beat in sorted(beats.items()) if rank not in guilty]
    if others:
        more = f" and {len(others) - most} more" if len(others) > most else ""
        lines.append(f"others wait: {'; '.join(others[:most])}{more}")
    lines.append(
        f"engine.timeout = {limit:g} s are over; the last checkpoint is whole, the same command goes on"
    )
    return "\n".join(lines)
