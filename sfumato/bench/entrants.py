"""Who takes part in `bench peers`: each side's command for the same work."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sfumato.bench.bare import HINT, LR, RANK, TARGETS
from sfumato.bench.fire import as_toml
from sfumato.bench.race import Entrant
from sfumato.errors import UserError

EXAMPLES = {
    ("full", "sd"): "text_to_image/train_text_to_image.py",
    ("full", "sdxl"): "text_to_image/train_text_to_image_sdxl.py",
    ("lora", "sd"): "text_to_image/train_text_to_image_lora.py",
    ("lora", "sdxl"): "text_to_image/train_text_to_image_lora_sdxl.py",
    ("controlnet", "sd"): "controlnet/train_controlnet.py",
    ("controlnet", "sdxl"): "controlnet/train_controlnet_sdxl.py",
}
"""In diffusers' folder `examples`, by task and family."""
NEVER = 10**9
"""Steps after which something would be saved."""


@dataclass(frozen=True)
class Work:
    """What every side does: train on square pictures of `size` pixels, `batch` of them a step."""

    task: str
    """Of config/method.py: full, lora or controlnet."""
    family: str
    size: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Scripts:
    """Others' files, where they were given: a side without one does not take part."""

    example: Path | None = None
    recipe: Path | None = None


def find(work: Work, examples: Path | None, recipe: Path | None) -> Scripts:
    """The scripts for the work. Raises UserError for a folder without them, and for a recipe that cannot run.

    examples: diffusers' folder `examples`. recipe: the folder of deepspeed-diffusers.
    """
    example = None if examples is None else examples / EXAMPLES[work.task, work.family]
    if example is not None and not example.is_file():
        raise UserError(
            f"--diffusers-examples {examples}",
            f"no file {example}",
            "name the folder `examples` of a checkout of diffusers",
        )
    if recipe is None:
        return Scripts(example)
    asked, script = f"--seed-recipe {recipe}", recipe / "train_text_to_image.py"
    if work.family != "sd" or work.task == "controlnet":
        raise UserError(asked, f"{work.task} of {work.family}", "it trains sd, --task full or lora, alone")
    if not script.is_file():
        raise UserError(asked, f"no file {script}", "name a checkout of deepspeed-diffusers")
    for name in ("omegaconf", "wandb"):
        if find_spec(name) is None:
            raise UserError(asked, f"no {name}, which it imports", f"pip install {name}")
    return Scripts(example, script)


def entrants(place: Path, work: Work, scripts: Scripts, compiled: bool = False) -> list[Entrant]:
    """All sides for the model and pictures of a folder; the bare loop is the first.

    compiled: with ours from the cache and engine.compile as well.
    """
    model, pictures = place / "model", place / "pictures"
    python, told = sys.executable, place / "bare" / "metrics.jsonl"
    numbers = [str(number) for number in (work.steps, work.batch, work.size)]
    bare = [python, "-m", "sfumato.bench.bare", str(model), str(pictures), *numbers, str(told), work.task]
    sides = [Entrant("bare loop", bare, told.parent, work.steps, told)]
    ours: list[tuple[str, str, list[str]]] = [("ours, cached", "both", []), ("ours, live", "none", [])]
    if compiled:
        ours.insert(1, ("ours, compiled", "both", ["engine.compile=true"]))
    for what, cache, more in ours:
        name = what.replace(", ", "-")
        config = write_config(place, name, work, cache)
        command = [python, "-m", "sfumato", "train", str(config), f"steps={work.steps}", *more]
        folder = place / "runs" / name
        sides.append(Entrant(what, command, folder, work.steps, folder / "metrics.jsonl"))
    if scripts.example is not None:
        sides.append(example_side(place, work, scripts.example))
    if scripts.recipe is not None:
        sides.append(recipe_side(place, work, scripts.recipe))
    return sides


