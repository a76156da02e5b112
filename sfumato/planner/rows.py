"""Every way in which a run can be held, with what it takes and how fast it is expected to be."""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from sfumato.config import Config
from sfumato.models.folder import Facts
from sfumato.planner.costs import Size, cost_of, launches, sizes_of
from sfumato.planner.devices import Device
from sfumato.planner.fit import Memory, memory, micro_batches, reserve
from sfumato.planner.speed import Speed, Work, speed
from sfumato.planner.trace import Cost
from sfumato.planner.traffic import Traffic, traffic
from sfumato.planner.ways import Way, check_asked, ways

Factor = Literal["low", "usual", "high"]
HOST = 0.9
"""The share of a machine's memory that may be taken for what is moved there; assumed."""


@dataclass(frozen=True)
class Ask:
    """What is asked: a run, the ranks that it gets, and what each of them can hold.

    local: ranks of one machine. memory: bytes of a device. device: whose speed is expected. host: bytes of a
    machine's memory, for what is moved there; None: it is not asked whether that fits.
    """

    config: Config
    facts: Facts
    world: int
    local: int
    memory: float
    device: Device
    accelerator: str = "cuda"
    host: float | None = None

    @property
    def room(self) -> float:
        """What a run may take of a device."""
        return self.memory - reserve(self.memory)

    @property
    def sizes(self) -> list[Size]:
        """(height, width), by area."""
        return sizes_of(self.config)


@dataclass(frozen=True)
class Row:
    """One way, with the largest micro-batch that fits, or else the one that takes least."""

    way: Way
    config: Config
    """The run held so."""
    memory: Memory
    fits: bool
    lacks: float
    """Bytes that a device has too few; 0 where it fits."""
    short: float
    """Bytes that a machine's memory has too few for its ranks."""
    cost: Cost
    """Of a sample of the largest size."""
    traffic: Traffic
    images: dict[Factor, float]
    """Expected images a second over all ranks at the lowest, usual and highest share of the peak; empty where
    no peak is known."""
    speed: Speed | None

    @property
    def micro(self) -> int:
        """Samples of a micro-batch."""
        return self.config.micro_batch_size


def rows(ask: Ask, others: bool = False, better: bool = False) -> list[Row]:
    """Every way, fastest first and then the plainest; those that do not fit at the end, nearest first.

    others, better: as `ways` takes them. Raises UserError where the batch does not go into the ranks.
    """
    check_asked(ask.config, ask.world)
    found = [row_of(ask, way) for way in ways(ask.config, ask.world, ask.accelerator, others, better)]
    return sorted(
        found,
        key=lambda row: (not row.fits, row.lacks, row.short, -row.images.get("usual", 0), row.way.plainness),
    )


def row_of(ask: Ask, way: Way) -> Row:
    """One way, at the largest size."""
    cost = cost_of(ask.config, ask.facts, way, ask.sizes[-1])
    fixed = ask.config.engine.auto and "micro_batch_size" in ask.config.model_fields_set
    tried = [ask.config.micro_batch_size] if fixed else [*micro_batches(ask.config, ask.world)]
    held = [
        (way.of(ask.config, micro), memory(way.of(ask.config, micro), ask.world, cost)) for micro in tried
    ]
    fitting = [pair for pair in held if pair[1].device <= ask.room and not short(ask, pair[1])]
    config, taken = fitting[0] if fitting else min(held, key=lambda pair: pair[1].device)
    learns = sum(map(prod, cost.trained.values()))
    sent = traffic(config, ask.world, ask.local, learns, cost.sharded)
    speeds = speeds_on(ask.device, ask, config, cost, sent)
    return Row(
        way=way,
        config=config,
        memory=taken,
        fits=bool(fitting),
        lacks=max(0.0, taken.device - ask.room),
        short=short(ask, taken),
        cost=cost,
        traffic=sent,
        images={name: found.images for name, found in speeds.items()},
        speed=speeds.get("usual"),
    )


def short(ask: Ask, taken: Memory) -> float:
    """Bytes that a machine's memory has too few for what its ranks move there."""
    return 0.0 if ask.host is None else max(0.0, taken.host * ask.local - HOST * ask.host)


def speeds_on(device: Device, ask: Ask, config: Config, cost: Cost, sent: Traffic) -> dict[Factor, Speed]:
    """How fast a way is expected to be on a device; {} where no peak is known.

    Arithmetic is taken to grow with the pixels, and the sizes to be met equally often.
    """
    areas = [height * width for height, width in ask.sizes]
    part = sum(areas) / len(areas) / areas[-1]
    work = Work(cost.flops * part, cost.encode_flops * part, launches(config, cost))
    learns = sum(map(prod, cost.trained.values()))
    own = learns if config.engine.zero_stage == 0 else -(-learns // ask.world)
    away = config.engine.offload_optimizer != "none"
    shares: dict[Factor, float] = {"low": device.low, "usual": device.usual, "high": device.high}
    found = {
        name: speed(config, ask.world, ask.local, device, work, sent, own, share, away)
        for name, share in shares.items()
    }
    return {name: each for name, each in found.items() if each is not None}


def told(row: Row) -> dict[str, Any]:
    """For JSON."""
    way, cost = row.way, row.cost
    return {
        "zero_stage": way.stage,
        "offload": way.offload,
        "gradient_checkpointing": way.checkpointing,
        "precision": way.precision,
        "fits": row.fits,
        "micro_batch_size": row.micro,
        "lacks": round(row.lacks),
        "host_lacks": round(row.short),
        "memory": {**row.memory.parts(), "device": row.memory.device},
        "sent": {"link": row.traffic.link, "network": row.traffic.network, "host": row.traffic.host},
        "flops": cost.flops,
        "model_flops": cost.model_flops,
        "encode_flops": cost.encode_flops,
        "activations": {"sample": cost.activations, "fixed": cost.fixed, "peak": cost.step_peak(1)},
        "images_per_second": row.images,
        "seconds": None
        if row.speed is None
        else {
            name: getattr(row.speed, name)
            for name in ("compute", "encode", "exchange", "host", "optimizer", "step")
        },
    }
