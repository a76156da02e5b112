"""The DDPM schedule and targets against diffusers' scheduler and against float64 formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sfumato.errors import UserError
from sfumato.objective.process import DDPM, DIFFUSERS_NAMES

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": SD,
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_start": 0.0001, "beta_end": 0.02},
    "laplace": {"beta_schedule": "laplace"},
    "trained_betas": {"trained_betas": [0.01 * (i + 1) for i in range(40)], "num_train_timesteps": 40},
    "short": {**SD, "num_train_timesteps": 250},
    "zero_terminal": {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


def samples(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and noise (number, 2, 3, 3) for every timestep."""
    rng = torch.Generator().manual_seed(7)
    latents, noise = torch.randn(2, number, 2, 3, 3, generator=rng)
    return latents, noise, torch.arange(number)


def check_add_noise(add_noise: Callable[[Tensor, Tensor, Tensor], Tensor], config: dict[str, Any]) -> None:
    """The noisy input agrees with diffusers' scheduler at every timestep."""
    scheduler = DDPMScheduler(**config)
    latents, noise, t = samples(len(scheduler.betas))
    torch.testing.assert_close(
        add_noise(latents, noise, t), scheduler.add_noise(latents, noise, t), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise(name: str) -> None:
    check_add_noise(DDPM(SCHEDULES[name]).add_noise, SCHEDULES[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_catches_a_step_too_far(name: str) -> None:
    process = DDPM(SCHEDULES[name])

    def late(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return process.add_noise(latents, noise, (t + 1).clamp(max=process.timesteps - 1))

    with pytest.raises(AssertionError):
        check_add_noise(late, SCHEDULES[name])


@pytest.mark.parametrize("name", ["linear", "squaredcos"])
def test_add_noise_catches_another_schedule(name: str) -> None:
    with pytest.raises(AssertionError):
        check_add_noise(DDPM(SD).add_noise, SCHEDULES[name])


def check_v_target(target: Callable[[Tensor, Tensor, Tensor], Tensor], config: dict[str, Any]) -> None:
    """v = sqrt(a) noise - sqrt(1 - a) latents to 1e-6 in float64, and diffusers' get_velocity."""
    scheduler = DDPMScheduler(**config)
    latents, noise, t = samples(len(scheduler.betas))
    found = target(latents, noise, t)
    roots = torch.linspace(
        config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, len(t), dtype=torch.float64
    )
    a = torch.cumprod(1 - roots**2, 0)
    if config.get("rescale_betas_zero_snr"):
        root = a.sqrt()
        a = ((root - root[-1]) / (root[0] - root[-1]) * root[0]) ** 2
    a = a[:, None, None, None]
    torch.testing.assert_close(
        found.double(), a.sqrt() * noise.double() - (1 - a).sqrt() * latents.double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(found, scheduler.get_velocity(latents, noise, t), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["scaled_linear", "short", "zero_terminal"])
def test_v_target(name: str) -> None:
    check_v_target(DDPM(SCHEDULES[name], "v").target, SCHEDULES[name])


def test_v_target_catches_the_wrong_sign() -> None:
    process = DDPM(SD, "v")
    with pytest.raises(AssertionError):
        check_v_target(lambda latents, noise, t: -process.target(latents, noise, t), SD)


def test_v_target_catches_swapped_roles() -> None:
    process = DDPM(SD, "v")
    with pytest.raises(AssertionError):
        check_v_target(lambda latents, noise, t: process.target(noise, latents, t), SD)


def test_v_target_catches_roots_taken_in_bf16() -> None:
    process = DDPM(SD, "v")
    with pytest.raises(AssertionError):
        check_v_target(lambda latents, noise, t: process.target(latents, noise, t).bfloat16().float(), SD)


def test_epsilon_and_sample_targets() -> None:
    latents, noise, t = samples(1000)
    assert DDPM(SD, "epsilon").target(latents, noise, t) is noise
    assert DDPM(SD, "sample").target(latents, noise, t) is latents


def check_terminal(process: DDPM) -> None:
    """The last input holds no signal at all, the first keeps what it had, and everything is finite."""
    latents, noise, t = samples(process.timesteps)
    x_t = process.add_noise(latents, noise, t)
    assert torch.equal(x_t[-1], noise[-1]), "signal is left at the last step"
    first = (1 - SD["beta_start"]) ** 0.5
    torch.testing.assert_close(
        x_t[0], first * latents[0] + (1 - first**2) ** 0.5 * noise[0], atol=1e-6, rtol=0
    )
    assert torch.isfinite(x_t).all() and torch.isfinite(process.target(latents, noise, t)).all()
    assert torch.isfinite(process.snr()).all() and process.snr()[-1] == 0


def test_zero_terminal_snr() -> None:
    check_terminal(DDPM(SD, "v", zero_terminal_snr=True))


def test_zero_terminal_snr_of_the_folder_is_honoured() -> None:
    check_terminal(DDPM(SCHEDULES["zero_terminal"]))


def test_zero_terminal_snr_catches_the_plain_schedule() -> None:
    with pytest.raises(AssertionError, match="signal is left"):
        check_terminal(DDPM(SD, "v"))


@pytest.mark.parametrize("theirs", DIFFUSERS_NAMES)
def test_auto_is_what_the_scheduler_says(theirs: str) -> None:
    assert DDPM({**SD, "prediction_type": theirs}).prediction == DIFFUSERS_NAMES[theirs]
    assert DDPM({**SD, "prediction_type": theirs}, "sample").prediction == "sample"


def test_epsilon_without_terminal_signal_is_refused() -> None:
    with pytest.raises(UserError, match="zero_terminal_snr"):
        DDPM(SD, "auto", zero_terminal_snr=True)
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        DDPM({**SD, "rescale_betas_zero_snr": True}, "epsilon")


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
        {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"},
        {**SD, "use_flow_sigmas": True},
        {**SD, "prediction_type": "flow_prediction"},
        {**SD, "beta_schedule": "unheard_of"},
    ],
)
def test_what_is_not_ddpm_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        DDPM(config)


def test_a_sampler_with_our_settings_has_our_schedule() -> None:
    process = DDPM(SD, "v", zero_terminal_snr=True)
    scheduler = DDPMScheduler(**{**SD, **process.sampler_settings()})
    assert scheduler.config["prediction_type"] == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, process.alphas_cumprod.float(), atol=2e-5, rtol=0)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999, "a sampler that starts lower never meets the state without signal"
