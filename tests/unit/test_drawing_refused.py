"""What cannot be drawn is refused in one message, before weights are loaded, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import cli
from sfumato import sample as work
from sfumato.drawing import pipelines, sources
from sfumato.drawing.options import sampling_options
from sfumato.errors import UserError
from sfumato.grammar import parse
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_lora, write_mask, write_picture

Change = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, a ControlNet and a LoRA of each, and pictures of several sizes."""
    root: Path = tmp_path_factory.mktemp("toys")
    for family in ("sd", "sdxl"):
        twins.write(family, root / family)
        write_control(root / f"{family}-control", root / family)
        write_lora(root / f"{family}.safetensors", root / family)
    wide = json.loads((root / "sd/unet/config.json").read_text()) | {"block_out_channels": [32, 96]}
    shutil.copytree(root / "sd", root / "wide")
    (root / "wide/unet/config.json").write_text(json.dumps(wide))
    inpainting = json.loads((root / "sd/unet/config.json").read_text()) | {"in_channels": 9}
    shutil.copytree(root / "sd", root / "nine")
    (root / "nine/unet/config.json").write_text(json.dumps(inpainting))
    shutil.copytree(root / "sd", root / "cut")
    truncate(root / "cut/unet/diffusion_pytorch_model.safetensors")
    shutil.copy(root / "sd.safetensors", root / "cut.safetensors")
    truncate(root / "cut.safetensors")
    shutil.copytree(root / "sd-control", root / "cut-control")
    truncate(root / "cut-control/diffusion_pytorch_model.safetensors")
    write_picture(root / "64.png", (64, 64))
    write_picture(root / "32.png", (32, 32))
    write_picture(root / "odd.png", (70, 64))
    write_mask(root / "mask.png", (64, 64))
    (root / "no.png").write_bytes((root / "64.png").read_bytes()[:60])
    (root / "empty.txt").write_text("\n# nothing\n")
    (root / "run").mkdir()
    (root / "run/resolved.json").write_text(json.dumps({"model": {"weights": str(root / "sd")}}))
    return root


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


