"""Everything that can be refused before a model is loaded, in one message; else what the run will do.

    plan = check(config, world=8, accelerator="cuda")
    print(plan)

A plan has already opened what it looked at: its facts, index and cells need not be read again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from sfumato import prior
from sfumato.check.looks import looks
from sfumato.check.rules import (
    IMAGES,
    check_apart,
    check_attention,
    check_compile,
    check_conditions,
    check_folder,
    check_host,
    check_method,
    check_objective,
    check_precision,
    check_sizes,
    check_views,
    slow_numbers,
    unlearned,
)
from sfumato.config import Config
from sfumato.data.buckets import Cells, reason
from sfumato.data.held import Held, check_faults, held_out, left_out
from sfumato.data.index import Index, open_index
from sfumato.data.sources.tars import damage
from sfumato.engine.cells import check_cells
from sfumato.engine.ds_keys import deepspeed_faults
from sfumato.engine.published import checkpoints_in
from sfumato.engine.size import checkpoint_bytes, readable
from sfumato.errors import UserError
from sfumato.models.folder import Facts, examine
from sfumato.planner.ways import way_of
from sfumato.prior import Pictures
from sfumato.report import trackers, upload

__all__ = ["Plan", "check", "check_folder", "slow_numbers", "unlearned"]


@dataclass(frozen=True)
class Plan:
    """What a run will do, after everything that could be refused was looked at."""

    config: Config
    world: int
    accelerator: str
    accumulation: int
    facts: Facts
    index: Index
    cells: Cells
    parameters: int | None
    """Trained weights; None where they are counted later."""
    pictures: Pictures | None = None
    """The prior's class images, where the model draws them."""
    missing: Sequence[int] = ()
    """Those of them that are not drawn; the index is without any then."""
    held: Held | None = None
    """What the validation looks at, if there is one."""

    @property
    def fingerprint(self) -> str:
        """Of the data that are trained on."""
        held = self.held.name if self.held is not None else ""
        return f"{self.index.fingerprint}-{held}" if held else self.index.fingerprint

    @property
    def records(self) -> int:
        """How many are trained on, without the prior's."""
        return sum(part.count for part in self.index.parts[: self.index.prior]) - len(left_out(self.held))

    def lines(self) -> Iterator[tuple[str, str]]:
        """Pairs of a heading and what is planned."""
        config, facts = self.config, self.facts
        yield "model", f"{facts.family} from {facts.folder}"
        size = f", {self.parameters:,} numbers learn" if self.parameters else ""
        yield "method", f"{config.method.kind}{size}"
        yield from self.data_lines()
        yield (
            "batch",
            f"{config.batch_size} = {config.micro_batch_size} on {self.world} {self.accelerator} "
            f"rank{'s' * (self.world > 1)}, {self.accumulation} time{'s' * (self.accumulation > 1)}",
        )
        epoch = float(sum(self.visits()[: self.index.prior]))
        epochs = config.steps * config.batch_size / (2 if config.data.prior else 1) / epoch
        yield "steps", f"{config.steps:,}, which are {epochs:,.2f} epochs of {epoch:,.0f} samples"
        chosen = ', as engine = "auto" chose' if config.engine.auto else ""
        yield "numbers", f"{config.engine.precision}, {way_of(config).words}{chosen}"
        if advice := slow_numbers(config, self.accelerator):
            yield "", advice
        if advice := unlearned(config, facts):
            yield "", advice
        room = checkpoint_bytes(config, facts, self.parameters or 0)
        yield "folder", f"{config.folder}" + (f" (a checkpoint takes {readable(room)})" if room else "")
        if there := checkpoints_in(config.folder):
            yield "resume", f"from {there[-1].name}, or from the one before if that is not whole"

    def data_lines(self) -> Iterator[tuple[str, str]]:
        """What is known of the images."""
        data, parts = self.config.data, self.index.parts
        yield "images", self.index.where()
        for part, share in zip(parts, self.shares(), strict=True) if len(parts) > 1 else ():
            yield "", f"{share:.1%} of the visits to the {part.count:,} of {part.name}"
        if self.pictures is not None and self.missing:
            what = f'{len(self.missing):,} class images of "{self.pictures.prompt}"'
            yield "prior", f"{what} will be drawn first, into {self.pictures.folder}"
        sizes = [f"{wide}x{high}" for high, wide in self.cells.sizes]
        if len(sizes) > 1:
            yield "buckets", f"{len(sizes)}, from {sizes[0]} to {sizes[-1]}"
        else:
            yield "size", f"{sizes[0]} pixels"
        counts = self.cells.counts[:, : self.index.prior].sum(1) * (2 if data.prior else 1)
        if small := int((counts < self.config.batch_size).sum()):
            yield "", f"of {small} there are fewer images than a batch holds, which then shows some twice"
        yield from looks(self.config, self.held, self.world)
        if faults := self.index.facts["faults"]:
            yield "faults", f"{faults:,} unusable, as listed in {self.index.folder / 'faults.jsonl'}"
        if damaged := damage(self.index.sources, self.index.fault_lines()):
            yield "", str(damaged)
        if unplaced := len(self.cells.unplaced):
            yield "", f"{unplaced:,} without a bucket: {reason(data)}"
        if data.cache != "none":
            yield "cache", f"{data.cache}, in {data.store}"

    def visits(self) -> list[Fraction]:
        """Samples of each part in an epoch."""
        placed = self.cells.counts.sum(0).tolist()
        return [part.repeats * count for part, count in zip(self.index.parts, placed, strict=True)]

    def shares(self) -> list[float]:
        """Each part's share of the samples."""
        visits, prior = self.visits(), self.index.prior
        total = sum(visits[:prior]) * (1 if prior is None else 2)
        return [float(number / total) for number in visits[:prior]] + [0.5] * (prior is not None)

    def __str__(self) -> str:
        return "\n".join(f"{heading:>8}  {text}" for heading, text in self.lines())


