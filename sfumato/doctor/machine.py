"""The machine below a rank: memory, shared memory, open files, cores, clock, allocator."""

import os
import resource
import shutil
import time
from pathlib import Path

import psutil

from sfumato import tuning
from sfumato.config import Config
from sfumato.doctor.lines import Line, good, judged, warning
from sfumato.variables import ALLOCATOR

SECOND = 1.0  # for which clock, steal and swap are watched
MEMORY = 4e9
"""Bytes below which even a small model's weights do not fit beside the libraries."""
SHM = 1e9
"""Bytes of shared memory for two workers' batches, ahead of time; containers have 64 MB unless told."""
FILES = 4096
"""Open files: workers hand over each tensor as one."""
USED = 50.0
"""Per cent of the processors that other work may have in the second that is looked at."""
STEAL = 5.0
"""Percent of the time that another machine takes on this host."""
CGROUP = Path("/sys/fs/cgroup")


def lines(config: Config | None, ranks: int) -> list[Line]:
    """What is said of this machine, on which so many ranks run."""
    return [memory(), shared(config, ranks), files(), *second(), cores(ranks), allocator()]


def read(name: str) -> str:
    """A file of this process's control group, "" where there is none."""
    try:
        return (CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def memory() -> Line:
    """What is free, and what the control group allows."""
    seen = psutil.virtual_memory()
    free, total, limit = seen.available, seen.total, read("memory.max")
    if limit.isdigit():
        used = int(read("memory.current") or 0)
        # What was read of files counts as used, and is given back.
        cached = sum(
            int(row.split()[1])
            for row in read("memory.stat").splitlines()
            if row.startswith("inactive_file ")
        )
        total, free = min(total, int(limit)), min(free, int(limit) - used + cached)
    swap = psutil.swap_memory()
    text = f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free" + (
        ", by the control group" if limit.isdigit() else ""
    )
    text += f", {swap.used / 1e9:,.1f} GB swapped" if swap.used > 1e8 else ""
    return judged(
        free >= MEMORY, "memory", text, "end other work, or take a larger machine", free=free, total=total
    )


def shared(config: Config | None, ranks: int) -> Line:
    """Room in /dev/shm, through which loader workers hand over batches."""
    try:
        room = shutil.disk_usage("/dev/shm")
    except OSError:
        return warning("shared mem", "no /dev/shm", "set data.workers = 0")
    needed = SHM
    if config is not None:
        side = max(config.data.resolutions)
        batch = config.micro_batch_size * 3 * 4 * side * side  # bytes of pixels, fp32
        needed = batch * config.data.workers * 2 * ranks
    text = f"{room.free / 1e9:,.1f} GB free in /dev/shm; loaders need about {needed / 1e9:,.2f}"
    do = "start the container with --shm-size=8g (or --ipc=host), or set data.workers = 0"
    return judged(room.free >= needed, "shared mem", text, do, free=room.free, needed=needed)


def files() -> Line:
    """How many files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} may be open (ulimit -n), {'without bound' if hard < 0 else f'{hard:,}'} if asked for"
    return judged(
        soft < 0 or soft >= FILES, "open files", text, "ulimit -n 65536 before the start", soft=soft
    )


def second() -> list[Line]:
    """A second of clocks, steal and swapping."""
    cpu, swap = psutil.cpu_times(), psutil.swap_memory()
    wall, steady = time.time(), time.monotonic()
    time.sleep(SECOND)
    drift = (time.time() - wall) - (time.monotonic() - steady)
    after, paged = psutil.cpu_times(), psutil.swap_memory()
    total = sum(after) - sum(cpu)
    steal = 100 * (getattr(after, "steal", 0.0) - getattr(cpu, "steal", 0.0)) / total if total > 0 else 0.0
    moved = paged.sin - swap.sin + paged.sout - swap.sout
    year = time.gmtime().tm_year
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    text = f"{now} UTC, {abs(drift) * 1e3:.1f} ms off the steady clock"
    fine = abs(drift) < 0.05 and 2025 <= year < 2100
    idle = sum(getattr(after, name, 0.0) - getattr(cpu, name, 0.0) for name in ("idle", "iowait"))
    used = 100 * (1 - idle / total) if total > 0 else 0.0  # while this and the other ranks sleep
    busy = f"load {os.getloadavg()[0]:.1f}, {steal:.1f} % of the time taken by the host (steal)"
    busy += f", {used:.0f} % of the processors busy" if used >= USED else ""
    do = "see what else runs here; on a shared host take one with cores of its own"
    return [
        judged(fine, "clock", text, "set it by NTP (chrony)", drift=drift),
        judged(steal < STEAL and used < USED, "other work", busy, do, steal=steal, used=used),
        judged(
            moved < 1e6, "swap", f"{moved / 1e6:,.1f} MB moved in a second", "end other work", moved=moved
        ),
    ]


def cores(ranks: int) -> Line:
    """Threads of all ranks here against the cores that they may use."""
    import torch

    own, quota = len(os.sched_getaffinity(0)), read("cpu.max").split()
    allowed = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else float(own)
    count = min(float(own), allowed)
    threads = torch.get_num_threads()
    text = f"{ranks} rank{'s' * (ranks > 1)} x {threads} thread{'s' * (threads > 1)} on {count:g} cores"
    do = f"set OMP_NUM_THREADS = {max(1, int(count) // ranks)}, and start no more ranks than cores"
    return judged(threads * ranks <= max(1, round(count)), "cores", text, do, threads=threads, cores=count)


def allocator() -> Line:
    """The variables that `tuning` sets for CPU ranks: their values, and who set them."""
    told = {setting.name: setting for setting in tuning.report(os.environ)}
    wanted = (*ALLOCATOR, "OMP_NUM_THREADS")
    shown = [told[name] for name in wanted if name in told]
    text = ", ".join(
        f"{each.name.removeprefix('MALLOC_')} {each.value or 'unset'} ({each.who})" for each in shown
    )
    figures = {each.name: [each.value, each.who] for each in told.values()}
    lacking = [each.name for each in shown if each.value is None and each.name in ALLOCATOR]
    if not lacking or tuning.has_accelerator(os.environ):
        return good("allocator", text, variables=figures)
    do = "start it as the command `sfumato`, which sets them, or export them: docs/environment.md"
    return warning("allocator", text, do, variables=figures)
