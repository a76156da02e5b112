"""Every preset runs: two steps of it, with the tiny twin and a few real drawings put in by override."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sfumato import config, train
from sfumato.config import PRESETS
from tests.engine import runs
from tests.engine.layouts import LAYOUTS, records
from tests.engine.ranks import run_ranks

NAMES = sorted(file.stem for file in PRESETS.glob("*.toml") if "steps" in tomllib.loads(file.read_text()))
LAYOUT = {"sdxl-pretrain-bf16": "laion_sx", "sdxl-pretrain-fp16": "laion_sx", "sdxl-controlnet": "fill50k"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    for family in ("sd", "sdxl"):
        runs.write_model(family, folder / family)
    told = records(8)
    data = {name: write(folder / name, told)["source"] for name, write in LAYOUTS.items()}
    data["fill50k"] += "/train.jsonl"
    (folder / "data.json").write_text(json.dumps(data))
    return folder


def overrides(place: Path, name: str) -> list[str]:
    """What makes a preset small: sizes, model, data and where things go, and no fp16 on a CPU."""
    values = tomllib.loads((PRESETS / f"{name}.toml").read_text())
    model = place / ("sdxl" if name.startswith("sdxl") else "sd")
    said = {
        "output": place / "runs",
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "optimizer.warmup_steps": 0,
        "model.weights": model,
        "data.source": json.loads((place / "data.json").read_text())[LAYOUT.get(name, "parquet")],
        "data.resolution": 64,
        "data.workers": 0,
        "data.store": place / "cache",
    }
    if "vae" in values["model"]:
        said["model.vae"] = model
    if "buckets" in values["data"]:
        said |= {"data.buckets.min": 48, "data.buckets.max": 96, "data.buckets.step": 16}
    if "prior" in values["data"]:
        said |= {"data.prior.images": 2, "data.prior.steps": 2}
    if values.get("engine", {}).get("precision") == "fp16":
        said["engine.precision"] = "bf16"
    return [f"{key}={value}" for key, value in said.items()]


def train_presets(jobs: list[tuple[str, list[str]]]) -> list[Path]:
    """Train as `sfumato train PRESET key=value ...` does."""
    return [train.train(config.load(name, words)) for name, words in jobs]


def leaves(export: Path) -> tuple[list[float], list[str]]:
    """The losses that a run logged, and the names of its export's files."""
    return [line["loss"] for line in runs.metrics(export.parent)], [file.name for file in export.iterdir()]


EXPORTED = {
    "lora": "pytorch_lora_weights.safetensors",
    "controlnet": "config.json",
    "full": "model_index.json",
}


@pytest.mark.parametrize("half", [0, 1])
def test_every_preset_runs(place: Path, half: int) -> None:
    names = NAMES[half::2]
    for name, export in zip(
        names,
        run_ranks(train_presets, 1, [(n, overrides(place, n)) for n in names], timeout=280)[0],
        strict=True,
    ):
        losses, files = leaves(export)
        assert len(losses) == 2 and all(0 < loss < 100 for loss in losses), name
        assert EXPORTED[config.load(name, overrides(place, name)).method.kind] in files, name


def test_what_the_seeds_asked_for_stands_in_the_presets() -> None:
    """Batch size on a device, resolution, learning rate and precision of each row of the seeds' tables."""
    rows: dict[str, tuple[Any, ...]] = {
        "sdxl-train-bf16": (4, 32, 1024, 1e-5, "bf16", "full", "both"),
        "sdxl-train-fp16": (4, 32, 1024, 1e-5, "fp16", "full", "both"),
        "sdxl-pretrain-bf16": (4, 32, 1024, 1e-5, "bf16", "full", "none"),
        "sdxl-pretrain-fp16": (4, 32, 1024, 1e-5, "fp16", "full", "none"),
        "sdxl-lora": (7, 56, 1024, 1e-4, "fp16", "lora", "none"),
        "sdxl-controlnet": (5, 160, 1024, 1e-5, "fp16", "controlnet", "captions"),
        "sdxl-finetune": (24, 192, 512, 1e-6, "fp16", "full", "both"),
    }
    for name, row in rows.items():
        run = config.load(name)
        found = (run.micro_batch_size, run.batch_size, run.data.resolution, run.optimizer.lr)
        assert (*found, run.engine.precision, run.method.kind, run.data.cache) == row, name
        assert (run.steps, run.engine.zero_stage, run.optimizer.max_grad_norm) == (2000, 2, 1.0), name
    buckets = config.load("sdxl-pretrain-bf16").data.buckets
    assert buckets is not None and (buckets.min, buckets.max, buckets.step) == (512, 2048, 64)
