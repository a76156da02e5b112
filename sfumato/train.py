"""The loop: the order of events, and no arithmetic."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from sfumato import methods, run, start
from sfumato.cache import fill
from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.loader import Loader
from sfumato.drawing.draw import draw
from sfumato.drawing.pictures import write
from sfumato.drawing.request import Sampling, shots
from sfumato.engine import checkpoint
from sfumato.engine.engine import DTYPES, Engine
from sfumato.engine.weights import starting
from sfumato.export import export, inside
from sfumato.methods import Method
from sfumato.objective import Objective
from sfumato.report.clock import Clock
from sfumato.report.progress import Progress
from sfumato.report.upload import after_run


def train(config: Config) -> Path:
    """One run, from its first line to its last; the same call goes on where a run was stopped.

    Returns the folder of the exported model. All ranks call it together.
    """
    place, plan = start.begin(config)
    saved = run.latest(config, plan.index.fingerprint)
    if place.first:
        run.write_records(config, place.world, str(place.device), plan.index)
    family = start.load_family(config, place)
    cached = fill(config, plan.index, plan.cells, family, place) if config.data.cache != "none" else None
    if config.engine.attention is not None:
        family.try_attention(config.engine.attention, DTYPES[config.engine.precision])
    method = methods.build(config, family)
    objective = Objective(config.objective, family.scheduler_config)
    draw = partial(method.draw, config.seed)
    weights = starting(method.weights(), draw, method.source_name, config.folder, place)
    engine = Engine(config, place, method.build, weights, method.settle)
    if saved is not None:
        checkpoint.load(engine, saved)
    latent = family.latent_channels, family.vae_factor
    loader = Loader(config, plan.index, plan.cells, *latent, cached, place.rank, place.world)
    facts = {
        "config": config.model_dump(mode="json"),
        "data": plan.index.fingerprint,
        "records": sum(part.count for part in plan.index.parts[: plan.index.prior]),
        "family": plan.facts.family,
    }

    lines, clock = config.folder / "metrics.jsonl", Clock()
    with (
        Progress(lines, config.steps, config.batch_size, start=engine.step_count, first=place.first) as told,
        closing(loader.steps_from(engine.step_count)) as steps,
    ):
        beside = inside(config, family, told.note) if config.checkpoint.export else None
        while engine.step_count < config.steps:
            with clock.waiting():
                batches = next(steps)
            while not optimizer_step(engine, method, objective, batches):
                engine.explain_skip(torch.cat([batch.ids for batch in batches]))
            if due(engine, config.log.every):
                told.step(
                    engine.step_count, engine.metrics() | {"data_seconds": clock.take(), "faults": loader.bad}
                )
            with told.aside():
                if due(engine, config.checkpoint.every):
                    kept = config.folder / "checkpoints", facts, config.checkpoint.keep
                    checkpoint.save(engine, *kept, beside)
                if config.preview.prompts and due(engine, config.preview.every):
                    preview(engine, method, objective)

    if place.first:
        export(config.folder)
    place.barrier()
    if place.first and config.export.push_to_hub is not None:
        after_run(config.folder / "export", config.export.push_to_hub, config.export.private, print)
    return config.folder / "export"


def optimizer_step(engine: Engine, method: Method, objective: Objective, batches: list[Batch]) -> bool:
    """Forward and backward over one global batch's micro-batches; True if the weights moved."""
    applied = False
    for batch in batches:
        batch = batch.to(engine.ranks.device)
        latents, condition = method.encode(batch)  # (B, c, h, w) fp32
        losses = objective.losses(partial(engine, condition=condition), latents, batch.draws)  # (B,)
        engine.backward(batch.weighed(losses))
        applied = engine.step()
    return applied


def due(engine: Engine, every: int) -> bool:
    """Whether something that happens every so many applied steps, and after the last one, happens now."""
    return engine.step_count % every == 0 or engine.step_count == engine.config.steps


def preview(engine: Engine, method: Method, objective: Objective) -> None:
    """Draw the preview's prompts with the weights of now, on all ranks together."""
    config, wanted = engine.config, engine.config.preview
    pictures = cycle(map(Path, wanted.conditions))
    asked = [replace(shot, condition=next(pictures, None)) for shot in shots(wanted.prompts, [wanted.seed])]
    with engine.drawing() as module:
        pipeline, family = method.pipeline(module, objective.process.sampler_settings())
        drawings = draw(
            pipeline,
            asked,
            Sampling(steps=wanted.steps, guidance=wanted.guidance, size=max(config.data.resolutions)),
            family=family,
            model=f"{config.name}, step {engine.step_count}",
            rank=engine.ranks.rank,
            world=engine.ranks.world,
        )
    if engine.ranks.first:
        write(drawings, config.folder / "images" / f"step-{engine.step_count:06d}")
