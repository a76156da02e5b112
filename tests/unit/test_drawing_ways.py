"""Every way to draw is the stock pipeline of diffusers with the same inputs and generator, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.drawing import pipelines
from sfumato.drawing.adapters import load_control
from sfumato.drawing.draw import draw, fitting, picture_options
from sfumato.drawing.inputs import cut
from sfumato.drawing.pictures import Drawing
from sfumato.drawing.request import ROLES, Sampling, Shot
from sfumato.errors import UserError
from tests.unit import twins
from tests.unit.toy_drawing import write_control, write_mask, write_picture

HOW = Sampling(steps=4, guidance=3.0, size=32, strength=0.5, control_scale=0.7)
WAYS = {
    "Img2Img": {"image"},
    "Inpaint": {"image", "mask"},
    "ControlNet": {"condition"},
    "ControlNetImg2Img": {"image", "condition"},
    "ControlNetInpaint": {"image", "mask", "condition"},
}
Toy = tuple[Any, Any, Path]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A pipeline, its ControlNet, and the folder of the pictures."""
    return made(tmp_path_factory.mktemp("toy"), request.param)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return made(tmp_path_factory.mktemp("toy"), "sd")


def made(folder: Path, family: str) -> Toy:
    twins.write(family, folder / "base")
    write_control(folder / "control", folder / "base")
    write_picture(folder / "image.png", seed=1)
    write_picture(folder / "condition.png", seed=2)
    write_mask(folder / "mask.png")
    pipeline, _ = pipelines.open_pipeline(folder / "base", "cpu", torch.float32)
    return pipeline, load_control(folder / "control", torch.float32, "cpu"), folder


def shot_of(toy: Toy, way: str, seed: int = 5) -> Shot:
    files = {role: toy[2] / f"{role}.png" for role in WAYS[way]}
    return Shot("a red fox", seed, negative="rain", **files)  # type: ignore[arg-type]


def drawn(toy: Toy, shot: Shot, sampling: Sampling = HOW) -> Drawing:
    control = toy[1] if shot.condition is not None else None
    return draw(toy[0], [shot], sampling, control=control)[0]


def stock(toy: Toy, way: str) -> np.ndarray:
    """What a user of diffusers gets, in the keywords of its own pages."""
    pipeline, control, folder = toy
    name = type(pipeline).__name__.replace("Pipeline", f"{way}Pipeline")
    own: dict[str, Any] = dict(pipeline.components)
    if way.startswith("ControlNet"):
        own["controlnet"] = control
    if "XL" not in name:
        own["requires_safety_checker"] = False
    kind = getattr(diffusers, name)(**own)
    kind.set_progress_bar_config(disable=True)
    kind.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    opened = {role: Image.open(folder / f"{role}.png") for role in ROLES}
    given: dict[str, Any] = {}
    if way == "ControlNet":
        given = {"image": opened["condition"]}
    elif "condition" in WAYS[way]:
        given = {"image": opened["image"], "control_image": opened["condition"]}
    else:
        given = {"image": opened["image"]}
    if "mask" in WAYS[way]:
        given["mask_image"] = opened["mask"]
    if "image" in WAYS[way]:
        given["strength"] = HOW.strength
    if "condition" in WAYS[way]:
        given["controlnet_conditioning_scale"] = HOW.control_scale
    if way != "Img2Img":
        given |= {"width": 32, "height": 32}
    found = kind(
        "a red fox",
        negative_prompt="rain",
        num_inference_steps=HOW.steps,
        guidance_scale=HOW.guidance,
        generator=torch.Generator().manual_seed(5),
        **given,
    )
    return np.asarray(found.images[0])


def check_stock(toy: Toy, way: str, drawn: Callable[[Toy, Shot], Drawing] = drawn) -> None:
    picture = np.asarray(drawn(toy, shot_of(toy, way)).image)
    assert np.array_equal(picture, stock(toy, way)), f"{way} draws another picture than diffusers"


@pytest.mark.parametrize("way", WAYS)
def test_a_way_is_the_stock_pipelines(toy: Toy, way: str) -> None:
    check_stock(toy, way)


def strength_ignored(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, shot, replace(HOW, strength=1.0))


def scale_ignored(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, shot, replace(HOW, control_scale=1.0))


def mask_ignored(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, replace(shot, mask=shot.image))


def another_condition(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, replace(shot, condition=toy[2] / "image.png"))


def control_image_not_passed(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, replace(shot, condition=None))


def pictures_exchanged(toy: Toy, shot: Shot) -> Drawing:
    return drawn(toy, replace(shot, image=shot.condition, condition=shot.image))


BROKEN = [
    ("Img2Img", strength_ignored),
    ("Inpaint", mask_ignored),
    ("ControlNet", scale_ignored),
    ("ControlNet", another_condition),
    ("ControlNetImg2Img", control_image_not_passed),
    ("ControlNetImg2Img", pictures_exchanged),
]