CASES: dict[str, tuple[list[str], list[str]]] = {
    "no prompt": ([], ["no prompt is given"]),
    "an empty file": (["--prompts", "empty.txt"], ["no prompt is in it"]),
    "a LoRA of another family": (
        ["p", "--lora", "sdxl.safetensors"],
        ["width 64", "have 32", "of one family"],
    ),
    "a LoRA of other widths": (["p", "--lora", "sd.safetensors", "in:wide"], ["of width 64", "[32, 96]"]),
    "a LoRA that is cut off": (["p", "--lora", "cut.safetensors"], ["cut.safetensors cannot be read"]),
    "weights as a LoRA": (["p", "--lora", "sd/unet/diffusion_pytorch_model.safetensors"], ["no LoRA"]),
    "no such LoRA": (["p", "--lora", "nothing"], ["no such file"]),
    "a ControlNet of another base": (
        ["p", "--control", "sdxl-control", "--condition", "64.png"],
        ["cross_attention_dim 64", "the model has 32"],
    ),
    "a ControlNet that is cut off": (
        ["p", "--control", "cut-control", "--condition", "64.png"],
        ["cannot be read"],
    ),
    "no ControlNet": (["p", "--control", "sd", "--condition", "64.png"], ["no config.json of a ControlNet"]),
    "a ControlNet without a condition": (["p", "--control", "sd-control"], ["no condition to show it"]),
    "a condition without a ControlNet": (["p", "--condition", "64.png"], ["no ControlNet that reads it"]),
    "a condition of another size": (
        ["p", "--control", "sd-control", "--condition", "32.png", "--size", "64"],
        ["32.png has 32 x 32", "--fit"],
    ),
    "an image and a mask of two sizes": (
        ["p", "--image", "32.png", "--mask", "mask.png"],
        ["mask.png has 64 x 64", "the size of"],
    ),
    "a size that the VAE cannot make": (["p", "--image", "odd.png"], ["70 x 64", "--size 72x64 --fit"]),
    "a broken image": (["p", "--image", "no.png"], ["no.png", "cannot be read"]),
    "no such image": (["p", "--image", "nothing.png"], ["no such file or folder"]),
    "a mask without an image": (["p", "--mask", "mask.png"], ["no image that it belongs to"]),
    "a strength without an image": (["p", "--strength", "0.5"], ["no image that is changed"]),
    "a strength of no step": (["p", "--image", "64.png", "--strength", "0.01"], ["that is none"]),
    "depth of nothing": (["p", "--depth", "auto"], ["no image whose depth"]),
    "depth without a model": (
        ["p", "--depth", "auto", "--image", "64.png", "--control", "sd-control"],
        ["no --depth-model", "--depth FILE"],
    ),
    "a depth model that is not there": (
        ["p", "--depth", "auto", "--image", "64.png", "--control", "sd-control", "--depth-model", "nothing"],
        ["no such folder", "--depth FILE"],
    ),
    "a depth model of no use": (
        ["p", "--depth-model", "x", "--depth", "64.png", "--control", "sd-control"],
        ["--depth-model x", "no --depth auto"],
    ),
    "a scale of no ControlNet": (["p", "--control-scale", "0.5"], ["no ControlNet that adds anything"]),
    "more steps than the noise schedule has": (["p", "--steps", "1001"], ["--steps 1001", "has 1000"]),
    "a prompt that is no text": (["caf\udce9"], ["the prompt 'caf\\udce9'", "not valid Unicode text"]),
    "a negative that is no text": (["p", "--negative", "\udce9"], ["--negative", "not valid Unicode text"]),
    "depth and condition": (["p", "--depth", "64.png", "--condition", "64.png"], ["leave one out"]),
    "an unknown scheduler": (["p", "--scheduler", "ddpm++"], ["choose ddim, euler"]),
    "offload on a CPU": (["p", "--offload"], ["everything computes on the CPU"]),
    "weights that are cut off": (["p", "in:cut"], ["cut/unet", "cannot be read"]),
    "an inpainting model without a mask": (["p", "in:nine"], ["9 channels", "--mask"]),
    "a run without an export": (["p", "--compare", "run"], ["none of its checkpoints holds an export"]),
    "what is no run": (["p", "--compare", "sd"], ["no run is there"]),
    "figures into no folder": (["p", "--bench", "nowhere/f.json"], ["no folder", "nowhere"]),
    "figures where no file can be": (["p", "--bench", "/proc/f.json"], ["/proc takes no file"]),
    "pictures into a file": (["p", "--out", "64.png"], ["64.png is no folder"]),
    "pictures into a file's folder": (["p", "--out", "64.png/out"], ["64.png is no folder"]),
    "pictures where no file can be": (["p", "--out", "/proc/out"], ["/proc takes no file"]),
    "figures of a comparison": (["p", "--bench", "f.json", "--compare", "run"], ["leave one out"]),
    "no model": (["p", "in:empty.txt"], ["a file; Sfumato reads diffusers folders"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_before_work_starts(
    case: str, toys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(toys)
    loaded: list[Any] = []
    monkeypatch.setattr(pipelines, "open_pipeline", lambda *words, **options: loaded.append(words))
    before = sorted(path for path in toys.rglob("*"))
    words, messages = CASES[case]
    model = next((word.removeprefix("in:") for word in words if word.startswith("in:")), "sd")
    arguments = parse(["sample", model, *(word for word in words if not word.startswith("in:"))])
    with pytest.raises(UserError) as caught:
        work.sample(work.request_of(arguments))
    for message in messages:
        assert message in str(caught.value)
    assert not loaded, "weights were loaded before the mistake was found"
    assert sorted(path for path in toys.rglob("*")) == before, "something was written"
    assert capsys.readouterr().out == ""


def without_a_tensor(toys: Path, part: str, folder: Path) -> Path:
    """The toy with one tensor left out of a part's file."""
    shutil.copytree(toys / "sd", folder)
    [file] = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_draw_nothing(toys: Path, tmp_path: Path, part: str) -> None:
    folder = without_a_tensor(toys, part, tmp_path / "sd")
    words = ["sample", str(folder), "p", "--steps", "2", "--size", "32", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=rf"{part}(.|\n)*its file lacks 1 of the weights"):
        work.sample(work.request_of(parse(words)))
    assert not (tmp_path / "out").exists()


def test_the_missing_tensor_catches(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: diffusers alone fills the gap with what lies in memory, without a word."""
    folder = without_a_tensor(toys, "unet", tmp_path / "sd")
    monkeypatch.setattr(pipelines, "modules_of", lambda folder: {})
    assert pipelines.open_pipeline(folder, "cpu", torch.float32)[0].unet is not None


def test_fit_takes_what_is_refused_without_it(toys: Path, tmp_path: Path) -> None:
    words = [
        "sample",
        str(toys / "sd"),
        "p",
        "--image",
        str(toys / "odd.png"),
        "--steps",
        "2",
        "--out",
        str(tmp_path),
    ]
    paths = work.sample(work.request_of(parse([*words, "--size", "32x24", "--fit"])))
    with Image.open(paths[0]) as image:
        assert image.size == (32, 24)


def test_the_command_is_the_same_from_the_shell(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(toys / "sd"), "p", "--steps", "2", "--size", "32", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--seeds", "3", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [str(tmp_path / f"out/00{n}-p-seed{seed}.png") for n, seed in enumerate((3, 4))]
    assert cli.main([*words, "--lora", str(toys / "sdxl.safetensors")]) == 2
    assert "of one family" in capsys.readouterr().err


def test_what_each_source_means(toys: Path, tmp_path: Path) -> None:
    """An export says itself what it is; a checkpoint without one is told apart from what is no model."""
    export = tmp_path / "export"
    write_control(export, toys / "sd")
    (export / "sfumato.json").write_text(json.dumps({"step": 5, "base": str(toys / "sd"), "window": 150}))
    found = sources.find_model(export)
    assert (found.folder, found.prompt_window, found.kind, found.adapter) == (
        toys / "sd",
        150,
        "controlnet",
        export,
    )
    (export / "sfumato.json").write_text(json.dumps({"step": 5}))
    with pytest.raises(UserError, match="does not say on which model"):
        sources.find_model(export)
    (tmp_path / "step-000005").mkdir()
    (tmp_path / "step-000005/state.json").write_text("{}")
    with pytest.raises(UserError, match="no export is in it(.|\n)*sfumato export"):
        sources.find_model(tmp_path / "step-000005")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/sfumato.json").write_text('{"kind": "magic"}')
    with pytest.raises(UserError, match="of the kind 'magic'"):
        sources.find_model(tmp_path / "odd")
    with pytest.raises(UserError, match="PixArt"):
        shutil.copytree(toys / "sd", tmp_path / "other")
        index = json.loads((tmp_path / "other/model_index.json").read_text())
        (tmp_path / "other/model_index.json").write_text(
            json.dumps(index | {"_class_name": "PixArtZetaPipeline"})
        )
        pipelines.open_pipeline(tmp_path / "other", "cpu", torch.float32)


def test_every_option_reaches_the_request() -> None:
    """An option that request_of forgets would be ignored in silence."""
    import argparse

    parser = argparse.ArgumentParser()
    sampling_options(parser)
    told = {action.dest for action in parser._actions} - {
        "help",
        "gpus",
        "instead",
    }  # grammar.parse takes that
    elsewhere = {
        "lora": "loras", "steps": "", "guidance": "", "guidance_rescale": "", "size": "", "negative": "",
        "scheduler": "", "batch": "", "strength": "", "control_scale": "",
    }  # fmt: skip
    assert told - elsewhere.keys() <= work.Request.__dataclass_fields__.keys()
    words = "m p --steps 7 --guidance 2 --guidance-rescale 0.5 --size 8x9 --negative n --scheduler euler"
    words += " --batch 3 --strength 0.4 --control-scale 0.6 --lora a=0.5"
    request = work.request_of(parse(["sample", *words.split()]))
    assert request.sampling == work.Sampling(7, 2.0, (8, 9), "n", "euler", 0.5, 3, 0.4, 0.6)
    assert request.loras == ((Path("a"), 0.5),)


def test_prompts_may_stand_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["m", "a", "--steps", "3", "b"],
        ["m", "--steps", "3", "a", "b"],
        ["--steps", "3", "m", "a", "b"],
    ):
        assert parse(["sample", *words]).prompts == ["a", "b"]
    with pytest.raises(SystemExit):
        parse(["sample", "m", "a", "--sed", "1"])
    assert "unknown argument --sed" in capsys.readouterr().err
