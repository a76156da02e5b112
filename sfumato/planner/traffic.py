"""What a rank sends in an optimizer step, by ZeRO stage. Imports no torch.

Of n ranks, in sizes of what is exchanged: a sum on all ranks (all-reduce) sends 2 (n - 1) / n, a gather or a
sum in shards (all-gather, reduce-scatter) (n - 1) / n (arXiv:1910.02054, section 7).
"""

from dataclasses import dataclass

from sfumato.config import Config
from sfumato.engine.ds_config import BUCKET, MOST_PIECES
from sfumato.engine.size import BYTES
from sfumato.planner.ways import way_of


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an optimizer step.

    `link`: to ranks of its own machine, or of all where there is one machine only. `network`: its share of
    what its machine sends to others. `host`: to and from the memory of the machine, for what is kept there.
    """

    link: int
    network: int
    host: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.link + other.link, self.network + other.network, self.host + other.host)


def exchange(size: float, passes: float, world: int, local: int) -> Traffic:
    """A collective of `size` bytes among all ranks, `local` of them on each machine.

    passes: 2 for an all-reduce, 1 for an all-gather or a reduce-scatter. The rings of the devices share the
    way between machines, so each device sends one of `local` parts of it.
    """
    if world == 1:
        return Traffic(0, 0)
    nodes = max(1, world // local)
    within = passes * size * (world - 1) / world
    across = passes * size * (nodes - 1) / nodes / local
    return Traffic(round(within), round(across))


def traffic(config: Config, world: int, local: int, learns: int, beside: int) -> Traffic:
    """What a rank sends in a step of `world` ranks, `local` on each machine.

    learns: how many numbers learn. beside: bytes of frozen weights that the engine holds and stage 3 cuts up.

    Stages 1 and 2 sum gradients, once a step at stage 1 and for every micro-batch at stage 2, and gather the
    weights after the step. Stage 3 gathers all weights forward and backward, and sums gradients in shards,
    for every micro-batch; with zero_hpz_partition_size the backward pass gathers among so many ranks only
    (arXiv:2306.10209).
    """
    engine, times = config.engine, config.accumulation(world)
    stage = engine.zero_stage
    theirs = engine.deepspeed.get("zero_optimization", {})
    size = 4 if stage == 0 else BYTES[engine.precision]
    summed = 4 if stage > 1 and times > 1 else size
    if stage == 0:
        return exchange(learns * size, 2, world, local)
    if stage < 3:
        sums = exchange(learns * summed, 1 if to_owners(config, world, learns) else 2, world, local)
        sent = repeated(sums, times if stage == 2 else 1) + exchange(learns * size, 1, world, local)
    else:
        weights = learns * size + beside
        gather = exchange(weights, 1, world, local)
        sums = repeated(exchange(learns * summed, 1, world, local), times)
        few = theirs.get("zero_hpz_partition_size", 1)
        again = exchange(weights, 1, few, local) if few > 1 else gather
        sent = repeated(gather + again, times) + sums
    return sent + Traffic(0, 0, moved(config, world, learns, beside))


def to_owners(config: Config, world: int, learns: int) -> bool:
    """Whether stage 1 or 2 sums a gradient for the rank that owns it alone, and not on all ranks.

    `engine/gradients.py` does while a bucket has few owners; what it leaves to DeepSpeed goes to all unless
    use_multi_rank_bucket_allreduce is off.
    """
    engine = config.engine
    theirs = engine.deepspeed.get("zero_optimization", {})
    if not theirs.get("use_multi_rank_bucket_allreduce", True):
        return True
    low = engine.zero_stage == 1 and engine.precision != "fp32" and config.accumulation(world) > 1
    if low or engine.offload_optimizer != "none" or theirs.get("overlap_comm"):
        return False
    bucket, own = min(theirs.get("reduce_bucket_size", BUCKET), learns), -(-learns // world)
    return min(world, -(-bucket // own) + 1) <= MOST_PIECES


def moved(config: Config, world: int, learns: int, beside: int) -> int:
    """Bytes between a device and its machine's memory in a step, for what offload keeps there.

    For the step gradients go down, which DeepSpeed casts to fp32 on the device, and weights come back. Sums
    over micro-batches that lie in the machine's memory travel, too: those of stage 3, and in fp32 those of
    stage 2. Stage 3's weights that stay there come up twice a micro-batch instead.
    """
    engine, times = config.engine, config.accumulation(world)
    size, kept = BYTES[engine.precision], way_of(config).offload
    own = -(-learns // world)
    if kept == "none":
        return 0
    # The step from a disk takes the sums of stage 3 as they lie in memory.
    down = 0 if engine.offload_optimizer == "nvme" else 4
    if engine.zero_stage == 3:
        down += 2 * times * (4 if times > 1 else size)
    elif engine.zero_stage == 2 and engine.precision == "fp32" and times > 1:
        down += 4 * (2 * times - 1)
    if kept == "parameters":
        return own * down + 2 * times * (own * size + beside // world)
    return own * (down + size)


def repeated(one: Traffic, times: int) -> Traffic:
    """So many times the same."""
    return Traffic(one.link * times, one.network * times, one.host * times)
