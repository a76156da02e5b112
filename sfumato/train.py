"""The loop: the order of events, and no arithmetic."""

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from time import time

from torch import Tensor

from sfumato import methods, run, start
from sfumato.cache import fill
from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.draws import torch_seed
from sfumato.data.loader import Loader
from sfumato.device import seed
from sfumato.engine import agreement, checkpoint
from sfumato.engine.checkpoint import Writer
from sfumato.engine.engine import Engine
from sfumato.engine.weights import starting
from sfumato.errors import UserError
from sfumato.export import export, inside
from sfumato.methods import Method
from sfumato.mishaps import Mishaps
from sfumato.models.family import Family
from sfumato.objective import Objective
from sfumato.previews import Previews
from sfumato.report import tally
from sfumato.report.summary import accounted
from sfumato.report.telling import Telling
from sfumato.report.upload import after_run
from sfumato.stopping import Stopping
from sfumato.validation import Validation
from sfumato.validation.points import Points
from sfumato.watch import MARGIN, Watch


def train(config: Config) -> Path:
    """One run, from its first line to its last; the same call goes on where a run was stopped.

    Returns the folder of the exported model. All ranks call it together. Raises Stopped where the run was
    asked to end early; then it is saved.
    """
    began = time()
    with Stopping(config.time_limit, config.folder / "stop", print) as stopping, ExitStack() as held:
        place, plan = start.begin(config, planned=True)
        config = start.settled(config, plan)
        held.enter_context(run.alone(config.folder, place))
        frozen = run.frozen(config, plan.facts, place)
        saved = run.latest(config, plan.fingerprint, place, print, frozen)
        starts = held.enter_context(accounted(config, place, began, saved.step if saved else 0))
        config = start.with_kernels(config, plan, place, saved)
        if place.first:
            run.write_records(config, place.world, str(place.device), plan.index)
        family = start.load_family(config, place)
        cached = fill(config, plan.index, plan.cells, family, place) if config.data.cache != "none" else None
        method = methods.build(config, family)
        objective = Objective(config.objective, family.scheduler_config)
        points = Points.of(config, plan.held, plan.cells, method, cached, place)
        draw = partial(method.draw, config.seed)
        latent = family.latent_channels, family.vae_factor
        loader = Loader(config, plan.index, plan.cells, *latent, cached, place.rank, place.world)
        # Its workers begin before there are weights: a fork holds on to every page that changes later.
        position, ended = (saved.position, saved.step >= config.steps) if saved else (0, False)
        steps = iter(()) if ended else held.enter_context(closing(loader.steps_from(position)))
        weights = starting(method.weights(), draw, method.source_name, config.folder, place, method.origin())
        engine = Engine(config, place, method.build, weights, method.settle)
        weights.close()
        if saved is not None:
            checkpoint.load(engine, saved)
        facts = {
            "config": config.model_dump(mode="json"),
            "data": plan.fingerprint,
            "records": plan.records,
            "family": plan.facts.family,
            "frozen": frozen,
        }
        with (
            Telling(config, engine, starts, plan.cells.sizes, family.vae_factor) as told,
            Watch(place, config.engine.timeout) as watch,
            Writer(engine, facts, told.note, beside(config, family, told.note, place.first)) as writer,
            stopping.together(place, config.engine.timeout + MARGIN),
            loader.watched(),
        ):
            saves = {"checkpoint": config.checkpoint.every, "averages": config.ema.snapshots}
            mishaps = Mishaps(config, place, told.note, plan.index.name)
            looks = (
                Validation(engine, points, objective, watch, told.note, stopping.agreed),
                Previews(engine, method, objective, watch, told.note),
            )
            if config.bad_numbers.policy == "rollback" and saved is None:
                writer.save()  # else there were nothing to go back to
                writer.join()
            with told.aside():
                for look in looks:
                    look()
            while not stopping.agreed(engine.step_count) and engine.step_count < config.steps:
                watch.beat(engine.step_count, "waiting for data")
                with told.waiting():
                    batches = next(steps)
                watch.beat(engine.step_count, "training")
                if not applied(engine, method, objective, batches, mishaps, writer):
                    for record in (told, *looks):
                        record.back_to(engine.step_count)
                    continue
                told.trained(batches)
                saving = [what for what, every in saves.items() if due(engine, every)]
                if config.engine.compare_every and (saving or due(engine, config.engine.compare_every)):
                    agreement.check(engine)
                if due(engine, config.log.every):
                    told.step(mishaps.metrics(engine) | {"faults": loader.bad})
                with told.aside():
                    if saving:
                        watch.beat(engine.step_count, "copying what is to be saved")
                        writer.save(*saving)
                    for look in looks:
                        look()
            watch.beat(engine.step_count, "writing the last checkpoint")
            if not (writer.is_saved() or (saved is not None and saved.position == engine.position)):
                save(writer)
            watch.beat(engine.step_count, "waiting for the last checkpoint")
            writer.join()
        if stopping.reason:
            raise stopping.error(engine.step_count)
        if place.first:
            export(config.folder)
        place.barrier()
        if place.first and config.export.push_to_hub is not None:
            after_run(config.folder / "export", config.export.push_to_hub, config.export.private, print)
    return config.folder / "export"


