"""The page of several runs, side by side: the settings that differ first."""

from collections.abc import Sequence
from typing import Any

from sfumato.report.page import charts, content, state
from sfumato.report.page.lines import number
from sfumato.report.page.paper import printed
from sfumato.report.page.pictures import BYTES, MOST
from sfumato.report.page.record import Record, one_line
from sfumato.report.page.single import Story
from sfumato.report.page.words import figure, long
from sfumato.report.public import flat

NAMELESS = ("name", "output", "data.store", "variables.MASTER_PORT", "variables.MASTER_ADDR")
"""By what any two runs differ."""
UNSET = "–"


def side_by_side(stories: Sequence[Story]) -> str:
    """The page that compares runs."""
    for story in stories:
        story.refresh()
    records = [story.record for story in stories]
    names = names_of(records)
    fields = charts.several(records, names)
    rows, steps, uris, left = drawn(stories)
    where = {
        "names": names,
        "differences": settings(records),
        "known": any(record.resolved for record in records),
        "unknown": [name for name, record in zip(names, records, strict=True) if not record.resolved],
        "results": results(records),
        "around": environments(records),
        "charts": fields,
        "rows": rows,
        "steps": steps,
        "left": left,
        "missing": [
            (name, "; ".join(f"{what}: {why}" for what, why in state.missing(record, len(story.album.sets))))
            for name, record, story in zip(names, records, stories, strict=True)
        ],
    }
    contents = [("differences", "Settings that differ"), ("results", "Results")]
    for key, name, text in (
        ("around", "environment", "Environments"),
        ("charts", "curves", "Curves"),
        ("rows", "pictures", "Previews"),
        ("missing", "missing", "What is not here"),
    ):
        contents += [(name, text)] if where[key] else []
    told = {"charts": fields, "marks": [], "runs": len(stories)}
    given = {"steps": steps, "uris": uris} if uris else None
    return printed("runs.html", where | {"contents": contents, "told": told, "drawn": given})


def names_of(records: Sequence[Record]) -> list[str]:
    """The runs' names; with their folders' where two are called alike."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else f"{name} ({'/'.join(record.folder.resolve().parts[-2:])})"
        for name, record in zip(names, records, strict=True)
    ]


def settings(records: Sequence[Record]) -> list[list[str]]:
    """Rows of the settings that differ. Of what only some runs have, such as rank, the unusual alone."""
    changed: set[str] = set()
    for record in records:
        config, why = content.parsed(record)
        told = content.settings(record, config, why)
        changed |= {row[0] for row in told["changed" if config is not None else "all"]}
    tables = [dict(flat(record.resolved)) for record in records]
    there = [table for table in tables if table]
    rows = []
    for name in differing(tables):
        if name in NAMELESS or (name not in changed and any(name not in table for table in there)):
            continue
        said = [content.said(name, table[name]) if name in table else UNSET for table in tables]
        if len({text for text, table in zip(said, tables, strict=True) if table}) == 1:
            # Two folders may have the same last part.
            said = [one_line(table.get(name, UNSET), 600) for table in tables]
        rows.append([name, *said])
    return rows


def environments(records: Sequence[Record]) -> list[list[str]]:
    """Rows of versions, devices and variables that differ."""
    tables = [dict(flat(record.environment)) for record in records]
    return [
        [name, *(one_line(table[name], 400) if name in table else UNSET for table in tables)]
        for name in differing(tables)
        if name not in NAMELESS
    ]


def differing(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Names under which not all tables that hold anything hold the same."""
    there = [table for table in tables if table]
    names = dict.fromkeys(name for table in there for name in table)
    return [
        name for name in names if any(table.get(name, UNSET) != there[0].get(name, UNSET) for table in there)
    ]


def results(records: Sequence[Record]) -> list[list[str]]:
    """Rows of what came of the runs; none that no run tells of."""
    rows = [["state", *(state.state(record).text for record in records)]]

    def row(name: str, values: Sequence[float | None], unit: str = "") -> None:
        if any(value is not None and value == value for value in values):
            rows.append([name, *(f"{figure(value)} {unit}".strip() for value in values)])

    row("training loss, mean of the last lines", [record.metrics.mean("loss") for record in records])
    for kind in dict.fromkeys(kind for record in records for kind in record.validation.kinds):
        for key, name in (
            ("loss", "validation loss"),
            ("gap", "what the captions are worth"),
            ("hint_gap", "what the second image is worth"),
        ):
            curves = [record.validation.columns.curve(f"{key}/{kind}") for record in records]
            ends = [
                None if curve is None or not len(curve.mean) else float(curve.mean[-1]) for curve in curves
            ]
            row(f"{name}, {kind} weights", ends)
            if key == "loss":
                best = [None if c is None or not len(c.mean) else float(c.mean.min()) for c in curves]
                row(f"{name}, {kind} weights, the best", best)
    means = (
        ("images per second, by the wall clock", "images_per_second", 1, "images/s"),
        ("images per second, without data wait", "images_per_second_without_data_wait", 1, "images/s"),
        ("waiting for data", "data_stall", 100, "%"),
    )
    for name, key, scale, unit in means:
        found = [record.metrics.mean(key) for record in records]
        row(name, [None if value is None else round(scale * value, 3) for value in found], unit)
    row("seconds per step", [state.seconds_per_step(record) for record in records], "s")
    for key, name in (
        ("device_memory_gib", "memory of the device"),
        ("process_memory_gib", "memory of the process"),
    ):
        peaks = [record.metrics.columns.curve(key) for record in records]
        row(
            f"{name}, the most",
            [None if c is None or not len(c.most) else float(c.most.max()) for c in peaks],
            "GiB",
        )
    row("goodput", [round(100 * number(record.metrics.last.get("goodput")), 1) for record in records], "%")
    times = [state.worked(record) for record in records]
    if any(times):
        rows.append(["time of the run, without pauses asked for", *(long(time) for time in times)])
    rows.append(["restarts", *(f"{len(record.restarts):,}" for record in records)])
    rows.append(["records that could not be used", *(f"{len(record.faults()):,}" for record in records)])
    return rows


def drawn(
    stories: Sequence[Story],
) -> tuple[list[dict[str, Any]], list[int], list[dict[int, str]], bool]:
    """Rows of prompts with a cell for each run, the steps, the pictures by cell, and whether not all are."""
    share = len(stories)
    pages = [story.album.page(MOST // share, BYTES // share) for story in stories]
    steps = sorted({step for page in pages for step in page["steps"] if page["rows"]})
    keys = dict.fromkeys((row["prompt"], row["seed"]) for page in pages for row in page["rows"])
    rows: list[dict[str, Any]] = []
    uris: list[dict[int, str]] = []
    for prompt, seed in keys:
        cells: list[dict[str, Any] | None] = []
        for page in pages:
            mine = [row for row in page["rows"] if (row["prompt"], row["seed"]) == (prompt, seed)]
            if not mine:
                cells.append(None)
                continue
            last = max(mine[0]["uris"])
            cells.append(
                {"uri": mine[0]["uris"][last], "step": last, "number": len(uris), "size": mine[0]["size"]}
            )
            uris.append(mine[0]["uris"])
        rows.append({"prompt": prompt, "seed": seed, "cells": cells})
    left = any(page["all"] > len(page["steps"]) or page["more"] for page in pages)
    return rows, steps, uris, left
