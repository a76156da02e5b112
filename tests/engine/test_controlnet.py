"""ControlNet runs: the same at every stage, exact to resume, and stock pipelines load what they leave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from PIL import Image
from safetensors.torch import load_file

from sfumato.cli import main
from sfumato.config import parse
from sfumato.drawing.draw import draw
from sfumato.drawing.request import Sampling, Shot
from sfumato.errors import UserError
from tests.engine import runs, toys
from tests.engine.ranks import run_ranks

PIPELINES: dict[str, Any] = {
    "sd": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and the same pictures with second images of their own and with each other's."""
    folder = tmp_path_factory.mktemp("controlnet")
    for family in ("sd", "sdxl"):
        runs.write_model(family, folder / family)
    write_pairs(folder / "pictures", 0)
    write_pairs(folder / "shuffled", 1)
    return folder


def write_pairs(folder: Path, shift: int) -> None:
    """Pictures, each with a second image: its own edges, or those of the picture `shift` places on."""
    runs.write_pictures(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        size = Image.open(folder / row["file_name"]).size
        other = Image.open(folder / rows[(number + shift) % len(rows)]["file_name"]).resize(size)
        (folder / "hints").mkdir(exist_ok=True)
        other.convert("L").point(lambda v: 255 * (v > 128)).save(folder / "hints" / f"{number}.png")
        row["hint"] = f"hints/{number}.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def settings(place: Path, name: str, family: str = "sd", **changes: Any) -> dict[str, Any]:
    values = runs.settings(place, family, name=name, **changes)
    values["data"]["conditioning_column"] = "hint"
    return {"method": {"kind": "controlnet"}} | values


def train(jobs: list[dict[str, Any]], world: int = 1, bare: bool = False) -> list[Path]:
    train_them = runs.train_bare if bare else runs.train_all
    return [export.parent for export in run_ranks(train_them, world, jobs, timeout=280)[0]]


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Path]:
    """Runs on one rank and on two, by name."""
    preview = {
        "prompts": ["a house", "a tree"],
        "conditions": [str(place / "pictures" / "hints" / f"{n}.png") for n in (1, 2)],
        "steps": 2,
    }
    on = {"method": {"kind": "controlnet", "weights": str(place / "runs" / "one")}}
    quick = {"optimizer__lr": 1e-2, "ema__enabled": False, "steps": 2}
    low = quick | {"engine__precision": "bf16", "checkpoint__export": False}
    on |= {"steps": 1, "ema__enabled": False}
    one = [
        settings(place, "one", engine__zero_stage=0, preview=preview, **quick),
        settings(place, "on", **on),
        settings(place, "on-shuffled", data__source=str(place / "shuffled"), **on),
        settings(place, "low", engine__zero_stage=0, **low),
        settings(place, "whole", "sdxl", steps=2),
    ]
    third = {"engine__zero_stage": 3, "engine__gradient_checkpointing": True, "engine__attention": "native"}
    two = [
        settings(place, "third", preview=preview, **third, **quick),
        settings(place, "low-1", **low),
        settings(place, "low-3", engine__zero_stage=3, **low),
        settings(place, "half", "sdxl", engine__zero_stage=2, steps=1),
        settings(place, "half", "sdxl", engine__zero_stage=2, steps=2),
    ]
    folders = [*train(one), *train(two, 2)]
    return {folder.name: folder for folder in folders}


def test_every_stage_learns_the_same_and_resumes(done: dict[str, Path]) -> None:
    """Stage 0 on one rank is 3 on two, with checkpointing; 1 on one is 2 on two, stopped in the middle."""
    for one, other in (("one", "third"), ("whole", "half")):
        first, second = (runs.tensors_of(done[name]) for name in (one, other))
        assert all(name.startswith("controlnet.") for name in first), "the checkpoint holds what is frozen"
        assert toys.distance(first, second) < 1e-5, (one, other)
    mean, last = (runs.tensors_of(done["half"], kind) for kind in ("ema", "weight"))
    assert toys.distance(mean, runs.tensors_of(done["whole"], "ema")) < 1e-5
    assert 0 < toys.distance(mean, last)


def test_bf16_at_every_stage(done: dict[str, Path]) -> None:
    high = runs.tensors_of(done["one"])
    for name in ("low", "low-1", "low-3"):
        found = runs.tensors_of(done[name])
        assert 0 < toys.distance(found, high) < 0.1, name
        values = torch.cat([t.flatten() for t in found.values()])
        assert not torch.equal(values, values.bfloat16().float()), "the masters are not fp32"


