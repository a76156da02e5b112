"""The loss of records that no step trains on, at fixed noise levels and with fixed noise.

    points = Points.of(config, plan.held, plan.cells, method, cached, place)    # before the engine is made
    validation = Validation(engine, points, objective, watch, told.note, stop)
    validation()                                                                # is it due at this step?

A number depends on the weights, the records and the micro-batch size alone: not on the run's seed, the step,
the day or the number of ranks. All ranks compute equally many forward passes, as ZeRO stage 3 needs it.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from sfumato.data.held import Point
from sfumato.engine import profiles
from sfumato.engine.engine import Engine
from sfumato.objective import Objective
from sfumato.report.progress import cut_after, finite
from sfumato.validation.points import TOLD, WITHOUT_IMAGE, WITHOUT_TEXT, Points
from sfumato.watch import Watch

FILE = "validation.jsonl"
LIVE = "live"
"""What the weights themselves are called beside their averages."""


class Validation:
    """Tells validation.jsonl, on the first rank, what was measured at the steps where it is due."""

    def __init__(
        self,
        engine: Engine,
        points: Points | None,
        objective: Objective,
        watch: Watch,
        tell: Callable[[str], None],
        stop: Callable[[int], bool],
    ) -> None:
        """points: None where no validation is asked for. stop: whether the run is to end, on all ranks.

        Lines of steps after the engine's, left by a run that was killed, are cut off.
        """
        self.engine, self.points, self.process = engine, points, objective.process
        self.watch, self.tell, self.stop = watch, tell, stop
        self.path = engine.config.folder / FILE
        self.last = -1
        """The newest step that is told."""
        if points is not None:
            done = engine.ranks.first and whole(self.path, engine.step_count, self.kinds())
            self.last = engine.step_count if engine.ranks.gathered(done)[0] else -1

    def __call__(self) -> None:
        """Validate if it is due at the engine's step and not done; given up where the run is to end."""
        config, step = self.engine.config, self.engine.step_count
        if self.points is None or config.validation is None or self.last == step:
            return
        if step % config.validation.every and step != config.steps:
            return
        lines = []
        for kind in self.kinds():
            begun = perf_counter()
            average = contextlib.nullcontext() if kind == LIVE else self.engine.averaged(kind)
            with average:
                found = self.measured(self.points)
            if found is None:
                return
            said = summary(found, self.points.steps(self.process.timesteps))
            seconds = perf_counter() - begun
            told = {"samples": len(self.points.held.numbers), "seconds": seconds}
            lines.append({"step": step, "weights": kind} | said | told)
        self.last = step
        if self.engine.ranks.first:
            self.write(lines)

    def back_to(self, step: int) -> None:
        """Forget the steps after `step`, which were undone."""
        if self.points is None or self.last <= step:
            return
        self.last = -1
        if self.engine.ranks.first:
            with contextlib.suppress(OSError):  # it is tried again before the next lines are written
                cut_after(self.path, step)

    def kinds(self) -> list[str]:
        """The weights that there are at the engine's step."""
        return [LIVE, *(profiles.kinds(self.engine.config.ema) if self.engine.step_count else ())]

    def measured(self, points: Points) -> dict[str, np.ndarray] | None:
        """The losses (records, levels) float64 under each condition; None where the run is to end."""
        mine: list[tuple[str, Point, float]] = []
        with self.engine.drawing() as module, evaluating(module):
            for turn, (group, counts) in enumerate(points.mine):
                doing = f"validating, forward passes {turn + 1} of {len(points.mine)}"
                self.watch.beat(self.engine.step_count, doing)
                if self.stop(self.engine.step_count):
                    return None
                for name, losses in self.losses(module, points, group).items():
                    mine += [(name, *one) for one in zip(group, losses, strict=True)] if counts else []
        everyones = [one for several in self.engine.ranks.gathered(mine) for one in several]
        shape = len(points.held.numbers), points.levels
        found = {name: np.full(shape, np.nan) for name, *_ in everyones}
        for name, point, loss in everyones:
            found[name][point] = loss
        return found

    def losses(self, module: Any, points: Points, group: Sequence[Point]) -> dict[str, list[float]]:
        """The mean squared error of each of a group's points, under each condition.

        That of the answer itself: without the objective's weights, offset and perturbation of the noise, so
        that runs with others can be compared.
        """
        device = self.engine.ranks.device
        latents, noise, conditions = points.inputs(group)
        latents, noise = latents.to(device), noise.to(device)
        steps = points.steps(self.process.timesteps)
        t = torch.tensor([steps[point.level] for point in group], device=device)  # (B,) int64
        x_t = self.process.add_noise(latents, noise, t)  # (B, c, h, w)
        target = self.process.target(latents, noise, t)
        found = {}
        for name, condition in conditions.items():
            asked = {part: rows.to(device) for part, rows in condition.items()}
            answer = module(x_t, t.float(), asked).float()
            assert answer.shape == target.shape, f"the answer is {tuple(answer.shape)}"
            found[name] = (answer - target).square().flatten(1).mean(1).tolist()
        return found

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Add a step's lines to the file, all at once, and say them."""
        self.tell(described(lines))
        try:
            cut_after(self.path, self.last - 1)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self.tell(f"{self.path} cannot be written: {error.strerror or error}; training goes on")


def whole(path: Path, step: int, kinds: Sequence[str]) -> bool:
    """Whether a file tells of a step all that it should; what it tells of later steps is cut off."""
    cut_after(path, step)
    if not path.exists():
        return False
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.get("weights") for line in lines if line["step"] == step} >= set(kinds)


def summary(found: dict[str, np.ndarray], steps: Sequence[int]) -> dict[str, Any]:
    """What a line tells of losses (records, levels) under each condition; steps: of the levels."""
    means = {name: [finite(float(loss)) for loss in table.mean(0)] for name, table in found.items()}
    told: dict[str, Any] = {name: finite(float(table.mean())) for name, table in found.items()}
    quantiles = [{"t": t} | {name: means[name][level] for name in means} for level, t in enumerate(steps)]
    told["gap"] = lacking(told[WITHOUT_TEXT], told[TOLD])
    if WITHOUT_IMAGE in told:
        told["hint_gap"] = lacking(told[WITHOUT_IMAGE], told[TOLD])
    return told | {"quantiles": quantiles}


def lacking(without: float | None, told: float | None) -> float | None:
    """How much the loss grows where something is not told; None where a number is missing."""
    return None if without is None or told is None else without - told


def described(lines: Sequence[dict[str, Any]]) -> str:
    """A step's lines for people."""
    names = {TOLD: "loss", WITHOUT_TEXT: "without text", WITHOUT_IMAGE: "without the second image"}
    said = []
    for line in lines:
        known = {name: line[name] for name in names if name in line}
        losses = [f"{names[name]} {'?' if loss is None else f'{loss:.4g}'}" for name, loss in known.items()]
        said.append(("" if line["weights"] == LIVE else f"{line['weights']}: ") + ", ".join(losses))
    return f"validation at step {lines[0]['step']}: {'; '.join(said)}"


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it nothing is dropped out; afterwards every part is in the mode that it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
