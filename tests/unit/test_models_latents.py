"""Pixels, moments, latents: the pipeline's own decoding inverts ours (trap T8 at toy size)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sfumato import models
from sfumato.errors import UserError
from sfumato.models.family import Family, draw
from sfumato.models.latents import check_finite
from tests.unit.twins import batch_of, change, copy, family, load, twin

ALL = pytest.mark.parametrize("name", models.families())


def check_inverse(part: Family, scaled: Callable[[Tensor], Tensor]) -> None:
    """What the pipeline hands to the decoder, scaled our way, is the latents that its last step gave."""
    pipeline = part.assemble(part.build_denoiser())
    inputs = part.prompt_inputs(part.encode_prompts(["a cat"]), part.null_condition())
    options: dict[str, Any] = {"num_inference_steps": 1, "height": 64, "width": 64, **inputs}
    seen: list[Tensor] = []
    hook = part.vae.post_quant_conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    latents = pipeline(**options, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    pipeline(**options, output_type="pt", generator=torch.Generator().manual_seed(0))
    hook.remove()
    torch.testing.assert_close(scaled(seen[0]), latents, rtol=1e-5, atol=1e-5)


@ALL
def test_the_pipelines_decoding_inverts_our_scaling(name: str) -> None:
    check_inverse(family(name), family(name).scaled)


def with_statistics(tmp_path: Path) -> Family:
    folder = copy("sdxl", tmp_path)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 1.0], "latents_std": [0.5, 1.5, 2.0, 3.0]}
    change(folder / "vae" / "config.json", lambda values: values.update(statistics))
    return load(folder)


def test_a_vae_with_channel_statistics_too(tmp_path: Path) -> None:
    part = with_statistics(tmp_path)
    check_inverse(part, part.scaled)
    with pytest.raises(AssertionError):
        check_inverse(part, lambda raw: Family.scaled(part, raw))


@ALL
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda raw, vae: raw, id="not-scaled"),
        pytest.param(lambda raw, vae: raw / vae.config.scaling_factor, id="divided"),
        pytest.param(lambda raw, vae: raw * 0.15, id="another-models-factor"),
    ],
)
def test_the_inverse_check_catches(name: str, spoil: Callable[[Tensor, AutoencoderKL], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_inverse(family(name), lambda raw: spoil(raw, family(name).vae))


def check_sample(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Like diffusers' own Gaussian, with the noise from outside."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        gaussian = family("sd").vae.encode(pixels).latent_dist
    noise = torch.randn(gaussian.mean.shape, generator=torch.Generator().manual_seed(2))
    right = gaussian.sample(generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(make(family("sd").moments(pixels), noise), right, rtol=0, atol=1e-6)
    extreme = torch.tensor([1.0, 100.0]).view(1, 2, 1, 1)
    assert make(extreme, torch.ones(1, 1, 1, 1)).item() == pytest.approx(1 + 22026.46, rel=1e-4)


def test_latents_are_drawn_as_diffusers_draws_them() -> None:
    check_sample(draw)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda moments, noise: moments.chunk(2, 1)[0], id="mean-only"),
        pytest.param(lambda m, noise: m.chunk(2, 1)[0] + m.chunk(2, 1)[1].exp() * noise, id="variance"),
        pytest.param(lambda m, noise: m.chunk(2, 1)[0] + (m.chunk(2, 1)[1] / 2).exp() * noise, id="no-clamp"),
    ],
)
def test_the_sample_check_catches(spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_sample(spoil)


@ALL
def test_encode_is_pixels_moments_latents(name: str) -> None:
    part, batch = family(name), batch_of(["a cat", "a dog"])
    latents = part.encode(batch)[0]
    moments = part.moments(batch.pixels)
    assert moments.shape == (2, 8, 8, 8) and moments.dtype == torch.float32
    assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(latents, part.latents(moments, batch.draws.posterior))
    other = replace(batch, draws=replace(batch.draws, posterior=-batch.draws.posterior))
    middle = (latents + part.encode(other)[0]) / 2
    torch.testing.assert_close(middle, part.scaled(moments.chunk(2, 1)[0]), rtol=1e-4, atol=1e-5)


def test_a_vae_in_bf16_still_gives_fp32_latents() -> None:
    part, batch = load(twin("sd"), torch.bfloat16), batch_of(["a cat"])
    latents = part.encode(batch)[0]
    assert part.vae.dtype == torch.bfloat16 and latents.dtype == torch.float32
    torch.testing.assert_close(latents, family("sd").encode(batch)[0], rtol=0.05, atol=0.05)


def test_latents_that_are_not_finite_name_their_samples() -> None:
    batch = batch_of(["a", "b", "c"])
    batch.pixels[1, 0, 5, 5] = float("nan")
    latents = family("sd").encode(batch)[0]
    assert torch.isfinite(latents).flatten(1).all(1).tolist() == [True, False, True]
    with pytest.raises(UserError, match="samples 101\n") as error:
        check_finite(latents, batch.ids, "float32")
    assert "vae_dtype" in str(error.value) and "float32" in str(error.value)


def test_another_vae_takes_the_place_of_the_folders(tmp_path: Path) -> None:
    folder = copy("sd", tmp_path)
    change(folder / "vae" / "config.json", lambda values: values.update(scaling_factor=0.5))
    assert load(twin("sdxl"), vae=str(folder / "vae")).vae.config.scaling_factor == 0.5
    assert load(twin("sdxl"), vae=str(folder)).vae.config.scaling_factor == 0.5


@ALL
def test_what_overflows_in_bf16_is_encoded_in_fp32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of three; the others keep their numbers, and the row is told."""
    folder, pixels = twin(name), torch.rand(3, 3, 64, 64) * 2 - 1
    low = load(folder, torch.bfloat16)
    exact = load(folder).moments(pixels)
    whole = low.moments(pixels)

    def overflowing(self: Family, pixels: Tensor) -> Tensor:
        found = whole.clone()
        found[1, 0, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(Family, "moments", overflowing)
    told: list[int] = []
    found = low.safe_moments(pixels, told)
    assert told == [1] and torch.equal(found[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(found[1], exact[1], atol=1e-5, rtol=1e-5)
    assert low.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "asked"), [(torch.float16, 1), (torch.bfloat16, 0), (torch.float32, 0)])
def test_a_step_asks_only_a_vae_of_less_range_than_fp32(
    kind: torch.dtype, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question waits for the device; what overflows in fp16 is there a second time."""
    part, batch = load(twin("sd"), torch.float32), batch_of(["a cat"])
    exact, calls = part.encode_images(batch), 0
    right = Family.safe_moments

    def counted(self: Family, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return right(self, *args)

    monkeypatch.setattr(Family, "safe_moments", counted)
    monkeypatch.setattr(part, "moments", lambda pixels: torch.full((1, 8, 8, 8), float("inf")))
    part.vae_dtype = kind
    found = part.encode_images(batch)
    assert calls == asked
    assert torch.allclose(found, exact, atol=1e-5) == bool(asked)
