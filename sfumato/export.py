"""Checkpoint -> what its users load: a diffusers folder, or the files of an adapter."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sfumato import __version__, methods, models
from sfumato.config import Config, parse
from sfumato.engine import checkpoint
from sfumato.engine.engine import DTYPES
from sfumato.errors import UserError
from sfumato.models.family import Family
from sfumato.objective import Objective
from sfumato.report import card

CPU = torch.device("cpu")
FACTS = "sfumato.json"
"""The file by which an export is known."""


def export(
    run: Path,
    to: Path | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    anew: bool = False,
) -> Path:
    """Write a run's newest checkpoint, or the checkpoint that `run` names, as its users load it.

    That is a diffusers pipeline, or of an adapter its files for diffusers and others.

    to: the new folder; unset: the run's `export`. dtype: "fp32", "bf16" or "fp16"; unset: as the config says.
    weights: "ema" or "live"; unset: the average if the run keeps one. anew: from the checkpoint's numbers,
    even where it holds this export. Returns the folder, which appears in one rename. Any ZeRO stage and
    number of ranks gives the same files.
    """
    saved = checkpoint.Saved(newest(run))
    config = parse(saved.state["config"], str(saved.path))
    facts = facts_of(saved, config, which(weights, saved), dtype or config.export.dtype)
    home = saved.path.parent.parent
    to = to or home / "export"
    if to.exists() and not (to / FACTS).is_file():
        raise UserError(f"an export to {to}", "something else is there", "name another folder")
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ready = saved.path / "export"
    try:
        if not anew and told_by(ready) == facts:
            shutil.copytree(ready, part, copy_function=link, ignore=lambda *_: card.FILES)
        else:
            family = models.load(config.model, CPU, DTYPES[str(facts["dtype"])], torch.float32, False, False)
            write(saved, config, family, facts, part)
        card.write(part, config, saved.state, facts, home)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        do = f"make room if the disk is full, then: sfumato export {run}"
        raise UserError(f"an export to {to}", f"it could not be written: {error}", do) from error
    replace(part, to)
    return to


def ready(run: Path, to: Path | None = None, dtype: str | None = None, weights: str | None = None) -> Path:
    """The export as it lies there, with what its user may have written into its card, or a new one."""
    saved = checkpoint.Saved(newest(run))
    config = parse(saved.state["config"], str(saved.path))
    there = to or saved.path.parent.parent / "export"
    facts = facts_of(saved, config, which(weights, saved), dtype or config.export.dtype)
    if told_by(there) == facts and newer(there / FACTS, saved.path / "state.json"):
        return there
    return export(run, to, dtype, weights)


def newer(file: Path, other: Path) -> bool:
    """Whether a file was written after another one."""
    return file.stat().st_mtime_ns >= other.stat().st_mtime_ns


def inside(config: Config, family: Family, tell: Callable[[str], None]) -> Callable[[Path], None]:
    """What puts an export into each new checkpoint of a run, given the checkpoint's folder, on one rank.

    It is made on the CPU from the checkpoint's files; the model that learns, `family` and the random numbers
    stay as they are. A checkpoint is worth more than its export: one that cannot be written is left out, and
    `tell` hears of the first.
    """
    heard: list[str] = []

    def put(folder: Path) -> None:
        part = folder / ".export.part"
        try:
            saved = checkpoint.Saved(folder)
            facts = facts_of(saved, config, which(None, saved), config.export.dtype)
            write(saved, config, on_cpu(family, DTYPES[config.export.dtype]), facts, part)
            card.write(part, config, saved.state, facts)
            for path in (*part.rglob("*"), part):
                checkpoint.sync(path)
            part.rename(folder / "export")
        except Exception as error:
            shutil.rmtree(part, ignore_errors=True)
            if not heard:
                heard.append(str(error))
                step = folder.name.strip(".").removesuffix(".part")
                tell(f"the checkpoint {step} is whole, but holds no export: {type(error).__name__}: {error}")

    return put


def on_cpu(family: Family, dtype: torch.dtype) -> Family:
    """The same family with models of its own, which are read again when they are needed."""
    # Tokenizers are shared: they compute nothing on a device, and are slow to read.
    tokenizers = family.tokenizers
    other = copy.copy(family)
    other.release()
    other.tokenizers = tokenizers
    other.device, other.dtype, other.vae_dtype = CPU, dtype, torch.float32
    return other


def write(
    saved: checkpoint.Saved, config: Config, family: Family, facts: Mapping[str, Any], folder: Path
) -> None:
    """Write an export into a new folder. family: one on the CPU, which is changed on the way."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    process = Objective(config.objective, family.scheduler_config).process.sampler_settings()
    # Modules are born with random numbers, and a run may draw from the same generator.
    with torch.random.fork_rng(devices=[]):
        method = methods.build(config, family)
        weights = Weights(saved, facts["weights"])
        method.export(weights, folder, DTYPES[facts["dtype"]], process)
    assert not weights.unread, f"the export left out {sorted(weights.unread)[:3]}"
    for file in folder.rglob("*config.json"):
        forget_origin(file)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def forget_origin(file: Path) -> None:
    """Take the path that a part was read from on this machine out of its config."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(told, dict) and told.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def facts_of(saved: checkpoint.Saved, config: Config, weights: str, dtype: str) -> dict[str, Any]:
    """What an export says about itself."""
    method = config.method
    word = method.word if method.kind == "textual_inversion" else None
    return {
        "step": saved.step,
        "weights": weights,
        "dtype": dtype,
        "run": config.name,
        "base": config.model.weights,
        "kind": method.kind,
        "family": saved.state.get("family"),
        "window": config.model.prompt_window,
        "resolution": config.model_dump(mode="json")["data"]["resolution"],
        "trigger": word or config.data.prompt,
        **({"token": word} if word else {}),
        "sfumato": __version__,
    }


def told_by(folder: Path) -> dict[str, Any] | None:
    """What an export in a folder says about itself; None where there is none."""
    try:
        told: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told


def link(source: str, target: str) -> None:
    """The same file under a second name, or a copy where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace(part: Path, to: Path) -> None:
    """Give a finished folder its name; one that had it goes after that."""
    old = to.with_name(f".{to.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        to.rename(old)
    part.rename(to)
    shutil.rmtree(old, ignore_errors=True)


class Weights(Mapping[str, Tensor]):
    """A checkpoint's parameters, read when they are asked for."""

    def __init__(self, saved: checkpoint.Saved, kind: str) -> None:
        self.saved, self.kind = saved, kind
        self.unread = set(saved.parameters)

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return self.saved.whole(self.kind, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.saved.parameters)

    def __len__(self) -> int:
        return len(self.saved.parameters)


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
