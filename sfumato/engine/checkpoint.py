"""What a run needs to go on: a checkpoint's place, its tensors, and their way back into the engine.

A checkpoint is a folder: one safetensors file per rank with the slices that its optimizer owns (fp32
weights, every optimizer state, the averages), named kind/parameter/start, and manifest.json. It knows nothing
of stages and ranks, so it loads on others. The order of samples and all randomness follow from the step and
the position.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.engine import profiles, shards
from sfumato.engine.content import learning, own_tensors
from sfumato.engine.engine import Engine
from sfumato.engine.published import FORMAT, MANIFEST, checkpoint_of, path_of, steps_in, sync
from sfumato.engine.saved import Saved
from sfumato.engine.size import STATES
from sfumato.engine.writer import Writer
from sfumato.errors import UserError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Saved",
    "Writer",
    "checkpoint_of",
    "learning",
    "load",
    "own_tensors",
    "path_of",
    "save",
    "steps_in",
    "sync",
]


def save(
    engine: Engine,
    folder: Path,
    facts: Mapping[str, Any],
    keep: int,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of the engine's step on all ranks together, and wait until it is published.

    See `Writer`, which does it behind the training. Raises UserError if it cannot be written.
    """
    with Writer(engine, facts, lambda text: None, beside, folder, keep) as writer:
        writer.save()
    return path_of(folder, engine.step_count)


@torch.no_grad()
def load(engine: Engine, saved: Saved) -> None:
    """Put a checkpoint's weights, optimizer states, step and position into the engine, on all ranks together.

    The engine may be new, or have trained. States of another optimizer, and averages that the run does not
    keep, are left; an optimizer that finds none of its own begins anew. Raises UserError for parameters other
    than the engine's.
    """
    wanted = learning(engine)
    if wanted != saved.parameters:
        names = wanted.keys() | saved.parameters.keys()
        differing = sorted(name for name in names if wanted.get(name) != saved.parameters.get(name))
        raise UserError(
            f"to go on from {saved.path}",
            f"{len(differing)} parameters differ from this model's, the first: {differing[0]}",
            "start a run of another name, or put back the model of this one",
        )
    optimizer, own = engine.deepspeed.basic_optimizer, STATES[engine.config.optimizer.name]
    known = saved.kinds.issuperset(own)
    averages = profiles.kinds(engine.config.ema)
    engine.began = saved.state.get("began", 0) if known else saved.step
    for shard in shards.owned(engine.deepspeed, writing=True):
        state = optimizer.state[shard.flat]
        for kind in averages:
            if kind not in saved.kinds:
                state.pop(kind, None)  # it starts from the weights
        for kind in saved.kinds.intersection((*averages, *own)):
            if kind not in state:
                state[kind] = torch.zeros_like(shard.flat)
            shard.view(state[kind]).copy_(saved.read(kind, shard.name, shard.start, shard.length))
        if own and state:
            if not known:
                state |= {kind: torch.zeros_like(shard.flat) for kind in own}
            # torch's Adam counts steps per tensor; all of ours took every one since they began.
            state["step"] = torch.tensor(
                float(saved.step - engine.began), device=shard.flat.device if fused(optimizer) else "cpu"
            )
    shards.fill(engine.deepspeed, lambda *where: saved.read("weight", *where))
    if engine.scale.dynamic:
        engine.scale.restore(saved.state["scaler"])
    engine.step_count, engine.position = saved.step, saved.position
    engine.left_out = list(saved.state["left_out"])


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is torch's fused one, whose step counter lives on the device."""
    return bool(optimizer.defaults.get("fused"))
