"""What a page shows besides curves and pictures: settings, data, mishaps, the way to load the result."""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from sfumato.config import Config, parse
from sfumato.errors import UserError
from sfumato.report import card
from sfumato.report.page.lines import number, step_of
from sfumato.report.page.record import Record, one_line
from sfumato.report.page.words import figure, long
from sfumato.report.public import flat, shared, toml

REASONS, NAMES = 20, 3  # of faults
BAD, SAMPLES = 50, 12  # batches, and samples of one
SHAPES = 40
UNSAID = ("environment",)
"""Settings that are this machine's."""


def parsed(record: Record) -> tuple[Config | None, str]:
    """The run's settings; None with the reason if this version cannot read them."""
    if not record.resolved:
        return None, ""
    try:
        return parse(record.resolved), ""
    except UserError as error:
        return None, f"This version of Sfumato cannot tell which are unusual: {error.found}"


def settings(record: Record, config: Config | None, why: str) -> dict[str, Any]:
    """The settings that are not the usual ones with both values, and all of them."""
    every = {name: value for name, value in flat(record.resolved) if name.split(".")[0] not in UNSAID}
    changed = []
    if config is not None:
        usual = dict(defaults_of(config))
        for name, value in flat(config.model_dump(mode="json", exclude={*UNSAID})):
            if name not in usual or usual[name] != value:
                changed.append((name, said(name, value), said(name, usual[name]) if name in usual else ""))
    return {
        "changed": changed,
        "all": [(name, said(name, value)) for name, value in every.items()],
        "parsed": config is not None,
        "why": why,
    }


def defaults_of(section: Any) -> list[tuple[str, Any]]:
    """The defaults of all settings that have one, by their dotted names; of a table, those of its kind."""
    found: list[tuple[str, Any]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        usual = None if field.is_required() else field.get_default(call_default_factory=True)
        if hasattr(type(value), "model_fields"):
            found += ((f"{name}.{below}", other) for below, other in defaults_of(value))
            found += [(f"{name}.kind", kind)] if (kind := kind_of(usual)) is not None else []
        elif not field.is_required() and (name != "kind" or len(get_args(field.annotation)) > 1):
            found.append((name, plainly(usual)))
    return found


def kind_of(section: Any) -> str | None:
    """The word that says which of several tables this is; None for a table of its own."""
    field = getattr(type(section), "model_fields", {}).get("kind")
    return str(section.kind) if field is not None and len(get_args(field.annotation)) == 1 else None


def plainly(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, tuple | list):
        return [plainly(part) for part in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value if value is None or isinstance(value, bool | int | float | dict) else str(value)


def said(name: str, value: Any) -> str:
    """A setting as text, without what lies above a folder on this machine."""
    value = shared(value, name) if value != "" else '""'
    return "unset" if value is None else one_line(value if isinstance(value, str) else toml(value), 600)


def shapes(record: Record) -> list[dict[str, Any]]:
    """Steps of each bucket's shape, most first."""
    counts = record.metrics.shapes.most_common(SHAPES)
    total = sum(record.metrics.shapes.values())
    return [
        {
            "name": one_line(name, 60).replace("x", " × "),
            "steps": steps,
            "share": 100 * steps / total,
            "bar": 100 * steps / counts[0][1],
        }
        for name, steps in counts
    ]


def faults(record: Record) -> dict[str, Any]:
    """Records that could not be used, by reason."""
    rows = record.faults()
    counts = Counter(row["reason"] for row in rows)
    common = [
        {
            "reason": one_line(reason, 400),
            "count": count,
            "names": [one_line(row["name"], 200) for row in rows if row["reason"] == reason][:NAMES],
        }
        for reason, count in counts.most_common(REASONS)
    ]
    return {"count": len(rows), "reasons": common, "more": len(counts) - len(common)}


def bad(record: Record, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Batches that were not finite, with those of their samples that were not."""
    found = []
    for row in rows[-BAD:]:
        worse = [sample for sample in row["samples"] if not math.isfinite(number(sample.get("loss")))]
        samples, step = worse or row["samples"], step_of(dict(row))
        what = f"{len(worse)} of {len(row['samples'])} losses" if worse else "the gradient, but no loss,"
        wrong = f"{what} {'are' if len(worse) > 1 else 'is'} not finite"
        told = [
            {
                "name": one_line(sample.get("name"), 200),
                "caption": one_line(sample.get("caption"), 400),
                "loss": one_line(sample["loss"], 20) if worse else figure(sample.get("loss")),
            }
            for sample in samples[:SAMPLES]
            if "loss" in sample
        ]
        found.append(
            {
                "step": "?" if step is None else f"{step:,}",
                "wrong": wrong if row["samples"] else "batch.json cannot be read",
                "command": shlex.quote(f"{record.folder}/bad/{row['folder']}"),
                "samples": told,
            }
        )
    return found


def load(record: Record, config: Config | None) -> dict[str, Any] | None:
    """How the newest export is loaded, as its model card says it."""
    place, facts = record.export()
    if config is None:
        return None
    prompt = str(facts.get("trigger") or next(iter(config.preview.prompts), "a picture"))
    code = None
    if place:
        told = {"family": facts.get("family"), "trigger": facts.get("trigger")}
        code = card.code(config, told).replace(card.HERE, f'model = "{place}"')
    return {
        "code": code,
        "place": place,
        "step": one_line(facts.get("step"), 20),
        "run": shlex.quote(str(record.folder)),
        "prompt": prompt.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("`", "\\`"),
    }


SHARES = ("data_stall", "goodput", "mfu")
"""Numbers of a summary that are shares."""


def summary(record: Record) -> list[tuple[str, str]]:
    """The summary of a run as its end wrote it; what it does not know is left out."""
    found = []
    for name, value in flat(record.summary):
        words, leaf = name.replace("_", " ").replace(".", ": "), name.rpartition(".")[2]
        if value is None or leaf in ("name", "window_asked"):
            continue
        if leaf in SHARES:
            text = f"{figure(round(100 * number(value), 1))} %"
        elif leaf == "window" and isinstance(value, list) and len(value) == 2:
            words, text = "steps of these means", " to ".join(one_line(end, 20) for end in value)
        elif isinstance(value, float):
            text = figure(value) + (f" ({long(value)})" if leaf.endswith("seconds") and value > 120 else "")
        else:
            text = one_line(value, 400)
        found.append((words.replace("gib", "GiB").replace("fps", "FPS"), text))
    return found[:100]


def environment(record: Record) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """On what it ran, and the variables that matter."""
    told = dict(record.environment)
    packages, variables = (told.pop(name, None) for name in ("packages", "variables"))
    rows = worded(told) + worded(packages)
    return rows[:200], worded(variables)[:200]


def worded(table: Any) -> list[tuple[str, str]]:
    """A table of a file as rows of words; [] if it is none."""
    return [(name, one_line(value, 400)) for name, value in flat(table)] if isinstance(table, dict) else []
