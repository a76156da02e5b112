"""What a run needs to go on, written by all ranks and published by one rename.

A checkpoint is a folder: one safetensors file per rank with the slices that its optimizer owns (fp32 weights,
every optimizer state, the EMA), named kind/parameter/start, and state.json. It knows nothing of stages and
ranks, so it loads on others. The order of samples and all randomness follow from the step.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.engine import shards
from sfumato.engine.engine import Engine
from sfumato.errors import UserError

FORMAT = 2
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's dynamic fp16 loss scale remembers."""


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of an applied step."""
    return folder / f"step-{step:06d}"


def steps_in(folder: Path) -> list[int]:
    """Steps that have a published checkpoint, oldest first."""
    return sorted(int(entry.name[5:]) for entry in folder.glob("step-*") if entry.name[5:].isdigit())


def save(
    engine: Engine,
    folder: Path,
    facts: dict[str, Any],
    keep: int,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of the engine's step on all ranks together, then drop all but the newest `keep`.

    facts: JSON values to keep beside the tensors. beside: called on the first rank, while the others wait,
    with the folder of the checkpoint, to which it may add what can be made from it. A reader never sees a
    half-written checkpoint: the ranks write into a hidden folder, which gets its name when all are done.
    """
    ranks, final = engine.ranks, path_of(folder, engine.step_count)
    part = final.with_name(f".{final.name}.part")
    if ranks.first:
        for left in folder.glob(".step-*.part"):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.barrier()
    tensors = own_tensors(engine)
    file = part / f"rank-{ranks.rank:05d}.safetensors"
    save_file(tensors, file)
    sync(file)
    sizes: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(sizes, (file.name, file.stat().st_size))
    if ranks.first:
        scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
        state = facts | {
            "format": FORMAT,
            "step": engine.step_count,
            "files": dict(sizes),
            "parameters": learning(engine),
            "scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
        }
        (part / "state.json").write_text(json.dumps(state, indent=1))
        sync(part / "state.json")
        if beside is not None:
            beside(part)
        sync(part)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        sync(folder)
        for old in steps_in(folder)[:-keep]:
            shutil.rmtree(path_of(folder, old))
    ranks.barrier()
    return final


def own_tensors(engine: Engine) -> dict[str, Tensor]:
    """This rank's slices of weights and optimizer states, keyed kind/parameter/start; on the CPU."""
    tensors: dict[str, Tensor] = {}
    if engine.config.engine.zero_stage == 0 and not engine.ranks.first:
        return tensors  # at stage 0 every rank holds the same
    for shard in shards.owned(engine.deepspeed):
        tensors[f"weight/{shard.name}/{shard.start}"] = shard.master.cpu().contiguous()
        for kind, state in engine.deepspeed.basic_optimizer.state.get(shard.flat, {}).items():
            if torch.is_tensor(state) and state.numel() == shard.flat.numel() and kind != "step":
                tensors[f"{kind}/{shard.name}/{shard.start}"] = shard.view(state).cpu().contiguous()
    return tensors


def sync(path: Path) -> None:
    """Have the file system keep a file's or a folder's content through a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Saved:
    """A checkpoint on disk, read by (kind, parameter, start, length)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state = json.loads((path / "state.json").read_text())
            for name, size in self.state["files"].items():
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name} does not have its {size} bytes")
            files = [safe_open(path / name, "pt") for name in self.state["files"]]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {path}",
                f"it is damaged: {error}",
                "move it away; the one before it is taken then",
            ) from None
        if self.state["format"] != FORMAT:
            raise UserError(
                f"the checkpoint {path}",
                f"its format is {self.state['format']}, this version reads {FORMAT}",
                "go on with the version that wrote it, or start a run of another name",
            )
        self.step: int = self.state["step"]
        self.parameters: dict[str, list[int]] = self.state["parameters"]
        self.kinds: set[str] = set()
        self._parts: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in files:
            for key in file.keys():
                kind, name, start = key.split("/")
                self.kinds.add(kind)
                self._parts.setdefault((kind, name), []).append((int(start), file, key))

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter's weight or state, (length,)."""
        out = torch.empty(length)
        found = 0
        for first, file, key in self._parts.get((kind, name), []):
            part = file.get_slice(key)
            size = part.get_shape()[0]
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                out[low - start : high - start] = part[low - first : high - first]
                found += high - low
        if found != length:
            raise UserError(
                f"{kind} of {name} in {self.path}", f"{found} of {length} numbers", "use another checkpoint"
            )
        return out

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole weight or state in its own shape, fp32."""
        shape = self.parameters[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).view(shape)


def learning(engine: Engine) -> dict[str, list[int]]:
    """The shapes of the parameters that learn, by name: what a checkpoint holds."""
    parameters = engine.deepspeed.module.named_parameters()
    return {name: list(shards.shape_of(p)) for name, p in parameters if p.requires_grad}


@torch.no_grad()
def load(engine: Engine, saved: Saved) -> None:
    """Put a checkpoint's weights, optimizer states and step into the engine, on all ranks together."""
    wanted = learning(engine)
    if wanted != saved.parameters:
        names = wanted.keys() | saved.parameters.keys()
        differing = sorted(name for name in names if wanted.get(name) != saved.parameters.get(name))
        raise UserError(
            f"to go on from {saved.path}",
            f"{len(differing)} parameters differ from this model's, the first: {differing[0]}",
            "start a run of another name, or put back the model of this one",
        )
    states = saved.kinds - {"weight"}
    optimizer = engine.deepspeed.basic_optimizer
    for shard in shards.owned(engine.deepspeed):
        state = optimizer.state[shard.flat]
        for kind in states:
            if kind not in state:
                state[kind] = torch.zeros_like(shard.flat)
            shard.view(state[kind]).copy_(saved.read(kind, shard.name, shard.start, shard.length))
        if states - {"ema"}:
            # torch's Adam counts steps per tensor; all of ours took every applied one.
            state["step"] = torch.tensor(
                float(saved.step), device=shard.flat.device if fused(optimizer) else "cpu"
            )
    shards.fill(engine.deepspeed, lambda *where: saved.read("weight", *where))
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    for key, value in saved.state["scaler"].items():
        setattr(scaler, key, value)
    engine.step_count = saved.step


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is torch's fused one, whose step counter lives on the device."""
    return bool(optimizer.defaults.get("fused"))
