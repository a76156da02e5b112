"""`sfumato bench data`: how fast data are read, beside Pillow and `datasets`, and at every size.

The dict that `run` gives, and writes as JSON, format 1:

    format, made (UTC), quick, seconds, notes [text]
    machine      see machine.py
    comparisons  [{what, samples, rounds, sides}], see sides.side_by_side: decoding, then reading
    scale        one for each number of records, see scale.scaling
"""

import importlib.util
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sfumato.bench.decode import decoding
from sfumato.bench.machine import machine
from sfumato.bench.reads import Shape, reading
from sfumato.bench.scale import scaling
from sfumato.errors import UserError

NOTES = (
    "The photos are made up: broad shapes of colour with grain. All that is read lies in the page cache.",
    "Every side has one thread and its turn in each round. Speeds are medians; ratios are those of medians. "
    "CPU ms is the processor's time for a sample, which other programs change less.",
    "Nested lists: as diffusers' SDXL example keeps them, without its decoding the pictures at each visit.",
    "Whole batches hold the noise of each visit, which that example draws while training.",
    "Own bytes are memory that a process has beyond that of the smallest row. Cached pages are those of the "
    "index's files that it looked at: processes share them, and the system takes them back at need.",
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    photos: tuple[tuple[int, int], ...]
    """(height, width), in pixels."""
    bucket: int
    count: int
    """Photos of each size."""
    shape: Shape
    records: int
    rounds: int
    scale: tuple[int, ...]
    room: int
    """Bytes that it needs on the disk, at most."""


SDXL = Shape(side=1024, tokens=77, width=2048, pooled=1280)
PHOTOS = ((3000, 4000), (2000, 3000), (768, 1024))
FULL = Plan(PHOTOS, 512, 6, SDXL, 256, 7, (1000, 10_000, 100_000, 1_000_000), room=2 * 10**9)
QUICK = Plan(PHOTOS, 512, 2, SDXL, 32, 3, (1000, 10_000, 100_000), room=3 * 10**8)


def run(out: Path | None, quick: bool) -> dict[str, Any]:
    """Measure everything, show it as tables, and write it to `out`, if given, as JSON.

    Raises UserError where `datasets` is missing, room on the disk, or the folder of `out`.
    """
    plan = QUICK if quick else FULL
    check(plan, out)
    log, console = Console(stderr=True), Console()
    if plan is FULL:
        log.print("About a quarter of an hour on a machine with two cores; --quick takes two minutes.")
    found = measured(plan, log) | {"quick": quick}
    for table in tables(found):
        console.print(table)
    for note in NOTES:
        console.print(note, style="dim")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def check(plan: Plan, out: Path | None) -> None:
    """Refuse what would fail only at the end."""
    if importlib.util.find_spec("datasets") is None:
        do = 'pip install "sfumato[hub]"'
        raise UserError("sfumato bench data", "datasets is not installed, which is the other side", do)
    if out is not None and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        do = "name a file in a folder that is there and may be written to"
        raise UserError(f"--json {out}", "no such file can be written", do)
    place = tempfile.gettempdir()
    if (free := shutil.disk_usage(place).free) < plan.room:
        do = "make room, or set TMPDIR to another folder"
        raise UserError(f"{plan.room:,} bytes in {place}", f"{free:,} are free", do)


def measured(plan: Plan, log: Console) -> dict[str, Any]:
    """Everything that `run` gives but `quick`; what was made for it is removed."""
    begin, facts = time.perf_counter(), machine()

    def say(line: str) -> None:
        log.print(line, style="dim", highlight=False)

    comparisons = []
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as place:
        for size in plan.photos:
            say(f"decoding {plan.count} photos of {size[1]} x {size[0]}, {plan.rounds} rounds")
            comparisons.append(decoding(Path(place), size, plan.bucket, plan.count, plan.rounds))
        say(f"reading {plan.records} encoded records, {plan.rounds} rounds")
        (folder := Path(place) / "reads").mkdir()
        comparisons.append(reading(folder, plan.shape, plan.records, plan.rounds))
        shutil.rmtree(folder)
        scale = scaling(Path(place) / "scale", plan.scale, min(plan.rounds, 3), say)
    return {
        "format": 1,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - begin, 1),
        "notes": list(NOTES),
        "machine": facts,
        "comparisons": comparisons,
        "scale": scale,
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """The tables for the console."""
    return [*map(compared, found["comparisons"]), scaled(found)]


def compared(rows: dict[str, Any]) -> Table:
    """The table of one comparison."""
    table = Table(title=rows["what"], title_justify="left", box=None, padding=(0, 1), pad_edge=False)
    for column in ("samples/s", "lowest", "highest", "ratio", "CPU ms"):
        table.add_column(column, justify="right")
    table.add_column("")
    for side in rows["sides"]:
        rates = [f"{side[name]:,.{1 if side[name] < 100 else 0}f}" for name in ("median", "low", "high")]
        table.add_row(*rates, f"{side['ratio']:,.2f}", f"{1000 * side['cpu']:,.2f}", side["name"])
    return table


def scaled(found: dict[str, Any]) -> Table:
    """The table of the numbers of records."""
    cpu, cores = found["machine"]["cpu"], found["machine"]["cores"]
    table = Table(
        title=f"on {cpu}, {cores} cores", title_justify="left", box=None, padding=(0, 1), pad_edge=False
    )
    headings = (
        "records",
        "index\ns",
        "\nµs each",
        "buckets\ns",
        "open\ns",
        "batch 0\nms",
        "epoch 1000\nms",
        "a batch\nms",
        "own\nbytes each",
        "and cached\npages",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in found["scale"]:
        each = [row["own_per_record"], row["uss_per_record"]]
        table.add_row(
            f"{row['records']:,}",
            f"{row['index']:.1f}",
            f"{row['per_record']:.0f}",
            f"{row['buckets']:.2f}",
            f"{row['open']:.2f}",
            *(f"{1000 * row[name]:.1f}" for name in ("first", "seek", "batch")),
            *("" if more is None else f"{more:.1f}" for more in each),
        )
    return table