def check(
    config: Config,
    world: int,
    accelerator: str,
    verify: bool = True,
    tell: Callable[[str], None] | None = None,
    local: int | None = None,
) -> Plan:
    """Look at everything that does not need a model.

    world: ranks, over all machines, `local` on each; unset: on one. accelerator: DeepSpeed's name for it,
    such as "cpu" or "cuda". verify: see whether the data have changed since they were indexed. tell: hears
    of long work.
    Raises one UserError with all that was found.
    """
    faults: list[UserError] = []
    steps, facts, index, cells, parameters, pictures, held = 0, None, None, None, None, None, None
    config = config.on(world)
    data, missing = config.data, list[int]()
    with noted(faults):
        steps = config.accumulation(world)
    for rule in (check_precision, check_attention, check_compile):
        with noted(faults):
            rule(config, accelerator)
    faults += deepspeed_faults(config.engine.deepspeed)
    if steps and not faults:
        with noted(faults):
            check_cells(config, world, accelerator)
    with noted(faults):
        facts = examine(config.model)
    if facts is not None:
        with noted(faults):
            check_sizes(config, facts)
        with noted(faults):
            check_objective(config, facts)
    if facts is not None and prior.drawn(config):
        with noted(faults):
            pictures = prior.find(config)
            if not (missing := pictures.missing()):
                pictures.finish()
                data = pictures.given(config).data
    with noted(faults):
        check_views(config)
        index = open_index(data, digests=data.cache in IMAGES, verify=verify, tell=tell)
        check_faults(index, data)
        held = held_out(config.validation, data, index, verify, tell)
        cells = Cells.build(
            index.folder, data, index.sizes, index.part, len(index.parts), without=left_out(held)
        )
    with noted(faults):
        parameters = check_method(config, facts, index)
    for look in around(config, facts, parameters or 0, world, local or world):
        with noted(faults):
            look()
    if faults:
        raise joined(faults, f'the run "{config.name}"')
    assert facts and index and cells, "a part is missing, yet nothing was found wrong"
    found = facts, index, cells, parameters, pictures, tuple(missing), held
    return Plan(config, world, accelerator, steps, *found)


def around(
    config: Config, facts: Facts | None, parameters: int, world: int, local: int
) -> Iterator[Callable[[], None]]:
    """Checks of what lies around a run: second images, its folder, the machine, and those that it tells."""
    yield partial(check_conditions, config)
    yield partial(check_apart, config)
    yield partial(check_folder, config, facts, parameters)
    yield partial(check_host, config, world, local, parameters)
    yield partial(upload.check, config.export.push_to_hub)
    yield partial(trackers.check, config)


@contextlib.contextmanager
def noted(faults: list[UserError]) -> Iterator[None]:
    """Write the user's mistakes down and go on."""
    try:
        yield
    except UserError as error:
        faults.append(error)


def joined(faults: Sequence[UserError], asked: str) -> UserError:
    """One error of several."""
    if len(faults) == 1:
        return faults[0]
    lines = [f"{fault.asked}: {fault.found}\n       -> {fault.do}" for fault in faults]
    return UserError(asked, "\n       ".join(lines), f"mend these {len(faults)}")
