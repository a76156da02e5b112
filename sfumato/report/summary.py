"""What a run comes to: speed over a window of steps, last loss, time; a small table and summary.json.

The seeds' scripts gave the same: the mean over a window of steps of each step's images a second, without the
wait for data; the seconds of a step; the last loss; the time from end to end.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sfumato.config import Config
from sfumato.device import name_of
from sfumato.engine.ranks import Ranks
from sfumato.errors import Stopped
from sfumato.report import refresh
from sfumato.report.progress import duration
from sfumato.report.starts import Starts

FILE = "summary.json"
MEANS = (
    *("images_per_second_without_data_wait", "images_per_second", "seconds_per_step"),
    *("data_stall", "flops_per_second", "mfu"),
)
"""Keys of metrics.jsonl whose means over the window are told."""
LAST = ("step", "steps", "loss", "useful_seconds")
MEMORY = ("device_memory_gib", "process_memory_gib")


@contextmanager
def accounted(config: Config, place: Ranks, began: float, step: int) -> Iterator[Starts]:
    """Within it a run begins, goes on and ends, which starts.jsonl tells; then it is summed up.

    began: when this process began, in unix seconds. step: the applied steps that stand. All ranks enter it;
    the first one writes.
    """
    starts = Starts(config.folder, began)
    starts.step = step
    device, how = name_of(place.device), "failed"
    if place.first:
        starts.start(step, place.world, device)
    try:
        yield starts
        how = "done"
    except Stopped:
        how = "stopped"
        raise
    finally:
        if place.first:
            starts.end(starts.step, how)
            if how != "failed":
                found = summary(config, starts, how, device, place.world)
                write(config.folder, found, how == "done")
            if fault := refresh.write(config.folder):
                print(fault)


def summary(config: Config, starts: Starts, how: str, device: str, world: int) -> dict[str, Any]:
    """The run in figures, from its metrics.jsonl; those that no line knows are None."""
    # A run of a million steps has many lines, and few of their numbers count here.
    lines = [
        {key: line[key] for key in (*MEANS, *LAST, *MEMORY) if key in line}
        for line in read(config.folder / "metrics.jsonl")
    ]
    chosen, steps = windowed(lines, config.log.window)
    found: dict[str, Any] = {
        "name": config.name,
        "end": how,
        "steps": starts.step,
        "device": device,
        "ranks": world,
        "batch_size": config.batch_size,
        "precision": config.engine.precision,
        "window_asked": [*config.log.window],
        "window": steps,
    }
    for key in MEANS:
        found[key] = mean(chosen, key)
    for line in chosen:
        if "data_stall" in line:
            line["busy"] = line["seconds_per_step"] * (1 - (line["data_stall"] or 0.0))
    found["seconds_per_step_without_data_wait"] = mean(chosen, "busy")
    last = lines[-1] if lines else {}
    memory = [told for line in lines for key in MEMORY if isinstance(told := line.get(key), int | float)]
    return found | {
        "final_loss": last.get("loss"),
        "final_loss_step": last.get("step"),
        "memory_gib": max(memory, default=None),
        "end_to_end_seconds": starts.elapsed(),
        "goodput": last.get("useful_seconds", 0.0) / max(starts.elapsed(), 1e-9),
    }


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, each with "steps", how many it is the mean of."""
    if not path.is_file():
        return
    before = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                told = json.loads(line)
                told["steps"] = told["step"] - before
            except (ValueError, KeyError, TypeError):
                continue
            before = told["step"]
            yield told


def windowed(
    lines: list[dict[str, Any]], window: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The lines of the steps of a window, or of all where it holds none, and their first and last step."""
    chosen = [line for line in lines if window[0] <= line["step"] <= window[1]] or lines
    if not chosen:
        return [], None
    return chosen, [chosen[0]["step"] - chosen[0]["steps"] + 1, chosen[-1]["step"]]


def mean(lines: list[dict[str, Any]], key: str) -> float | None:
    """The mean over steps, each line as often as it has steps; None where no line knows the key."""
    known = [line for line in lines if isinstance(line.get(key), int | float)]
    steps = sum(line["steps"] for line in known)
    return sum(line[key] * line["steps"] for line in known) / steps if steps else None


def write(folder: Path, found: Mapping[str, Any], shown: bool) -> None:
    """Write summary.json, and show it; a full disk is told."""
    if shown:
        Console().print(table(found))
    part = folder / f".{FILE}.part"
    try:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / FILE)
    except OSError as error:
        print(f"{folder / FILE} cannot be written: {error.strerror or error}")


def table(found: Mapping[str, Any]) -> Table:
    """The summary for people."""
    first, last = found["window"] or (0, 0)
    asked = found["window_asked"]
    title = f"{found['name']}: speed over the steps {first} to {last}"
    if [first, last] != asked:
        title += f" (log.window asks for {asked[0]} to {asked[1]})"
    rows = Table(title=title, title_justify="left", show_header=False)

    def row(name: str, key: str, more: str = "") -> None:
        rows.add_row(name, "-" if found[key] is None else f"{found[key]:.4g}{more}")

    row("images/s without data wait", "images_per_second_without_data_wait")
    row("images/s", "images_per_second")
    row("seconds per step without data wait", "seconds_per_step_without_data_wait")
    row("seconds per step", "seconds_per_step")
    row("final loss", "final_loss", f" (step {found['final_loss_step']})")
    share = f"{found['goodput']:.0%} of it in steps that stand"
    rows.add_row("end to end", f"{duration(found['end_to_end_seconds'])}, {share}")
    return rows
