"""Checkpoint -> the diffusers folder that its users load."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from sfumato import methods, models
from sfumato.config import parse
from sfumato.engine import checkpoint
from sfumato.engine.engine import DTYPES
from sfumato.errors import UserError
from sfumato.objective import Objective


def export(run: Path, to: Path | None = None, dtype: str | None = None, weights: str | None = None) -> Path:
    """Write a run's newest checkpoint, or the checkpoint that `run` names, as its users load it.

    That is a diffusers pipeline, or of a LoRA its files for diffusers and others.

    to: the new folder; unset: the run's `export`. dtype: "fp32", "bf16" or "fp16"; unset: as the config says.
    weights: "ema" or "live"; unset: the average if the run keeps one. Returns the folder, which appears in
    one rename. Any ZeRO stage and number of ranks gives the same files.
    """
    saved = checkpoint.Saved(newest(run))
    config = parse(saved.state["config"], str(saved.path))
    kind = which(weights, saved)
    to = to or saved.path.parent.parent / "export"
    if to.exists() and not (to / "sfumato.json").is_file():
        raise UserError(f"an export to {to}", "something else is there", "name another folder")
    kept = DTYPES[dtype or config.export.dtype]
    family = models.load(config.model, torch.device("cpu"), kept, torch.float32, False, False)
    process = Objective(config.objective, family.scheduler_config).process.sampler_settings()
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    unread = set(saved.parameters)

    def read(name: str) -> Tensor:
        unread.discard(name)
        return saved.whole(kind, name)

    methods.build(config, family).export(read, part, kept, process)
    assert not unread, f"the export left out {sorted(unread)[:3]}"
    facts = {"step": saved.step, "weights": kind, "run": config.name, "base": config.model.weights}
    (part / "sfumato.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(to, ignore_errors=True)
    part.rename(to)
    return to


def newest(run: Path) -> Path:
    """The checkpoint folder that a run folder or a checkpoint folder stands for."""
    if (run / "state.json").is_file():
        return run
    steps = checkpoint.steps_in(run / "checkpoints")
    if not steps:
        raise UserError(f"an export of {run}", "no checkpoint is there", "name a run's folder: runs/NAME")
    return checkpoint.path_of(run / "checkpoints", steps[-1])


def which(weights: str | None, saved: checkpoint.Saved) -> str:
    """The kind of tensor in the checkpoint that is exported."""
    has_average = "ema" in saved.kinds
    if weights == "ema" and not has_average:
        raise UserError(f"the average of {saved.path}", "the run keeps none", "export the live weights")
    return "ema" if has_average and weights != "live" else "weight"
