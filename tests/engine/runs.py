"""Real runs of `train` on a toy model and a few real pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sfumato.config import parse
from sfumato.engine import checkpoint
from tests.unit import twins


def write_model(family: str, folder: Path) -> Path:
    """A family's toy twin, which may be spoilt."""
    return twins.write(family, folder)


def write_place(folder: Path, *families: str) -> Path:
    """What most runs begin with: toy models of the families, and `pictures`."""
    for family in families:
        write_model(family, folder / family)
    write_pictures(folder / "pictures")
    return folder


def write_pictures(folder: Path, count: int = 7) -> Path:
    """Pictures of odd sizes with captions, no two alike."""
    folder.mkdir()
    lines = []
    for number in range(count):
        draw = np.random.default_rng(number)
        low = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        low.resize((64 + 7 * number, 96 - 3 * number)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a picture of number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(place: Path, family: str = "sd", **changes: Any) -> dict[str, Any]:
    """A config as nested tables; changes are dotted with double underscores: engine__zero_stage=2."""
    values: dict[str, Any] = {
        "name": "run",
        "output": str(place / "runs"),
        "steps": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "model": {"weights": str(place / family)},
        "data": {"source": str(place / "pictures"), "resolution": 64, "flip": True, "workers": 0,
                 "caption_dropout": 0.3, "store": str(place / "cache")},
        "optimizer": {"lr": 1e-3},
        "engine": {"precision": "fp32"},
        "ema": {"enabled": True},
    }  # fmt: skip
    for key, value in changes.items():
        table, _, leaf = key.rpartition("__")
        (values.setdefault(table, {}) if table else values)[leaf] = value
    if values["engine"].get("zero_stage") == 3:
        # DeepSpeed looks for the next use of each weight, in time that is the square of the modules.
        values["engine"].setdefault("deepspeed", {"zero_optimization": {"stage3_max_reuse_distance": 0}})
    return values


def train_here(values: dict[str, Any]) -> Path:
    """What a rank does: the whole of `sfumato train`."""
    from sfumato.train import train

    return train(parse(values))


def train_all(jobs: list[dict[str, Any]]) -> list[Path]:
    """Several runs, one after another in the same ranks."""
    return [train_here(values) for values in jobs]


def without_exports() -> None:
    """Have runs of this process write no export: it is a fifth of a toy's run, and few tests look at it."""
    from sfumato import train as loop

    loop.beside = lambda *_: None
    loop.export = lambda folder, *_: folder / "export"


def train_bare(jobs: list[dict[str, Any]]) -> list[Path]:
    """`train_all` without exports; the paths are those where they would be."""
    without_exports()
    return train_all(jobs)


def tensors_of(run: Path, kind: str = "weight") -> dict[str, Tensor]:
    """Whole tensors of a run's newest checkpoint."""
    folder = run / "checkpoints"
    saved = checkpoint.Saved(checkpoint.path_of(folder, checkpoint.steps_in(folder)[-1]))
    return {name: saved.whole(kind, name) for name in saved.parameters}


def exported(run: Path, part: str = "unet") -> dict[str, Tensor]:
    return load_file(run / "export" / part / "diffusion_pytorch_model.safetensors")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
