"""What the planner found, for people at a shell of 80 columns, and for JSON."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from sfumato.planner.answer import Answer, held
from sfumato.planner.costs import Size, cost_of
from sfumato.planner.devices import DEVICES
from sfumato.planner.fit import Memory, reserve
from sfumato.planner.rows import Ask, Row, speeds_on, told
from sfumato.planner.ways import way_of
from sfumato.reference import toml

WIDTH = 80
WORDS = {
    "weights": "weights that learn, with fp32 masters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "ema": "averages of the weights",
    "frozen": "frozen weights",
    "buffers": "buffers of communication, gathered layers",
    "activations": "activations and what lives beside them",
}
"""The parts of `Memory` as people read them."""


def lines(found: Answer, every: bool = False, records: int | None = None) -> Iterator[str]:
    """The whole answer, below `heading`. every: each way, and not only the best of each stage and offload.

    records: of the data, for the number of epochs.
    """
    best = found.best
    yield from grid(found, every)
    if best is None:
        return
    yield ""
    yield from parts(found, best)
    yield ""
    yield from sizes(found, best)
    yield ""
    yield from devices(found, best, records)
    yield ""
    yield from wrapped("take", f"{spelt(best)}: {found.reason}.")
    yield ""
    yield "write"
    yield from (f"  {line}".rstrip() for line in written(best))
    yield ""
    yield 'or engine = "auto", which chooses at each start for the devices that are there'


def heading(ask: Ask) -> Iterator[str]:
    """What was asked."""
    config, facts = ask.config, ask.facts
    share = "" if ask.world == ask.local else f" on {ask.world // ask.local} machines"
    kind, numbers = config.method.kind, config.engine.precision
    free = reserve(ask.memory) / 1e9
    yield f"{config.name}: {kind}, {facts.family}, {numbers}, batch {config.batch_size}"
    size = f"{ask.memory / 1e9:.4g} GB"
    yield f"{ask.world} x {size}{share}; {free:.1f} GB stay free; speeds of {ask.device.name}"


def grid(found: Answer, every: bool) -> Iterator[str]:
    """The table of ways, by stage and offload."""
    own = way_of(found.ask.config)
    first = [] if found.best is None else [found.best]
    rows = found.rows if every else best_of_each([*first, *found.rows])
    rows = [*rows, *(row for row in found.rows if row.way == own and row not in rows)]
    precision = len({row.way.precision for row in rows}) > 1
    numbers = "numbers  " if precision else ""
    yield f"zero  {'offload':10}  recompute  {numbers}micro  GB a rank  GB sent  images/s"

    def order(row: Row) -> tuple[object, ...]:
        way = row.way
        return way.precision != found.ask.config.engine.precision, way.precision, way.stage, way.plainness

    for row in sorted(rows, key=order):
        way = row.way
        again = {False: "no", True: "yes", "selective": "selective"}[way.checkpointing]
        start = f"{way.stage:4}  {way.offload:10}  {again:9}  "
        start += f"{way.precision:7}  " if precision else ""
        start += f"{row.micro:5}  {row.memory.device / 1e9:9.2f}  "
        if not row.fits:
            yield start + (f"{row.lacks / 1e9:.2f} GB too much" if row.lacks else "too much for the machine")
            continue
        mark = "  <-" if row is found.best else "  as set" if way == own else ""
        yield f"{start}{(row.traffic.link + row.traffic.host) / 1e9:7.2f}  {rate(row):>8}{mark}"


def rate(row: Row) -> str:
    """Images a second, or a dash where no peak is known."""
    return f"{row.images['usual']:.1f}" if row.images else "-"


def best_of_each(rows: Sequence[Row]) -> list[Row]:
    """The first row, which is the best, of each stage, offload and precision."""
    found: dict[tuple[int, str, str], Row] = {}
    for row in rows:
        found.setdefault((row.way.stage, row.way.offload, row.way.precision), row)
    return list(found.values())


def parts(found: Answer, row: Row) -> Iterator[str]:
    """What makes up the memory of a rank."""
    yield f"GB on a rank, {spelt(row)}"
    memory: Memory = row.memory
    for name, words in WORDS.items():
        size = getattr(memory, name)
        if size:
            yield f"  {size / 1e9:8.2f}  {words}"
    yield f"  {memory.backward / 1e9:8.2f}  together in the backward pass, of {found.ask.room / 1e9:.2f}"
    yield f"  {memory.stepping / 1e9:8.2f}  while the optimizer steps, without activations"
    for size, words in (
        (memory.host, "in the memory of the machine, for each rank"),
        (memory.disk, "on disk"),
    ):
        if size:
            yield f"  {size / 1e9:8.2f}  besides, {words}"


def sizes(found: Answer, row: Row) -> Iterator[str]:
    """The largest, the middle and the smallest size."""
    yield "size           GB kept a sample   T FLOP a sample: model  executed  encoding"
    for size in shown(found.ask.sizes):
        cost = cost_of(found.ask.config, found.ask.facts, row.way, size)
        high, wide = size
        yield (
            f"{f'{wide}x{high}':13}  {cost.activations / 1e9:16.3f}  {cost.model_flops / 1e12:23.3f}"
            f"  {cost.flops / 1e12:8.3f}  {cost.encode_flops / 1e12:8.3f}"
        )
    if len(found.ask.sizes) > 3:
        yield f"the largest, middle and smallest of {len(found.ask.sizes)} sizes that the settings allow"


def shown(every: Sequence[Size]) -> list[Size]:
    """The largest, the middle and the smallest of sizes in order of area."""
    return list(dict.fromkeys((every[-1], every[len(every) // 2], every[0])))


def devices(found: Answer, row: Row, records: int | None) -> Iterator[str]:
    """What other devices are expected to give for the same way, if they hold it."""
    ask = found.ask
    steps = ask.config.steps
    yield "images/s and the time of the run, by a model (docs/planner.md), not measured"
    for device in DEVICES:
        if device.memory * 1e9 < row.memory.device and device is not ask.device:
            continue
        speeds = speeds_on(device, ask, row.config, row.cost, row.traffic)
        if not speeds:
            yield f"  {device.name:9}  no peak of {ask.config.engine.precision} is known"
            continue
        usual, low, high = (speeds[name].images for name in ("usual", "low", "high"))
        time = clock(speeds["usual"].step * steps)
        yield f"  {device.name:9}  {usual:8.1f}  ({low:.1f} to {high:.1f})  {time} for {steps:,} steps"
    if records:
        yield f"  {steps * ask.config.batch_size / records:,.2f} epochs of {records:,} records"


def clock(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def spelt(row: Row) -> str:
    """A row in words."""
    return f"{row.way.words}, micro-batches of {row.micro}"


def written(row: Row) -> Iterator[str]:
    """The settings as a config file has them."""
    yield f"micro_batch_size = {row.micro}"
    yield ""
    yield "[engine]"
    for name, value in held(row).items():
        yield f"{name} = {toml(value)}"


def wrapped(head: str, text: str) -> list[str]:
    """Text in lines, its head before the first."""
    return textwrap.wrap(text, WIDTH, initial_indent=f"{head}  " if head else "  ", subsequent_indent="  ")


def whole(found: Answer) -> dict[str, Any]:
    """Everything, for JSON: bytes, FLOPs and seconds."""
    ask, best = found.ask, found.best
    out: dict[str, Any] = {
        "name": ask.config.name,
        "ranks": ask.world,
        "ranks_of_a_machine": ask.local,
        "memory": ask.memory,
        "reserve": reserve(ask.memory),
        "device": asdict(ask.device),
        "rows": [told(row) for row in found.rows],
        "recommended": None,
    }
    if best is not None:
        out["recommended"] = told(best) | {
            "reason": found.reason,
            "settings": {"micro_batch_size": best.micro, "engine": held(best)},
        }
        out["sizes"] = []
        for high, wide in shown(ask.sizes):
            cost = asdict(cost_of(ask.config, ask.facts, best.way, (high, wide)))
            learns = {"trained": sum(1 for _ in cost.pop("trained")), "width": wide, "height": high}
            out["sizes"].append(learns | cost)
        out["devices"] = {
            device.name: {
                name: {"images_per_second": found_.images, "seconds": ask.config.steps * found_.step}
                for name, found_ in speeds_on(device, ask, best.config, best.cost, best.traffic).items()
            }
            for device in DEVICES
            if device.memory * 1e9 >= best.memory.device
        }
    return out
