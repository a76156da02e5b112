"""Pictures of fixed prompts and seeds, drawn while training, at every ZeRO stage by all ranks together."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from sfumato.drawing import inputs
from sfumato.drawing.draw import draw
from sfumato.drawing.pictures import CONDITIONS, LIST, NUMBER, write
from sfumato.drawing.request import Sampling, shots
from sfumato.engine.engine import Engine
from sfumato.methods import Method
from sfumato.objective import Objective
from sfumato.watch import Watch


class Previews:
    """Draws into images/step-NNNNNN what is due: before the first step, every so many, and after the last."""

    def __init__(
        self,
        engine: Engine,
        method: Method,
        objective: Objective,
        watch: Watch,
        tell: Callable[[str], None],
    ) -> None:
        """tell: hears of pictures that could not be written, which end no run."""
        self.engine, self.method, self.objective = engine, method, objective
        self.watch, self.tell = watch, tell
        done = engine.ranks.first and (self.folder(engine.step_count) / LIST).is_file()
        self.last = engine.step_count if engine.ranks.gathered(done)[0] else -1
        """The newest step that is drawn."""
        self.forget()

    def __call__(self) -> None:
        """Draw if it is due at the engine's step and not done."""
        config, step = self.engine.config, self.engine.step_count
        if not config.preview.prompts or self.last == step:
            return
        if step % config.preview.every and step != config.steps:
            return
        preview(self.engine, self.method, self.objective, self.watch, self.tell, self.folder(step))
        self.last = step

    def back_to(self, step: int) -> None:
        """Draw the steps after `step`, which were undone, anew."""
        self.last = min(self.last, step)
        self.forget()

    def forget(self) -> None:
        """Remove what was drawn of steps after the engine's, which were undone; nobody's own files."""
        for folder in self.folder(0).parent.glob("step-*") if self.engine.ranks.first else ():
            number = folder.name.removeprefix("step-")
            if number.isdecimal() and int(number) > self.engine.step_count:
                with suppress(OSError):  # what is left is replaced when the step is drawn again
                    for file in sorted(folder.iterdir()):
                        if file.name == LIST or NUMBER.fullmatch(file.name):
                            file.unlink()
                    folder.rmdir()

    def folder(self, step: int) -> Path:
        """Where the pictures of a step lie."""
        return self.engine.config.folder / "images" / f"step-{step:06d}"


def preview(
    engine: Engine,
    method: Method,
    objective: Objective,
    watch: Watch,
    tell: Callable[[str], None],
    folder: Path,
) -> None:
    """Draw the preview's prompts into a folder, with the average of the weights if the run keeps one."""
    config, wanted = engine.config, engine.config.preview
    pictures = cycle(map(Path, wanted.conditions))
    asked = [replace(shot, condition=next(pictures, None)) for shot in shots(wanted.prompts, [wanted.seed])]

    def beat(pipeline: Any, step: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        watch.beat(engine.step_count, f"drawing the previews, denoising step {step + 1} of {wanted.steps}")
        return kept

    watch.beat(engine.step_count, "drawing the previews")
    with engine.averaged(), engine.drawing() as module:
        pipeline, family = method.pipeline(module, objective.process.sampler_settings())
        drawings = draw(
            pipeline,
            asked,
            Sampling(steps=wanted.steps, guidance=wanted.guidance, size=max(config.data.resolutions)),
            family=family,
            model=f"{config.name}, step {engine.step_count}",
            rank=engine.ranks.rank,
            world=engine.ranks.world,
            step=beat,
        )
    if engine.ranks.first:
        try:
            write(drawings, folder)
            for drawing in drawings if wanted.conditions else ():
                # As the ControlNet was shown it, once for all steps.
                shown = inputs.of_shot(drawing.shot, "condition", drawing.image.size)
                place = folder.parent / CONDITIONS / f"{drawing.index:03d}.png"
                place.parent.mkdir(exist_ok=True)
                shown.save(place)
        except OSError as error:
            tell(f"the previews could not be written to {folder}: {error.strerror or error}")
