"""min-SNR weights against diffusers' compute_snr at every timestep and for every target."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from sfumato.config import MinSNRWeight, UniformWeight
from sfumato.objective import weights
from sfumato.objective.process import DDPM, Prediction

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TARGETS: list[Prediction] = ["epsilon", "v", "sample"]


def reference(prediction: Prediction, gamma: float) -> Tensor:
    """The weights as diffusers' training scripts compute them, from a float64 schedule, (1000,)."""
    scheduler = DDPMScheduler(**SD)
    exact = SimpleNamespace(alphas_cumprod=torch.cumprod(1 - scheduler.betas.double(), 0))
    snr = compute_snr(exact, torch.arange(1000)).double()
    capped = torch.stack([snr, torch.full_like(snr, gamma)], 1).min(1).values
    return {"epsilon": capped / snr, "v": capped / (snr + 1), "sample": capped}[prediction]


def check_weights(table: Tensor, prediction: Prediction, gamma: float) -> None:
    assert table.dtype == torch.float32 and table.shape == (1000,)
    torch.testing.assert_close(table.double(), reference(prediction, gamma), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", TARGETS)
def test_min_snr(prediction: Prediction, gamma: float) -> None:
    check_weights(
        weights.table(MinSNRWeight(kind="min_snr", gamma=gamma), DDPM(SD, prediction)), prediction, gamma
    )


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "epsilon": lambda snr: snr.clamp(max=5) / (snr + 1),  # v's divisor
    "v": lambda snr: snr.clamp(max=5) / snr,  # epsilon's divisor, the usual mistake
    "sample": lambda snr: snr.clamp(min=5),  # the wrong way round
}


@pytest.mark.parametrize("prediction", TARGETS)
def test_min_snr_catches_the_wrong_formula(prediction: Prediction) -> None:
    with pytest.raises(AssertionError):
        check_weights(BROKEN[prediction](DDPM(SD, prediction).snr()).float(), prediction, 5.0)


@pytest.mark.parametrize("prediction", TARGETS)
def test_min_snr_catches_weights_of_a_neighbour(prediction: Prediction) -> None:
    table = weights.table(MinSNRWeight(kind="min_snr"), DDPM(SD, prediction))
    with pytest.raises(AssertionError):
        check_weights(table.roll(1), prediction, 5.0)


def check_finite(formula: Callable[[Tensor], Tensor], at_zero: float) -> None:
    """At the step without signal the weight is its formula's limit."""
    snr = DDPM(SD, "v", zero_terminal_snr=True).snr()
    table = formula(snr)
    assert torch.isfinite(table).all(), "a weight is not finite"
    assert table[-1] == at_zero
    torch.testing.assert_close(table[-1], table[-2], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("prediction", "limit"), [("epsilon", 1.0), ("v", 0.0), ("sample", 0.0)])
def test_min_snr_without_terminal_signal(prediction: Prediction, limit: float) -> None:
    check_finite(lambda snr: weights.min_snr(snr, 5.0, prediction), limit)


def test_min_snr_without_terminal_signal_catches_a_plain_division() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        check_finite(lambda snr: snr.clamp(max=5) / snr, 1.0)


def test_uniform() -> None:
    assert torch.equal(weights.table(UniformWeight(), DDPM(SD)), torch.ones(1000))
