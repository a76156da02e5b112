"""What a run's weights, gradients, states and buffers take on each rank, to the byte. Imports no torch.

They are those of DeepSpeed 0.19.8, as tests measure them on real engines. Below, `size` are the bytes of a
weight, `sums` those of a gradient that is summed over micro-batches, `bucket` the numbers in a bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from sfumato.config import Config
from sfumato.engine.ds_config import autocast, ds_config
from sfumato.engine.profiles import kinds
from sfumato.engine.size import BYTES, STATES

FLATTENED = 500_000_000
"""Numbers of a gradient that DeepSpeed sums at once at stage 0."""
PERSISTENT, LIVE, GROUP = 100_000, 1_000_000_000, 1_000_000_000
"""DeepSpeed's bounds at stage 3: of a parameter that is never put away, of all that are gathered at once, and
of what is stepped at once."""


@dataclass(frozen=True)
class State:
    """Bytes on one rank, the one that holds most.

    On the device: `weights` that learn, in every copy that is kept; `gradients` and `buffers` (for
    communication, and at stage 3 for layers that are gathered) where backward is at its fullest;
    `optimizer` states, `ema` averages and `frozen` weights. Moved away by offload: `host` and `disk`.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    buffers: int
    host: int = 0
    disk: int = 0
    step: int = 0
    """What the optimizer's step takes beyond what is at rest; there are no activations then."""

    @property
    def device(self) -> int:
        """All that is on the device where backward is at its fullest, but for activations."""
        return self.rest + self.gradients + self.buffers

    @property
    def rest(self) -> int:
        """What stays on the device between steps, but for the buffers that stage 3 keeps."""
        return self.weights + self.optimizer + self.ema + self.frozen

    @property
    def stepping(self) -> int:
        """All that is on the device while the optimizer steps."""
        return self.rest + self.step


@dataclass(frozen=True)
class Layout:
    """How DeepSpeed lays the numbers out, in numbers."""

    all: int
    """What learns."""
    padded: int
    """The same in flat groups that every rank has an equal part of."""
    own: int
    """A rank's part of that."""
    touched: int
    """Numbers of the parameters of which a rank owns some part, whole."""
    largest: int
    """The largest parameter."""
    groups: int
    """Groups of one learning rate."""
    whole: int
    """At stage 3: small parameters, which stay whole on all ranks."""


def state(config: Config, world: int, trained: Mapping[str, Sequence[int]], frozen_bytes: int) -> State:
    """What a run on `world` ranks holds.

    trained: name -> shape of every parameter that learns, as the engine sees them. frozen_bytes: weights that
    a rank holds on the device beside them.
    """
    engine = config.engine
    settings = ds_config(config, world, sum(prod(shape) for shape in trained.values()))
    zero = settings["zero_optimization"]
    lay = layout(config, world, trained, zero.get("stage3_param_persistence_threshold", PERSISTENT))
    size = 4 if autocast(config) else BYTES[engine.precision]
    sums = 4 if settings["data_types"]["grad_accum_dtype"] == "fp32" else size
    offload = engine.offload_optimizer != "none"
    there = swapped(config, world, trained, settings) if engine.offload_optimizer == "nvme" else Swapped()
    stays = lay.own - there.numbers
    masters = 4 * stays if engine.zero_stage else 0
    # torch's Adam counts its steps in one number of each tensor that it moves.
    moved = (there.groups or lay.groups) if engine.zero_stage else len(trained)
    states = (4 * stays * len(STATES[config.optimizer.name])) + (
        4 * moved if config.optimizer.name == "adamw" else 0
    )
    averages = 4 * stays * len(kinds(config.ema))
    if engine.zero_stage == 3:
        weights, parts = size * lay.whole, size * lay.own
        held = third(config, world, lay, zero, size, sums)
    else:
        weights, parts = size * (lay.padded if engine.zero_stage else lay.all), 0
        held = (zeroth if not engine.zero_stage else first if engine.zero_stage == 1 else second)(
            config, world, lay, zero["reduce_bucket_size"], size, sums
        )
    gradients, buffers, step, host = held
    if engine.offload_parameters == "none":
        weights += parts
    else:
        host += parts
    if offload:
        host, masters, states, averages = host + masters + states + averages, 0, 0, 0
    host += there.room - 4 * there.numbers  # their gradients come in that room
    return State(
        weights + masters, gradients, states, averages, frozen_bytes, buffers, host, there.disk, step
    )


