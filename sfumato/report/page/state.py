"""How a run goes: its state, its figures, what deserves a look, and what is not told."""

import math
from dataclasses import dataclass

from sfumato.report.page.lines import number, step_of
from sfumato.report.page.record import Record
from sfumato.report.page.words import figure, long, several, when
from sfumato.report.starts import counted

SILENT = 600.0  # seconds without a line, at least, after which a run is said to be silent
SLOW = 20  # or so many times as long as lines usually take
STALL = 0.1  # share of waiting for data that deserves a look
DEAD = 0.002  # gap over loss under which captions seem to do nothing
ENDS = {
    "done": ("good", ""),
    "stopped": ("look", "; the same command goes on"),
    "failed": ("fault", "; the same command goes on from the last checkpoint"),
}


@dataclass(frozen=True)
class Told:
    """Something with its tone: good, live, look, fault or none."""

    text: str
    tone: str = ""
    word: str = ""


def state(record: Record) -> Told:
    """Where a run stands, as far as its files tell."""
    steps, step = record.steps, record.step
    at = f"{step:,} of {several(steps, 'step')}" if steps else several(step, "step")
    last = record.starts.all[-1] if record.starts.all else {}
    ended = last.get("end")
    if isinstance(ended, str):
        tone, more = ENDS.get(ended, ("", ""))
        date = f", on {when(last['time'])}" if when(last.get("time")) else ""
        return Told(f"{ended[:80]}, {at}{date}{more}", tone, ended[:80])
    if not record.metrics.count:
        begun = f"; it began on {when(last['time'])}" if when(last.get("time")) else ""
        return Told(f"no step was told yet{begun}", "live" if last else "", "no step yet")
    if steps and step >= steps and record.export()[0] == "export":
        return Told(f"done, {at}", "good", "done")
    age = silence(record)
    if age is not None:
        what = "it may have been killed; the same command goes on"
        return Told(f"{at}; silent for {long(age)}: {what}", "look", "silent")
    left = seconds_left(record)
    return Told(f"running, {at}" + (f", {long(left)} left" if left else ""), "live", "running")


def silence(record: Record) -> float | None:
    """Seconds since the last line, or the start after it, if they are many."""
    try:
        told = number(record.metrics.last.get("time"))
        told = told if told > 0 else record.metrics.path.stat().st_mtime
        # A run that was started again loads its model before it tells another line.
        begun = [number(row.get("time")) for row in record.starts.all[-1:]]
        age = record.now - max([told, *(time for time in begun if time == time)])
    except OSError:
        return None
    steps = [row["step"] for row in record.metrics.ends]
    every = (steps[-1] - steps[0]) / max(1, len(steps) - 1)
    return age if age > max(SILENT, SLOW * every * (seconds_per_step(record) or 0)) else None


def seconds_per_step(record: Record) -> float | None:
    """Of the last lines; also where only images a second are told."""
    told = record.metrics.mean("seconds_per_step")
    rate = record.metrics.mean("images_per_second")
    size = number(record.resolved.get("batch_size"))
    return told if told is not None else size / rate if rate and size > 0 else None


def seconds_left(record: Record) -> float | None:
    """At the pace of the last lines."""
    each = seconds_per_step(record)
    return None if each is None or not record.steps else max(0, record.steps - record.step) * each


def tiles(record: Record) -> list[dict[str, str]]:
    """The figures at the top."""
    metrics, found = record.metrics, []

    def tile(name: str, value: str, unit: str = "", more: str = "") -> None:
        found.append({"name": name, "value": value, "unit": unit, "more": more})

    loss, first = metrics.mean("loss"), number(metrics.first.get("loss"))
    if loss is not None:
        lines = len(metrics.end)
        mean = f"mean of the last {lines} lines" if lines > 1 else ""
        begun = f"{mean}; {figure(first)} at step {metrics.first['step']:,}" if first == first else mean
        tile("Training loss", figure(loss), more=begun)
    for kind in record.validation.kinds[-1:]:
        held = record.validation.columns.curve(f"loss/{kind}")
        if held is not None and len(held.mean):
            best = int(held.mean.argmin())
            more = f"{kind} weights; best {figure(held.mean[best])} at step {held.steps[best]:,}"
            tile("Validation loss", figure(held.mean[-1]), more=more)
    rate, free = metrics.mean("images_per_second"), metrics.mean("images_per_second_without_data_wait")
    if rate is not None:
        tile("Speed", figure(rate), "images/s", f"{figure(free)} without data wait" if free else "")
    each = seconds_per_step(record)
    if each is not None:
        tile("A step", figure(each), "s", f"{long(worked(record))} of training" if worked(record) else "")
    for key, name in (("device_memory_gib", "device, the most"), ("process_memory_gib", "process, the most")):
        curve = metrics.columns.curve(key)
        if curve is not None and len(curve.most):
            tile("Memory", figure(curve.most.max()), "GiB", name)
    goodput = number(metrics.last.get("goodput"))
    if goodput == goodput:
        again = len(record.restarts)
        tile("Goodput", figure(round(100 * goodput, 1)), "%", several(again, "restart"))
    return found


def worked(record: Record) -> float | None:
    """Seconds from the first start to the last line, without the pauses that were asked for."""
    last = number(record.metrics.last.get("time"))
    rows = [row for row in record.starts.all if number(row.get("time")) <= last]
    found = counted(rows, last) if math.isfinite(last) else 0.0
    return found if found > 0 else None


