"""Which curves a page shows, under which names and in which units."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.report.page.columns import Curve
from sfumato.report.page.record import Metrics, Record

OTHERS = 24  # charts of numbers that only this run tells
PLAIN = {"step", "seconds", "time", "useful_seconds", "data_seconds", "data_rank"}
PLAIN |= {"images", "faults", "samples"}
"""Numbers of metrics.jsonl that no curve is drawn of."""
LEVELS = 8  # noise levels that have a line
EVENTS = 400  # marks on the axis of steps
DIGITS = 5


@dataclass(frozen=True)
class Chart:
    """One field of curves."""

    group: str
    title: str
    lines: tuple[tuple[str, str], ...]
    """Names of curves, and what they are called; of one line "" if the title says it."""
    unit: str = ""
    scale: float = 1.0
    zero: bool = False
    """Whether the axis begins at 0."""
    ordered: bool = False
    """Whether the lines are steps of one thing, which colours then show."""
    noisy: bool = False
    """Whether its lines are smoothed."""
    more: str = ""
    """What a reader may want to know."""
    quiet: bool = False
    """Shown only if it is not 0 throughout."""


LEARNING, SPEED, INPUTS, OTHER = "Learning", "Speed and memory", "What goes in", "Also in metrics.jsonl"
TIMES = tuple(
    (f"loss_by_timestep.{n}", text)
    for n, text in enumerate(("least noise", "second quarter", "third quarter", "most noise"))
)
LOSS = Chart(LEARNING, "Training loss", (("loss", ""),), noisy=True)
BY_TIME = Chart(
    LEARNING,
    "Training loss by timestep",
    TIMES,
    noisy=True,
    ordered=True,
    more="The four quarters of the noise schedule: one can grow worse while the mean falls.",
)
TRAINING = (
    Chart(LEARNING, "Gradient norm", (("grad_norm", ""),), zero=True, noisy=True),
    Chart(LEARNING, "Learning rate", (("lr", ""),), zero=True),
    Chart(LEARNING, "Distance of the average", (("ema_distance", ""),), "relative L2", zero=True,
          more="Of the weights' average from the live weights, over the norm of these."),
    Chart(LEARNING, "Norm of the weights", (("weight_norm", ""),), "L2"),
    Chart(SPEED, "Images per second", (("images_per_second", "by the wall clock"),
          ("images_per_second_without_data_wait", "without data wait")), "images/s", zero=True, noisy=True),
    Chart(SPEED, "Waiting for data", (("data_stall", ""),), "% of the time", 100, zero=True, noisy=True),
    Chart(SPEED, "Seconds per step", (("seconds_per_step", ""),), "s", zero=True, noisy=True),
    Chart(SPEED, "Memory", (("device_memory_gib", "device, the most so far"),
          ("process_memory_gib", "process")), "GiB", zero=True),
    Chart(SPEED, "Goodput", (("goodput", ""),), "% of the time", 100, zero=True,
          more="Time in steps that count, over all time since the first start."),
    Chart(SPEED, "Use of the device's peak (MFU)", (("mfu", ""),), "%", 100, zero=True, noisy=True),
    Chart(SPEED, "Arithmetic of the model", (("flops_per_second", ""),), "TFLOP/s", 1e-12, zero=True,
          noisy=True),
    Chart(SPEED, "Attempts that moved nothing", (("skipped", ""),), "%", 100, zero=True, quiet=True),
    Chart(SPEED, "Overflows of fp16", (("overflows", ""),), "since the start", zero=True, quiet=True),
    Chart(SPEED, "Batches left out", (("left_out", ""),), "in all", zero=True, quiet=True),
    Chart(INPUTS, "Latents", (("latent_mean", "mean"), ("latent_std", "standard deviation")), noisy=True),
    Chart(INPUTS, "Noise", (("noise_mean", "mean"), ("noise_std", "standard deviation")), noisy=True),
)  # fmt: skip


def validation_charts(kinds: Sequence[str], names: Iterable[str]) -> Iterator[Chart]:
    """Charts of validation.jsonl, by the weights that were looked at and the curves' names."""
    yield Chart(LEARNING, "Validation loss", tuple((f"loss/{kind}", kind) for kind in kinds))
    yield Chart(
        LEARNING,
        "What the captions are worth",
        tuple((f"gap/{kind}", kind) for kind in kinds),
        zero=True,
        more="Validation loss without captions minus that with them. At 0 the captions are ignored.",
    )
    yield Chart(
        LEARNING,
        "What the second image is worth",
        tuple((f"hint_gap/{kind}", kind) for kind in kinds),
        zero=True,
        more="Validation loss with a black second image minus that with its own. At 0 it is ignored, as it is"
        " before the first step.",
    )
    if kinds:
        times = [
            name.split("/")[1] for name in names if name.startswith("t/") and name.endswith(f"/{kinds[0]}")
        ]
        every = sorted(set(times), key=float)
        ordered = every[:: -(-len(every) // LEVELS)]
        of = f"Weights: {kinds[0]}." if len(kinds) > 1 else ""
        lines = tuple((f"t/{t}/{kinds[0]}", f"t = {float(t):g}") for t in ordered)
        yield Chart(LEARNING, "Validation loss by timestep", lines, ordered=True, more=of)


def charts_of(record: Record) -> list[tuple[Chart, Metrics]]:
    """The charts that a run has curves for, with where these are."""
    trained, held_out = record.metrics, record.validation
    looked = validation_charts(held_out.kinds, held_out.columns.held)
    found: list[tuple[Chart, Metrics]] = [(LOSS, trained), (BY_TIME, trained)]
    found += [(chart, held_out) for chart in looked]
    found += [(chart, trained) for chart in TRAINING]
    known = PLAIN | {name for chart, _ in found for name, _ in chart.lines}
    others = [name for name in trained.columns.held if name not in known][:OTHERS]
    found += [(Chart(OTHER, name, ((name, ""),), noisy=True), trained) for name in others]
    return [(chart, log) for chart, log in found if has(chart, log)]


def has(chart: Chart, log: Metrics) -> bool:
    """Whether there is something to draw."""
    curves = [log.columns.curve(name) for name, _ in chart.lines]
    return any(
        curve is not None and len(curve.steps) and (not chart.quiet or curve.most.any()) for curve in curves
    )


def one_run(record: Record) -> list[dict[str, Any]]:
    """The charts of a run for its page."""
    found = []
    for chart, log in charts_of(record):
        lines = [(label, log.columns.curve(name)) for name, label in chart.lines]
        there = [(label, curve) for label, curve in lines if curve is not None and len(curve.steps)]
        tints = tints_of(len(there), chart.ordered)
        series = [
            told(label, curve, chart, tint, log.columns.width)
            for (label, curve), tint in zip(there, tints, strict=True)
        ]
        found.append(facts(chart, series, log.columns.width))
    return found


def several(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """The charts of several runs: a field for each curve, a line for each run that has it."""
    fields: dict[tuple[str, str], tuple[Chart, str, list[dict[str, Any]], list[int]]] = {}
    for place, record in enumerate(records):
        for chart, log in charts_of(record):
            for name, label in chart.lines:
                curve = log.columns.curve(name)
                if curve is None or not len(curve.steps):
                    continue
                key = (chart.group, name)
                field = fields.setdefault(key, (chart, label, [], []))
                field[2].append(told(names[place], curve, chart, f"c{place % 8}", log.columns.width))
                field[2][-1]["dash"] = place // 8
                field[3].append(log.columns.width)
    found = []
    for chart, label, series, widths in fields.values():
        single = facts(chart, series, max(widths))
        title = chart.title + (f", {label}" if label else "")
        found.append(
            single | {"title": title, "detail": chart.ordered} | ({"more": ""} if chart.ordered else {})
        )
    groups = (LEARNING, SPEED, INPUTS, OTHER)
    return sorted(found, key=lambda field: (groups.index(field["group"]), field["detail"]))


def facts(chart: Chart, series: list[dict[str, Any]], width: int) -> dict[str, Any]:
    """What the page is told of a field."""
    return {
        "group": chart.group,
        "title": chart.title,
        "unit": chart.unit,
        "zero": chart.zero,
        "noisy": chart.noisy,
        "more": chart.more,
        "width": width,
        "series": series,
    }


def told(label: str, curve: Curve, chart: Chart, tint: str, width: int) -> dict[str, Any]:
    """What the page is told of a line."""
    found = {
        "name": label,
        "tint": tint,
        "x": curve.steps.tolist(),
        "y": short(curve.mean * chart.scale),
    }
    if width > 1 and chart.noisy and (curve.most > curve.least).any():
        found |= {"least": short(curve.least * chart.scale), "most": short(curve.most * chart.scale)}
    return found


def short(values: np.ndarray) -> list[float]:
    """Numbers with as many digits as an eye can use."""
    with np.errstate(all="ignore"):
        power = DIGITS - 1 - np.floor(np.log10(np.abs(values)))
        # Powers of ten up to 22 are exact, so that the quotient is the decimal number's own double.
        power = np.clip(np.where(np.isfinite(power), power, 0), -22, 22)
        up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
        rounded = np.rint(values * up / down) / up * down
    found: list[float] = np.where(np.isfinite(rounded), rounded, values).tolist()
    return found


def tints_of(count: int, ordered: bool) -> list[str]:
    """Names of colours: apart from each other, or in an order."""
    if not ordered:
        return [f"c{n % 8}" for n in range(count)]
    return [f"r{round(3 * n / max(1, count - 1))}" for n in range(count)]


def marks(record: Record) -> list[dict[str, Any]]:
    """Steps at which something happened: restarts, jumps of the loss, batches left out."""
    found: list[dict[str, Any]] = []
    for row in record.restarts:
        found.append({"step": row.get("step"), "kind": "restart", "text": "started again"})
    found += [{"step": step, "kind": "spike", "text": "the loss jumped"} for step, _ in record.metrics.spikes]
    found += [{"step": row["step"], "kind": "bad", "text": "a batch was left out"} for row in record.bad()]
    return [mark for mark in found if isinstance(mark["step"], int)][-EVENTS:]