def test_it_learns_and_second_images_count(place: Path, done: dict[str, Path]) -> None:
    """A run that goes on from another one sees a different loss where second images are exchanged."""
    learned = load_file(done["one"] / "export" / "diffusion_pytorch_model.safetensors")
    assert float(learned["controlnet_mid_block.weight"].abs().max()) > 1e-3
    assert float(learned["controlnet_cond_embedding.conv_out.weight"].abs().max()) > 1e-3
    base = runs.metrics(done["one"])[0]["loss"]
    own, other = (runs.metrics(done[name])[0]["loss"] for name in ("on", "on-shuffled"))
    assert own != base, "the run did not go on from the other one's weights"
    assert abs(own - other) > 1e-6, "second images change nothing"


@pytest.mark.parametrize("name", ["one", "third", "half"])
def test_t13_stock_pipelines_load_the_export(place: Path, done: dict[str, Path], name: str) -> None:
    """The export is what was trained, and draws what a preview of the live model drew."""
    run = done[name]
    family = "sdxl" if name == "half" else "sd"
    kind = "ema" if name == "half" else "weight"
    net = ControlNetModel.from_pretrained(run / "export")
    live = {key.removeprefix("controlnet."): value for key, value in runs.tensors_of(run, kind).items()}
    assert net.state_dict().keys() == live.keys()
    assert all(torch.equal(net.state_dict()[key], value) for key, value in live.items())
    stock = PIPELINES[family].from_pretrained(place / family, controlnet=net)
    sampling = Sampling(steps=2, guidance=5.0, size=64)
    shots = [
        Shot(prompt, 0, condition=place / "pictures" / "hints" / f"{n}.png")
        for n, prompt in ((1, "a house"), (2, "a tree"))
    ]
    drawn = draw(stock, shots, sampling, control=net)
    if name == "half":
        assert all(drawing.finite for drawing in drawn)
        return
    for drawing, file in zip(drawn, sorted((run / "images" / "step-000002").glob("*.png")), strict=True):
        gap = np.abs(np.asarray(drawing.image, int) - np.asarray(Image.open(file), int)).max()
        assert gap <= 1, f"a preview is off by {gap} of 255"


def test_sample_draws_with_a_run(place: Path, done: dict[str, Path], tmp_path: Path) -> None:
    hint = place / "pictures" / "hints" / "1.png"
    told = ["sample", str(done["one"]), "a house", "--condition", str(hint), "--fit", "--size", "64x64"]
    assert main([*told, "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0
    assert list((tmp_path / "drawn").glob("*.png"))


def test_what_cannot_be_is_told_before_work(place: Path) -> None:
    values = settings(place, "refused", preview={"prompts": ["x"], "conditions": ["nowhere.png"]})
    with pytest.raises(UserError, match=r"(?s)nowhere\.png.*cannot be read"):
        runs.train_here(values)
    values = settings(place, "refused") | {"method": {"kind": "controlnet", "weights": str(place / "sd")}}
    with pytest.raises(UserError, match=r"no config\.json of a ControlNetModel"):
        runs.train_here(values)
    assert not (place / "runs" / "refused").exists()
    values["data"].pop("conditioning_column")
    with pytest.raises(UserError, match="conditioning_column"):
        parse(values)


def test_stopped_and_resumed_is_never_stopped_to_the_bit(place: Path) -> None:
    """On one rank, with the average: a ControlNet, and a new word's vectors."""
    word = {"kind": "textual_inversion", "word": "<w>", "like": "cat"}
    jobs = []
    for method in ({"kind": "controlnet"}, word):
        for name, steps in (("straight", 2), ("halves", 1), ("halves", 2)):
            values = settings(place, f"{method['kind']}-{name}", optimizer__lr=1e-2, steps=steps)
            values["data"]["caption_prefix"] = "<w>, "
            jobs.append(values | {"method": method})
    found = train(jobs, bare=True)
    for straight, resumed in ((found[0], found[2]), (found[3], found[5])):
        for kind in ("weight", "ema", "exp_avg"):
            one, other = runs.tensors_of(straight, kind), runs.tensors_of(resumed, kind)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        losses = [[line["loss"] for line in runs.metrics(run)] for run in (straight, resumed)]
        assert losses[0] == losses[1] and len(losses[0]) == 2