def notes(record: Record, faults: int, bad: int) -> list[Told]:
    """What deserves a look."""
    found, metrics = [], record.metrics
    if bad:
        text = f"{bad:,} batches" if bad > 1 else "A batch"
        found.append(Told(f"{text} had a loss or gradient that is not finite: see below.", "fault"))
    if metrics.spiked:
        steps = ", ".join(f"{step:,}" for step, _ in [*metrics.spikes][-6:])
        count = "once" if metrics.spiked == 1 else f"{metrics.spiked:,} times"
        found.append(
            Told(f"The loss jumped {count}{', last' * (metrics.spiked > 6)} at step {steps}.", "look")
        )
    stall = metrics.mean("data_stall")
    if stall is not None and stall > STALL:
        text = f"The training waited {100 * stall:.0f} % of its last steps for data"
        found.append(Told(f"{text}: more data.workers, or data.cache, may help.", "look"))
    for kind in record.validation.kinds[:1]:
        gap, held = (record.validation.columns.curve(f"{name}/{kind}") for name in ("gap", "loss"))
        if gap is not None and held is not None and len(gap.mean) and len(held.mean):
            found += captions(float(gap.mean[-1]), float(held.mean[-1]))
    if faults:
        found.append(Told(f"{several(faults, 'record')} could not be used; reasons below.", "look"))
    for file in (metrics, record.validation, record.starts):
        if file.broken:
            said = f"{several(file.broken, 'line')} of {file.path.name} cannot be read, and "
            found.append(Told(said + ("is" if file.broken == 1 else "are") + " left out here.", "look"))
        if file.wrong:
            found.append(Told(f"{file.path.name} cannot be read: {file.wrong}", "fault"))
    return found


def captions(gap: float, loss: float) -> list[Told]:
    """What a gap says that deserves a look."""
    if gap >= DEAD * loss:
        return []
    if gap > -DEAD * loss:
        text = "have the same loss with and without their captions: these may be ignored"
    else:
        text = (
            f"have a higher loss with their captions than without, by {figure(-gap)}: these do not help yet"
        )
    return [Told(f"The held-out pictures {text}.", "look")]


def speed(record: Record) -> list[tuple[str, str]]:
    """Speed and memory as a table: of the last lines."""
    metrics = record.metrics
    rows = [
        ("images per second, by the wall clock", "images_per_second", 1.0, "images/s"),
        ("images per second, without data wait", "images_per_second_without_data_wait", 1.0, "images/s"),
        ("seconds per step", "seconds_per_step", 1.0, "s"),
        ("waiting for data", "data_stall", 100.0, "% of the time"),
        ("goodput so far", "goodput", 100.0, "% of the time"),
        ("use of the device's peak (MFU)", "mfu", 100.0, "%"),
        ("arithmetic of the model", "flops_per_second", 1e-12, "TFLOP/s"),
        ("memory of the device, the most", "device_memory_gib", 1.0, "GiB"),
        ("memory of the process", "process_memory_gib", 1.0, "GiB"),
    ]
    found = []
    for name, key, scale, unit in rows:
        value = number(metrics.last.get(key)) if key == "goodput" else metrics.mean(key)
        if value is not None and value == value:
            found.append(
                (name, f"{figure(round(scale * value, 1) if scale == 100 else scale * value)} {unit}")
            )
    lines = len(metrics.end)
    return (
        [*found, ("these are means of", f"the last {several(lines, 'line')} of metrics.jsonl")]
        if found
        else []
    )


def missing(record: Record, pictures: int) -> list[tuple[str, str]]:
    """What a page could show and this run does not tell, with what to do."""
    found, ask = [], record.resolved
    if not ask:
        found.append(("settings", "there is no resolved.json that can be read"))
    if not record.environment:
        found.append(("environment", "there is no environment.json that can be read"))
    if not record.metrics.count:
        found.append(("curves", "metrics.jsonl holds no step yet"))
    if not record.validation.count:
        has = bool(ask.get("validation"))
        do = "none was done yet" if has else "none is asked for; a table [validation] holds records out"
        found.append(("validation loss", do))
    if not pictures:
        preview = ask.get("preview")
        asked = isinstance(preview, dict) and preview.get("prompts")
        do = "none were drawn yet" if asked else "no prompts are given; set preview.prompts"
        found.append(("previews", do))
    if not record.starts.count:
        found.append(("starts and ends", "there is no starts.jsonl, so the state above is a guess"))
    if not record.summary:
        found.append(("summary", "it is written when the run ends"))
    if not record.export()[0]:
        found.append(("export", "none lies here yet; a checkpoint brings one"))
    return found


def starts(record: Record) -> list[tuple[str, str, str, str]]:
    """When the run was started and how it ended: when, at which step, what, on what."""
    found = []
    for row in record.starts.all[-200:]:
        ended, step = row.get("end"), step_of(row)
        what = f"ended: {str(ended)[:80]}" if ended is not None else "started"
        world = step_of({"step": row.get("world")})
        on = f"{several(world, 'rank')}, {row.get('device')}" if world else str(row.get("device") or "")
        found.append((when(row.get("time")), "–" if step is None else f"{step:,}", what, on[:200]))
    return found