def write_config(place: Path, name: str, work: Work, cache: str) -> Path:
    """A run of ours, with the settings of the others."""
    method: dict[str, Any] = {"kind": work.task}
    if work.task == "lora":
        method |= {"rank": RANK, "alpha": RANK, "targets": TARGETS, "init": "gaussian"}
    data = {"source": str(place / "pictures"), "resolution": work.size, "center_crop": True, "workers": 1}
    if work.task == "controlnet":
        data |= {"conditioning_column": HINT}
    settings = {
        "name": name,
        "output": str(place / "runs"),
        "batch_size": work.batch,
        "micro_batch_size": work.batch,
        "model": {"weights": str(place / "model")},
        "method": method,
        "data": data | {"cache": cache, "store": str(place / "runs" / name / "store")},
        "optimizer": {"lr": LR},
        "engine": {"precision": "fp32"},
        "checkpoint": {"every": NEVER, "export": False},
    }
    file = place / f"{name}.toml"
    file.write_text(as_toml(settings), encoding="utf-8")
    return file


def example_side(place: Path, work: Work, script: Path) -> Entrant:
    """diffusers' script with Accelerate, in one process."""
    out = place / "diffusers"
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": place / "model",
        "train_data_dir": place / "pictures",
        "caption_column": "text",
        "output_dir": out,
        "cache_dir": place / "datasets",
        "resolution": work.size,
        "train_batch_size": work.batch,
        "max_train_steps": work.steps,
        "learning_rate": LR,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "seed": 0,
        "dataloader_num_workers": 1,
        "checkpointing_steps": NEVER,
        "report_to": "all",
    }
    if work.task == "lora":
        options["rank"] = RANK
    if work.task == "controlnet":
        options["conditioning_image_column"] = HINT.removesuffix("_file_name")
    words = [f"--{key}={value}" for key, value in options.items()]
    words += [] if work.task == "controlnet" else ["--center_crop"]
    command = [sys.executable, str(script), *words]
    return Entrant("diffusers' example", command, out, work.steps, None)


def recipe_side(place: Path, work: Work, script: Path) -> Entrant:
    """deepspeed-diffusers' script as one rank: micro-batches of one, VAE and CLIP at every one of them."""
    from sfumato.bench.gates.exchange import free_port  # with DeepSpeed behind it

    out = place / "recipe"
    file = place / "recipe.json"
    file.write_text(json.dumps(recipe(place, work, out), indent=1) + "\n", encoding="utf-8")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env = alone | {"MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), f"--cfg={file}", "--local_rank=0"]
    return Entrant("seed's recipe", command, out, work.steps, None, env)


def recipe(place: Path, work: Work, out: Path) -> Mapping[str, Any]:
    """The settings of that script's own cfg/default.json, but for fp32 and what `Work` says.

    Its offload "auto" and its optimizer compiled on the spot are left out: neither works on every machine.
    """
    warm = {"warmup_min_lr": LR, "warmup_max_lr": LR, "warmup_num_steps": 1}
    return {
        "num_epochs": 1,
        "max_train_steps": work.steps,
        "validation_epochs": 0,
        "validation_prompts": None,
        "lr_warmup_steps": 1,
        "save_interval": NEVER,
        "seed": 0,
        "pretrained_model_name_or_path": str(place / "model"),
        "dataset_dir": str(place / "pictures"),
        "imagefolder": True,
        "checkpoint_dir": str(out / "checkpoints"),
        "output_dir": str(out / "pictures"),
        "use_lora": {"action": work.task == "lora", "rank": RANK, "alpha": RANK},
        "dataloader_num_workers": 1,
        "resume_from_checkpoint": False,
        "use_ema": False,
        "offline": True,
        "resolution": work.size,
        "center_crop": True,
        "random_flip": False,
        "use_fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": work.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": warm},
        "wall_clock_breakdown": False,
        "wandb": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "zero_optimization": {"stage": 1},
    }
