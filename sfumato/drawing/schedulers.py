"""The sampler that a pipeline draws with, for as long as it draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers

from sfumato.drawing.options import SCHEDULERS
from sfumato.errors import UserError
from sfumato.models.folder import read_json


def check_steps(folder: Path, steps: int) -> None:
    """Raise UserError for more denoising steps than a diffusers folder's noise schedule has."""
    file = folder / "scheduler" / "scheduler_config.json"
    most = read_json(file).get("num_train_timesteps") if file.is_file() else None
    if isinstance(most, int) and steps > most:
        raise UserError(f"--steps {steps}", f"the noise schedule of {folder} has {most}", "draw with fewer")


@contextmanager
def scheduled(pipeline: Any, name: str | None) -> Iterator[None]:
    """Within it the pipeline samples with the named scheduler, configured like its own."""
    own = pipeline.scheduler
    # Even its own is copied, because sampling leaves its traces in a scheduler.
    pipeline.scheduler = type(own).from_config(own.config) if name is None else other_scheduler(own, name)
    try:
        yield
    finally:
        pipeline.scheduler = own


def other_scheduler(own: Any, name: str) -> Any:
    """A scheduler of SCHEDULERS with the noise schedule and the target of the model's own."""
    kind = getattr(diffusers, class_of(name))
    if kind not in [*own.compatibles, type(own)]:
        raise UserError(
            f"the scheduler {name!r}",
            f"the model's own is {type(own).__name__}, of a process that {kind.__name__} does not sample",
            "leave the scheduler out",
        )
    # DDIM clips latents as if they were pixels unless it is told not to.
    silent = name == "ddim" and "clip_sample" not in own.config
    return kind.from_config(own.config, **({"clip_sample": False} if silent else {}))


def class_of(name: str) -> str:
    """diffusers' class of a scheduler of SCHEDULERS. Raises UserError for another name."""
    if name not in SCHEDULERS:
        raise UserError(f"the scheduler {name!r}", "no such scheduler", f"choose {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]
