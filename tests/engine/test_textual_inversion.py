"""Textual inversion runs: the same at every stage, exact to resume, and stock pipelines load the words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from sfumato.cli import main
from sfumato.drawing.draw import draw
from sfumato.drawing.request import Sampling, shots
from sfumato.errors import UserError
from tests.engine import runs, toys
from tests.engine.ranks import run_ranks

FILE = "learned_embeds.safetensors"
PROMPT = "a house like <new>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_place(tmp_path_factory.mktemp("words"), "sd", "sdxl")


def settings(place: Path, name: str, family: str = "sd", **changes: Any) -> dict[str, Any]:
    values = runs.settings(place, family, name=name, optimizer__lr=0.05, steps=2, **changes)
    values["data"]["caption_prefix"] = "<new> in "
    return {"method": {"kind": "textual_inversion", "like": "red", "vectors": 2}} | values


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Path]:
    """Runs on one rank and on two, by name."""
    preview = {"prompts": [PROMPT], "steps": 2}
    live = {"preview": preview, "ema__enabled": False}
    one = [
        settings(place, "one", engine__zero_stage=0, **live),
        settings(place, "two", "sdxl", engine__zero_stage=1),
    ]
    low = {"engine__precision": "bf16", "ema__enabled": False}
    many = [
        settings(place, "third", engine__zero_stage=3, engine__gradient_checkpointing=True, **live),
        settings(place, "low", engine__zero_stage=2, **low),
        settings(place, "half", "sdxl", engine__zero_stage=2) | {"steps": 1},
        settings(place, "half", "sdxl", engine__zero_stage=2),
    ]
    exports = [*run_ranks(runs.train_all, 1, one, timeout=280)[0]]
    exports += run_ranks(runs.train_all, 2, many, timeout=280)[0]
    return {export.parent.name: export.parent for export in exports}


def test_every_stage_learns_the_same_and_resumes(done: dict[str, Path]) -> None:
    # Adam's first steps are the gradient's signs, and rounding to bf16 turns those of small numbers.
    kinds = {"third": ("weight", 1e-5), "half": ("weight", 1e-5), "low": ("exp_avg", 0.1)}
    for one, other in (("one", "third"), ("two", "half"), ("one", "low")):
        kind, bound = kinds[other]
        first, second = (runs.tensors_of(done[name], kind) for name in (one, other))
        assert all(name.endswith("token_embedding.learned") for name in first), "more learns than the word"
        assert [tuple(rows.shape) for rows in first.values()] == [(2, 32)] * len(first)
        assert toys.distance(first, second) < bound, (one, other)
    means, last = (runs.tensors_of(done["half"], kind) for kind in ("ema", "weight"))
    assert toys.distance(means, runs.tensors_of(done["two"], "ema")) < 1e-5
    assert 0 < toys.distance(means, last)


@pytest.mark.parametrize("name", ["one", "third", "half"])
def test_stock_pipelines_load_the_word(place: Path, done: dict[str, Path], name: str) -> None:
    """The export is what was trained, moved from its start, and draws what a preview drew."""
    run, family = done[name], "sdxl" if name == "half" else "sd"
    rows = runs.tensors_of(run, "ema" if name == "half" else "weight")
    state = load_file(run / "export" / FILE)
    assert list(state) == (["clip_g", "clip_l"] if family == "sdxl" else ["<new>"])
    for part, key in (("text_encoder.", "clip_l"), ("text_encoder_2.", "clip_g")):
        for parameter, numbers in rows.items():
            if parameter.startswith(part):
                assert torch.equal(state[key if family == "sdxl" else "<new>"], numbers)
                assert not torch.equal(numbers[0], numbers[1]), "it did not learn"
    if family == "sdxl":
        return
    pipeline: Any = DiffusionPipeline.from_pretrained(place / family)
    pipeline.load_textual_inversion(run / "export")
    [drawing] = draw(pipeline, shots([PROMPT], [0]), Sampling(steps=2, guidance=5.0, size=64))
    [file] = (run / "images" / "step-000002").glob("*.png")
    gap = np.abs(np.asarray(drawing.image, int) - np.asarray(Image.open(file), int)).max()
    assert gap <= 1, f"a preview is off by {gap} of 255"


@pytest.mark.parametrize("name", ["one", "half"])
def test_sample_knows_the_word(done: dict[str, Path], name: str, tmp_path: Path) -> None:
    told = [
        "sample",
        str(done[name]),
        PROMPT,
        "--size",
        "64",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "drawn"),
    ]
    assert main(told) == 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_a_word_that_no_caption_holds_is_told_before_work(place: Path) -> None:
    values = settings(place, "refused")
    values["data"].pop("caption_prefix")
    with pytest.raises(UserError, match=r"(?s)of 7 captions none holds it.*a picture of number 0"):
        runs.train_here(values)
    assert not (place / "runs" / "refused").exists()
