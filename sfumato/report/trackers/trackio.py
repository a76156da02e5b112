"""trackio: on this machine, or in the Space of TRACKIO_SPACE_ID where log.offline does not forbid it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio

from sfumato.config import Config
from sfumato.report.trackers import settings


class Trackio:
    """A run of trackio, known by its name."""

    def __init__(self, run: Any, name: str) -> None:
        self.run, self.id = run, name

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of one line."""
        self.run.log(
            {name: value for name, value in scalars.items() if name not in ("step", "time")}, step=step
        )

    def images(self, step: int, files: Sequence[Path]) -> None:
        """The previews of a step."""
        self.run.log({file.stem: trackio.Image(str(file), caption=file.stem) for file in files}, step=step)

    def back_to(self, step: int) -> None:
        """Nothing can be taken back."""

    def close(self) -> None:
        """Write the rest."""
        self.run.finish()


def begin(config: Config, kept: str | None, step: int) -> Trackio:
    """Begin, or go on with the run of an earlier start."""
    space = None if config.log.offline else os.environ.get("TRACKIO_SPACE_ID")
    run = trackio.init(
        project=config.log.project,
        name=kept or f"{config.name}-{os.urandom(3).hex()}",
        space_id=space,
        config=settings(config),
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    return Trackio(run, run.name)