Held = tuple[int, int, int, int]
"""Bytes of gradients and of buffers at the fullest, of a step, and in the host's memory."""


def zeroth(config: Config, world: int, lay: Layout, bucket: int, size: int, sums: int) -> Held:
    """Stage 0: all gradients, and where there are several ranks a flat copy of them, which is summed."""
    return size * lay.all, size * min(lay.all, FLATTENED) if world > 1 else 0, size * lay.all, 0


def first(config: Config, world: int, lay: Layout, bucket: int, size: int, sums: int) -> Held:
    """Stage 1: all gradients until the step; a bucket, beside what the rank keeps of them."""
    if config.engine.offload_optimizer != "none":
        host = beside_step(lay, size)
        device = size * lay.largest
        if sums == size:
            return size * lay.all, size * bucket + device, device, host
        gradients = sums * (lay.all + lay.own)
        fullest = max(sums * (lay.all + bucket), gradients + (sums + size) * bucket)
        left = sums * (lay.own + (lay.all if world > 1 else 0))
        return gradients, fullest - gradients + device, left + device, host
    if sums != size:
        # Another of DeepSpeed's optimizers, which holds the sums of all gradients and never frees them.
        gradients = sums * lay.padded + size * lay.all
        return gradients, size * lay.padded, gradients, 0
    if world == 1:
        return size * (lay.all + lay.own), 0, flat(lay, size), 0
    joined = max(bucket, lay.own) if bucket < lay.all else bucket
    return size * lay.all, size * joined, flat(lay, size), 0


def second(config: Config, world: int, lay: Layout, bucket: int, size: int, sums: int) -> Held:
    """Stage 2: gradients leave as buckets fill up; the rank keeps those of its own part."""
    several, summed = bucket < lay.all, config.accumulation(world) > 1
    offload = config.engine.offload_optimizer != "none"
    host, device = (beside_step(lay, size), size * lay.largest) if offload else (0, 0)
    waiting = size * lay.largest if several else 0
    joined = max(bucket, lay.largest) if several else bucket
    if offload:
        # DeepSpeed's own way, by a bucket that is always there.
        if sums != size:
            gradients = sums * lay.own
            buffers = size * bucket + (size + sums) * joined + waiting
            return gradients, buffers + device, gradients + device, host
        copies = size * (bucket + (joined if world > 1 else 0))
        return 0, copies + waiting + device, device, host + (size * lay.touched if summed else 0)
    alone = world == 1
    gradients = size * joined + (sums * lay.own if several or summed or alone else 0)
    buffers = 0 if alone else (size + (sums if sums != size else 0)) * joined
    return gradients, buffers + waiting, flat(lay, size) if sums == size else 4 * lay.own, 0


def third(config: Config, world: int, lay: Layout, zero: Mapping[str, int], size: int, sums: int) -> Held:
    """Stage 3: the rank's part of the gradients and a bucket stay for ever; layers come and go."""
    bucket, several = zero["reduce_bucket_size"], zero["reduce_bucket_size"] < lay.all
    live = zero.get("stage3_max_live_parameters", LIVE) + zero["stage3_prefetch_bucket_size"]
    away = config.engine.offload_parameters != "none"
    gathered = size * min(lay.padded - lay.whole, live) if world > 1 or away else 0
    kept, summing = sums * lay.own, sums * bucket
    step = summing - size * lay.whole  # all of them are put away for it
    if several:
        buffers = summing + gathered + sums * max(bucket, lay.largest) + size * lay.largest
    else:
        buffers = summing + max(gathered, sums * lay.padded)
    if config.engine.offload_optimizer != "none":
        return 0, buffers, step, kept + 4 * lay.own
    return kept, buffers, step + kept + 4 * min(lay.own, zero.get("sub_group_size", GROUP)), 0


