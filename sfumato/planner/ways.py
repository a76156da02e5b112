"""The ways in which one run can be held: ZeRO stage, offload, gradient checkpointing, precision."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import ValidationError

from sfumato.config import Checkpointing, Config
from sfumato.engine.cells import check_cells
from sfumato.engine.offload import check
from sfumato.errors import UserError

Offload = Literal["none", "optimizer", "parameters"]
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
PRECISIONS = ("bf16", "fp16", "fp32")
CHECKPOINTING: tuple[Checkpointing, ...] = (False, "selective", True)
STAGES = (1, 2, 3, 0)
"""From the plainest: stage 1 is the default, and stage 0 casts fp32 weights at every step."""


@dataclass(frozen=True)
class Way:
    """One way."""

    stage: int
    offload: Offload
    checkpointing: Checkpointing
    precision: str

    def of(self, config: Config, micro: int = 1) -> Config:
        """The config held in this way, with micro-batches of `micro` samples; nothing is checked."""
        engine = config.engine.model_copy(update=settings(config, self))
        return config.model_copy(update={"engine": engine, "micro_batch_size": micro})

    @property
    def words(self) -> str:
        """The way for people."""
        said = [f"ZeRO stage {self.stage}"]
        chosen = "selective " if self.checkpointing == "selective" else ""
        said += [f"{chosen}gradient checkpointing"] if self.checkpointing else []
        away = {
            "optimizer": ["optimizer off the device"],
            "parameters": ["weights and optimizer off the device"],
        }
        return ", ".join(said + away.get(self.offload, []))

    @property
    def plainness(self) -> tuple[int, int, int]:
        """What is preferred among ways that are as fast: smaller is plainer."""
        tidy = CHECKPOINTING.index(self.checkpointing)
        return OFFLOADS.index(self.offload), tidy, STAGES.index(self.stage)


def settings(config: Config, way: Way) -> dict[str, Any]:
    """The way as settings of [engine]; what is moved away goes where the config moves such things."""
    engine, moved = config.engine, OFFLOADS.index(way.offload)
    kept = [
        (place if place != "none" else "cpu") if moved >= level else "none"
        for level, place in ((1, engine.offload_optimizer), (2, engine.offload_parameters))
    ]
    return {
        "zero_stage": way.stage,
        "precision": way.precision,
        "gradient_checkpointing": way.checkpointing,
        "offload_optimizer": kept[0],
        "offload_parameters": kept[1],
    }


def way_of(config: Config) -> Way:
    """The way that a config asks for."""
    engine = config.engine
    moved: Offload = "optimizer" if engine.offload_optimizer != "none" else "none"
    moved = "parameters" if engine.offload_parameters != "none" else moved
    return Way(engine.zero_stage, moved, engine.gradient_checkpointing, engine.precision)


def ways(
    config: Config, world: int, accelerator: str = "cuda", others: bool = False, better: bool = False
) -> Iterator[Way]:
    """Every way that a run on `world` ranks can be held in; of `engine = "auto"` what the user has set stays.

    others: with precisions besides the config's own, which move the curve. better: without those that another
    one is never worse than.
    """
    fixed = config.engine.model_fields_set if config.engine.auto else frozenset[str]()
    own = way_of(config)
    for precision in PRECISIONS if others else (own.precision,):
        for stage, kept, checkpointing in product(STAGES, OFFLOADS, CHECKPOINTING):
            way = Way(stage, kept, checkpointing, precision)
            if better and way != own and never_better(way, accelerator):
                continue
            if kept_by_user(way, own, fixed) and possible(config, world, way, accelerator):
                yield way


def check_asked(config: Config, world: int) -> None:
    """Raise UserError for a batch that does not go into the ranks, and for an offload that cannot be."""
    if config.batch_size % world:
        do = f"set batch_size to a multiple of {world}, or take another number of devices"
        raise UserError(f"batch_size = {config.batch_size} on {world} ranks", "it does not go into them", do)
    if not config.engine.auto:
        check(config, world)


def never_better(way: Way, accelerator: str) -> bool:
    """Whether another way takes no more memory and is as fast.

    Stage 0 in bf16 has fp32 weights and gradients, and sends more of them than stage 1; what is taken off a
    CPU goes to the same memory.
    """
    return (way.stage == 0 and way.precision == "bf16") or (accelerator == "cpu" and way.offload != "none")


def kept_by_user(way: Way, own: Way, fixed: Collection[str]) -> bool:
    """Whether a way is as the user has fixed it."""
    moved = {"offload_optimizer", "offload_parameters"} & set(fixed)
    return (
        ("zero_stage" not in fixed or way.stage == own.stage)
        and ("gradient_checkpointing" not in fixed or way.checkpointing == own.checkpointing)
        and (not moved or way.offload == own.offload)
    )


def possible(config: Config, world: int, way: Way, accelerator: str) -> bool:
    """Whether a run can be held so: by the rules of the config and of DeepSpeed's known faults."""
    if way.offload != "none" and (way.stage == 0 or (way.offload == "parameters" and way.stage < 3)):
        return False
    if way.precision == "fp16" and (way.stage == 0 or accelerator == "cpu"):
        return False
    try:
        check_cells(checked(way.of(config)), world, accelerator)
    except (ValidationError, UserError):
        return False
    return True


def checked(config: Config) -> Config:
    """A config that was put together here, checked like one that was read."""
    return Config.model_validate(config.model_dump(exclude_unset=True))
