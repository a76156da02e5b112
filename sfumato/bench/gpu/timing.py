"""One row's measurement: the real engine, method and objective, or another's loop, with random weights."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from sfumato import train
from sfumato.bench.drawing import Watch
from sfumato.bench.example import Example
from sfumato.bench.gates.ours import start_of
from sfumato.bench.gpu.rows import Row
from sfumato.bench.work import Numbers, batch_of, drawn, filled, method_of
from sfumato.config import FASTEST, Config
from sfumato.data.batch import Batch
from sfumato.device import accelerator, peak_memory, pinned, synchronize
from sfumato.drawing.draw import draw
from sfumato.drawing.request import Sampling, shots
from sfumato.engine.ranks import Ranks
from sfumato.models.compiled import check_here
from sfumato.models.fastest import fastest
from sfumato.models.folder import Facts
from sfumato.models.loading import DTYPES
from sfumato.objective import Objective
from sfumato.planner.kernels import Kernels
from sfumato.planner.meter import Meter
from sfumato.planner.trace import Stage, trace
from sfumato.start import with_attention

WARM = 3
"""Steps that are not timed: libraries choose their kernels."""
LOG = 10
"""Steps between two waits for the device, as between two lines of a run's log."""
Size = tuple[int, int]


def measure(row: Row, config: Config, facts: Facts, ranks: Ranks, seconds: float) -> dict[str, Any]:
    """{"batch", "attention" (its kernels), "steps", "seconds", "per_second" (images, or iterations), "low",
    "high" (of stretches of LOG steps), "memory" (bytes at most on the device; null on a CPU), "flops" (of the
    model, for each)}."""
    size = (max(config.data.resolutions),) * 2
    if config.engine.attention == FASTEST:
        config = with_attention(config, fastest(config, facts, [size], ranks.device).kernels)
    if config.engine.compile:
        check_here("engine.compile = true", ranks.device.type, config.engine.precision)
    release()
    work = {"ours": ours, "example": example, "encode": encode, "draw": drawing}[row.what]
    try:
        found = work(config, facts, ranks, size, seconds)
        told = {"batch": config.micro_batch_size, "attention": config.engine.attention}
        return found | told | {"memory": peak_memory()}
    finally:
        release()


def release() -> None:
    """Let go of what a row has left, and of the most memory that was seen."""
    gc.collect()
    seam = accelerator()
    seam.empty_cache()
    seam.reset_peak_memory_stats()


def timed(
    step: Callable[[], Any], look: Callable[[], Any], samples: int, ranks: Ranks, seconds: float
) -> Any:
    """Take steps for at least so many seconds; look: what the log asks after every LOG of them."""
    for _ in range(WARM):
        step()
    look()
    synchronize(ranks.device)
    began = last = time.perf_counter()
    steps, rates = 0, []
    while last - began < seconds or not steps:
        done = 0
        while done < LOG and (not done or time.perf_counter() - began < seconds):
            step()
            done += 1
        look()
        synchronize(ranks.device)
        now = time.perf_counter()
        rates.append(samples * done / (now - last))
        steps, last = steps + done, now
    spent = last - began
    rates = rates or [0.0]
    found = {"steps": steps, "seconds": spent, "per_second": samples * steps / spent}
    return found | {"low": min(rates), "high": max(rates), "middle": median(rates)}


def ours(config: Config, facts: Facts, ranks: Ranks, size: Size, seconds: float) -> dict[str, Any]:
    """Our step: the loop's own function on a batch that lies ready on the host."""
    method = method_of(config, facts, ranks.device)
    engine, objective = start_of(config, ranks, method, Numbers(ranks.device))
    batch = on_host(batch_of(config, method.family, size, config.micro_batch_size, drawn(random())))

    def step() -> None:
        assert train.optimizer_step(engine, method, objective, [batch]), "a step moved nothing"

    told: list[float] = []
    found = timed(step, lambda: told.append(engine.metrics()["loss"]), len(batch.ids), ranks, seconds)
    assert all(loss == loss and abs(loss) < 1e6 for loss in told), f"losses {told}"
    engine.deepspeed.destroy()
    cost = trace(config, facts, size)
    return found | {"flops": cost.model_flops + cost.encode_flops, "loss": told[-1]}


def example(config: Config, facts: Facts, ranks: Ranks, size: Size, seconds: float) -> dict[str, Any]:
    """The order of events of diffusers' example, for the same work."""
    method = method_of(config, facts, ranks.device)
    loop = Example(config, facts, method, ranks.device)
    batch = on_host(batch_of(config, method.family, size, config.micro_batch_size, drawn(random())))
    told: list[float] = []
    found = timed(lambda: told.append(loop.step(batch)), list, len(batch.ids), ranks, seconds)
    assert all(loss == loss and abs(loss) < 1e6 for loss in told), f"losses {told}"
    cost = trace(config, facts, size)
    return found | {"flops": cost.model_flops + cost.encode_flops, "loss": told[-1]}


def encode(config: Config, facts: Facts, ranks: Ranks, size: Size, seconds: float) -> dict[str, Any]:
    """The VAE on pixels that lie on the host, as `sfumato cache` gives them."""
    method = method_of(config, facts, ranks.device)
    batch = on_host(batch_of(config, method.family, size, config.micro_batch_size, drawn(random())))
    pixels = batch.pixels
    assert pixels is not None, "a batch without pixels"

    def step() -> None:
        method.family.moments(pixels.to(ranks.device, non_blocking=True))

    found = timed(step, list, len(pixels), ranks, seconds)
    return found | {"flops": trace(config, facts, size).encode_flops}


def drawing(config: Config, facts: Facts, ranks: Ranks, size: Size, seconds: float) -> dict[str, Any]:
    """The family's pipeline with guidance; an iteration is one denoising step of one picture."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache": "none"})})
    method = method_of(config, facts, ranks.device)
    with torch.device("meta"):
        parts = method.build().requires_grad_(False).to(DTYPES[config.engine.precision])
    filled(parts, ranks.device)
    objective = Objective(config.objective, method.family.scheduler_config)
    pipeline, family = method.pipeline(parts, objective.process.sampler_settings())
    watch = Watch([parts[method.family.learns]], ranks.device)
    sampling = Sampling(steps=20, guidance=5.0, size=size[0])
    rates: list[float] = []
    began = time.perf_counter()
    with torch.no_grad():
        while len(rates) < 2 or time.perf_counter() - began < seconds:
            draw(
                *(pipeline, shots(["a cat"], [0]), sampling),
                family=family,
                model="random weights",
                step=watch.step,
            )
            rates.append(watch.take())
    watch.close()
    timed_rates = rates[1:]
    found = {"steps": 20 * len(timed_rates), "seconds": time.perf_counter() - began}
    found |= {"per_second": median(timed_rates), "low": min(timed_rates), "high": max(timed_rates)}
    return found | {"flops": forward_flops(config, facts, size, 2)}


def forward_flops(config: Config, facts: Facts, size: Size, samples: int) -> int:
    """Of the denoiser's forward pass."""
    stage, kernels = Stage(config, facts), Kernels()
    with torch.no_grad(), kernels:
        batch = stage.batch(size, samples, stage.text_of(samples))
        latents, condition = stage.method.encode(batch)
        with Meter() as meter:
            stage.parts(latents, batch.draws.timestep, condition)
    return meter.flops.of(1)


def random() -> torch.Generator:
    """Where a batch's numbers come from."""
    return torch.Generator().manual_seed(0)


def on_host(batch: Batch) -> Batch:
    """The batch in memory from which a device copies without waiting."""
    return batch.map(pinned)
