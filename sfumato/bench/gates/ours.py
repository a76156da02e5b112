"""Our training step, counted: the real engine, method and objective, through the loop's own function."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from sfumato import train
from sfumato.bench.example import Example
from sfumato.bench.gates.count import Counting
from sfumato.bench.gates.paper import PAPER, on_paper, replaced
from sfumato.bench.work import Numbers, batch_of, method_of, zeros
from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.packed import packed
from sfumato.engine.engine import Engine
from sfumato.engine.ranks import Ranks
from sfumato.methods import Method
from sfumato.models.family import Family
from sfumato.models.folder import Facts
from sfumato.models.loading import held_parts
from sfumato.models.unscaled import scale
from sfumato.objective import Objective
from sfumato.planner.trace import trace

STEP = 3
"""The step that is counted: the first makes the optimizer's states, and DeepSpeed's throughput timer, where
it is on, waits for the device from the third one on."""
CARDS = 8
"""The most ranks that a preset is thought of on: its words say 8 GPUs."""


@dataclass(frozen=True)
class Counts:
    """What one optimizer step of one micro-batch does on one rank."""

    flops: int
    operators: int
    calls: int
    """Of the dispatcher, with views and allocations: what the host is busy with."""
    waits: dict[str, int] = field(repr=False)
    """Where the host waits for the device -> how often."""
    copies: int
    """Between host and device."""
    kept: int
    """Bytes that autograd keeps for the backward pass."""
    collectives: dict[str, int]
    sent: dict[str, int]
    """Bytes of the whole tensors that they exchange, by the collective's name."""
    names: dict[str, int] = field(repr=False)
    """Calls of the dispatcher, by name."""


def as_counted(config: Config) -> Config:
    """A run of one micro-batch a step, on as many ranks as it has micro-batches, and at most CARDS.

    What is offloaded to a machine's memory, which is real here, stays on the device.
    """
    micro = config.micro_batch_size
    world = min(CARDS, config.batch_size // micro)
    engine = config.engine.model_copy(update={"offload_optimizer": "none", "offload_parameters": "none"})
    return config.model_copy(update={"engine": engine, "batch_size": micro * world})


def model_flops(config: Config, facts: Facts, size: tuple[int, int]) -> int:
    """What a micro-batch must compute: nothing of the forward pass twice."""
    cost = trace(config, facts, size)
    return config.micro_batch_size * (cost.model_flops + cost.encode_flops)


def count(config: Config, facts: Facts, size: tuple[int, int]) -> Counts:
    """A step of a run on paper; see STEP.

    config: as `as_counted` gives it. The loop's lines are counted, its log's are not.
    """
    counting, world = Counting(), config.batch_size // config.micro_batch_size
    with on_paper(world, counting.kernels, counting.wait) as ranks, counting, counting.kernels:
        method = method_of(config, facts, PAPER)
        engine, objective = start_of(config, ranks, method, Numbers(PAPER))
        made = batch_of(config, method.family, size, config.micro_batch_size, zeros)
        batch = packed(made).opened(copy=False)  # as a worker hands it over
        for _ in range(STEP):
            step(counting, engine, method, objective, batch)
    return counts_of(counting)


def start_of(config: Config, ranks: Ranks, method: Method, numbers: Numbers) -> tuple[Engine, Objective]:
    """A run's engine and objective, with weights of no file."""

    def build() -> nn.Module:
        with numbers.device:
            return method.build()

    engine = Engine(config, ranks, build, numbers, method.settle)  # type: ignore[arg-type]
    return engine, Objective(config.objective, method.family.scheduler_config)


def step(counting: Counting, engine: Engine, method: Method, objective: Objective, batch: Batch) -> None:
    """One optimizer step by the loop's function, counted from nothing."""
    counting.begin(held_by(engine, method.family))
    backward = engine.backward

    def backward_of(losses: Tensor, sums: Tensor | None = None) -> None:
        counting.now_kept()
        backward(losses, sums)

    with replaced(engine, "backward", backward_of), counting.saving():
        moved = train.optimizer_step(engine, method, objective, [batch])
    assert moved, "the counted step moved nothing"


def held_by(engine: Engine, family: Family) -> list[Tensor]:
    """The weights and buffers that are there before a step."""
    parts = [engine.deepspeed.module, *vars(family).get("text_encoders", {}).values()]
    parts += [vars(family)["vae"]] if "vae" in vars(family) else []
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def count_example(config: Config, facts: Facts, size: tuple[int, int]) -> Counts:
    """The same step of diffusers' example for the same work, in one process; fp16 is counted as bf16."""
    engine = config.engine.model_copy(update={"precision": "bf16"})
    config = config.model_copy(update={"engine": engine})
    counting = Counting()
    with on_paper(1, counting.kernels, counting.wait), counting, counting.kernels:
        method = method_of(config, facts, PAPER)
        example = Example(config, facts, method, PAPER)
        if held_parts(config)[0]:
            scale(method.family.vae)  # nobody else's here
        batch = batch_of(config, method.family, size, config.micro_batch_size, zeros)
        for _ in range(STEP):
            counting.begin()
            example.step(batch)
    return counts_of(counting)


def counts_of(counting: Counting) -> Counts:
    """What was counted."""
    return Counts(
        flops=counting.flops.of(1),
        operators=counting.operators,
        calls=sum(counting.names.values()),
        waits=dict(counting.waits),
        copies=counting.copies,
        kept=counting.kept,
        collectives=dict(counting.collectives),
        sent=dict(counting.sent),
        names=dict(counting.names),
    )
