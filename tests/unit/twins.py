"""The families' toy twins, each written once for all tests of a process."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import models
from sfumato.config import Model
from sfumato.data.batch import Batch, Draws
from sfumato.models.family import Family

CPU = torch.device("cpu")
PROMPTS = ["a red balloon over the sea", "", "cat", "a long tale of " + "many small words " * 40]


@lru_cache
def twin(name: str) -> Path:
    """The folder of a family's twin; do not write into it."""
    place = Path(tempfile.mkdtemp(prefix=f"sfumato-{name}-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    models.family_class(name).tiny(place / name)
    return place / name


def write(name: str, folder: Path) -> Path:
    """A twin's copy in a new folder, which may be spoilt."""
    shutil.copytree(twin(name), folder, dirs_exist_ok=True)
    return folder


def copy(name: str, place: Path) -> Path:
    """The same under the family's name."""
    return write(name, place / name)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Family:
    """A family on the CPU."""
    return models.load(Model(weights=str(folder), **settings), CPU, dtype, dtype)


@lru_cache
def family(name: str) -> Family:
    """A family's twin in fp32; do not change it."""
    return load(twin(name))


def batch_of(captions: list[str], dropped: list[bool] | None = None, side: int = 64, seed: int = 0) -> Batch:
    """Noise for pictures, with sizes that bf16 cannot hold."""
    count, latent = len(captions), (len(captions), 4, side // 8, side // 8)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Batch(
        ids=torch.arange(count) + 100,
        visits=torch.zeros(count, dtype=torch.int64),
        pixels=normal(count, 3, side, side).clamp(-1, 1),
        captions=captions,
        dropped=torch.tensor(dropped or [False] * count),
        size_and_crop=torch.tensor([[257.0, 1155.0, 3.0, 1023.0, 64.0, 64.0]] * count),
        draws=Draws(
            posterior=normal(*latent),
            noise=normal(*latent),
            timestep=torch.rand(count, generator=generator),
            offset=normal(count, 4, 1, 1),
            perturbation=None,
        ),
    )
