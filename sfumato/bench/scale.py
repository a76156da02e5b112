"""What data sets of very different sizes cost: each is measured in processes of its own, in turn."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sfumato.errors import UserError

SLOWEST = 1000  # records a second; a machine that indexes fewer is given up on
STARTING = 120.0  # seconds that a process may take besides
PROGRAM = (sys.executable, "-m", "sfumato.bench.records")


def told(verb: str, count: int, store: Path, program: Sequence[str] = PROGRAM) -> dict[str, float]:
    """What a process of bench/records.py says. Raises UserError if it takes too long."""
    limit = STARTING + count / SLOWEST
    command = [*program, verb, str(count), str(store)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"to {verb} an index of {count:,} made-up records within {limit:.0f} seconds",
            "it was not done",
            "try again when the machine is less busy, or with --quick",
        ) from error
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}: {process.stderr}"
    found: dict[str, float] = json.loads(process.stdout)
    return found


def scaling(
    store: Path, counts: Sequence[int], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each number of records, ascending.

    A row has records; the seconds index, buckets, open, first, seek and batch (the medians of `rounds`
    processes but for the first two) with low and high of each in `spread`; the bytes own and uss of memory;
    rate (records indexed a second); per_record (microseconds to index one); and own_per_record and
    uss_per_record, bytes beyond those of the first row, None in that one.
    """
    assert sorted(counts) == list(counts), f"{counts} do not ascend"
    made: list[dict[str, float]] = []
    for count in counts:
        if made:
            seconds = count * made[-1]["index"] / counts[len(made) - 1]
            say(f"indexing {count:,} made-up records, about {seconds:,.0f} seconds")
        made.append(told("make", count, store))
    used: list[list[dict[str, float]]] = [[] for _ in counts]
    for number in range(rounds):
        say(f"opening them, round {number + 1} of {rounds}")
        for several, count in zip(used, counts, strict=True):
            several.append(told("use", count, store))
    rows: list[dict[str, Any]] = []
    for count, once, several in zip(counts, made, used, strict=True):
        found = {name: [each[name] for each in several] for name in several[0]}
        row: dict[str, Any] = {
            "records": count,
            **once,
            **{name: median(each) for name, each in found.items()},
        }
        row |= {"rate": count / once["index"], "per_record": 1e6 * once["index"] / count}
        for name in ("own", "uss"):
            more = count - counts[0]
            row[f"{name}_per_record"] = (row[name] - rows[0][name]) / more if more else None
        row["spread"] = {name: [min(each), max(each)] for name, each in found.items()}
        rows.append(row)
    return rows
