"""An export is made in a thread beside the training, and moves no random number and no setting of it."""

import random
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from sfumato import export, methods, models
from sfumato.config import Config, parse
from sfumato.engine import published, saved
from sfumato.methods.full import Full
from tests.engine import runs

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full", "text_encoders": True},
    "lora": {"kind": "lora", "rank": 2, "dropout": 0.5, "text_encoders": True},
    "controlnet": {"kind": "controlnet"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    runs.write_model("sd", folder / "sd")
    return folder


def config_of(place: Path, kind: str) -> Config:
    second = {"data__conditioning_column": "edges"} if kind == "controlnet" else {}
    values = runs.settings(place, name=kind, export__dtype="bf16", ema__enabled=False, **second)
    return parse(values | {"method": KINDS[kind]})


def written(place: Path, kind: str) -> tuple[Config, Any, Path]:
    """A checkpoint of what a method learns, as a run publishes it, without its export."""
    config = config_of(place, kind)
    family = models.load(config.model, CPU, torch.float32, torch.float32)
    parts = methods.build(config, family).build()
    folder = published.path_of(config.folder / "checkpoints", 1)
    folder.mkdir(parents=True, exist_ok=True)
    learned = {name: p.detach().flatten() for name, p in parts.named_parameters() if p.requires_grad}
    shapes = {name: list(p.shape) for name, p in parts.named_parameters() if p.requires_grad}
    file = "rank-00000.safetensors"
    told = saved.write(folder / file, {f"weight/{name}/0": tensor for name, tensor in learned.items()})
    manifest: dict[str, Any] = {
        "step": 1, "position": 1, "parameters": shapes, "files": {file: told}, "export": {}, "family": "sd",
        "config": config.model_dump(mode="json"), "records": 1, "scaler": {}, "left_out": [],
        "data": None, "samples": 4, "versions": {},
    }  # fmt: skip
    published.write_manifest(folder, manifest)
    return config, family, folder


def settings() -> tuple[Any, ...]:
    """What is the whole process's, and what other threads see of it."""
    libraries = diffusers_logging, transformers_logging
    said = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    return torch.get_default_dtype(), torch.get_default_device(), said


def check_unnoticed(work: Callable[[], None]) -> None:
    """Fail unless dropout draws what it would draw alone, while work is done in a thread."""
    before = settings(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    torch.manual_seed(5)
    thread = threading.Thread(target=work)
    thread.start()
    seen: list[Tensor] = []
    while thread.is_alive():
        assert torch.get_default_dtype() == torch.float32, "another dtype for the whole process"
        seen.append(F.dropout(torch.ones(64), 0.5))
    thread.join()
    seen.append(F.dropout(torch.ones(64), 0.5))
    torch.manual_seed(5)
    assert all(torch.equal(one, F.dropout(torch.ones(64), 0.5)) for one in seen), "other random numbers"
    assert (settings(), random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]


@cache
def prepared(place: Path, kind: str) -> tuple[Config, Path, Callable[[Path], None], list[str]]:
    """A checkpoint, what puts exports into it, and what that complains of."""
    config, family, folder = written(place, kind)
    told: list[str] = []
    state = torch.get_rng_state()
    put = export.inside(config, family, told.append)
    assert torch.equal(state, torch.get_rng_state()), "the preparation draws random numbers"
    return config, folder, put, told


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice(place: Path, kind: str) -> None:
    config, folder, put, told = prepared(place, kind)
    check_unnoticed(lambda: put(folder))
    assert not told, told
    there, again = folder / "export", export.export(config.folder, place / f"again-{kind}", anew=True)
    for file in sorted(path.relative_to(again) for path in again.rglob("*.*") if path.is_file()):
        if file.suffix == ".safetensors":
            one, other = load_file(there / file), load_file(again / file)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        elif file.name not in ("README.md", "curve.png"):
            assert (there / file).read_bytes() == (again / file).read_bytes(), f"{file} is another on demand"
    if kind == "full":
        file = Path("vae") / "diffusion_pytorch_model.safetensors"
        assert (there / file).samefile(config.folder / ".frozen" / file), "frozen parts are written each time"
        pipeline = DiffusionPipeline.from_pretrained(there, torch_dtype=torch.bfloat16)
        reader = saved.Saved(folder)
        for part in ("unet", "text_encoder"):
            for name, p in getattr(pipeline, part).named_parameters():
                if f"{part}.{name}" in reader.parameters:
                    assert torch.equal(p, reader.whole("weight", f"{part}.{name}").bfloat16()), name


def test_modules_that_are_born_with_random_numbers_are_caught(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder, put, _ = prepared(place, "full")
    monkeypatch.setattr(Full, "blank", lambda self, part: self.family.build_denoiser())
    with pytest.raises(AssertionError, match="other random numbers"):
        check_unnoticed(lambda: put(folder))
