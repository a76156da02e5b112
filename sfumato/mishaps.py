"""What becomes of a global batch whose loss or gradient is not finite. Its step was not applied."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from sfumato.config import Config
from sfumato.data import batch as files
from sfumato.data.batch import Batch
from sfumato.engine.engine import Engine
from sfumato.engine.ranks import Ranks
from sfumato.errors import UserError

Verdict = Literal["again", "leave out", "back"]
FORMAT = 1
FACTS = "batch.json"
TOLD = 4  # samples that a message names


@dataclass(frozen=True)
class Sample:
    """One sample of a batch that was not applied."""

    rank: int
    micro: int
    id: int
    """The record's number in the index."""
    visit: int
    name: str
    """The record's name."""
    caption: str
    dropped: bool
    loss: float

    @property
    def finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


class Mishaps:
    """Judges steps that were not applied, on all ranks together and on all alike."""

    def __init__(
        self, config: Config, place: Ranks, tell: Callable[[str], None], name: Callable[[int], str] = str
    ) -> None:
        """tell: prints a line, on the first rank. name: a record's number in the index -> its name."""
        self.config, self.place, self.tell, self.name = config, place, tell, name
        self.count = 0
        """Batches left out since the start of this process."""
        self.position, self.before = -1, dict[str, Any]()
        """The last batch that was judged, and what the loss scale knew before the first attempt at it."""
        self.until, self.samples = -1, list[int]()
        """The batch that `went_back` goes on with, and the samples of the one before."""

    def judge(self, engine: Engine, batches: Sequence[Batch]) -> Verdict:
        """What is to be done about a step that was not applied; batches: this rank's, on any device.

        "again": try the same batch, the loss scale is smaller. "leave out": go on with the next batch, the
        engine has left this one out. "back": load the newest checkpoint into the engine, call `went_back`,
        and go on with the next batch. Raises UserError where the run is to end; the engine is as it was
        before the batch, and can be saved.
        """
        samples = self.gathered(engine, batches)
        scale, losses_finite = engine.scale, all(sample.finite for sample in samples)
        if self.position != engine.position:
            self.position, self.before = engine.position, scale.before
        if losses_finite and scale.can_fall:
            engine.overflows += 1
            return "again"
        collapsed = losses_finite and scale.dynamic and self.before["cur_scale"] <= scale.floor
        # What a batch did to the scale that no scale makes good says nothing of the next one.
        scale.restore(self.before)
        folder = self.written(engine, batches, samples)
        policy, left_out = self.config.bad_numbers.policy, max(self.count, len(engine.left_out))
        if policy == "stop" or collapsed or left_out >= self.config.bad_numbers.limit:
            raise self.end(engine, samples, folder, collapsed)
        self.count += 1
        numbers = sorted(sample.id for sample in samples)
        done = "left out"
        if policy == "skip":
            engine.leave_out(numbers, engine.position + 1)
        else:
            self.until, self.samples, done = engine.position + 1, numbers, "going back"
        told = f"step {engine.step_count}: {found(samples, self.before)}; {done}, "
        self.tell(f"{told}{left_out + 1} of at most {self.config.bad_numbers.limit}{look(folder)}")
        return "leave out" if policy == "skip" else "back"

    def went_back(self, engine: Engine) -> None:
        """After "back", with a checkpoint loaded: go on behind the batch. All between is left out with it."""
        assert self.until > engine.position, "nothing was judged to go back"
        engine.leave_out(self.samples, self.until)
        engine.forget()
        self.until = -1

    def metrics(self, engine: Engine) -> dict[str, int]:
        """For the log: attempts that fp16 could not hold, in this process, and batches that were left out."""
        return {"overflows": engine.overflows, "left_out": len(engine.left_out)}

    def gathered(self, engine: Engine, batches: Sequence[Batch]) -> list[Sample]:
        """The samples of the global batch, on all ranks."""
        own = [
            Sample(self.place.rank, micro, *row)
            for micro, (batch, losses) in enumerate(zip(batches, engine.losses, strict=True))
            for row in zip(
                batch.ids.tolist(),
                batch.visits.tolist(),
                map(self.name, batch.ids.tolist()),
                batch.captions,
                batch.dropped.tolist(),
                losses.tolist(),
                strict=True,
            )
        ]
        return [sample for part in self.place.gathered(own) for sample in part]

    def end(self, engine: Engine, samples: list[Sample], folder: Path | None, collapsed: bool) -> UserError:
        """The error that ends the run."""
        rule = self.config.bad_numbers
        left_out = max(self.count, len(engine.left_out))
        if collapsed:
            do = (
                "fp16 cannot hold these gradients, or the run diverges: set engine.precision to bf16 or "
                "fp32, or lower optimizer.lr"
            )
        elif self.config.engine.precision == "fp16" and not engine.scale.dynamic:
            do = "set engine.fp16.loss_scale to 0, which follows overflows, or to less"
        elif not any(sample.finite for sample in samples):
            do = (
                "the run has diverged: remove its newest checkpoint, and go on with a smaller optimizer.lr "
                'and checkpoint.accept=["optimizer.lr"]'
            )
        elif rule.policy == "stop":
            do = 'go on without such batches with bad_numbers.policy="skip"; or lower optimizer.lr'
        else:
            do = (
                f"{left_out} batches were left out before, as many as bad_numbers.limit allows: lower "
                "optimizer.lr, mend these samples, or allow more"
            )
        return UserError(
            f"optimizer step {engine.step_count} on batch {engine.position}",
            f"{found(samples, self.before)}; nothing was changed",
            f"{do}{look(folder)}",
        )

    def written(self, engine: Engine, batches: Sequence[Batch], samples: list[Sample]) -> Path | None:
        """Write the batch into the run's folder `bad`, on all ranks together; None if there was no room."""
        final = self.config.folder / "bad" / called(engine.step_count, engine.position)
        part = final.with_name(f".{final.name}.part")
        mine: str | None = None
        try:
            if self.place.first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
                facts = {
                    "format": FORMAT,
                    "step": engine.step_count,
                    "position": engine.position,
                    "scale": self.before.get("cur_scale", 1.0),
                    "config": self.config.model_dump(mode="json"),
                    "samples": [asdict(s) | {"loss": s.loss if s.finite else str(s.loss)} for s in samples],
                }
                (part / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        except OSError as error:
            mine = str(error)
        self.place.barrier()
        try:
            files.save(batches, part / file_of(self.place.rank))
        except (OSError, SafetensorError) as error:
            mine = mine or str(error)
        wrong = next((error for error in self.place.gathered(mine) if error is not None), None)
        if wrong is not None:
            self.tell(f"the batch of step {engine.step_count} could not be written to {final}: {wrong}")
        if self.place.first and wrong is None:
            shutil.rmtree(final, ignore_errors=True)  # the same batch, met again
            try:
                part.rename(final)
            except OSError as error:
                self.tell(f"{part} could not be renamed to {final.name}: {error}")
        elif self.place.first:
            shutil.rmtree(part, ignore_errors=True)
        return final if wrong is None else None


def called(step: int, position: int) -> str:
    """The name of a batch's folder; they differ in number once batches were left out."""
    return f"step-{step:06d}" + (f"-batch-{position:06d}" if position != step else "")


def file_of(rank: int) -> str:
    """The name of a rank's file in it."""
    return f"rank-{rank:05d}.safetensors"


def found(samples: list[Sample], scale: dict[str, Any]) -> str:
    """What is wrong with a batch, in words."""
    bad = [sample for sample in samples if not sample.finite]
    if not bad:
        mean = sum(sample.loss for sample in samples) / len(samples)
        at = ", at any loss scale," if scale.get("cur_hysteresis") is not None else ""
        return f"the gradient{at} is not finite, though all {len(samples)} losses are (mean {mean:.6g})"
    named = ", ".join(f"{sample.name} ({sample.loss})" for sample in bad[:TOLD])
    more = f" and {len(bad) - TOLD} more" if len(bad) > TOLD else ""
    return f"the loss is not finite for {len(bad)} of {len(samples)} samples: {named}{more}"


def look(folder: Path | None) -> str:
    """How the batch is looked at."""
    return f"\n       look at it: sfumato replay {folder}" if folder is not None else ""
