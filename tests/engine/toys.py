"""A small real UNet and a fixed global batch, run through the engine on any number of ranks."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from sfumato.config import Config, parse
from sfumato.engine import checkpoint, ranks
from sfumato.engine.engine import Engine
from sfumato.engine.weights import WeightFiles
from sfumato.models.denoiser import prepare
from tests.engine.ranks import run_ranks

GLOBAL = 8  # samples per optimizer step


DEEP = "deep"
"""The name of runs that train the deep U-Net."""


def unet(deep: bool = False) -> UNet2DConditionModel:
    """Convolutions, skips and attention to a text, in few tensors: stage 3 costs time for each of them.

    deep: with a second size and attention in every kind of block, as real ones have.
    """
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32) if deep else (16,),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=down if deep else ("DownBlock2D",),
        up_block_types=up if deep else ("UpBlock2D",),
    )


def start_weights(deep: bool = False) -> dict[str, Tensor]:
    """The same fp32 numbers everywhere, with digits that bf16 cannot hold."""
    torch.manual_seed(0)
    return {name: p.detach().clone() for name, p in unet(deep).named_parameters()}


def start_file(deep: bool = False) -> WeightFiles:
    with tempfile.TemporaryDirectory() as folder:
        save_file(start_weights(deep), Path(folder) / "start.safetensors")
        return WeightFiles({"": [Path(folder) / "start.safetensors"]})  # it stays open


def global_batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (8, 4, 8, 8), timesteps (8,), text (8, 5, 16) and targets of a step, all different."""
    draw = torch.Generator().manual_seed(1000 + step)
    x, target = (torch.randn(GLOBAL, 4, 8, 8, generator=draw) for _ in range(2))
    # Far targets make a gradient longer than 1, which DeepSpeed's default would clip.
    return x, torch.arange(GLOBAL) * 100.0, torch.randn(GLOBAL, 5, 16, generator=draw), 2 * target


def losses_of(net: Any, rows: slice, step: int, dtype: torch.dtype) -> Tensor:
    place = next(iter(net.parameters())).device
    x, t, text, target = (part[rows].to(place) for part in global_batch(step))
    return (net(x.to(dtype), t, text.to(dtype)).sample.float() - target).square().mean((1, 2, 3))


def config(**changes: Any) -> Config:
    """A run of plain gradient descent; changes are dotted with double underscores: engine__zero_stage=2."""
    values: dict[str, Any] = {
        "steps": 100,
        "batch_size": GLOBAL,
        "model": {"weights": "toy"},
        "data": {"source": "toy"},
        "optimizer": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0},
        "engine": {"precision": "fp32"},
    }
    for key, value in changes.items():
        table, _, leaf = key.rpartition("__")
        (values.setdefault(table, {}) if table else values)[leaf] = value
    return parse(values)


def make(settings: Config) -> Engine:
    deep = settings.name == DEEP

    def build() -> UNet2DConditionModel:
        net = unet(deep)
        prepare(net, settings.engine.attention, settings.engine.gradient_checkpointing)
        return net

    return Engine(settings, ranks.start(60), build, start_file(deep))


def one_step(engine: Engine, step: int) -> bool:
    applied = False
    micro, place = engine.config.micro_batch_size, engine.ranks
    for m in range(engine.accumulation):
        first = (m * place.world + place.rank) * micro
        engine.backward(losses_of(engine, slice(first, first + micro), step, engine.dtype))
        applied = engine.step()
    return applied


def run(settings: Config, steps: int, save: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Train; return this rank's slices and what was reported at each step."""
    engine = make(settings)
    if resume is not None:
        checkpoint.load(engine, checkpoint.Saved(resume))
    told: dict[str, Any] = {"loss": [], "norm": [], "lr": []}
    while engine.step_count < steps:
        assert one_step(engine, engine.step_count)
        metrics = engine.metrics()
        told["loss"].append(metrics["loss"])
        told["norm"].append(metrics["grad_norm"])
        told["lr"].append(metrics["lr"])
    if save is not None:
        told["path"] = checkpoint.save(engine, save, {}, keep=2)
    return told | {"tensors": checkpoint.own_tensors(engine)}


def run_all(jobs: list[tuple[Config, int]]) -> list[dict[str, Any]]:
    """Several runs one after another in the same ranks, which saves their start."""
    return [run(settings, steps) for settings, steps in jobs]


def on_ranks(world: int, jobs: list[tuple[Config, int]], timeout: float = 200) -> list[list[dict[str, Any]]]:
    """`run_all` on so many ranks: for each job the results of all ranks."""
    return [list(results) for results in zip(*run_ranks(run_all, world, jobs, timeout=timeout), strict=True)]


def joined(results: list[dict[str, Any]], kind: str = "weight") -> dict[str, Tensor]:
    """Whole flattened tensors from all ranks' slices."""
    parts: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for key, part in result["tensors"].items():
            of, name, start = key.split("/")
            if of == kind:
                parts.setdefault(name, {})[int(start)] = part
    return {name: torch.cat([slices[start] for start in sorted(slices)]) for name, slices in parts.items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 distance of two sets of tensors, in float64."""
    assert a.keys() == b.keys() and a, "other parameters"
    gap = sum(float((a[n].double().flatten() - b[n].double().flatten()).square().sum()) for n in a)
    size = sum(float(b[n].double().square().sum()) for n in b)
    return (gap / size) ** 0.5


def check_same(found: list[dict[str, Any]], one: str, other: str, last: int) -> None:
    """Two runs of each rank, by name: the last losses and norms, Adam's numbers, and what each draws."""
    for rank in found:
        for what in ("loss", "norm"):
            assert rank[one][what][-last:] == pytest.approx(rank[other][what][-last:], rel=1e-5), what
        assert rank[one]["drawn"] == pytest.approx(rank[other]["drawn"], rel=1e-4)
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        tensors = [joined([rank[name] for rank in found], kind) for name in (one, other)]
        assert distance(*tensors) < 1e-5, kind
