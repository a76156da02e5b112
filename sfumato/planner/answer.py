"""One way recommended of all, with the reason and the settings to write into the config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from sfumato.config import Config
from sfumato.engine.size import readable
from sfumato.errors import UserError
from sfumato.planner.costs import cost_of
from sfumato.planner.fit import memory, reserve
from sfumato.planner.rows import Ask, Row, rows
from sfumato.planner.ways import settings

ALIKE = 0.02
"""Ways whose expected speeds differ by no more are taken as equally fast."""


@dataclass(frozen=True)
class Answer:
    """What was asked, all ways, and the one to take; `best` is None where none fits."""

    ask: Ask
    rows: Sequence[Row]
    best: Row | None

    @property
    def reason(self) -> str:
        """Why the best one, in a sentence."""
        return "" if self.best is None else because(self.rows, self.best)


def answer(ask: Ask, others: bool = False, better: bool = False) -> Answer:
    """Think about a run; others, better: as `ways` takes them. Other precisions are never recommended."""
    found = rows(ask, others, better)
    return Answer(ask, found, choose(found, ask.config.engine.precision))


def choose(found: Sequence[Row], precision: str) -> Row | None:
    """The plainest of the fastest that fit, in the run's own precision, which moves its curve."""
    fitting = [row for row in found if row.fits and row.way.precision == precision]
    if not fitting:
        return None
    fastest = max(row.images.get("usual", 0.0) for row in fitting)
    near = [row for row in fitting if row.images.get("usual", 0.0) >= fastest * (1 - ALIKE)]
    return min(near, key=lambda row: (row.way.plainness, row.memory.device))


def because(found: Sequence[Row], best: Row) -> str:
    """Why a row was chosen, against its neighbours that differ in one thing."""
    way, said = best.way, []
    most = "with everything recomputed" if way.checkpointing else "with gradient checkpointing"
    neighbours = [
        (bool(way.checkpointing), replace(way, checkpointing=False), "without gradient checkpointing"),
        (way.checkpointing is True, replace(way, checkpointing="selective"), "with it selective"),
        (way.checkpointing is not True, replace(way, checkpointing=True), most),
        (way.offload != "none", replace(way, offload="none"), "without offload"),
        (way.stage > 1, replace(way, stage=1), "at ZeRO stage 1"),
    ]
    for differs, neighbour, words in neighbours:
        other = next((row for row in found if row.way == neighbour), None)
        if differs and other is not None:
            said.append(f"{words} it {against(other)}")
    number = sum(row.fits for row in found)
    first = f"the fastest of {number} ways that fit" if number > 1 else "the only way that fits"
    if number > 1 and any(row.fits and row is not best and same_speed(row, best) for row in found):
        first = f"of {number} ways that fit the plainest of the fastest (within {ALIKE:.0%})"
    if number > 1 and not best.images:
        first = f"the plainest of {number} ways that fit, whose speeds are unknown"
    return "; ".join([first, *said])


def against(other: Row) -> str:
    """What is wrong with a neighbour."""
    if not other.fits:
        return f"lacks {readable(round(other.lacks or other.short))}"
    rate = f"{other.images['usual']:.1f} images/s" if other.images else "a speed that is unknown"
    return f"would give {rate}, with micro-batches of {other.micro}"


def same_speed(one: Row, other: Row) -> bool:
    """Whether two rows are taken as equally fast."""
    a, b = one.images.get("usual", 0.0), other.images.get("usual", 0.0)
    return abs(a - b) <= ALIKE * max(a, b)


def held(row: Row) -> dict[str, object]:
    """What the row puts into [engine]: what differs from the defaults, and the stage."""
    return {
        name: value
        for name, value in settings(row.config, row.way).items()
        if name in ("zero_stage", "precision") or value not in ("none", False)
    }


def nothing_fits(found: Answer) -> UserError:
    """The error where no way fits: what would be needed, and what saves most."""
    ask = found.ask
    least = min(found.rows, key=lambda row: (row.lacks, row.short, row.memory.device), default=None)
    asked = f'"{ask.config.name}" on {ask.world} x {ask.memory / 1e9:.4g} GB'
    if least is None:
        return UserError(
            asked, "the settings of [engine] contradict each other", "let more of them be chosen"
        )
    if not least.lacks:
        lacks = readable(round(least.short))
        found_ = (
            f"what fits on the devices ({least.way.words}) takes {lacks} more than there is of the machine's"
        )
        return UserError(asked, f"{found_} memory", "take machines with more memory, or more of them")
    needed = next(size for size in count(1) if size * 1e9 - reserve(size * 1e9) >= least.memory.device)
    lacks = readable(round(least.lacks))
    found_ = f"even what takes least ({least.way.words}, micro-batch {least.micro}) lacks {lacks}"
    saved = saving(ask, least)
    do = f"take devices of {needed} GB or more"
    if saved:
        words, bytes_ = saved
        do += f"; of the other settings {words} saves most, {readable(bytes_)}"
    return UserError(asked, found_, do)


def saving(ask: Ask, least: Row) -> tuple[str, int] | None:
    """The setting outside [engine] that saves most of what takes least, and how many bytes."""
    config, found = ask.config, list[tuple[int, str]]()
    for words, other in cheaper(config):
        trial = Ask(other, ask.facts, ask.world, ask.local, ask.memory, ask.device, ask.accelerator)
        way = replace(least.way, precision=other.engine.precision)
        cost = cost_of(other, ask.facts, way, trial.sizes[-1])
        taken = memory(way.of(other, least.micro), ask.world, cost)
        found.append((least.memory.device - taken.device, words))
    best = max(found, default=(0, ""))
    return (best[1], best[0]) if best[0] > 0 else None


def cheaper(config: Config) -> list[tuple[str, Config]]:
    """The config with one setting changed to what takes less, and that setting as people write it."""
    found, data = list[tuple[str, Config]](), config.data
    wanted = "images" if config.learns_text else "both"
    if data.cache != wanted:
        found.append(
            (f'data.cache = "{wanted}"', changed(config, data={"cache": wanted, "views": data.views or 1}))
        )
    if config.engine.precision == "fp32":
        found.append(('engine.precision = "bf16"', changed(config, engine={"precision": "bf16"})))
    if config.ema.enabled:
        found.append(("ema.enabled = false", changed(config, ema={"enabled": False})))
    if data.buckets is None and min(data.resolutions) >= 512:
        half = tuple(side // 2 for side in data.resolutions)
        found.append((f"data.resolution = {half[0]}", changed(config, data={"resolution": half})))
    return found


def changed(config: Config, **tables: dict[str, object]) -> Config:
    """The config with settings of some tables changed; nothing is checked."""
    new = {name: getattr(config, name).model_copy(update=values) for name, values in tables.items()}
    return config.model_copy(update=new)
