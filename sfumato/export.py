"""Checkpoint -> what its users load: a diffusers folder, or the files of an adapter."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sfumato import __version__, methods, models
from sfumato.config import Config, parse
from sfumato.engine import checkpoint
from sfumato.engine.trained import Weights, pick
from sfumato.errors import UserError
from sfumato.methods import Method
from sfumato.models.family import Family
from sfumato.models.loading import DTYPES
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
    width: float | None = None,
) -> Path:
    """Write a run's newest checkpoint, or the checkpoint that `run` names, as its users load it.

    That is a diffusers pipeline, or of an adapter its files for diffusers and others.

    to: the new folder, or one with another export of this run; unset: the run's `export`. dtype: "fp32",
    "bf16" or "fp16"; unset: as the config says. weights: "live", "ema", or "ema_0.1" of a profile that the
    run keeps; unset: its first average if it keeps any. width: of a profile, in place of weights, made from
    averages that were kept. anew: from the numbers, even where the checkpoint holds this export. Returns the
    folder, which appears in one rename. Any ZeRO stage and number of ranks gives the same files.
    """
    saved = checkpoint.Saved(newest(run))
    config = parse(saved.state["config"], str(saved.path))
    trained, chosen = pick(saved, config, weights, width)
    facts = facts_of(saved, config, chosen, dtype or config.export.dtype)
    home, to = home_of(saved), place_of(saved, config, to)
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ready = saved.path / "export"
    try:
        if not anew and told_by(ready) == facts and not saved.export_problems():
            shutil.copytree(ready, part, copy_function=link, ignore=lambda *_: card.FILES)
        else:
            check_whole(saved)
            family = models.load(config.model, CPU, DTYPES[str(facts["dtype"])], torch.float32, False, False)
            method = framed(config, family, facts["dtype"], part)
            write(method, trained, facts, part)
        card.write(part, config, saved.state, facts, home)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        check_there(saved, run)
        do = f"make room if the disk is full, then: sfumato export {run}"
        raise UserError(f"an export to {to}", f"it could not be written: {error}", do) from error
    replace(part, to)
    return to


def ready(
    run: Path,
    to: Path | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    width: float | None = None,
) -> Path:
    """The export as it lies there, with what its user may have written into its card, or a new one."""
    saved = checkpoint.Saved(newest(run))
    config = parse(saved.state["config"], str(saved.path))
    there = place_of(saved, config, to)
    _, chosen = pick(saved, config, weights, width)
    facts = facts_of(saved, config, chosen, dtype or config.export.dtype)
    # Of the manifest the last lines are written after the export.
    if told_by(there) == facts and newer(there / FACTS, saved.path / min(saved.state["files"])):
        return there
    return export(run, to, dtype, weights, width=width)


def home_of(saved: checkpoint.Saved) -> Path:
    """The run's folder, however its checkpoint is spelled: of "." it is "../..", which is no parent of it."""
    path = saved.path.resolve() if saved.path.is_symlink() else saved.path
    return Path(os.path.normpath(path / ".." / ".."))


def place_of(saved: checkpoint.Saved, config: Config, asked: Path | None) -> Path:
    """Where an export goes. Raises UserError for a folder of something else, or of another run's export."""
    to = Path(os.path.normpath(asked or home_of(saved) / "export"))
    found = None
    if to.name in ("", ".."):
        found = "it is the folder that you are in, or one above it"
    elif os.path.lexists(to) and not (to / FACTS).is_file():
        found = "something else is there"
    elif checkpoint.checkpoint_of(to.parent) == to.parent:
        found = "it is a checkpoint's own"
    elif asked is not None and to.exists() and (run := (told_by(to) or {}).get("run")) != config.name:
        found = f"an export of another run, {run}, is there"
    if found is not None:
        raise UserError(f"an export to {to}", found, "name another folder")
    return to


