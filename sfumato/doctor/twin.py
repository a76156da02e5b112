"""A config's toy twin: the same family, method and engine settings on a model of milliseconds."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import models
from sfumato.config import Config, parse
from sfumato.config.training import Ema
from sfumato.data.batch import Batch, Draws
from sfumato.data.draws import torch_seed
from sfumato.engine import reader
from sfumato.methods import Method
from sfumato.models.folder import Facts, examine, read_json
from sfumato.models.hub import is_hub_id
from sfumato.models.registry import which_family
from sfumato.models.texts import Condition

RATE = 2.0**10
"""The learning rate of plain descent: what moves is the gradient times a power of two, which is exact, and
large beside the rounding of the weights."""
MICRO, STEPS = 2, 3
"""The most samples of a micro-batch, and micro-batches of a step: enough for every kind of sum."""
SIDE = 64  # pixels of the toy's pictures


@dataclass(frozen=True)
class Micro:
    """What a micro-batch's losses are a function of, besides the weights."""

    latents: Tensor
    condition: Condition
    draws: Draws
    seed: int


def default(world: int) -> Config:
    """What is tried where no config was named: Sfumato's defaults."""
    values: dict[str, Any] = {"steps": 10, "batch_size": 4 * world, "micro_batch_size": 2}
    return parse(
        {"name": "defaults", **values, "model": {"weights": "toy", "family": "sd"}, "data": {"source": "toy"}}
    )


def family_of(config: Config) -> tuple[str, str]:
    """The family's name, and how it is known where that is uncertain. Nothing is downloaded.

    Raises UserError for a folder that is none.
    """
    model = config.model
    if model.family is not None:
        return model.family, ""
    if not is_hub_id(model.weights) or Path(model.weights).expanduser().is_dir():
        return examine(model).family, ""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(model.weights, "model_index.json", revision=model.revision)
    if isinstance(index, str):
        return which_family(Path(index).parent, read_json(Path(index))["_class_name"], None)[0], ""
    guess = "sdxl" if "xl" in model.weights.lower() else "sd"
    return guess, f"taken for {guess} by its name, for the weights are not here"


def write(family: str, folder: Path) -> Path:
    """The family's toy model in a new folder. To be called before the ranks meet: afterwards transformers
    writes on the first one alone."""
    models.family_class(family).tiny(folder)
    return folder


def shrunk(config: Config, world: int, folder: Path, toy: Path | None) -> Config:
    """The config of one step of plain descent with the same engine settings, whose run is in the folder.

    toy: the toy model that is trained; None: the config's own. Dropout is left out: it is random.
    """
    micro = min(config.micro_batch_size, MICRO if toy else 1)
    steps = max(1, min(config.batch_size // (config.micro_batch_size * world), STEPS))
    model, method = config.model, config.method
    if toy is not None:
        own = {"weights": str(toy), "revision": None, "variant": None, "vae": None}
        model = model.model_copy(update=own)
        if method.kind == "controlnet":
            method = method.model_copy(update={"weights": None})
    if method.kind == "lora":
        method = method.model_copy(update={"dropout": 0.0})
    engine = config.engine
    if engine.offload_optimizer == "nvme" and not at_hand(config):
        engine = engine.model_copy(update={"offload_optimizer": "cpu"})
    plain = {"name": "sgd", "lr": RATE, "text_encoder_lr": None, "weight_decay": 0.0, "scale_lr": False}
    law = {"schedule": "constant", "warmup_steps": 0}
    return config.model_copy(
        update={
            "name": "twin",
            "output": folder,
            "steps": 10,
            "micro_batch_size": micro,
            "batch_size": micro * steps * world,
            "model": model,
            "method": method,
            "data": config.data.model_copy(update={"cache": "none"}),
            "engine": engine,
            "optimizer": config.optimizer.model_copy(update=plain | law),
            "ema": Ema(),
        }
    )


def at_hand(config: Config) -> bool:
    """Whether the optimizer can wait on the config's disk now: its reader would take minutes to compile, and
    whoever ends that by force leaves a lock which later starts wait for."""
    folder = config.engine.nvme_path
    return reader.is_there() and folder is not None and os.access(folder, os.W_OK | os.X_OK)


def plainly(config: Config) -> Config:
    """The same with torch's own attention, activations that are kept, and nothing compiled."""
    own = config.engine.model_copy(
        update={"attention": None, "gradient_checkpointing": False, "compile": False}
    )
    return config.model_copy(update={"engine": own})


def portions(config: Config, method: Method, side: int) -> list[Micro]:
    """The global batch in micro-batches: every rank makes the same ones, and trains on its own."""
    count = config.batch_size // config.micro_batch_size
    found = []
    for number in range(count):
        batch = batch_of(config, method, number, side)
        latents, condition = method.encode(batch.to(method.family.device))
        seed = torch_seed(config.seed, int(batch.ids[0]), 0)
        found.append(Micro(latents, condition, batch.draws.map(lambda t: t.to(method.family.device)), seed))
    return found


def batch_of(config: Config, method: Method, number: int, side: int) -> Batch:
    """A micro-batch of noise for pictures; no two samples are alike, and one is without its caption."""
    micro, family = config.micro_batch_size, method.family
    generator = torch.Generator().manual_seed(31 + number)
    latent = (micro, family.latent_channels, side // family.vae_factor, side // family.vae_factor)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    word = config.method.word if config.method.kind == "textual_inversion" else "a picture"
    return Batch(
        ids=torch.arange(micro) + number * micro,
        visits=torch.zeros(micro, dtype=torch.int64),
        captions=[f"{word} of the number {number * micro + row}" for row in range(micro)],
        dropped=torch.tensor([number + row == 1 and word == "a picture" for row in range(micro)]),
        size_and_crop=torch.tensor([[257.0 + number, 1155.0, 3.0, 101.0, float(side), float(side)]] * micro),
        pixels=normal(micro, 3, side, side).clamp(-1, 1),
        hint=normal(micro, 3, side, side).abs().clamp(0, 1) if method_reads_hint(config) else None,
        draws=Draws(
            posterior=normal(*latent),
            noise=normal(*latent),
            timestep=torch.rand(micro, generator=generator),
            offset=normal(micro, latent[1], 1, 1),
            perturbation=normal(*latent) if config.objective.input_perturbation else None,
        ),
    )


def method_reads_hint(config: Config) -> bool:
    return config.method.kind == "controlnet"


def facts_of(config: Config) -> Facts | None:
    """What the config's model folder says, if it lies on this machine."""
    if is_hub_id(config.model.weights) and not Path(config.model.weights).expanduser().is_dir():
        return None
    return examine(config.model)
