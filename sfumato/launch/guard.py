"""A small process beside the supervisor, which outlives it when it is killed, and sees the ranks off.

It reads the process ids of the ranks from its input. That ends with "done", or else with the supervisor's
death: then the ranks save and end by themselves, and this waits for them and ends what they leave behind,
such as loader workers. A rank that is still there after the time in which it may save is killed. Started as a
script, with that time as argument; imports nothing of ours, so that it takes no time and little memory.
"""

import contextlib
import os
import signal
import sys
import time


def begun(number: int) -> str | None:
    """When a process was started, as the system counts it; None if it has ended."""
    try:
        with open(f"/proc/{number}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def guard(patience: float) -> None:
    """The whole life of it."""
    ranks: dict[int, str | None] = {}
    for line in sys.stdin:
        if line == "done\n":
            return
        ranks[int(line)] = begun(int(line))
    end = time.monotonic() + patience
    while ranks:
        for number, start in list(ranks.items()):
            if begun(number) == start and start is not None and time.monotonic() < end:
                continue
            del ranks[number]
            # The number of a process that has gone is not given again as long as its group has members.
            if begun(number) in (None, start):
                with contextlib.suppress(OSError):
                    os.killpg(number, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    # Slurm and systemd send theirs to every process of a job.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    guard(float(sys.argv[1]))
