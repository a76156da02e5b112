"""How fast pictures are drawn: denoising iterations a second and seconds a picture.

The dict of figures, which is written as JSON, format 1:

    format, made (UTC), device, dtype, model, settings   on what and with what: the facts of the first drawing
    pictures, batch, ranks                               in each round
    warm_up                                              rounds before those that are measured
    iterations_per_second, seconds_per_picture           {median, rounds: [one of each round]}
    machine                                              see machine.py
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.bench.machine import machine
from sfumato.device import name_of, synchronize
from sfumato.drawing.pictures import Drawing

SETTINGS = (
    *("steps", "guidance", "guidance_rescale", "scheduler", "width", "height", "strength", "window"),
    *("emphasis", "loras", "control", "control_scale", "vae", "compile", "offload"),
)
"""The facts of a drawing on which its speed may depend."""


class Watch:
    """Times the denoising loop: from the first part that it calls to the end of its last step."""

    def __init__(self, parts: Sequence[nn.Module | None], device: torch.device) -> None:
        self.device = device
        self.began: float | None = None
        self.ended = 0.0
        self.seconds, self.steps, self.ahead = 0.0, 0, 0
        self.hooks = [part.register_forward_pre_hook(self.begin) for part in parts if part is not None]

    def begin(self, *_: Any) -> None:
        """A part of the loop is called: of the first step, the clock starts."""
        if self.began is None:
            synchronize(self.device)
            self.began, self.ahead = time.perf_counter(), 0

    def step(self, pipeline: Any, number: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' callback_on_step_end; after the last step the clock stops."""
        self.ahead += 1
        if self.ahead == pipeline.num_timesteps:
            synchronize(self.device)
            assert self.began is not None, "a step ended before the denoiser was called"
            self.seconds += time.perf_counter() - self.began
            self.steps += self.ahead
            self.began = None
        return {}

    def take(self) -> float:
        """Steps a second since the last call of this."""
        rate = self.steps / self.seconds if self.seconds else 0.0
        self.seconds, self.steps = 0.0, 0
        return rate

    def close(self) -> None:
        """Let go of the parts."""
        for hook in self.hooks:
            hook.remove()


def measure(
    draw: Callable[[Callable[..., dict[str, Any]]], list[Drawing]],
    parts: Sequence[nn.Module | None],
    device: torch.device,
    warm_up: int,
    repeats: int,
    ranks: int,
) -> dict[str, Any]:
    """The figures of a drawing that is done `warm_up` and then `repeats` times.

    draw: draws all pictures once, and calls what it is given at the end of each step. parts: the modules
    that a step calls. Where `ranks` share the pictures, iterations are this rank's and seconds those of all.
    """
    watch = Watch(parts, device)
    rates: list[float] = []
    seconds: list[float] = []
    drawings: list[Drawing] = []
    try:
        for number in range(warm_up + repeats):
            synchronize(device)
            start = time.perf_counter()
            drawings = draw(watch.step)
            synchronize(device)
            spent, rate = time.perf_counter() - start, watch.take()
            if number >= warm_up:
                seconds.append(spent / len(drawings))
                rates.append(rate)
    finally:
        watch.close()
    facts = drawings[0].facts()
    return {
        "format": 1,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": facts["model"],
        "device": name_of(device),
        "dtype": facts.get("dtype"),
        "settings": {name: facts[name] for name in SETTINGS if name in facts},
        "pictures": len(drawings),
        "batch": drawings[0].sampling.batch_size,
        "ranks": ranks,
        "warm_up": warm_up,
        "iterations_per_second": {"median": statistics.median(rates), "rounds": rates},
        "seconds_per_picture": {"median": statistics.median(seconds), "rounds": seconds},
        "machine": machine(),
    }


def write(figures: dict[str, Any], file: Path) -> None:
    """Write the figures, and say the two that matter."""
    with file.open("x", encoding="utf-8") as to:
        to.write(json.dumps(figures, indent=1) + "\n")
    rate, seconds = (figures[name]["median"] for name in ("iterations_per_second", "seconds_per_picture"))
    print(f"{rate:.2f} iterations a second, {seconds:.3f} s a picture, on {figures['device']}")
