"""One loss per sample, with offset, perturbation, weights and the fp32 rules."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sfumato import config
from sfumato.data.batch import Draws
from sfumato.errors import UserError
from sfumato.objective import Objective

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
Losses = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Draws], Tensor]


def objective(**settings: object) -> Objective:
    return Objective(config.Objective.model_validate(settings), SD)


def batch(size: int = 4) -> tuple[Tensor, Draws]:
    """Latents (size, 3, 4, 4) and all draws."""
    rng = torch.Generator().manual_seed(11)
    latents, posterior, noise, perturbation = torch.randn(4, size, 3, 4, 4, generator=rng)
    return latents, Draws(
        posterior=posterior,
        noise=noise,
        timestep=torch.rand(size, generator=rng),
        offset=torch.randn(size, 3, 1, 1, generator=rng),
        perturbation=perturbation,
    )


def net(x_t: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a network: any function of the sample and its timestep."""
    return torch.tanh(x_t) * torch.cos(t / 300)[:, None, None, None]


def check_per_sample(losses: Losses) -> None:
    """(B,) losses, and changing one sample changes its loss and no other's."""
    latents, draws = batch()
    before = losses(net, latents, draws)
    assert before.shape == (4,) and before.dtype == torch.float32, "not one fp32 loss per sample"
    for changed in range(4):
        other = latents.clone()
        other[changed] += 1
        moved = losses(net, other, draws) != before
        assert moved.tolist() == [i == changed for i in range(4)], (
            f"changing {changed} moved {moved.tolist()}"
        )


def test_one_loss_per_sample() -> None:
    check_per_sample(objective(weight="min_snr", noise_offset=0.1, input_perturbation=0.1).losses)


def test_one_loss_per_sample_catches_a_mean_over_the_batch() -> None:
    with pytest.raises(AssertionError, match="not one fp32 loss"):
        check_per_sample(lambda *inputs: objective().losses(*inputs).mean())


def test_one_loss_per_sample_catches_a_mean_spread_over_the_batch() -> None:
    with pytest.raises(AssertionError, match="moved"):
        check_per_sample(lambda *inputs: objective().losses(*inputs).mean().expand(4))


def by_hand(settings: config.Objective, latents: Tensor, draws: Draws) -> Tensor:
    """The v losses in float64, from the definitions, one sample at a time."""
    betas = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)
    losses = []
    for i in range(len(latents)):
        t = int(draws.timestep[i].double() * 1000)
        noise = draws.noise[i].double() + settings.noise_offset * draws.offset[i].double()
        mixed = noise + settings.input_perturbation * draws.perturbation[i].double()
        x_t = a[t].sqrt() * latents[i].double() + (1 - a[t]).sqrt() * mixed
        v = a[t].sqrt() * noise - (1 - a[t]).sqrt() * latents[i].double()
        error = net(x_t[None], torch.tensor([t], dtype=torch.float64))[0] - v
        losses.append((error**2).mean())
    return torch.stack(losses)


def check_losses(losses: Losses, settings: config.Objective) -> None:
    latents, draws = batch()
    torch.testing.assert_close(
        losses(net, latents, draws).double(), by_hand(settings, latents, draws), rtol=2e-5, atol=0
    )


CASES = {
    "plain": {},
    "noise_offset": {"noise_offset": 0.1},
    "input_perturbation": {"input_perturbation": 0.1},
    "both": {"noise_offset": 0.05, "input_perturbation": 0.2},
}


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str) -> None:
    settings = config.Objective(prediction="v", **CASES[name])
    check_losses(Objective(settings, SD).losses, settings)


@pytest.mark.parametrize("name", ["noise_offset", "input_perturbation", "both"])
def test_losses_catch_an_ignored_setting(name: str) -> None:
    with pytest.raises(AssertionError):
        check_losses(objective(prediction="v").losses, config.Objective(prediction="v", **CASES[name]))


def test_losses_catch_a_perturbed_target() -> None:
    """Input perturbation that also enters the target is plain, somewhat stronger noise."""

    def broken(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, draws: Draws) -> Tensor:
        noise = draws.noise + 0.1 * draws.perturbation
        return objective(prediction="v").losses(predict, latents, replace(draws, noise=noise))

    with pytest.raises(AssertionError):
        check_losses(broken, config.Objective(prediction="v", input_perturbation=0.1))


def test_losses_catch_an_offset_missing_from_the_target() -> None:
    def broken(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, draws: Draws) -> Tensor:
        shift = replace(draws, perturbation=draws.offset.expand_as(draws.noise))
        return objective(prediction="v", input_perturbation=0.1).losses(predict, latents, shift)

    with pytest.raises(AssertionError):
        check_losses(broken, config.Objective(prediction="v", noise_offset=0.1))


def test_weight_multiplies_each_sample() -> None:
    latents, draws = batch(32)
    plain, weighted = objective(), objective(weight="min_snr")
    t = plain.law.draw(draws.timestep)
    ratio = weighted.losses(net, latents, draws) / plain.losses(net, latents, draws)
    torch.testing.assert_close(ratio, weighted.weight(t))
    assert ratio.min() < 0.9 and ratio.max() > 0.99


def check_precision(losses: Losses) -> None:
    """The network meets fp32 inputs and whole fp32 timesteps; its bf16 answer is compared in fp32."""
    latents, draws = batch(64)
    seen: list[Tensor] = []

    def half(x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t.dtype == torch.float32 and t.dtype == torch.float32, "inputs are not fp32"
        seen.append(t)
        return net(x_t, t).bfloat16()

    found = losses(half, latents, draws)
    assert found.dtype == torch.float32, "losses are not fp32"
    assert torch.equal(seen[0], (draws.timestep * 1000).floor()), "timesteps lost digits"


def test_precision() -> None:
    check_precision(objective().losses)


def test_precision_catches_bf16_timesteps() -> None:
    def broken(predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, draws: Draws) -> Tensor:
        return objective().losses(lambda x_t, t: predict(x_t, t.bfloat16().float()), latents, draws)

    with pytest.raises(AssertionError, match="lost digits"):
        check_precision(broken)


def test_everything_is_finite_at_the_terminal_step() -> None:
    latents, draws = batch()
    last = replace(draws, timestep=torch.full((4,), 1 - 2**-24))
    for settings in ({"prediction": "v"}, {"prediction": "v", "weight": "min_snr"}, {"prediction": "sample"}):
        losses = objective(zero_terminal_snr=True, **settings).losses(net, latents, last)
        assert torch.isfinite(losses).all(), settings


def test_gradients_reach_the_network() -> None:
    latents, draws = batch()
    scale = torch.ones((), requires_grad=True)
    objective(weight="min_snr").losses(lambda x_t, t: scale * net(x_t, t), latents, draws).mean().backward()
    assert scale.grad is not None and scale.grad != 0


def test_config_guard() -> None:
    with pytest.raises(UserError, match="epsilon"):
        objective(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="epsilon"):
        config.Objective(zero_terminal_snr=True, prediction="epsilon")


def test_a_network_that_also_predicts_variance_is_not_mistaken() -> None:
    latents, draws = batch()
    with pytest.raises(AssertionError, match="predict gave"):
        objective().losses(lambda x_t, t: torch.cat([x_t, x_t], 1), latents, draws)
