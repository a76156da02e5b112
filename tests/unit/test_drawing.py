"""Pictures from prompts and seeds: the stock pipeline's own, whatever else is drawn and by how many ranks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from sfumato import config, models
from sfumato.drawing import pipelines, schedulers
from sfumato.drawing.draw import draw as draw_shots
from sfumato.drawing.draw import forward, share
from sfumato.drawing.options import SCHEDULERS
from sfumato.drawing.pictures import Drawing
from sfumato.drawing.request import Sampling, Shot, shots
from sfumato.drawing.words import words
from sfumato.errors import UserError
from tests.unit import twins

QUICK = Sampling(steps=2, guidance=3.0)
START = "a red fox beside a house " * 13  # 78 tokens
Draw = Callable[..., list[Drawing]]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / request.param
    twins.write(request.param, path)
    return path


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny") / "sd"
    twins.write("sd", path)
    return path


@pytest.fixture(scope="module")
def pipeline(sd: Path) -> Any:
    return load(sd)


@cache
def stock_of(folder: Path) -> Any:
    stock = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    stock.set_progress_bar_config(disable=True)
    return stock


@cache
def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What is drawn with leaves it as it was, so that tests may share it."""
    pipeline = pipelines.open_pipeline(folder, "cpu", dtype, 77, None)[0]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, **options: Any
) -> list[Drawing]:
    return draw_shots(pipeline, shots(prompts, seeds), sampling, **options)


def pixels(drawing: Drawing) -> np.ndarray:
    return np.asarray(drawing.image).astype(int)


def check_stock(draw: Draw, folder: Path, sampling: Sampling) -> None:
    """To the bit what diffusers gives a user who passes the same prompt, seed and settings."""
    stock = stock_of(folder)
    found = draw(load(folder), ["a red fox", "two cats"], [5], sampling)
    for prompt, drawing in zip(["a red fox", "two cats"], found, strict=True):
        wanted = stock(
            prompt,
            negative_prompt=sampling.negative,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=torch.Generator().manual_seed(5),
        ).images[0]
        assert np.array_equal(pixels(drawing), np.asarray(wanted)), f"another picture for {prompt!r}"


@pytest.mark.parametrize("negative", [None, "rain"])
def test_pictures_are_those_of_the_stock_pipeline(folder: Path, negative: str | None) -> None:
    check_stock(draw, folder, replace(QUICK, negative=negative))


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"negative": None}, {"steps": 3}])
def test_stock_catches_an_ignored_setting(sd: Path, change: dict[str, Any]) -> None:
    def broken(pipeline: Any, prompts: Any, seeds: Any, sampling: Sampling) -> list[Drawing]:
        return draw(pipeline, prompts, seeds, replace(sampling, **change))

    with pytest.raises(AssertionError, match="another picture"):
        check_stock(broken, sd, replace(QUICK, negative="rain"))


def check_alone(draw: Draw, pipeline: Any, tolerance: int) -> None:
    """A picture is the same whatever is drawn before and beside it."""
    together = draw(pipeline, ["a red fox", "two cats"], [1, 2, 3], QUICK)
    for drawing in together:
        alone = draw(pipeline, [drawing.prompt], [drawing.seed], QUICK)[0]
        difference = abs(pixels(alone) - pixels(drawing)).max()
        assert difference <= tolerance, f"{drawing.prompt}, {drawing.seed} differs by {difference}"


def test_a_picture_depends_on_its_prompt_and_seed_only(pipeline: Any) -> None:
    check_alone(draw, pipeline, 0)


def test_a_picture_does_not_depend_on_its_batch(pipeline: Any) -> None:
    def batched(pipeline: Any, prompts: Any, seeds: Any, sampling: Sampling) -> list[Drawing]:
        return draw(pipeline, prompts, seeds, replace(sampling, batch_size=4))

    check_alone(batched, pipeline, 1)


def test_alone_catches_one_generator_for_all(pipeline: Any) -> None:
    def broken(pipeline: Any, prompts: Any, seeds: Any, sampling: Sampling) -> list[Drawing]:
        everyones = torch.Generator().manual_seed(seeds[0])
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        images = [
            pipeline(prompt, num_inference_steps=2, generator=everyones).images[0] for prompt, _ in pairs
        ]
        return [Drawing(i, Shot(*pairs[i]), image, sampling, "") for i, image in enumerate(images)]

    with pytest.raises(AssertionError, match="differs"):
        check_alone(broken, pipeline, 1)


def check_shares(share: Callable[[int, int, int], list[int]]) -> None:
    """Every place is drawn once, and all ranks draw as often, or those that draw more wait for ever."""
    for number in (0, 1, 2, 5, 8):
        for world in (1, 2, 3, 8):
            shares = [share(number, rank, world) for rank in range(world)]
            assert len({len(places) for places in shares}) == 1, "ranks draw unequally often"
            real = [place for places in shares for place in places if place < number]
            assert sorted(real) == list(range(number)), "a place is left out or drawn twice"


def test_shares() -> None:
    check_shares(share)


def test_shares_catch_ranks_that_draw_unequally_often() -> None:
    with pytest.raises(AssertionError, match="unequally"):
        check_shares(lambda number, rank, world: list(range(number))[rank::world])


