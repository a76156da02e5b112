"""What a rank's device holds in a step, and the largest micro-batch with which that fits."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.config import Config
from sfumato.engine.size import BYTES
from sfumato.planner.state import LIVE, State, state
from sfumato.planner.trace import Cost

LEAST, SHARE = 1e9, 0.06
"""The reserve: bytes, and a share of the device's memory, whichever is more."""


def reserve(memory: float) -> float:
    """Bytes that are left free for the context, cuDNN's workspaces and the holes of the allocator.

    Assumed: the planner has not been held against a device's own figures.
    """
    return max(LEAST, SHARE * memory)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of the rank that holds most, where backward is at its fullest."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    """Weights that do not learn, of what is trained and of what encodes."""
    buffers: int
    activations: int
    """What a micro-batch keeps for backward, and the most that lives beside it."""
    stepping: int
    """All of it while the optimizer steps, where there are no activations."""
    host: int
    disk: int

    @property
    def backward(self) -> int:
        """All of it in the backward pass."""
        told = self.weights, self.gradients, self.optimizer, self.ema
        return sum(told) + self.frozen + self.buffers + self.activations

    @property
    def device(self) -> int:
        """What the device must hold."""
        return max(self.backward, self.stepping)

    def parts(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def memory(config: Config, world: int, cost: Cost) -> Memory:
    """What a step of the config on `world` ranks holds; cost: that of its largest size."""
    frozen, gathered, host = beside(config, world, cost)
    held: State = state(config, world, cost.trained, frozen)
    return Memory(
        held.weights,
        held.gradients,
        held.optimizer,
        held.ema,
        held.frozen,
        held.buffers + gathered,
        cost.step_peak(config.micro_batch_size),
        held.stepping,
        held.host + host,
        held.disk,
    )


def beside(config: Config, world: int, cost: Cost) -> tuple[int, int, int]:
    """Bytes of frozen weights that a rank keeps, gathers at once, and leaves in the machine's memory.

    Stage 3 cuts up those of the engine's module, and gathers layers of them like others.
    """
    engine, outside = config.engine, sum(cost.frozen.values()) - cost.sharded
    if engine.zero_stage < 3 or not cost.sharded:
        return outside + cost.sharded, 0, 0
    own = -(-cost.sharded // world)
    away = engine.offload_parameters != "none"
    theirs = engine.deepspeed.get("zero_optimization", {})
    live = theirs.get("stage3_max_live_parameters", LIVE) * BYTES[engine.precision]
    gathered = min(cost.sharded, live) if world > 1 or away else 0
    return (outside, gathered, own) if away else (outside + own, gathered, 0)


def micro_batches(config: Config, world: int) -> Iterator[int]:
    """The micro-batches that divide a rank's share of the batch, from the largest."""
    share = config.model_copy(update={"micro_batch_size": 1}).accumulation(world)
    yield from (micro for micro in range(share, 0, -1) if share % micro == 0)


def largest(config: Config, world: int, cost: Cost, room: float) -> tuple[int, Memory] | None:
    """The largest micro-batch that takes at most `room` bytes, and what it takes; None if none does."""
    for micro in micro_batches(config, world):
        taken = memory(config.model_copy(update={"micro_batch_size": micro}), world, cost)
        if taken.device <= room:
            return micro, taken
    return None


def told(taken: Memory) -> dict[str, Any]:
    """For JSON."""
    return {**taken.parts(), "device": taken.device}
