"""The gradient of the very engine settings of a config, against a plain autograd step.

Both train the same toy twin (or the real model) on the same global batch, of which each rank has other
samples. The engine takes one step of plain descent, whose rate is a power of two, so that what its fp32
weights moved by is its gradient: after accumulation, sums over ranks, loss scale and clipping. The plain
side sees the whole batch in the same portions on every rank, adds up in float64, and knows no DeepSpeed. No
collective is used to compare the two, because those may be what is broken.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import methods, start
from sfumato.config import Config
from sfumato.device import whole_fp32
from sfumato.doctor import twin
from sfumato.doctor.twin import RATE, Micro
from sfumato.engine import shards
from sfumato.engine.ds_config import autocast
from sfumato.engine.engine import Engine
from sfumato.engine.ranks import Ranks
from sfumato.engine.weights import WeightFiles, starting
from sfumato.models.loading import DTYPES
from sfumato.objective import Objective

FIRST_RATE = 2.0**-6  # of AdamW's first step, which moves each weight by about this much
TRIES = 24  # steps that fp16's loss scale may take to find its height
NOISE = 0.02  # what starts at zero, as LoRA's second matrices, hides the gradients of what lies before it

Masters = dict[tuple[str, int], Tensor]
"""This rank's slices of the fp32 weights, on the CPU: (name, first element) -> numbers."""


@dataclass(frozen=True)
class Plain:
    """What torch alone finds: the gradient of the mean over the global batch, flat float64, and the loss."""

    gradient: Mapping[str, Tensor]
    norm: float
    loss: float


class Bench:
    """A twin with all that both sides need."""

    def __init__(self, config: Config, place: Ranks, side: int, folder: Path) -> None:
        self.config, self.place = config, place
        self.family = start.load_family(config, place)
        self.method = methods.build(config, self.family)
        self.objective = Objective(config.objective, self.family.scheduler_config)
        # Each rank has a folder of its own, so each is the first one in its own.
        alone = replace(place, rank=0)
        called = self.method.source_name
        self.weights = starting(self.method.weights(), self.drawn, called, folder, alone)
        self.micros = twin.portions(config, self.method, side)

    def drawn(self) -> dict[str, Tensor]:
        """What no file holds, without zeros."""
        generator = torch.Generator().manual_seed(17)
        found = self.method.draw(self.config.seed)
        for name, numbers in found.items():
            if not bool(numbers.any()):
                found[name] = NOISE * torch.randn(numbers.shape, generator=generator)
        return found

    def losses(self, ask: Callable[..., Tensor], micro: Micro) -> Tensor:
        """The losses (B,) of a micro-batch."""
        torch.manual_seed(micro.seed)
        return self.objective.losses(partial(ask, condition=micro.condition), micro.latents, micro.draws)

    def plain(self, dtype: torch.dtype, cast: bool) -> Plain:
        """Torch alone, in an arithmetic; cast: fp32 weights under autocast."""
        method = methods.build(twin.plainly(self.config), self.family)
        net = method.build().to(self.place.device, dtype)
        fill(net, self.weights)
        if self.config.engine.zero_stage < 3:
            method.settle(net)
        learning = {name: p for name, p in net.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in learning.items()}
        total = 0.0
        for micro in self.micros:
            net.zero_grad()
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=cast):
                losses = self.losses(net, micro)
            losses.sum().backward()
            total += float(losses.detach().double().sum())
            for name, p in learning.items():
                if p.grad is not None:
                    sums[name] += p.grad.detach().flatten().cpu().double() / self.config.batch_size
        norm = math.sqrt(sum(float(g.square().sum()) for g in sums.values()))
        return Plain(sums, norm, total / self.config.batch_size)

    def engine(self, config: Config, kind: Callable[..., Engine]) -> Engine:
        """The engine as `train` makes it."""
        method = methods.build(config, self.family)
        return kind(config, self.place, method.build, self.weights, method.settle)

    def step(self, engine: Engine) -> None:
        """One applied step on this rank's share of the global batch."""
        for _ in range(TRIES):
            applied = False
            for number in range(engine.accumulation):
                micro = self.micros[number * self.place.world + self.place.rank]
                engine.backward(self.losses(engine, micro))
                applied = engine.step()
            if applied:
                return
        raise AssertionError(f"no step was applied in {TRIES} tries: the gradient is never finite")

    def compare(self, masters: Masters, wanted: Callable[[str, int, Tensor], Tensor]) -> dict[str, Any]:
        """This rank's part of the distance between what its weights moved by, and what they should.

        wanted: (name, first element, the weights before) -> that slice, float64.
        """
        gap = size = dot = own = 0.0
        worst = ("", 0.0)
        for (name, first), after in masters.items():
            before = self.weights(name, first, len(after)).double()
            moved, right = before - after.double(), wanted(name, first, before)
            part = float((moved - right).square().sum())
            gap, size = gap + part, size + float(right.square().sum())
            dot, own = dot + float((moved * right).sum()), own + float(moved.square().sum())
            if not part <= worst[1]:
                worst = (name, part)
        return {"gap": finite(gap), "size": size, "dot": finite(dot), "own": finite(own), "worst": worst[0]}