def beside_step(lay: Layout, size: int) -> int:
    """The host's memory at stages 1 and 2: fp32 gradients, weights on their way, the largest gradient."""
    return (4 + size) * lay.own + size * lay.largest


def flat(lay: Layout, size: int) -> int:
    """A step's gradients at stages 1 and 2: the rank's own, and in fp32."""
    return size * (lay.own if size < 4 else 0) + 4 * lay.own


def layout(config: Config, world: int, trained: Mapping[str, Sequence[int]], persistent: int) -> Layout:
    """The numbers of a run on `world` ranks; persistent: those of a parameter that stage 3 keeps whole."""
    groups = by_rate(config, trained)
    sizes = [size for group in groups.values() for size in group]
    total, largest = sum(sizes), max(sizes)
    if config.engine.zero_stage == 0:
        return Layout(total, total, total, total, largest, len(groups), 0)
    if config.engine.zero_stage == 3:
        own = sum(-(-size // world) for size in sizes)
        whole = sum(-(-size // world) * world for size in sizes if size <= persistent) if world > 1 else 0
        return Layout(total, own * world, own, total, largest, len(groups), whole)
    # Each group is filled up so that every rank's part begins at an even number.
    parts = {rate: -(-sum(group) // (2 * world)) * 2 for rate, group in groups.items()}
    touched = [0] * world
    for rate, group in groups.items():
        start = 0
        for size in group:
            for rank in range(start // parts[rate], (start + size - 1) // parts[rate] + 1):
                touched[rank] += size
            start += size
    own = sum(parts.values())
    return Layout(total, own * world, own, max(touched), largest, len(groups), 0)


def by_rate(config: Config, trained: Mapping[str, Sequence[int]]) -> dict[float, list[int]]:
    """The numbers of the parameters, by learning rate, which makes the optimizer's groups."""
    groups: dict[float, list[int]] = {}
    for name, shape in trained.items():
        groups.setdefault(config.peak_lr(name), []).append(prod(shape))
    return groups


@dataclass(frozen=True)
class Swapped:
    """What an optimizer on a disk takes on one rank."""

    numbers: int = 0
    """Of the weights that are stepped from the disk; groups below a megabyte stay in memory."""
    disk: int = 0
    """Bytes of their files, and of a copy of all that a checkpoint holds, which is written from there."""
    room: int = 0
    """Bytes of memory in which a group is stepped."""
    groups: int = 0
    """Groups that are stepped at once, one after the other."""


def swapped(
    config: Config, world: int, trained: Mapping[str, Sequence[int]], settings: Mapping[str, Any]
) -> Swapped:
    """What lies on the disk; settings: DeepSpeed's."""
    aio, zero = settings.get("aio", {}), settings["zero_optimization"]
    least = max(2**20, aio.get("block_size", 2**20)) // 4
    unit = 256 * aio.get("intra_op_parallelism", 1)
    parts = [[-(-size // world) for size in group] for group in by_rate(config, trained).values()]
    sizes = [size for group in parts for size in cut(group, zero["sub_group_size"])]
    away = [size for size in sizes if size >= least]
    kept = 1 + len(STATES[config.optimizer.name]) + len(kinds(config.ema))
    files = sum(4 * -(-size // unit) * unit for size in away)
    copies = sum(-(-4 * part // 64) * 64 for group in parts for part in group)
    room = zero["offload_optimizer"]["buffer_count"] * 4 * -(-max(sizes) // unit) * unit
    return Swapped(sum(away), kept * (files + copies), room, len(sizes))


def cut(sizes: Sequence[int], bound: int) -> list[int]:
    """How DeepSpeed cuts a group of parameters: a piece ends with the parameter that fills it."""
    pieces, filled = [], 0
    for number, size in enumerate(sizes):
        filled += size
        if filled >= bound or number == len(sizes) - 1:
            pieces.append(filled)
            filled = 0
    return pieces
