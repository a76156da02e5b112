"""A toy run to be killed, and what is done to it."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from PIL import Image

from sfumato.models import family_class

EVERY = 3  # steps between two checkpoints
PICTURES = 13
PLACE = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "SFUMATO_")
"""How the variables begin that would make a command one of this process's ranks."""


class Started(Protocol):
    """A run that is going on, in processes of its own."""

    def ranks(self) -> list[int]:
        """The processes of the ranks that are alive."""

    def end(self) -> None:
        """SIGKILL to whatever is left of it."""

    def wait(self, limit: float) -> int | None:
        """Its exit code; None if it is still running after `limit` seconds."""


class Command:
    """`sfumato train` as a user starts it."""

    def __init__(self, config: Path, steps: int, ranks: int) -> None:
        command = [sys.executable, "-m", "sfumato", "train", str(config), f"steps={steps}"]
        self.log = (config.parent / "output.txt").open("ab")
        self.process = subprocess.Popen(
            [*command, "--gpus", str(ranks)],
            env={name: value for name, value in os.environ.items() if not name.startswith(PLACE)},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """The launcher's children, but for the one that guards them."""
        try:
            children = psutil.Process(self.process.pid).children()
            return [child.pid for child in children if "RANK" in child.environ()]
        except psutil.Error:
            return []

    def end(self) -> None:
        """The launcher and its ranks, each of which has its loader's workers in its session."""
        for pid in [self.process.pid, *self.ranks()]:
            strike(pid)

    def wait(self, limit: float) -> int | None:
        """The launcher's exit code."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            return None


def strike(pid: int) -> None:
    """SIGKILL to a process and its session's others; one that is gone already is left in peace."""
    for kill in (os.killpg, os.kill):  # a process that is just starting has no session of its own yet
        try:
            return kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def world(place: Path) -> None:
    """A toy model and a few pictures with captions."""
    family_class("sd").tiny(place / "model")
    (place / "pictures").mkdir()
    for number in range(PICTURES):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / "pictures" / f"{number}.png")
        (place / "pictures" / f"{number}.txt").write_text(f"number {number}")


def values(place: Path, name: str) -> dict[str, Any]:
    """The settings of a run, but for its steps, as nested tables."""
    return {
        "name": name,
        "output": str(place / "runs"),
        "batch_size": 4,
        "micro_batch_size": 1,
        "model": {"weights": str(place / "model")},
        "data": {"source": str(place / "pictures"), "resolution": 64, "workers": 1, "flip": True},
        "optimizer": {"lr": 1e-3},
        "engine": {"precision": "fp32", "timeout": 60, "compare_every": 5},
        "ema": {"enabled": True},
        "checkpoint": {"every": EVERY, "keep": 3, "export": False},
        "log": {"samples": True},
    }


def write_config(place: Path, name: str) -> Path:
    """The settings as a file."""
    file = place / f"{name}.toml"
    file.write_text(as_toml(values(place, name)), encoding="utf-8")
    return file


def as_toml(settings: Mapping[str, Any]) -> str:
    """Settings, and tables of settings, as a config file says them."""
    lines, tables = [], []
    for key, value in settings.items():
        if isinstance(value, dict):
            tables += [f"[{key}]", *(f"{inner} = {json.dumps(one)}" for inner, one in value.items())]
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def spoil(path: Path, draw: random.Random) -> str:
    """Damage a checkpoint as disks and people do; how."""
    file, how = path / "rank-00000.safetensors", draw.choice(("flipped", "cut", "deleted", "pickle"))
    if how == "deleted":
        file.unlink()
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"weights": [0.0]}))
    elif how == "cut":
        os.truncate(file, draw.randrange(file.stat().st_size))
    else:
        with file.open("r+b") as content:
            content.seek(draw.randrange(file.stat().st_size))
            byte = content.read(1)
            content.seek(-1, os.SEEK_CUR)
            content.write(bytes([byte[0] ^ 1 << draw.randrange(8)]))
    return how
