"""A run's folder: what was asked, what it became, on what it runs, and where it can go on."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato import __version__
from sfumato.config import Config
from sfumato.data.index import Index
from sfumato.engine import checkpoint
from sfumato.errors import UserError

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "pillow", "pydantic")
FREE = frozenset(
    {"name", "output", "steps", "micro_batch_size", "engine", "checkpoint", "preview", "log", "export"}
    | {"data.source", "data.workers", "data.worker_timeout", "data.store", "data.cache", "data.max_faults"}
    | {"data.prior.source"}
    | {"model.weights", "model.vae", "model.variant"}
)
"""Settings that may change between two starts of one run: they do not move its curve. That the data are the
same is seen from their fingerprint."""
BASE = {"model.weights", "model.variant", "method.weights"}
"""Settings that may change where the checkpoint holds the whole denoiser, but not where the rest is read
from them at every start."""

WHOLE = {"method", "objective.timesteps", "objective.weight"}


def write_records(config: Config, world: int, device: str, index: Index) -> None:
    """Write resolved.json, environment.json and the list of unusable records; called on one rank."""
    config.folder.mkdir(parents=True, exist_ok=True)
    told = config.folder / "faults" / "index.jsonl"
    told.unlink(missing_ok=True)
    if index.facts["faults"]:
        told.parent.mkdir(exist_ok=True)
        told.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in index.faults))
    environment = {
        "sfumato": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "ranks": world,
        "device": device,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(config.folder / "resolved.json", config.model_dump(mode="json"))
    write_json(config.folder / "environment.json", environment)


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(path)


def latest(config: Config, fingerprint: str) -> checkpoint.Saved | None:
    """The newest checkpoint of the run's folder, None before the first; UserError if it is another run's."""
    folder = config.folder / "checkpoints"
    steps = checkpoint.steps_in(folder)
    if not steps:
        return None
    saved = checkpoint.Saved(checkpoint.path_of(folder, steps[-1]))
    before, now = flat(saved.state["config"]), flat(config.model_dump(mode="json"))
    fixed = BASE if config.method.kind != "full" else set()
    names = sorted(name for name in before.keys() | now.keys() if not free(name) or name in fixed)
    changes = [f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]
    if saved.state["data"] != fingerprint:
        changes.append("the data are not those that it was trained on")
    if saved.step > config.steps:
        changes.append(f"it is at step {saved.step}, beyond steps = {config.steps}")
    if changes:
        raise UserError(
            f"to go on with the run in {config.folder} from step {saved.step}",
            "\n       ".join(changes),
            "put these back, or give the new run another name",
        )
    return saved


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; one that is of a kind, and has that kind's settings, stays whole."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in WHOLE:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def free(name: str) -> bool:
    """Whether a setting may change between two starts of one run."""
    return name in FREE or name.split(".")[0] in FREE
