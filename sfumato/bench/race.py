"""A side of `bench peers` while it runs: what is seen of its steps, processor and memory from outside."""

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sfumato import tuning
from sfumato.bench.fire import PLACE

LIMIT = 900.0  # seconds that a side may take for a round
POLL = 0.01  # seconds between two looks
BAR = re.compile(rb"(\d+)/\d+ \[.*?loss=([0-9.e+-]+)")
"""A step of a script's progress bar, of which each is drawn twice: without and with its loss."""


@dataclass(frozen=True)
class Entrant:
    """One side: its command, and the folder that it fills and that is thrown away after each round."""

    name: str
    command: list[str]
    folder: Path
    steps: int
    lines: Path | None
    """A file with a JSON line a step; None: the steps are read off a progress bar on stderr."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own."""


@dataclass
class Seen:
    """What was seen of one start. times: seconds from its start to the end of each step."""

    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    cpu: float = 0.0
    """Seconds of the processor from the first step to the last."""
    memory: int = 0


def race(side: Entrant) -> Seen:
    """Start a side, watch it to its last step, and end it there."""
    side.folder.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(PLACE)}
    env |= tuning.missing(env, 1) | {"TQDM_MININTERVAL": "0", "PYTHONUNBUFFERED": "1"}
    env |= {"WANDB_MODE": "disabled", **side.env}  # the examples report to whatever is installed
    log = side.folder.parent / f"{side.folder.name}.log"
    began = time.perf_counter()
    with log.open("wb") as words:
        process = subprocess.Popen(
            side.command,
            env=env,
            stdout=words,
            stderr=words if side.lines is not None else subprocess.PIPE,
            start_new_session=True,
        )
        seen = Seen()
        found: list[tuple[float, float]] = []  # of each step its end and its loss
        reader = None
        if process.stderr is not None:
            reader = threading.Thread(target=read_bar, args=(process.stderr.read1, found, words), daemon=True)  # type: ignore[attr-defined]
            reader.start()
        try:
            watch(side, process, found, began, seen)
        finally:
            for child in family_of(process.pid):
                child.kill()
            process.wait()
            if reader is not None:
                reader.join(5)
    if len(found) < side.steps:
        tail = b"\n".join(log.read_bytes().splitlines()[-15:]).decode(errors="replace")
        raise RuntimeError(f"{side.name} ended after {len(found)} of {side.steps} steps:\n{tail}")
    seen.times = [when - began for when, _ in found[: side.steps]]
    seen.losses = [loss for _, loss in found[: side.steps]]
    return seen


def watch(
    side: Entrant,
    process: subprocess.Popen[bytes],
    found: list[tuple[float, float]],
    began: float,
    seen: Seen,
) -> None:
    """Look until the last step was seen, the process has ended, or the time is up."""
    new = read_lines(side.lines) if side.lines is not None else None
    first, looks, apart = 0.0, 0, 0.0
    while len(found) < side.steps and time.perf_counter() < began + LIMIT:
        ended = process.poll() is not None
        if new is not None:
            # Its own clock tells the steps apart more finely than our looks; the first is dated by us.
            for line in next(new):
                if not found:
                    apart = time.perf_counter() - line["seconds"]
                found.append((apart + line["seconds"], line["loss"]))
        if found and not first:
            first = processor(process.pid)
        if looks % 20 == 0:
            seen.memory = max(seen.memory, memory(process.pid))
        if ended:
            return
        looks += 1
        time.sleep(POLL)
    seen.cpu = processor(process.pid) - first


def read_lines(path: Path) -> Iterator[list[dict[str, float]]]:
    """The JSON lines that a file has got since the last look, whole ones only."""
    done = 0
    while True:
        text = path.read_bytes()[done:] if path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        done += len(whole)
        yield [json.loads(line) for line in whole.splitlines()]


def read_bar(read: Callable[[int], bytes], found: list[tuple[float, float]], words: object) -> None:
    """Note the steps that a progress bar tells of, until its end."""
    rest = b""
    while content := read(65536):
        words.write(content)  # type: ignore[attr-defined]
        *parts, rest = re.split(rb"[\r\n]", rest + content)
        for part in [*parts, rest]:
            match = BAR.search(part)
            if match and int(match[1]) > len(found):
                found.append((time.perf_counter(), float(match[2])))
            elif match and found and int(match[1]) == len(found):
                found[-1] = (found[-1][0], float(match[2]))  # drawn before with the loss of the step before


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def processor(pid: int) -> float:
    """Seconds of the processor that a process and its children have used."""
    total = 0.0
    for process in family_of(pid):
        try:
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:
            continue
    return total


def memory(pid: int) -> int:
    """Bytes of a process and its children, pages that several share counted in parts."""
    total = 0
    for process in family_of(pid):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
