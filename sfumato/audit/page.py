"""The page that people read: one file, with its pictures in it, that loads nothing and runs no script."""

from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sfumato.audit.account import Examination, Report, largest
from sfumato.audit.pictures import Album

WIDE, HIGH = 440, 120  # of a chart, in its own units
BUCKETS, SAMPLES = 40, 6  # buckets that are shown with so many pictures each
EXACT, NEAR, TWINS = 12, 24, 4  # groups, and pictures of a group
EXAMPLES = 6  # pictures of a kind of finding
BARS = 40


@dataclass
class Chart:
    """Bars over an axis. Places are in units of WIDE and HIGH."""

    name: str
    bars: list[tuple[float, float, float, str]] = field(default_factory=list)
    """Left, width, height, and what a reader is told of it."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Places that matter, such as the resolution."""


def render(report: Report, look: Examination) -> str:
    """The HTML of a report, with pictures of what was looked at."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    album = Album(look.config, look.index, look.cells)
    return environment.get_template("page.html").render(
        report=report,
        wide=WIDE,
        high=HIGH,
        charts=charts(report),
        examples={problem["kind"]: examples(album, look, problem["kind"]) for problem in report["problems"]},
        twins={
            "exact": [album.show(group[:TWINS].tolist()) for group in largest(look.exact)[:EXACT]],
            "near": [album.show(group[:TWINS].tolist()) for group in largest(look.near)[:NEAR]],
        },
        samples=samples(album, report, look),
        most=max(row["records"] for row in report["buckets"]),
    )


def examples(album: Album, look: Examination, kind: str) -> list[dict[str, Any]]:
    """Some pictures of a kind of finding."""
    numbers = [told.number for told in look.findings.examples(kind) if told.number is not None]
    return album.show(numbers[:EXAMPLES])


def samples(album: Album, report: Report, look: Examination) -> dict[int, list[dict[str, Any]]]:
    """Some pictures of each bucket, cut as for training; of the fullest buckets if there are many."""
    rows = sorted(report["buckets"], key=lambda row: (-row["records"], row["bucket"]))
    held = [row["bucket"] for row in rows[:BUCKETS] if row["records"]]
    return {bucket: album.bucket(bucket, SAMPLES, look.usable) for bucket in sorted(held)}


def charts(report: Report) -> dict[str, Chart]:
    """The histograms of sides, aspects and captions' lengths."""
    pictures, resolutions = report["pictures"], sorted({row["resolution"] for row in report["buckets"]})
    sides = logarithmic(
        "side of a square of the same area, in pixels", pictures["sides"], [2**n for n in range(4, 14)]
    )
    sides.marks = [(place(pictures["sides"]["edges"], side), f"{side}") for side in resolutions]
    aspects = logarithmic("width : height", pictures["aspects"], [0.25, 0.5, 1, 2, 4])
    aspects.ticks = [(at, label) for (at, _), label in zip(aspects.ticks, ASPECTS, strict=True)]
    shapes = {row["width"] / row["height"] for row in report["buckets"] if row["records"]}
    aspects.marks = [(place(pictures["aspects"]["edges"], shape), "") for shape in sorted(shapes)]
    return {"sides": sides, "aspects": aspects, "lengths": lengths(report["captions"])}


ASPECTS = ("1:4", "1:2", "1:1", "2:1", "4:1")


def place(edges: list[float], value: float) -> float:
    """Where a value lies on an axis whose steps are factors."""
    low, high = log2(edges[0]), log2(edges[-1])
    return round(WIDE * (min(max(log2(value), low), high) - low) / (high - low), 1)


def logarithmic(name: str, histogram: dict[str, Any], ticks: list[float]) -> Chart:
    """A chart of a histogram whose edges grow by a factor."""
    edges, counts = histogram["edges"], histogram["counts"]
    told = [f"{low:.4g} to {high:.4g}" for low, high in zip(edges, edges[1:], strict=False)]
    return Chart(name, bars(counts, told), [(place(edges, value), f"{value:g}") for value in ticks])


def lengths(captions: dict[str, Any]) -> Chart:
    """A chart of how many captions have which length."""
    counts = np.array(captions["length"]["counts"] or [0], np.int64)
    limit = captions["limit"]
    end = max(len(counts), (limit or 0) + 1)
    step = -(-end // BARS)
    padded = np.zeros(BARS * step, np.int64)
    padded[: len(counts)] = counts
    told = [f"{n * step} to {(n + 1) * step - 1}" if step > 1 else f"{n}" for n in range(BARS)]
    chart = Chart(captions["unit"], bars(padded.reshape(BARS, step).sum(1).tolist(), told))
    unit = WIDE / (BARS * step)
    every = max(1, BARS * step // 8)
    chart.ticks = [(round(n * unit, 1), f"{n:,}") for n in range(0, BARS * step, every)]
    chart.marks = [] if limit is None else [(round((limit + 1) * unit, 1), f"{limit} are read")]
    return chart


def bars(counts: list[int], told: list[str]) -> list[tuple[float, float, float, str]]:
    """Bars side by side; one that is not empty can be seen."""
    most, wide = max([1, *counts]), WIDE / len(counts)
    return [
        (
            round(n * wide + 0.5, 1),
            round(wide - 1, 1),
            max(1.5, round(HIGH * count / most, 1)),
            f"{text}: {count:,}",
        )
        for n, (count, text) in enumerate(zip(counts, told, strict=True))
        if count
    ]
