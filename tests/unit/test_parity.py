"""Our loss and gradients against diffusers' arithmetic: its scheduler, its SNR, its training examples' steps.

The reference is what examples/text_to_image/train_text_to_image(_sdxl).py computes between the batch and the
backward pass, said with diffusers' own functions.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from sfumato import config, models
from sfumato.data.batch import Draws
from sfumato.objective import Objective
from tests.unit import twins

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    twins.write(request.param, folder)
    return models.load(config.Model(weights=str(folder)), CPU, FP32, FP32)


def batch(family: Any) -> tuple[Tensor, Draws, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=draw) for _ in range(2))
    draws = Draws(
        posterior=torch.zeros(4, 4, 8, 8), noise=noise, timestep=torch.tensor([0.0, 0.3, 0.62, 0.999]),
        offset=torch.randn(4, 4, 1, 1, generator=draw), perturbation=None,
    )  # fmt: skip
    condition = family.encode_prompts(["a cat", "", "two dogs on a hill", "red"])
    if family.size_and_crop:
        condition["size_and_crop"] = torch.tensor([[300, 500, 7, 33, 64, 64]] * 4, dtype=torch.float32)
    return latents, draws, condition


def reference(
    family: Any, unet: nn.Module, settings: config.Objective, prediction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The example's loss and gradients."""
    latents, draws, condition = batch(family)
    scheduler = DDPMScheduler.from_config(dict(family.scheduler_config), prediction_type=prediction)
    timesteps = (draws.timestep * scheduler.config.num_train_timesteps).long()
    noise = draws.noise + settings.noise_offset * draws.offset
    noisy = scheduler.add_noise(latents, noise, timesteps)
    extra = {}
    if family.size_and_crop:
        extra = {"text_embeds": condition["pooled"], "time_ids": condition["size_and_crop"]}
        extra = {"added_cond_kwargs": extra}
    predicted = unet(noisy, timesteps, condition["context"], return_dict=False, **extra)[0]
    target = {"epsilon": noise, "sample": latents}.get(prediction)
    if prediction == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    loss = F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))
    if isinstance(settings.weight, config.MinSNRWeight):
        snr = compute_snr(scheduler, timesteps)
        low = torch.stack([snr, settings.weight.gamma * torch.ones_like(snr)], 1).min(1)[0]
        loss = loss * {"epsilon": low / snr, "v_prediction": low / (snr + 1), "sample": low}[prediction]
    return gradients(loss, unet)


def gradients(losses: Tensor, net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    net.zero_grad()
    losses.mean().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def check_equal(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-6, msg=name)


SETTINGS = [
    ("epsilon", {}),
    ("v_prediction", {"prediction": "v"}),
    ("sample", {"prediction": "sample"}),
    ("epsilon", {"weight": "min_snr", "noise_offset": 0.1}),
    ("v_prediction", {"prediction": "v", "weight": "min_snr"}),
    ("sample", {"prediction": "sample", "weight": {"kind": "min_snr", "gamma": 2.0}}),
]


@pytest.mark.parametrize(("prediction", "said"), SETTINGS)
def test_loss_and_gradients_equal_diffusers(family: Any, prediction: str, said: dict[str, Any]) -> None:
    settings = config.Objective.model_validate(said)
    torch.manual_seed(0)
    unet = family.build_denoiser()
    latents, draws, condition = batch(family)
    losses = Objective(settings, family.scheduler_config).losses(
        lambda x_t, t: family.predict(unet, x_t, t, condition), latents, draws
    )
    check_equal(gradients(losses, unet), reference(family, unet, settings, prediction))


@pytest.mark.parametrize("wrong", ["target", "weight", "time"])
def test_the_comparison_catches(family: Any, wrong: str) -> None:
    torch.manual_seed(0)
    unet = family.build_denoiser()
    latents, draws, condition = batch(family)
    settings = config.Objective.model_validate({"prediction": "v"} if wrong == "target" else {})
    losses = Objective(settings, family.scheduler_config).losses(
        lambda x_t, t: family.predict(unet, x_t, t + (wrong == "time"), condition), latents, draws
    )
    if wrong == "weight":
        losses = losses * torch.tensor([1.0, 1.0, 1.0, 1.001])
    with pytest.raises(AssertionError):
        check_equal(gradients(losses, unet), reference(family, unet, config.Objective(), "epsilon"))
