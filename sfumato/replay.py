"""`sfumato replay`: a batch that was not applied, once more, with an eye on where its numbers go wrong."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sfumato import methods, start
from sfumato.config import Config, parse
from sfumato.data import batch as files
from sfumato.data.batch import Batch
from sfumato.data.draws import torch_seed
from sfumato.engine import published, ranks
from sfumato.engine.ds_config import autocast
from sfumato.engine.saved import Saved
from sfumato.engine.shards import Unfilled
from sfumato.engine.weights import starting
from sfumato.errors import UserError
from sfumato.methods import Method
from sfumato.mishaps import FACTS, FORMAT, file_of
from sfumato.models.latents import check_finite
from sfumato.models.loading import DTYPES
from sfumato.models.parts import Parts
from sfumato.objective import Objective

NAMED = 5  # parameters that are listed
KEPT = "it holds what `sfumato train` writes of a bad batch, such as runs/NAME/bad/step-000123"


@dataclass
class Seen:
    """What was found in one pass over the batch."""

    rows: list[str] = field(default_factory=list)
    """The table, a line for each sample."""
    culprit: str | None = None
    """The first module whose output is not finite."""
    parameters: list[str] = field(default_factory=list)
    """Those whose gradient is not finite, by name."""
    refused: list[str] = field(default_factory=list)
    """Micro-batches that the frozen parts could not encode, with the reason."""
    bad: bool = False


def replay(folder: Path, tell: Callable[[str], None] = print) -> bool:
    """Forward and backward over a batch that a run wrote down; False if a number is not finite again.

    folder: such as runs/NAME/bad/step-000123. The weights are those of the run's newest checkpoint at or
    before that step. Raises UserError if the folder is damaged or the model is gone.
    """
    facts = facts_of(folder)
    run = folder.resolve().parents[1]
    config = parse(facts["config"], str(folder / FACTS))
    config = config.model_copy(update={"output": run.parent, "name": run.name})
    world = 1 + max(sample["rank"] for sample in facts["samples"])
    parts_of = [batches_of(folder / file_of(rank)) for rank in range(world)]
    place = ranks.start(config.engine.timeout)
    saved, said = weights_of(run, facts["step"])
    if saved is not None and (damage := saved.problems()):
        raise UserError(
            f"the checkpoint {saved.path}", "; ".join(damage), "start the run, which sets it aside"
        )
    tell(f"step {facts['step']}, batch {facts['position']}, {said}")
    method = methods.build(config, start.load_family(config, place))
    objective = Objective(config.objective, method.family.scheduler_config)
    parts = filled(config, method, saved, place)
    wrong = [name for name, p in parts.named_parameters() if not finite(p)]
    if wrong:
        tell(f"weights that are not finite: {some(wrong)}")
    seen = Seen(bad=bool(wrong))
    then = {(sample["rank"], sample["micro"], row): sample for sample, row in numbered(facts["samples"])}
    factor = facts["scale"] * world / config.batch_size
    for rank, batches in enumerate(parts_of):
        for micro, batch in enumerate(batches):
            own = [then[rank, micro, row] for row in range(len(batch.captions))]
            one_pass(seen, config, method, objective, parts, batch.to(place.device), own, factor)
    report(seen, tell)
    return not seen.bad


def facts_of(folder: Path) -> dict[str, Any]:
    """What stands beside the tensors. Raises UserError if there is no such thing."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"sfumato replay {folder}", f"no {FACTS} to read: {error}", f"name a folder; {KEPT}"
        ) from None
    if facts.get("format") != FORMAT:
        raise UserError(
            f"sfumato replay {folder}",
            f"its format is {facts.get('format')}, this version reads {FORMAT}",
            "replay it with the version that wrote it",
        )
    return facts


