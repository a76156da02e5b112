"""How fast the ranks' sums go: bandwidth over sizes, latency, and what that makes of a step."""

import statistics
import time
from typing import Any

import deepspeed.comm as dist
import torch

from sfumato.device import accelerator
from sfumato.doctor.lines import Line, good, unseen, warning
from sfumato.doctor.rounds import Rounds, trouble
from sfumato.engine.ranks import Ranks

SIZES = {"cpu": (2**16, 2**20, 2**23), "other": (2**20, 2**24, 2**28)}
"""Bytes that are summed."""
TIMES, SECONDS = 20, 2.0
"""At most so many sums of each size, and about so long."""
SLOW = 2e9
"""Bytes/s between accelerators below which the ranks probably talk through a slow network by mistake."""


def measure(place: Ranks) -> dict[str, Any]:
    """Seconds of an all-reduce of one number, of a barrier, and bytes/s on the bus by size.

    Bytes on the bus are those of a ring: 2 (n - 1) / n times the size. The first of each is not counted.
    """
    one = torch.ones(1, device=place.device)
    latency = statistics.median(timed(lambda: dist.all_reduce(one)) for _ in range(TIMES + 1))
    barrier = statistics.median(timed(dist.barrier) for _ in range(5))
    sizes = SIZES["cpu" if place.device.type == "cpu" else "other"]
    speeds = {}
    for size in sizes:
        numbers = torch.ones(size // 4, device=place.device)
        first = place.mean(torch.tensor(timed(lambda n=numbers: dist.all_reduce(n)), device=place.device))
        times = max(1, min(TIMES, int(SECONDS / max(float(first), 1e-6))))  # the same on all ranks
        took = statistics.median(timed(lambda n=numbers: dist.all_reduce(n)) for _ in range(times))
        speeds[size] = 2 * (place.world - 1) / place.world * size / took
    return {"latency": latency, "barrier": barrier, "speeds": speeds}


def timed(work: Any) -> float:
    """Seconds that something takes on the device."""
    accelerator().synchronize()
    began = time.perf_counter()
    work()
    accelerator().synchronize()
    return time.perf_counter() - began


def look(rounds: Rounds) -> list[Line]:
    """How fast."""
    name = "bandwidth"
    if rounds.place.world == 1 or rounds.apart:
        return [unseen(name, rounds.apart or "there is one rank")] if rounds.first else []
    place = rounds.place
    answers = rounds.ask(lambda: measure(place), 20, together=True)
    if not rounds.first:
        return []
    if wrong := trouble(name, answers):
        return wrong
    told = {answer.rank: answer.said for answer in answers}
    speeds = {int(size): speed for size, speed in told[0]["speeds"].items()}
    shown = ", ".join(f"{speed / 1e9:.2f} GB/s at {readable(size)}" for size, speed in speeds.items())
    text = f"{shown} on the bus; one number in {told[0]['latency'] * 1e3:.2f} ms"
    if place.device.type != "cpu" and max(speeds.values()) < SLOW:
        do = (
            "see with NCCL_DEBUG=INFO which way they take; name the network in NCCL_SOCKET_IFNAME, and see "
            "that InfiniBand or NVLink is found"
        )
        return [warning(name, text, do, ranks=told)]
    return [good(name, text, ranks=told)]


def readable(size: int) -> str:
    """A power of two of bytes."""
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"
