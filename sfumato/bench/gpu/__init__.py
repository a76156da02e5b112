"""`sfumato bench gpu`: how fast one card trains and draws, with random weights at full size.

The ceilings of the card come first, then the rows of rows.py in the order of their weight, until the time is
up; what is left out is said. `--toy` takes every row with toy models in seconds, on any machine. The dict
that `run` gives, and writes as JSON after every row, format 1:

    format, made (UTC), device, toy, machine, peak {"measured", "datasheet"} (FLOP/s of half precision)
    ceilings                      see ceilings.py
    rows [{"name", "what", "preset", "words", "goal", and
        "batch", "steps", "seconds", "per_second" (images; iterations where it draws), "low", "high",
        "memory" (bytes), "flops" (of the model for one image or iteration), "loss",
        "mfu" {"measured", "datasheet"}
        or "skipped", why}]
"""

import json
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from sfumato.bench.gpu.ceilings import ceilings, share
from sfumato.bench.gpu.rows import ROWS, Row, config_of, family_of
from sfumato.bench.gpu.timing import measure
from sfumato.bench.machine import machine
from sfumato.device import kind, name_of
from sfumato.engine.ranks import Ranks, start
from sfumato.errors import UserError
from sfumato.models import family_class
from sfumato.planner.architectures import facts_of
from sfumato.report.counter import rate_of
from sfumato.report.flops import peak_of

BUDGET = 570.0
"""Seconds for all of it."""
TOY = 0.2
"""Seconds that a row is timed at toy size."""


def run(toy: bool, out: Path | None, budget: float = BUDGET) -> dict[str, Any]:
    """Measure, show and write it to `out` as JSON.

    Raises UserError without an accelerator, unless it is a toy's, and for a folder that is not there.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    if kind() == "cpu" and not toy:
        raise UserError("sfumato bench gpu", "no accelerator on this machine", "try it with --toy")
    end = time.monotonic() + budget
    ranks = start(600)
    log = Console(stderr=True)
    found: dict[str, Any] = {"format": 1, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    found |= {"device": name_of(ranks.device), "toy": toy, "machine": machine()}
    log.print("ceilings")
    found["ceilings"] = ceilings(ranks.device, toy)
    found["peak"] = {
        "measured": found["ceilings"]["matmul"],
        "datasheet": peak_of(name_of(ranks.device), "bf16"),
    }
    found["rows"] = []
    with TemporaryDirectory(prefix="sfumato-gpu-") as scratch:
        models = None
        if toy:
            models = Path(scratch)
            for family in sorted({family_of(row) for row in ROWS}):
                family_class(family).tiny(models / family)
        for row in ROWS:
            log.print(row.name.strip())
            told = {"name": row.name, "what": row.what, "preset": row.preset, "words": row.words}
            told |= {"goal": row.goal} | taken(row, ranks, models, end, found["peak"])
            found["rows"].append(told)
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(found))
    for row in found["rows"]:
        if "skipped" in row:
            console.print(f"{row['name'].strip()}: {row['skipped']}", highlight=False, markup=False)
    return found


def taken(
    row: Row, ranks: Ranks, toy: Path | None, end: float, peak: Mapping[str, float | None]
) -> dict[str, Any]:
    """A row's figures, with the first batch that fits; or why there are none."""
    why = ""
    for batch in row.batches[-1:] if toy else row.batches:
        left = end - time.monotonic()
        if left < row.seconds + row.takes and not toy:
            return {"skipped": f"{why}{left:.0f} s are left, it takes about {row.seconds + row.takes:.0f}"}
        try:
            config = config_of(row, batch, toy)
            figures = measure(row, config, facts_of(config.model), ranks, TOY if toy else row.seconds)
        except UserError as error:
            return {"skipped": f"{why}{error.found}"}
        except Exception as error:  # a row that fails must not take the others with it
            said = (str(error).strip().splitlines() or [""])[0]
            why = f"batch {batch}: {type(error).__name__}: {said[:200]}; "
            if "memory" in said.lower():
                continue
            return {"skipped": why.rstrip("; ")}
        flops = figures["flops"] * figures["per_second"]
        return figures | {"mfu": {name: share(flops, most) for name, most in peak.items()}}
    return {"skipped": why.rstrip("; ")}


def table(found: Mapping[str, Any]) -> Table:
    """The figures, a line for each row."""
    most, top = found["ceilings"], found["peak"]["datasheet"]
    shown = Table(
        title=f"{found['device']}: copy {most['copy'] / 1e9:,.0f} GB/s, "
        f"matmul bf16 {rate_of(most['matmul'] / 1e12)} TFLOP/s"
        + (f" (datasheet {top / 1e12:,.0f})" if top else ""),
        title_justify="left",
        box=None,
    )
    shown.add_column("", no_wrap=True)
    for heading in (
        "batch",
        "images/s\nor it/s",
        "lowest\nhighest",
        "MFU of\nmatmul",
        "MFU of\nsheet",
        "GB",
        "goal",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in found["rows"]:
        if "skipped" in row:
            shown.add_row(row["name"], "", "", "", "", "", "", "left out")
            continue
        mfu = row["mfu"]
        shown.add_row(
            row["name"],
            str(row["batch"]),
            f"{row['per_second']:,.2f}",
            f"{row['low']:.2f} {row['high']:.2f}",
            percent(mfu["measured"]),
            percent(mfu["datasheet"]),
            "" if row["memory"] is None else f"{row['memory'] / 1e9:.1f}",
            "" if row["goal"] is None else f"{row['goal'][0]:g} ({row['goal'][1]:g})",
        )
    return shown


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "" if value is None else f"{value:.1%}"