def test_shares_catch_a_tail_left_out() -> None:
    with pytest.raises(AssertionError, match="left out"):
        check_shares(lambda number, rank, world: [rank + turn * world for turn in range(number // world)])


def test_drawing_leaves_everything_as_it_was(sd: Path) -> None:
    pipeline = load.__wrapped__(sd)
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    scheduler, decode, encode = pipeline.scheduler, pipeline.vae.decode, pipeline.vae.encode
    state = torch.get_rng_state()
    seen: list[bool] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    draw(pipeline, ["a red fox"], [1], replace(QUICK, scheduler="euler"))
    with pytest.raises(UserError):
        draw(pipeline, ["a red fox"], [1], replace(QUICK, size=(65, 64)))
    assert seen and not any(seen), "the denoiser was in training mode"
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert pipeline.scheduler is scheduler and scheduler.num_inference_steps is None
    assert pipeline.vae.decode == decode and pipeline.vae.encode == encode
    assert pipeline._progress_bar_config == {"disable": True}
    assert torch.equal(torch.get_rng_state(), state), "the global random state moved"


def check_precisions(draw: Draw, folder: Path) -> None:
    pipeline = load.__wrapped__(folder, torch.bfloat16)
    pipeline.vae.to(torch.float32)
    found = draw(pipeline, ["a red fox"], [1], QUICK)[0]
    wanted = draw(load(folder), ["a red fox"], [1], QUICK)[0]
    difference = abs(pixels(found) - pixels(wanted))
    assert difference.mean() < 8, f"bf16 gives another picture, {difference.mean():.1f} levels off"


def test_the_vae_keeps_a_precision_of_its_own(folder: Path) -> None:
    check_precisions(draw, folder)


def test_precisions_catch_a_plain_pipeline(sd: Path) -> None:
    def broken(pipeline: Any, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
        said = words(pipeline, prompts, None, None)
        return forward(pipeline, said, shots(prompts, seeds), sampling)

    with pytest.raises(RuntimeError, match="dtype|type"):
        check_precisions(broken, sd)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(pipeline: Any, name: str) -> None:
    own = draw(pipeline, ["a red fox"], [1], replace(QUICK, steps=4))[0]
    other = draw(pipeline, ["a red fox"], [1], replace(QUICK, steps=4, scheduler=name))[0]
    assert other.scheduler == SCHEDULERS[name] and own.scheduler == "DDIMScheduler"
    assert np.array_equal(pixels(own), pixels(other)) == (name == "ddim")


def test_another_scheduler_keeps_the_models_schedule() -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    own = DDIMScheduler(
        **settings,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    for name in SCHEDULERS:
        found = schedulers.other_scheduler(own, name)
        found.set_timesteps(4)
        assert found.config["prediction_type"] == "v_prediction" and int(found.timesteps[0]) == 999
        torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod, atol=1e-6, rtol=0)


def test_ddim_does_not_clip_latents() -> None:
    assert not schedulers.other_scheduler(PNDMScheduler(), "ddim").config["clip_sample"]
    assert schedulers.other_scheduler(DDIMScheduler(clip_sample=True), "ddim").config["clip_sample"]


def test_a_scheduler_of_another_process_is_refused() -> None:
    with pytest.raises(UserError, match="process"):
        schedulers.other_scheduler(FlowMatchEulerDiscreteScheduler(), "ddim")
    with pytest.raises(UserError, match="choose ddim, euler"):
        schedulers.other_scheduler(DDIMScheduler(), "ddpm++")


def test_sizes(pipeline: Any) -> None:
    assert draw(pipeline, ["a red fox"], [1], replace(QUICK, size=32))[0].image.size == (32, 32)
    assert draw(pipeline, ["a red fox"], [1], replace(QUICK, size=(48, 32)))[0].image.size == (48, 32)
    assert draw(pipeline, ["a red fox"], [1], QUICK)[0].image.size == (64, 64)
    with pytest.raises(UserError, match="choose for example 48 x 64"):
        draw(pipeline, ["a red fox"], [1], replace(QUICK, size=(50, 64)))


def test_progress_is_told(pipeline: Any) -> None:
    told: list[tuple[int, int]] = []
    draw(pipeline, ["a", "b"], [1, 2, 3], replace(QUICK, batch_size=4), drawn=lambda *at: told.append(at))
    assert told == [(4, 6), (6, 6)]
    assert draw(pipeline, [], [1], QUICK) == []


def check_window(draw: Draw, folder: Path) -> None:
    """A window of 150 reads words that the plain pipeline cuts off, also of the negative prompt."""
    pipeline, family = pipelines.open_pipeline(folder, "cpu", torch.float32, 150, None)
    assert family is not None and pipeline.text_encoder is family.parts()["text_encoder"]
    seen: set[int] = set()
    pipeline.unet.register_forward_pre_hook(
        lambda module, inputs, options: seen.add(options["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    strong = replace(QUICK, guidance=50)
    end = " a huge grey thunderstorm over the northern sea"
    short, long = draw(pipeline, [START, START + end], [1], strong, family=family)
    assert seen == {2 * 77}, "the denoiser did not meet two windows"
    assert not np.array_equal(pixels(short), pixels(long)), "the prompt's end was not read"
    unwanted = draw(pipeline, [START], [1], replace(strong, negative=START + end), family=family)[0]
    assert not np.array_equal(pixels(unwanted), pixels(short)), "the negative prompt was not read"


def test_a_longer_prompt_window(folder: Path) -> None:
    check_window(draw, folder)


def test_window_catches_prompts_cut_at_77(sd: Path) -> None:
    def broken(*inputs: Any, family: Any) -> list[Drawing]:
        return draw(*inputs)

    with pytest.raises(AssertionError, match="two windows"):
        check_window(broken, sd)


def test_a_window_of_77_through_the_family_is_the_stock_pipelines(folder: Path) -> None:
    model = config.Model(weights=str(folder))
    family = models.load(model, torch.device("cpu"), torch.float32, torch.float32)
    pipeline = load(folder)
    for sampling in (QUICK, replace(QUICK, negative="rain")):
        with_family = draw(pipeline, ["a red fox"], [1], sampling, family=family)[0]
        without = draw(pipeline, ["a red fox"], [1], sampling)[0]
        assert np.array_equal(pixels(with_family), pixels(without))
