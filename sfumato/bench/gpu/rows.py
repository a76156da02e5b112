"""The rows of `bench gpu`: what runs, with which settings, and for how long."""

from dataclasses import dataclass
from pathlib import Path

from sfumato import config as settings
from sfumato.config import Config

CACHED = ("data.cache=both", "data.views=1", "data.flip=false", "data.caption_dropout=0")
PLAIN = ("engine.precision=bf16", "engine.gradient_checkpointing=false", "ema.enabled=false")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    what: str
    """ "ours", "example" (diffusers' order of events), "encode" (the VAE) or "draw"."""
    preset: str
    words: tuple[str, ...]
    """Settings that differ from the preset's, as on the command line."""
    batches: tuple[int, ...]
    """Samples of a micro-batch: the first that fits the card."""
    goal: tuple[float, float] | None = None
    """Images a second, or iterations, that issue 8 wants of an H200: the least, and the aim."""
    seconds: float = 8.0
    """How long it is timed."""
    takes: float = 25.0
    """Seconds that it takes besides, to build the model; what is left of the budget must hold both."""


OURS = (*PLAIN, *CACHED, "engine.attention=fastest")
COMPILED = (*OURS, "engine.compile=true")
FULL = "sdxl-train-bf16"
LIVE = ("data.cache=none", "data.flip=false", "model.vae_dtype=fp32")
ROWS = (
    Row("SDXL full 1024, sustained", "ours", FULL, OURS, (8, 4, 2, 1), (15.3, 21.5), 60.0),
    Row("SDXL full 1024, batch 4", "ours", FULL, OURS, (4, 2, 1)),
    Row("  diffusers-like loop", "example", FULL, (*PLAIN, *CACHED), (4, 2, 1)),
    Row(
        *("  seeds' recipe: checkpointing", "example", FULL),
        (*PLAIN, *CACHED, "engine.gradient_checkpointing=true"),
        (4, 2, 1),
    ),
    Row("SDXL LoRA 1024, batch 7", "ours", "sdxl-lora", OURS, (7, 4, 2, 1), (18, 26)),
    Row("SDXL LoRA 1024, batch 1", "ours", "sdxl-lora", OURS, (1,), (8.3, 18)),
    Row("  diffusers-like loop, batch 7", "example", "sdxl-lora", (*PLAIN, *CACHED), (7, 4, 2, 1)),
    Row("  seeds' recipe: VAE in fp32, text live", "example", "sdxl-lora", (*PLAIN, *LIVE), (7, 4, 2, 1)),
    Row("SDXL ControlNet 1024", "ours", "sdxl-controlnet", OURS, (5, 2, 1), (15, 21)),
    Row("SD 1.5 full 512", "ours", "sd15-full", OURS, (64, 32, 8, 2), (129, 160)),
    Row("SDXL full 512", "ours", "sdxl-finetune", OURS, (24, 8, 2), (66, 95)),
    Row("SDXL, draw 1024, guidance", "draw", FULL, (*PLAIN, *CACHED), (1,), (20, 30)),
    Row("SDXL VAE, encode 1024", "encode", FULL, (*PLAIN, "data.cache=captions"), (8, 4, 1), (60, 80)),
    Row("SDXL full 1024, batch 4, compiled", "ours", FULL, COMPILED, (4, 2, 1), takes=80.0),
)


def config_of(row: Row, batch: int, toy: Path | None) -> Config:
    """A row's run on one device; toy: the folder of a family's toy model for each family, by name."""
    words = [*row.words, f"batch_size={batch}", f"micro_batch_size={batch}"]
    if toy is not None:
        words += [f"model.weights={toy / family_of(row)}", "data.resolution=64"]
        if family_of(row) == "sdxl":
            words += ["method.rank=4"] if row.preset == "sdxl-lora" else []
    config = settings.load(row.preset, words)
    if toy is not None:  # the fixed VAE of a preset is a published one
        config = config.model_copy(update={"model": config.model.model_copy(update={"vae": None})})
    return config


def family_of(row: Row) -> str:
    """The family of a row's model."""
    return "sd" if row.preset.startswith("sd15") else "sdxl"
