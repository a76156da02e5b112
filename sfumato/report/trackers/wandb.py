"""Weights & Biases, online or, with log.offline, in the run's folder until `wandb sync` sends it."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.config import Config
from sfumato.report.trackers import settings


class Wandb:
    """A run of W&B; its axis is our step, as its own may only grow."""

    def __init__(self, run: Any) -> None:
        self.id, self.run = str(run.id), run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one line."""
        self.run.log({**scalars, "step": step})

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The previews of a step."""
        import wandb

        self.run.log(
            {"previews": [wandb.Image(str(file), caption=file.stem) for file in files], "step": step}
        )

    def back_to(self, step: int) -> None:
        """Nothing: the steps' new numbers are drawn over the old ones."""

    def close(self) -> None:
        """Send the rest."""
        self.run.finish()


def begin(config: Config, kept: str | None, step: int) -> Wandb:
    """Begin, or go on with the run of an earlier start."""
    import wandb

    run = wandb.init(
        project=config.log.project,
        name=config.name,
        dir=str(config.folder),
        id=kept or uuid.uuid4().hex[:12],
        resume="allow",
        config=settings(config),
        mode="offline" if config.log.offline else None,
        settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
    )
    return Wandb(run)
