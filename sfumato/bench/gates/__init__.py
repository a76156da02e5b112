"""`sfumato bench gates`: what a training step does at full size, counted exactly; no device, no weights.

The real engine, method and objective take a step on torch's meta device (`paper.py`), and beside them a loop
with the order of events of diffusers' example. Bounds stand in bounds.toml; `make test` keeps them. The dict
that `run` gives, and writes as JSON, format 1:

    format, versions
    presets [{"preset", "size" [height, width], "micro_batch", "ranks", "stage", "checkpointing"
        "ours", "example" {"flops", "operators", "calls", "waits" {where: how often}, "copies", "kept",
            "collectives" {name: how many}, "sent" {name: bytes}}; example is null where diffusers has none
        "model_flops"      of the micro-batch, nothing computed twice, with the frozen parts that encode
        "flops"            ours over model_flops
        "of_example"       our operators over the example's
        "sent"             bytes that a rank sends; "foretold" by the planner's formula
        "broken"           bounds that are not held, in words}]
    ranks [{"stage", "collectives", "sent", "foretold"}]    real gloo ranks on a toy model; not if they fail
"""

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sfumato import config as settings
from sfumato.bench.gates.exchange import foretold, on_two_ranks, sent_by
from sfumato.bench.gates.ours import Counts, as_counted, count, count_example, model_flops
from sfumato.bench.machine import machine
from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.models.folder import Facts
from sfumato.planner.architectures import facts_of

BOUNDS = Path(__file__).parent / "bounds.toml"
EXAMPLES = ("full", "lora", "controlnet")
"""What diffusers' examples train."""


def run(names: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Count, show and write it to `out` as JSON; names: presets that train, none: all of them.

    Raises UserError for a preset that is not there, or draws; RuntimeError where the two real ranks fail,
    after the presets were shown and written.
    """
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}", f"no folder {out.parent}", "make it, or name another file")
    wanted = {name: settings.load(name) for name in names or training()}
    log = Console(stderr=True)
    found: dict[str, Any] = {"format": 1, "versions": machine()["versions"], "presets": []}
    for name, config in wanted.items():
        log.print(f"{name}: a step of ours, and one of diffusers' example")
        found["presets"].append(row_of(name, config, facts_of(config.model)))
    shown = Console(width=None if sys.stdout.isatty() else 140)
    shown.print(table(found["presets"]))
    for row in found["presets"]:
        for line in row["broken"]:
            shown.print(f"broken: {row['preset']}: {line}")
    write(found, out)
    log.print("two real ranks on a toy model")
    found["ranks"] = on_two_ranks()
    shown.print(exchanged(found["ranks"]))
    write(found, out)
    return found


def write(found: Mapping[str, Any], out: Path | None) -> None:
    """What is known by now, as JSON, where that was asked for."""
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def are_broken(found: Mapping[str, Any]) -> bool:
    """Whether a bound of what `run` gives is not held."""
    return any(row["broken"] for row in found["presets"])


def training() -> list[str]:
    """The presets that train, by name."""
    files = sorted(settings.PRESETS.glob("*.toml"))
    return [file.stem for file in files if "sample" not in tomllib.loads(file.read_text(encoding="utf-8"))]


def row_of(name: str, config: Config, facts: Facts, beside: bool = True) -> dict[str, Any]:
    """A preset's counts, and which bounds they break; beside: count diffusers' example too."""
    config = as_counted(config)
    size = (max(config.data.resolutions),) * 2
    world = config.batch_size // config.micro_batch_size
    ours = count(config, facts, size)
    has = beside and config.method.kind in EXAMPLES and not config.learns_text
    example = count_example(config, facts, size) if has else None
    wanted = model_flops(config, facts, size)
    row: dict[str, Any] = {"preset": name, "size": [*size], "micro_batch": config.micro_batch_size}
    row |= {"ranks": world, "stage": config.engine.zero_stage}
    row |= {"checkpointing": config.engine.gradient_checkpointing, "ours": told(ours)}
    row |= {"example": None if example is None else told(example), "model_flops": wanted}
    row |= {"flops": ours.flops / wanted}
    row |= {"of_example": None if example is None else ours.operators / example.operators}
    row |= {"sent": sent_by(ours.sent, world), "foretold": foretold(config, facts, size, world)}
    return row | {"broken": broken(figures(row), bounds().get(name, {}))}


def told(counts: Counts) -> dict[str, Any]:
    """Counts for JSON, without the names of all calls."""
    return {name: value for name, value in vars(counts).items() if name != "names"}


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row that have bounds."""
    ours = row["ours"]
    found = {"flops": row["flops"], "operators": ours["operators"], "waits": sum(ours["waits"].values())}
    found |= {"copies": ours["copies"], "kept": ours["kept"], "sent": row["sent"]}
    found |= {"collectives": sum(ours["collectives"].values())}
    return found if row["of_example"] is None else found | {"of_example": row["of_example"]}


@lru_cache(1)
def bounds() -> dict[str, dict[str, float]]:
    """The most that each preset may do."""
    return tomllib.loads(BOUNDS.read_text(encoding="utf-8"))


def broken(found: Mapping[str, float], most: Mapping[str, float]) -> list[str]:
    """Which figures are over their bounds, in words."""
    return [
        f"{name} is {found[name]:,.6g}, at most {bound:,.6g} is allowed"
        for name, bound in most.items()
        if name in found and found[name] > bound
    ]


def loose(found: Mapping[str, float], most: Mapping[str, float], share: float = 0.02) -> list[str]:
    """Which bounds have become loose: they only get tighter, and must follow what is found."""
    return [
        f"{name} is {found[name]:,.6g}: write that in place of {bound:,.6g} in {BOUNDS.name}"
        for name, bound in most.items()
        if name in found and found[name] < bound * (1 - share)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The figures, a line for each preset."""
    shown = Table(title="one optimizer step of one micro-batch, on one rank", title_justify="left", box=None)
    shown.add_column("", no_wrap=True)
    heads = (
        "FLOPs\nof model",
        "\noperators",
        "example's\noperators",
        "\nof them",
        "host\nwaits",
        "example's\n",
    )
    for heading in (*heads, "\ncopies", "kept\nGB", "collec-\ntives", "sent\nGB", "by\nformula"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ours, example = row["ours"], row["example"]
        shown.add_row(
            row["preset"],
            f"{row['flops']:.3f}",
            f"{ours['operators']:,}",
            f"{example['operators']:,}" if example else "",
            f"{row['of_example']:.0%}" if example else "",
            str(sum(ours["waits"].values())),
            str(sum(example["waits"].values())) if example else "",
            str(ours["copies"]),
            f"{ours['kept'] / 1e9:.2f}",
            str(sum(ours["collectives"].values())),
            f"{row['sent'] / 1e9:.3f}",
            f"{row['foretold'] / 1e9:.3f}",
        )
    return shown


def exchanged(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What two real ranks sent, a line for each ZeRO stage."""
    shown = Table(title="\ntwo gloo ranks, a toy model", title_justify="left", box=None)
    for heading in ("stage", "collectives", "bytes sent", "by formula"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        calls = ", ".join(f"{count} {name.strip('_')}" for name, count in row["collectives"].items())
        shown.add_row(str(row["stage"]), calls, f"{row['sent']:,}", f"{row['foretold']:,}")
    return shown