def finite(number: float) -> float:
    """The same, or a huge one in place of what JSON has not."""
    return number if math.isfinite(number) else 1e300


@torch.no_grad()
def fill(net: nn.Module, weights: WeightFiles) -> None:
    """Write a module's parameters from files."""
    for name, parameter in net.named_parameters():
        parameter.copy_(weights(name, 0, parameter.numel()).view(parameter.shape))


def masters_of(engine: Engine) -> Masters:
    """This rank's slices of the fp32 weights."""
    return {
        (shard.name, shard.start): shard.master.detach().clone().cpu()
        for shard in shards.owned(engine.deepspeed)
    }


def measure(
    config: Config, place: Ranks, toy: Path | None, kind: Callable[..., Engine] = Engine
) -> dict[str, Any]:
    """All ranks together: the figures of this rank, of which the first makes lines.

    toy: the folder of the toy model; None: the config's own model. kind: makes the engine; tests give broken
    ones.
    """
    with TemporaryDirectory(prefix="sfumato-") as scratch, whole_fp32():
        folder = Path(scratch)
        small = twin.shrunk(config, place.world, folder, toy)
        side = twin.SIDE if toy else max(config.data.resolutions)
        bench = Bench(small, place, side, folder)
        return {"batch": [small.micro_batch_size, small.batch_size], **sides(bench, config, kind)}


def sides(bench: Bench, config: Config, kind: Callable[..., Engine]) -> dict[str, Any]:
    """Both sides, and their distance."""
    small = bench.config
    precision = small.engine.precision
    exact = bench.plain(torch.float32, False)
    same = exact
    if precision == "bf16":
        same = bench.plain(torch.float32 if autocast(small) else DTYPES[precision], autocast(small))
    # A limit that cuts the toy's gradient to half: the user's own may be far from it.
    limit = same.norm / 2 if config.optimizer.max_grad_norm else 0.0
    small = small.model_copy(
        update={"optimizer": small.optimizer.model_copy(update={"max_grad_norm": limit})}
    )
    engine = bench.engine(small, kind)
    bench.step(engine)
    moved = masters_of(engine)
    # By the norm that the engine found, so that clipping does not hide a gradient of another length.
    share = limit / (float(engine.grad_norm) + 1e-6) if limit else 1.0  # as torch and DeepSpeed divide
    found: dict[str, Any] = {}

    def descent(of: Plain, name: str, first: int, before: Tensor) -> Tensor:
        return RATE * share * of.gradient[name][first : first + len(before)]

    found["same"] = bench.compare(moved, partial(descent, same))
    found["exact"] = bench.compare(moved, partial(descent, exact))
    found["rounding"] = apart(same, exact)
    found["norm"] = [float(engine.grad_norm), same.norm]
    found["loss"] = [engine.metrics()["loss"], same.loss]
    shards.fill(engine.deepspeed, bench.weights)
    bench.step(engine)
    again = masters_of(engine)
    found["again"] = all(torch.equal(again[key], moved[key]) for key in moved)
    end(engine)
    if config.optimizer.name == "adamw":
        found["adamw"] = first_step(bench, config, limit, moved, kind)
    return found


def apart(one: Plain, other: Plain) -> float:
    """The relative distance of two gradients."""
    gap = sum(float((one.gradient[name] - g).square().sum()) for name, g in other.gradient.items())
    return math.sqrt(gap) / other.norm if other.norm else 0.0


def first_step(
    bench: Bench, config: Config, limit: float, moved: Masters, kind: Callable[..., Engine]
) -> dict[str, Any]:
    """AdamW's first step beside its formula on the engine's own gradient, in float64."""
    own = {"lr": FIRST_RATE, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": limit}
    plain = {"text_encoder_lr": None, "scale_lr": False}
    engine = bench.engine(
        bench.config.model_copy(update={"optimizer": config.optimizer.model_copy(update=own | plain)}), kind
    )
    bench.step(engine)
    after = masters_of(engine)
    end(engine)
    settings = config.optimizer

    def wanted(name: str, first: int, before: Tensor) -> Tensor:
        gradient = (before - moved[name, first].double()) / RATE
        return FIRST_RATE * (gradient / (gradient.abs() + settings.eps) + settings.weight_decay * before)

    return bench.compare(after, wanted)


def end(engine: Engine) -> None:
    """Give its memory back."""
    engine.deepspeed.destroy()
    gc.collect()


def merged(parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' parts of a distance as one: the relative error, and how long one is beside the other."""
    gap, size = sum(p["gap"] for p in parts), sum(p["size"] for p in parts)
    dot, own = sum(p["dot"] for p in parts), sum(p["own"] for p in parts)
    factor = dot / size if size else 1.0
    angle = dot / math.sqrt(size * own) if size and own else 0.0
    return {
        "error": math.sqrt(gap / size) if size else (0.0 if not gap else 1e300),
        "factor": factor,
        "angle": angle,
        "worst": max(parts, key=lambda p: p["gap"])["worst"],
    }


def each(parts: list[Mapping[str, Any]]) -> Iterator[float]:
    """The relative error on each rank."""
    yield from (merged([part])["error"] for part in parts)