def batches_of(file: Path) -> list[Batch]:
    """A rank's micro-batches."""
    try:
        return files.read(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the batch in {file}", f"it cannot be read: {error}", "replay another one") from None


def weights_of(run: Path, step: int) -> tuple[Saved | None, str]:
    """The newest checkpoint of a run at or before a step, None for the run's first weights, and its name."""
    folder = run / "checkpoints"
    steps = [at for at in published.steps_in(folder) if at <= step]
    if not steps:
        older = f", which are {step} steps older than the batch's" if step else ""
        return None, f"with the weights that the run starts from{older}"
    older = f", {step - steps[-1]} steps before" if steps[-1] < step else ", the batch's own"
    return Saved(
        published.path_of(folder, steps[-1])
    ), f"with the weights of the checkpoint {steps[-1]}{older}"


@torch.no_grad()
def filled(config: Config, method: Method, saved: Saved | None, place: ranks.Ranks) -> Parts:
    """The module that learns in the run's arithmetic: a checkpoint's weights, and the files' for the rest."""
    draw = partial(method.draw, config.seed)
    weights = starting(method.weights(), draw, method.source_name, config.folder, place, method.origin())
    with Unfilled():
        parts = method.build()
    weights.check(parts)
    parts.to(place.device, torch.float32 if autocast(config) else DTYPES[config.engine.precision])
    for name, parameter in parts.named_parameters():
        if saved is not None and name in saved.parameters:
            parameter.copy_(saved.whole("weight", name))
        else:
            parameter.copy_(weights(name, 0, parameter.numel()).view(parameter.shape))
    if config.engine.zero_stage < 3:
        method.settle(parts)
    return parts


def one_pass(
    seen: Seen,
    config: Config,
    method: Method,
    objective: Objective,
    parts: Parts,
    batch: Batch,
    then: list[dict[str, Any]],
    factor: float,
) -> None:
    """Take a micro-batch through the module and back, and note what is not finite.

    then: what the run knew of its samples. factor: of the losses' sum, as in the run.
    """

    def ask(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=autocast(config)), watched(parts, seen):
            answer: Tensor = parts(x_t, t, condition)
        return answer

    # As in the run: dropout drops what it dropped there.
    torch.manual_seed(torch_seed(config.seed, int(batch.ids[0]), int(batch.visits[0])))
    try:
        latents, condition = method.encode(batch)  # (B, c, h, w) fp32
        check_finite(latents, batch.ids, str(method.family.vae_dtype).removeprefix("torch."))
    except UserError as error:
        seen.bad = True
        seen.refused.append(f"{', '.join(s['name'] for s in then)}: {error.found}")
        return
    losses = batch.weighed(objective.losses(partial(ask, condition=condition), latents, batch.draws))  # (B,)
    (losses.sum() * factor).backward()
    square = torch.zeros((), device=losses.device)
    for name, parameter in parts.named_parameters():
        if parameter.grad is not None:
            square += parameter.grad.float().square().sum()
            if not finite(parameter.grad) and name not in seen.parameters:
                seen.parameters.append(name)
    norm = float(square.sqrt())
    parts.zero_grad()
    seen.bad |= not math.isfinite(norm) or not finite(losses)
    times = objective.law.draw(batch.draws.timestep).tolist()
    for sample, t, loss in zip(then, times, losses.tolist(), strict=True):
        seen.rows.append(
            f"{sample['rank']:4} {sample['micro']:5} {t:8} {float(sample['loss']):12.5g} {loss:12.5g} "
            f"{'yes' if math.isfinite(loss) else 'NO':>6} {norm:12.5g}  {sample['name']}"
        )


class watched:  # noqa: N801
    """Within it the first module whose output is not finite is noted."""

    def __init__(self, parts: Parts, seen: Seen) -> None:
        self.parts, self.seen = parts, seen
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.parts.named_modules():
            look = partial(self.look, name or "the whole")
            self.hooks.append(module.register_forward_hook(look, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def look(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has answered."""
        if self.seen.culprit is not None or all(map(finite, tensors_in(output))):
            return
        whence = "finite" if all(map(finite, tensors_in((args, kwargs)))) else "not finite either"
        self.seen.culprit = f"{name} ({type(module).__name__}), whose input is {whence}"


def report(seen: Seen, tell: Callable[[str], None]) -> None:
    """Tell what was found."""
    wide = ("loss then", "loss now")
    head = f"rank micro timestep {wide[0]:>12} {wide[1]:>12} finite {'gradient':>12}  record"
    for line in (head, *seen.rows) if seen.rows else ():
        tell(line)
    for refusal in seen.refused:
        tell(f"not encoded: {refusal}")
    if seen.culprit is not None:
        tell(f"the first output that is not finite: {seen.culprit}")
    elif seen.bad and not seen.refused:
        tell("what every module answers is finite")
    if seen.parameters:
        tell(f"gradients that are not finite, {len(seen.parameters)} in all: {some(seen.parameters)}")
    tell("not finite again" if seen.bad else "every number is finite")


def numbered(samples: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Each sample with its row in its micro-batch."""
    rows: dict[tuple[int, int], int] = {}
    for sample in samples:
        where = sample["rank"], sample["micro"]
        rows[where] = rows.get(where, -1) + 1
        yield sample, rows[where]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and tables."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors_in(vars(value))


def finite(value: Tensor) -> bool:
    """Whether every number is finite."""
    return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())


def some(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
