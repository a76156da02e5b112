"""What a checkpoint takes on disk. Imports no torch."""

import json
import struct
from collections.abc import Mapping, Sequence
from math import lcm, prod
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.engine.profiles import kinds
from sfumato.errors import UserError
from sfumato.models.folder import Facts, weight_files

STATES: Mapping[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}
"""The fp32 numbers that an optimizer keeps for each weight, in a checkpoint too."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number."""


def checkpoint_bytes(config: Config, facts: Facts | None, parameters: int) -> int:
    """The size of one checkpoint: fp32 weights, optimizer states, the average, and its export.

    parameters: what learns; 0 where that is known later, and the size is not asked for.
    """
    kept = parameters * 4 * (1 + len(STATES[config.optimizer.name]) + len(kinds(config.ema)))
    return kept + (export_numbers(config, facts, parameters) * BYTES[config.export.dtype] if kept else 0)


def kept_at_once(config: Config) -> int:
    """The most checkpoints of a run that lie on disk at once: those that stay, and one that is written."""
    every, of = config.checkpoint.every, config.checkpoint.keep_every
    saved = -(-config.steps // every)
    staying = config.steps // lcm(every, of) if of else 0
    return min(saved, staying + config.checkpoint.keep + 1)


def snapshots(config: Config) -> int:
    """How many copies of the averages alone a run leaves."""
    return -(-config.steps // config.ema.snapshots) if config.ema.snapshots else 0


def snapshot_bytes(config: Config, parameters: int) -> int:
    """The size of one of them."""
    return parameters * 4 * len(kinds(config.ema))


def export_numbers(config: Config, facts: Facts | None, parameters: int) -> int:
    """The numbers in a checkpoint's export: of a pipeline its frozen parts, too; a LoRA is written twice."""
    if not config.checkpoint.export:
        return 0
    if config.method.kind != "full" or facts is None:
        return parameters * (2 if config.method.kind == "lora" else 1)
    texts = [part for part in facts.needs if part.startswith("text_encoder")]
    files = [weight_files(facts.folder, part, config.model.variant) for part in texts]
    vae = sorted(facts.vae_folder.glob("*.safetensors"))[:1]
    return parameters + count([*vae, *(file for part in files for file in part)])


def count(files: Sequence[Path]) -> int:
    """The numbers in safetensors files, read from their headers only. Raises UserError for other files."""
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header: Any = json.loads(file.read(length)) if length < path.stat().st_size else None
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, struct.error, AttributeError, TypeError, KeyError):
            do = "download or export it again"
            raise UserError(f"the weights {path}", "no safetensors file, or a broken one", do) from None
    return total


def readable(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
