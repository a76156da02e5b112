"""What a checkpoint holds of the engine: slices of weights and states, and what its manifest says."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sfumato import __version__
from sfumato.engine import shards
from sfumato.engine.engine import Engine
from sfumato.engine.scale import REMEMBERED

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "pillow", "pydantic")


def slices(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """This rank's slices of weights and optimizer states, kind/parameter/start, as views of live memory.

    One that waits on a disk is there until the next is asked for.
    """
    if engine.config.engine.zero_stage == 0 and not engine.ranks.first:
        return  # at stage 0 every rank holds the same
    for shard in shards.owned(engine.deepspeed):
        yield f"weight/{shard.name}/{shard.start}", shard.master
        for kind, state in states(engine, shard):
            yield f"{kind}/{shard.name}/{shard.start}", shard.view(state)


def layout(engine: Engine) -> Iterator[tuple[str, int]]:
    """The names of `slices` and how many numbers each has; nothing is read from a disk."""
    if engine.config.engine.zero_stage == 0 and not engine.ranks.first:
        return
    for shard in shards.listed(engine.deepspeed):
        for kind in ("weight", *(kind for kind, _ in states(engine, shard))):
            yield f"{kind}/{shard.name}/{shard.start}", shard.length


def states(engine: Engine, shard: shards.Shard) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's states of a shard's whole tensor, by kind."""
    for kind, state in engine.deepspeed.basic_optimizer.state.get(shard.flat, {}).items():
        if torch.is_tensor(state) and state.numel() == shard.flat.numel() and kind != "step":
            yield kind, state


def own_tensors(engine: Engine) -> dict[str, Tensor]:
    """Copies of this rank's slices on the CPU, by kind/parameter/start."""
    return {key: part.detach().clone().cpu() for key, part in slices(engine)}


def learning(engine: Engine) -> dict[str, list[int]]:
    """The shapes of the parameters that learn, by name: what a checkpoint holds."""
    parameters = engine.deepspeed.module.named_parameters()
    return {name: list(shards.shape_of(p)) for name, p in parameters if p.requires_grad}


def versions() -> dict[str, str]:
    """What computes, by package."""
    return dict(installed())


@cache
def installed() -> tuple[tuple[str, str], ...]:
    """Each package and its version, read from the disk once: a save would wait for it."""
    return ("sfumato", __version__), *((name, importlib.metadata.version(name)) for name in PACKAGES)


def manifest_of(engine: Engine, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this moment says, but for its files."""
    scaler = engine.scale.scaler
    return {
        "data": None,
        "config": engine.config.model_dump(mode="json"),
        **facts,
        "step": engine.step_count,
        "began": engine.began,
        "position": engine.position,
        "samples": engine.position * engine.config.batch_size,
        "left_out": list(engine.left_out),
        "versions": versions(),
        "parameters": learning(engine),
        "scaler": {key: getattr(scaler, key) for key in REMEMBERED if hasattr(scaler, key)},
    }