@pytest.mark.parametrize(("way", "broken"), BROKEN)
def test_stock_catches(sd: Toy, way: str, broken: Callable[[Toy, Shot], Drawing]) -> None:
    with pytest.raises(AssertionError, match="another picture"):
        check_stock(sd, way, broken)


def test_pictures_beside_each_other_keep_their_own_inputs(sd: Toy) -> None:
    """In one forward pass every picture has its own seed, image and condition."""
    one = shot_of(sd, "ControlNetImg2Img")
    assert isinstance(one.image, Path)
    other = replace(one, seed=6, image=one.condition, condition=one.image)
    both = draw(sd[0], [one, other], replace(HOW, batch_size=2), control=sd[1])
    for shot, drawing in zip([one, other], both, strict=True):
        alone = np.asarray(drawn(sd, shot).image).astype(int)
        assert abs(np.asarray(drawing.image) - alone).max() <= 1


def test_a_pipelines_own_controlnet_draws(sd: Toy) -> None:
    shot = shot_of(sd, "ControlNet")
    own = fitting(sd[0], [shot], sd[1])
    assert np.array_equal(np.asarray(draw(own, [shot], HOW)[0].image), np.asarray(drawn(sd, shot).image))
    with pytest.raises(UserError, match="no condition to show it"):
        draw(own, [replace(shot, condition=None)], HOW)


def test_negatives_and_sizes_are_each_pictures_own(sd: Toy) -> None:
    """Shots that cannot share a forward pass do not: the picture is the one that is drawn alone."""
    shots = [
        Shot("a red fox", 1, 0, negative="rain"),
        Shot("a red fox", 1, 1),
        Shot("a red fox", 1, 2, size=(48, 32)),
        Shot("two cats", 1, 3, size=(48, 32)),
    ]
    how = replace(HOW, strength=None, steps=2)
    found = draw(sd[0], shots, replace(how, batch_size=4))
    assert [drawing.image.size for drawing in found] == [(32, 32), (32, 32), (48, 32), (48, 32)]
    for shot, drawing in zip(shots, found, strict=True):
        alone = np.asarray(draw(sd[0], [shot], how)[0].image).astype(int)
        assert abs(np.asarray(drawing.image) - alone).max() <= 1
    assert not np.array_equal(np.asarray(found[0].image), np.asarray(found[1].image))
    assert [drawing.facts()["negative"] for drawing in found[:2]] == ["rain", None]


def test_the_parts_are_shared_and_keep_their_precision(sd: Toy) -> None:
    pipeline, _ = pipelines.open_pipeline(sd[2] / "base", "cpu", torch.bfloat16)
    pipeline.vae.to(torch.float32)
    shot = shot_of(sd, "Img2Img")
    made = fitting(pipeline, [shot], None)
    assert made.unet is pipeline.unet and made.vae.dtype == torch.float32, "a part was copied or cast"
    half = np.asarray(draw(pipeline, [shot], HOW)[0].image).astype(int)
    assert abs(half - np.asarray(drawn(sd, shot).image)).mean() < 8
    assert pipeline.vae.dtype == torch.float32 and pipeline.unet.dtype == torch.bfloat16


def test_fit_is_the_geometry_of_training(sd: Toy, tmp_path: Path) -> None:
    """A picture of another size is resized to cover the size, and its middle is taken."""
    wide = write_picture(tmp_path / "wide.png", (96, 48), seed=3)
    given = picture_options(fitting(sd[0], [Shot("a", 1, image=wide)], None), [Shot("a", 1, image=wide)], HOW)
    with Image.open(wide) as image:
        wanted = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS, (24, 0, 72, 48)))
        assert np.array_equal(np.asarray(given["image"][0]), wanted)
        assert cut(image.convert("RGB"), (96, 48)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.1}, "of 4 steps that is none"),
        ({"strength": 1.5}, "share of the steps"),
        ({"guidance_rescale": 0.7}, "has no such setting"),
        ({"size": 33}, "choose for example 32 x 32"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(sd: Toy, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn(sd, shot_of(sd, "Img2Img"), replace(HOW, **change))


def test_classes_are_found_by_name() -> None:
    cases = [
        ("StableDiffusionXLPipeline", {"image", "mask"}, "StableDiffusionXLInpaintPipeline"),
        ("StableDiffusionInpaintPipeline", set(), "StableDiffusionPipeline"),
        ("FluxPipeline", {"condition"}, "FluxControlNetPipeline"),
        ("StableDiffusion3Pipeline", {"image"}, "StableDiffusion3Img2ImgPipeline"),
    ]
    for name, roles, wanted in cases:
        found = pipelines.class_for(getattr(diffusers, name), frozenset(roles))
        assert found.__name__ == wanted
    with pytest.raises(UserError, match="has no PixArtAlphaInpaintPipeline"):
        pipelines.class_for(diffusers.PixArtAlphaPipeline, frozenset({"image", "mask"}))
