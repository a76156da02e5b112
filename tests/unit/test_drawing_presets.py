"""Presets that draw: each runs with a toy in the model's place, and says what is wrong with it."""

from pathlib import Path

import pytest
from PIL import Image

from sfumato import cli
from sfumato.config import PRESETS
from sfumato.errors import UserError
from sfumato.grammar import parse
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_depth_model, write_lora, write_picture

NAMES = ("sdxl-draw", "sdxl-draw-lora", "sdxl-draw-controlnet", "sdxl-draw-depth")
QUICK = ("--steps", "2", "--size", "32", "--seeds", "3", "--dtype", "fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawing")
    twins.write("sdxl", folder / "sdxl")
    write_lora(folder / "runs" / "sdxl-lora" / "pytorch_lora_weights.safetensors", folder / "sdxl")
    write_control(folder / "control", folder / "sdxl")
    write_depth_model(folder / "depth")
    write_picture(folder / "cat.png")
    write_picture(folder / "conditioning_image_1.png", seed=1)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_each_draws(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user types it, with the toy in place of the hub's models."""
    monkeypatch.chdir(place)
    toys = ["--control", "control"] * ("controlnet" in name or "depth" in name)
    toys += ["--depth-model", "depth"] * (name == "sdxl-draw-depth")
    count = len(parse(["sample", name]).prompts)
    assert cli.main(["sample", name, "--model", "sdxl", *QUICK, *toys, "--out", name]) == 0
    pictures = sorted((place / name).glob("*seed3.png"))
    assert len(pictures) == count
    assert all(Image.open(file).size == (32, 32) for file in pictures)


def test_what_the_seeds_scripts_drew_with() -> None:
    """Steps, guidance, seeds and the rest of the rows of the seeds' inference table."""
    plain, lora, control, depth = (parse(["sample", name]) for name in NAMES)
    for found in (plain, lora, control, depth):
        assert (found.steps, found.guidance, found.size) == (50, 5.0, (1024, 1024))
        assert found.seeds == [8, 23, 42, 1334]
    assert len(plain.prompts) == 8 and plain.negative and lora.lora == [(Path("runs/sdxl-lora"), 1.0)]
    assert (control.scheduler, control.control) == ("unipc", "runs/sdxl-controlnet")
    assert (depth.strength, depth.control_scale, depth.depth, depth.dtype) == (0.99, 0.5, "auto", "fp16")
    assert depth.prompts == ["A robot, 4k photo"]


def test_the_command_line_comes_first() -> None:
    found = parse(["sample", "sdxl-draw", "a red fox", "--steps", "7", "--model", "runs/mine"])
    assert (found.model, found.prompts, found.steps) == ("runs/mine", ["a red fox"], 7)
    assert found.seeds == [8, 23, 42, 1334]
    behind = parse(["sample", "sdxl-draw", "--steps", "7", "a red fox"])
    assert behind.prompts == ["a red fox"]
    around = parse(["sample", "sdxl-draw", "a red fox", "--steps", "7", "two cats"])
    assert around.prompts == ["a red fox", "two cats"]


def test_a_map_takes_the_place_of_the_presets_depth_and_its_model() -> None:
    assert parse(["sample", "sdxl-draw-depth", "--depth", "map.png"]).depth_model is None
    assert parse(["sample", "sdxl-draw-depth", "--depth", "auto"]).depth_model == "Intel/dpt-hybrid-midas"
    both = parse(["sample", "sdxl-draw-depth", "--depth", "map.png", "--depth-model", "mine"])
    assert both.depth_model == "mine", "so that it is refused"


def test_a_second_model_is_refused() -> None:
    with pytest.raises(UserError, match="runs/mine, which is no preset"):
        parse(["sample", "runs/mine", "a red fox", "--model", "runs/other"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sample]\nmodel = 'x'\nstep = 3", "unknown key step; did you mean steps?"),
        ("[sample]\nmodel = 'x'\nsteps = 0", "steps = 0"),
        ("[sample]\nmodel = 'x'\nguidance = nan", "nan is no finite number"),
        ("[sample]\nmodel = 'x'\nseeds = 3", "give a list"),
        ("[sample]\nmodel = 'x'\nfit = 'yes'", "give true or false"),
        ("[sample]\nmodel = 'x'\ndtype = 'fp8'", "choose fp32, bf16, fp16"),
        ("[sample]\nsteps = 3", "it names no model"),
        ("steps = 3", "sfumato train mine"),
        ("[sample", "not valid TOML"),
    ],
)
def test_a_faulty_one_is_told(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["sample", str(file)])
    assert words in str(error.value)


def test_train_and_sample_send_to_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "sdxl-draw"]) == 2
    assert "sfumato sample sdxl-draw" in capsys.readouterr().err
    assert cli.main(["sample", "sdxl-lora"]) == 2
    assert "sfumato train sdxl-lora" in capsys.readouterr().err


def test_every_drawing_preset_is_tested() -> None:
    assert {file.stem for file in PRESETS.glob("*draw*.toml")} == set(NAMES)