def newer(file: Path, other: Path) -> bool:
    """Whether a file was written after another one."""
    return file.stat().st_mtime_ns >= other.stat().st_mtime_ns


def inside(config: Config, family: Family, tell: Callable[[str], None]) -> Callable[[Path], None]:
    """What puts an export into each new checkpoint of a run, given the checkpoint's folder.

    To be called on the first rank, in the main thread, before the training: parts that do not learn are read
    and written once, into the run's hidden folder .frozen, and get a second name in each export. What it
    returns may run in a thread beside the training. It works on the CPU from the checkpoint's files, and
    leaves the model that learns, `family`, random numbers and all settings of the process as they are.

    A checkpoint is worth more than its export: one that cannot be written is left out, and `tell` hears of
    the first.
    """
    heard: list[str] = []
    frozen, dtype = config.folder / ".frozen", config.export.dtype
    try:
        made: Method | Exception = framed(config, on_cpu(family, DTYPES[dtype]), dtype, frozen)
    except Exception as error:
        made = error

    def put(folder: Path) -> None:
        part = folder / ".export.part"
        try:
            if isinstance(made, Exception):
                raise made
            saved = checkpoint.Saved(folder)
            trained, chosen = pick(saved, config)
            facts = facts_of(saved, config, chosen, dtype)
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(frozen, part, copy_function=link)
            write(made, trained, facts, part)
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


def framed(config: Config, family: Family, dtype: str, folder: Path) -> Method:
    """The method that completes an export, after it wrote into a new folder what no training changes.

    family: one on the CPU, which is changed on the way.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Modules are born with random numbers, and a run may draw from the same generator.
    with torch.random.fork_rng(devices=[]):
        method = methods.build(config, family)
        method.frame(folder, DTYPES[dtype], process_of(method))
    family.release()
    for file in folder.rglob("*config.json"):
        forget_origin(file)
    return method


def write(method: Method, trained: Weights, facts: Mapping[str, Any], folder: Path) -> None:
    """Complete an export in a folder that has its frame."""
    method.export(trained, folder, DTYPES[facts["dtype"]], process_of(method))
    assert not trained.unread, f"the export left out {sorted(trained.unread)[:3]}"
    for file in folder.rglob("*config.json"):
        forget_origin(file)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        shutil.copymode(folder / FACTS, file)  # safetensors makes them readable by their owner alone


def process_of(method: Method) -> Mapping[str, Any]:
    """What training changed of the scheduler's config."""
    return Objective(method.config.objective, method.family.scheduler_config).process.sampler_settings()


def forget_origin(file: Path) -> None:
    """Take the path that a part was read from on this machine out of its config."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(told, dict) and told.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def facts_of(
    saved: checkpoint.Saved, config: Config, chosen: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """What an export says about itself. chosen: what it says of its weights."""
    method = config.method
    word = method.word if method.kind == "textual_inversion" else None
    return {
        "step": saved.step,
        **chosen,
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


def newest(run: Path) -> Path:
    """The checkpoint folder that a run folder or a checkpoint folder stands for."""
    found = checkpoint.checkpoint_of(run)
    if found is None:
        raise UserError(f"an export of {run}", "no checkpoint is there", "name a run's folder: runs/NAME")
    return found


def check_whole(saved: checkpoint.Saved) -> None:
    """Raise UserError if a checkpoint's files are not as they were written."""
    if wrong := saved.problems():
        check_there(saved, home_of(saved))
        do = "name another checkpoint, or start the run again, which sets this one aside"
        raise UserError(f"an export of {saved.path}", f"it is damaged: {'; '.join(wrong)}", do)


def check_there(saved: checkpoint.Saved, run: Path) -> None:
    """Raise UserError if a checkpoint was deleted while it was read."""
    if not saved.path.is_dir():
        found = "the run, which is being trained, has newer ones and deleted it"
        raise UserError(f"an export of {saved.path}", found, f"once more: sfumato export {run}")
