"""The disk on which the optimizer waits: whether it can, whether there is room, and how long a step takes."""

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.doctor.lines import Line, bad, good, judged, warning
from sfumato.engine import offload, reader
from sfumato.engine.ds_config import ds_config, offloaded
from sfumato.engine.size import readable
from sfumato.errors import UserError
from sfumato.planner.architectures import facts_of
from sfumato.planner.state import Swapped, swapped
from sfumato.planner.trace import Stage

BYTES = 64 << 20  # written, and read again, to measure the speed
PART = 4 << 20
SECONDS = 4.0  # of each, at most
LONG = 60.0
"""Seconds that a step may wait for the disk before it is said: a run of 1,000 steps waits 17 hours."""


def lines(config: Config | None, world: int, ranks: int) -> list[Line]:
    """What is said of a machine with `ranks` of all ranks; nothing where no optimizer waits on a disk."""
    if config is None or config.engine.offload_optimizer != "nvme":
        return []
    return [compiled(), room(config, world, ranks)]


def compiled() -> Line:
    """DeepSpeed's reader of disks."""
    name = "disk reader"
    try:
        offload.check_reader()
    except UserError as error:
        return bad(name, error.found, error.do)
    if reader.is_there():
        return good(name, "DeepSpeed's reader of disks is compiled for this torch")
    text = "DeepSpeed's reader of disks is not compiled yet; compiler, ninja and libaio are there"
    return warning(name, text, "nothing: the first start compiles it, which takes some minutes")


def room(config: Config, world: int, ranks: int) -> Line:
    """The folder, what the planner says is needed there, and the disk's speed past the system's cache."""
    name = "disk nvme"
    try:
        offload.check(config, world)
        there, why = taken(config, world)
        needed, several = there.disk * ranks, offloaded(config)["offload_optimizer"]["buffer_count"]
        offload.check_disk(config, needed, there.room // (4 * several))
    except UserError as error:
        return bad(name, f"{error.asked}: {error.found}", error.do)
    folder = config.engine.nvme_path
    assert folder is not None, "the check lets no such run pass"
    free = shutil.disk_usage(folder).free
    try:
        written, read = speeds(folder, min(BYTES, free // 2))
    except OSError as error:
        return bad(name, f"{folder}: {error.strerror}", "set engine.nvme_path to a folder on another disk")
    told = f"writes {written / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s past the system's cache"
    figures: dict[str, Any] = {"free": free, "needed": needed, "write": written, "read": read}
    if why:
        text = f"{folder}: {readable(free)} free; {told}; how much is needed is not known: {why}"
        return warning(name, text, "see `sfumato plan`, which needs the model's JSON files", **figures)
    # The other half is a checkpoint's copy. What is below a megabyte stays in memory.
    wait = needed / 2 * (1 / written + 1 / read)
    text = f"{folder}: {readable(free)} free, {readable(needed)} needed; {told}: {wait:,.2g} s of each step"
    do = 'take a faster disk, or engine.offload_optimizer = "cpu" on a machine with more memory'
    return judged(wait <= LONG, name, text, do, wait=wait, **figures)


def taken(config: Config, world: int) -> tuple[Swapped, str]:
    """What a rank keeps on the disk, and in memory for that; or why that is not known."""
    try:
        stage = Stage(config, facts_of(config.model))
    except UserError as error:
        return Swapped(), f"{error.asked}: {error.found}"
    trained = {name: tuple(p.shape) for name, p in stage.parts.named_parameters() if p.requires_grad}
    learns = sum(map(math.prod, trained.values()))
    return swapped(config, world, trained, ds_config(config, world, learns)), ""


def speeds(folder: Path, size: int) -> tuple[float, float]:
    """Bytes/s of writing and of reading past the system's cache. Raises OSError where that cannot be.

    size: bytes, at most; one part at least is written.
    """
    found = []
    with mmap.mmap(-1, PART) as memory, tempfile.NamedTemporaryFile(dir=folder) as file:
        memory[:] = os.urandom(PART)  # no disk can press it together
        direct = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, direct)
            for move in (os.pwritev, os.preadv):
                began, done = time.perf_counter(), 0
                while done < max(size, PART) and time.perf_counter() < began + SECONDS:
                    moved = move(direct, [memory], done)
                    done += moved
                    if not moved:
                        break  # the end of what was written in its time
                os.fdatasync(direct)
                found.append(done / (time.perf_counter() - began))
    return found[0], found[1]