def beside(
    config: Config, family: Family, tell: Callable[[str], None], first: bool
) -> Callable[[Path], None] | None:
    """What puts the export into each checkpoint, if the run wants it; on the first rank."""
    return inside(config, family, tell) if config.checkpoint.export and first else None


def save(writer: Writer) -> None:
    """Save out of turn, once all ranks are known to hold the same."""
    if writer.engine.config.engine.compare_every:
        agreement.check(writer.engine)
    writer.save()


def applied(
    engine: Engine,
    method: Method,
    objective: Objective,
    batches: list[Batch],
    mishaps: Mishaps,
    writer: Writer,
) -> bool:
    """Train on one global batch; False where it was left out. Saves before an error that ends the run."""
    while not optimizer_step(engine, method, objective, batches):
        try:
            verdict = mishaps.judge(engine, batches)
        except UserError:
            if not writer.is_saved():
                save(writer)
            raise
        if verdict == "back":
            with suppress(UserError):  # a write that failed was told; an older checkpoint does as well
                writer.join()
            known = writer.facts["data"], engine.ranks, writer.tell, writer.facts["frozen"]
            newest = run.latest(engine.config, *known)
            assert newest is not None, "no checkpoint was written to go back to"
            checkpoint.load(engine, newest)
            mishaps.went_back(engine)
        if verdict != "again":
            return False
    return True


def optimizer_step(engine: Engine, method: Method, objective: Objective, batches: list[Batch]) -> bool:
    """Forward and backward over one global batch's micro-batches; True if the weights moved."""
    moved = False
    for batch in batches:
        engine.backward(*losses_of(engine, method, objective, batch))
        moved = engine.step()
    return moved


def losses_of(engine: Engine, method: Method, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """The losses (B,) of a micro-batch, with a graph, and its tally: pure functions of weights and batch."""
    # For dropout inside the model; all other numbers were drawn by the loader.
    seed(engine.ranks.device, torch_seed(engine.config.seed, int(batch.ids[0]), int(batch.visits[0])))
    batch = batch.to(engine.ranks.device)
    latents, condition = method.encode(batch)  # (B, c, h, w) fp32
    losses = objective.losses(partial(engine, condition=condition), latents, batch.draws)
    losses = batch.weighed(losses)
    return losses, tally.sums(objective, losses, latents, batch.draws)


def due(engine: Engine, every: int | None) -> bool:
    """Whether something that happens every so many applied steps, and after the last one, happens now."""
    return every is not None and (engine.step_count % every == 0 or engine.step_count == engine.config.steps)
